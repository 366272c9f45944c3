// Layout `window` (window.cuh): made from dense rows, turned back into them, multiplied.
#include "dense.cuh"
#include "floats.cuh"
#include "window.cuh"

using namespace taper;

// What a block of 256 threads finds out about a stage before it is packed; warp u has unit u.
struct StageWindows {
  uint32_t histograms[TILE_ROWS][256];
  uint32_t lowest[TILE_ROWS];    // of the rows' windows
  uint32_t listed[8], other[8];  // weights outside of them in each unit: that an entry can express, and others
  uint32_t begin[9], room[8];    // of the units' lists

  // Where a weight lies: its code and f; f = 1 inside of the row's window, 4 where neither can express it.
  struct Place {
    uint32_t code, f;
    __device__ __forceinline__ Place(uint32_t weight, uint32_t lowest) {
      const int above = (int)(weight >> 7 & 255) - (int)lowest;
      const bool expressed = above >= -Window::BELOW && above < Window::ABOVE;
      code = expressed ? (uint32_t)above & 7 : 0, f = expressed ? (uint32_t)(above + 8) / 8 : 4;
    }
  };

  // The row in the tile of a lane's weight i = 8 h + kk.
  __device__ __forceinline__ static int row(int lane, int i) { return lane / 4 + 8 * (i >> 3); }

  // Called by all threads.
  __device__ void choose(const Dense& unit, bool exists, int lane, int warp) {
    for (int i = threadIdx.x; i < TILE_ROWS * 256; i += blockDim.x) histograms[i / 256][i % 256] = 0;
    __syncthreads();
    for (int j = 0; exists && j < 4; j++) {
      const Dense::Vector v = unit.load(j);
      for (int i = 0; i < 16; i++)
        if (v.inside(i)) atomicAdd(&histograms[row(lane, i)][v.weight(i) >> 7 & 255], 1u);
    }
    __syncthreads();
    for (int r = warp; r < TILE_ROWS; r += 8) {
      const int base = best_window<Window::CODES>(histograms[r], lane);
      if (lane == 0) lowest[r] = base;
    }
    __syncthreads();
  }

  // Calls use(slot, weight, f) for what a lane has outside of the windows.
  template <class Use>
  __device__ __forceinline__ void each_outside(const Dense& unit, int lane, Use use) const {
    for (int j = 0; j < 4; j++) {
      const Dense::Vector v = unit.load(j);
      for (int i = 0; i < 16; i++) {
        const Place place(v.weight(i), lowest[row(lane, i)]);
        if (v.inside(i) && place.f != 1)
          use(repair_slot(j, lane, 2 * ((i & 7) / 2) + (i >> 3), i & 1), v.weight(i), place.f);
      }
    }
  }

  // A lane's numbers of `listed` and `other`; afterwards it is known where lists begin. Called by all threads.
  __device__ uint2 count(const Dense& unit, bool exists, int lane, int warp) {
    uint2 mine = make_uint2(0, 0);
    if (exists) each_outside(unit, lane, [&](int, uint32_t, uint32_t f) { f < 4 ? mine.x++ : mine.y++; });
    const uint32_t n = __reduce_add_sync(~0u, mine.x), m = __reduce_add_sync(~0u, mine.y);
    if (lane == 0) listed[warp] = n, other[warp] = m;
    __syncthreads();
    if (threadIdx.x == 0) {
      begin[0] = 0;
      for (int u = 0; u < 8; u++) {
        room[u] = min(min(listed[u], 255u), Window::ROOM - begin[u]);
        begin[u + 1] = begin[u] + (room[u] + 1) / 2 * 2;
      }
    }
    __syncthreads();
    return mine;
  }
};

// Pass 1, block per stage: 16 bytes a stage: {repairs, 0, 0, 0}.
extern "C" __global__ void __launch_bounds__(256)
    window_plan(const uint16_t* dense, int rows, int cols, int stride, uint4* plan) {
  __shared__ StageWindows windows;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shape<Window> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages;
  const bool exists = warp < shape.units_of(stage);
  const Dense unit(dense, rows, cols, stride, tile, stage * Window::UNITS + warp, lane);
  windows.choose(unit, exists, lane, warp);
  windows.count(unit, exists, lane, warp);
  if (threadIdx.x == 0) {
    uint32_t repairs = 0;
    for (int u = 0; u < 8; u++) repairs += windows.listed[u] - windows.room[u] + windows.other[u];
    plan[blockIdx.x] = make_uint4(repairs, 0, 0, 0);
  }
}

// Pass 3, block per stage; `weights` points at the first tile of these rows.
extern "C" __global__ void __launch_bounds__(256)
    window_pack(const uint16_t* dense, int rows, int cols, int stride, const uint4* plan, uint8_t* weights,
                uint32_t* overflow, uint32_t capacity) {
  __shared__ StageWindows windows;
  __shared__ uint32_t found[8];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shape<Window> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages, units = shape.units_of(stage);
  const uint4 head = plan[blockIdx.x];
  uint8_t *out = weights + tile * shape.tile_bytes() + stage * Shape<Window>::stage_bytes(),
          *trailer = out + units * Window::UNIT_BYTES, *extra = trailer + 8;
  const bool exists = warp < units;
  const Dense unit(dense, rows, cols, stride, tile, stage * Window::UNITS + warp, lane);
  windows.choose(unit, exists, lane, warp);
  const uint2 mine = windows.count(unit, exists, lane, warp);
  if (exists) {
    uint8_t* to = out + warp * Window::UNIT_BYTES;
    uint32_t codes[6] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const Dense::Vector v = unit.load(j);
      uint32_t sm[4] = {0, 0, 0, 0}, *const words = codes + 3 * (j / 2);
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const int h = i >> 3, kk = i & 7, half = 16 * (kk & 1), P = 8 * (j & 1) + 2 * (kk / 2) + h;
        const uint32_t w = v.weight(i), code = StageWindows::Place(w, windows.lowest[StageWindows::row(lane, i)]).code;
        if (!v.inside(i)) continue;
        sm[kk / 2] |= sign_and_mantissa(w, P, kk & 1);
        if (P < 15)
          words[P / 5] |= code << (3 * (P % 5) + half);
        else
          for (int b = 0; b < 3; b++) words[b] |= (code >> b & 1) << (15 + half);
      }
      ((uint4*)to)[32 * j + lane] = make_uint4(sm[0], sm[1], sm[2], sm[3]);
    }
    ((uint4*)(to + 2048))[lane] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
    ((uint2*)(to + 2560))[lane] = make_uint2(codes[4], codes[5]);
  }
  uint16_t *const heads = (uint16_t*)(extra + Window::HEADS), *const entries = (uint16_t*)(extra + Window::LIST);
  if (threadIdx.x < TILE_ROWS) extra[threadIdx.x] = (uint8_t)windows.lowest[threadIdx.x];
  if (threadIdx.x < Window::UNITS)
    heads[threadIdx.x] = (uint16_t)(windows.begin[threadIdx.x] / 2 | windows.room[threadIdx.x] << 8);
  for (int i = threadIdx.x; i < Window::ROOM; i += blockDim.x) entries[i] = 0;  // all wait in `place` below
  // Entries by lane. What a list has no room for goes with the repairs.
  uint32_t listed = before_lane(mine.x, lane);
  const uint32_t room = windows.room[warp], over = listed + mine.x - min(listed + mine.x, max(listed, room));
  const RepairList list(trailer, make_uint2(head.x, head.y), overflow, capacity, Window::EXTRA);
  uint32_t at = list.place(over + mine.y, found, warp, lane);
  if (!exists || mine.x + mine.y == 0) return;
  windows.each_outside(unit, lane, [&](int slot, uint32_t w, uint32_t f) {
    const uint32_t place = f < 4 ? listed++ : room;
    if (place < room)
      entries[windows.begin[warp] + place] = (uint16_t)Window::entry(slot, f);
    else
      list.put(at++, repair(w, warp, slot));
  });
}

FLOAT_LAYOUT(window, Window)

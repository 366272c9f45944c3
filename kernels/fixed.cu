// Layout `fixed` (fixed.cuh): made from dense rows, turned back into them, multiplied.
#include "dense.cuh"
#include "fixed.cuh"
#include "floats.cuh"

using namespace taper;

// Pass 1, block per stage: windows and number of repairs, 16 bytes a stage: {repairs, 0, 8 windows}.
extern "C" __global__ void __launch_bounds__(256)
    fixed_plan(const uint16_t* dense, int rows, int cols, int stride, uint4* plan) {
  __shared__ uint32_t histograms[8][256], repairs[8], windows[8];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shape<Fixed> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages;
  uint32_t* histogram = histograms[warp];
  for (int i = lane; i < 256; i += 32) histogram[i] = 0;
  if (lane == 0) repairs[warp] = 0, windows[warp] = 0;
  __syncwarp();
  if (warp < shape.units_of(stage)) {
    const Dense unit(dense, rows, cols, stride, tile, stage * Fixed::UNITS + warp, lane);
    for (int j = 0; j < 4; j++) {
      const Dense::Vector v = unit.load(j);
      for (int i = 0; i < 16; i++)
        if (v.inside(i)) atomicAdd(histogram + (v.weight(i) >> 7 & 255), 1u);
    }
    __syncwarp();
    const int base = best_window<16>(histogram, lane);
    uint32_t outside = 0;
    for (int e = lane; e < 256; e += 32)
      if (e < base || e > base + 15) outside += histogram[e];
    outside = __reduce_add_sync(~0u, outside);
    if (lane == 0) repairs[warp] = outside, windows[warp] = base;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t total = 0, lo = 0, hi = 0;
    for (int u = 0; u < 8; u++) total += repairs[u], (u < 4 ? lo : hi) |= windows[u] << 8 * (u & 3);
    plan[blockIdx.x] = make_uint4(total, 0, lo, hi);
  }
}

// Pass 3, block per stage; `weights` points at the first tile of these rows.
extern "C" __global__ void __launch_bounds__(256)
    fixed_pack(const uint16_t* dense, int rows, int cols, int stride, const uint4* plan, uint8_t* weights,
               uint32_t* overflow, uint32_t capacity) {
  __shared__ uint32_t found[8];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shape<Fixed> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages, units = shape.units_of(stage);
  const uint4 head = plan[blockIdx.x];
  uint8_t* out = weights + tile * shape.tile_bytes() + stage * Shape<Fixed>::stage_bytes();
  const int base = (warp < 4 ? head.z : head.w) >> 8 * (warp & 3) & 255;
  const Dense unit(dense, rows, cols, stride, tile, stage * Fixed::UNITS + warp, lane);
  uint32_t mine = 0;
  if (warp < units) {
    uint8_t* to = out + warp * Fixed::UNIT_BYTES;
    uint32_t codes[8];
    for (int j = 0; j < 4; j++) {
      const Dense::Vector v = unit.load(j);
      uint32_t sm[4] = {0, 0, 0, 0};
      codes[2 * j] = codes[2 * j + 1] = 0;
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const int h = i >> 3, kk = i & 7, p = 2 * (kk / 2) + h;
        const uint32_t w = v.weight(i), code = (w >> 7 & 255) - base;
        if (!v.inside(i)) continue;
        sm[kk / 2] |= sign_and_mantissa(w, p, kk & 1);
        if (code < 16)
          codes[2 * j + p / 4] |= code << (4 * (p & 3) + 16 * (kk & 1));
        else
          mine++;
      }
      ((uint4*)to)[32 * j + lane] = make_uint4(sm[0], sm[1], sm[2], sm[3]);
    }
    ((uint4*)to)[128 + lane] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
    ((uint4*)to)[160 + lane] = make_uint4(codes[4], codes[5], codes[6], codes[7]);
  }
  const RepairList list(out + units * Fixed::UNIT_BYTES, make_uint2(head.x, head.y), overflow, capacity, Fixed::EXTRA);
  const uint32_t at = list.place(mine, found, warp, lane);
  if (threadIdx.x == 0) ((uint2*)(out + units * Fixed::UNIT_BYTES))[1] = make_uint2(head.z, head.w);
  if (mine) put_repairs(list, at, unit, warp, lane, [&](uint32_t w) { return (w >> 7 & 255) - base < 16; });
}

FLOAT_LAYOUT(fixed, Fixed)

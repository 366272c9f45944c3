// From dense rows to the layouts of unit.cuh: reading fragments from rows, placing repairs.
#pragma once
#include "activations.cuh"
#include "unit.cuh"

namespace taper {

// The weights of one lane in unit `unit` of `tile`, from row-major 16-bit rows. What lies outside the matrix reads as
// zero.
struct Dense {
  const uint16_t* at;
  int rows_left, cols_left, stride;  // from this lane's first weight; may be negative
  bool aligned;

  struct Vector {
    uint32_t w[2][4];  // rows g and g+8, eight columns each
    int cols;          // how many of the columns exist
    bool row[2];
    __device__ __forceinline__ uint32_t weight(int i) const {
      return w[i >> 3][(i & 7) >> 1] >> 16 * (i & 1) & 0xFFFF;
    }  // i = 8 h + kk
    __device__ __forceinline__ bool inside(int i) const { return row[i >> 3] && (i & 7) < cols; }
  };

  __device__ Dense(const uint16_t* dense, int rows, int cols, int stride_, int tile, int unit, int lane)
      : stride(stride_) {
    const int row = tile * TILE_ROWS + (lane >> 2), col = unit * UNIT_COLS + (lane & 3) * 8;
    at = dense + (size_t)row * stride + col;
    rows_left = rows - row, cols_left = cols - col;
    aligned = ((size_t)dense & 15) == 0 && stride % 8 == 0;
  }
  __device__ __forceinline__ Vector load(int j) const {
    Vector v;
    v.cols = cols_left - 32 * j;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      v.row[h] = rows_left > 8 * h;
      const uint16_t* p = at + (size_t)8 * h * stride + 32 * j;
      uint4 q = make_uint4(0, 0, 0, 0);
      if (v.row[h] && aligned && v.cols >= 8) q = *(const uint4*)p;
      v.w[h][0] = q.x, v.w[h][1] = q.y, v.w[h][2] = q.z, v.w[h][3] = q.w;
      if (v.row[h] && !(aligned && v.cols >= 8)) {
#pragma unroll
        for (int kk = 0; kk < 8; kk++)
          if (kk < v.cols) v.w[h][kk / 2] |= (uint32_t)p[kk] << 16 * (kk & 1);
      }
    }
    return v;
  }
};

// The lowest of the CODES neighbouring exponents that most of a histogram's 256 have; the first of several. All lanes of a
// warp.
template <int CODES>
__device__ __forceinline__ int best_window(const uint32_t* histogram, int lane) {
  uint32_t best = 0;
  for (int base = lane; base <= 256 - CODES; base += 32) {
    uint32_t inside = 0;
    for (int e = 0; e < CODES; e++) inside += histogram[base + e];
    best = max(best, inside << 8 | (255 - base));
  }
  return 255 - (__reduce_max_sync(~0u, best) & 255);
}

// The sum of what the lanes of a warp before this one have.
__device__ __forceinline__ uint32_t before_lane(uint32_t mine, int lane) {
  uint32_t upto = mine;
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t up = __shfl_up_sync(~0u, upto, d);
    if (lane >= d) upto += up;
  }
  return upto - mine;
}

// Where a stage's repairs go: its trailer, or if there are more than ENTRIES the overflow list.
struct RepairList {
  uint8_t* trailer;
  uint2 head;  // overflow count (0: the trailer holds them), overflow offset
  uint32_t *list, limit;
  int first_entry;
  __device__ RepairList(uint8_t* trailer_, uint2 head_, uint32_t* overflow, uint32_t capacity, int extra)
      : trailer(trailer_), head(head_), list(overflow), limit(capacity), first_entry(8 + extra) {}
  // The place of this lane's first repair: by unit, then by lane. Called by all 8 warps; clears the trailer's entries.
  __device__ uint32_t place(uint32_t mine, uint32_t (&found)[8], int warp, int lane) const {
    uint32_t before = before_lane(mine, lane);
    if (lane == 31) found[warp] = before + mine;
    if (threadIdx.x == 0) *(uint2*)trailer = head;
    if (threadIdx.x < ENTRIES) ((uint32_t*)(trailer + first_entry))[threadIdx.x] = 0;
    __syncthreads();
    for (int w = 0; w < warp; w++) before += found[w];
    return before;
  }
  __device__ void put(uint32_t i, uint32_t entry) const {
    if (head.x == 0) {
      if (i < ENTRIES) ((uint32_t*)(trailer + first_entry))[i] = entry;
    } else if (head.y + i < limit)
      list[head.y + i] = entry;  // what does not fit is counted by repair_scan
  }
};

// Puts a lane's weights of unit `warp` that are not expressed(weight) into the list, from place `at` on.
template <class Expressed>
__device__ __forceinline__ void put_repairs(const RepairList& list, uint32_t at, const Dense& unit, int warp, int lane,
                                            Expressed expressed) {
  for (int j = 0; j < 4; j++) {
    const Dense::Vector v = unit.load(j);
    for (int i = 0; i < 16; i++) {
      const int h = i >> 3, kk = i & 7;
      if (v.inside(i) && !expressed(v.weight(i)))
        list.put(at++, repair(v.weight(i), warp, repair_slot(j, lane, 2 * (kk / 2) + h, kk & 1)));
    }
  }
}

// Pass 1 of layouts that express a weight or not whatever the others are, L::expresses(weight). Block of 256 threads per
// stage: {repairs, 0, 0, 0}.
template <class L>
__device__ __forceinline__ void plan_repairs(const uint16_t* dense, int rows, int cols, int stride, uint4* plan) {
  __shared__ uint32_t repairs[8];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shape<L> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages;
  uint32_t mine = 0;
  if (warp < shape.units_of(stage)) {
    const Dense unit(dense, rows, cols, stride, tile, stage * L::UNITS + warp, lane);
    for (int j = 0; j < 4; j++) {
      const Dense::Vector v = unit.load(j);
      for (int i = 0; i < 16; i++) mine += v.inside(i) && !L::expresses(v.weight(i));
    }
  }
  mine = __reduce_add_sync(~0u, mine);
  if (lane == 0) repairs[warp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t total = 0;
    for (int u = 0; u < 8; u++) total += repairs[u];
    plan[blockIdx.x] = make_uint4(total, 0, 0, 0);
  }
}

}  // namespace taper

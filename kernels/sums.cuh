// What becomes of a block's sums: rounded outputs, or planes of partial sums that meet in `partial`.
#pragma once
#include "ring.cuh"

namespace taper {

// The last step of every product: scale, bias, rounding.
__device__ __forceinline__ void finish(const Product& p, int row, int m, float v) {
  if (row >= p.rows) return;
  if (p.row_scale) v *= p.row_scale[row];
  if (p.bias) v += load_value(p.bias, row, p.y_type);
  store_value(p.y, (size_t)m * p.y_stride + row, p.y_type, v);
}

// A block hands on its sum for (row, m), `row` counted from tile 0: to y, or to the slab's plane of partial sums.
__device__ __forceinline__ void hand_on(const Product& p, int padded_rows, int slab, int row, int m, float v) {
  if (p.slabs == 1)
    finish(p, row, m, v);
  else
    p.partial[((size_t)slab * p.batch + m) * padded_rows + row] = v;
}

// Adds `terms` planes of partial sums, in their order, for `tiles` tiles from tile0, and finishes the outputs.
// plane(term, m) is where the term's rows for m start. A load takes a microsecond here, so each thread has sixteen on
// their way: four terms of four places.
template <int THREADS, class Plane>
__device__ __forceinline__ void add_planes(const Product& p, int tile0, int tiles, int terms, int tid, Plane plane) {
  constexpr int PLACES = 4, TERMS = 4, QUADS = TILE_ROWS / 4;
  const int total = tiles * p.batch * QUADS;
  for (int base = tid; base < total; base += PLACES * THREADS) {
    float4 sum[PLACES];
    int m[PLACES], row[PLACES];
#pragma unroll
    for (int i = 0; i < PLACES; i++) {
      const int place = min(base + i * THREADS, total - 1), k = place / (p.batch * QUADS),
                in = place - k * p.batch * QUADS;
      m[i] = in / QUADS, row[i] = (tile0 + k) * TILE_ROWS + in % QUADS * 4;
      sum[i] = make_float4(0, 0, 0, 0);
    }
    for (int first = 0; first < terms; first += TERMS) {
      float4 v[PLACES][TERMS];
#pragma unroll
      for (int i = 0; i < PLACES; i++)
#pragma unroll
        for (int d = 0; d < TERMS; d++)
          v[i][d] =
              first + d < terms ? __ldcg((const float4*)(plane(first + d, m[i]) + row[i])) : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < PLACES; i++)
#pragma unroll
        for (int d = 0; d < TERMS; d++)
          sum[i].x += v[i][d].x, sum[i].y += v[i][d].y, sum[i].z += v[i][d].z, sum[i].w += v[i][d].w;
    }
#pragma unroll
    for (int i = 0; i < PLACES; i++) {
      if (base + i * THREADS >= total) break;
      finish(p, row[i], m[i], sum[i].x), finish(p, row[i] + 1, m[i], sum[i].y), finish(p, row[i] + 2, m[i], sum[i].z),
          finish(p, row[i] + 3, m[i], sum[i].w);
    }
  }
}

// The last block that comes to a tile adds its slabs, in their order. `marks`: a word of shared memory for each tile of
// the block.
template <int THREADS = CONSUMER_THREADS>
__device__ __forceinline__ void add_slabs(const Product& p, int tile0, int tiles, int padded_rows, uint32_t marks,
                                          int tid) {
  if (p.slabs == 1) return;
  bar_sync<1, THREADS>();  // a thread's atomic orders what all have written before, and what they read behind the next
  for (int k = tid; k < tiles; k += THREADS) {
    uint32_t* const arrived = p.arrived + tile0 + k;
    const bool last = atomic_add_ordered(arrived, 1) == (uint32_t)p.slabs - 1;
    if (last) *arrived = 0;
    sts32(marks + 4 * k, last);
  }
  bar_sync<1, THREADS>();
  constexpr int TERMS = 8, QUADS = TILE_ROWS / 4;
  const int places = p.batch * QUADS;
  const size_t plane = (size_t)p.batch * padded_rows;
#pragma unroll 1
  for (int place = tid; place < tiles * places; place += THREADS) {
    const int k = place / places, in = place - k * places, m = in / QUADS,
              row = (tile0 + k) * TILE_ROWS + in % QUADS * 4;
    if (!lds32(marks + 4 * k)) continue;
    const float* from = p.partial + (size_t)m * padded_rows + row;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (int first = 0; first < p.slabs; first += TERMS, from += TERMS * plane) {
      float4 v[TERMS];  // on their way at once: a load takes a microsecond here
#pragma unroll
      for (int i = 0; i < TERMS; i++)
        v[i] = first + i < p.slabs ? __ldcg((const float4*)(from + i * plane)) : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < TERMS; i++) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
    }
    finish(p, row, m, sum.x), finish(p, row + 1, m, sum.y), finish(p, row + 2, m, sum.z), finish(p, row + 3, m, sum.w);
  }
}

// All slabs of a group meet here; what they wrote before is then seen by all.
__device__ __forceinline__ void meet(const Product& p, int group, int tid) {
  __threadfence();
  bar_sync<1, CONSUMER_THREADS>();
  if (p.slabs == 1) return;
  if (tid == 0) {
    atomicAdd(p.arrived + group, 1u);
    while (*(volatile uint32_t*)(p.arrived + group) < (uint32_t)p.slabs) __nanosleep(20);
    __threadfence();
    if (atomicAdd(p.arrived + p.groups + group, 1u) == (uint32_t)p.slabs - 1)
      p.arrived[group] = p.arrived[p.groups + group] = 0;
  }
  bar_sync<1, CONSUMER_THREADS>();
}

}  // namespace taper

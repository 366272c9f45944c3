// Activations in the order in which prefill.cuh multiplies them: all blocks of the grid bring a share of them into it,
// then wait for each other. A kernel of its own would take twice as long.
#pragma once
#include "kquant.cuh"
#include "prefill_parts.cuh"

namespace taper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// 32 columns of a row of x: v[t] has columns 8 t and on. What is outside of x is zero.
__device__ __forceinline__ void load_vector(const Prefill& p, int row, int column, uint4 (&v)[4]) {
  const uint16_t* from = (const uint16_t*)p.x + (size_t)row * p.x_stride + column;
  if (row < p.batch && column + 32 <= p.cols && ((size_t)from & 15) == 0) {
#pragma unroll
    for (int t = 0; t < 4; t++) v[t] = __ldcg((const uint4*)from + t);
    return;
  }
#pragma unroll
  for (int t = 0; t < 4; t++) {
    uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (row < p.batch && column + 8 * t + e < p.cols) w[e / 2] |= (uint32_t)from[8 * t + e] << 16 * (e & 1);
    v[t] = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// Word w of v[t].
__device__ __forceinline__ uint32_t word_of(const uint4 (&v)[4], int t, int w) {
  return w == 0 ? v[t].x : w == 1 ? v[t].y : w == 2 ? v[t].z : v[t].w;
}

// The block's share, by its consumers: a warp brings a unit of eight rows, 256 bytes of each, and a lane a vector, four at a
// time. GROUP: of the layout, as weights in groups of 16 have an order of their own.
template <int GROUP, int N>
__device__ __forceinline__ void put_in_order(const Prefill& p, int units) {
  constexpr int TOGETHER = 4;
  const int eights = ceil_div(p.batch, N) * (N / 8), count = eights * units, step = gridDim.x * CONSUMERS,
            lane = threadIdx.x & 31;
  for (int i0 = blockIdx.x * CONSUMERS + threadIdx.x / 32; i0 < count; i0 += TOGETHER * step) {
    uint4 v[TOGETHER][4];
#pragma unroll
    for (int e = 0; e < TOGETHER; e++) {
      const int i = i0 + e * step, unit = i / eights;
      if (i < count) load_vector(p, (i - unit * eights) * 8 + lane / 4, (unit * 4 + lane % 4) * 32, v[e]);
    }
#pragma unroll
    for (int e = 0; e < TOGETHER; e++) {
      const int i = i0 + e * step, unit = i / eights, n = (i - unit * eights) * 8 + lane / 4;
      if (i >= count) break;
      uint4* const to = (uint4*)p.arranged + (((size_t)(n / N) * units + unit) * 4 + lane % 4) * 4 * N + n % N;
#pragma unroll
      for (int q = 0; q < 4; q++) {  // of lanes t the columns of registers 2 q and 2 q + 1
        uint32_t w[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
          const int column = column_of<GROUP>(2 * q, t);
          w[t] = word_of(v[e], column / 8, column % 8 / 2);
        }
        __stcg(to + q * N, make_uint4(w[0], w[1], w[2], w[3]));
      }
    }
  }
  fence_async_proxy_global();
  bar_sync<8, CONSUMER_THREADS>();
  if (threadIdx.x == 0) atomic_add_ordered(p.arrived, 1);
}

// Until all blocks have done so; by one thread of each. Block 0 has no flags in `arrived`, as it has the first piece of
// whatever it works on.
__device__ __forceinline__ void await_order(const Prefill& p) {
  await_count(p.arrived, gridDim.x);
  fence_async_proxy_global();
  if (atomic_add_ordered(p.arrived + 1, 1) == gridDim.x - 1) p.arrived[0] = p.arrived[1] = 0;
}
#endif

}  // namespace taper

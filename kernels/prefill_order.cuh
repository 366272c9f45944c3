// Activations in the order in which prefill.cuh multiplies them: all blocks of the grid bring a share of them into it,
// then wait for each other. A kernel of its own would take twice as long.
#pragma once
#include "kquant.cuh"
#include "prefill_parts.cuh"

namespace taper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Words 0 to 3 of what lane t brings of a vector's row: word q is the columns of registers 2 q and 2 q + 1. With groups of 16
// those are half in each group.
template <int GROUP>
__device__ __forceinline__ uint4 load_words(const Prefill& p, int row, int column, int t, bool aligned) {
  const uint16_t* const from = (const uint16_t*)p.x + (size_t)row * p.x_stride + column;
  const bool fast = aligned && row < p.batch && column + 32 <= p.cols;
  if (GROUP != 16 && fast) return __ldcg((const uint4*)(from + 8 * t));
  if (GROUP == 16 && fast) {
    const uint2 lo = __ldcg((const uint2*)(from + 4 * t)), hi = __ldcg((const uint2*)(from + 16 + 4 * t));
    return make_uint4(lo.x, lo.y, hi.x, hi.y);
  }
  uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int k = column_of<GROUP>(i & ~1, t) + (i & 1);
    if (row < p.batch && column + k < p.cols) w[i / 2] |= (uint32_t)from[k] << 16 * (i & 1);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Four lanes with four words each, lane t's word q to lane q's word t.
__device__ __forceinline__ uint4 transpose_words(uint4 v, int t) {
  const bool low = t & 1, high = t & 2;
  const uint32_t a = __shfl_xor_sync(~0u, low ? v.x : v.y, 1), b = __shfl_xor_sync(~0u, low ? v.z : v.w, 1);
  if (low)
    v.x = a, v.z = b;
  else
    v.y = a, v.w = b;
  const uint32_t c = __shfl_xor_sync(~0u, high ? v.x : v.z, 2), d = __shfl_xor_sync(~0u, high ? v.y : v.w, 2);
  if (high)
    v.x = c, v.y = d;
  else
    v.z = c, v.w = d;
  return v;
}

// The block's share, by its consumers: a warp brings a unit of eight rows, and of each vector four lanes a row, so that
// whole sectors are read and written; four units at a time. GROUP: of the layout, as weights in groups of 16 have an
// order of their own.
template <int GROUP, int N>
__device__ __forceinline__ void put_in_order(const Prefill& p, int units) {
  constexpr int TOGETHER = 4;
  const int eights = ceil_div(p.batch, N) * (N / 8), count = eights * units, step = gridDim.x * CONSUMERS,
            lane = threadIdx.x & 31, t = lane & 3;
  const bool aligned = (((size_t)p.x | 2 * p.x_stride) & 15) == 0;
  for (int i0 = blockIdx.x * CONSUMERS + threadIdx.x / 32; i0 < count; i0 += TOGETHER * step) {
    uint4 v[TOGETHER][4];
#pragma unroll
    for (int e = 0; e < TOGETHER; e++) {
      const int i = i0 + e * step, unit = i / eights;
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (i < count)
          v[e][j] = load_words<GROUP>(p, (i - unit * eights) * 8 + lane / 4, (unit * 4 + j) * 32, t, aligned);
    }
#pragma unroll
    for (int e = 0; e < TOGETHER; e++) {
      const int i = i0 + e * step, unit = i / eights, n = (i - unit * eights) * 8 + lane / 4;
      if (i >= count) break;
      uint4* const to = (uint4*)p.arranged + (((size_t)(n / N) * units + unit) * 16 + t) * N + n % N;
#pragma unroll
      for (int j = 0; j < 4; j++) __stcg(to + j * 4 * N, transpose_words(v[e][j], t));
    }
  }
  fence_async_proxy_global();
  bar_sync<8, CONSUMER_THREADS>();
  if (threadIdx.x == 0) atomic_add_ordered(p.arrived + 2 * gridDim.x, 1);
}

// Until all blocks have done so; by one thread of each.
__device__ __forceinline__ void await_order(const Prefill& p) {
  uint32_t* const counts = p.arrived + 2 * gridDim.x;
  await_count(counts, gridDim.x);
  fence_async_proxy_global();
  if (atomic_add_ordered(counts + 1, 1) == gridDim.x - 1) counts[0] = counts[1] = 0;
}
#endif

}  // namespace taper

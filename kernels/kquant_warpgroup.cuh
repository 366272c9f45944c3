// y = x W^T for 17 to 64 columns of activations and layouts with groups, on compute capability 9.0: warpgroup.cuh's
// split of the work and order of x, with f16 on the tensor cores.
//
// Weights   made in registers as f16, rounded once or twice (2^-11 of a weight; bf16 would lose eight times that), and
//           divided by a power of two for each row, `row_scale`, so that they fit. A code left where it lies in the low
//           bits of an f16 is a subnormal number, code * 2^-24 (rows g) or code * 2^-20 (rows g+8), exactly: one LOP3
//           and one HFMA2 make two weights.
// x         bf16 columns (of f16 and f32 activations two and three, as everywhere) become f16, times a power of two for
//           each column that brings its largest value to 2^14: what is 2^-30 of that or more stays exact.
// Specials  a block whose x has infinities or NaN keeps it in bf16 and multiplies with each weight in three exact
//           parts, so that they come out as in the exact product.
//
// Budget    per unit of Q4_K: 64 instructions for codes, 32 HFMA2, 60 for scales; 64 cycles of the tensor cores for 64
//           columns. At 4.5 bits its bytes arrive in 90 cycles at 3 TB/s.
//
// Launch    as warpgroup.cuh, with dynamic shared memory group_warpgroup_bytes<L, NB>(slots); row_scale must be what
//           row_scales gave.
#pragma once
#include "kquant_product.cuh"
#include "warpgroup.cuh"

namespace taper {

template <class L, int NB>
__host__ __device__ constexpr int group_warpgroup_bytes(int slots) {
  return warpgroup_shared_bytes<L, NB>(slots) + 32 * NB;
}

// The power of two for each row: a block of 32 threads for each. What is not finite has no say.
template <class L>
__device__ __forceinline__ void group_row_scales(const uint8_t* blocks, int cols, float* scales) {
  using F = typename L::Source;
  constexpr int LEN = F::Group::LEN, MOST = L::S::MOST;
  const uint8_t* row = blocks + (size_t)blockIdx.x * (cols / LEN) * F::BYTES;
  float most = 0;
  for (int i = threadIdx.x; i < cols / LEN; i += 32) {
    const typename F::Group group{row + i * F::BYTES, 0};
    const float d = fabsf(half_to_float(group.d())) * MOST;
    float min = 0;
    if constexpr (L::MINS) min = fabsf(half_to_float(group.dmin())) * (MOST / 4096.0f);  // minima may be larger
    if (d < 1e9f) most = fmaxf(most, d);
    if (min < 1e9f) most = fmaxf(most, min);
  }
  for (int d = 1; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
  // most / scale < 2^-9, so that 2^24 times it is an f16
  if (threadIdx.x == 0)
    scales[blockIdx.x] = most > 0 ? __uint_as_float((__float_as_uint(most) & 0x7F800000u) + (10u << 23)) : 1.0f;
}

__device__ __forceinline__ uint32_t two_halves(float v) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(d) : "f"(v));
  return d;
}
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Turns x, as it lies in shared memory, into f16, and leaves for each column what undoes its scale. False if something
// in it is not finite: then all is as it was.
template <int NB>
__device__ __forceinline__ bool narrow_columns(uint32_t xs, uint32_t factors, uint32_t* largest, int width, int tid) {
  constexpr int NC = 8 * NB, SHARE = CONSUMER_THREADS / NC;  // threads of a column
  const int n = tid % NC, share = tid / NC, chunks = width / 8;
  if (tid < NC) largest[tid] = 0;
  __syncthreads();
  uint32_t most = 0;
  for (int q = share; q < chunks; q += SHARE) {
    const uint4 v = lds128(xs + (q * NC + n) * 16);
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) most = max(most, max(w[i] & 0x7FFFu, w[i] >> 16 & 0x7FFFu));
  }
  atomicMax(largest + n, most);
  if (__syncthreads_or(most >= 0x7F80u)) return false;
  const uint32_t exponent = max(largest[n] >> 7, 15u);
  const float scale = __uint_as_float((268 - exponent) << 23);
  if (tid < NC) sts_float(factors + 4 * tid, __uint_as_float((exponent - 14) << 23));
  for (int q = share; q < chunks; q += SHARE) {
    const uint32_t at = xs + (q * NC + n) * 16;
    const uint4 v = lds128(at);
    uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      asm("cvt.rn.f16x2.f32 %0, %1, %2;"
          : "=r"(w[i])
          : "f"(__uint_as_float(w[i] & 0xFFFF0000u) * scale), "f"(__uint_as_float(w[i] << 16) * scale));
    sts128(at, make_uint4(w[0], w[1], w[2], w[3]));
  }
  return true;
}

// A unit's weights over the rows' scales: `inverse` for rows g and g+8.
template <class L>
__device__ __forceinline__ void unit_halves(uint32_t at, uint32_t trailer, int u, int lane, const float (&inverse)[2],
                                            uint32_t (&a)[4][8]) {
  typename L::S scales;
  scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
  constexpr float UNIT[2] = {1 / 16777216.0f, (1 << L::C::SECOND) / 16777216.0f};  // what a code of 1 is in place
  scales.multiply(inverse[0] / UNIT[0], inverse[0], inverse[1] / UNIT[1], inverse[1]);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    L::C::in_place(L::C::load(at, lane, j), a[j]);
#pragma unroll
    for (int part = 0; part < (L::GROUP == 16 ? 2 : 1); part++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float s, m;
        scales.template of<false>(L::GROUP == 16 ? 2 * j + part : j, h, s, m);
        const uint32_t scale = two_halves(s);
        uint32_t away = two_halves(-m);
        constexpr int ZERO = L::MAGIC ? L::ZERO : 128;
        if (ZERO) away = fma_f16x2(scale, two_halves(-ZERO * UNIT[h]), L::MINS ? away : 0);
#pragma unroll
        for (int p = h + 4 * part; p < (L::GROUP == 16 ? 4 * part + 4 : 8); p += 2)
          a[j][p] = fma_f16x2(a[j][p], scale, away);
      }
  }
}
#endif

template <class L, int NB>
__device__ __forceinline__ void group_warpgroup_product(const Product& p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int NC = 8 * NB, X_BYTES = L::UNITS * UNIT_COLS * 2 * NC;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, half = warp >> 2;
  const Part<L> part(p);
  const int parts = p.x_type + 1, columns = p.batch * parts, padded_rows = part.shape.tiles * TILE_ROWS,
            units = part.shape.units_of(part.stage0);
  const uint32_t xs = shared_address(memory), sums = xs + X_BYTES, factors = sums + 128 * 16 * NB,
                 rings = factors + 4 * NC, bars = rings + CONSUMERS * p.slots * warp_slot_bytes<L>();
  const int middle = (units + 1) / 2, first = half ? middle : 0, last = half ? units : middle;
  WarpUnits<L> mine(p, part, rings + warp * p.slots * warp_slot_bytes<L>(), bars + warp * p.slots * 8, warp, first,
                    last);
  if (lane == 0) {
    for (int s = 0; s < p.slots; s++) mbarrier_init(mine.bars + 8 * s, 1);
    mbarrier_init_fence();
    for (int s = 0; s < p.slots; s++) mine.send();
  }
  __syncwarp();
  let_next_kernel_start();
  wait_for_previous_kernel();
  arrange_activations<L::GROUP, NB>(xs, p, part.first_col(), part.width(), columns, sums, tid);
  __syncthreads();
  const bool narrow = narrow_columns<NB>(xs, factors, (uint32_t*)(memory + X_BYTES), part.width(), tid);
  fence_async_proxy();
  __syncthreads();

  for (int tile0 = 0; tile0 < part.tiles; tile0 += 4) {
    const bool there = tile0 + (warp & 3) < part.tiles;
    const int row = (part.tile0 + tile0 + (warp & 3)) * TILE_ROWS + g;
    float inverse[2], c[NB][4] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) inverse[h] = there && row + 8 * h < p.rows ? 1 / __ldg(p.row_scale + row + 8 * h) : 1;
    const auto multiply = [&](int u) {
      uint32_t a[4][8] = {};
      if (there) {
        const uint32_t at = mine.wait();
        unit_halves<L>(at, at + L::UNIT_BYTES, u, lane, inverse, a);
        mine.done(lane);
      }
      __syncwarp();
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t x = xs + (u * 4 + j) * 4 * NC * 16;
        wgmma<true>(c, a[j], b_descriptor(x, NC * 16));
        wgmma<true>(c, a[j] + 4, b_descriptor(x + 2 * NC * 16, NC * 16));
      }
      wgmma_commit();
      wgmma_wait();
    };
    if (narrow) {
#pragma unroll 1
      for (int u = first; u < last; u++) multiply(u);
    } else {
#pragma unroll 1
      for (int u = first; u < last; u++) {
        const uint32_t at = there ? mine.wait() : 0;
        typename L::S scales;
        if (there) scales.load(at + L::C::BYTES, at + L::UNIT_BYTES, u, g);
#pragma unroll 1
        for (int j = 0; j < 4; j++) {
          uint32_t exact[3][8] = {};
          if (there) exact_parts<L>(scales, at, lane, j, inverse, exact);
          __syncwarp();
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < 3; s++) {
            const uint32_t x = xs + (u * 4 + j) * 4 * NC * 16;
            wgmma<false>(c, exact[s], b_descriptor(x, NC * 16));
            wgmma<false>(c, exact[s] + 4, b_descriptor(x + 2 * NC * 16, NC * 16));
          }
          wgmma_commit();
          wgmma_wait();
        }
        if (there) mine.done(lane);
      }
    }
    join_halves<NB>(p, c, sums, part.slab, columns, padded_rows, row, there, tid,
                    [&](int column) { return narrow ? lds_float(factors + 4 * column) : 1.0f; });
  }
  add_halves(p, part, columns, padded_rows, tid);
#endif
}

}  // namespace taper

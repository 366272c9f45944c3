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
#include "kquant.cuh"
#include "warpgroup.cuh"

namespace taper {

template <class L, int NB>
__host__ __device__ constexpr int group_warpgroup_bytes(int slots) {
  return (L::UNITS * UNIT_COLS * 2 * 8 + 128 * 16) * NB + CONSUMERS * slots * (warp_slot_bytes<L>() + 8) + 32 * NB + 128;
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
// D (64 x 8 NB) += A (64 x 16, registers) B (16 x 8 NB, shared memory; its descriptor).
#define WGMMA(N, TYPE, OUTPUTS, A0, A1, A2, A3, B, ...)                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" OUTPUTS "}, {" A0 "," A1 "," A2 "," A3 \
               "}, " B ", 1, 1, 1, 0;"                                                             \
               : __VA_ARGS__                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define FOUR(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SIXTEEN_NAMES "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define MORE_NAMES ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
template <bool F16_TYPE, int NB>
__device__ __forceinline__ void wgmma_groups(float (&c)[NB][4], const uint32_t* a, uint64_t b) {
  if constexpr (NB == 8 && F16_TYPE) {
    WGMMA(64, "f16", SIXTEEN_NAMES MORE_NAMES, "%32", "%33", "%34", "%35", "%36", FOUR(0), FOUR(1), FOUR(2), FOUR(3),
          FOUR(4), FOUR(5), FOUR(6), FOUR(7));
  } else if constexpr (NB == 8) {
    WGMMA(64, "bf16", SIXTEEN_NAMES MORE_NAMES, "%32", "%33", "%34", "%35", "%36", FOUR(0), FOUR(1), FOUR(2), FOUR(3),
          FOUR(4), FOUR(5), FOUR(6), FOUR(7));
  } else if constexpr (F16_TYPE) {
    WGMMA(32, "f16", SIXTEEN_NAMES, "%16", "%17", "%18", "%19", "%20", FOUR(0), FOUR(1), FOUR(2), FOUR(3));
  } else {
    WGMMA(32, "bf16", SIXTEEN_NAMES, "%16", "%17", "%18", "%19", "%20", FOUR(0), FOUR(1), FOUR(2), FOUR(3));
  }
}
#undef WGMMA
#undef FOUR
#undef SIXTEEN_NAMES
#undef MORE_NAMES

// Sixteen bytes of column n, from column 32 j + 8 i of x on, to where wgmma reads them: registers' columns are
// column_of.
template <int GROUP, int NC>
__device__ __forceinline__ void put_columns(uint32_t xs, int n, int j, int i, uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const int q = GROUP == 16 ? i / 2 * 2 + w % 2 : w, t = GROUP == 16 ? i % 2 * 2 + w / 2 : i;
    sts32(xs + ((j * 4 + q) * NC + n) * 16 + t * 4, words[w]);
  }
}

// Columns [first, first + width) of x to shared memory as bf16; columns of activations past the last are zero.
template <int GROUP, int NB>
__device__ __forceinline__ void arrange_groups(uint32_t xs, const Product& p, int first, int width, int columns,
                                               uint32_t staging, int tid) {
  constexpr int NC = 8 * NB;
  const int pieces = width / 32 * NC * 4;
  if (p.x_type == BF16 && first + width <= p.cols && ((size_t)p.x & 15) == 0 && p.x_stride % 8 == 0) {
    constexpr int DEEP = 8;
    for (int base = tid; base < pieces; base += DEEP * CONSUMER_THREADS) {
      uint4 v[DEEP];
#pragma unroll
      for (int d = 0; d < DEEP; d++) {
        const int at = base + d * CONSUMER_THREADS, i = at & 3, n = at / 4 % NC, j = at / 4 / NC;
        v[d] = at < pieces && n < columns
                   ? *(const uint4*)((const uint16_t*)p.x + (size_t)n * p.x_stride + first + 32 * j + 8 * i)
                   : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int d = 0; d < DEEP; d++) {
        const int at = base + d * CONSUMER_THREADS;
        if (at < pieces) put_columns<GROUP, NC>(xs, at / 4 % NC, at / 4 / NC, at & 3, v[d]);
      }
    }
    return;
  }
  constexpr int STEP = 64, STRIDE = activation_stride(STEP);  // NC rows of 192 bytes fit where the sums will be
  for (int at = 0; at < width; at += STEP) {
    load_activations<CONSUMER_THREADS>(staging, STRIDE, p.x, p.x_type, p.x_stride, p.batch, p.cols, first + at, STEP,
                                       tid);
    async_commit();
    async_wait<0>();
    __syncthreads();
    for (int piece = tid; piece < STEP / 32 * NC * 4; piece += CONSUMER_THREADS) {
      const int i = piece & 3, n = piece / 4 % NC, j = piece / 4 / NC;
      put_columns<GROUP, NC>(xs, n, at / 32 + j, i,
                             n < columns ? lds128(staging + n * STRIDE + j * 64 + i * 16) : make_uint4(0, 0, 0, 0));
    }
    __syncthreads();
  }
}

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
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, half = warp >> 2;
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
  arrange_groups<L::GROUP, NB>(xs, p, part.first_col(), part.width(), columns, sums, tid);
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
        wgmma_groups<true>(c, a[j], b_descriptor(x, NC * 16));
        wgmma_groups<true>(c, a[j] + 4, b_descriptor(x + 2 * NC * 16, NC * 16));
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
            wgmma_groups<false>(c, exact[s], b_descriptor(x, NC * 16));
            wgmma_groups<false>(c, exact[s] + 4, b_descriptor(x + 2 * NC * 16, NC * 16));
          }
          wgmma_commit();
          wgmma_wait();
        }
        if (there) mine.done(lane);
      }
    }
    // The second half's sums join the first's, which leaves them in the slab's plane.
    const uint32_t spot = sums + (tid & 127) * 4;
    if (half) {
#pragma unroll
      for (int i = 0; i < NB * 4; i++) sts_float(spot + i * 512, c[i / 4][i % 4]);
    }
    __syncthreads();
    if (!half && there) {
      float* to = p.partial + (size_t)part.slab * columns * padded_rows + row;
#pragma unroll
      for (int i = 0; i < NB * 4; i++) {
        const int column = 8 * (i / 4) + 2 * t + (i & 1);
        const float sum = c[i / 4][i % 4] + lds_float(spot + i * 512);
        if (column < columns)
          to[(size_t)column * padded_rows + 8 * (i >> 1 & 1)] = narrow ? sum * lds_float(factors + 4 * column) : sum;
      }
    }
    __syncthreads();
  }
  meet(p, part.group, tid);
  const int from = part.tiles * part.slab / p.slabs, to = part.tiles * (part.slab + 1) / p.slabs;
  add_planes<CONSUMER_THREADS>(p, part.tile0 + from, to - from, p.slabs * parts, tid, [&](int term, int m) {
    return p.partial + ((size_t)(term / parts) * columns + m * parts + term % parts) * padded_rows;
  });
#endif
}

}  // namespace taper

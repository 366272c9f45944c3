// y = x W^T for 64 columns of activations and more, and 4-bit integers in groups of 128, on FP8 tensor cores (compute
// capability 9.0): activations are rounded to e4m3, weights are not.
//
// Weights      A byte 0000cccc is, as an e4m3, the number c * 2^-9: codes from 0 to 15 need no conversion but to be put
//              apart, which takes three instructions for eight of them. With x as the rounded activations,
//                  sum of scale * (c - zero) * x = 512 * (scale * (sum of (c * 2^-9) * x) - scale * zero / 512 * X),
//              where X is the sum of x, for each group, that is for each row of a unit. The first sum is the tensor
//              cores', started anew for each unit, as they keep some 14 bits of it, and added in f32. The second, for
//              FP8_SUMS units at once, is a product in bf16: scale * zero (16 bits) and X as sums of two bf16 each.
// Activations  `fp8_arrange` multiplies each column with a power of two, so that its largest value becomes 224 to 448,
//              rounds it to e4m3, and writes it as it will lie in shared memory. A column with infinities or NaN
//              becomes NaN as a whole.
// Order of x   Block of N columns of activations, unit of 128 columns of K: chunk q of vector j, column n: 16 bytes; byte
//              4 t + b of chunks 2 j and 2 j + 1 is column 32 j + 8 t + {0, 2, 1, 3}[b], or 4 more, as registers of A lie
//              in unit.cuh. Then X: block of columns, eight units, the upper parts and the lower ones, column, unit.
//              Then what each column is to be multiplied with in the end.
// Work split   As prefill.cuh: a block is 128 rows of the matrix x N columns of activations; two warpgroups of consumers,
//              and one whose first warp fetches weights and whose second fetches activations.
// Budget       A unit of N = 128 is 512 cycles of the tensor cores, for both warpgroups. A warp issues 152 instructions for
//              it, 64 of them adding sums in f32; products whose A and D are registers overlap with hardly any of them (the
//              same was seen with products alone and with the adding alone), so it takes 1150. N = 256: 270 instructions,
//              2300 cycles of which 1024; N = 64: 123, and 8.6 KB of weights, 450 cycles of the memory.
// Order        as prefill.cuh.
//
// Launch       fp8_arrange: grid padded batch, block 256. `x` of the product: Fp8Arranged's bytes, 128-byte aligned.
//              fp8_product_N: as prefill.cuh's, dynamic shared memory fp8_shared_bytes<N>().
#pragma once
#include "kquant.cuh"
#include "prefill.cuh"

namespace taper {

// Units whose sums of activations are multiplied at once.
constexpr int FP8_SUMS = 16;
// Bytes of N arranged columns: of a unit, of the sums of FP8_SUMS units.
template <int N>
constexpr int FP8_UNIT = N * UNIT_COLS;
template <int N>
constexpr int FP8_SUMS_BYTES = N * FP8_SUMS * 4;

// What `fp8_arrange` writes: activations, sums, factors.
struct Fp8Arranged {
  size_t sums, factors, bytes;
  __host__ __device__ Fp8Arranged(size_t padded, size_t units)
      : sums(padded * units * UNIT_COLS),
        factors(sums + padded * ((units + FP8_SUMS - 1) / FP8_SUMS) * FP8_SUMS * 4),
        bytes(factors + padded * 4) {}
};

template <class L, int N>
struct Fp8Rings {
  static constexpr int A_BYTES = PREFILL_TILES * L::UNIT_BYTES, B_BYTES = FP8_UNIT<N>, SUMS_SLOTS = 2,
                       SCRATCH = RESULT_BUFFER / 2,
                       FIXED = CONSUMERS * SCRATCH + SUMS_SLOTS * FP8_SUMS_BYTES<N> + 512,
                       FIT = (232448 - FIXED) / (A_BYTES + B_BYTES), SLOTS = FIT > 12 ? 12 : FIT;
  static_assert(L::TRAILER == 0 && SLOTS >= 3 && 32 * (SLOTS + 1) <= 512, "");
};
template <class L, int N>
__host__ __device__ constexpr int fp8_shared_bytes() {
  using R = Fp8Rings<L, N>;
  return R::FIXED + R::SLOTS * (R::A_BYTES + R::B_BYTES);
}

struct Fp8Arrange {
  const void* x;
  uint8_t* out;
  int x_type, x_stride, batch, cols;
  int width, padded;  // N of the product that follows; the batch rounded up to it
};

// Eight values of a row of activations; cols is a multiple of 128.
__device__ __forceinline__ void eight_values(const Fp8Arrange& p, size_t row, int k, bool aligned, float (&v)[8]) {
  const size_t at = row * p.x_stride + k;
  if (!aligned) {
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = load_value(p.x, at + e, p.x_type);
    return;
  }
  if (p.x_type == F32) {
    const float4 a = ((const float4*)p.x)[at / 4], b = ((const float4*)p.x)[at / 4 + 1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
  const uint4 raw = ((const uint4*)p.x)[at / 8];
  const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const uint32_t h = w[e / 2] >> 16 * (e & 1) & 0xFFFF;
    v[e] = p.x_type == F16 ? half_to_float(h) : __uint_as_float(h << 16);
  }
}
#if __CUDA_ARCH__ >= 890
// Two values as e4m3, the first below.
__device__ __forceinline__ uint32_t two_e4m3(float first, float second) {
  uint16_t two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(second), "f"(first));
  return two;
}
__device__ __forceinline__ float sum_of_two(uint32_t two) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((uint16_t)two));
  return half_to_float(halves & 0xFFFF) + half_to_float(halves >> 16);
}
#endif

// One column of activations.
__device__ __forceinline__ void fp8_arrange_column(const Fp8Arrange& p) {
#if __CUDA_ARCH__ >= 890
  __shared__ uint32_t largest[8];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int n = blockIdx.x, tid = threadIdx.x, units = p.cols / UNIT_COLS, eights = p.cols / 8;
  const bool there = n < p.batch;
  const int size = p.x_type == F32 ? 4 : 2;
  const bool aligned = (((size_t)p.x | (size_t)((long long)p.x_stride * size)) & 15) == 0;
  uint32_t most = 0;
  float v[8] = {};
  for (int i = tid; there && i < eights; i += 256) {
    eight_values(p, n, 8 * i, aligned, v);
#pragma unroll
    for (int e = 0; e < 8; e++) most = max(most, __float_as_uint(v[e]) & 0x7FFFFFFFu);
  }
  most = __reduce_max_sync(~0u, most);
  if (tid % 32 == 0) largest[tid / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < 8; w++) most = max(most, largest[w]);
  const bool finite = most < 0x7F800000u;
  // A power of two, so that activations which e4m3 can express stay as they are.
  const uint32_t exponent = max(most >> 23, 20u) + ((most & 0x7FFFFFu) > 0x600000u);
  const float scale = __uint_as_float((262 - exponent) << 23);  // the largest: 224 to 448
  const Fp8Arranged at(p.padded, units);
  const int column = n % p.width, all_sums = ceil_div(units, FP8_SUMS) * FP8_SUMS;
  uint8_t* const block = p.out + (size_t)(n / p.width) * units * p.width * UNIT_COLS;
  uint8_t* const sums = p.out + at.sums + (size_t)(n / p.width) * all_sums * p.width * 4;
  for (int i = tid; i < all_sums * 16; i += 256) {
    const int u = i / 16, j = i / 4 % 4, t = i % 4;
    float sum = 0;
    if (u < units) {
      if (there) eight_values(p, n, 8 * i, aligned, v);
      uint32_t two[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int first = 4 * (e / 2) + e % 2;
        two[e] = finite ? two_e4m3(v[first] * scale, v[first + 2] * scale) : 0;
        sum += sum_of_two(two[e]);
      }
      uint32_t* const to = (uint32_t*)(block + ((size_t)(8 * u + 2 * j) * p.width + column) * 16) + t;
      to[0] = two[0] | two[1] << 16, to[4 * p.width] = two[2] | two[3] << 16;
    }
    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(0xFFFFu << (tid & 16), sum, d);
    if (i % 16) continue;
    // As the sum of two bf16.
    const uint32_t high = __float_as_uint(sum) >> 16, low = float_to_bf16(sum - __uint_as_float(high << 16));
    uint16_t* const place = (uint16_t*)(sums + ((size_t)(u / 8) * 2 * p.width + column) * 16) + u % 8;
    place[0] = (uint16_t)high, place[8 * p.width] = (uint16_t)low;
  }
  if (tid == 0) ((float*)(p.out + at.factors))[n] = finite ? 1 / scale : __uint_as_float(0x7FC00000u);
#endif
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ uint32_t pack_f16(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
// A warpgroup's 64 rows x N columns, not rounded.
template <int N>
__device__ __forceinline__ void store_floats(const Prefill& p, const float (&c)[N / 8][4], int first_row, int column0,
                                             int place) {
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    const int row = first_row + place / 32 * TILE_ROWS + place % 32 / 4 + 8 * (i >> 1 & 1),
              column = column0 + 8 * (i / 4) + 2 * (place % 4) + (i & 1);
    if (row < p.rows && column < p.batch) ((float*)p.y)[(size_t)column * p.y_stride + row] = c[i / 4][i % 4];
  }
}
// For each unit of a block's pieces calls before(unit), waits until a slot of a ring is empty, and has one lane call
// send(unit, slot, barrier), which enqueues copies of `bytes`. Called by a whole warp: addresses that are the same for
// all lanes are what the copies' instructions take.
template <int SLOTS, class Before, class Send>
__device__ __forceinline__ void fetch_units(uint32_t full, uint32_t empty, uint32_t bytes, Pieces& piece, int blocks,
                                            Before before, Send send) {
  Turn<SLOTS> turn;
  while (piece.next(blockIdx.x, gridDim.x, blocks))
    for (uint32_t u = piece.first; u < piece.last; u++, turn.next()) {
      before(u);
      mbarrier_wait(empty + 8 * turn.slot, turn.phase ^ 1);
      if (elected()) {
        mbarrier_expect(full + 8 * turn.slot, bytes);
        send(u, turn.slot, full + 8 * turn.slot);
      }
      __syncwarp();
    }
}
#endif

// S: columns of activations whose sums are made at once.
template <class L, int N, int S>
__device__ __forceinline__ void fp8_product(const Prefill& p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using R = Fp8Rings<L, N>;
  extern __shared__ __align__(128) uint8_t memory[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = __shfl_sync(~0u, threadIdx.x & 31, threadIdx.x & 31);
  const uint32_t b_ring = shared_address(memory), sums_ring = b_ring + R::SLOTS * R::B_BYTES,
                 a_ring = sums_ring + R::SUMS_SLOTS * FP8_SUMS_BYTES<N>, scratches = a_ring + R::SLOTS * R::A_BYTES,
                 full = scratches + CONSUMERS * R::SCRATCH, empty = full + 8 * R::SLOTS,
                 sums_full = empty + 8 * R::SLOTS, sums_empty = sums_full + 8 * R::SUMS_SLOTS;
  const Shape<L> shape(p.rows, p.cols);
  const int wide = ceil_div(p.batch, N), blocks = ceil_div(shape.tiles, PREFILL_TILES) * wide;
  const auto first_tile = [&](int block) { return block / wide * PREFILL_TILES; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::SLOTS; s++)
      mbarrier_init(full + 8 * s, 2), mbarrier_init(empty + 8 * s, CONSUMER_THREADS);  // full: weights, activations
    for (int s = 0; s < R::SUMS_SLOTS; s++)
      mbarrier_init(sums_full + 8 * s, 1), mbarrier_init(sums_empty + 8 * s, CONSUMER_THREADS);
    mbarrier_init_fence();
  }
  __syncthreads();
  const Fp8Arranged arranged(wide * N, shape.units);
  let_next_kernel_start();
  Pieces piece(shape.units, p.cut);
  const uint32_t me = blockIdx.x, grid = gridDim.x;
  if (warp >= CONSUMERS) {
    give_registers<40>();
    if (warp == CONSUMERS) {
      const uint64_t policy = evict_first_policy();
      fetch_units<R::SLOTS>(
          full, empty, R::A_BYTES, piece, blocks, [](int) {},
          [&](int u, int slot, uint32_t bar) {
            // Tiles past the matrix's last repeat its first: their products are dropped.
            const int tile0 = first_tile(piece.block), there = shape.tiles - tile0;
#pragma unroll
            for (int i = 0; i < PREFILL_TILES; i++)
              bulk_copy(a_ring + slot * R::A_BYTES + i * L::UNIT_BYTES,
                        p.weights + (i < there ? (tile0 + i) * shape.tile_bytes() : 0) + (size_t)u * L::UNIT_BYTES,
                        L::UNIT_BYTES, bar, policy);
          });
    } else if (warp == CONSUMERS + 1) {
      Turn<R::SUMS_SLOTS> sums_turn;
      wait_for_previous_kernel();
      fetch_units<R::SLOTS>(
          full, empty, R::B_BYTES, piece, blocks,
          [&](uint32_t u) {
            if (u != piece.first && u % FP8_SUMS) return;
            mbarrier_wait(sums_empty + 8 * sums_turn.slot, sums_turn.phase ^ 1);
            if (elected()) {
              const uint32_t bar = sums_full + 8 * sums_turn.slot;
              const size_t at = (size_t)(piece.block % wide) * ceil_div(shape.units, FP8_SUMS) + u / FP8_SUMS;
              mbarrier_expect(bar, FP8_SUMS_BYTES<N>);
              bulk_copy(sums_ring + sums_turn.slot * FP8_SUMS_BYTES<N>, p.x + arranged.sums + at * FP8_SUMS_BYTES<N>,
                        FP8_SUMS_BYTES<N>, bar);
            }
            __syncwarp();
            sums_turn.next();
          },
          [&](int u, int slot, uint32_t bar) {
            bulk_copy(b_ring + slot * R::B_BYTES, p.x + ((size_t)(piece.block % wide) * shape.units + u) * R::B_BYTES,
                      R::B_BYTES, bar);
          });
    }
    __syncwarp();
    return;
  }
  take_registers<232>();
  wait_for_previous_kernel();
  const int half = warp >> 2, place = threadIdx.x & 127, t = lane & 3;
  Turn<R::SLOTS> turn;
  Turn<R::SUMS_SLOTS> sums_turn;
  float c[N / 8][4], sums[S / 8][4] = {};
  const uint32_t anew = gridDim.z - 1;  // zero: see wgmma_e4m3
  const uint32_t b_first = (uint32_t)b_descriptor(b_ring, N * 16);
  const auto descriptor = [](uint32_t low) { return (b_descriptor(0, N * 16) & ~(uint64_t)0x3FFF) | low; };
  // What belongs to the sums of activations: the scales and zeros of units, kept in the warp's scratch memory until there
  // are FP8_SUMS of them. Units before `first` and from `last` on are not there.
  const uint32_t kept = scratches + warp * R::SCRATCH, g = lane >> 2,
                 keep_at = kept + 512 * t + 4 * g;  // scales, zeros, and twice what nobody reads: no lane branches off
  const auto add_sums = [&](uint32_t first, uint32_t last) {
    uint32_t high[4], low[4];  // -scale * zero / 512 as the sum of two bf16: fragments of A whose K is the unit
    __syncwarp();
#pragma unroll
    for (int q = 0; q < 2; q++) {
      uint32_t parts[2][2];  // [unit][row]
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const uint32_t k = 8 * q + 2 * t + e, there = k - first % FP8_SUMS < last - first ? ~0u : 0;
        const uint32_t scale = lds32(kept + 32 * k + 4 * g) & there, zero = lds32(kept + 512 + 32 * k + 4 * g);
        parts[e][0] = __float_as_uint(half_to_float(scale & 0xFFFF) * (float)(zero & 0xFF) * (-1.0f / 512));
        parts[e][1] = __float_as_uint(half_to_float(scale >> 16) * (float)(zero >> 8) * (-1.0f / 512));
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        high[2 * q + h] = __byte_perm(parts[0][h], parts[1][h], 0x7632);
#pragma unroll
        for (int e = 0; e < 2; e++)
          parts[e][h] =
              __float_as_uint(__uint_as_float(parts[e][h]) - __uint_as_float(parts[e][h] & 0xFFFF0000u));
        low[2 * q + h] = __byte_perm(parts[0][h], parts[1][h], 0x7632);
      }
    }
    __syncwarp();  // the next units' may be kept
    // Chunks of eight units: the upper parts of their sums, the lower ones.
    const uint64_t b = b_descriptor(sums_ring + sums_turn.slot * FP8_SUMS_BYTES<N>, N * 32);
    mbarrier_wait(sums_full + 8 * sums_turn.slot, sums_turn.phase);
    wgmma_fence();
    wgmma<false>(c, high, b);
    wgmma<false>(c, low, b);
    wgmma<false>(c, high, b + N);
    wgmma_commit();
    wgmma_wait<0>();
    mbarrier_arrive(sums_empty + 8 * sums_turn.slot);
    sums_turn.next();
  };
  while (piece.next(me, grid, blocks)) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) c[i / 4][i % 4] = 0;
    uint32_t used = 0;  // of the unit before: released late, as an arrival may overtake loads that went before it
    for (uint32_t u = piece.first; u < piece.last;) {
      const uint32_t first = u, last = min(piece.last, u / FP8_SUMS * FP8_SUMS + FP8_SUMS);
#pragma unroll 1
      for (; u < last; u++, turn.next()) {
        const uint32_t at = a_ring + turn.slot * R::A_BYTES + warp * L::UNIT_BYTES;
        mbarrier_wait(full + 8 * turn.slot, turn.phase);
        uint32_t a[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint2 w = lds64(at + 256 * j + 8 * lane);
          a[j][0] = w.x & 0x0F0F0F0Fu, a[j][1] = w.x >> 4 & 0x0F0F0F0Fu;
          a[j][2] = w.y & 0x0F0F0F0Fu, a[j][3] = w.y >> 4 & 0x0F0F0F0Fu;
        }
        typename L::S scales;
        scales.load(at + L::C::BYTES, 0, 0, g);
        sts32(keep_at + 32 * (u % FP8_SUMS), t == 1 ? scales.zeros : scales.both);
        const uint32_t low = __shfl_sync(~0u, (b_first & 0x3FFF) + turn.slot * (R::B_BYTES / 16), 0);
#pragma unroll
        for (int s = 0; s < N / S; s++) {
          wgmma_fence();
#pragma unroll
          for (int j = 0; j < 4; j++) wgmma_e4m3(sums, a[j], descriptor(low + 2 * j * N + s * S), j ? 1 : anew);
          wgmma_commit();
          wgmma_wait<0>();
          if (s == 0 && used) mbarrier_arrive(used);
#pragma unroll
          for (int i = 0; i < S / 2; i++) {
            float& to = c[s * (S / 8) + i / 4][i % 4];
            to = fmaf(scales.scale[i >> 1 & 1], sums[i / 4][i % 4], to);
          }
        }
        used = empty + 8 * turn.slot;
      }
      add_sums(first, last);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
    if (used) mbarrier_arrive(used);

    const auto plane = [&](int block) {
      return (float4*)p.partial + ((size_t)block * 2 + half) * (N / 8) * 128 + place;
    };
    if (piece.first > 0) {  // another adds it
      float4* to = plane(me);
#pragma unroll
      for (int i = 0; i < N / 8; i++) __stcg(to + i * 128, make_float4(c[i][0], c[i][1], c[i][2], c[i][3]));
      warpgroup_sync(half);
      if (place == 0) set_flag(p.arrived + 2 * me + half);
      continue;
    }
    if (piece.last < piece.units) {
      const uint32_t end = (piece.block + 1) * piece.units;
      for (uint32_t other = me + 1; piece.start(other, grid) < end; other++) {
        if (piece.start(other, grid) == piece.start(other + 1, grid)) continue;
        uint32_t* flag = p.arrived + 2 * other + half;
        if (place == 0) await_flag(flag);
        warpgroup_sync(half);
        if (place == 0) *flag = 0;
        const float4* from = plane(other);
        constexpr int TOGETHER = 8;
#pragma unroll
        for (int i0 = 0; i0 < N / 8; i0 += TOGETHER) {
          float4 v[TOGETHER];
#pragma unroll
          for (int i = 0; i < TOGETHER; i++) v[i] = __ldcg(from + (i0 + i) * 128);
#pragma unroll
          for (int i = 0; i < TOGETHER; i++)
            c[i0 + i][0] += v[i].x, c[i0 + i][1] += v[i].y, c[i0 + i][2] += v[i].z, c[i0 + i][3] += v[i].w;
        }
      }
    }
    const float* factors = (const float*)(p.x + arranged.factors) + piece.block % wide * N + 2 * t;
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
      const float2 f = __ldcg((const float2*)(factors + 8 * i));
      c[i][0] *= 512, c[i][1] *= 512, c[i][2] *= 512, c[i][3] *= 512;  // apart, as 512 f.x may be infinite
      c[i][0] *= f.x, c[i][1] *= f.y, c[i][2] *= f.x, c[i][3] *= f.y;
    }
    const int first_row = (first_tile(piece.block) + 4 * half) * TILE_ROWS, column0 = piece.block % wide * N;
    const uint32_t scratch = scratches + 4 * half * R::SCRATCH;
    warpgroup_sync(half);  // all four warps have read what they kept there
    if (p.y_type == BF16)
      store_results<N>(p, c, first_row, column0, scratch, half, place, pack_bf16);
    else if (p.y_type == F16)
      store_results<N>(p, c, first_row, column0, scratch, half, place, pack_f16);
    else
      store_floats<N>(p, c, first_row, column0, place);
  }
  __syncwarp();
#endif
}

}  // namespace taper

// What fp8.cuh and fp8_mma.cuh have in common: y = x W^T for 64 columns of activations and more, and 4-bit integers in
// groups of 128, on FP8 tensor cores. Activations are rounded to e4m3, weights are not.
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
// Work split   A block is 128 rows of the matrix x N columns of activations, a tile of 16 rows a warp; blocks are dealt
//              out, and cut into pieces, as in prefill.cuh. A piece that does not begin its block leaves its sums to who
//              has the first, who adds them in their order: the result is the same from run to run.
//
// Launch       fp8_arrange: grid padded batch, block fp8_arrangers(cols). `x` of the product: Fp8Arranged's bytes, 128-byte aligned.
#pragma once
#include "kquant.cuh"
#include "prefill_parts.cuh"

namespace taper {

// Units whose sums of activations are multiplied at once.
constexpr int FP8_SUMS = 16;
// Threads that arrange a column, at most and of so many values: as few loads each as can be, and no more threads than for
// that.
constexpr int FP8_ARRANGERS = 1024;
__host__ __device__ constexpr int fp8_arrangers(int cols) {
  const int each = ceil_div(cols / 8, FP8_ARRANGERS);
  return ceil_div(cols / 8, 32 * each) * 32;
}
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
  __shared__ uint32_t largest[FP8_ARRANGERS / 32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int n = blockIdx.x, tid = threadIdx.x, units = p.cols / UNIT_COLS, eights = p.cols / 8;
  const bool there = n < p.batch;
  const int size = p.x_type == F32 ? 4 : 2;
  const bool aligned = (((size_t)p.x | (size_t)((long long)p.x_stride * size)) & 15) == 0;
  uint32_t most = 0;
  float v[8] = {};
  for (int i = tid; there && i < eights; i += blockDim.x) {
    eight_values(p, n, 8 * i, aligned, v);
#pragma unroll
    for (int e = 0; e < 8; e++) most = max(most, __float_as_uint(v[e]) & 0x7FFFFFFFu);
  }
  most = __reduce_max_sync(~0u, most);
  if (tid % 32 == 0) largest[tid / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < blockDim.x / 32; w++) most = max(most, largest[w]);
  const bool finite = most < 0x7F800000u;
  // A power of two, so that activations which e4m3 can express stay as they are.
  const uint32_t exponent = max(most >> 23, 20u) + ((most & 0x7FFFFFu) > 0x600000u);
  const float scale = __uint_as_float((262 - exponent) << 23);  // the largest: 224 to 448
  const Fp8Arranged at(p.padded, units);
  const int column = n % p.width, all_sums = ceil_div(units, FP8_SUMS) * FP8_SUMS;
  uint8_t* const block = p.out + (size_t)(n / p.width) * units * p.width * UNIT_COLS;
  uint8_t* const sums = p.out + at.sums + (size_t)(n / p.width) * all_sums * p.width * 4;
  for (int i = tid; i < all_sums * 16; i += blockDim.x) {
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

// The kernel, in each of the files.
#define FP8_ARRANGE                                                  \
  extern "C" __global__ void __launch_bounds__(taper::FP8_ARRANGERS) \
      fp8_arrange(const __grid_constant__ taper::Fp8Arrange p) {     \
    taper::fp8_arrange_column(p);                                    \
  }

// What belongs to the sums of activations: -scale * zero / 512 of FP8_SUMS units, as the sum of two bf16 each:
// fragments of A whose K is the unit. At `kept` are eight words for each unit, the scales of rows g and g + 8 in word g,
// then as many with zeros. Units before `first` and from `last` on, of one such set, are not there.
__device__ __forceinline__ void zero_fragments(uint32_t kept, int g, int t, uint32_t first, uint32_t last,
                                               uint32_t (&high)[4], uint32_t (&low)[4]) {
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
        parts[e][h] = __float_as_uint(__uint_as_float(parts[e][h]) - __uint_as_float(parts[e][h] & 0xFFFF0000u));
      low[2 * q + h] = __byte_perm(parts[0][h], parts[1][h], 0x7632);
    }
  }
}

// Where a lane keeps one of them until there are so many, as another lane does: none branches off.
constexpr int FP8_KEPT = 1024;
__device__ __forceinline__ uint32_t keep_place(uint32_t kept, int g, int t) { return kept + 512 * (t & 1) + 4 * g; }
// What a lane needs of a unit: its codes, as A of each vector, and the scales of its rows, which are kept too.
template <class L>
struct Fp8Unit {
  uint32_t a[4][4];
  typename L::S scales;
  __device__ __forceinline__ Fp8Unit(uint32_t at, uint32_t unit, uint32_t keep_at, int g, int t, int lane) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint2 w = lds64(at + 256 * j + 8 * lane);
      a[j][0] = w.x & 0x0F0F0F0Fu, a[j][1] = w.x >> 4 & 0x0F0F0F0Fu;
      a[j][2] = w.y & 0x0F0F0F0Fu, a[j][3] = w.y >> 4 & 0x0F0F0F0Fu;
    }
    scales.load(at + L::C::BYTES, 0, 0, g);
    sts32(keep_at + 32 * (unit % FP8_SUMS), t & 1 ? scales.zeros : scales.both);
  }
};

// Joins a piece's sums with those of others, half of the block's warps at a time: false if another adds them up. `place`
// counts that half's threads.
template <int N>
__device__ __forceinline__ bool join_sums(const Prefill& p, const Pieces& piece, float (&c)[N / 8][4], int half,
                                          int place) {
  const uint32_t me = blockIdx.x, grid = gridDim.x;
  const auto plane = [&](int block) { return (float4*)p.partial + ((size_t)block * 2 + half) * (N / 8) * 128 + place; };
  if (piece.first > 0) {
    float4* to = plane(me);
#pragma unroll
    for (int i = 0; i < N / 8; i++) __stcg(to + i * 128, make_float4(c[i][0], c[i][1], c[i][2], c[i][3]));
    warpgroup_sync(half);
    if (place == 0) set_flag(p.arrived + 2 * me + half);
    return false;
  }
  if (piece.last == piece.units) return true;
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
  return true;
}
// The powers of two that weights and columns of activations were multiplied with. factors: of the block's columns.
template <int N>
__device__ __forceinline__ void take_factors_out(const float* factors, int t, float (&c)[N / 8][4]) {
#pragma unroll
  for (int i = 0; i < N / 8; i++) {
    const float2 f = __ldcg((const float2*)(factors + 2 * t + 8 * i));
    c[i][0] *= 512, c[i][1] *= 512, c[i][2] *= 512, c[i][3] *= 512;  // apart, as 512 f.x may be infinite
    c[i][0] *= f.x, c[i][1] *= f.y, c[i][2] *= f.x, c[i][3] *= f.y;
  }
}

// A half's 64 rows x N columns, not rounded.
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

}  // namespace taper

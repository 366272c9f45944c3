// ggml's block formats: random blocks, and what they stand for.
#pragma once
#include <type_traits>

#include "../../kernels/kquant_formats.cuh"
#include "data.cuh"

namespace bench {

using namespace taper;

// Where a format's f16 scales lie in a block, and whether the second is a minimum.
template <class F>
struct Floats;
template <>
struct Floats<Q4_K> {
  static constexpr int D = 0, DMIN = 2;
};
template <>
struct Floats<Q5_K> : Floats<Q4_K> {};
template <>
struct Floats<Q6_K> {
  static constexpr int D = 208, DMIN = -1;
};
template <>
struct Floats<Q2_K> {
  static constexpr int D = 80, DMIN = 82;
};
template <>
struct Floats<Q3_K> {
  static constexpr int D = 108, DMIN = -1;
};
template <int BITS, bool MINS>
struct Floats<Block32<BITS, MINS>> {
  static constexpr int D = 0, DMIN = MINS ? 2 : -1;
};

template <>
struct Floats<Int4G128> {
  static constexpr int D = 0, DMIN = -1;
};

__device__ __forceinline__ uint16_t random_scale(Kind kind, uint64_t key) {
  const uint32_t h = hash(key);
  float v = 1e-3f * (0.5f + uniform(key + 1));
  if (kind == ROW_COL || kind == STUDENT_T) v *= expf(normal(key));
  if (kind == TINY_ROWS) v *= 1e-4f;
  if (kind == ZEROS && h % 3 == 0) v = 0;
  if (kind == RANDOM_BITS) return (h & 0x7C00) == 0x7C00 ? h & 0xBFFF : h & 0xFFFF;
  if (kind == NON_FINITE && h % 97 == 0) return h % 2 ? 0x7C00 : 0xFC00;
  if (kind == NON_FINITE && h % 97 == 1) return 0x7E00;
  return to_f16(v);
}

// `count` blocks: random codes and scales. Any grid.
template <class F>
__global__ void make_blocks(uint8_t* blocks, size_t count, Kind kind, uint64_t seed) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += step) {
    uint8_t* b = blocks + i * F::BYTES;
    for (int k = 0; k < F::BYTES; k++)
      b[k] = kind == CONSTANT ? 0x57 : hash((i * 512 + k) * 0x9E3779B97F4A7C15ULL + seed);
    const auto put = [&](int at, uint32_t half) { b[at] = half, b[at + 1] = half >> 8; };
    // Loaders refuse integers with scales that are infinite or none.
    put(Floats<F>::D, random_scale(std::is_same_v<F, Int4G128> && kind == NON_FINITE ? NORMAL : kind, 4 * i + seed));
    if (Floats<F>::DMIN >= 0) put(Floats<F>::DMIN, random_scale(kind, 4 * i + 2 + seed));
  }
}

// The values of a matrix of blocks, in f32 and rounded to the type; and what bounds the rounding of sums of its
// products, which are of codes and groups, not of weights. Any grid.
template <class L>
__global__ void dequantize(const uint8_t* blocks, float* exact, uint16_t* rounded, float* spread, int rows, int cols,
                           Type type) {
  using F = typename L::Source;
  using Group = typename F::Group;
  constexpr int LEN = Group::LEN;
  const size_t step = (size_t)gridDim.x * blockDim.x, count = (size_t)rows * cols;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += step) {
    const uint8_t* b = blocks + i / LEN * F::BYTES;
    const int k = i % LEN;
    const Group group{b, k / L::GROUP};
    const float d = half_to_float(group.d());
    float scale = d, min = 0;
    if constexpr (LEN == 256) scale = d * group.scale();
    if constexpr (L::MINS && LEN == 256) min = half_to_float(group.dmin()) * group.min();
    if constexpr (L::MINS && LEN == 32) min = -half_to_float(group.dmin());
    if constexpr (LEN == 128) min = d * group.zero();
    const int code = F::code(b, k), zero = L::MAGIC ? L::ZERO : 128;
    float v = __fmul_rn(scale, code - zero);
    if (L::MINS) v = __fsub_rn(v, min);
    exact[i] = v, spread[i] = LEN == 128 ? fabsf(v) : fabsf(scale) * (128 + abs(code - zero)) + fabsf(min);
    rounded[i] = type == F16 ? to_f16(v) : to_bf16(v);
  }
}

}  // namespace bench

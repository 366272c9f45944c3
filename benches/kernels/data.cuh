// Weights, scales and activations with known distributions, made on the card from a seed.
#pragma once
#include "common.cuh"

namespace bench {

enum Type { BF16, F16, F32 };  // as the kernels number them
constexpr int bytes_of(Type type) { return type == F32 ? 4 : 2; }

enum Kind { NORMAL, STUDENT_T, ROW_COL, SPECIALS, RANDOM_BITS, CONSTANT, ZEROS, NON_FINITE, TINY_ROWS, SPARSE, KINDS };
inline const char* name_of(Kind kind) {
  static const char* const names[] = {
      "normal",     // times 0.02, as every kind below
      "student-t",  // 5 degrees of freedom: heavy tails, as trained weights have
      "row+col",    // normal times log-normal scales of its row (0.5) and its column (0.3)
      "specials",   // some zeros, huge and tiny values among normal ones
      "random bits", "constant", "zeros", "NaN/Inf", "tiny rows", "95% zero"};
  return names[kind];
}

__device__ __forceinline__ uint32_t hash(uint64_t v) {
  v ^= v >> 33, v *= 0xff51afd7ed558ccdULL, v ^= v >> 33, v *= 0xc4ceb9fe1a85ec53ULL, v ^= v >> 33;
  return (uint32_t)v;
}
__device__ __forceinline__ float uniform(uint64_t key) {
  return ((hash(key) >> 8) + 0.5f) * (1.0f / 16777216.0f);  // never 0 or 1
}
__device__ __forceinline__ float normal(uint64_t key) {
  const float a = uniform(2 * key + 1), b = uniform(2 * key + 0x123456789abcULL);
  return sqrtf(-2.0f * logf(a)) * cospif(2.0f * b);
}
__device__ __forceinline__ float normal(uint64_t seed, uint64_t i) { return normal(seed * 0x9E3779B97F4A7C15ULL + i); }

__device__ __forceinline__ float from_bf16(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
__device__ __forceinline__ uint16_t to_bf16(float f) {
  uint32_t u = __float_as_uint(f);
  if (f != f) return 0x7FC0;
  u += 0x7FFF + ((u >> 16) & 1);
  return u >> 16;
}
__device__ __forceinline__ uint16_t to_f16(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ double load(const void* from, size_t i, Type type) {
  if (type == BF16) return from_bf16(((const uint16_t*)from)[i]);
  if (type == F32) return ((const float*)from)[i];
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(((const uint16_t*)from)[i]));
  return f;
}

// bf16 weights of the kind, any grid.
__global__ void make_weights(uint16_t* weights, size_t count, int cols, Kind kind, uint64_t seed) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += step) {
    float z = normal(seed, i);
    if (kind == STUDENT_T) {
      float squares = 0;
      for (int j = 1; j <= 5; j++) {
        const float q = normal(seed + 77 * j, i);
        squares += q * q;
      }
      z *= rsqrtf(squares / 5.0f);
    }
    if (kind == ROW_COL) z *= expf(0.5f * normal(seed + 991, i / cols)) * expf(0.3f * normal(seed + 992, i % cols));
    float v = z * 0.02f;
    const uint32_t h = hash(i * 31 + seed);
    if (kind == SPECIALS) {
      if (h % 503 == 0) v = 0.f;
      if (h % 5021 == 1) v = 1e20f * z;
      if (h % 5021 == 2) v = 1e-30f * z;
    }
    if (kind == CONSTANT) v = 0.37f;
    if (kind == ZEROS) v = 0;
    if (kind == TINY_ROWS && i / cols % 2) v *= 1e-25f;
    if (kind == SPARSE && h % 20) v = 0;
    uint16_t bits = to_bf16(v);
    if (kind == RANDOM_BITS) {
      bits = h;
      if ((bits & 0x7F80) > 0x6000) bits &= 0xBFFF;  // finite, and so are sums of products
    }
    if (kind == NON_FINITE) {
      if (h % 997 == 0) bits = 0x7F80;
      if (h % 997 == 1) bits = 0xFF80;
      if (h % 9970 == 2) bits = 0x7FC1;
    }
    weights[i] = bits;
  }
}

// Integers of the given spread as bf16, any grid. `odd` 1: some values that are no integers or out of range; 2: also
// infinities and NaN.
__global__ void make_integers(uint16_t* weights, size_t count, float spread, int odd, uint64_t seed) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += step) {
    float q = rintf(normal(seed, i) * spread);
    q = fminf(fmaxf(q, -128), 127) + 0.0f;
    if (odd) {
      const uint32_t h = hash(i * 31 + seed);
      if (h % 3001 == 0) q = 3.5f;
      if (h % 3001 == 1) q = 1e20f;
      if (h % 3001 == 2) q = -200;
      if (odd > 1 && h % 3001 == 3) q = INFINITY;
      if (odd > 1 && h % 9001 == 4) q = NAN;
    }
    weights[i] = to_bf16(q);
  }
}

// Scales between 0.001 and 0.002, a thread each.
__global__ void make_scales(float* scales, size_t count, uint64_t seed) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (i < count) scales[i] = 0.001f * (1 + uniform(seed + i));
}

// Normal values of the type, times `scale`, a thread each. `special`: some infinities, NaN and zeros.
__global__ void make_activations(void* x, size_t count, Type type, bool special, uint64_t seed, float scale = 1) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (i >= count) return;
  float v = normal(seed, i) * scale;
  const uint32_t h = hash(i * 77 + seed);
  if (special) {
    if (h % 3001 == 0) v = INFINITY;
    if (h % 3001 == 1) v = -INFINITY;
    if (h % 9001 == 2) v = NAN;
    if (h % 17 == 3) v = 0;
  }
  if (type == BF16)
    ((uint16_t*)x)[i] = to_bf16(v);
  else if (type == F16)
    ((uint16_t*)x)[i] = to_f16(v);
  else
    ((float*)x)[i] = v;
}

inline int blocks_for(size_t count) { return (int)((count + 255) / 256); }

// A matrix as the layouts are made from: bf16, `stride` values from row to row; integers have scales, one for each
// 256 x 256 tile or one for each row.
struct DenseMatrix {
  int rows = 0, cols = 0, stride = 0;
  Buffer<uint16_t> weights;
  Buffer<float> tile_scales, row_scales;
  int tile_scale_stride = 0;
  Buffer<uint8_t> blocks;  // instead of weights: rows of a GGUF format's blocks

  DenseMatrix(int rows, int cols, int stride) : rows(rows), cols(cols), stride(stride) {}
};

}  // namespace bench

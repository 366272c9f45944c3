// What the kernels must give: products in f64 of the exact weights, and the weights themselves.
#pragma once
#include "data.cuh"

namespace bench {

// The weights that integers and scales stand for: in f32, exact enough for the reference, and rounded to the type that
// they decode to. Any grid.
__global__ void apply_scales(const uint16_t* integers, int stride, const float* tile_scales, int tile_scale_stride,
                             const float* row_scales, float* exact, uint16_t* rounded, int rows, int cols, Type type) {
  const size_t step = (size_t)gridDim.x * blockDim.x, count = (size_t)rows * cols;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += step) {
    const int row = i / cols, col = i % cols;
    const float scale = tile_scales  ? tile_scales[(size_t)(row / 256) * tile_scale_stride + col / 256]
                        : row_scales ? row_scales[row]
                                     : 1;
    const float v = from_bf16(integers[(size_t)row * stride + col]) * scale;
    exact[i] = v;
    uint16_t bits;
    if (type == F16)
      bits = to_f16(v);
    else
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    rounded[i] = bits;
  }
}

// y[m][n] in f64 and the sum of the magnitudes, which bounds the rounding error of any order of summation. A block of
// 128 threads for each row of weights; `exact`, if any, replaces `weights`, and `spread` in the sum of magnitudes.
__global__ void reference(const uint16_t* weights, int stride, const float* exact, const float* spread, const void* x,
                          Type x_type, int x_stride, const void* bias, Type bias_type, double* y, double* magnitudes, int rows,
                          int cols, int batch) {
  const int row = blockIdx.x;
  __shared__ double sums[128], all[128];
  for (int m = 0; m < batch; m++) {
    double sum = 0, magnitude = 0;
    for (int k = threadIdx.x; k < cols; k += 128) {
      const double w =
          exact ? (double)exact[(size_t)row * cols + k] : (double)from_bf16(weights[(size_t)row * stride + k]);
      const double value = load(x, (size_t)m * x_stride + k, x_type), product = w * value;
      sum += product, magnitude += fabs(spread ? spread[(size_t)row * cols + k] * value : product);
    }
    sums[threadIdx.x] = sum, all[threadIdx.x] = magnitude;
    __syncthreads();
    for (int o = 64; o; o >>= 1) {
      if (threadIdx.x < o) sums[threadIdx.x] += sums[threadIdx.x + o], all[threadIdx.x] += all[threadIdx.x + o];
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      y[(size_t)m * rows + row] = sums[0] + (bias ? load(bias, row, bias_type) : 0.0);
      magnitudes[(size_t)m * rows + row] = all[0];
    }
    __syncthreads();
  }
}

struct Comparison {
  unsigned long long wrong, shown;
  double error, norm;  // sums of squares
};

// Counts outputs that are wrong: off by more than their own rounding (1% to spare) and `allowed` of the magnitudes (2e-6
// for f32 sums); not NaN or the same infinity where the reference is. Where the type or f32 overflows nothing is asked.
__global__ void compare_products(const void* y, Type type, int stride, const double* reference,
                                 const double* magnitudes, int rows, int batch, double allowed, Comparison* result) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (i >= (size_t)rows * batch) return;
  const int m = i / rows, n = i % rows;
  const double got = load(y, (size_t)m * stride + n, type), want = reference[i], magnitude = magnitudes[i];
  if (type == F16 && fabs(want) + allowed * magnitude > 60000) return;
  if (fabs(want) > 3e38 && !isinf(want)) return;
  if (magnitude > 3e38 && !isinf(magnitude)) return;
  const double rounding = type == BF16 ? 1.0 / 256 : type == F16 ? 1.0 / 2048 : 1e-7;
  bool right;
  if (isnan(want))
    right = isnan(got);
  else if (isinf(want))
    right = got == want;
  else
    right = fabs(got - want) <= rounding * 1.01 * fabs(want) + allowed * magnitude + (type == F16 ? 6e-8 : 1e-37);
  if (!right) {
    atomicAdd(&result->wrong, 1ULL);
    if (atomicAdd(&result->shown, 1ULL) < 4)
      printf("    wrong: row %d of x, row %d of W: got %g, reference %g, magnitude %g\n", m, n, got, want, magnitude);
  }
  if (!isnan(want) && !isinf(want))
    atomicAdd(&result->error, (got - want) * (got - want)), atomicAdd(&result->norm, want * want);
}

// Counts words that differ. Any grid.
__global__ void compare_words(const uint16_t* a, int a_stride, const uint16_t* b, int b_stride, int rows, int cols,
                              unsigned long long* wrong) {
  const size_t step = (size_t)gridDim.x * blockDim.x, count = (size_t)rows * cols;
  unsigned long long mine = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += step)
    mine += a[i / cols * a_stride + i % cols] != b[i / cols * b_stride + i % cols];
  if (mine) atomicAdd(wrong, mine);
}

}  // namespace bench

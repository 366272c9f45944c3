// What stands between products and takes each value once: the gated activation, and a residual's sum with its norm.
// Sums are f32 and results are rounded once. Bound by launches for one token, by the memory's bandwidth for a prompt.
// All may be launched with programmatic stream serialisation.
#include "elements.cuh"
#include "ptx.cuh"

using namespace taper;

// y = silu(gate) * up, of `count` values.
template <class T>
__device__ __forceinline__ void gated(const T* gate, const T* up, T* y, uint64_t count) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const uint64_t step = (uint64_t)gridDim.x * blockDim.x;
  for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const float g = widened(gate[i]);
    y[i] = narrowed<T>(g / (1 + __expf(-g)) * widened(up[i]));
  }
}

// The sum of all threads' values, in one order.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float sums[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x / 32;
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < warps; w++) value += sums[w];
  return value;
}

// A block for each row: z = x + y, then z / sqrt(mean(z^2) + epsilon) * weight. `out` has all rows of z, then all
// norms; without y, which is null, only norms. The first 8 values of each thread stay in registers, so that a row of up
// to 8192 is one round of loads. The weights must have been complete before the previous kernel began.
template <class T>
__device__ __forceinline__ void add_norm(const T* x, const T* y, const T* weight, T* out, uint32_t size,
                                         float epsilon) {
  let_next_kernel_start();
  const uint64_t row = (uint64_t)blockIdx.x * size;
  T* const total = out + row;
  T* const norm = out + (y ? (uint64_t)gridDim.x * size : 0) + row;
  const uint32_t first = threadIdx.x * 8, step = blockDim.x * 8;
  const bool inside = first < size;
  Eight<T> sum = {}, scale = {};
  if (inside) scale = Eight<T>::load(weight + first);
  wait_for_previous_kernel();
  float squares = 0;
  const auto add = [&](uint32_t i) {
    Eight<T> z = Eight<T>::load(x + row + i);
    if (y) {
      const Eight<T> more = Eight<T>::load(y + row + i);
#pragma unroll
      for (int j = 0; j < 8; j++) z.values[j] = narrowed<T>(z[j] + more[j]);
      z.store(total + i);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) squares += z[j] * z[j];
    return z;
  };
  if (inside) sum = add(first);
  for (uint32_t i = first + step; i < size; i += step) add(i);
  const float factor = rsqrtf(block_sum(squares) / size + epsilon);
  const auto scaled = [&](uint32_t i, const Eight<T>& z, const Eight<T>& weight) {
    Eight<T> result;
#pragma unroll
    for (int j = 0; j < 8; j++) result.values[j] = narrowed<T>(z[j] * factor * weight[j]);
    result.store(norm + i);
  };
  if (inside) scaled(first, sum, scale);
  // Each thread reads what it wrote.
  for (uint32_t i = first + step; i < size; i += step)
    scaled(i, Eight<T>::load((y ? total : x + row) + i), Eight<T>::load(weight + i));
}

// The same for rows and places that are no multiples of 8 values.
template <class T>
__device__ __forceinline__ void add_norm_any(const T* x, const T* y, const T* weight, T* out, uint32_t size,
                                             float epsilon) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const uint64_t row = (uint64_t)blockIdx.x * size;
  T* const total = out + row;
  T* const norm = out + (y ? (uint64_t)gridDim.x * size : 0) + row;
  float squares = 0;
  for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) {
    const T sum = y ? narrowed<T>(widened(x[row + i]) + widened(y[row + i])) : x[row + i];
    if (y) total[i] = sum;
    squares += widened(sum) * widened(sum);
  }
  const float factor = rsqrtf(block_sum(squares) / size + epsilon);
  // Each thread reads what it wrote.
  for (uint32_t i = threadIdx.x; i < size; i += blockDim.x)
    norm[i] = narrowed<T>(widened(y ? total[i] : x[row + i]) * factor * widened(weight[i]));
}

#define POINTWISE(NAME, T)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256) gated_##NAME(const T* gate, const T* up, T* y, uint64_t count) { \
    gated(gate, up, y, count);                                                                                       \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(1024)                                                                 \
      add_norm_##NAME(const T* x, const T* y, const T* weight, T* out, uint32_t size, float epsilon) {               \
    add_norm(x, y, weight, out, size, epsilon);                                                                      \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(1024)                                                                 \
      add_norm_any_##NAME(const T* x, const T* y, const T* weight, T* out, uint32_t size, float epsilon) {           \
    add_norm_any(x, y, weight, out, size, epsilon);                                                                  \
  }
POINTWISE(bf16, __nv_bfloat16)
POINTWISE(f16, __half)
POINTWISE(f32, float)

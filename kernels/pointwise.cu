// What stands between products and takes each value once: the gated activation, and a residual's sum with its norm.
// Sums are f32 and results are rounded once. Bound by launches for one token, by the memory's bandwidth for a prompt.
#include "elements.cuh"

using namespace taper;

// y = silu(gate) * up, of `count` values.
template <class T>
__device__ __forceinline__ void gated(const T* gate, const T* up, T* y, uint64_t count) {
  const uint64_t step = (uint64_t)gridDim.x * blockDim.x;
  for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const float g = widened(gate[i]);
    y[i] = narrowed<T>(g / (1 + __expf(-g)) * widened(up[i]));
  }
}

// A block for each row: z = x + y, then z / sqrt(mean(z^2) + epsilon) * weight. `out` has all rows of z, then all
// norms.
template <class T>
__device__ __forceinline__ void add_norm(const T* x, const T* y, const T* weight, T* out, uint32_t size,
                                         float epsilon) {
  __shared__ float sums[32];
  const uint64_t row = (uint64_t)blockIdx.x * size;
  T* const total = out + row;
  T* const norm = out + (uint64_t)gridDim.x * size + row;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x / 32;
  float squares = 0;
  for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) {
    const T sum = narrowed<T>(widened(x[row + i]) + widened(y[row + i]));
    total[i] = sum;
    squares += widened(sum) * widened(sum);
  }
  for (int apart = 16; apart > 0; apart /= 2) squares += __shfl_xor_sync(~0u, squares, apart);
  if (lane == 0) sums[warp] = squares;
  __syncthreads();
  squares = 0;
  for (int w = 0; w < warps; w++) squares += sums[w];
  const float factor = rsqrtf(squares / size + epsilon);
  // Each thread reads what it wrote.
  for (uint32_t i = threadIdx.x; i < size; i += blockDim.x)
    norm[i] = narrowed<T>(widened(total[i]) * factor * widened(weight[i]));
}

#define POINTWISE(NAME, T)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256) gated_##NAME(const T* gate, const T* up, T* y, uint64_t count) { \
    gated(gate, up, y, count);                                                                                       \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(1024)                                                                 \
      add_norm_##NAME(const T* x, const T* y, const T* weight, T* out, uint32_t size, float epsilon) {               \
    add_norm(x, y, weight, out, size, epsilon);                                                                      \
  }
POINTWISE(bf16, __nv_bfloat16)
POINTWISE(f16, __half)
POINTWISE(f32, float)

// Eight activations of one type: loaded and stored in 16 bytes (two times 16 for f32), computed with as f32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace taper {

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T narrowed(float v);
template <>
__device__ __forceinline__ float narrowed<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrowed<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrowed<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class T>
struct alignas(sizeof(T) * 8 < 16 ? sizeof(T) * 8 : 16) Eight {
  T values[8];

  __device__ __forceinline__ static Eight load(const T* from) { return *(const Eight*)from; }
  __device__ __forceinline__ void store(T* to) const { *(Eight*)to = *this; }
  __device__ __forceinline__ float operator[](int i) const { return widened(values[i]); }
};

}  // namespace taper

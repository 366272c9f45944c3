// Activations on their way into the product: bf16 columns in shared memory, exact for every input type.
#pragma once
#include "parts.cuh"
#include "ptx.cuh"

namespace taper {

enum Type { BF16 = 0, F16 = 1, F32 = 2 };  // x_type, y_type

__device__ __forceinline__ float half_to_float(uint32_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((uint16_t)h));
  return f;
}
__device__ __forceinline__ uint32_t float_to_half(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ uint32_t float_to_bf16(float f) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ float load_value(const void* p, size_t i, int type) {
  if (type == F32) return ((const float*)p)[i];
  const uint32_t h = ((const uint16_t*)p)[i];
  return type == F16 ? half_to_float(h) : __uint_as_float(h << 16);
}
__device__ __forceinline__ void store_value(void* p, size_t i, int type, float v) {
  if (type == F32)
    ((float*)p)[i] = v;
  else
    ((uint16_t*)p)[i] = (uint16_t)(type == F16 ? float_to_half(v) : float_to_bf16(v));
}

// Two values as the 16-bit type, the first below.
__device__ __forceinline__ uint32_t two_rounded(float first, float second, int type) {
  return type == F16 ? pack_halves(first, second) : pack_bf16(first, second);
}

// Eight activations, two in a word; those past the end are zero.
__device__ __forceinline__ uint4 load_eight(const void* x, int k, int cols, bool aligned) {
  const uint16_t* const from = (const uint16_t*)x + k;
  if (aligned && k + 8 <= cols) return *(const uint4*)from;
  uint32_t w[4] = {};
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (k + i < cols) w[i / 2] |= (uint32_t)from[i] << 16 * (i & 1);
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// The general way: any type, any alignment, columns past the end. Rarely on the critical path, so it stays out of line.
template <int THREADS>
__device__ __noinline__ void split_activations(uint32_t dst, int stride, const void* x, int type, int x_stride,
                                               int batch, int cols, int first, int width, int tid, bool aligned) {
  const int parts = type + 1, size = type == F32 ? 4 : 2, chunks = width / 8, total = batch * chunks;
  constexpr int DEEP = 4;  // loads in flight per thread
  for (int base = tid; base < total; base += DEEP * THREADS) {
    uint4 raw[DEEP][2];
#pragma unroll
    for (int d = 0; d < DEEP; d++) {
      const int i = base + d * THREADS, row = i / chunks, k = first + (i - row * chunks) * 8;
      raw[d][0] = raw[d][1] = make_uint4(0, 0, 0, 0);
      if (i >= total) continue;
      const uint8_t* p = (const uint8_t*)x + ((size_t)row * x_stride + k) * size;
      if (aligned && k + 8 <= cols) {
        raw[d][0] = *(const uint4*)p;
        if (type == F32) raw[d][1] = *(const uint4*)(p + 16);
      } else {
        uint32_t w[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
        for (int e = 0; e < 8; e++) {
          if (k + e >= cols) continue;
          if (type == F32)
            w[e] = ((const uint32_t*)p)[e];
          else
            w[e / 2] |= (uint32_t)((const uint16_t*)p)[e] << (e & 1) * 16;
        }
        raw[d][0] = make_uint4(w[0], w[1], w[2], w[3]), raw[d][1] = make_uint4(w[4], w[5], w[6], w[7]);
      }
    }
#pragma unroll
    for (int d = 0; d < DEEP; d++) {
      const int i = base + d * THREADS, row = i / chunks, chunk = i - row * chunks;
      if (i >= total) continue;
      const uint32_t w[8] = {raw[d][0].x, raw[d][0].y, raw[d][0].z, raw[d][0].w,
                             raw[d][1].x, raw[d][1].y, raw[d][1].z, raw[d][1].w};
      uint32_t out[3][4];
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        uint32_t lo[3], hi[3];
#pragma unroll
        for (int o = 0; o < 2; o++) {
          const uint32_t h = o ? w[e / 2] >> 16 : w[e / 2] & 0xFFFF;
          const float v = type == F32   ? __uint_as_float(w[e + o])
                          : type == F16 ? half_to_float(h)
                                        : __uint_as_float(h << 16);
          split(v, parts, o ? hi : lo);
        }
#pragma unroll
        for (int s = 0; s < 3; s++) out[s][e / 2] = __byte_perm(lo[s], hi[s], 0x7632);
      }
#pragma unroll
      for (int s = 0; s < 3; s++)
        if (s < parts)
          sts128(dst + (row * parts + s) * stride + chunk * 16, make_uint4(out[s][0], out[s][1], out[s][2], out[s][3]));
    }
  }
}

// Fills `batch * parts` columns of `width` bf16 values (a multiple of 128) at `dst`, `stride` bytes apart, from columns
// first.. of x; those at and past `cols` become zero. Called by THREADS threads; the caller waits (async_wait, then a
// barrier).
template <int THREADS>
__device__ __forceinline__ void load_activations(uint32_t dst, int stride, const void* x, int type, int x_stride,
                                                 int batch, int cols, int first, int width, int tid) {
  const int size = type == F32 ? 4 : 2;
  const bool aligned = (((size_t)x | (size_t)((long long)x_stride * size)) & 15) == 0;
  if (type == BF16 && aligned && first + width <= cols) {
    const uint16_t* from = (const uint16_t*)x + first;
    for (int row = 0; row < batch; row++, dst += stride, from += x_stride)
      for (int at = tid * 8; at < width; at += THREADS * 8) async_copy16(dst + at * 2, from + at);
    return;
  }
  split_activations<THREADS>(dst, stride, x, type, x_stride, batch, cols, first, width, tid, aligned);
}

}  // namespace taper

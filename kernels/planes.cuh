// Activations as planes of signed bytes, for products of bytes on tensor cores (m16n8k32).
//
// The 128 columns of a unit in one row of x share a power of two s: x = s * (65536 a + 256 b + c), a, b, c in
// -128..127. That is a number of 23 bits, signed: bf16 values down to 2^-14 and f16 values down to 2^-11 of the group's
// largest are exact, others off by at most 2^-22 of it. Sums of products with bytes are exact integers.
//
//   row of x   three planes, that of a first, each with a byte a column, `plane_stride` bytes apart
//   unit       128 bytes of a plane: column 32 j + 8 t + kk is at 64 (j/2) + 16 t + 8 (j%2) + place_in_plane(kk), so
//              that a lane's 16 bytes are its B fragments of two vectors
//
// Within four columns the order is 0, 2, 1, 3: so weights that are bytes in the same order become pairs for bf16
// products with one shift.
#pragma once
#include "activations.cuh"

namespace taper {

constexpr int PLANES = 3, PLANE_UNIT = 128, PLANE_ROWS = 8;

__host__ __device__ constexpr int plane_stride(int width) {
  return width + 64;  // + 64: neighbouring rows of x start in different banks
}
__host__ __device__ constexpr int planes_bytes(int width, int batch) {
  return width / PLANE_UNIT * PLANE_ROWS * 4 + batch * PLANES * plane_stride(width);
}
__host__ __device__ constexpr int place_in_plane(int kk) { return (kk & 4) | (kk & 1) << 1 | (kk >> 1 & 1); }

// Where a block keeps the planes of up to 8 rows of x: for each unit the factors s of its rows, then planes.
struct Planes {
  uint32_t scales, rows;
  int stride;  // bytes between planes
  __device__ Planes(uint32_t at, int width)
      : scales(at), rows(at + width / PLANE_UNIT * PLANE_ROWS * 4), stride(plane_stride(width)) {}
  __device__ uint32_t row(int m) const { return rows + m * PLANES * stride; }
  __device__ uint32_t scale(int unit, int m) const { return scales + (unit * PLANE_ROWS + m) * 4; }
};

// load_eight where a row may end, out of line as it is rarely on the critical path.
__device__ __noinline__ inline uint4 load_end(const uint16_t* from, int left) {
  return load_eight(from, 0, left, false);
}

// Eight values as planes: 8 bytes each at `to`, `stride` apart.
template <bool HALVES>
__device__ __forceinline__ void put_planes(uint32_t to, int stride, const uint4& raw, float inverse) {
  constexpr float MAGIC = 12582912.0f;                  // 1.5 * 2^23: the sum's low bits are the integer
  constexpr uint32_t TO_BYTES = 0x8080u - 0x4B400000u;  // of which b + 128 and c + 128 are bytes then
  const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
  uint32_t plane[PLANES][2];
#pragma unroll
  for (int four = 0; four < 2; four++) {
    uint32_t n[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t pair = w[2 * four + i / 2];
      const float v = HALVES ? half_to_float(i & 1 ? pair >> 16 : pair & 0xFFFF)
                             : __uint_as_float(i & 1 ? pair & 0xFFFF0000u : pair << 16);
      n[i] = __float_as_uint(fmaf(v, inverse, MAGIC)) + TO_BYTES;
    }
    const uint32_t even = __byte_perm(n[0], n[2], 0x5140), odd = __byte_perm(n[1], n[3], 0x5140);
    plane[2][four] = __byte_perm(even, odd, 0x5410) ^ 0x80808080u;
    plane[1][four] = __byte_perm(even, odd, 0x7632) ^ 0x80808080u;
    plane[0][four] = __byte_perm(__byte_perm(n[0], n[2], 0x0062), __byte_perm(n[1], n[3], 0x0062), 0x5410);
  }
#pragma unroll
  for (int q = 0; q < PLANES; q++) sts64(to + q * stride, plane[q][0], plane[q][1]);
}

// Fills planes from columns first.. of x, bf16, or f16 if HALVES; columns at and past `cols` become zero. Called by
// THREADS threads; the caller puts a barrier behind. True if a value of this lane's is not finite or 2^101 and more:
// then the planes are not to be used.
template <int THREADS, bool HALVES>
__device__ __forceinline__ bool make_planes(const Planes& planes, const void* x, int x_stride, int batch, int cols,
                                            int first, int width, int tid) {
  constexpr int DEEP = 8;  // loads in flight per thread
  const int chunks = width / 8, total = batch * chunks;
  const bool regular = (((size_t)x | (size_t)((long long)x_stride * 2)) & 15) == 0 && first + width <= cols;
  uint32_t largest = 0;
  int row = 0, chunk = tid;
  for (int base = tid & ~31; base < total; base += DEEP * THREADS) {  // whole warps: lanes exchange their largest
    uint4 raw[DEEP];
    uint32_t to[DEEP], scale_to[DEEP];
#pragma unroll
    for (int d = 0; d < DEEP; d++, chunk += THREADS) {
      if (base + d * THREADS >= total) break;
      while (chunk >= chunks) chunk -= chunks, row++;
      raw[d] = make_uint4(0, 0, 0, 0);
      if (row < batch) {
        const int k = first + chunk * 8;
        const uint16_t* from = (const uint16_t*)x + (size_t)row * x_stride + k;
        raw[d] = regular ? *(const uint4*)from : load_end(from, cols - k);
      }
      to[d] = planes.row(row) + ((chunk & ~15) << 3 | (chunk & 8) << 3 | (chunk & 3) << 4 | (chunk & 4) << 1);
      scale_to[d] = planes.scale(chunk >> 4, row);
    }
#pragma unroll
    for (int d = 0; d < DEEP; d++) {
      const int at = base + d * THREADS;
      if (at >= total) break;
      // Without their signs, values of both types are ordered as integers, infinities and NaN behind.
      constexpr uint32_t MAGNITUDES = 0x7FFF7FFFu;
      uint32_t top = __vmaxu2(__vmaxu2(raw[d].x & MAGNITUDES, raw[d].y & MAGNITUDES),
                              __vmaxu2(raw[d].z & MAGNITUDES, raw[d].w & MAGNITUDES));
#pragma unroll
      for (int lanes = 1; lanes < PLANE_UNIT / 8; lanes *= 2) top = __vmaxu2(top, __shfl_xor_sync(~0u, top, lanes));
      const uint32_t value = max(top & 0xFFFF, top >> 16),
                     bits = HALVES ? __float_as_uint(half_to_float(value)) : value << 16;
      largest = max(largest, bits);
      if (at + (tid & 31) >= total) continue;
      const uint32_t exponent = max(bits >> 23, 27u);  // 2^-100 at least: both factors are normal numbers
      put_planes<HALVES>(to[d], planes.stride, raw[d], __uint_as_float((127 + 21 + 127 - exponent) << 23));
      if ((tid & 15) == 0) sts32(scale_to[d], (exponent - 21) << 23);
    }
  }
  return largest >= (127 + 101) << 23;
}

}  // namespace taper

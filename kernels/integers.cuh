// Layouts `int8`, `int5`, `int4`: matrices of small integers times scales, as INT8 and rate-coded tensors are.
//
//   unit   Bytes in the A order of m16n8k32, whose four registers of vector j are i = 2 (kk/4) + h; byte place(kk % 4)
//   of
//          one is column kk, place = 0, 2, 1, 3 (see planes.cuh).
//          int8  2048 bytes: register i of vector j at 512 j + 16 lane + 4 i (-128..127)
//          int4  1024 bytes (-8..7): the same at 512 (j/2) + 16 lane + 4 i, vectors of even j in the low halves of its
//                bytes, the others in the high ones
//          int5  the upper four bits of each as int4, then 256 bytes of lowest bits (-16..15): bit 4 (j%2) + i of each
//                byte of the word at 1024 + 8 lane + 4 (j/2)
//   stage  8 units, trailer of 128 bytes: EXTRA is a scale (f32) for each unit, then 8 bytes unused
//
// All are two's complement. As bytes for integer products they are the integer times L::SHIFTED: a half byte is put
// where a byte has its upper bits, so nothing is to be subtracted. As bf16 they are placed in the mantissa of 128, and
// one packed addition takes away what they are too large by. Integers out of range, and values that are none (escapes
// of rate-coded tensors, divided by their scale), are repairs, as bf16.
//
// Up to BYTE_ROWS rows of activations are multiplied as bytes: what making planes of them takes must be less than what
// making bf16 of the weights does.
//
// Budget per weight: as bytes int8 nothing, int4 0.4, int5 0.9; as bf16, per pair: int8 shift, 2 LOP3, HFMA2: 1.75;
// int4 shift, LOP3, HFMA2: 1.5; int5 two more: 2.5.
#pragma once
#include "dense.cuh"
#include "planes.cuh"

namespace taper {

__device__ __forceinline__ uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3F803F80u), "r"(b));
  return d;
}
// The integer that a bf16 holds, if it is one of [lo, hi].
__device__ __forceinline__ bool small_integer(uint32_t bf16, int lo, int hi, int& n) {
  const float v = __uint_as_float(bf16 << 16);
  if (!(v >= lo && v <= hi) || bf16 == 0x8000) return false;
  n = (int)v;
  return (float)n == v;
}
// Whether it holds one.
__device__ __forceinline__ bool in_range(uint32_t bf16, int lo, int hi) {
  int n;
  return small_integer(bf16, lo, hi, n);
}

struct Integers {
  static constexpr int UNITS = 8, EXTRA = 40, TRAILER = 8 + EXTRA + 4 * ENTRIES;
  static constexpr int GROUP = 0;
  static constexpr bool SCALED = true;
  __device__ __forceinline__ static float unit_scale(uint32_t trailer, int u) { return lds_float(trailer + 8 + 4 * u); }
  __device__ __forceinline__ static float unit_scale(const uint8_t* trailer, int u) {
    return __ldg((const float*)(trailer + 8) + u);
  }
};

struct Int8 : Integers {
  static constexpr int UNIT_BYTES = 2048, LOWEST = -128, HIGHEST = 127, SHIFTED = 1, BYTE_ROWS = 8;
  __device__ __forceinline__ static bool expresses(uint32_t weight) { return in_range(weight, LOWEST, HIGHEST); }
  struct Unit {
    uint4 words[4];
    __device__ __forceinline__ void load(uint32_t at, uint32_t, int, int lane) {
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] = lds128(at + 512 * j + lane * 16);
    }
    __device__ __forceinline__ void fetch(const uint8_t* at, const uint8_t*, int, int lane, uint64_t policy) {
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] = ldg_stream128(at + 512 * j + lane * 16, policy);
    }
    // Vector j as bytes.
    __device__ __forceinline__ void bytes(int j, uint32_t (&a)[4]) const {
      a[0] = words[j].x, a[1] = words[j].y, a[2] = words[j].z, a[3] = words[j].w;
    }
    // Vector j as bf16.
    __device__ __forceinline__ void vector(int j, uint32_t (&a)[8]) const {
      uint32_t w[4];
      bytes(j, w);
#pragma unroll
      for (int p = 0; p < 8; p++) {
        const uint32_t pair = w[2 * (p / 4) + p % 2] >> 8 * (p / 2 % 2);
        a[p] = add_bf16x2((pair & 0x007F007Fu) | 0x43004300u, (pair & 0x00800080u) | 0xC300C300u);
      }
    }
  };
  // One lane's integers of the unit: n[j][8 h + kk].
  __device__ __forceinline__ static void store(uint8_t* unit, int lane, const int (&n)[4][16]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const int h = i >> 3, place = place_in_plane(i & 7);
        w[2 * (place / 4) + h] |= (uint32_t)(n[j][i] & 255) << 8 * (place % 4);
      }
      ((uint4*)unit)[32 * j + lane] = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
};

template <int BITS>
struct IntN : Integers {
  static_assert(BITS == 4 || BITS == 5, "");
  static constexpr int UNIT_BYTES = BITS == 5 ? 1280 : 1024, LOWEST = -(1 << (BITS - 1)), HIGHEST = -LOWEST - 1,
                       SHIFTED = 1 << (8 - BITS), BYTE_ROWS = BITS == 5 ? 8 : 2;
  __device__ __forceinline__ static bool expresses(uint32_t weight) { return in_range(weight, LOWEST, HIGHEST); }
  struct Unit {
    uint4 upper[2];
    uint2 lowest;
    __device__ __forceinline__ void load(uint32_t at, uint32_t, int, int lane) {
      upper[0] = lds128(at + lane * 16), upper[1] = lds128(at + 512 + lane * 16);
      if (BITS == 5) lowest = lds64(at + 1024 + lane * 8);
    }
    __device__ __forceinline__ void bytes(int j, uint32_t (&a)[4]) const {
      const uint32_t w[4] = {upper[j / 2].x, upper[j / 2].y, upper[j / 2].z, upper[j / 2].w},
                     bits = j < 2 ? lowest.x : lowest.y;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[i] = (j % 2 ? w[i] : w[i] << 4) & 0xF0F0F0F0u;
        const int at = 4 * (j % 2) + i;
        if (BITS == 5) a[i] |= (at < 3 ? bits << (3 - at) : bits >> (at - 3)) & 0x08080808u;
      }
    }
    __device__ __forceinline__ void fetch(const uint8_t* at, const uint8_t*, int, int lane, uint64_t policy) {
      upper[0] = ldg_stream128(at + lane * 16, policy), upper[1] = ldg_stream128(at + 512 + lane * 16, policy);
      if (BITS == 5) lowest = __ldg((const uint2*)(at + 1024 + lane * 8));
    }
    __device__ __forceinline__ void vector(int j, uint32_t (&a)[8]) const {
      const uint32_t w[4] = {upper[j / 2].x, upper[j / 2].y, upper[j / 2].z, upper[j / 2].w},
                     bits = j < 2 ? lowest.x : lowest.y;
#pragma unroll
      for (int p = 0; p < 8; p++) {
        const int i = 2 * (p / 4) + p % 2, down = 4 * (j % 2) + 8 * (p / 2 % 2);
        if (BITS == 4) {
          a[p] = add_bf16x2((w[i] >> down & 0x000F000Fu) ^ 0x43084308u, 0xC308C308u);
        } else {
          const uint32_t n = (down ? w[i] >> (down - 1) : w[i] << 1) & 0x001E001Eu,
                         low = bits >> (4 * (j % 2) + i + 8 * (p / 2 % 2)) & 0x00010001u;
          a[p] = add_bf16x2((n ^ 0x43104310u) | low, 0xC310C310u);
        }
      }
    }
  };
  __device__ __forceinline__ static void store(uint8_t* unit, int lane, const int (&n)[4][16]) {
    uint32_t upper[8] = {}, lowest[2] = {};
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 16; e++) {
        const int place = place_in_plane(e & 7), i = 2 * (place / 4) + (e >> 3), byte = 8 * (place % 4);
        const uint32_t v = (uint32_t)n[j][e];
        upper[4 * (j / 2) + i] |= (v >> (BITS - 4) & 15) << (byte + 4 * (j % 2));
        lowest[j / 2] |= (v & 1) << (byte + 4 * (j % 2) + i);
      }
    ((uint4*)unit)[lane] = make_uint4(upper[0], upper[1], upper[2], upper[3]);
    ((uint4*)unit)[32 + lane] = make_uint4(upper[4], upper[5], upper[6], upper[7]);
    if (BITS == 5) ((uint2*)(unit + 1024))[lane] = make_uint2(lowest[0], lowest[1]);
  }
};

// Pass 3. `scales`: one f32 for each 256 x 256 tile of the matrix, `scale_stride` to a row of them, or null for ones;
// row0: the matrix's row of the block's first.
template <class L>
__device__ __forceinline__ void pack_integers(const uint16_t* dense, int rows, int cols, int stride,
                                              const float* scales, int scale_stride, int row0, const uint4* plan,
                                              uint8_t* weights, uint32_t* overflow, uint32_t capacity) {
  __shared__ uint32_t found[8];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shape<L> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages, units = shape.units_of(stage),
            column_unit = stage * L::UNITS + warp;
  const uint4 head = plan[blockIdx.x];
  uint8_t *out = weights + tile * shape.tile_bytes() + stage * Shape<L>::stage_bytes(),
          *trailer = out + units * L::UNIT_BYTES;
  const Dense unit(dense, rows, cols, stride, tile, column_unit, lane);
  uint32_t mine = 0;
  if (warp < units) {
    int n[4][16];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const Dense::Vector v = unit.load(j);
#pragma unroll
      for (int i = 0; i < 16; i++) {
        n[j][i] = 0;
        if (v.inside(i) && !small_integer(v.weight(i), L::LOWEST, L::HIGHEST, n[j][i])) n[j][i] = 0, mine++;
      }
    }
    L::store(out + warp * L::UNIT_BYTES, lane, n);
  }
  if (lane == 0) {
    ((float*)(trailer + 8))[warp] =
        scales && warp < units ? scales[(size_t)((row0 + tile * TILE_ROWS) / 256) * scale_stride + column_unit / 2]
                               : 1.0f;
    if (warp == 0) *(uint2*)(trailer + 40) = make_uint2(0, 0);
  }
  const RepairList list(trailer, make_uint2(head.x, head.y), overflow, capacity, L::EXTRA);
  const uint32_t at = list.place(mine, found, warp, lane);
  if (mine) put_repairs(list, at, unit, warp, lane, L::expresses);
}

}  // namespace taper

// Layouts `e4m3`, `e5m2`: 8-bit floats as they are, 8.06 bits a weight.
//
//   unit   2048 bytes: word 128 j + 4 lane + i has registers 2 i and 2 i + 1 of vector j (unit.cuh), the former's weights in
//          bytes 1 and 3, the latter's in bytes 0 and 2
//   stage  8 units, trailer of 128 bytes, of which 40 are unused: copies from multiples of 128 bytes on are up to 2% faster
//
// As bf16 a byte is its sign, and exponent and mantissa where the lowest bits of the exponent and the highest of the mantissa
// are, times a power of two: exact for numbers below 2^-6 too. Infinities and NaN are repairs.
//
// Budget of two pairs: two LOP3 each, a shift and two multiplications that shift, two HMUL2: 2.3 a weight, 1.3 of them for
// the units of integers.
#pragma once
#include "dense.cuh"

namespace taper {

template <int MANTISSA, int BIAS>
struct Float8 {
  static constexpr int UNITS = 8, UNIT_BYTES = 2048, EXTRA = 40, TRAILER = 8 + EXTRA + 4 * ENTRIES;
  static constexpr int GROUP = 0;
  static constexpr bool SCALED = false;
  static constexpr int UP = 7 - MANTISSA;  // from a byte's exponent and mantissa to those of bf16
  static constexpr uint32_t FIELDS = (0x7Fu << UP) * 0x00010001u,     // where they are then
      POWER = (uint32_t)(127 + 127 - BIAS) << 7, NONE = 0x80008000u;  // 2^(127 - BIAS) and twice -0 in bf16
  // The first byte, without its sign, that is no finite number; E4M3 has no infinities.
  static constexpr uint32_t NOT_FINITE = MANTISSA == 3 ? 0x7F : 0x7C;

  __device__ __forceinline__ static uint32_t scale(uint32_t pair) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(pair), "r"(POWER * 0x00010001u), "r"(NONE));
    return d;
  }
  // The byte of a bf16 number, if there is one.
  __device__ __forceinline__ static bool byte_of(uint32_t bf16, uint32_t& byte) {
    const uint32_t bits = __float_as_uint(__uint_as_float(bf16 << 16) * __uint_as_float((254 - POWER / 128) << 23)),
                   rest = (1u << (23 - MANTISSA)) - 1, magnitude = (bits & 0x7FFFFFFFu) >> (23 - MANTISSA);
    byte = bf16 >> 8 & 0x80 | magnitude;
    return (bits & rest) == 0 && magnitude < NOT_FINITE;
  }
  __device__ __forceinline__ static bool expresses(uint32_t bf16) {
    uint32_t byte;
    return byte_of(bf16, byte);
  }

  struct Unit {
    uint4 words[4];
    uint32_t by256, by_up;
    __device__ __forceinline__ void load(uint32_t at, uint32_t, int, int lane) {
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] = lds128(at + 512 * j + lane * 16);
      start();
    }
    __device__ __forceinline__ void fetch(const uint8_t* at, const uint8_t*, int, int lane, uint64_t policy) {
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] = ldg_stream128(at + 512 * j + lane * 16, policy);
      start();
    }
    __device__ __forceinline__ void start() {
      by256 = blockDim.y * 256, by_up = blockDim.y << UP;  // as in `fixed`: for the multiplier
    }
    __device__ __forceinline__ void vector(int j, uint32_t (&a)[8]) const {
      const uint32_t w[4] = {words[j].x, words[j].y, words[j].z, words[j].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t upper = w[i] >> (8 - UP) & FIELDS, lower = w[i] * by_up & FIELDS;
        a[2 * i] = scale(upper | (w[i] & 0x80008000u));
        a[2 * i + 1] = scale(lower | (w[i] * by256 & 0x80008000u));
      }
    }
  };
};
using E4M3 = Float8<3, 7>;
using E5M2 = Float8<2, 15>;

// Pass 3, block of 256 threads per stage; `weights` points at the first tile of these rows.
template <class L>
__device__ __forceinline__ void pack_bytes(const uint16_t* dense, int rows, int cols, int stride, const uint4* plan,
                                           uint8_t* weights, uint32_t* overflow, uint32_t capacity) {
  __shared__ uint32_t found[8];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shape<L> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages, units = shape.units_of(stage);
  const uint4 head = plan[blockIdx.x];
  uint8_t *out = weights + tile * shape.tile_bytes() + stage * Shape<L>::stage_bytes(),
          *trailer = out + units * L::UNIT_BYTES;
  const Dense unit(dense, rows, cols, stride, tile, stage * L::UNITS + warp, lane);
  uint32_t mine = 0;
  for (int j = 0; warp < units && j < 4; j++) {
    const Dense::Vector v = unit.load(j);
    uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int h = i >> 3, kk = i & 7, p = 2 * (kk / 2) + h;
      uint32_t byte = 0;
      if (v.inside(i) && !L::byte_of(v.weight(i), byte)) byte = 0, mine++;
      w[p / 2] |= byte << 8 * (2 * (kk & 1) + 1 - (p & 1));
    }
    ((uint4*)(out + warp * L::UNIT_BYTES))[32 * j + lane] = make_uint4(w[0], w[1], w[2], w[3]);
  }
  if (threadIdx.x < L::EXTRA / 4) ((uint32_t*)trailer)[2 + threadIdx.x] = 0;
  const RepairList list(trailer, make_uint2(head.x, head.y), overflow, capacity, L::EXTRA);
  const uint32_t at = list.place(mine, found, warp, lane);
  if (mine) put_repairs(list, at, unit, warp, lane, L::expresses);
}

}  // namespace taper

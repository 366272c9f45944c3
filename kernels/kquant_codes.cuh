// The codes of a unit (kquant.cuh), as tensor cores take them: in bf16, where they lie in f16, as bytes.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace taper {

constexpr uint32_t MINUS_1024 = 0xE400E400u;                    // a pair of f16
constexpr uint32_t TWO_128 = 0x43004300u, TWO_1 = 0x3F803F80u;  // pairs of bf16
// A constant in a register: a LOP3 has room for one, and the mask is that. blockDim.y is 1, which the compiler does not
// know.
__device__ __forceinline__ uint32_t unseen(uint32_t constant) { return blockDim.y * constant; }
__device__ __forceinline__ uint32_t two_128() { return unseen(TWO_128); }

__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

template <int BITS>
struct Codes {
  static_assert(BITS >= 2 && BITS <= 6, "");
  static constexpr bool NIBBLES = BITS >= 4, PAIRS = BITS != 4 && BITS != 5, ONES = BITS == 3 || BITS == 5;
  static constexpr int PAIRS_AT = NIBBLES ? 1024 : 0, ONES_AT = PAIRS_AT + (PAIRS ? 512 : 0), BYTES = 256 * BITS,
                       MAGIC = 128, SECOND = 4;  // shift of the second row's codes in in_place
  struct Raw {
    uint2 nibbles;
    uint32_t pairs, ones;
  };
  __device__ __forceinline__ static Raw load(uint32_t at, int lane, int j) {
    Raw raw;
    if (NIBBLES) raw.nibbles = lds64(at + 256 * j + 8 * lane);
    if (PAIRS) raw.pairs = lds32(at + PAIRS_AT + 128 * j + 4 * lane);
    if (ONES) raw.ones = lds32(at + ONES_AT + 128 * (j >> 1) + 4 * lane) >> 4 * (j & 1);
    return raw;
  }
  static constexpr __host__ __device__ int word_of(int p) { return 2 * (p >> 2) + (p & 1); }  // r above
  static constexpr __host__ __device__ int byte_of(int p) { return p >> 1 & 1; }
  // The bits of `mask`, moved from bit `from` to bit `to`.
  __device__ __forceinline__ static uint32_t field(uint32_t word, int from, int to, uint32_t mask) {
    return (from > to ? word >> (from - to) : word << (to - from)) & mask << to;
  }
  // a[p]: two bf16, 128 + code.
  __device__ __forceinline__ static void expand(const Raw& raw, uint32_t magic, uint32_t (&a)[8]) {
#pragma unroll
    for (int p = 0; p < 8; p++) {
      a[p] = magic;
      if (NIBBLES) a[p] |= field(p < 4 ? raw.nibbles.x : raw.nibbles.y, 4 * (p & 3), 0, 0x000F000Fu);
      if (PAIRS) a[p] |= field(raw.pairs, 2 * word_of(p) + 8 * byte_of(p), NIBBLES ? 4 : 0, 0x00030003u);
      if (ONES) a[p] |= field(raw.ones, word_of(p) + 8 * byte_of(p), BITS - 1, 0x00010001u);
    }
  }
  // a[p]: two f16, code * 2^-24 in the first row, code * 2^-20 in the second.
  __device__ __forceinline__ static void in_place(const Raw& raw, uint32_t (&a)[8]) {
#pragma unroll
    for (int p = 0; p < 8; p++) {
      const int to = SECOND * (p & 1);
      a[p] = 0;
      if (NIBBLES) a[p] |= field(p < 4 ? raw.nibbles.x : raw.nibbles.y, 4 * (p & 3), to, 0x000F000Fu);
      if (PAIRS) a[p] |= field(raw.pairs, 2 * word_of(p) + 8 * byte_of(p), to + (NIBBLES ? 4 : 0), 0x00030003u);
      if (ONES) a[p] |= field(raw.ones, word_of(p) + 8 * byte_of(p), to + BITS - 1, 0x00010001u);
    }
  }
  // a[r]: four codes as bytes, of the columns that words 2 (p/4) and 2 (p/4) + 1 hold, in the order 0, 2, 1, 3. Those
  // of the second row times SECOND_TIMES.
  static constexpr int SECOND_TIMES = BITS == 4 ? 16 : 1;
  __device__ __forceinline__ static void bytes(const Raw& raw, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const uint32_t word = r < 2 ? raw.nibbles.x : raw.nibbles.y;
      a[r] = 0;
      if (NIBBLES) a[r] = BITS == 4 && r & 1 ? word & 0xF0F0F0F0u : (r & 1 ? word >> 4 : word) & 0x0F0F0F0Fu;
      if (PAIRS) a[r] |= field(raw.pairs, 2 * r, NIBBLES ? 4 : 0, 0x03030303u);
      if (ONES) a[r] |= field(raw.ones, r, BITS - 1, 0x01010101u);
    }
  }
  // codes[2 p + half] of vector j; of vectors in their order.
  __device__ __forceinline__ static void store(uint8_t* at, int lane, int j, const uint8_t (&codes)[16]) {
    uint32_t nibbles[2] = {0, 0}, pairs = 0, ones = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const uint32_t p = i / 2, half = i % 2, code = codes[i];
      nibbles[p / 4] |= (code & 15) << (4 * (p & 3) + 16 * half);
      pairs |= (NIBBLES ? code >> 4 : code & 3) << (2 * word_of(p) + 8 * byte_of(p) + 16 * half);
      ones |= (code >> (BITS - 1) & 1) << (4 * (j & 1) + word_of(p) + 8 * byte_of(p) + 16 * half);
    }
    if (NIBBLES) ((uint2*)at)[32 * j + lane] = make_uint2(nibbles[0], nibbles[1]);
    if (PAIRS) ((uint32_t*)(at + PAIRS_AT))[32 * j + lane] = pairs;
    if (ONES) {
      uint32_t* const word = (uint32_t*)(at + ONES_AT) + 32 * (j >> 1) + lane;  // of vectors j and j ^ 1
      *word = j & 1 ? *word | ones : ones;
    }
  }
};

template <>
struct Codes<8> {
  static constexpr int BYTES = 2048, MAGIC = 0, SECOND = 0;
  using Raw = uint4;
  __device__ __forceinline__ static Raw load(uint32_t at, int lane, int j) { return lds128(at + 512 * j + 16 * lane); }
  // Bytes are kept with their highest bit flipped: n + 128. Its lower bits and 128 are one bf16, and what must be taken
  // away is 128 or 256, which one bit of the exponent tells apart.
  __device__ __forceinline__ static void expand(const Raw& raw, uint32_t magic, uint32_t (&a)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int p = 0; p < 8; p++) {
      const uint32_t two = __byte_perm(words[p / 2], 0, p & 1 ? 0x4341 : 0x4240), low = (two & 0x007F007Fu) | magic,
                     away = (two & 0x00800080u) ^ 0xC380C380u;
      a[p] = fma_bf16x2(low, TWO_1, away);
    }
  }
  // a[p]: two f16, (n + 128) * 2^-24.
  __device__ __forceinline__ static void in_place(const Raw& raw, uint32_t (&a)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int p = 0; p < 8; p += 2) {
      a[p] = words[p / 2] & 0x00FF00FFu;
      a[p + 1] = words[p / 2] >> 8 & 0x00FF00FFu;
    }
  }
  // a[r]: as above, of n + 128.
  static constexpr int SECOND_TIMES = 1;
  __device__ __forceinline__ static void bytes(const Raw& raw, uint32_t (&a)[4]) {
    a[0] = __byte_perm(raw.x, raw.y, 0x6240), a[1] = __byte_perm(raw.x, raw.y, 0x7351);
    a[2] = __byte_perm(raw.z, raw.w, 0x6240), a[3] = __byte_perm(raw.z, raw.w, 0x7351);
  }
  __device__ __forceinline__ static void store(uint8_t* at, int lane, int j, const uint8_t (&codes)[16]) {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const uint32_t p = i / 2, half = i % 2;
      words[p / 2] |= (uint32_t)codes[i] << 8 * ((p & 1) + 2 * half);
    }
    ((uint4*)at)[32 * j + lane] = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

}  // namespace taper

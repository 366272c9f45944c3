// Layouts of ggml's block formats (GGUF files) and of 4-bit integers in groups of 128 (AWQ, GPTQ): unit.cuh's units, at
// the bits that the file has (Q3_K: one eighth more).
//
//   weight  scale[group] * (code - ZERO) - minimum[group], as ggml computes it; a group is 16, 32 or 128 columns
//   unit    planes of codes, as many as the format has bits, then what the 16 rows' groups need (`Six` and the others)
//           nibbles  4 bits: word 64 j + 2 lane + p/4, bits 4 (p%4) and 16 more
//           pairs    2 bits: word 32 j + lane, bits 2 p and 16 more
//           bits     1 bit: halfword 32 j + lane, bits p and 8 more
//           bytes    8 bits, signed: word 128 j + 4 lane + p/2, bytes p%2 and 2 more
//           Register p of vector j is as in unit.cuh where groups have 32 columns or more. With groups of 16 its rows
//           are the same and its columns 32j + 16 (p/4) + 4t + 2 (p/2 % 2), +1: so one product has one group.
//   stage   8 units, then a trailer: what superblocks of 256 columns need. There are no repairs.
#pragma once
#include "activations.cuh"
#include "unit.cuh"

namespace taper {

constexpr uint32_t TWO_128 = 0x43004300u, TWO_1 = 0x3F803F80u;  // pairs of bf16
// TWO_128 in a register: a LOP3 has room for one constant, and the mask is that. blockDim.y is 1, which the compiler
// does not know.
__device__ __forceinline__ uint32_t two_128() { return blockDim.y * TWO_128; }

__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// ---- codes ----
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
    if (ONES) raw.ones = lds16(at + ONES_AT + 64 * j + 2 * lane);
    return raw;
  }
  // Calls use(at, bytes) for each range that vectors 2 part and 2 part + 1 have.
  template <class Use>
  __device__ __forceinline__ static void halves(int part, Use use) {
    if (NIBBLES) use(512 * part, 512);
    if (PAIRS) use(PAIRS_AT + 256 * part, 256);
    if (ONES) use(ONES_AT + 128 * part, 128);
  }
  // The bits of `mask`, moved from bit `from` to bit `to`.
  __device__ __forceinline__ static uint32_t field(uint32_t word, int from, int to, uint32_t mask) {
    return (from > to ? word >> (from - to) : word << (to - from)) & mask << to;
  }
  // a[p]: two bf16, 128 + code.
  __device__ __forceinline__ static void expand(const Raw& raw, uint32_t magic, uint32_t (&a)[8]) {
    const uint32_t ones = ONES ? __byte_perm(raw.ones, 0, 0x4140) : 0;
#pragma unroll
    for (int p = 0; p < 8; p++) {
      a[p] = magic;
      if (NIBBLES) a[p] |= field(p < 4 ? raw.nibbles.x : raw.nibbles.y, 4 * (p & 3), 0, 0x000F000Fu);
      if (PAIRS) a[p] |= field(raw.pairs, 2 * p, NIBBLES ? 4 : 0, 0x00030003u);
      if (ONES) a[p] |= field(ones, p, BITS - 1, 0x00010001u);
    }
  }
  // a[p]: two f16, code * 2^-24 in the first row, code * 2^-20 in the second.
  __device__ __forceinline__ static void in_place(const Raw& raw, uint32_t (&a)[8]) {
    const uint32_t ones = ONES ? __byte_perm(raw.ones, 0, 0x4140) : 0;
#pragma unroll
    for (int p = 0; p < 8; p++) {
      const int to = SECOND * (p & 1);
      a[p] = 0;
      if (NIBBLES) a[p] |= field(p < 4 ? raw.nibbles.x : raw.nibbles.y, 4 * (p & 3), to, 0x000F000Fu);
      if (PAIRS) a[p] |= field(raw.pairs, 2 * p, to + (NIBBLES ? 4 : 0), 0x00030003u);
      if (ONES) a[p] |= field(ones, p, to + BITS - 1, 0x00010001u);
    }
  }
  // codes[2 p + half] of vector j.
  __device__ __forceinline__ static void store(uint8_t* at, int lane, int j, const uint8_t (&codes)[16]) {
    uint32_t nibbles[2] = {0, 0}, pairs = 0, ones = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const uint32_t p = i / 2, half = i % 2, code = codes[i];
      nibbles[p / 4] |= (code & 15) << (4 * (p & 3) + 16 * half);
      pairs |= (NIBBLES ? code >> 4 : code & 3) << (2 * p + 16 * half);
      ones |= (code >> (BITS - 1) & 1) << (p + 8 * half);
    }
    if (NIBBLES) ((uint2*)at)[32 * j + lane] = make_uint2(nibbles[0], nibbles[1]);
    if (PAIRS) ((uint32_t*)(at + PAIRS_AT))[32 * j + lane] = pairs;
    if (ONES) ((uint16_t*)(at + ONES_AT))[32 * j + lane] = (uint16_t)ones;
  }
};

template <>
struct Codes<8> {
  static constexpr int BYTES = 2048, MAGIC = 0, SECOND = 0;
  using Raw = uint4;
  __device__ __forceinline__ static Raw load(uint32_t at, int lane, int j) { return lds128(at + 512 * j + 16 * lane); }
  template <class Use>
  __device__ __forceinline__ static void halves(int part, Use use) {
    use(1024 * part, 1024);
  }
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

// ---- scales and minima: load() for the lane's rows g and g+8, of(group) for each, and term() for all of a unit ----
// For a product, the sum over a unit's groups of (scale * codes - minimum) * activations is
//   row(h) * (sum of scale(group, h) * c + lift * X) - row_min(h) * (sum of min * X)
// where c are a group's products with its codes plus `away`, X the sum of its activations, lift = -away * scale, and
// lift and min are small numbers, as two equal bf16 for the lane's group t (set 1: t + 4).

// A finite v as the sum of three bf16, in the high halves.
__device__ __forceinline__ void cut_in_three(float v, uint32_t (&parts)[3]) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    parts[i] = __float_as_uint(v) & 0xFFFF0000u;
    v -= __uint_as_float(parts[i]);
  }
}
constexpr uint32_t OVER_2_15 = 0x47000000u, OVER_128 = 0x43434343u;
// A byte of `word` as 2^15 + byte.
__device__ __forceinline__ float byte_over_2_15(uint32_t word, int byte) {
  return __uint_as_float(__byte_perm(word, OVER_2_15, 0x7604 | byte << 4));
}
// What a product's lane keeps in registers: constants, and what chooses its group, t, and with groups of 16 t + 4.
struct Constants {
  uint32_t two_128, over_2_15;
  uint32_t twice;      // chooses byte t twice, each below 0x43
  uint32_t rows;       // byte t of two words, each twice
  uint32_t nibble;     // shift of the group's nibble in Six
  uint32_t byte;       // chooses byte t over 2^15
  uint32_t single[2];  // likewise the bytes 2t and 2t + 1 of four: a lane's groups in multiply_single
  __device__ __forceinline__ explicit Constants(int t)
      : two_128(keep(TWO_128)),
        over_2_15(keep(OVER_2_15)),
        twice(keep(0x4040 | t << 8 | t)),
        rows(keep(0x4400 | 0x1111 * t)),
        nibble(keep(8 * (t & 1) + 4 * (t >> 1))),
        byte(keep(choose(t))),
        single{keep(choose(2 * t & 3)), keep(choose(2 * t + 1 & 3))} {}
  // For byte_over_2_15.
  __device__ __forceinline__ static constexpr uint32_t choose(int byte) { return 0x7604 | byte << 4; }
};
// (byte - zero) * d in one instruction, exactly; EXACT: also if d is infinite.
template <bool EXACT>
__device__ __forceinline__ float times(uint32_t word, int byte, float d, int zero = 0) {
  const float v = byte_over_2_15(word, byte), at_zero = 32768 + zero;
  return EXACT ? __fmul_rn(v - at_zero, d) : fmaf(v, d, -at_zero * d);
}

// The byte of the word that `twice` chooses, below 128, times a power of two, as two bf16.
template <int FACTOR>
__device__ __forceinline__ uint32_t byte_twice(uint32_t word, uint32_t twice) {
  static_assert(FACTOR == 1 || FACTOR == -128 || FACTOR == -1, "");
  constexpr uint32_t times = FACTOR == -128 ? 0xC300C300u
                             : FACTOR == 1  ? TWO_1
                                            : 0xBF80BF80u,
                     plus = FACTOR == -128 ? 0x46804680u
                            : FACTOR == 1  ? 0xC300C300u
                                           : 0x43004300u;
  return fma_bf16x2(__byte_perm(word, OVER_128, twice), times, plus);
}
__device__ __forceinline__ int place_of(int row) { return 2 * (row & 7) + (row >> 3); }  // g and g+8 are neighbours

// Six bits each for four groups of 32, times a superblock's f16 `d` and `dmin`. Of each row a word whose bytes are
// scale | (minimum / 16) << 6, then a halfword of the minima's low nibbles: 0 and 2, 1 and 3. Rows g and g+8 are
// neighbours.
struct Six {
  static constexpr int GROUP = 32, BYTES = 96, TRAILER = 256;
  static constexpr bool MIN_SUMS = true, AWAY_IN_SUMS = false;
  static constexpr int MOST = 63;  // of the integers
  static constexpr bool MINS = true;
  uint32_t words[2], low;
  float d[2], dmin[2];
  __device__ __forceinline__ void load(uint32_t at, uint32_t trailer, int u, int g) {
    const uint2 both = lds64(at + 8 * g), ds = lds64(trailer + 64 * (u / 2) + 8 * g);
    words[0] = both.x, words[1] = both.y, low = lds32(at + 64 + 4 * g);
    d[0] = half_to_float(ds.x & 0xFFFF), dmin[0] = half_to_float(ds.x >> 16);
    d[1] = half_to_float(ds.y & 0xFFFF), dmin[1] = half_to_float(ds.y >> 16);
  }
  // Times factors: scales and minima of row g, of row g+8.
  __device__ __forceinline__ void multiply(float s0, float m0, float s1, float m1) {
    d[0] *= s0, d[1] *= s1, dmin[0] *= m0, dmin[1] *= m1;
  }
  __device__ __forceinline__ uint32_t mins(int h) const {
    const uint32_t nibbles = low >> 16 * h;
    return (words[h] >> 2 & 0x30303030u) | (nibbles & 0x0F0Fu) | (nibbles << 12 & 0x0F0F0000u);
  }
  template <bool EXACT>
  __device__ __forceinline__ void of(int group, int h, float& scale, float& min) const {
    scale = times<EXACT>(words[h] & 0x3F3F3F3Fu, group, d[h]), min = times<EXACT>(mins(h), group, dmin[h]);
  }
  static constexpr int LIFTS = 1;
  __device__ __forceinline__ float scale(bool, uint32_t byte, int h, const Constants& k) const {
    return __uint_as_float(__byte_perm(words[h] & 0x3F3F3F3Fu, k.over_2_15, byte)) - 32768;
  }
  template <int AWAY>
  __device__ __forceinline__ void lift(int, int, const Constants& k, uint32_t (&a)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) a[h] = byte_twice<-AWAY>(words[h] & 0x3F3F3F3Fu, k.twice);
  }
  __device__ __forceinline__ void min(int, const Constants& k, uint32_t (&a)[2]) const {
    const uint32_t nibbles = low >> k.nibble & 0x000F000Fu,
                   upper = __byte_perm(words[0], words[1], k.rows) >> 2 & 0x00300030u,
                   both = fma_bf16x2(nibbles | upper | k.two_128, TWO_1, 0xC300C300u);
    a[0] = __byte_perm(both, 0, 0x1010), a[1] = __byte_perm(both, 0, 0x3232);
  }
  __device__ __forceinline__ float row(int h) const { return d[h]; }
  __device__ __forceinline__ float row_min(int h) const { return dmin[h]; }
  template <class Block>
  __device__ static void store(uint8_t* at, uint8_t* trailer, int u, int row, Block block) {
    uint32_t word = 0, low = 0;
    for (int g = 0; g < 4; g++) {
      const auto b = block(g);
      const uint32_t min = b.min();
      word |= (b.scale() | min >> 4 << 6) << 8 * g;
      low |= (min & 15) << (8 * (g & 1) + 4 * (g >> 1));
    }
    const int place = place_of(row);
    ((uint32_t*)at)[place] = word, ((uint16_t*)(at + 64))[place] = (uint16_t)low;
    if (u % 2 == 0) ((uint32_t*)(trailer + 64 * (u / 2)))[place] = block(0).d() | block(0).dmin() << 16;
  }
};

// A signed byte for each of eight groups of 16, kept with 128 added, times a superblock's f16 `d`.
struct SignedBytes {
  static constexpr int GROUP = 16, BYTES = 128, TRAILER = 128;
  static constexpr bool MIN_SUMS = false, AWAY_IN_SUMS = true;
  static constexpr int MOST = 128;  // of the integers
  static constexpr bool MINS = false;
  uint2 scales[2];
  float d[2];
  __device__ __forceinline__ void load(uint32_t at, uint32_t trailer, int u, int g) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      scales[h] = lds64(at + 8 * (g + 8 * h));
      d[h] = half_to_float(lds16(trailer + 32 * (u / 2) + 2 * (g + 8 * h)));
    }
  }
  // Times factors: scales and minima of row g, of row g+8.
  __device__ __forceinline__ void multiply(float s0, float m0, float s1, float m1) { d[0] *= s0, d[1] *= s1; }
  template <bool EXACT>
  __device__ __forceinline__ void of(int group, int h, float& scale, float& min) const {
    scale = times<EXACT>(group < 4 ? scales[h].x : scales[h].y, group & 3, d[h], 128), min = 0;
  }
  static constexpr int LIFTS = 1;
  __device__ __forceinline__ float scale(bool high, uint32_t byte, int h, const Constants& k) const {
    return __uint_as_float(__byte_perm(high ? scales[h].y : scales[h].x, k.over_2_15, byte)) - (32768 + 128);
  }
  // -away * scale may have more bits than a bf16: the sums are multiplied by -away instead.
  template <int>
  __device__ __forceinline__ void lift(int, int set, const Constants& k, uint32_t (&a)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) a[h] = __byte_perm(__float_as_uint(scale(set, k.byte, h, k)), 0, 0x3232);
  }
  __device__ __forceinline__ float row(int h) const { return d[h]; }
  template <class Block>
  __device__ static void store(uint8_t* at, uint8_t* trailer, int u, int row, Block block) {
    for (int g = 0; g < 8; g++) at[8 * row + g] = (uint8_t)(block(g).scale() + 128);
    if (u % 2 == 0) ((uint16_t*)(trailer + 32 * (u / 2)))[row] = (uint16_t)block(0).d();
  }
};

// Four bits each for eight groups of 16, times a superblock's `d` and `dmin`.
struct Fours {
  static constexpr int GROUP = 16, BYTES = 128, TRAILER = 256;
  static constexpr bool MIN_SUMS = true, AWAY_IN_SUMS = false;
  static constexpr int MOST = 15;  // of the integers
  static constexpr bool MINS = true;
  uint2 both[2];
  float d[2], dmin[2];
  __device__ __forceinline__ void load(uint32_t at, uint32_t trailer, int u, int g) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t ds = lds32(trailer + 64 * (u / 2) + 4 * (g + 8 * h));
      both[h] = lds64(at + 8 * (g + 8 * h));
      d[h] = half_to_float(ds & 0xFFFF), dmin[h] = half_to_float(ds >> 16);
    }
  }
  // Times factors: scales and minima of row g, of row g+8.
  __device__ __forceinline__ void multiply(float s0, float m0, float s1, float m1) {
    d[0] *= s0, d[1] *= s1, dmin[0] *= m0, dmin[1] *= m1;
  }
  template <bool EXACT>
  __device__ __forceinline__ void of(int group, int h, float& scale, float& min) const {
    const uint32_t word = group < 4 ? both[h].x : both[h].y;
    scale = times<EXACT>(word & 0x0F0F0F0Fu, group & 3, d[h]);
    min = times<EXACT>(word >> 4 & 0x0F0F0F0Fu, group & 3, dmin[h]);
  }
  static constexpr int LIFTS = 1;
  __device__ __forceinline__ float scale(bool high, uint32_t byte, int h, const Constants& k) const {
    return __uint_as_float(__byte_perm((high ? both[h].y : both[h].x) & 0x0F0F0F0Fu, k.over_2_15, byte)) - 32768;
  }
  template <int AWAY>
  __device__ __forceinline__ void lift(int, int set, const Constants& k, uint32_t (&a)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) a[h] = byte_twice<-AWAY>((set ? both[h].y : both[h].x) & 0x0F0F0F0Fu, k.twice);
  }
  __device__ __forceinline__ void min(int set, const Constants& k, uint32_t (&a)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) a[h] = byte_twice<1>((set ? both[h].y : both[h].x) >> 4 & 0x0F0F0F0Fu, k.twice);
  }
  __device__ __forceinline__ float row(int h) const { return d[h]; }
  __device__ __forceinline__ float row_min(int h) const { return dmin[h]; }
  template <class Block>
  __device__ static void store(uint8_t* at, uint8_t* trailer, int u, int row, Block block) {
    for (int g = 0; g < 8; g++) at[8 * row + g] = (uint8_t)(block(g).scale() | block(g).min() << 4);
    if (u % 2 == 0) ((uint32_t*)(trailer + 64 * (u / 2)))[row] = block(0).d() | block(0).dmin() << 16;
  }
};

// An f16 scale, and perhaps an f16 minimum (negated), for each of four groups of 32.
template <bool HAS_MINS>
struct Halves {
  static constexpr int GROUP = 32, BYTES = HAS_MINS ? 256 : 128, TRAILER = 0;
  static constexpr bool MIN_SUMS = false, AWAY_IN_SUMS = false;  // `lift` has both
  static constexpr int MOST = 1;
  static constexpr bool MINS = HAS_MINS;
  uint2 scales[2], mins[2];
  __device__ __forceinline__ void load(uint32_t at, uint32_t, int, int g) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      scales[h] = lds64(at + 8 * (g + 8 * h));
      if (MINS) mins[h] = lds64(at + 128 + 8 * (g + 8 * h));
    }
  }
  float times_scale[2] = {1, 1}, times_min[2] = {1, 1};
  __device__ __forceinline__ void multiply(float s0, float m0, float s1, float m1) {
    times_scale[0] = s0, times_scale[1] = s1, times_min[0] = m0, times_min[1] = m1;
  }
  template <bool EXACT>
  __device__ __forceinline__ void of(int group, int h, float& scale, float& min) const {
    const auto value = [&](const uint2& halves) {
      return half_to_float((group < 2 ? halves.x : halves.y) >> 16 * (group & 1) & 0xFFFF);
    };
    scale = value(scales[h]) * times_scale[h], min = MINS ? -value(mins[h]) * times_min[h] : 0;
  }
  static constexpr int LIFTS = HAS_MINS ? 3 : 2;  // parts of -away * scale - minimum
  __device__ __forceinline__ float scale(bool, uint32_t byte, int h, const Constants&) const {
    float scale, min;
    of<false>(byte >> 4 & 3, h, scale, min);
    return scale;
  }
  template <int AWAY>
  __device__ __forceinline__ void lift(int n, int, const Constants& k, uint32_t (&a)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float scale, min;
      uint32_t parts[3];
      of<false>(k.twice & 3, h, scale, min);
      cut_in_three(-AWAY * scale - min, parts);
      a[h] = __byte_perm(parts[n], 0, 0x3232);
    }
  }
  __device__ __forceinline__ float row(int) const { return 1; }
  template <class Block>
  __device__ static void store(uint8_t* at, uint8_t*, int, int row, Block block) {
    for (int g = 0; g < 4; g++) {
      ((uint16_t*)at)[4 * row + g] = (uint16_t)block(g).d();
      if (MINS) ((uint16_t*)(at + 128))[4 * row + g] = (uint16_t)block(g).dmin();
    }
  }
};

// One group a unit: an f16 scale and a byte, the code that means zero (0 to 31), for each row. Words of the scales of
// rows g and g+8, then halfwords of their zeros.
struct Zeros {
  static constexpr int GROUP = 128, BYTES = 48, TRAILER = 0;
  static constexpr bool AWAY_IN_SUMS = false;
  static constexpr int MOST = 16;  // of code - zero
  static constexpr bool MINS = true;
  float scale[2];
  uint32_t both, zeros;
  __device__ __forceinline__ void load(uint32_t at, uint32_t, int, int g) {
    both = lds32(at + 4 * g);
    scale[0] = half_to_float(both & 0xFFFF), scale[1] = half_to_float(both >> 16), zeros = lds16(at + 32 + 2 * g);
  }
  // Two bf16 -(128 + zero) for row g (h = 0) or g+8.
  __device__ __forceinline__ uint32_t away(int h) const {
    return 0xC300C300u + __byte_perm(zeros, 0, h ? 0x4141 : 0x4040);
  }
  template <bool EXACT>
  __device__ __forceinline__ void of(int, int h, float& s, float& min) const {
    s = scale[h], min = scale[h] * (float)(zeros >> 8 * h & 0xFF);
  }
  template <class Block>
  __device__ static void store(uint8_t* at, uint8_t*, int, int row, Block block) {
    const auto b = block(0);
    const int place = 2 * (row & 7) + (row >> 3);
    ((uint16_t*)at)[place] = (uint16_t)b.d(), at[32 + place] = (uint8_t)b.zero();
  }
};

// ---- layouts ----
template <class Format, int BITS, class Scales, int ZERO_ = 0>
struct KQuant {
  using Source = Format;
  using C = Codes<BITS>;
  using S = Scales;
  static constexpr int UNITS = 8, UNIT_BYTES = C::BYTES + S::BYTES, TRAILER = S::TRAILER, EXTRA = 0, GROUP = S::GROUP,
                       ZERO = ZERO_, MAGIC = C::MAGIC;
  static constexpr bool SCALED = false, MINS = S::MINS, AWAY = MINS || MAGIC + ZERO != 0;
  // The value of a code as `expand` gives it, 128 + code or the signed byte.
  __device__ __forceinline__ static float value(float expanded, float scale, float min) {
    const float product = __fmul_rn(scale, expanded - (float)(MAGIC + ZERO));
    return MINS ? __fsub_rn(product, min) : product;
  }
};
// Column of the first of register p's two weights, in vector 0.
template <int GROUP>
__device__ __forceinline__ constexpr int column_of(int p, int t) {
  return GROUP == 16 ? 16 * (p >> 2) + 4 * t + 2 * (p >> 1 & 1) : 8 * t + 2 * (p >> 1);
}

}  // namespace taper

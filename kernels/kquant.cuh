// Layouts of ggml's block formats (GGUF files) and of 4-bit integers with a scale for 128 columns: unit.cuh's units,
// at the bits that the file has (Q3_K: one eighth more).
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
//
// Codes stay integers: put into the mantissa of a bf16 128 they are 128 + code, exactly. A group's products are summed
// by themselves and scaled as f32: total += scale * c - (128 scale + zero + minimum) * X, where X, the sum of the
// group's activations, is one more product, with ones. So nothing is rounded before the f32 sums, whatever the scales.
// Where a sum is not finite (activations or scales that are none, overflow) the unit is multiplied again with each
// weight as three bf16 parts, as activations.cuh has them: infinities and NaN are then those of the exact product.
//
// Budget   thread-instructions a weight, Q4_K and one column of activations: codes 0.9, scales 0.8, products 0.25,
//          scaling 0.5, loads 0.1: 2.6. At 4.5 bits and 4.5 TB/s there are 3.7, at 3 TB/s 5.5.
#pragma once
#include "activations.cuh"
#include "unit.cuh"

namespace taper {

constexpr uint32_t TWO_128 = 0x43004300u, TWO_1 = 0x3F803F80u;  // pairs of bf16
// TWO_128 in a register: a LOP3 has room for one constant, and the mask is that. blockDim.y is 1, which the compiler
// does not know.
__device__ __forceinline__ uint32_t two_128() { return blockDim.y * TWO_128; }

// ---- codes ----
template <int BITS>
struct Codes {
  static_assert(BITS >= 2 && BITS <= 6, "");
  static constexpr bool NIBBLES = BITS >= 4, PAIRS = BITS != 4 && BITS != 5, ONES = BITS == 3 || BITS == 5;
  static constexpr int PAIRS_AT = NIBBLES ? 1024 : 0, ONES_AT = PAIRS_AT + (PAIRS ? 512 : 0),
                       BYTES = 256 * BITS, MAGIC = 128, SECOND = 4;  // shift of the second row's codes in in_place
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
  // Bytes are kept with their highest bit flipped: n + 128. Its lower bits and 128 are one bf16, and what must be taken
  // away is 128 or 256, which one bit of the exponent tells apart.
  __device__ __forceinline__ static void expand(const Raw& raw, uint32_t magic, uint32_t (&a)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int p = 0; p < 8; p++) {
      const uint32_t two = __byte_perm(words[p / 2], 0, p & 1 ? 0x4341 : 0x4240), low = (two & 0x007F007Fu) | magic,
                     away = (two & 0x00800080u) ^ 0xC380C380u;
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[p]) : "r"(low), "r"(TWO_1), "r"(away));
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

// ---- scales and minima: load() for the lane's rows g and g+8, of(group) for each ----
// A byte of `word` as 2^15 + byte.
__device__ __forceinline__ float byte_over_2_15(uint32_t word, int byte) {
  return __uint_as_float(__byte_perm(word, 0x47000000u, 0x7604 | byte << 4));
}
// (byte - zero) * d in one instruction, exactly; EXACT: also if d is infinite.
template <bool EXACT>
__device__ __forceinline__ float times(uint32_t word, int byte, float d, int zero = 0) {
  const float v = byte_over_2_15(word, byte), at_zero = 32768 + zero;
  return EXACT ? __fmul_rn(v - at_zero, d) : fmaf(v, d, -at_zero * d);
}

// Six bits each for four groups of 32, times a superblock's f16 `d` and `dmin`. Of each row a word whose bytes are
// scale | (minimum / 16) << 6, then a halfword of the minima's low nibbles: 0 and 2, 1 and 3.
struct Six {
  static constexpr int GROUP = 32, BYTES = 96, TRAILER = 256;
  static constexpr int MOST = 63;  // of the integers
  static constexpr bool MINS = true;
  uint32_t scales[2], mins[2];
  float d[2], dmin[2];
  __device__ __forceinline__ void load(uint32_t at, uint32_t trailer, int u, int g) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t word = lds32(at + 4 * (g + 8 * h)), low = lds16(at + 64 + 2 * (g + 8 * h)),
                     ds = lds32(trailer + 64 * (u / 2) + 4 * (g + 8 * h));
      scales[h] = word & 0x3F3F3F3Fu;
      mins[h] = (word >> 2 & 0x30303030u) | (low & 0x0F0Fu) | (low << 12 & 0x0F0F0000u);
      d[h] = half_to_float(ds & 0xFFFF), dmin[h] = half_to_float(ds >> 16);
    }
  }
  // Times factors: scales and minima of row g, of row g+8.
  __device__ __forceinline__ void multiply(float s0, float m0, float s1, float m1) {
    d[0] *= s0, d[1] *= s1, dmin[0] *= m0, dmin[1] *= m1;
  }
  template <bool EXACT>
  __device__ __forceinline__ void of(int group, int h, float& scale, float& min) const {
    scale = times<EXACT>(scales[h], group, d[h]), min = times<EXACT>(mins[h], group, dmin[h]);
  }
  template <class Block>
  __device__ static void store(uint8_t* at, uint8_t* trailer, int u, int row, Block block) {
    uint32_t word = 0, low = 0;
    for (int g = 0; g < 4; g++) {
      const auto b = block(g);
      const uint32_t min = b.min();
      word |= (b.scale() | min >> 4 << 6) << 8 * g;
      low |= (min & 15) << (8 * (g & 1) + 4 * (g >> 1));
    }
    ((uint32_t*)at)[row] = word, ((uint16_t*)(at + 64))[row] = (uint16_t)low;
    if (u % 2 == 0) ((uint32_t*)(trailer + 64 * (u / 2)))[row] = block(0).d() | block(0).dmin() << 16;
  }
};

// A signed byte for each of eight groups of 16, kept with 128 added, times a superblock's f16 `d`.
struct SignedBytes {
  static constexpr int GROUP = 16, BYTES = 128, TRAILER = 128;
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
  __device__ __forceinline__ void multiply(float s0, float m0, float s1, float m1) {
    d[0] *= s0, d[1] *= s1;
  }
  template <bool EXACT>
  __device__ __forceinline__ void of(int group, int h, float& scale, float& min) const {
    scale = times<EXACT>(group < 4 ? scales[h].x : scales[h].y, group & 3, d[h], 128), min = 0;
  }
  template <class Block>
  __device__ static void store(uint8_t* at, uint8_t* trailer, int u, int row, Block block) {
    for (int g = 0; g < 8; g++) at[8 * row + g] = (uint8_t)(block(g).scale() + 128);
    if (u % 2 == 0) ((uint16_t*)(trailer + 32 * (u / 2)))[row] = (uint16_t)block(0).d();
  }
};

// Four bits each for eight groups of 16, times a superblock's `d` and `dmin`.
struct Fours {
  static constexpr int GROUP = 16, BYTES = 128, TRAILER = 256;
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
  template <class Block>
  __device__ static void store(uint8_t* at, uint8_t*, int, int row, Block block) {
    for (int g = 0; g < 4; g++) {
      ((uint16_t*)at)[4 * row + g] = (uint16_t)block(g).d();
      if (MINS) ((uint16_t*)(at + 128))[4 * row + g] = (uint16_t)block(g).dmin();
    }
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
  // What a group's products are multiplied by, and the sum of its activations.
  __device__ __forceinline__ static void scale_and_away(const S& scales, int group, int h, float& scale, float& away) {
    scales.template of<false>(group, h, scale, away);
    if (MAGIC + ZERO) away = fmaf(scale, (float)(MAGIC + ZERO), away);
  }
};
// Column of the first of register p's two weights, in vector 0.
template <int GROUP>
__device__ __forceinline__ constexpr int column_of(int p, int t) {
  return GROUP == 16 ? 16 * (p >> 2) + 4 * t + 2 * (p >> 1 & 1) : 8 * t + 2 * (p >> 1);
}

// ---- products ----
// Vector j's weights, over the rows' scales, each in three bf16 parts as activations.cuh has them.
template <class L>
__device__ __forceinline__ void exact_parts(const typename L::S& scales, uint32_t at, int lane, int j,
                                            const float (&inverse)[2], uint32_t (&exact)[3][8]) {
  uint32_t a[8];
  L::C::expand(L::C::load(at, lane, j), TWO_128, a);
#pragma unroll
  for (int p = 0; p < 8; p++) {
    float scale, min;
    scales.template of<true>(L::GROUP == 16 ? 2 * j + (p >> 2) : j, p & 1, scale, min);
    uint32_t lo[3], hi[3];
    split(L::value(__uint_as_float(a[p] << 16), scale, min) * inverse[p & 1], 3, lo);
    split(L::value(__uint_as_float(a[p] & 0xFFFF0000u), scale, min) * inverse[p & 1], 3, hi);
#pragma unroll
    for (int s = 0; s < 3; s++) exact[s][p] = __byte_perm(lo[s], hi[s], 0x7632);
  }
}

// total = unit * activations with such weights: for sums that are not finite.
template <class L, int NB, class X>
__device__ __forceinline__ void multiply_exactly(uint32_t at, uint32_t trailer, int u, int lane,
                                                 float (&total)[NB][4], X x) {
  typename L::S scales;
  scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
#pragma unroll
  for (int i = 0; i < NB * 4; i++) total[i / 4][i % 4] = 0;
#pragma unroll 1
  for (int j = 0; j < 4; j++) {
    uint32_t exact[3][8];
    exact_parts<L>(scales, at, lane, j, {1, 1}, exact);
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint4 b = x(j, nb);
#pragma unroll
      for (int s = 0; s < 3; s++) {
        mma(total[nb], exact[s][0], exact[s][1], exact[s][2], exact[s][3], b.x, b.y);
        mma(total[nb], exact[s][4], exact[s][5], exact[s][6], exact[s][7], b.z, b.w);
      }
    }
  }
}

template <int N>
__device__ __forceinline__ bool all_finite(const float (&total)[N][4]) {
  float odd = 0;  // NaN if any is not
#pragma unroll
  for (int i = 0; i < N * 4; i++) odd = fmaf(total[i / 4][i % 4], 0.0f, odd);
  return !__any_sync(~0u, odd != odd);
}

// c += unit * activations, as in multiply.cuh. `again` is x for multiply_exactly, where j is not known at compile time.
template <class L, int NB, class X, class Again>
__device__ __forceinline__ void multiply_groups(uint32_t at, uint32_t trailer, int u, int lane, float (&c)[NB][4],
                                                X x, Again again) {
  constexpr int PARTS = L::GROUP == 16 ? 2 : 1;  // groups in a vector
  typename L::C::Raw raw[4];
#pragma unroll
  for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j);
  typename L::S scales;
  scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
  const uint32_t magic = two_128();
  float total[NB][4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    L::C::expand(raw[j], magic, a);
    float scale[PARTS][2], away[PARTS][2];
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int h = 0; h < 2; h++) L::scale_and_away(scales, PARTS * j + part, h, scale[part][h], away[part][h]);
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint4 b = x(j, nb);
      float d[PARTS][4] = {}, sum[PARTS][4] = {};
      mma(d[0], a[0], a[1], a[2], a[3], b.x, b.y);
      mma(d[PARTS - 1], a[4], a[5], a[6], a[7], b.z, b.w);
      if (L::AWAY) {
        mma(sum[0], TWO_1, TWO_1, TWO_1, TWO_1, b.x, b.y);
        mma(sum[PARTS - 1], TWO_1, TWO_1, TWO_1, TWO_1, b.z, b.w);
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float scaled = scale[part][i >> 1] * d[part][i];
          total[nb][i] = j + part ? total[nb][i] + scaled : scaled;
          if (L::AWAY) total[nb][i] = fmaf(-away[part][i >> 1], sum[part][i & 1], total[nb][i]);
        }
    }
  }
  if (!all_finite(total)) multiply_exactly<L, NB>(at, trailer, u, lane, total, again);
#pragma unroll
  for (int i = 0; i < NB * 4; i++) c[i / 4][i % 4] += total[i / 4][i % 4];
}

// The same for one column of activations, whose groups become columns of B: x(j) is zero but in the lanes of column j,
// or with groups of 16 of columns 2j (x, y) and 2j + 1 (z, w). So all groups of the unit share their products' sums, and
// each lane scales two of them only. What the columns of c hold is to be added.
template <class L, class X, class Again>
__device__ __forceinline__ void multiply_single(uint32_t at, uint32_t trailer, int u, int lane, float (&c)[1][4], X x,
                                                Again again) {
  typename L::C::Raw raw[4];
#pragma unroll
  for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j);
  typename L::S scales;
  scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
  const uint32_t magic = two_128();
  float d[2][4] = {}, sum[2][4] = {}, total[1][4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    L::C::expand(raw[j], magic, a);
    const uint4 b = x(j);
    mma(d[0], a[0], a[1], a[2], a[3], b.x, b.y);
    mma(d[1], a[4], a[5], a[6], a[7], b.z, b.w);
    if (L::AWAY) {
      mma(sum[0], TWO_1, TWO_1, TWO_1, TWO_1, b.x, b.y);
      mma(sum[1], TWO_1, TWO_1, TWO_1, TWO_1, b.z, b.w);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float scale, away;
    L::scale_and_away(scales, (2 * (lane & 3) + (i & 1)) & (UNIT_COLS / L::GROUP - 1), i >> 1, scale, away);
    total[0][i] = scale * (d[0][i] + d[1][i]);
    if (L::AWAY) total[0][i] = fmaf(-away, sum[0][i & 1] + sum[1][i & 1], total[0][i]);
  }
  if (!all_finite(total)) {
    multiply_exactly<L, 1>(at, trailer, u, lane, total, again);
    total[0][1] = total[0][3] = 0;
    if (lane & 3) total[0][0] = total[0][2] = 0;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) c[0][i] += total[0][i];
}

}  // namespace taper

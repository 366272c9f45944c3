// The scales and minima of a unit's groups (kquant.cuh).
#pragma once
#include "activations.cuh"
#include "kquant_codes.cuh"
#include "unit.cuh"

namespace taper {

// load() reads those of the lane's rows g and g+8: load_groups() and load_rows(), what all groups of a row are multiplied
// with. of(group) is a group's scale and minimum, complete; scale(group) and the others lack the factors of rows.
//   lane     scales and minima of the lane's own group t (set 1: t + 4), for which load_lane() reads enough
//   halves   of that group as two equal f16, for each row: its minimum, or its scale where there are no minima
//
// For a product in bf16, the sum over a unit's groups of (scale * codes - minimum) * activations is
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
  uint32_t twice;   // chooses byte t twice, each below 0x43
  uint32_t rows;    // byte t of two words, each twice
  uint32_t nibble;  // shift of the group's nibble in Six
  uint32_t byte;    // chooses byte t over 2^15
  __device__ __forceinline__ explicit Constants(int t)
      : two_128(keep(unseen(TWO_128))),
        over_2_15(keep(unseen(OVER_2_15))),
        twice(keep(0x4040 | t << 8 | t)),
        rows(keep(0x4400 | 0x1111 * t)),
        nibble(keep(8 * (t & 1) + 4 * (t >> 1))),
        byte(keep(choose(t))) {}
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
    load_lane(at, g, 0);
    load_rows(trailer, u, g);
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
  __device__ __forceinline__ void load_lane(uint32_t at, int g, int) {
    const uint2 both = lds64(at + 8 * g);
    words[0] = both.x, words[1] = both.y, low = lds32(at + 64 + 4 * g);
  }
  __device__ __forceinline__ void load_groups(uint32_t at, int g) { load_lane(at, g, 0); }
  __device__ __forceinline__ void load_rows(uint32_t trailer, int u, int g) {
    const uint2 ds = lds64(trailer + 64 * (u / 2) + 8 * g);
    d[0] = half_to_float(ds.x & 0xFFFF), dmin[0] = half_to_float(ds.x >> 16);
    d[1] = half_to_float(ds.y & 0xFFFF), dmin[1] = half_to_float(ds.y >> 16);
  }
  __device__ __forceinline__ void lane(int, const Constants& k, float (&scale)[2], float (&min)[2]) const {
    const uint32_t both = __byte_perm(words[0], words[1], k.rows), scales = both & 0x003F003Fu,
                   mins = (low >> k.nibble & 0x000F000Fu) | (both >> 2 & 0x00300030u);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      scale[h] = byte_over_2_15(scales, 2 * h) - 32768;
      min[h] = byte_over_2_15(mins, 2 * h) - 32768;
    }
  }
  __device__ __forceinline__ void halves(int, const Constants& k, uint32_t (&a)[2]) const {
    const uint32_t upper = __byte_perm(words[0], words[1], k.rows) >> 2 & 0x00300030u,
                   both = add_f16x2((low >> k.nibble & 0x000F000Fu) | upper | 0x64006400u, MINUS_1024);
    a[0] = __byte_perm(both, 0, 0x1010), a[1] = __byte_perm(both, 0, 0x3232);
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
    load_lane(at, g, 0);
    load_rows(trailer, u, g);
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
  __device__ __forceinline__ void load_lane(uint32_t at, int g, int) {
    scales[0] = lds64(at + 8 * g), scales[1] = lds64(at + 8 * (g + 8));
  }
  __device__ __forceinline__ void load_groups(uint32_t at, int g) { load_lane(at, g, 0); }
  __device__ __forceinline__ void load_rows(uint32_t trailer, int u, int g) {
#pragma unroll
    for (int h = 0; h < 2; h++) d[h] = half_to_float(lds16(trailer + 32 * (u / 2) + 2 * (g + 8 * h)));
  }
  __device__ __forceinline__ void lane(int set, const Constants& k, float (&s)[2], float (&)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) s[h] = scale(set, k.byte, h, k);
  }
  __device__ __forceinline__ void halves(int set, const Constants& k, uint32_t (&a)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
      a[h] = add_f16x2(__byte_perm(set ? scales[h].y : scales[h].x, 0x64646464u, k.twice), 0xE480E480u);  // -1152
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
  static constexpr bool MIN_SUMS = true, AWAY_IN_SUMS = false;
  static constexpr int MOST = 15;  // of the integers
  static constexpr bool MINS = true;
  uint2 both[2];
  float d[2], dmin[2];
  __device__ __forceinline__ void load(uint32_t at, uint32_t trailer, int u, int g) {
    load_lane(at, g, 0);
    load_rows(trailer, u, g);
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
  __device__ __forceinline__ void load_lane(uint32_t at, int g, int) {
    both[0] = lds64(at + 8 * g), both[1] = lds64(at + 8 * (g + 8));
  }
  __device__ __forceinline__ void load_groups(uint32_t at, int g) { load_lane(at, g, 0); }
  __device__ __forceinline__ void load_rows(uint32_t trailer, int u, int g) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t ds = lds32(trailer + 64 * (u / 2) + 4 * (g + 8 * h));
      d[h] = half_to_float(ds & 0xFFFF), dmin[h] = half_to_float(ds >> 16);
    }
  }
  __device__ __forceinline__ void lane(int set, const Constants& k, float (&s)[2], float (&m)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t mins = (set ? both[h].y : both[h].x) >> 4 & 0x0F0F0F0Fu;
      s[h] = scale(set, k.byte, h, k);
      m[h] = __uint_as_float(__byte_perm(mins, k.over_2_15, k.byte)) - 32768;
    }
  }
  __device__ __forceinline__ void halves(int set, const Constants& k, uint32_t (&a)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t mins = (set ? both[h].y : both[h].x) >> 4 & 0x0F0F0F0Fu;
      a[h] = add_f16x2(__byte_perm(mins, 0x64646464u, k.twice), MINUS_1024);
    }
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
  static constexpr bool MIN_SUMS = false, AWAY_IN_SUMS = false;  // `lift` has both
  static constexpr int MOST = 1;
  static constexpr bool MINS = HAS_MINS;
  uint2 scales[2], mins[2];
  __device__ __forceinline__ void load(uint32_t at, uint32_t, int, int g) { load_groups(at, g); }
  __device__ __forceinline__ void load_groups(uint32_t at, int g) {
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
  __device__ __forceinline__ float row_min(int) const { return 1; }
  __device__ __forceinline__ void load_rows(uint32_t, int, int) {}
  __device__ __forceinline__ void load_lane(uint32_t at, int g, int t) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      scales[h].x = lds16(at + 8 * (g + 8 * h) + 2 * t);
      if (MINS) mins[h].x = lds16(at + 128 + 8 * (g + 8 * h) + 2 * t);
    }
  }
  __device__ __forceinline__ void lane(int, const Constants&, float (&scale)[2], float (&min)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) scale[h] = half_to_float(scales[h].x), min[h] = MINS ? -half_to_float(mins[h].x) : 0;
  }
  __device__ __forceinline__ void halves(int, const Constants& k, uint32_t (&a)[2]) const {
    const uint32_t choose = (k.twice & 3) * 0x2222 + 0x1010;
#pragma unroll
    for (int h = 0; h < 2; h++)  // minima are kept negated
      a[h] = MINS ? __byte_perm(mins[h].x, mins[h].y, choose) ^ 0x80008000u
                  : __byte_perm(scales[h].x, scales[h].y, choose);
  }
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
  __device__ __forceinline__ void load_rows(uint32_t, int, int) {}
  __device__ __forceinline__ void load_lane(uint32_t at, int g, int) { load(at, 0, 0, g); }
  __device__ __forceinline__ void load_groups(uint32_t at, int g) { load(at, 0, 0, g); }
  __device__ __forceinline__ float row(int) const { return 1; }
  __device__ __forceinline__ void lane(int, const Constants&, float (&s)[2], float (&)[2]) const {
    s[0] = scale[0], s[1] = scale[1];
  }
  __device__ __forceinline__ int zero(int h) const { return h ? zeros >> 8 : zeros & 0xFF; }
  template <class Block>
  __device__ static void store(uint8_t* at, uint8_t*, int, int row, Block block) {
    const auto b = block(0);
    const int place = 2 * (row & 7) + (row >> 3);
    ((uint16_t*)at)[place] = (uint16_t)b.d(), at[32 + place] = (uint8_t)b.zero();
  }
};

}  // namespace taper

// What a lane of a unit has to code in layout `pair`, and where its bits start.
#pragma once
#include "dense.cuh"
#include "pair.cuh"

namespace taper {

// The size of a stage whose tail is too long.
constexpr uint32_t IMPOSSIBLE = 65535;

// What one lane has to code: its 32 pairs of one unit, in the order of decoding.
struct LaneCodes {
  uint32_t bits[PAIR_BITS / 32];
  int length, repairs;
};

// Calls see(j, p, weight word, code): the pairs of a lane. Padding takes the exponents of its partner, or the filler's
// code.
template <class See>
__device__ __forceinline__ void each_pair(const Dense& unit, const uint16_t* codes, int filler, See see) {
  for (int j = 0; j < 4; j++) {
    const Dense::Vector v = unit.load(j);
#pragma unroll
    for (int p = 0; p < 8; p++) {
      const int first = 8 * (p & 1) + (p & ~1);  // i = 8 h + kk of the pair's first weight
      const bool in0 = v.inside(first), in1 = v.inside(first + 1);
      const uint32_t w0 = v.weight(first), w1 = v.weight(first + 1);
      const int e0 = w0 >> 7 & 255, e1 = in1 ? w1 >> 7 & 255 : e0;
      const uint32_t code = codes[in0 ? 256 * e0 + e1 : filler];
      // An exponent that decodes to zero is right if it is zero.
      const bool repair0 = in0 && (code >> 12 & 1) && e0, repair1 = in1 && (code >> 13 & 1) && e1;
      see(j, p, in0 ? w0 : 0, in1 ? w1 : 0, code, repair0, repair1);
    }
  }
}

__device__ __forceinline__ LaneCodes lane_codes(const Dense& unit, const uint16_t* codes, int filler) {
  LaneCodes out = {};
  uint64_t window = 0;
  int held = 0, word = 0;
  each_pair(unit, codes, filler, [&](int, int, uint32_t, uint32_t, uint32_t code, bool repair0, bool repair1) {
    window |= (uint64_t)(code & 255) << held;
    held += code >> 8 & 15;
    out.length += code >> 8 & 15;
    out.repairs += repair0 + repair1;
    if (held >= 32) {
#pragma unroll
      for (int i = 0; i < PAIR_BITS / 32; i++)
        if (i == word) out.bits[i] = (uint32_t)window;
      word++, window >>= 32, held -= 32;
    }
  });
#pragma unroll
  for (int i = 0; i < PAIR_BITS / 32; i++)
    if (i == word) out.bits[i] = (uint32_t)window;
  return out;
}

// Starts of the lanes' codes: start = i A + 2 d, d a signed byte, in order, with the A that ends first. Every lane
// tries one A.
struct LaneStarts {
  int spacing, bits;                                  // A, end of the last lane
  __device__ static int delta(int end, int linear) {  // the least d whose start is not before `end`
    const int gap = end - linear, d = gap >= 0 ? (gap + 1) / 2 : -(-gap / 2);
    return d < -128 ? -128 : d;
  }
  __device__ LaneStarts(const int* lengths, int lane) {
    int total = 0;
    for (int i = 0; i < 32; i++) total += lengths[i];
    uint32_t best = 0xFFFFFFFF;
    for (int round = 0; round < 2; round++) {
      // Near the mean; if no lane's spacing works there, all over the range: 256 always does.
      const int a = round == 0 ? max(0, total / 32 - 12) + lane : 8 * lane + 8;
      int end = 0;
      bool possible = a <= PAIR_BITS;
      for (int i = 0; i < 32; i++) {
        const int d = delta(end, i * a);
        possible &= d <= 127;
        end = i * a + 2 * d + lengths[i];
      }
      best = __reduce_min_sync(~0u, possible ? (uint32_t)end << 9 | a : 0xFFFFFFFF);
      if (best != 0xFFFFFFFF) break;
    }
    spacing = best & 511, bits = best >> 9;
  }
};

}  // namespace taper

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
  int length, repairs[2];  // repairs of rows g and g + 8
};

// Row shifts are counted from the mean level of a matrix's first rows, less this: hardly a row is lower. Levels, the
// means of the rows' exponents, are in sixteenths.
constexpr int LEVEL_MARGIN = 4 * 16;
__device__ __forceinline__ int shift_of(uint32_t level, const unsigned long long* mean) {
  const int base = mean[1] ? (int)(mean[0] / mean[1]) - LEVEL_MARGIN : 0;
  return max(0, min((int)(level & 255), ((int)(level >> 8) - base + 8) >> 4));
}

// What a lane codes: weights of rows g and g + 8, and those rows' shifts.
struct LaneWeights {
  Dense unit;
  int shifts[2];
  __device__ LaneWeights(const uint16_t* dense, const uint8_t* row_shifts, int rows, int cols, int stride, int tile,
                         int unit_, int lane)
      : unit(dense, rows, cols, stride, tile, unit_, lane) {
    const int row = tile * TILE_ROWS + (lane >> 2);
    shifts[0] = row < rows ? row_shifts[row] : 0, shifts[1] = row + 8 < rows ? row_shifts[row + 8] : 0;
  }
};
__device__ __forceinline__ uint32_t shifted(uint32_t weight, int shift) {
  return (weight & 0x7F80) == 0x7F80 || (weight & 0x7F80) == 0 ? weight : weight - (shift << 7);
}

// Calls see(j, p, first weight, second weight, code, repair first, repair second): the pairs of a lane, shifted.
// Padding takes the exponents of its partner, or the filler's code.
template <class See>
__device__ __forceinline__ void each_pair(const LaneWeights& lane, const uint16_t* codes, int filler, See see) {
  for (int j = 0; j < 4; j++) {
    const Dense::Vector v = lane.unit.load(j);
#pragma unroll
    for (int p = 0; p < 8; p++) {
      const int first = 8 * (p & 1) + (p & ~1);  // i = 8 h + kk of the pair's first weight
      const bool in0 = v.inside(first), in1 = v.inside(first + 1);
      const int shift = lane.shifts[p & 1];
      const uint32_t w0 = shifted(v.weight(first), shift), w1 = shifted(v.weight(first + 1), shift);
      const int e0 = w0 >> 7 & 255, e1 = in1 ? w1 >> 7 & 255 : e0;
      const uint32_t code = codes[in0 ? 256 * e0 + e1 : filler];
      // An exponent that decodes to zero is right if it is zero.
      const bool repair0 = in0 && (code >> 12 & 1) && e0, repair1 = in1 && (code >> 13 & 1) && e1;
      see(j, p, in0 ? w0 : 0, in1 ? w1 : 0, code, repair0, repair1);
    }
  }
}

__device__ __forceinline__ LaneCodes lane_codes(const LaneWeights& lane, const uint16_t* codes, int filler) {
  LaneCodes out = {};
  uint64_t window = 0;
  int held = 0, word = 0;
  each_pair(lane, codes, filler, [&](int, int p, uint32_t, uint32_t, uint32_t code, bool repair0, bool repair1) {
    window |= (uint64_t)(code & 255) << held;
    held += code >> 8 & 15;
    out.length += code >> 8 & 15;
    out.repairs[p & 1] += repair0 + repair1;
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

// Starts of the lanes' codes: start = i A + 2 d, d of 6 bits, signed, in order, with the A that ends first. Every lane
// tries one A.
struct LaneStarts {
  static constexpr int LIMIT = 1 << (START_BITS - 1);
  int spacing, bits;                                  // A, end of the last lane
  __device__ static int delta(int end, int linear) {  // the least d whose start is not before `end`
    const int gap = end - linear, d = gap >= 0 ? (gap + 1) / 2 : -(-gap / 2);
    return d < -LIMIT ? -LIMIT : d;
  }
  __device__ LaneStarts(const int* lengths, int lane) {
    int total = 0;
    for (int i = 0; i < 32; i++) total += lengths[i];
    uint32_t best = 0xFFFFFFFF;
    for (int round = 0; round < 3; round++) {
      // Near the mean; if no lane's spacing works there, above it, then all over the range: 256 always does.
      const int low = max(0, total / 32 - 12), a = round == 0   ? low + lane
                                                   : round == 1 ? low + 32 + 3 * lane
                                                                : 8 * lane + 8;
      int end = 0;
      bool possible = a <= PAIR_BITS;
      for (int i = 0; i < 32; i++) {
        const int d = delta(end, i * a);
        possible &= d < LIMIT;
        end = i * a + 2 * d + lengths[i];
      }
      best = __reduce_min_sync(~0u, possible ? (uint32_t)end << 9 | a : 0xFFFFFFFF);
      if (best != 0xFFFFFFFF) break;
    }
    spacing = best & 511, bits = best >> 9;
  }
};

}  // namespace taper

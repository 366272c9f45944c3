// Layouts of ggml's block formats (GGUF files) and of 4-bit integers in groups of 128 (AWQ, GPTQ): unit.cuh's units, at
// the bits that the file has (Q3_K: one eighth more).
//
//   weight  scale[group] * (code - ZERO) - minimum[group], as ggml computes it; a group is 16, 32 or 128 columns
//   unit    planes of codes, as many as the format has bits, then what the 16 rows' groups need (`Six` and the others)
//           nibbles  4 bits: word 64 j + 2 lane + p/4, bits 4 (p%4) and 16 more
//           pairs    2 bits: word 32 j + lane, bits 2 r + 8 b and 16 more, where r = 2 (p/4) + p%2, b = p/2 % 2
//           bits     1 bit: word 32 (j/2) + lane, bits 4 (j%2) + r + 8 b and 16 more
//           bytes    8 bits, signed: word 128 j + 4 lane + p/2, bytes p%2 and 2 more
//           Register p of vector j is as in unit.cuh where groups have 32 columns or more. With groups of 16 its rows
//           are the same and its columns 32j + 16 (p/4) + 4t + 2 (p/2 % 2), +1: so one product has one group.
//   stage   8 units, then a trailer: what superblocks of 256 columns need. There are no repairs.
#pragma once
#include "kquant_codes.cuh"
#include "kquant_scales.cuh"

namespace taper {

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

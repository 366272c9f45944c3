// Activations as sums of bf16 values.
//
// The tensor cores take bf16. An f16 value has 11 significant bits and is the exact sum of two bf16 values, an f32
// value of three, so such rows become two or three columns of B, whose products are added at the end. (Up to eight
// columns cost what one costs.) Parts are cut toward zero, so that they share the value's sign, and none is zero unless
// the value is: then a weight that is infinite gives the infinity that the undivided product would give, and not the
// NaN of infinity times zero.
#pragma once
#include <cstdint>

namespace taper {

// The bf16 parts of v in the high halves of parts[]; `n` = 1: v is bf16, 2: f16, 3: any f32.
__device__ __forceinline__ void split(float v, int n, uint32_t (&parts)[3]) {
  const auto cut = [](float f) { return __uint_as_float(__float_as_uint(f) & 0xFFFF0000u); };
  float a = cut(v), b = 0, c = 0;
  if (n > 1) {
    if (!(fabsf(v) < __uint_as_float(0x7F800000u)))
      a = b = c = v != v ? __uint_as_float(0x7FC00000u) : v;
    else if (n == 2) {
      b = v - a;
      if (b == 0) a = b = 0.5f * a;
    } else {
      b = cut(v - a), c = v - a - b;
      if (b == 0)
        a = 0.5f * a, b = c != 0 ? a : 0.5f * a, c = c != 0 ? c : b;
      else if (c == 0)
        b = c = 0.5f * b;
    }
  }
  parts[0] = __float_as_uint(a), parts[1] = __float_as_uint(b), parts[2] = __float_as_uint(c);
}

}  // namespace taper

// Layout `fixed`: 12.05 bits a bf16 weight, whatever its distribution.
//
//   unit   2048 bytes  signs and mantissas (unit.cuh)
//          1024 bytes  codes: words 0..3 of each lane, then words 4..7; register p of vector j has bits 4 (p%4) and
//                      16 + 4 (p%4) of word 2 j + p/4
//   stage  8 units, trailer of 96 bytes: EXTRA is one byte a unit, the lowest exponent of its window
//
// A code is the exponent less the unit's lowest: the 16 neighbouring exponents that most weights of the unit have. What
// lies outside (0.01% of a Gaussian, 0.04% of trained weights) is repaired exactly (unit.cuh). Windows follow the
// scales of rows and columns by themselves, as each unit has its own.
//
// Budget per pair: LOP3 masks a code, IMAD shifts it and adds the base, LOP3 joins it with sign and mantissa, every second
// time after a PRMT: 3.5 instructions, 1.75 a weight, plus loads and products.
#pragma once
#include "unit.cuh"

namespace taper {

struct Fixed {
  static constexpr int UNITS = 8, UNIT_BYTES = 3072, EXTRA = 8, TRAILER = 8 + EXTRA + 4 * ENTRIES;
  static constexpr int GROUP = 0;
  static constexpr bool SCALED = false;

  struct Unit {
    uint4 sm[4], codes[2];
    uint32_t base, by128, by8;
    __device__ __forceinline__ void load(uint32_t at, uint32_t extra, int u, int lane) {
      codes[0] = lds128(at + 2048 + lane * 16), codes[1] = lds128(at + 2560 + lane * 16);
#pragma unroll
      for (int j = 0; j < 4; j++) sm[j] = lds128(at + 512 * j + lane * 16);
      start(lds8(extra + u));
    }
    // The same from memory.
    __device__ __forceinline__ void fetch(const uint8_t* at, const uint8_t* extra, int u, int lane, uint64_t policy) {
      codes[0] = ldg_stream128(at + 2048 + lane * 16, policy), codes[1] = ldg_stream128(at + 2560 + lane * 16, policy);
#pragma unroll
      for (int j = 0; j < 4; j++) sm[j] = ldg_stream128(at + 512 * j + lane * 16, policy);
      start(__ldg(extra + u));
    }
    __device__ __forceinline__ void start(uint32_t lowest) {
      base = lowest * 0x00800080u;
      // blockDim.y is 1. The compiler does not know, so it leaves these multiplications to the multiplier, which has
      // nothing else to do, instead of turning them into shifts for the crowded integer units.
      by128 = blockDim.y * 128, by8 = blockDim.y * 8;
    }
    __device__ __forceinline__ void vector(int j, uint32_t (&a)[8]) const {
      const uint4 c = codes[j / 2];
#pragma unroll
      for (int p = 0; p < 8; p++) {
        const uint32_t word = j % 2 == 0 ? (p < 4 ? c.x : c.y) : (p < 4 ? c.z : c.w), high = p & 2 ? word >> 8 : word;
        const uint32_t exponents = p & 1 ? (high & 0x00F000F0u) * by8 + base : (high & 0x000F000Fu) * by128 + base;
        a[p] = join(sm[j], p, exponents);
      }
    }
  };
};

}  // namespace taper

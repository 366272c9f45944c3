// Layout `window`: 11.5 bits a bf16 weight, for matrices of which few lie outside of eight neighbouring exponents.
//
//   unit   2048 bytes  signs and mantissas (unit.cuh)
//           768 bytes  codes, 3 bits: words 0..3 of each lane, then words 4, 5. P = 8 (j%2) + p < 15: register p of vector
//                      j has bits 3 (P%5) and 16 + 3 (P%5) of word 3 (j/2) + P/5; P = 15 has what is left, bits 15 and
//                      31, of the three words
//   stage  8 units, trailer of 1024 bytes: EXTRA is the lowest exponent of each row's window, a byte a row; 2 bytes a unit
//          that say where its list begins (in pairs of entries) and, from bit 8 on, how long it is; 452 entries
//   entry  lane << 2 | j (a word), 8 half + p << 7 (a place in it), f ^ 1 << 11
//
// The exponent is the lowest of the row's window + code + 8 (f - 1). Windows are the 8 neighbouring exponents that most of
// a row's weights in the stage have: those have f = 1. A Gaussian has 1.1 to 1.5% outside, rows and columns of different
// scales 1.6 to 1.8%, Student's t with 5 degrees of freedom 1.9 to 2.2%. They have an entry: f = 0 for the eight exponents
// below, 2 and 3 for the sixteen above. Others, and what a list has no room for, are repaired (unit.cuh): 0.005% of a
// Gaussian.
//
// Before a warp decodes a unit, its entries turn bits in a word for each of a lane's vectors, which has f of 16 weights: 512
// bytes of shared memory that all lanes write to and read back. (A branch for each entry costs more, as nearly every unit
// has some; so does adding entries to decoded registers in shared memory, 4096 bytes.)
//
// Budget of a unit: 3.5 instructions a pair as in `fixed`, 2 for f, 50 for entries: 3.5 a weight. All of a product is 454 warp
// instructions a unit, 205 of them on the integer units (`fixed`: 272 and 126), which are busy half of the time then.
// Shared memory is for a third.
#pragma once
#include "unit.cuh"

namespace taper {

struct Window {
  static constexpr int CODES = 8, BELOW = 8, ABOVE = 24;                     // from the lowest exponent of a window
  static constexpr int HEADS = TILE_ROWS, LIST = HEADS + 2 * 8, ROOM = 452;  // in the trailer, after its first 8 bytes
  static constexpr int UNITS = 8, UNIT_BYTES = 2816, EXTRA = LIST + 2 * ROOM, TRAILER = 8 + EXTRA + 4 * ENTRIES;
  static constexpr int GROUP = 0;
  static constexpr bool SCALED = false;
  static constexpr int MOST_WARPS = 16;  // of a block that decode

  __device__ __forceinline__ static int list_begin(uint32_t head) { return 2 * (int)(head & 255); }
  __device__ __forceinline__ static int list_length(uint32_t head) { return (int)(head >> 8); }
  __device__ __forceinline__ static uint32_t entry(int slot, uint32_t f) {
    const int j = slot >> 9, lane = slot >> 3 & 31, p = (slot >> 8 & 1) * 4 + (slot >> 1 & 3), half = slot & 1;
    return (uint32_t)(lane << 2 | j | (8 * half + p) << 7) | (f ^ 1) << 11;
  }

  struct Unit {
    uint4 sm[4], codes, f;
    uint2 more;
    uint32_t base[2], by1024, by256, by128, by64, by16, by4, by2;
    __device__ __forceinline__ void load(uint32_t at, uint32_t extra, int u, int lane) {
      const uint32_t head = lds16(extra + HEADS + 2 * u), list = extra + LIST + 2 * (list_begin(head) + lane);
      codes = lds128(at + 2048 + lane * 16), more = lds64(at + 2560 + lane * 8);
      outside(
          list_length(head) - lane, lane, [&](int i) { return lds16(list + 2 * i); },
          [&] {
#pragma unroll
            for (int j = 0; j < 4; j++) sm[j] = lds128(at + 512 * j + lane * 16);
            start(lds8(extra + lane / 4), lds8(extra + lane / 4 + 8));
          });
    }
    // The same from memory.
    __device__ __forceinline__ void fetch(const uint8_t* at, const uint8_t* extra, int u, int lane, uint64_t policy) {
      const uint32_t head = __ldg((const uint16_t*)(extra + HEADS) + u);
      codes = ldg_stream128(at + 2048 + lane * 16, policy), more = __ldg((const uint2*)(at + 2560) + lane);
#pragma unroll
      for (int j = 0; j < 4; j++) sm[j] = ldg_stream128(at + 512 * j + lane * 16, policy);
      start(__ldg(extra + lane / 4), __ldg(extra + lane / 4 + 8));
      const uint16_t* const list = (const uint16_t*)(extra + LIST) + list_begin(head) + lane;
      outside(list_length(head) - lane, lane, [&](int i) { return (uint32_t)__ldg(list + i); }, [] {});
    }
    // Makes f of the unit's list, of which a lane takes entries 0, 32 and so on of those `left` from its first one on.
    // Meanwhile other loads are on their way.
    template <class Entry, class Others>
    __device__ __forceinline__ void outside(int left, int lane, Entry entry, Others load_others) {
      __shared__ __align__(16) uint32_t memory[MOST_WARPS][128];
      const uint32_t words = shared_address(memory[threadIdx.x / 32]);
      const uint32_t first = left > 0 ? entry(0) : 0, second = left > 32 ? entry(32) : 0;
      sts128(words + 16 * lane, make_uint4(0x55555555, 0x55555555, 0x55555555, 0x55555555));
      load_others();
      __syncwarp();
      const auto turn = [&](uint32_t e) { reds_xor(words + (e & 127) * 4, (e >> 11) << (e >> 6 & 30)); };
      if (left > 0) turn(first);
      if (left > 32) turn(second);
#pragma unroll 1
      for (int i = 64; i < left; i += 32) turn(entry(i));
      __syncwarp();
      f = lds128(words + 16 * lane);
    }
    __device__ __forceinline__ void start(int top, int bottom) {
      base[0] = (top - 8) * 0x00800080, base[1] = (bottom - 8) * 0x00800080;
      // As in `fixed`: for the multiplier.
      const uint32_t one = blockDim.y;
      by1024 = one * 1024, by256 = one * 256, by128 = one * 128, by64 = one * 64, by16 = one * 16, by4 = one * 4,
      by2 = one * 2;
    }
    // Codes of a pair, as exponents are placed in bf16, and more to add.
    __device__ __forceinline__ uint32_t add_codes(int P, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t more) const {
      if (P == 15) return ((w0 >> 8 & 0x00800080u) | (w1 >> 7 & 0x01000100u) | (w2 >> 6 & 0x02000200u)) + more;
      const uint32_t word = P < 5 ? w0 : P < 10 ? w1 : w2, high = P % 5 < 3 ? word : word >> 6;
      switch (P % 5) {
        case 0:
          return (high & 0x00070007u) * by128 + more;
        case 1:
        case 3:
          return (high & 0x00380038u) * by16 + more;
        default:
          return (high & 0x01C001C0u) * by2 + more;
      }
    }
    // The same of f.
    __device__ __forceinline__ uint32_t add_f(int p, uint32_t word, uint32_t more) const {
      const uint32_t high = p < 6 ? word : word >> 6;
      switch (p) {
        case 0:
          return (high & 0x00030003u) * by1024 + more;
        case 1:
          return (high & 0x000C000Cu) * by256 + more;
        case 2:
          return (high & 0x00300030u) * by64 + more;
        case 3:
        case 6:
          return (high & 0x00C000C0u) * by16 + more;
        case 4:
        case 7:
          return (high & 0x03000300u) * by4 + more;
        default:
          return (high & 0x0C000C00u) + more;
      }
    }
    __device__ __forceinline__ void vector(int j, uint32_t (&a)[8]) const {
      const uint32_t w0 = j < 2 ? codes.x : codes.w, w1 = j < 2 ? codes.y : more.x, w2 = j < 2 ? codes.z : more.y,
                     outside = j == 0   ? f.x
                               : j == 1 ? f.y
                               : j == 2 ? f.z
                                        : f.w;
#pragma unroll
      for (int p = 0; p < 8; p++) {
        const uint32_t exponents = add_codes(8 * (j & 1) + p, w0, w1, w2, add_f(p, outside, base[p & 1]));
        a[p] = join(sm[j], p, exponents);
      }
    }
  };
};

}  // namespace taper

// Units of a layout as wgmma's A, in registers: bf16 weights, vector by vector.
#pragma once
#include "fixed.cuh"
#include "kquant_product.cuh"
#include "prefill_parts.cuh"

namespace taper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
//   APART      whether a unit's sums are to be multiplied with scales(h), of rows g (h = 0) and g + 8
// Values rounded once, or of layouts with one group for each row of a unit (`INTEGERS`) code - zero.
template <class L, bool INTEGERS = L::GROUP == 128>
struct StreamUnit {
  static constexpr bool APART = INTEGERS;
  typename L::C::Raw raw[4];
  typename L::S scales;
  __device__ __forceinline__ void load(const Prefill&, uint32_t at, uint32_t trailer, int u, int lane) {
#pragma unroll
    for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j);
    scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
  }
  __device__ __forceinline__ float scale(int h) const {
    if constexpr (APART) return scales.scale[h];
    return 1;
  }
  // Vectors 0 to 3, in this order.
  __device__ __forceinline__ void vector(int j, uint32_t (&a)[8]) const {
    if constexpr (APART) return integers<L>(raw[j], scales, two_128(), a);
    if constexpr (L::GROUP == 128) return scaled_integers(j, a);
    constexpr int AWAY = L::MAGIC + L::ZERO, GROUPS = L::GROUP == 16 ? 2 : 1;
    constexpr uint32_t MINUS = 0x80008000u | (AWAY == 128   ? 0x43004300u
                                              : AWAY == 132 ? 0x43044304u
                                              : AWAY == 136 ? 0x43084308u
                                              : AWAY == 144 ? 0x43104310u
                                                            : 0x43204320u);
    static_assert(AWAY == 0 || AWAY == 128 || AWAY == 132 || AWAY == 136 || AWAY == 144 || AWAY == 160, "");
    L::C::expand(raw[j], two_128(), a);
#pragma unroll
    for (int part = 0; part < GROUPS; part++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float scale, min;
        scales.template of<true>(GROUPS * j + part, h, scale, min);
#pragma unroll
        for (int q = h + 4 * part; q < (GROUPS == 2 ? 4 * part + 4 : 8); q += 2) {
          const uint32_t code = AWAY ? fma_bf16x2(a[q], TWO_1, MINUS) : a[q];  // exactly
          const float lo = __uint_as_float(code << 16), hi = __uint_as_float(code & 0xFFFF0000u);
          a[q] = L::MINS ? pack_bf16(fmaf(scale, lo, -min), fmaf(scale, hi, -min)) : pack_bf16(scale * lo, scale * hi);
        }
      }
  }
  // Eight bits of the scale's 11 and the rest, times integers of five: the second product is exact, so the sum is rounded
  // once.
  __device__ __forceinline__ void scaled_integers(int j, uint32_t (&a)[8]) const {
    integers<L>(raw[j], scales, two_128(), a);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t upper = __float_as_uint(scales.scale[h]) & 0xFFFF0000u,
                     rest = __float_as_uint(scales.scale[h] - __uint_as_float(upper));
      const uint32_t two_upper = __byte_perm(upper, upper, 0x7632), two_rest = __byte_perm(rest, rest, 0x7632);
#pragma unroll
      for (int q = h; q < 8; q += 2) a[q] = fma_bf16x2(a[q], two_upper, fma_bf16x2(a[q], two_rest, 0x80008000u));
    }
  }
  __device__ __forceinline__ bool needs_repair() const { return false; }
  __device__ __forceinline__ void repair(const Prefill&, int, int, uint32_t (&)[4][8], uint32_t, int) const {}
};

// The repairs that a unit needs: of three units two have none, most others one or two. They are handed to the lanes that
// have the weights when the unit is loaded, while products run.
struct StreamRepairs {
  static constexpr uint32_t SOME = 1, MANY = 2, LISTED = 4;
  uint32_t mine = 0, bit = 0;  // the lane's repair, and where it goes: bit 8 j + p for register p of vector j, or none
  uint32_t entry, unit, stage;
  uint32_t state = 0;  // SOME; MANY: some lane has two; LISTED: the trailer has none of them
  __device__ __forceinline__ void load(uint32_t trailer, int extra, int u, int lane) {
    entry = lds32(lane < ENTRIES ? trailer + 8 + extra + 4 * lane : trailer);
    unit = 16u | u, stage = trailer, state = 0, bit = 0;
    uint32_t left = __ballot_sync(~0u, lane < ENTRIES ? repairs_unit(entry, u) : entry != 0);
    if (left == 0) return;
    state = left >> ENTRIES ? LISTED : SOME;
    bool two = false;
#pragma unroll 1
    for (; left && state == SOME; left &= left - 1) {
      const uint32_t e = __shfl_sync(~0u, entry, __ffs(left) - 1);
      if ((int)(e >> 3 & 31) != lane) continue;
      two |= bit != 0, mine = e, bit = 1u << ((e >> 6 & 28) | (e >> 1 & 3));
    }
    if (__any_sync(~0u, two)) state = MANY, bit = 0;
  }
  // Puts them into vectors begin to end - 1. scratch: the warp's, 1 KB.
  __device__ __forceinline__ void patch(int begin, int end, uint32_t (&a)[4][8], uint32_t scratch, int lane,
                                        const uint32_t* overflow) const {
    const uint32_t halves = mine & 1 ? 0x7610 : 0x3276;
#pragma unroll
    for (int j = begin; j < end; j++)
#pragma unroll
      for (int p = 0; p < 8; p++)
        if (bit >> (8 * j + p) & 1) a[j][p] = __byte_perm(a[j][p], mine, halves);
    if (!(state & (MANY | LISTED))) return;
    const bool listed = state == LISTED;
    const uint32_t count = listed ? lds32(stage) : ENTRIES;
    const uint32_t* const list = listed ? overflow + lds32(stage + 4) : nullptr;
#pragma unroll
    for (int j = begin; j < end; j++) patch_listed(list, entry, count, unit, j, a[j], scratch, lane);
  }
};

template <>
struct StreamUnit<Fixed, false> {
  static constexpr bool APART = false;
  Fixed::Unit unit;
  StreamRepairs repairs;
  uint32_t mine;  // where the lane's 16 bytes of vector 0 are
  __device__ __forceinline__ void load(const Prefill& p, uint32_t at, uint32_t trailer, int u, int lane) {
    mine = at + 16 * lane;
    repairs.load(trailer, Fixed::EXTRA, u, lane);
    unit.codes[0] = lds128(mine + 2048), unit.sm[0] = lds128(mine);
    unit.start(lds8(trailer + 8 + u));
    unit.by128 = p.by128, unit.by8 = p.by8;
  }
  // Vectors 0 to 3, in this order.
  __device__ __forceinline__ void vector(int j, uint32_t (&a)[8]) {
    if (j < 3) unit.sm[j + 1] = lds128(mine + 512 * (j + 1));  // comes while this one is decoded
    if (j == 1) unit.codes[1] = lds128(mine + 2560);
    unit.vector(j, a);
  }
  __device__ __forceinline__ bool needs_repair() const { return repairs.state != 0; }
  // Puts the repairs of vectors begin to end - 1 in, which may be decoded side by side. scratch: the warp's, 1 KB.
  __device__ __forceinline__ void repair(const Prefill& p, int begin, int end, uint32_t (&a)[4][8], uint32_t scratch,
                                         int lane) const {
    repairs.patch(begin, end, a, scratch, lane, p.overflow);
  }
};
#endif

}  // namespace taper

// Units of a layout as wgmma's A, in registers: bf16 weights, vector by vector.
#pragma once
#include "fixed.cuh"
#include "kquant_product.cuh"
#include "prefill_parts.cuh"

namespace taper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
//   APART      whether a unit's sums are to be multiplied with scales(h), of rows g (h = 0) and g + 8
// Of groups: ggml's values, rounded once. One group for each row of a unit: integers.
template <class L>
struct StreamUnit {
  static constexpr bool APART = L::GROUP == 128;
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
  __device__ __forceinline__ void repair(const Prefill&, int, uint32_t (&)[8], uint32_t, int) const {}
  __device__ __forceinline__ void repair(const Prefill&, uint32_t (&)[4][8], uint32_t, int) const {}
};

// The repairs that a unit needs: most need none, one or two. Those are sought when the unit is loaded, while products
// run, and put into its registers by the lane that has the weight.
struct StreamRepairs {
  static constexpr uint32_t MORE = 16, LISTED = 32;
  uint32_t entry, first, second, unit, stage;
  uint32_t vectors = 0;  // those that need some, and whether there are more than two, or all are in the overflow list
  __device__ __forceinline__ void load(uint32_t trailer, int extra, int u, int lane) {
    entry = lds32(lane < ENTRIES ? trailer + 8 + extra + 4 * lane : trailer);
    unit = 16u | u, stage = trailer, vectors = 0;
    uint32_t left = __ballot_sync(~0u, lane < ENTRIES ? repairs_unit(entry, u) : entry != 0);
    if (left == 0) return;
    first = __shfl_sync(~0u, entry, __ffs(left) - 1);
    second = __shfl_sync(~0u, entry, 31 - __clz(left));  // perhaps the first again, which does no harm
    vectors = left >> ENTRIES    ? 15 | LISTED
              : __popc(left) > 2 ? 15 | MORE
                                 : 1 << (first >> 9 & 3) | 1 << (second >> 9 & 3);
  }
  // scratch: the warp's, 1 KB.
  __device__ __forceinline__ void patch(int j, uint32_t (&a)[8], uint32_t scratch, int lane,
                                        const uint32_t* overflow) const {
    if (!(vectors >> j & 1)) return;
    if (vectors & LISTED) {
      const uint32_t count = lds32(stage);
      return patch_listed(overflow + lds32(stage + 4), count, unit, j, a, scratch, lane);
    }
    if (vectors & MORE) {
      uint32_t left = __ballot_sync(~0u, lane < ENTRIES && (entry >> 9 & 127) == (unit << 2 | j));
#pragma unroll 1
      for (; left; left &= left - 1) patch_one(__shfl_sync(~0u, entry, __ffs(left) - 1), a, lane);
      return;
    }
    if ((first >> 9 & 3) == j) patch_one(first, a, lane);
    if ((second >> 9 & 3) == j) patch_one(second, a, lane);
  }
};

template <>
struct StreamUnit<Fixed> {
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
  // Puts a vector's repairs in, while the place of the unit is yet to be read again. scratch: the warp's, 1 KB.
  __device__ __forceinline__ void repair(const Prefill& p, int j, uint32_t (&a)[8], uint32_t scratch, int lane) const {
    repairs.patch(j, a, scratch, lane, p.overflow);
  }
  // All vectors', with one branch for most units, so that vectors are decoded side by side.
  __device__ __forceinline__ void repair(const Prefill& p, uint32_t (&a)[4][8], uint32_t scratch, int lane) const {
    if (!repairs.vectors) return;
#pragma unroll
    for (int j = 0; j < 4; j++) repair(p, j, a[j], scratch, lane);
  }
};
#endif

}  // namespace taper

// Units of a layout as operands of the tensor cores, for prefill.cuh: bf16 weights.
#pragma once
#include "fixed.cuh"
#include "kquant.cuh"
#include "prefill_parts.cuh"

namespace taper {

// Bytes of a stage's trailer that come with a unit: of those of superblocks the unit's.
template <class L>
__host__ __device__ constexpr int operand_trailer() {
  return L::GROUP == 0 ? L::TRAILER : L::TRAILER / 4;
}
// Bytes where half a unit, with its trailer, finds room.
template <class L>
__host__ __device__ constexpr int half_slot() {
  return (L::GROUP == 0 ? L::UNIT_BYTES / 2 : L::UNIT_BYTES) + operand_trailer<L>();
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// In lanes of odd rows vectors 0 and 1 are exchanged, and 2 and 3 (store_vector).
//   TRAILER, trailer_at(u)  the part of a stage's trailer that comes with unit u
//   load, load_half         the unit, or half of it, whose vectors are then 0 and 1
//   fetch_half              calls copy(offset, from, bytes) for what half a unit needs, HALF_BYTES together
template <class L>
struct Operand {  // of groups: ggml's values, rounded once
  static constexpr bool REPAIRS = false;
  static constexpr int TRAILER = operand_trailer<L>(), HALF_BYTES = L::C::BYTES / 2 + L::S::BYTES + TRAILER;
  __device__ static int trailer_at(int u) { return u % L::UNITS / 2 * TRAILER; }
  template <class Copy>
  __device__ __forceinline__ static void fetch_half(const uint8_t* unit, const uint8_t* trailer, int part, Copy copy) {
    L::C::halves(part, [&](int at, int bytes) { copy(at, unit + at, bytes); });
    copy(L::C::BYTES, unit + L::C::BYTES, L::S::BYTES);
    if (TRAILER) copy(L::UNIT_BYTES, trailer, TRAILER);
  }
  typename L::S scales;
  typename L::C::Raw raw[4];
  int first;  // vector of the unit that is 0 here
  __device__ __forceinline__ void load(const Prefill&, uint32_t at, uint32_t trailer, int, int lane) {
    first = lane >> 2 & 1;
#pragma unroll
    for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j ^ first);
    scales.load(at + L::C::BYTES, trailer, 0, lane >> 2);
  }
  __device__ __forceinline__ void load_half(const Prefill&, uint32_t at, int, int part, int lane) {
    first = 2 * part | (lane >> 2 & 1);
#pragma unroll
    for (int j = 0; j < 2; j++) raw[j] = L::C::load(at, lane, j ^ first);
    scales.load(at + L::C::BYTES, at + L::UNIT_BYTES, 0, lane >> 2);
  }
  __device__ __forceinline__ void vector(int j, uint32_t (&a)[8]) const {
    L::C::expand(raw[j], TWO_128, a);
#pragma unroll
    for (int part = 0; part < (L::GROUP == 16 ? 2 : 1); part++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float scale, min;
        scales.template of<true>(L::GROUP == 16 ? 2 * (j ^ first) + part : j ^ first, h, scale, min);
#pragma unroll
        for (int q = h + 4 * part; q < (L::GROUP == 16 ? 4 * part + 4 : 8); q += 2)
          a[q] = pack_bf16(L::value(__uint_as_float(a[q] << 16), scale, min),
                           L::value(__uint_as_float(a[q] & 0xFFFF0000u), scale, min));
      }
  }
};

template <>
struct Operand<Fixed> {
  static constexpr bool REPAIRS = true;
  static constexpr int TRAILER = operand_trailer<Fixed>(), HALF_TRAILER = 1536, HALF_BYTES = HALF_TRAILER + TRAILER;
  __device__ static int trailer_at(int) { return 0; }
  template <class Copy>
  __device__ __forceinline__ static void fetch_half(const uint8_t* unit, const uint8_t* trailer, int part, Copy copy) {
    copy(0, unit + 1024 * part, 1024), copy(1024, unit + 2048 + 512 * part, 512), copy(HALF_TRAILER, trailer, TRAILER);
  }
  Fixed::Unit unit;
  // Vectors 2 half and 2 half + 1: signs and mantissas from `at` on, codes from `codes` on.
  __device__ __forceinline__ void load_pair(int half, uint32_t at, uint32_t codes, int lane) {
    const bool odd = lane >> 2 & 1;
    const uint32_t mine = at + lane * 16;
    const uint4 c = lds128(codes + lane * 16);
    unit.sm[2 * half] = lds128(mine + (odd ? 512 : 0)), unit.sm[2 * half + 1] = lds128(mine + (odd ? 0 : 512));
    unit.codes[half] = odd ? make_uint4(c.z, c.w, c.x, c.y) : c;
  }
  __device__ __forceinline__ void load_base(const Prefill& p, uint32_t trailer, int u) {
    unit.base = lds8(trailer + 8 + u) * 0x00800080u;
    unit.by128 = p.by128, unit.by8 = p.by8;
  }
  __device__ __forceinline__ void load(const Prefill& p, uint32_t at, uint32_t trailer, int u, int lane) {
    load_pair(0, at, at + 2048, lane), load_pair(1, at + 1024, at + 2560, lane);
    load_base(p, trailer, u);
  }
  __device__ __forceinline__ void load_half(const Prefill& p, uint32_t at, int u, int, int lane) {
    load_pair(0, at, at + 1024, lane);
    load_base(p, at + HALF_TRAILER, u);
  }
  __device__ __forceinline__ void vector(int j, uint32_t (&a)[8]) const { unit.vector(j, a); }
};
#endif

// Half a unit in shared memory: of each row 128 bytes, in which chunk c of eight columns is at c ^ row % 8. Where a
// lane's weights of vector 0 go, in a tile at 0: row g, its first columns (column_of in kquant.cuh).
template <int GROUP>
__device__ __forceinline__ uint32_t lane_place(int lane) {
  const int g = lane >> 2, t = lane & 3, chunk = 4 * (g & 1) + (GROUP == 16 ? t / 2 : t);
  return g * 128 + (chunk ^ g) * 16 + (GROUP == 16 ? t % 2 * 8 : 0);
}
// Stores a lane's vector 0 or 1 of the half, to rows g and g+8. In odd rows the two are exchanged, so that lanes which
// store at the same time meet different banks.
template <int GROUP>
__device__ __forceinline__ void store_vector(uint32_t to, int j, const uint32_t (&a)[8]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint32_t at = (to ^ 64 * j) + 1024 * h;
    if constexpr (GROUP == 16) {
      sts64(at, a[h], a[2 + h]), sts64(at ^ 32, a[4 + h], a[6 + h]);
    } else {
      sts128(at, make_uint4(a[h], a[2 + h], a[4 + h], a[6 + h]));
    }
  }
}

}  // namespace taper

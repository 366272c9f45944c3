// One unit of a layout with groups (kquant.cuh) times its activations, on tensor cores.
//
// Codes stay integers: put into the mantissa of a bf16 128 they are 128 + code, exactly. A group's products are summed
// by themselves and scaled as f32: total += scale * c - (128 scale + zero + minimum) * X, where X, the sum of the
// group's activations, is one more product, with ones. So nothing is rounded before the f32 sums, whatever the scales.
// Where a sum is not finite (activations or scales that are none, overflow) the unit is multiplied again with each
// weight as three bf16 parts, as activations.cuh has them: infinities and NaN are then those of the exact product.
// With one group a unit (128 columns) zeros are taken from the codes before the product, and no sum is needed.
//
// Budget   thread-instructions a weight, Q4_K and one column of activations: codes 0.9, scales 0.8, products 0.25,
//          scaling 0.5, loads 0.1: 2.6. At 4.5 bits and 4.5 TB/s there are 3.7, at 3 TB/s 5.5.
#pragma once
#include "kquant.cuh"

namespace taper {

// Vector j's weights, over the rows' scales, each in three bf16 parts as activations.cuh has them.
template <class L>
__device__ __forceinline__ void exact_parts(const typename L::S& scales, uint32_t at, int lane, int j,
                                            const float (&inverse)[2], uint32_t (&exact)[3][8]) {
  uint32_t a[8];
  L::C::expand(L::C::load(at, lane, j), TWO_128, a);
#pragma unroll
  for (int p = 0; p < 8; p++) {
    float scale, min;
    scales.template of<true>(L::GROUP == 16 ? 2 * j + (p >> 2) : j, p & 1, scale, min);
    uint32_t lo[3], hi[3];
    split(L::value(__uint_as_float(a[p] << 16), scale, min) * inverse[p & 1], 3, lo);
    split(L::value(__uint_as_float(a[p] & 0xFFFF0000u), scale, min) * inverse[p & 1], 3, hi);
#pragma unroll
    for (int s = 0; s < 3; s++) exact[s][p] = __byte_perm(lo[s], hi[s], 0x7632);
  }
}

// total = unit * activations with such weights: for sums that are not finite.
template <class L, int NB, class X>
__device__ __forceinline__ void multiply_exactly(uint32_t at, uint32_t trailer, int u, int lane, float (&total)[NB][4],
                                                 X x) {
  typename L::S scales;
  scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
#pragma unroll
  for (int i = 0; i < NB * 4; i++) total[i / 4][i % 4] = 0;
#pragma unroll 1
  for (int j = 0; j < 4; j++) {
    uint32_t exact[3][8];
    exact_parts<L>(scales, at, lane, j, {1, 1}, exact);
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint4 b = x(j, nb);
#pragma unroll
      for (int s = 0; s < 3; s++) {
        mma(total[nb], exact[s][0], exact[s][1], exact[s][2], exact[s][3], b.x, b.y);
        mma(total[nb], exact[s][4], exact[s][5], exact[s][6], exact[s][7], b.z, b.w);
      }
    }
  }
}

template <int N>
__device__ __forceinline__ bool all_finite(const float (&total)[N][4]) {
  float odd = 0;  // NaN if any is not
#pragma unroll
  for (int i = 0; i < N * 4; i++) odd = fmaf(total[i / 4][i % 4], 0.0f, odd);
  return !__any_sync(~0u, odd != odd);
}

// c += unit * activations, as in multiply.cuh. `again` is x for multiply_exactly, where j is not known at compile time.
template <class L, int NB, class X, class Again>
__device__ __forceinline__ void multiply_groups(uint32_t at, uint32_t trailer, int u, int lane, float (&c)[NB][4], X x,
                                                Again again) {
  constexpr int PARTS = L::GROUP == 16 ? 2 : 1;  // groups in a vector
  typename L::C::Raw raw[4];
#pragma unroll
  for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j);
  typename L::S scales;
  scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
  const uint32_t magic = two_128();
  float total[NB][4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    L::C::expand(raw[j], magic, a);
    float scale[PARTS][2], away[PARTS][2];
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int h = 0; h < 2; h++) L::scale_and_away(scales, PARTS * j + part, h, scale[part][h], away[part][h]);
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint4 b = x(j, nb);
      float d[PARTS][4] = {}, sum[PARTS][4] = {};
      mma(d[0], a[0], a[1], a[2], a[3], b.x, b.y);
      mma(d[PARTS - 1], a[4], a[5], a[6], a[7], b.z, b.w);
      if (L::AWAY) {
        mma(sum[0], TWO_1, TWO_1, TWO_1, TWO_1, b.x, b.y);
        mma(sum[PARTS - 1], TWO_1, TWO_1, TWO_1, TWO_1, b.z, b.w);
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float scaled = scale[part][i >> 1] * d[part][i];
          total[nb][i] = j + part ? total[nb][i] + scaled : scaled;
          if (L::AWAY) total[nb][i] = fmaf(-away[part][i >> 1], sum[part][i & 1], total[nb][i]);
        }
    }
  }
  if (!all_finite(total)) multiply_exactly<L, NB>(at, trailer, u, lane, total, again);
#pragma unroll
  for (int i = 0; i < NB * 4; i++) c[i / 4][i % 4] += total[i / 4][i % 4];
}

// a[p]: code - zero of vector j as two bf16, exactly, in a layout with one group for each row of a unit.
template <class L>
__device__ __forceinline__ void integers(const typename L::C::Raw& raw, const typename L::S& scales, uint32_t magic,
                                         uint32_t (&a)[8]) {
  L::C::expand(raw, magic, a);
#pragma unroll
  for (int p = 0; p < 8; p++) a[p] = fma_bf16x2(a[p], TWO_1, scales.away(p & 1));
}

// c += unit * activations in such a layout: what the whole unit adds up to is scaled once.
template <class L, int NB, class X>
__device__ __forceinline__ void multiply_integers(uint32_t at, uint32_t trailer, int u, int lane, float (&c)[NB][4],
                                                  X x) {
  constexpr int SUMS = NB > 2 ? 1 : 2;  // chains of products
  typename L::C::Raw raw[4];
#pragma unroll
  for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j);
  typename L::S scales;
  scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
  const uint32_t magic = two_128();
  float d[SUMS][NB][4] = {}, total[NB][4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    integers<L>(raw[j], scales, magic, a);
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint4 b = x(j, nb);
      mma(d[0][nb], a[0], a[1], a[2], a[3], b.x, b.y);
      mma(d[SUMS - 1][nb], a[4], a[5], a[6], a[7], b.z, b.w);
    }
  }
#pragma unroll
  for (int i = 0; i < NB * 4; i++) {
    const float sum = SUMS == 1 ? d[0][i / 4][i % 4] : d[0][i / 4][i % 4] + d[SUMS - 1][i / 4][i % 4];
    total[i / 4][i % 4] = scales.scale[i >> 1 & 1] * sum;
  }
  if (!all_finite(total)) multiply_exactly<L, NB>(at, trailer, u, lane, total, x);
#pragma unroll
  for (int i = 0; i < NB * 4; i++) c[i / 4][i % 4] += total[i / 4][i % 4];
}

// The same for one column of activations, whose groups become columns of B: x(j) is zero but in the lanes of column j,
// or with groups of 16 of columns 2j (x, y) and 2j + 1 (z, w). So all groups of the unit share their products' sums,
// and each lane scales two of them only. What the columns of c hold is to be added.
template <class L, class X, class Again>
__device__ __forceinline__ void multiply_single(uint32_t at, uint32_t trailer, int u, int lane, float (&c)[1][4], X x,
                                                Again again) {
  typename L::C::Raw raw[4];
#pragma unroll
  for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j);
  typename L::S scales;
  scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
  const uint32_t magic = two_128();
  float d[2][4] = {}, sum[2][4] = {}, total[1][4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    L::C::expand(raw[j], magic, a);
    const uint4 b = x(j);
    mma(d[0], a[0], a[1], a[2], a[3], b.x, b.y);
    mma(d[1], a[4], a[5], a[6], a[7], b.z, b.w);
    if (L::AWAY) {
      mma(sum[0], TWO_1, TWO_1, TWO_1, TWO_1, b.x, b.y);
      mma(sum[1], TWO_1, TWO_1, TWO_1, TWO_1, b.z, b.w);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float scale, away;
    L::scale_and_away(scales, (2 * (lane & 3) + (i & 1)) & (UNIT_COLS / L::GROUP - 1), i >> 1, scale, away);
    total[0][i] = scale * (d[0][i] + d[1][i]);
    if (L::AWAY) total[0][i] = fmaf(-away, sum[0][i & 1] + sum[1][i & 1], total[0][i]);
  }
  if (!all_finite(total)) {
    multiply_exactly<L, 1>(at, trailer, u, lane, total, again);
    total[0][1] = total[0][3] = 0;
    if (lane & 3) total[0][0] = total[0][2] = 0;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) c[0][i] += total[0][i];
}

}  // namespace taper

// One unit of a layout without groups times its activations, on tensor cores. Layouts with groups: kquant_product.cuh.
#pragma once
#include "kquant_product.cuh"
#include "ring.cuh"

namespace taper {

// c += unit * activations; x(j, nb) is the B fragment of vector j and columns 8 nb to 8 nb + 7. Two sums for each
// element (the two halves of a vector) keep two chains of products going where one row of activations has no other.
template <class L, int NB, class X>
__device__ __forceinline__ void multiply_unit(uint32_t at, uint32_t trailer, int u, int lane, const uint32_t* overflow,
                                              float (&c0)[NB][4], float (&c1)[NB][4], X x) {
  const auto products = [&](float (&d0)[NB][4], float (&d1)[NB][4]) {
    decode_unit<L>(at, trailer, u, lane, overflow, [&](int j, const uint32_t (&a)[8]) {
#pragma unroll
      for (int nb = 0; nb < NB; nb++) {
        const uint4 b = x(j, nb);
        mma(d0[nb], a[0], a[1], a[2], a[3], b.x, b.y);
        mma(d1[nb], a[4], a[5], a[6], a[7], b.z, b.w);
      }
    });
  };
  if constexpr (L::SCALED) {
    const float scale = L::unit_scale(trailer, u);
    float d0[NB][4] = {}, d1[NB][4] = {};
    products(d0, d1);
#pragma unroll
    for (int i = 0; i < NB * 4; i++) c0[i / 4][i % 4] += scale * (d0[i / 4][i % 4] + d1[i / 4][i % 4]);
  } else
    products(c0, c1);
}
// The same with one sum for each element, for products with many columns.
template <class L, int NB, class X>
__device__ __forceinline__ void multiply_unit(uint32_t at, uint32_t trailer, int u, int lane, const uint32_t* overflow,
                                              float (&c)[NB][4], X x) {
  const auto products = [&](float (&d)[NB][4]) {
    decode_unit<L>(at, trailer, u, lane, overflow, [&](int j, const uint32_t (&a)[8]) {
      uint4 b[NB];
#pragma unroll
      for (int nb = 0; nb < NB; nb++) b[nb] = x(j, nb);
#pragma unroll
      for (int nb = 0; nb < NB; nb++) mma(d[nb], a[0], a[1], a[2], a[3], b[nb].x, b[nb].y);
#pragma unroll
      for (int nb = 0; nb < NB; nb++) mma(d[nb], a[4], a[5], a[6], a[7], b[nb].z, b[nb].w);
    });
  };
  if constexpr (L::SCALED) {
    const float scale = L::unit_scale(trailer, u);
    float d[NB][4] = {};
    products(d);
#pragma unroll
    for (int i = 0; i < NB * 4; i++) c[i / 4][i % 4] += scale * d[i / 4][i % 4];
  } else
    products(c);
}

}  // namespace taper

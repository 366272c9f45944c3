// The kernels of a layout's products, by the columns of activations that they take. Those for up to 8 take up to three
// matrices.
#pragma once
#include "kquant_narrow.cuh"
#include "product.cuh"
#include "wide.cuh"

namespace taper {

template <class L, int NB>
__device__ __forceinline__ void small_product(const Product& p) {
  if constexpr (L::GROUP >= 16)
    group_product<L, NB, teams<L>()>(p);
  else
    narrow_product<L, NB, teams<L>()>(p);
}

}  // namespace taper

#define TAPER_PRODUCTS(NAME, L)                                                                                      \
  extern "C" __global__ void __launch_bounds__(product_block<L>(), 1)                                                \
      NAME##_product_8(const __grid_constant__ Products p) {                                                         \
    const Product mine = p.mine();                                                                                   \
    small_product<L, 1>(mine);                                                                                       \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(product_block<L>(), 1)                                                \
      NAME##_product_16(const __grid_constant__ Product p) {                                                         \
    small_product<L, 2>(p);                                                                                          \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) NAME##_product_32(const __grid_constant__ Product p) { \
    wide_product<L, 4>(p);                                                                                           \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) NAME##_product_64(const __grid_constant__ Product p) { \
    wide_product<L, 8>(p);                                                                                           \
  }
// The same with two teams, for layouts that have one otherwise. Compute capability 9.0 only; elsewhere they do nothing.
#define TAPER_TEAM_PRODUCTS(NAME, L)                                                                                \
  extern "C" __global__ void __launch_bounds__(block_of(2), 1) NAME##_teams_8(const __grid_constant__ Products p) { \
    const Product mine = p.mine();                                                                                  \
    if constexpr (HOPPER) narrow_product<L, 1, 2>(mine);                                                            \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(block_of(2), 1) NAME##_teams_16(const __grid_constant__ Product p) { \
    if constexpr (HOPPER) narrow_product<L, 2, 2>(p);                                                               \
  }

// The kernels of a layout's products, by the columns of activations that they take; `joined` takes up to three
// matrices.
#pragma once
#include "kquant_narrow.cuh"
#include "product.cuh"
#include "wide.cuh"

namespace taper {

template <class L, int NB>
__device__ __forceinline__ void small_product(const Product& p) {
  if constexpr (L::GROUP >= 16)
    group_product<L, NB, false, teams<L>()>(p);
  else
    narrow_product<L, NB>(p);
}

template <class L>
__host__ __device__ constexpr int small_block() {
  return L::GROUP >= 16 ? product_block<L>() : narrow_block<L>();
}

}  // namespace taper

#define TAPER_PRODUCTS(NAME, L)                                                                                      \
  extern "C" __global__ void __launch_bounds__(small_block<L>(), 1)                                                \
      NAME##_product_8(const __grid_constant__ Product p) {                                                          \
    small_product<L, 1>(p);                                                                                          \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(small_block<L>(), 1)                                                \
      NAME##_joined_8(const __grid_constant__ Products p) {                                                          \
    const Product mine = p.mine();                                                                                   \
    small_product<L, 1>(mine);                                                                                       \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(small_block<L>(), 1)                                                \
      NAME##_product_16(const __grid_constant__ Product p) {                                                         \
    small_product<L, 2>(p);                                                                                          \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) NAME##_product_32(const __grid_constant__ Product p) { \
    wide_product<L, 4>(p);                                                                                           \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) NAME##_product_64(const __grid_constant__ Product p) { \
    wide_product<L, 8>(p);                                                                                           \
  }

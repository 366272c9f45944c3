// The kernels of a layout's products, by the columns of activations that they take; `joined` takes up to three
// matrices.
#pragma once
#include "product.cuh"
#include "wide.cuh"

#define TAPER_PRODUCTS(NAME, L)                                                                                      \
  extern "C" __global__ void __launch_bounds__(BLOCK, 1) NAME##_product_8(const __grid_constant__ Product p) {       \
    narrow_product<L, 1>(p);                                                                                         \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(BLOCK, 1) NAME##_joined_8(const __grid_constant__ Products p) {       \
    const Product mine = p.mine();                                                                                   \
    narrow_product<L, 1>(mine);                                                                                      \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(BLOCK, 1) NAME##_product_16(const __grid_constant__ Product p) {      \
    narrow_product<L, 2>(p);                                                                                         \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) NAME##_product_32(const __grid_constant__ Product p) { \
    wide_product<L, 4>(p);                                                                                           \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) NAME##_product_64(const __grid_constant__ Product p) { \
    wide_product<L, 8>(p);                                                                                           \
  }

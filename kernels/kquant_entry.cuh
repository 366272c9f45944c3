// The kernels of a layout of kquant.cuh: made from a file's blocks, turned back into weights, multiplied.
#pragma once
#include "entry.cuh"
#include "kquant_decode.cuh"
#include "kquant_formats.cuh"
#include "kquant_warpgroup.cuh"

#define KQUANT_LAYOUT(NAME, L)                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      NAME##_repack(const uint8_t* blocks, int rows, int cols, uint8_t* weights) {                                     \
    repack_stage<L>(blocks, rows, cols, weights);                                                                      \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      NAME##_decode(const uint8_t* weights, void* out, int out_type, int rows, int cols, int stride, int tile0) {      \
    decode_groups<L>(weights, out, out_type, rows, cols, stride, tile0);                                               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) NAME##_ids(const uint8_t* weights, const uint32_t* ids, void* out, \
                                                               int out_type, int rows, int cols, int stride) {         \
    decode_group_ids<L>(weights, ids, out, out_type, rows, cols, stride);                                              \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(BLOCK, 1) NAME##_product_1(const __grid_constant__ Product p) {         \
    narrow_product<L, 1, true>(p);                                                                                     \
  }                                                                                                                    \
  TAPER_PRODUCTS(NAME, L)                                                                                              \
  /* The power of two for each row that the next two need. */                                                          \
  extern "C" __global__ void __launch_bounds__(32) NAME##_row_scales(const uint8_t* blocks, int cols, float* out) {    \
    group_row_scales<L>(blocks, cols, out);                                                                            \
  }                                                                                                                    \
  /* Compute capability 9.0 only (code for sm_90a); elsewhere they do nothing. */                                      \
  extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS, 1)                                                    \
      NAME##_warpgroup_32(const __grid_constant__ Product p) {                                                         \
    group_warpgroup_product<L, 4>(p);                                                                                  \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS, 1)                                                    \
      NAME##_warpgroup_64(const __grid_constant__ Product p) {                                                         \
    group_warpgroup_product<L, 8>(p);                                                                                  \
  }

// The kernels of a layout of kquant.cuh: made from a file's blocks, turned back into weights, multiplied.
#pragma once
#include "entry.cuh"
#include "kquant_decode.cuh"
#include "kquant_few.cuh"
#include "kquant_formats.cuh"
#include "kquant_single.cuh"
#include "kquant_warpgroup.cuh"

// What all of them have: besides the products by columns of activations (entry.cuh) those by rows of bf16 or f16, for
// one and, on compute capability 9.0, for up to 8 and 16. That for one and that for up to 8 take several matrices.
#define BLOCK_LAYOUT(NAME, L)                                                                                          \
  extern "C" __global__ void __launch_bounds__(FEW_BLOCK, 1) NAME##_few_8(const __grid_constant__ Products p) {        \
    const Product mine = p.mine();                                                                                     \
    few_product<L, 1>(mine);                                                                                           \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(FEW_BLOCK, 1) NAME##_few_16(const __grid_constant__ Product p) {        \
    few_product<L, 2>(p);                                                                                              \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(product_block<L>(), 1)                                                  \
      NAME##_product_1(const __grid_constant__ Products p) {                                                           \
    const Product mine = p.mine();                                                                                     \
    single_product<L, SINGLE_EACH, CONSUMER_THREADS * teams<L>()>(mine);                                               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      NAME##_repack(const uint8_t* blocks, int rows, int cols, uint8_t* weights, uint32_t* not_finite) {               \
    repack_stage<L>(blocks, rows, cols, weights, not_finite);                                                          \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      NAME##_decode(const uint8_t* weights, void* out, int out_type, int rows, int cols, int stride, int tile0) {      \
    decode_groups<L>(weights, out, out_type, rows, cols, stride, tile0);                                               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) NAME##_ids(const uint8_t* weights, const uint32_t* ids, void* out, \
                                                               int out_type, int rows, int cols, int stride) {         \
    decode_group_ids<L>(weights, ids, out, out_type, rows, cols, stride);                                              \
  }                                                                                                                    \
  TAPER_PRODUCTS(NAME, L)

// Products of whole warpgroups, for up to 32 and 64 columns of activations. Compute capability 9.0 only (code for
// sm_90a); elsewhere they do nothing.
#define WARPGROUP_PRODUCTS(NAME, L, PRODUCT)                        \
  extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS, 1) \
      NAME##_warpgroup_32(const __grid_constant__ Product p) {      \
    PRODUCT<L, 4>(p);                                               \
  }                                                                 \
  extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS, 1) \
      NAME##_warpgroup_64(const __grid_constant__ Product p) {      \
    PRODUCT<L, 8>(p);                                               \
  }

// Groups of 16 or 32: also the power of two for each row that warpgroups need.
#define KQUANT_LAYOUT(NAME, L)                                                                                      \
  BLOCK_LAYOUT(NAME, L)                                                                                             \
  WARPGROUP_PRODUCTS(NAME, L, group_warpgroup_product)                                                              \
  extern "C" __global__ void __launch_bounds__(32) NAME##_row_scales(const uint8_t* blocks, int cols, float* out) { \
    group_row_scales<L>(blocks, cols, out);                                                                         \
  }

// Groups of 128, a row of a unit.
#define INT4_LAYOUT(NAME, L) \
  BLOCK_LAYOUT(NAME, L)      \
  WARPGROUP_PRODUCTS(NAME, L, warpgroup_product)

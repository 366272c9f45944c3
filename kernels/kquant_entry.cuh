// The kernels of a layout of kquant.cuh: made from a file's blocks, turned back into weights, multiplied.
#pragma once
#include "entry.cuh"
#include "kquant_decode.cuh"
#include "kquant_few.cuh"
#include "kquant_formats.cuh"
#include "kquant_single.cuh"

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

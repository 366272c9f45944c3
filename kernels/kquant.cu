// Layouts of ggml's block formats (kquant.cuh): made from a file's blocks, turned back into weights, multiplied.
#include "kquant_decode.cuh"
#include "kquant_formats.cuh"
#include "kquant_warpgroup.cuh"
#include "product.cuh"
#include "wide.cuh"

using namespace taper;

#define KQUANT_LAYOUT(NAME, L)                                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
      NAME##_repack(const uint8_t* blocks, int rows, int cols, uint8_t* weights) {                                   \
    repack_stage<L>(blocks, rows, cols, weights);                                                                    \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
      NAME##_decode(const uint8_t* weights, void* out, int out_type, int rows, int cols, int stride, int tile0) {    \
    decode_groups<L>(weights, out, out_type, rows, cols, stride, tile0);                                             \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
      NAME##_ids(const uint8_t* weights, const uint32_t* ids, void* out, int out_type, int rows, int cols,           \
                 int stride) {                                                                                       \
    decode_group_ids<L>(weights, ids, out, out_type, rows, cols, stride);                                            \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(BLOCK, 1) NAME##_product_1(const __grid_constant__ Product p) {       \
    narrow_product<L, 1, true>(p);                                                                                   \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(BLOCK, 1) NAME##_product_8(const __grid_constant__ Product p) {       \
    narrow_product<L, 1>(p);                                                                                         \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(BLOCK, 1) NAME##_product_16(const __grid_constant__ Product p) {      \
    narrow_product<L, 2>(p);                                                                                         \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) NAME##_product_32(const __grid_constant__ Product p) { \
    wide_product<L, 4>(p);                                                                                           \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(WIDE_BLOCK, 1) NAME##_product_64(const __grid_constant__ Product p) { \
    wide_product<L, 8>(p);                                                                                           \
  }                                                                                                                  \
  /* The power of two for each row that the next two need. */                                                        \
  extern "C" __global__ void __launch_bounds__(32) NAME##_row_scales(const uint8_t* blocks, int cols, float* out) {  \
    group_row_scales<L>(blocks, cols, out);                                                                          \
  }                                                                                                                  \
  /* Compute capability 9.0 only (code for sm_90a); elsewhere they do nothing. */                                    \
  extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS, 1)                                                  \
      NAME##_warpgroup_32(const __grid_constant__ Product p) {                                                       \
    group_warpgroup_product<L, 4>(p);                                                                                \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS, 1)                                                  \
      NAME##_warpgroup_64(const __grid_constant__ Product p) {                                                       \
    group_warpgroup_product<L, 8>(p);                                                                                \
  }

KQUANT_LAYOUT(q4_k, LayoutQ4K)
KQUANT_LAYOUT(q5_k, LayoutQ5K)
KQUANT_LAYOUT(q6_k, LayoutQ6K)
KQUANT_LAYOUT(q8_0, LayoutQ80)
#ifndef FEW_FORMATS
KQUANT_LAYOUT(q2_k, LayoutQ2K)
KQUANT_LAYOUT(q3_k, LayoutQ3K)
KQUANT_LAYOUT(q4_0, LayoutQ40)
KQUANT_LAYOUT(q4_1, LayoutQ41)
KQUANT_LAYOUT(q5_0, LayoutQ50)
KQUANT_LAYOUT(q5_1, LayoutQ51)
#endif

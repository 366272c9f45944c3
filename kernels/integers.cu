// Layouts `int8`, `int5`, `int4` (integers.cuh): made from dense bf16 integers, turned back into weights, multiplied.
#include "decode_rows.cuh"
#include "entry.cuh"
#include "ids.cuh"
#include "integers.cuh"

using namespace taper;

#define INTEGER_LAYOUT(NAME, L)                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                             \
      NAME##_plan(const uint16_t* dense, int rows, int cols, int stride, uint4* plan) {                         \
    plan_repairs<L>(dense, rows, cols, stride, plan);                                                           \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                                             \
      NAME##_pack(const uint16_t* dense, int rows, int cols, int stride, const float* scales, int scale_stride, \
                  int row0, const uint4* plan, uint8_t* weights, uint32_t* overflow, uint32_t capacity) {       \
    pack_integers<L>(dense, rows, cols, stride, scales, scale_stride, row0, plan, weights, overflow, capacity); \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256, DECODE_BLOCKS)                                              \
      NAME##_decode(const uint8_t* weights, const uint32_t* overflow, const float* row_scale, uint16_t* out,    \
                    int out_type, int rows, int cols, int stride, int tile0) {                                  \
    decode_rows<L>(weights, overflow, {out, rows, cols, stride, tile0}, row_scale, out_type);                   \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                                             \
      NAME##_ids(const uint8_t* weights, const uint32_t* overflow, const float* row_scale, const uint32_t* ids, \
                 float* out, int rows, int cols, int stride) {                                                  \
    decode_ids<L>(weights, overflow, ids, out, rows, cols, stride, row_scale);                                  \
  }                                                                                                             \
  TAPER_PRODUCTS(NAME, L)

INTEGER_LAYOUT(int8, Int8)
INTEGER_LAYOUT(int5, IntN<5>)
INTEGER_LAYOUT(int4, IntN<4>)

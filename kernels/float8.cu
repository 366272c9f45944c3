// Layouts `e4m3`, `e5m2` (float8.cuh): made from dense bf16 rows, turned back into them, multiplied.
#include "float8.cuh"
#include "floats.cuh"

using namespace taper;

#define FLOAT8_LAYOUT(NAME, L)                                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                                           \
      NAME##_plan(const uint16_t* dense, int rows, int cols, int stride, uint4* plan) {                       \
    plan_repairs<L>(dense, rows, cols, stride, plan);                                                         \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256)                                                           \
      NAME##_pack(const uint16_t* dense, int rows, int cols, int stride, const uint4* plan, uint8_t* weights, \
                  uint32_t* overflow, uint32_t capacity) {                                                    \
    pack_bytes<L>(dense, rows, cols, stride, plan, weights, overflow, capacity);                              \
  }                                                                                                           \
  FLOAT_LAYOUT(NAME, L)

FLOAT8_LAYOUT(e4m3, E4M3)
FLOAT8_LAYOUT(e5m2, E5M2)

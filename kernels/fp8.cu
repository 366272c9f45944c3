// Products of 4-bit integers in groups of 128 with activations rounded to e4m3 (fp8.cuh).
#include "fp8.cuh"
#include "kquant_formats.cuh"

using namespace taper;

FP8_ARRANGE

#define FP8_PRODUCT(N, S)                                                                                             \
  extern "C" __global__ void __launch_bounds__(PREFILL_BLOCK, 1) fp8_product_##N(const __grid_constant__ Prefill p) { \
    fp8_product<LayoutInt4G128, N, S>(p);                                                                             \
  }
FP8_PRODUCT(64, 64)
FP8_PRODUCT(128, 128)
FP8_PRODUCT(256, 64)

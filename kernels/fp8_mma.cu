// Products of 4-bit integers in groups of 128 with activations rounded to e4m3, without warpgroups (fp8_mma.cuh).
#include "fp8_mma.cuh"
#include "kquant_formats.cuh"

using namespace taper;

FP8_ARRANGE

#define FP8_MMA_PRODUCT(N)                                       \
  extern "C" __global__ void __launch_bounds__(FP8_MMA_BLOCK, 1) \
      fp8_mma_product_##N(const __grid_constant__ Prefill p) {   \
    fp8_mma_product<LayoutInt4G128, N>(p);                       \
  }
FP8_MMA_PRODUCT(64)
FP8_MMA_PRODUCT(128)

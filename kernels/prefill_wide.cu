// Products of layout `fixed` with very many columns of activations (prefill_wide.cuh).
#include "fixed.cuh"
#include "prefill_wide.cuh"

using namespace taper;

extern "C" __global__ void __launch_bounds__(256) prefill_arrange(const __grid_constant__ Arrange p) { arrange(p); }

extern "C" __global__ void __launch_bounds__(PREFILL_WIDE_BLOCK, 1)
    fixed_prefill_192(const __grid_constant__ Prefill p) {
  prefill_wide_product<Fixed, 192>(p);
}
extern "C" __global__ void __launch_bounds__(PREFILL_WIDE_BLOCK, 1)
    fixed_prefill_256(const __grid_constant__ Prefill p) {
  prefill_wide_product<Fixed, 256>(p);
}

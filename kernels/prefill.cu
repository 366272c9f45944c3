// Products of layout `fixed` with many columns of activations (prefill.cuh).
#include "fixed.cuh"
#include "prefill.cuh"

using namespace taper;

extern "C" __global__ void __launch_bounds__(256) prefill_arrange(const __grid_constant__ Arrange p) { arrange(p); }

extern "C" __global__ void __launch_bounds__(PREFILL_BLOCK, 1) fixed_prefill_128(const __grid_constant__ Prefill p) {
  prefill_product<Fixed, 128>(p);
}
extern "C" __global__ void __launch_bounds__(PREFILL_BLOCK, 1) fixed_prefill_192(const __grid_constant__ Prefill p) {
  prefill_product<Fixed, 192>(p);
}
extern "C" __global__ void __launch_bounds__(PREFILL_BLOCK, 1) fixed_prefill_256(const __grid_constant__ Prefill p) {
  prefill_product<Fixed, 256>(p);
}

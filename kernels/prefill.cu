// Products of layout `fixed` with many columns of activations (prefill.cuh).
#include "fixed.cuh"
#include "prefill_entry.cuh"
#include "prefill_pad.cuh"

using namespace taper;

extern "C" __global__ void __launch_bounds__(256) prefill_pad(const __grid_constant__ Pad p) { pad_row(p); }

PREFILL(fixed, Fixed, 32)
PREFILL(fixed, Fixed, 64)
PREFILL(fixed, Fixed, 128)
PREFILL_PARTS(fixed, Fixed, 32, 2)
PREFILL_PARTS(fixed, Fixed, 32, 3)
PREFILL_PARTS(fixed, Fixed, 64, 2)
PREFILL_PARTS(fixed, Fixed, 64, 3)
PREFILL_PARTS(fixed, Fixed, 128, 2)
PREFILL_PARTS(fixed, Fixed, 128, 3)

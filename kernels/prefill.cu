// Products of layout `fixed` with many columns of activations (prefill.cuh).
#include "prefill_entry.cuh"

using namespace taper;

PREFILL(fixed, Fixed, 128)
PREFILL(fixed, Fixed, 192)
PREFILL(fixed, Fixed, 256)

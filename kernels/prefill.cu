// Products of layout `fixed` with many columns of activations (prefill.cuh).
#include "prefill_entry.cuh"

using namespace taper;

PREFILLS(fixed, Fixed)

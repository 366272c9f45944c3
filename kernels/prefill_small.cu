// Products of ggml's blocks of 32 weights, and of 4-bit integers in groups of 128, with many columns of activations
// (prefill.cuh).
#include "kquant_formats.cuh"
#include "prefill_entry.cuh"

using namespace taper;

#define KQUANT_PREFILL(NAME, L) PREFILL(NAME, L, 64) PREFILL(NAME, L, 128)
KQUANT_PREFILL(q8_0, LayoutQ80)
KQUANT_PREFILL(q4_0, LayoutQ40)
KQUANT_PREFILL(q4_1, LayoutQ41)
KQUANT_PREFILL(q5_0, LayoutQ50)
KQUANT_PREFILL(q5_1, LayoutQ51)
KQUANT_PREFILL(int4_g128, LayoutInt4G128)

// Products of ggml's blocks of 32 weights, and of 4-bit integers in groups of 128, with many columns of activations
// (prefill.cuh).
#include "kquant_formats.cuh"
#include "prefill_entry.cuh"

using namespace taper;

PREFILLS(q8_0, LayoutQ80)
PREFILLS(q4_0, LayoutQ40)
PREFILLS(q4_1, LayoutQ41)
PREFILLS(q5_0, LayoutQ50)
PREFILLS(q5_1, LayoutQ51)
PREFILLS(int4_g128, LayoutInt4G128)

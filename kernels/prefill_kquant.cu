// Products of ggml's blocks of 256 weights with many columns of activations (prefill.cuh).
#include "kquant_formats.cuh"
#include "prefill_entry.cuh"

using namespace taper;

#define KQUANT_PREFILL(NAME, L) PREFILL(NAME, L, 64) PREFILL(NAME, L, 128)
KQUANT_PREFILL(q4_k, LayoutQ4K)
KQUANT_PREFILL(q5_k, LayoutQ5K)
KQUANT_PREFILL(q6_k, LayoutQ6K)
KQUANT_PREFILL(q2_k, LayoutQ2K)
KQUANT_PREFILL(q3_k, LayoutQ3K)

// Products of ggml's superblocks of 256 weights with many columns of activations (prefill.cuh).
#include "kquant_formats.cuh"
#include "prefill_entry.cuh"

using namespace taper;

PREFILLS(q4_k, LayoutQ4K)
PREFILLS(q5_k, LayoutQ5K)
PREFILLS(q6_k, LayoutQ6K)
PREFILLS(q2_k, LayoutQ2K)
PREFILLS(q3_k, LayoutQ3K)

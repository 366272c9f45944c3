// Layouts of ggml's blocks of 256 weights.
#include "kquant_entry.cuh"

using namespace taper;

KQUANT_LAYOUT(q4_k, LayoutQ4K)
KQUANT_LAYOUT(q5_k, LayoutQ5K)
KQUANT_LAYOUT(q6_k, LayoutQ6K)
KQUANT_LAYOUT(q2_k, LayoutQ2K)
KQUANT_LAYOUT(q3_k, LayoutQ3K)

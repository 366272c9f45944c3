// Layouts of ggml's blocks of 256 weights.
#include "kquant_entry.cuh"

using namespace taper;

BLOCK_LAYOUT(q4_k, LayoutQ4K)
BLOCK_LAYOUT(q5_k, LayoutQ5K)
BLOCK_LAYOUT(q6_k, LayoutQ6K)
BLOCK_LAYOUT(q2_k, LayoutQ2K)
BLOCK_LAYOUT(q3_k, LayoutQ3K)

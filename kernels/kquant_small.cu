// Layouts of ggml's blocks of 32 weights, and of 4-bit integers in groups of 128.
#include "kquant_entry.cuh"

using namespace taper;

BLOCK_LAYOUT(q8_0, LayoutQ80)
BLOCK_LAYOUT(q4_0, LayoutQ40)
BLOCK_LAYOUT(q4_1, LayoutQ41)
BLOCK_LAYOUT(q5_0, LayoutQ50)
BLOCK_LAYOUT(q5_1, LayoutQ51)
BLOCK_LAYOUT(int4_g128, LayoutInt4G128)

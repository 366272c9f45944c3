// Layouts of ggml's blocks of 32 weights, and of 4-bit integers in groups of 128.
#include "kquant_entry.cuh"

using namespace taper;

KQUANT_LAYOUT(q8_0, LayoutQ80)
KQUANT_LAYOUT(q4_0, LayoutQ40)
KQUANT_LAYOUT(q4_1, LayoutQ41)
KQUANT_LAYOUT(q5_0, LayoutQ50)
KQUANT_LAYOUT(q5_1, LayoutQ51)
INT4_LAYOUT(int4_g128, LayoutInt4G128)

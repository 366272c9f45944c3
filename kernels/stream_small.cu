// Products of ggml's blocks of 32 weights, and of 4-bit integers in groups of 128, with some columns of activations
// (stream.cuh).
#include "kquant_formats.cuh"
#include "stream_entry.cuh"

using namespace taper;

BLOCK_STREAMS(q8_0, LayoutQ80)
BLOCK_STREAMS(q4_0, LayoutQ40)
BLOCK_STREAMS(q4_1, LayoutQ41)
BLOCK_STREAMS(q5_0, LayoutQ50)
BLOCK_STREAMS(q5_1, LayoutQ51)
STREAM(int4_g128, LayoutInt4G128, 32, 4)
STREAM(int4_g128, LayoutInt4G128, 64, 3)

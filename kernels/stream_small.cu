// Products of ggml's blocks of 32 weights, and of 4-bit integers in groups of 128, with some columns of activations
// (stream.cuh).
#include "kquant_formats.cuh"
#include "stream_entry.cuh"

using namespace taper;

STREAMS(q8_0, LayoutQ80)
STREAMS(q4_0, LayoutQ40)
STREAMS(q4_1, LayoutQ41)
STREAMS(q5_0, LayoutQ50)
STREAMS(q5_1, LayoutQ51)
STREAMS(int4_g128, LayoutInt4G128)

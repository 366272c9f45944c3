// Products of ggml's superblocks of 256 weights with some columns of activations (stream.cuh).
#include "kquant_formats.cuh"
#include "stream_entry.cuh"

using namespace taper;

STREAMS(q4_k, LayoutQ4K)
STREAMS(q5_k, LayoutQ5K)
STREAMS(q6_k, LayoutQ6K)
STREAMS(q2_k, LayoutQ2K)
STREAMS(q3_k, LayoutQ3K)

// Products of ggml's superblocks of 256 weights with some columns of activations (stream.cuh).
#include "kquant_formats.cuh"
#include "stream_entry.cuh"

using namespace taper;

BLOCK_STREAMS(q4_k, LayoutQ4K)
BLOCK_STREAMS(q5_k, LayoutQ5K)
BLOCK_STREAMS(q6_k, LayoutQ6K)
BLOCK_STREAMS(q2_k, LayoutQ2K)
BLOCK_STREAMS(q3_k, LayoutQ3K)

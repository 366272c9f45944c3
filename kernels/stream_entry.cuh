// The kernels of a layout for some columns of activations (stream.cuh).
#pragma once
#include "stream.cuh"

#define STREAM(NAME, L, N, WGS)                                                    \
  extern "C" __global__ void __launch_bounds__(taper::Stream<L, N, WGS>::BLOCK, 1) \
      NAME##_stream_##N(const __grid_constant__ taper::Prefill p) {                \
    taper::stream_product<L, N, WGS>(p);                                           \
  }
// Formats of blocks, whose weights are rounded.
#define BLOCK_STREAMS(NAME, L) STREAM(NAME, L, 32, 4) STREAM(NAME, L, 64, 4)

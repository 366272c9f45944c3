// The kernels of a layout for many columns of activations (prefill.cuh).
#pragma once
#include "prefill.cuh"

#define PREFILL(NAME, L, N)                                             \
  extern "C" __global__ void __launch_bounds__(taper::PREFILL_BLOCK, 1) \
      NAME##_prefill_##N(const __grid_constant__ taper::Prefill p) {    \
    taper::prefill_product<L, N>(p);                                    \
  }
#define PREFILLS(NAME, L) PREFILL(NAME, L, 128) PREFILL(NAME, L, 192) PREFILL(NAME, L, 256)

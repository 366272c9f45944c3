// The kernels of a layout for many columns of activations.
#pragma once
#include "prefill.cuh"

constexpr int CLUSTER = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define CLUSTERS(SIZE)
#else
#define CLUSTERS(SIZE) __cluster_dims__(SIZE)
#endif
#define PREFILL(NAME, L, N)                                                                          \
  extern "C" __global__ void CLUSTERS(CLUSTER) __launch_bounds__(PREFILL_BLOCK<N>, 1)                \
      NAME##_prefill_##N(const __grid_constant__ TensorMap map, const __grid_constant__ Prefill p) { \
    prefill_product<L, N, CLUSTER>(map, p);                                                          \
  }
// A cluster for each block of the product.
#define PREFILL_PARTS(NAME, L, N, PARTS)                                                                          \
  extern "C" __global__ void CLUSTERS(PARTS) __launch_bounds__(PREFILL_BLOCK<N>, 1)                               \
      NAME##_prefill_##N##_in_##PARTS(const __grid_constant__ TensorMap map, const __grid_constant__ Prefill p) { \
    prefill_product<L, N, 1, PARTS>(map, p);                                                                      \
  }

// Rows of bf16 activations with another stride, for tensor copies, which take multiples of 16 bytes.
//
// Launch   a block of 256 threads for each row.
#pragma once
#include "ptx.cuh"

namespace taper {

struct Pad {
  const uint16_t* x;
  uint16_t* out;
  int x_stride, out_stride, cols;
};

__device__ __forceinline__ void pad_row(const Pad& p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const uint16_t* from = p.x + (size_t)blockIdx.x * p.x_stride;
  for (int k = threadIdx.x; k < p.out_stride; k += 256)
    p.out[(size_t)blockIdx.x * p.out_stride + k] = k < p.cols ? from[k] : 0;
}

}  // namespace taper

// The kernels that all layouts of bf16 numbers have besides those that make them.
#pragma once
#include "decode_rows.cuh"
#include "entry.cuh"
#include "ids.cuh"

// decode: dense rows again (decode_rows.cuh); out's first row is row 16 tile0. ids: row ids[i] to row i of out; grid: ids,
// stages.
#define FLOAT_LAYOUT(NAME, L)                                                                                       \
  extern "C" __global__ void __launch_bounds__(256, DECODE_BLOCKS) NAME##_decode(                                   \
      const uint8_t* weights, const uint32_t* overflow, uint16_t* out, int rows, int cols, int stride, int tile0) { \
    decode_rows<L>(weights, overflow, {out, rows, cols, stride, tile0});                                            \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                                 \
      NAME##_ids(const uint8_t* weights, const uint32_t* overflow, const uint32_t* ids, uint16_t* out, int rows,    \
                 int cols, int stride) {                                                                            \
    decode_ids<L>(weights, overflow, ids, out, rows, cols, stride);                                                 \
  }                                                                                                                 \
  TAPER_PRODUCTS(NAME, L)                                                                                           \
  TAPER_TEAM_PRODUCTS(NAME, L)

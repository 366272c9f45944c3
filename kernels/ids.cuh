// Rows of a table by their ids, from any layout of unit.cuh: a block takes one id and one stage, a warp one unit. A unit holds 16
// rows and one of them is wanted; a few ids a token make that cheap enough.
#pragma once
#include "unit.cuh"

namespace taper {

// Row `ids[i]` to row `i` of `out` (bf16; of layouts with scales f32), whose rows are `stride` elements apart. Grid: ids, stages. An id outside the table gives zeros.
template <class L, class Out>
__device__ __forceinline__ void decode_ids(const uint8_t* weights, const uint32_t* overflow, const uint32_t* ids, Out* out, int rows, int cols,
                                           int stride, const float* row_scale = nullptr) {
  __shared__ __align__(16) uint8_t memory[8][L::UNIT_BYTES + L::TRAILER];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const Shape<L> shape(rows, cols);
  const uint32_t id = ids[blockIdx.x];
  const int stage = blockIdx.y, tile = (int)(id / TILE_ROWS), row = (int)(id % TILE_ROWS), units = shape.units_of(stage);
  Out* line = out + (size_t)blockIdx.x * stride;
  if (id >= (uint32_t)rows) {
    const int first = stage * L::UNITS * UNIT_COLS, last = min(cols, first + L::UNITS * UNIT_COLS);
    for (int k = first + threadIdx.x; k < last; k += blockDim.x) line[k] = 0;
    return;
  }
  const uint8_t* src = weights + tile * shape.tile_bytes() + stage * Shape<L>::stage_bytes();
  const uint32_t at = shared_address(memory[warp]);
  for (int u = warp; u < units; u += 8) {
    for (int i = lane; i < L::UNIT_BYTES / 16; i += 32) async_copy16(at + 16 * i, src + u * L::UNIT_BYTES + 16 * i);
    for (int i = lane; i < L::TRAILER / 16; i += 32) async_copy16(at + L::UNIT_BYTES + 16 * i, src + units * L::UNIT_BYTES + 16 * i);
    async_commit();
    async_wait<0>();
    __syncwarp();
    float scale = 1;
    if constexpr (L::SCALED) scale = L::unit_scale(at + L::UNIT_BYTES, u) * (row_scale ? row_scale[id] : 1.0f);
    const int col = (stage * L::UNITS + u) * UNIT_COLS + t * 8;
    decode_unit<L>(at, at + L::UNIT_BYTES, u, lane, overflow, [&](int j, const uint32_t (&a)[8]) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (g + 8 * h != row) continue;
#pragma unroll
        for (int e = 0; e < 8; e++) {
          const int k = col + 32 * j + e;
          if (k >= cols) continue;
          const uint32_t value = a[2 * (e / 2) + h] >> 16 * (e & 1) & 0xFFFF;
          if constexpr (L::SCALED) line[k] = __uint_as_float(value << 16) * scale;
          else line[k] = (uint16_t)value;
        }
      }
    });
    __syncwarp();
  }
}

}  // namespace taper

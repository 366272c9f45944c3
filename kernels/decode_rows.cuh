// Units of the layouts of unit.cuh to dense rows.
//
// A block takes a stage, each warp a unit: from memory to registers as lanes multiply it, decoded into rows in shared
// memory, repaired there, and stored by 256 bytes of two rows at a time.
//
// Budget of a unit: what decoding takes (see the layouts), 8 stores to shared memory, 8 loads, 8 stores, some 70
// instructions besides. 32 warps of a multiprocessor have up to 3 KB each on their way; 40 are no faster. What bounds it
// is memory: of an H200's 4.45 TB/s, `fixed` moves 4.0 (reading 1.5 bytes a weight, writing 2), a copy of as much 4.3.
//
// Launch: grid stages of a tile x tiles, block 256.
#pragma once
#include "activations.cuh"
#include "unit.cuh"

namespace taper {

constexpr int DECODE_BLOCKS = 4;               // of a multiprocessor
constexpr int ROW_BYTES = 2 * UNIT_COLS + 64;  // in shared memory: eights of neighbouring rows lie in different banks

// Where rows go: `out` is row 16 tile0 of the matrix, its rows are `stride` elements apart.
struct DenseRows {
  uint16_t* out;
  int rows, cols, stride, tile0;  // rows and columns of the matrix
};

// The two weights of a register, scaled and rounded.
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, float scale, int out_type) {
  const float lo = __uint_as_float(pair << 16) * scale, hi = __uint_as_float(pair & 0xFFFF0000u) * scale;
  return two_rounded(lo, hi, out_type);
}

// Scaled layouts are multiplied in f32 and rounded to out_type once.
template <class L>
__device__ __forceinline__ void decode_rows(const uint8_t* weights, const uint32_t* overflow, const DenseRows& to,
                                            const float* row_scale = nullptr, int out_type = BF16) {
  __shared__ __align__(16) uint8_t memory[8][TILE_ROWS * ROW_BYTES];
  const int lane = threadIdx.x & 31, u = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const Shape<L> shape(to.rows, to.cols);
  const int stage = blockIdx.x, tile = to.tile0 + blockIdx.y, units = shape.units_of(stage);
  let_next_kernel_start();
  if (u >= units) return;
  const uint8_t* const from = weights + tile * shape.tile_bytes() + stage * Shape<L>::stage_bytes();
  const uint8_t* const trailer = from + units * L::UNIT_BYTES;
  typename L::Unit unit;
  unit.fetch(from + u * L::UNIT_BYTES, trailer + 8, u, lane, evict_first_policy());
  // Lanes past the list look at the overflow count.
  const uint32_t entry = __ldg((const uint32_t*)(lane < ENTRIES ? trailer + 8 + L::EXTRA + 4 * lane : trailer));
  wait_for_previous_kernel();  // which may still be reading what `out` held

  const int rows = to.rows - tile * TILE_ROWS;  // from here to the matrix's end
  const auto scale = [&](int row) {
    float s = 1;
    if constexpr (L::SCALED) {
      s = L::unit_scale(trailer, u);
      if (row_scale && row < rows) s *= __ldg(row_scale + tile * TILE_ROWS + row);
    }
    return s;
  };
  const uint32_t mine = shared_address(memory[u]), place = mine + g * ROW_BYTES + 16 * t;
  const float scales[2] = {scale(g), scale(g + 8)};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    unit.vector(j, a);
    if constexpr (L::SCALED) {
#pragma unroll
      for (int p = 0; p < 8; p++) a[p] = scale_pair(a[p], scales[p & 1], out_type);
    }
    sts128(place + 64 * j, make_uint4(a[0], a[2], a[4], a[6]));
    sts128(place + 64 * j + 8 * ROW_BYTES, make_uint4(a[1], a[3], a[5], a[7]));
  }
  __syncwarp();
  if (__any_sync(~0u, lane < ENTRIES ? repairs_unit(entry, u) : entry != 0)) {
    const auto patch = [&](uint32_t e) {
      if (!repairs_unit(e, u)) return;
      const RepairPlace at(e & 2047);
      uint32_t value = e >> 16;
      if constexpr (L::SCALED) value = scale_pair(value, scale(at.row), out_type);
      sts16(mine + at.row * ROW_BYTES + 2 * at.col, value & 0xFFFF);
    };
    if (lane < ENTRIES) patch(entry);
    const uint32_t count = __ldg((const uint32_t*)trailer), offset = __ldg((const uint32_t*)trailer + 1);
    for (uint32_t i = lane; i < count; i += 32) patch(__ldg(overflow + offset + i));
    __syncwarp();
  }

  const int first = lane >> 4, col = 8 * (lane & 15), cols = to.cols - (stage * L::UNITS + u) * UNIT_COLS - col;
  uint16_t* const out = to.out + ((size_t)blockIdx.y * TILE_ROWS + first) * to.stride + (to.cols - cols);
  uint4 eights[TILE_ROWS / 2];
#pragma unroll
  for (int i = 0; i < TILE_ROWS / 2; i++) eights[i] = lds128(mine + (first + 2 * i) * ROW_BYTES + 2 * col);
  if (rows >= TILE_ROWS && cols + col >= UNIT_COLS && ((size_t)to.out & 15) == 0 && to.stride % 8 == 0) {
#pragma unroll
    for (int i = 0; i < TILE_ROWS / 2; i++) stg128(out + (size_t)(2 * i) * to.stride, eights[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < TILE_ROWS / 2; i++) {
    const uint32_t pairs[4] = {eights[i].x, eights[i].y, eights[i].z, eights[i].w};
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (first + 2 * i < rows && e < cols)
        out[(size_t)(2 * i) * to.stride + e] = (uint16_t)(pairs[e / 2] >> 16 * (e & 1));
  }
}

}  // namespace taper

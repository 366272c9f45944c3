// From the layouts of kquant.cuh to dense rows: of a matrix, or those that ids ask for. Values are ggml's, to the last
// bit, rounded once to the type wanted.
#pragma once
#include "kquant.cuh"

namespace taper {

// Copies unit `u` of a stage and the stage's trailer, warp by warp.
template <class L>
__device__ __forceinline__ void fetch_unit(uint32_t to, const uint8_t* stage, int units, int u, int lane) {
  const uint64_t policy = evict_first_policy();
  for (int i = lane; i < L::UNIT_BYTES / 16; i += 32)
    async_copy16(to + 16 * i, stage + u * L::UNIT_BYTES + 16 * i, policy);
  for (int i = lane; i < L::TRAILER / 16; i += 32)
    async_copy16(to + L::UNIT_BYTES + 16 * i, stage + units * L::UNIT_BYTES + 16 * i);
  async_commit();
}

// Neighbouring weights of a lane: 16 bytes of 16-bit values, or 8.
template <class L>
constexpr int RUN = L::GROUP == 16 ? 4 : 8;

// Calls use(h, column in the unit, RUN weights) for each run of the lane's.
template <class L, class Use>
__device__ __forceinline__ void unit_values(uint32_t at, int u, int lane, Use use) {
  constexpr int N = RUN<L>;
  const int g = lane >> 2, t = lane & 3;
  typename L::S scales;
  scales.load(at + L::C::BYTES, at + L::UNIT_BYTES, u, g);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    L::C::expand(L::C::load(at, lane, j), TWO_128, a);
#pragma unroll
    for (int run = 0; run < 8 / N; run++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float scale, min, v[N];
        scales.template of<true>(L::GROUP == 16 ? 2 * j + run : j, h, scale, min);
#pragma unroll
        for (int e = 0; e < N; e++) {
          const uint32_t two = a[4 * run + 2 * (e / 2) + h];
          v[e] = L::value(__uint_as_float(e & 1 ? two & 0xFFFF0000u : two << 16), scale, min);
        }
        use(h, 32 * j + column_of<L::GROUP>(4 * run, t), v);
      }
  }
}

// N neighbouring values of a row of `cols`, the first at column k.
template <int N>
__device__ __forceinline__ void store_run(void* row, int k, int cols, int type, bool aligned, const float (&v)[N]) {
  if (!aligned || k + N > cols) {
#pragma unroll
    for (int e = 0; e < N; e++)
      if (k + e < cols) store_value(row, k + e, type, v[e]);
  } else if (type == F32) {
#pragma unroll
    for (int e = 0; e < N; e += 4) *(float4*)((float*)row + k + e) = make_float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
  } else {
    uint32_t w[N / 2];
#pragma unroll
    for (int e = 0; e < N; e += 2) w[e / 2] = two_rounded(v[e], v[e + 1], type);
    if constexpr (N == 8)
      *(uint4*)((uint16_t*)row + k) = make_uint4(w[0], w[1], w[2], w[3]);
    else
      *(uint2*)((uint16_t*)row + k) = make_uint2(w[0], w[1]);
  }
}

// One stage, a warp for each unit. `tile0` and the grid choose the tiles; out's first row is row 16 tile0.
template <class L>
__device__ __forceinline__ void decode_groups(const uint8_t* weights, void* out, int type, int rows, int cols,
                                              int stride, int tile0) {
  __shared__ __align__(16) uint8_t memory[8][L::UNIT_BYTES + L::TRAILER];
  const int lane = threadIdx.x & 31, u = threadIdx.x >> 5, size = type == F32 ? 4 : 2;
  const Shape<L> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = tile0 + blockIdx.x / shape.stages, units = shape.units_of(stage);
  const bool aligned = (((size_t)out | (size_t)((long long)stride * size)) & 15) == 0;
  let_next_kernel_start();
  if (u >= units) return;
  const uint32_t at = shared_address(memory[u]);
  fetch_unit<L>(at, weights + tile * shape.tile_bytes() + stage * Shape<L>::stage_bytes(), units, u, lane);
  wait_for_previous_kernel();  // which may still be reading what `out` held
  async_wait<0>();
  __syncwarp();
  unit_values<L>(at, u, lane, [&](int h, int col, const float (&v)[RUN<L>]) {
    const int row = tile * TILE_ROWS + (lane >> 2) + 8 * h, k = (stage * L::UNITS + u) * UNIT_COLS + col;
    if (row < rows)
      store_run((uint8_t*)out + (size_t)(row - tile0 * TILE_ROWS) * stride * size, k, cols, type, aligned, v);
  });
}

// Row ids[i] to row i of out. Grid: ids, stages. An id outside the table gives zeros.
template <class L>
__device__ __forceinline__ void decode_group_ids(const uint8_t* weights, const uint32_t* ids, void* out, int type,
                                                 int rows, int cols, int stride) {
  __shared__ __align__(16) uint8_t memory[8][L::UNIT_BYTES + L::TRAILER];
  const int lane = threadIdx.x & 31, u = threadIdx.x >> 5, size = type == F32 ? 4 : 2;
  const Shape<L> shape(rows, cols);
  const uint32_t id = ids[blockIdx.x];
  const int stage = blockIdx.y, units = shape.units_of(stage), first = (stage * L::UNITS + u) * UNIT_COLS;
  uint8_t* line = (uint8_t*)out + (size_t)blockIdx.x * stride * size;
  if (u >= units) return;
  if (id >= (uint32_t)rows) {
    for (int k = first + lane; k < min(cols, first + UNIT_COLS); k += 32) store_value(line, k, type, 0);
    return;
  }
  const uint32_t at = shared_address(memory[u]);
  fetch_unit<L>(at, weights + id / TILE_ROWS * shape.tile_bytes() + stage * Shape<L>::stage_bytes(), units, u, lane);
  async_wait<0>();
  __syncwarp();
  unit_values<L>(at, u, lane, [&](int h, int col, const float (&v)[RUN<L>]) {
    if ((lane >> 2) + 8 * h == (int)(id % TILE_ROWS)) store_run(line, first + col, cols, type, false, v);
  });
}

}  // namespace taper

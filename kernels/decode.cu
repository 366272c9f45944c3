// Tile streams to memory: whole rows of a matrix, or the rows of an embedding's table that ids ask for.
//
// A block takes one tile, each of its four warps one band (64 rows). This is the readable reference: everything about a
// matrix is decided at run time, by branches that all threads take alike; BF16 matrices as they usually are have kernels of their
// own. Those whose columns are a multiple of 64 are decoded by rans.cu.
#include "tile_bf16.cuh"
#include "tile_block.cuh"

namespace {

using namespace taper;

__device__ void decode_rows(const uint8_t *bytes, const Plan &plan, uint32_t first, uint32_t rows, uint8_t *out, uint64_t stride,
                            uint32_t *status) {
    const Bytes stream = {bytes, plan.total};
    const TileBlock block(plan, stream);
    const uint32_t tile_row = first / TILE + blockIdx.y, band = threadIdx.x / 32;
    const uint32_t row = tile_row * TILE + band * BAND_ROWS, last = first + rows;
    if (row >= min(last, plan.rows) || row + BAND_ROWS <= first) return;
    const uint32_t from = max(row, first) - row, to = min(row + BAND_ROWS, last) - row;
    const uint32_t left = blockIdx.x * TILE;
    uint8_t *line = out + (uint64_t)(row + from - first) * stride + (uint64_t)left * dtype_bytes(plan.out);
    ToRows sink = {plan, line, stride, from, to, min(TILE, plan.cols - left)};
    decode_band(plan, stream, block.table, block.map, block.buffer, tile_row * plan.tile_cols + blockIdx.x, band, sink, status);
}

// Writes rows [from, to) of a band, the first to `out`, `stride` bytes apart.
struct EightsToRows {
    uint8_t *out;
    uint64_t stride;
    uint32_t from, to;

    __device__ void write(uint32_t, uint32_t row, uint32_t col, uint4 weights) const {
        if (row < from || row >= to) return;
        uint8_t *const place = out + (row - from) * stride + 2 * col;
        if ((uintptr_t)place % 16 == 0) {
            *(uint4 *)place = weights;
            return;
        }
        const uint32_t pairs[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
        for (uint32_t k = 0; k < 8; k++) ((uint16_t *)place)[k] = (uint16_t)(pairs[k / 2] >> 16 * (k % 2));
    }
    __device__ void group(uint32_t) const {}
};

template <bool LEVELS>
__device__ void decode_bf16_rows(const uint8_t *bytes, const Plan &plan, uint32_t first, uint32_t rows, uint8_t *out,
                                 uint64_t stride, uint32_t *status) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Bytes stream = {bytes, plan.total};
    build_bf16_tables(plan, stream, shared);
    const uint32_t tile_row = first / TILE + blockIdx.y, band = threadIdx.x / 32;
    const uint32_t row = tile_row * TILE + band * BAND_ROWS, last = first + rows;
    if (row >= min(last, plan.rows) || row + BAND_ROWS <= first) return;
    const uint32_t from = max(row, first) - row, to = min(row + BAND_ROWS, last) - row;
    EightsToRows sink = {out + (uint64_t)(row + from - first) * stride + blockIdx.x * TILE * 2, stride, from, to};
    decode_bf16<LEVELS>(plan, stream, shared, shared + BF16_TABLES + band * BF16_BUFFER, tile_row * plan.tile_cols + blockIdx.x,
                        band, sink, status);
}

} // namespace

// Rows [first, first + rows) to `out`, `stride` bytes apart. Grid: tile columns, tile rows that the range touches.
extern "C" __global__ void __launch_bounds__(128) taper_decode_rows(const uint8_t *bytes, const __grid_constant__ Plan plan, uint32_t first,
                                                                    uint32_t rows, uint8_t *out, uint64_t stride,
                                                                    uint32_t *status) {
    decode_rows(bytes, plan, first, rows, out, stride, status);
}

// The same for what tile_bf16.cuh is for, to BF16.
#define BF16_ROWS(NAME, LEVELS)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, 8) NAME(const uint8_t *bytes, const __grid_constant__ Plan plan,           \
                                                              uint32_t first, uint32_t rows, uint8_t *out, uint64_t stride,      \
                                                              uint32_t *status) {                                                \
        decode_bf16_rows<LEVELS>(bytes, plan, first, rows, out, stride, status);                                                 \
    }
BF16_ROWS(taper_decode_rows_bf16, false)
BF16_ROWS(taper_decode_rows_bf16_levels, true)

// Row `ids[i]` to row `i` of `out`. Grid: tile columns, ids in fours. An id outside the table gives zeros.
extern "C" __global__ void __launch_bounds__(128) taper_decode_ids(const uint8_t *bytes, const __grid_constant__ Plan plan, const uint32_t *ids,
                                                                   uint32_t count, uint8_t *out, uint64_t stride,
                                                                   uint32_t *status) {
    const Bytes stream = {bytes, plan.total};
    const TileBlock block(plan, stream);
    const uint32_t i = WARPS * blockIdx.y + threadIdx.x / 32;
    if (i >= count) return;
    const uint32_t id = ids[i], size = dtype_bytes(plan.out);
    uint8_t *line = out + (uint64_t)i * stride + (uint64_t)blockIdx.x * TILE * size;
    if (id >= plan.rows) {
        const uint32_t bytes = min(TILE, plan.cols - blockIdx.x * TILE) * size;
        for (uint32_t b = threadIdx.x % 32; b < bytes; b += 32) line[b] = 0;
        return;
    }
    ToRows sink = {plan, line, stride, id % BAND_ROWS, id % BAND_ROWS + 1, min(TILE, plan.cols - blockIdx.x * TILE)};
    decode_band(plan, stream, block.table, block.map, block.buffer, id / TILE * plan.tile_cols + blockIdx.x,
                id % TILE / BAND_ROWS, sink, status);
}

// Values of dtype `from` to `to`, by way of `own`: rounded to that first.
extern "C" __global__ void __launch_bounds__(256) taper_convert(const uint8_t *values, uint8_t *out, uint64_t count, uint32_t from,
                                                                uint32_t own, uint32_t to) {
    for (uint64_t i = blockIdx.x * 256ull + threadIdx.x; i < count; i += gridDim.x * 256ull) {
        const uint32_t bits = from == F32 ? ((const uint32_t *)values)[i] : ((const uint16_t *)values)[i];
        const uint32_t result = round_to(to, value_of(own, round_to(own, value_of(from, bits))));
        if (to == F32) ((uint32_t *)out)[i] = result;
        else ((uint16_t *)out)[i] = (uint16_t)result;
    }
}

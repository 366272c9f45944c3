// Tile streams to memory: whole rows of a matrix, or the rows of an embedding's table that ids ask for.
//
// A block takes one tile, each of its four warps one band (64 rows). Shared memory: the decode table (16 KB, rANS only),
// scratch, and a buffer for each warp (0, 8 or 16 KB, see `buffer_bytes`). This is the readable reference: everything
// about a matrix is decided at run time, by branches that all threads take alike.
#include "tile_stream.cuh"

namespace {

using namespace taper;

constexpr uint32_t WARPS = 4;

struct Shared {
    uint32_t *table;
    uint8_t *map;
    uint8_t *buffer;
};

// Divides the block's shared memory and fills what all warps use. Mirrors `cuda::decode::shared_bytes`.
__device__ Shared prepare(const Plan &plan, Bytes stream) {
    extern __shared__ __align__(16) uint8_t shared[];
    uint32_t *starts = (uint32_t *)shared; // 257 words
    uint8_t *map = shared + 1040;          // 16 bytes in 4 banks: look-ups do not conflict
    uint32_t *table = (uint32_t *)(shared + 1056);
    uint8_t *buffers = shared + 1056 + (has_table(plan) ? 4 * SLOTS : 0);
    if (threadIdx.x < 16) map[threadIdx.x] = plan.map[threadIdx.x];
    if (has_table(plan)) build_table(stream, table, starts);
    __syncthreads();
    return {table, map, buffers + threadIdx.x / 32 * buffer_bytes(plan)};
}

} // namespace

// Rows [first, first + rows) to `out`, `stride` bytes apart. Grid: tile columns, tile rows that the range touches.
extern "C" __global__ void __launch_bounds__(128) taper_decode_rows(const uint8_t *bytes, Plan plan, uint32_t first,
                                                                    uint32_t rows, uint8_t *out, uint64_t stride,
                                                                    uint32_t *status) {
    const Bytes stream = {bytes, plan.total};
    const Shared shared = prepare(plan, stream);
    const uint32_t tile_row = first / TILE + blockIdx.y, band = threadIdx.x / 32;
    const uint32_t row = tile_row * TILE + band * BAND_ROWS, last = first + rows;
    if (row >= min(last, plan.rows) || row + BAND_ROWS <= first) return;
    const uint32_t from = max(row, first) - row, to = min(row + BAND_ROWS, last) - row;
    uint8_t *line = out + (uint64_t)(row + from - first) * stride + (uint64_t)blockIdx.x * TILE * dtype_bytes(plan.out);
    decode_band(plan, stream, shared.table, shared.map, shared.buffer, tile_row * plan.tile_cols + blockIdx.x, band,
                {line, stride, from, to}, status);
}

// Row `ids[i]` to row `i` of `out`. Grid: tile columns, ids in fours. An id outside the table gives zeros.
extern "C" __global__ void __launch_bounds__(128) taper_decode_ids(const uint8_t *bytes, Plan plan, const uint32_t *ids,
                                                                   uint32_t count, uint8_t *out, uint64_t stride,
                                                                   uint32_t *status) {
    const Bytes stream = {bytes, plan.total};
    const Shared shared = prepare(plan, stream);
    const uint32_t i = WARPS * blockIdx.y + threadIdx.x / 32;
    if (i >= count) return;
    const uint32_t id = ids[i], size = dtype_bytes(plan.out);
    uint8_t *line = out + (uint64_t)i * stride + (uint64_t)blockIdx.x * TILE * size;
    if (id >= plan.rows) {
        const uint32_t bytes = min(TILE, plan.cols - blockIdx.x * TILE) * size;
        for (uint32_t b = threadIdx.x % 32; b < bytes; b += 32) line[b] = 0;
        return;
    }
    decode_band(plan, stream, shared.table, shared.map, shared.buffer, id / TILE * plan.tile_cols + blockIdx.x,
                id % TILE / BAND_ROWS, {line, stride, id % BAND_ROWS, id % BAND_ROWS + 1}, status);
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

// A block that takes one tile: 128 threads, each warp one of its bands.
//
// Dynamic shared memory: scratch (1056 bytes), the decode table (16 KB, rANS only), and a buffer for each warp (see
// `buffer_bytes`). Mirrors `cuda::decode::shared_bytes`.
#pragma once
#include "tile_band.cuh"

namespace taper {

constexpr uint32_t WARPS = 4, SCRATCH_BYTES = 1056;

// Divides the block's shared memory and fills what all warps use.
struct TileBlock {
    uint32_t *table;
    uint8_t *map, *buffer, *rest; // `rest`: what lies behind
    __device__ TileBlock(const Plan &plan, Bytes stream) {
        extern __shared__ __align__(16) uint8_t shared[];
        uint32_t *starts = (uint32_t *)shared; // 257 words
        map = shared + 1040;                   // 16 bytes in 4 banks: look-ups do not conflict
        table = (uint32_t *)(shared + SCRATCH_BYTES);
        uint8_t *buffers = shared + SCRATCH_BYTES + (has_table(plan) ? 4 * SLOTS : 0);
        if (threadIdx.x < 16) map[threadIdx.x] = plan.map[threadIdx.x];
        if (has_table(plan)) build_table(stream, table, starts);
        __syncthreads();
        buffer = buffers + threadIdx.x / 32 * buffer_bytes(plan);
        rest = buffers + WARPS * buffer_bytes(plan);
    }
};

} // namespace taper

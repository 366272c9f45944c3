// y = x W^T straight from a tile stream, for up to 8 rows of activations: the reference of fused products, for every kind of
// matrix and every predictor. BF16 matrices whose columns are a multiple of 64 have a faster one, rans.cu.
//
// A warp takes a band: it decodes weights, multiplies them with the activations of the tile's columns and hands sums on as partial
// ones. The last warp of a row of bands adds them, in the order of the columns: the same result from run to run.
//
//   Any matrix      256 weights at a time are decoded into the warp's ring in shared memory, as f32; whenever a row of the band is
//                   complete, the warp multiplies it.
//   BF16 by eights  (tile_bf16.cuh) Each lane multiplies its eight neighbours at once and puts their sum into the ring; four
//                   rows of them are added at a time.
//
// Budget of 256 BF16 weights with one row of activations: 4 symbols of 22 instructions, 30 to join, 45 to multiply and add. A band
// is one warp's from its first symbol to its last, so that 32 warps a multiprocessor and as few turns as there can be count most:
// 107 us for 14336x4224 on an H200, 149 where 24 warps take two turns.
//
// Launch   any grid. Any matrix: block 128, dynamic shared memory that of tile_block.cuh, then RING floats a warp. By eights: block
//          at most 1024, BF16_TABLES, then a warp's BF16_BUFFER and batch * EIGHTS floats; x is 16-byte aligned. partial: tile
//          columns * batch * rows floats; arrived: a zeroed word for each row of bands, zero again at the end. x and y:
//          contiguous rows of `dtype`.
#include "tile_bf16.cuh"
#include "tile_block.cuh"

namespace {

using namespace taper;

// A band as products see it.
struct BandProduct {
    const uint8_t *x; // activations of the tile's first column; `stride` bytes from one row to the next
    float *sums;      // of the band's first row; `plane` floats from one row of activations to the next
    uint32_t stride, plane, dtype, size, batch, rows, cols;

    __device__ void store(uint32_t m, uint32_t row, float sum) const { sums[(uint64_t)m * plane + row] = sum; }
};

// By all lanes of a warp that has stored its sums of a row of bands: the last of them adds up all.
__device__ inline void add_columns(const Plan &plan, const Activations &a, uint32_t band_row) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t before = 0;
    __threadfence();
    __syncwarp();
    if (lane == 0) before = atomicAdd(a.arrived + band_row, 1u);
    if (__shfl_sync(ALL, before, 0) != plan.tile_cols - 1) return;
    __threadfence();
    const uint32_t top = band_row * BAND_ROWS, rows = min(BAND_ROWS, plan.rows - top);
    for (uint32_t i = lane; i < rows * a.batch; i += 32) {
        const uint32_t m = i / rows, r = top + i % rows;
        float sum = 0;
#pragma unroll 8
        for (uint32_t c = 0; c < plan.tile_cols; c++) sum += __ldcg(a.partial + ((uint64_t)c * a.batch + m) * plan.rows + r);
        store_value(a.y, (uint64_t)m * plan.rows + r, a.dtype, sum);
    }
    if (lane == 0) a.arrived[band_row] = 0;
}

// Calls decode(tile, band of the tile, product) for each band that is this warp's.
template <class Decode>
__device__ void product(const Plan &plan, const Activations &a, const Decode &decode) {
    const uint32_t bands = (plan.rows + BAND_ROWS - 1) / BAND_ROWS * plan.tile_cols, size = dtype_bytes(a.dtype);
    for (uint32_t i = threadIdx.x / 32 * gridDim.x + blockIdx.x; i < bands; i += gridDim.x * (blockDim.x / 32)) {
        const uint32_t band_row = i / plan.tile_cols, col = i % plan.tile_cols, top = band_row * BAND_ROWS, left = col * TILE;
        const BandProduct band = {(const uint8_t *)a.x + left * size,
                                  a.partial + (uint64_t)col * a.batch * plan.rows + top,
                                  plan.cols * size,
                                  plan.rows,
                                  a.dtype,
                                  size,
                                  a.batch,
                                  min(BAND_ROWS, plan.rows - top),
                                  min(TILE, plan.cols - left)};
        decode(band_row / (TILE / BAND_ROWS) * plan.tile_cols + col, band_row % (TILE / BAND_ROWS), band);
        add_columns(plan, a, band_row);
    }
}

constexpr uint32_t RING = 512;

// Takes a band's weights and multiplies its rows as they are complete.
struct Multiply {
    BandProduct band;
    float *ring; // weight i of the band at i % RING
    uint32_t row = 0;

    __device__ void write(uint32_t first, const uint32_t *values, uint32_t count) {
        float *at = ring + first % RING; // in eights: never over the end
        if (count == 8) {
            ((uint4 *)at)[0] = make_uint4(values[0], values[1], values[2], values[3]);
            ((uint4 *)at)[1] = make_uint4(values[4], values[5], values[6], values[7]);
            return;
        }
#pragma unroll
        for (uint32_t k = 0; k < 8; k++)
            if (k < count) at[k] = bits_f32(values[k]);
    }
    __device__ void group(uint32_t end) {
        const uint32_t lane = threadIdx.x % 32;
        __syncwarp();
        for (; (row + 1) * band.cols <= end; row++) {
            for (uint32_t m = 0; m < band.batch; m++) {
                float sum = 0;
                for (uint32_t c = lane; c < band.cols; c += 32)
                    sum = fmaf(ring[(row * band.cols + c) % RING], load_value(band.x + (uint64_t)m * band.stride, c, band.dtype), sum);
#pragma unroll
                for (uint32_t step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
                if (lane == 0) band.store(m, row, sum);
            }
        }
        __syncwarp();
    }
};

// Eight values, 16-byte aligned.
__device__ inline void load_eight(const uint8_t *from, uint32_t dtype, float (&out)[8]) {
    if (dtype == F32) {
        const float4 low = ((const float4 *)from)[0], high = ((const float4 *)from)[1];
        out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
        out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
        return;
    }
    const uint4 pairs = *(const uint4 *)from;
    const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (uint32_t k = 0; k < 8; k++) {
        const uint32_t bits = words[k / 2] >> 16 * (k % 2) & 0xffff;
        out[k] = dtype == BF16 ? bits_f32(bits << 16) : f16_f32(bits);
    }
}

constexpr uint32_t EIGHTS = 256; // those of four groups and of a row that is not complete, and some more

// Takes a band's weights by eights, and adds up rows as their eights are complete, after every fourth group.
struct MultiplyEights {
    BandProduct band;
    float *ring; // what comes of eight i of the band at i % EIGHTS; for each row of activations
    uint32_t row = 0;

    __device__ void write(uint32_t first, uint32_t, uint32_t col, uint4 weights) {
        const uint32_t pairs[4] = {weights.x, weights.y, weights.z, weights.w};
        for (uint32_t m = 0; m < band.batch; m++) {
            float x[8], sum = 0;
            load_eight(band.x + (uint64_t)m * band.stride + col * band.size, band.dtype, x);
#pragma unroll
            for (uint32_t k = 0; k < 4; k++) {
                sum = fmaf(bits_f32(pairs[k] << 16), x[2 * k], sum);
                sum = fmaf(bits_f32(pairs[k] & 0xffff0000), x[2 * k + 1], sum);
            }
            ring[m * EIGHTS + first / 8 % EIGHTS] = sum;
        }
    }
    __device__ void group(uint32_t end) {
        if (end % (4 * GROUP) != 0 && end != band.rows * band.cols) return;
        const uint32_t lane = threadIdx.x % 32, eights = band.cols / 8, complete = end / band.cols;
        __syncwarp();
        for (; row < complete; row += 4) {
            for (uint32_t m = 0; m < band.batch; m++) {
                float v[4];
#pragma unroll
                for (uint32_t i = 0; i < 4; i++)
                    v[i] = row + i < complete && lane < eights ? ring[m * EIGHTS + ((row + i) * eights + lane) % EIGHTS] : 0;
                // Half of the lanes keep half of the rows, then half of those.
                const bool half = lane & 16, quarter = lane & 8;
                const float a = (half ? v[2] : v[0]) + __shfl_xor_sync(ALL, half ? v[0] : v[2], 16);
                const float b = (half ? v[3] : v[1]) + __shfl_xor_sync(ALL, half ? v[1] : v[3], 16);
                float sum = (quarter ? b : a) + __shfl_xor_sync(ALL, quarter ? a : b, 8);
#pragma unroll
                for (uint32_t step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
                if (lane % 8 == 0 && row + lane / 8 < complete) band.store(m, row + lane / 8, sum);
            }
        }
        row = complete;
        __syncwarp();
    }
};

template <bool LEVELS>
__device__ void product_by_eights(const uint8_t *bytes, const Plan &plan, const Activations &a, uint32_t *status) {
    extern __shared__ __align__(16) uint8_t shared[];
    const Bytes stream = {bytes, plan.total};
    build_bf16_tables(plan, stream, shared);
    uint8_t *const own = shared + BF16_TABLES + threadIdx.x / 32 * (BF16_BUFFER + a.batch * EIGHTS * 4);
    product(plan, a, [&](uint32_t tile, uint32_t index, const BandProduct &band) {
        MultiplyEights sink = {band, (float *)(own + BF16_BUFFER)};
        decode_bf16<LEVELS>(plan, stream, shared, own, tile, index, sink, status);
    });
}

} // namespace

// Any matrix. `plan.out` is F32.
extern "C" __global__ void __launch_bounds__(128, 6)
    hybrid_product(const uint8_t *bytes, const __grid_constant__ Plan plan, const __grid_constant__ Activations a, uint32_t *status) {
    const Bytes stream = {bytes, plan.total};
    const TileBlock block(plan, stream);
    product(plan, a, [&](uint32_t tile, uint32_t index, const BandProduct &band) {
        Multiply sink = {band, (float *)block.rest + threadIdx.x / 32 * RING};
        decode_band(plan, stream, block.table, block.map, block.buffer, tile, index, sink, status);
    });
}

// What tile_bf16.cuh is for.
extern "C" __global__ void __launch_bounds__(1024, 1)
    hybrid_product_bf16(const uint8_t *bytes, const __grid_constant__ Plan plan, const __grid_constant__ Activations a, uint32_t *status) {
    product_by_eights<false>(bytes, plan, a, status);
}
extern "C" __global__ void __launch_bounds__(1024, 1)
    hybrid_product_bf16_levels(const uint8_t *bytes, const __grid_constant__ Plan plan, const __grid_constant__ Activations a, uint32_t *status) {
    product_by_eights<true>(bytes, plan, a, status);
}

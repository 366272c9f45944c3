// y = x W^T straight from a tile stream, for up to 8 rows of activations: the reference of fused products, for every kind of
// matrix and every predictor. BF16 matrices whose columns fill whole tiles have a faster one, rans.cu.
//
// A block takes one tile, each of its four warps one band. 256 weights at a time are decoded into the warp's ring in shared
// memory, as f32; whenever a row of the band is complete, the warp multiplies it with the activations of the tile's columns
// and hands its sums on as partial ones. The last block of a row of tiles adds them, in the order of the columns.
//
// Shared memory: that of tile_block.cuh, then 2 KB of ring a warp, then activations: batch x 256 f32.
// Budget, BF16 `rans`: 25 instructions for 64 weights' symbols, some 20 a lane's weight to join, 45 a row of 256 to multiply with
// one row of activations. What bounds it is that a symbol waits for the one before: a block needs 128 threads and 27 KB, so that
// seven share a multiprocessor.
//
// Launch: grid tile columns x tile rows, block 128. partial: tile columns * batch * rows floats; arrived: a zeroed word for each
// row of tiles, zero again at the end. x and y: contiguous rows of `x_dtype`.
#include "tile_block.cuh"

namespace {

using namespace taper;

constexpr uint32_t RING = 512;

// Takes a band's weights and multiplies its rows as they are complete.
struct Multiply {
    float *ring;          // weight i of the band at i % RING
    const float *x;       // batch x 256, zero past the tile's columns
    float *sums;          // of the band's first row; `plane` floats from one row of activations to the next
    uint64_t plane;
    uint32_t cols, batch, row = 0;

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
        for (; (row + 1) * cols <= end; row++) {
            float w[8];
#pragma unroll
            for (uint32_t k = 0; k < 8; k++)
                w[k] = lane + 32 * k < cols ? ring[(row * cols + lane + 32 * k) % RING] : 0;
            for (uint32_t m = 0; m < batch; m++) {
                float sum = 0;
#pragma unroll
                for (uint32_t k = 0; k < 8; k++) sum = fmaf(w[k], x[TILE * m + lane + 32 * k], sum);
#pragma unroll
                for (uint32_t step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
                if (lane == 0) sums[m * plane + row] = sum;
            }
        }
        __syncwarp();
    }
};

template <class P>
__device__ void product(const uint8_t *bytes, const P &plan, const Activations &a, uint32_t *status) {
    __shared__ bool last;
    const Bytes stream = {bytes, plan.total};
    const TileBlock block(plan, stream);
    const uint32_t left = blockIdx.x * TILE, top = blockIdx.y * TILE, warp = threadIdx.x / 32, row = top + warp * BAND_ROWS;
    const uint32_t cols = min(TILE, plan.cols - left), rows = min(TILE, plan.rows - top);
    float *const ring = (float *)block.rest + warp * RING, *const x = (float *)block.rest + WARPS * RING;
    for (uint32_t i = threadIdx.x; i < a.batch * TILE; i += blockDim.x) {
        const uint32_t m = i / TILE, c = i % TILE;
        x[i] = c < cols ? load_value(a.x, (uint64_t)m * plan.cols + left + c, a.dtype) : 0;
    }
    __syncthreads();
    if (row < plan.rows) {
        float *const sums = a.partial + (uint64_t)blockIdx.x * a.batch * plan.rows + row;
        Multiply sink = {ring, x, sums, plan.rows, cols, a.batch};
        decode_band(plan, stream, block.table, block.map, block.buffer, blockIdx.y * plan.tile_cols + blockIdx.x, warp, sink,
                    status);
    }

    // The last block of this row of tiles adds all of its sums.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(a.arrived + blockIdx.y, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (uint32_t i = threadIdx.x; i < rows * a.batch; i += blockDim.x) {
        const uint32_t m = i / rows, r = top + i % rows;
        float sum = 0;
        for (uint32_t c = 0; c < gridDim.x; c++) sum += __ldcg(a.partial + ((uint64_t)c * a.batch + m) * plan.rows + r);
        store_value(a.y, (uint64_t)m * plan.rows + r, a.dtype, sum);
    }
    if (threadIdx.x == 0) a.arrived[blockIdx.y] = 0;
}

} // namespace

// Any matrix. `plan.out` is F32.
extern "C" __global__ void __launch_bounds__(128) hybrid_product(const uint8_t *bytes, const __grid_constant__ Plan plan, const __grid_constant__ Activations activations,
                                                                 uint32_t *status) {
    product(bytes, plan, activations, status);
}

// What `Bf16Rans` says.
extern "C" __global__ void __launch_bounds__(128, 7) hybrid_product_bf16(const uint8_t *bytes, const __grid_constant__ Bf16Rans<F32, NO_SCALES> plan,
                                                                         const __grid_constant__ Activations activations, uint32_t *status) {
    product(bytes, plan, activations, status);
}
extern "C" __global__ void __launch_bounds__(128, 7) hybrid_product_bf16_levels(const uint8_t *bytes, const __grid_constant__ Bf16Rans<F32, LEVELS> plan,
                                                                                const __grid_constant__ Activations activations, uint32_t *status) {
    product(bytes, plan, activations, status);
}

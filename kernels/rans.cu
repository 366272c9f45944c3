// BF16 matrices at rest: decoded to memory, and y = x W^T without a decoded weight in memory, on tensor cores.
//
// How bands are decoded: rans_band.cuh, with its budget. A block stays on its multiprocessor; each of its warps takes
// every so many-th band.
//
// Product. All lanes hold weights of the same row, so the tensor cores are given eight eights of its columns as if they
// were eight rows: lane l's pair of columns is row l / 4 of A, and with the activations of the same columns as column l
// / 4 of B the diagonal of the product holds what belongs together. Seven eighths of the work are for nothing, and
// still it is one instruction for 256 weights. Two rows of the band are the halves of A. A band's sums go to `partial`;
// the last band of a row of bands adds them, in the order of the columns: the same result from run to run.
//
// Launch   grid at most the multiprocessors, block at most RANS_THREADS, dynamic shared memory RANS_TABLES + a warp's
//          RANS_RING_BYTES + (_8 only) 512 * columns; columns: batch * parts <= 1, or <= 8 for _8. Parts: 1 for bf16, 2
//          for f16, 3 for f32 activations. partial: tile columns * batch * rows floats; arrived: a zeroed word for each
//          row of bands, zero at the end. Products may be launched with programmatic stream serialisation: only the
//          stream is read before the wait.
#include "parts.cuh"
#include "rans_band.cuh"

namespace {

using namespace taper;

struct RansBlock {
  Bytes stream;
  RansTables tables;
  uint32_t ring, warps, warp;
  uint8_t* rest;  // behind the rings

  __device__ RansBlock(const uint8_t* bytes, const Plan& plan, uint8_t* memory)
      : stream{bytes, plan.total},
        tables(plan, stream, memory),
        ring(shared_address(memory) + RANS_TABLES + threadIdx.x / 32 * RANS_RING_BYTES),
        warps(blockDim.x / 32),
        warp(threadIdx.x / 32),
        rest(memory + RANS_TABLES + warps * RANS_RING_BYTES) {}
};

// Rows [from, to) of a matrix to `out`.
struct RansToMemory {
  uint8_t* out;  // of row `from`, this lane's columns
  uint64_t stride;
  uint32_t top, from, to;

  __device__ __forceinline__ void operator()(uint32_t row, const RansRows& weights, bool two) const {
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
      const uint32_t at = top + row + r;
      if ((r == 1 && !two) || at < from || at >= to) continue;
      uint32_t* const line = (uint32_t*)(out + (at - from) * stride);
#pragma unroll
      for (uint32_t s = 0; s < RANS_STEPS; s++) line[32 * s] = weights[r][s];
    }
  }
};

template <bool LEVELS>
__device__ __forceinline__ void decode(const uint8_t* bytes, const Plan& plan, uint32_t first, uint32_t rows,
                                       uint8_t* out, uint64_t stride, uint32_t* status) {
  extern __shared__ __align__(128) uint8_t memory[];
  const RansBlock block(bytes, plan, memory);
  const uint32_t top = first / BAND_ROWS, across = plan.cols / TILE,
                 bands = ((first + rows - 1) / BAND_ROWS - top + 1) * across;
  for (uint32_t i = block.warp * gridDim.x + blockIdx.x; i < bands; i += gridDim.x * block.warps) {
    const uint32_t band = top + i / across, col = i % across;
    const RansToMemory sink = {out + col * TILE * 2 + threadIdx.x % 32 * 4, stride, band * BAND_ROWS, first,
                               first + rows};
    rans_band<LEVELS>(plan, block.stream, block.tables, block.ring, band / 4, col, band % 4, sink, status);
  }
}

// Multiplies a band's rows with the activations of its columns. SINGLE: one column of them, in registers.
template <bool SINGLE>
struct RansMultiply {
  uint32_t x[RANS_STEPS];
  uint32_t activations;  // otherwise: this lane's part of the first column in shared memory, others 512 bytes apart
  uint32_t batch, parts;
  float* sums;  // of the band's first row and the first row of activations
  uint32_t plane;

  __device__ __forceinline__ void operator()(uint32_t row, const RansRows& w, bool two) const {
    const uint32_t lane = threadIdx.x % 32;
    const bool odd = lane & 4;
    for (uint32_t m = 0; m < (SINGLE ? 1 : batch); m++) {
      float c[4] = {0, 0, 0, 0};
      for (uint32_t part = 0; part < (SINGLE ? 1 : parts); part++) {
        uint4 b = {x[0], x[1], x[2], x[3]};
        if (!SINGLE) b = lds128(activations + (m * parts + part) * 512);
        mma(c, w[0][0], w[1][0], w[0][1], w[1][1], b.x, b.y);
        mma(c, w[0][2], w[1][2], w[0][3], w[1][3], b.z, b.w);
      }
      // The diagonal is in lanes 0, 9, 18, 27 and 4, 13, 22, 31: one row of W for each four of them.
      float sum = odd ? c[3] : c[0];
      sum += __shfl_xor_sync(ALL, odd ? c[1] : c[2], 4);
      sum += __shfl_xor_sync(ALL, sum, 9);
      sum += __shfl_xor_sync(ALL, sum, 18);
      if (lane == 0 || (lane == 4 && two)) sums[m * plane + row + lane / 4] = sum;
    }
  }
};

template <bool LEVELS, bool SINGLE>
__device__ __forceinline__ void product(const uint8_t* bytes, const Plan& plan, const Activations& a,
                                        uint32_t* status) {
  extern __shared__ __align__(128) uint8_t memory[];
  const RansBlock block(bytes, plan, memory);
  let_next_kernel_start();
  const uint32_t lane = threadIdx.x % 32, across = plan.cols / TILE, down = (plan.rows + BAND_ROWS - 1) / BAND_ROWS,
                 parts = a.dtype, columns = a.batch * parts;
  RansMultiply<SINGLE> sink;
  sink.activations = shared_address(block.rest) + block.warp * columns * 512 + lane * 16;
  sink.batch = a.batch, sink.parts = parts, sink.plane = plan.rows;
  wait_for_previous_kernel();
  for (uint32_t i = block.warp * gridDim.x + blockIdx.x; i < across * down; i += gridDim.x * block.warps) {
    const uint32_t band = i / across, col = i % across, top = band * BAND_ROWS;
    for (uint32_t m = 0; m < (SINGLE ? 1 : a.batch); m++) {
#pragma unroll
      for (uint32_t s = 0; s < RANS_STEPS; s++) {
        uint32_t one[3], other[3];
        const uint64_t at = (uint64_t)m * plan.cols + col * TILE + 64 * s + 2 * lane;
        split(load_value(a.x, at, a.dtype), parts, one);
        split(load_value(a.x, at + 1, a.dtype), parts, other);
        sink.x[s] = __byte_perm(one[0], other[0], 0x7632);
#pragma unroll
        for (uint32_t part = 0; part < 3; part++)
          if (!SINGLE && part < parts)
            sts32(sink.activations + (m * parts + part) * 512 + 4 * s, __byte_perm(one[part], other[part], 0x7632));
      }
    }
    sink.sums = a.partial + (uint64_t)col * a.batch * plan.rows + top;
    rans_band<LEVELS>(plan, block.stream, block.tables, block.ring, band / 4, col, band % 4, sink, status);

    __threadfence();
    __syncwarp();
    uint32_t before = lane == 0 ? atomicAdd(a.arrived + band, 1u) : 0;
    before = __shfl_sync(ALL, before, 0);
    if (before != across - 1) continue;
    if (lane == 0) a.arrived[band] = 0;
    __threadfence();
    constexpr uint32_t DEEP = 8;  // loads in flight for each of two rows
    for (uint32_t m = 0; m < a.batch; m++) {
      const uint32_t one = top + lane, other = one + 32;
      float sum = 0, second = 0;
      for (uint32_t c = 0; c < across; c += DEEP) {
        float v[2][DEEP];
#pragma unroll
        for (uint32_t d = 0; d < DEEP; d++) {
          const float* const from = a.partial + ((uint64_t)(c + d) * a.batch + m) * plan.rows;
          v[0][d] = c + d < across && one < plan.rows ? __ldcg(from + one) : 0;
          v[1][d] = c + d < across && other < plan.rows ? __ldcg(from + other) : 0;
        }
#pragma unroll
        for (uint32_t d = 0; d < DEEP; d++) sum += v[0][d], second += v[1][d];
      }
      if (one < plan.rows) store_value(a.y, (uint64_t)m * plan.rows + one, a.dtype, sum);
      if (other < plan.rows) store_value(a.y, (uint64_t)m * plan.rows + other, a.dtype, second);
    }
  }
}

}  // namespace

#define RANS_KERNELS(SUFFIX, LEVELS)                                                                              \
  extern "C" __global__ void __launch_bounds__(RANS_THREADS, 1)                                                   \
      rans_decode##SUFFIX(const uint8_t* bytes, const __grid_constant__ Plan plan, uint32_t first, uint32_t rows, \
                          uint8_t* out, uint64_t stride, uint32_t* status) {                                      \
    decode<LEVELS>(bytes, plan, first, rows, out, stride, status);                                                \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(RANS_THREADS, 1)                                                   \
      rans_product_1##SUFFIX(const uint8_t* bytes, const __grid_constant__ Plan plan,                             \
                             const __grid_constant__ Activations a, uint32_t* status) {                           \
    product<LEVELS, true>(bytes, plan, a, status);                                                                \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(RANS_THREADS, 1)                                                   \
      rans_product_8##SUFFIX(const uint8_t* bytes, const __grid_constant__ Plan plan,                             \
                             const __grid_constant__ Activations a, uint32_t* status) {                           \
    product<LEVELS, false>(bytes, plan, a, status);                                                               \
  }
RANS_KERNELS(, false)
RANS_KERNELS(_levels, true)

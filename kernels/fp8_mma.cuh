// y = x W^T as fp8_parts.cuh says, on GPUs with FP8 tensor cores but without those of warpgroups: compute capability 8.9,
// and all from 10.0 on. Products of warps (mma, PTX 8.4).
//
// Work split   Eight warps, each of which decodes a tile and multiplies it with all N columns of activations.
// Copies       cp.async, by all threads, SLOTS - 1 units ahead: a warp those of its tile, all together the activations
//              and, with the first unit of FP8_SUMS, their sums.
// Budget       Of compute capability 8.9 (GeForce): tensor cores of a multiprocessor take 512 products a cycle, those of a
//              unit and N = 128 columns 4096 cycles, N = 64 2048; its weights, 8.6 KB, take 2750 of the memory. What a
//              warp issues for N = 128, some 230 instructions, two warps a scheduler, is little against both, and so are
//              the 128 KB that warps read of activations: 1024 cycles. Shared memory is what limits N: 99 KB a block.
//              Compute capability 9.0 has no such instruction: there each product is two of f16 and conversions.
//
// Launch       fp8_mma_product_N: block 256, dynamic shared memory fp8_mma_shared_bytes<N>(), else as prefill.cuh's.
#pragma once
#include "fp8_parts.cuh"

namespace taper {

constexpr int FP8_MMA_BLOCK = 256;

// What lies in shared memory: slots of weights and activations, two of sums, what warps keep of scales.
template <class L, int N>
struct Fp8Slots {
  static constexpr int WARPS = FP8_MMA_BLOCK / 32, A_BYTES = WARPS * L::UNIT_BYTES, B_BYTES = FP8_UNIT<N>,
                       BYTES = A_BYTES + B_BYTES, FIXED = 2 * FP8_SUMS_BYTES<N> + WARPS * FP8_KEPT,
                       SLOTS = (101376 - FIXED) / BYTES;
  // Sums are two sets at a time: the units on their way are of no third.
  static_assert(L::TRAILER == 0 && L::UNIT_BYTES % 16 == 0 && SLOTS >= 3 && SLOTS <= FP8_SUMS, "");
};
template <class L, int N>
__host__ __device__ constexpr int fp8_mma_shared_bytes() {
  using R = Fp8Slots<L, N>;
  return R::FIXED + R::SLOTS * R::BYTES;
}

#if __CUDA_ARCH__ >= 890
// D (16 x 8) += A (16 x 32, rows) * B (32 x 8, columns), e4m3 in, f32 out.
__device__ __forceinline__ void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Of eight rows and columns of 16-bit values, two of row lane / 4: those of column lane / 4.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t two) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(two));
  return d;
}

// A warp's tile x N columns, rounded in pairs by `pack`: rows side by side are written together.
template <int N, class Pack>
__device__ __forceinline__ void store_tile(const Prefill& p, const float (&c)[N / 8][4], int first_row, int column0,
                                           int lane, Pack pack) {
  const int g = lane >> 2, t = lane & 3;
  const bool paired = ((size_t)p.y & 3) == 0 && p.y_stride % 2 == 0;
#pragma unroll
  for (int i = 0; i < N / 8; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t two = transpose_8x8(pack(c[i][2 * h], c[i][2 * h + 1]));
      const int row = first_row + 8 * h + 2 * t, column = column0 + 8 * i + g;
      if (column >= p.batch) continue;
      uint16_t* const to = p.y + (size_t)column * p.y_stride + row;
      if (paired && row + 1 < p.rows) {
        *(uint32_t*)to = two;
      } else {
        if (row < p.rows) to[0] = (uint16_t)two;
        if (row + 1 < p.rows) to[1] = (uint16_t)(two >> 16);
      }
    }
}
#endif

template <class L, int N>
__device__ __forceinline__ void fp8_mma_product(const Prefill& p) {
#if __CUDA_ARCH__ >= 890
  using R = Fp8Slots<L, N>;
  extern __shared__ __align__(128) uint8_t memory[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const Shape<L> shape(p.rows, p.cols);
  const uint32_t slots = shared_address(memory), sums_at = slots + R::SLOTS * R::BYTES,
                 kept = sums_at + 2 * FP8_SUMS_BYTES<N> + warp * FP8_KEPT, keep_at = keep_place(kept, g, t);
  const int wide = ceil_div(p.batch, N), blocks = ceil_div(shape.tiles, R::WARPS) * wide;
  const Fp8Arranged arranged(wide * N, shape.units);
  const auto slot_of = [&](uint32_t unit) { return slots + unit % R::SLOTS * R::BYTES; };
  const auto sums_of = [&](uint32_t unit) { return sums_at + unit / FP8_SUMS % 2 * FP8_SUMS_BYTES<N>; };
  const uint64_t policy = evict_first_policy();
  // The lane's column of a fragment of B, and which of its registers: lds_matrices brings those of 16 columns, or of eight
  // columns' upper and lower parts.
  const uint32_t b_lane = ((lane >> 3 & 1) * N + (lane >> 4) * 8 + (lane & 7)) * 16,
                 sums_lane = ((lane >> 3 & 1) * 2 * N + (lane >> 4) * N + (lane & 7)) * 16;
  float c[N / 8][4];
  const auto add_sums = [&](uint32_t first, uint32_t last) {
    uint32_t high[4], low[4];
    __syncwarp();
    zero_fragments(kept, g, t, first, last, high, low);
    __syncwarp();  // the next units' may be kept
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
      const uint4 b = lds_matrices(sums_of(first) + sums_lane + 128 * i);
      mma(c[i], high[0], high[1], high[2], high[3], b.x, b.y);
      mma(c[i], low[0], low[1], low[2], low[3], b.x, b.y);
      mma(c[i], high[0], high[1], high[2], high[3], b.z, b.w);
    }
  };
  Pieces piece(shape.units, p.cut);
  while (piece.next(blockIdx.x, gridDim.x, blocks)) {
    // A tile past the matrix's last repeats its first: its products are dropped.
    const int tile = piece.block / wide * R::WARPS + warp, columns = piece.block % wide;
    const uint8_t* const weights = p.weights + (tile < shape.tiles ? tile * shape.tile_bytes() : 0);
    const auto send = [&](uint32_t u) {
      if (u < piece.last) {
        const uint32_t to = slot_of(u), a = to + warp * L::UNIT_BYTES, b = to + R::A_BYTES;
        for (int i = lane; i < L::UNIT_BYTES / 16; i += 32)
          async_copy16(a + 16 * i, weights + (size_t)u * L::UNIT_BYTES + 16 * i, policy);
        const uint8_t* const x = p.x + ((size_t)columns * shape.units + u) * R::B_BYTES;
#pragma unroll
        for (int i = threadIdx.x; i < R::B_BYTES / 16; i += FP8_MMA_BLOCK) async_copy16(b + 16 * i, x + 16 * i);
        if (u == piece.first || u % FP8_SUMS == 0) {
          const size_t at = (size_t)columns * ceil_div(shape.units, FP8_SUMS) + u / FP8_SUMS;
          const uint8_t* const from = p.x + arranged.sums + at * FP8_SUMS_BYTES<N>;
          for (int i = threadIdx.x; i < FP8_SUMS_BYTES<N> / 16; i += FP8_MMA_BLOCK)
            async_copy16(sums_of(u) + 16 * i, from + 16 * i);
        }
      }
      async_commit();
    };
#pragma unroll
    for (int i = 0; i < N / 2; i++) c[i / 4][i % 4] = 0;
    for (int s = 0; s < R::SLOTS - 1; s++) send(piece.first + s);
    for (uint32_t u = piece.first; u < piece.last; u++) {
      async_wait<R::SLOTS - 2>();
      __syncthreads();  // the unit is there for all, and nobody reads the one before it
      send(u + R::SLOTS - 1);
      const uint32_t at = slot_of(u) + warp * L::UNIT_BYTES, b_at = slot_of(u) + R::A_BYTES + b_lane;
      const Fp8Unit<L> unit(at, u, keep_at, g, t, lane);
#pragma unroll
      for (int i = 0; i < N / 8; i += 2) {
        float sums[2][4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint4 b = lds_matrices(b_at + 2 * j * N * 16 + 128 * i);
          mma_e4m3(sums[0], unit.a[j], b.x, b.y);
          mma_e4m3(sums[1], unit.a[j], b.z, b.w);
        }
#pragma unroll
        for (int e = 0; e < 8; e++) {
          float& to = c[i + e / 4][e % 4];
          to = fmaf(unit.scales.scale[e >> 1 & 1], sums[e / 4][e % 4], to);
        }
      }
      if (u + 1 == piece.last || (u + 1) % FP8_SUMS == 0) add_sums(max(piece.first, u / FP8_SUMS * FP8_SUMS), u + 1);
    }
    __syncthreads();  // the next piece's units may come
    const int half = warp >> 2, first_row = tile * TILE_ROWS, column0 = columns * N;
    if (!join_sums<N>(p, piece, c, half, threadIdx.x & 127)) continue;
    take_factors_out<N>((const float*)(p.x + arranged.factors) + column0, t, c);
    if (p.y_type == BF16)
      store_tile<N>(p, c, first_row, column0, lane, pack_bf16);
    else if (p.y_type == F16)
      store_tile<N>(p, c, first_row, column0, lane, pack_halves);
    else
      store_floats<N>(p, c, first_row - (warp & 3) * TILE_ROWS, column0, threadIdx.x & 127);
  }
#endif
}

}  // namespace taper

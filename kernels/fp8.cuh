// y = x W^T as fp8_parts.cuh says, on compute capability 9.0, by products of whole warpgroups.
//
// Work split   Two warpgroups of consumers, and one whose first warp fetches weights and whose second fetches
//              activations.
// Budget       A unit of N = 128 is 512 cycles of the tensor cores, for both warpgroups. A warp issues 152 instructions for
//              it, 64 of them adding sums in f32; products whose A and D are registers overlap with hardly any of them (the
//              same was seen with products alone and with the adding alone), so it takes some 1100. N = 256: 270
//              instructions, 2300 cycles of which 1024; N = 64: 123, and 8.6 KB of weights, 450 cycles of the memory.
//
// Launch       fp8_product_N: as prefill.cuh's, dynamic shared memory fp8_shared_bytes<N>().
#pragma once
#include "fp8_parts.cuh"
#include "prefill.cuh"

namespace taper {

template <class L, int N>
struct Fp8Rings {
  static constexpr int A_BYTES = PREFILL_TILES * L::UNIT_BYTES, B_BYTES = FP8_UNIT<N>, SUMS_SLOTS = 2,
                       SCRATCH = RESULT_BUFFER / 2, FIXED = CONSUMERS * SCRATCH + SUMS_SLOTS * FP8_SUMS_BYTES<N> + 512,
                       FIT = (232448 - FIXED) / (A_BYTES + B_BYTES), SLOTS = FIT > 12 ? 12 : FIT;
  static_assert(L::TRAILER == 0 && SLOTS >= 3 && 32 * (SLOTS + 1) <= 512, "");
};
template <class L, int N>
__host__ __device__ constexpr int fp8_shared_bytes() {
  using R = Fp8Rings<L, N>;
  return R::FIXED + R::SLOTS * (R::A_BYTES + R::B_BYTES);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// For each unit of a block's pieces calls before(unit), waits until a slot of a ring is empty, and has one lane call
// send(unit, slot, barrier), which enqueues copies of `bytes`. Called by a whole warp: addresses that are the same for
// all lanes are what the copies' instructions take.
template <int SLOTS, class Before, class Send>
__device__ __forceinline__ void fetch_units(uint32_t full, uint32_t empty, uint32_t bytes, Pieces& piece, int blocks,
                                            Before before, Send send) {
  Turn<SLOTS> turn;
  while (piece.next(blockIdx.x, gridDim.x, blocks))
    for (uint32_t u = piece.first; u < piece.last; u++, turn.next()) {
      before(u);
      mbarrier_wait(empty + 8 * turn.slot, turn.phase ^ 1);
      if (elected()) {
        mbarrier_expect(full + 8 * turn.slot, bytes);
        send(u, turn.slot, full + 8 * turn.slot);
      }
      __syncwarp();
    }
}
#endif

// S: columns of activations whose sums are made at once.
template <class L, int N, int S>
__device__ __forceinline__ void fp8_product(const Prefill& p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using R = Fp8Rings<L, N>;
  extern __shared__ __align__(128) uint8_t memory[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = __shfl_sync(~0u, threadIdx.x & 31, threadIdx.x & 31);
  const uint32_t b_ring = shared_address(memory), sums_ring = b_ring + R::SLOTS * R::B_BYTES,
                 a_ring = sums_ring + R::SUMS_SLOTS * FP8_SUMS_BYTES<N>, scratches = a_ring + R::SLOTS * R::A_BYTES,
                 full = scratches + CONSUMERS * R::SCRATCH, empty = full + 8 * R::SLOTS,
                 sums_full = empty + 8 * R::SLOTS, sums_empty = sums_full + 8 * R::SUMS_SLOTS;
  const Shape<L> shape(p.rows, p.cols);
  const int wide = ceil_div(p.batch, N), blocks = ceil_div(shape.tiles, PREFILL_TILES) * wide;
  const auto first_tile = [&](int block) { return block / wide * PREFILL_TILES; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::SLOTS; s++)
      mbarrier_init(full + 8 * s, 2), mbarrier_init(empty + 8 * s, CONSUMER_THREADS);  // full: weights, activations
    for (int s = 0; s < R::SUMS_SLOTS; s++)
      mbarrier_init(sums_full + 8 * s, 1), mbarrier_init(sums_empty + 8 * s, CONSUMER_THREADS);
    mbarrier_init_fence();
  }
  __syncthreads();
  const Fp8Arranged arranged(wide * N, shape.units);
  let_next_kernel_start();
  Pieces piece(shape.units, p.cut);
  const uint32_t me = blockIdx.x, grid = gridDim.x;
  if (warp >= CONSUMERS) {
    give_registers<40>();
    if (warp == CONSUMERS) {
      const uint64_t policy = evict_first_policy();
      fetch_units<R::SLOTS>(
          full, empty, R::A_BYTES, piece, blocks, [](int) {},
          [&](int u, int slot, uint32_t bar) {
            // Tiles past the matrix's last repeat its first: their products are dropped.
            const int tile0 = first_tile(piece.block), there = shape.tiles - tile0;
#pragma unroll
            for (int i = 0; i < PREFILL_TILES; i++)
              bulk_copy(a_ring + slot * R::A_BYTES + i * L::UNIT_BYTES,
                        p.weights + (i < there ? (tile0 + i) * shape.tile_bytes() : 0) + (size_t)u * L::UNIT_BYTES,
                        L::UNIT_BYTES, bar, policy);
          });
    } else if (warp == CONSUMERS + 1) {
      Turn<R::SUMS_SLOTS> sums_turn;
      wait_for_previous_kernel();
      fetch_units<R::SLOTS>(
          full, empty, R::B_BYTES, piece, blocks,
          [&](uint32_t u) {
            if (u != piece.first && u % FP8_SUMS) return;
            mbarrier_wait(sums_empty + 8 * sums_turn.slot, sums_turn.phase ^ 1);
            if (elected()) {
              const uint32_t bar = sums_full + 8 * sums_turn.slot;
              const size_t at = (size_t)(piece.block % wide) * ceil_div(shape.units, FP8_SUMS) + u / FP8_SUMS;
              mbarrier_expect(bar, FP8_SUMS_BYTES<N>);
              bulk_copy(sums_ring + sums_turn.slot * FP8_SUMS_BYTES<N>, p.x + arranged.sums + at * FP8_SUMS_BYTES<N>,
                        FP8_SUMS_BYTES<N>, bar);
            }
            __syncwarp();
            sums_turn.next();
          },
          [&](int u, int slot, uint32_t bar) {
            bulk_copy(b_ring + slot * R::B_BYTES, p.x + ((size_t)(piece.block % wide) * shape.units + u) * R::B_BYTES,
                      R::B_BYTES, bar);
          });
    }
    __syncwarp();
    return;
  }
  take_registers<232>();
  wait_for_previous_kernel();
  const int half = warp >> 2, place = threadIdx.x & 127, t = lane & 3;
  Turn<R::SLOTS> turn;
  Turn<R::SUMS_SLOTS> sums_turn;
  float c[N / 8][4], sums[S / 8][4] = {};
  const uint32_t anew = gridDim.z - 1;  // zero: see wgmma_e4m3
  const uint32_t b_first = (uint32_t)b_descriptor(b_ring, N * 16);
  const auto descriptor = [](uint32_t low) { return (b_descriptor(0, N * 16) & ~(uint64_t)0x3FFF) | low; };
  const uint32_t kept = scratches + warp * R::SCRATCH, g = lane >> 2, keep_at = keep_place(kept, g, t);
  const auto add_sums = [&](uint32_t first, uint32_t last) {
    uint32_t high[4], low[4];
    __syncwarp();
    zero_fragments(kept, g, t, first, last, high, low);
    __syncwarp();  // the next units' may be kept
    // Chunks of eight units: the upper parts of their sums, the lower ones.
    const uint64_t b = b_descriptor(sums_ring + sums_turn.slot * FP8_SUMS_BYTES<N>, N * 32);
    mbarrier_wait(sums_full + 8 * sums_turn.slot, sums_turn.phase);
    wgmma_fence();
    wgmma<false>(c, high, b);
    wgmma<false>(c, low, b);
    wgmma<false>(c, high, b + N);
    wgmma_commit();
    wgmma_wait<0>();
    mbarrier_arrive(sums_empty + 8 * sums_turn.slot);
    sums_turn.next();
  };
  while (piece.next(me, grid, blocks)) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) c[i / 4][i % 4] = 0;
    uint32_t used = 0;  // of the unit before: released late, as an arrival may overtake loads that went before it
    for (uint32_t u = piece.first; u < piece.last;) {
      const uint32_t first = u, last = min(piece.last, u / FP8_SUMS * FP8_SUMS + FP8_SUMS);
#pragma unroll 1
      for (; u < last; u++, turn.next()) {
        const uint32_t at = a_ring + turn.slot * R::A_BYTES + warp * L::UNIT_BYTES;
        mbarrier_wait(full + 8 * turn.slot, turn.phase);
        const Fp8Unit<L> unit(at, u, keep_at, g, t, lane);
        const uint32_t low = __shfl_sync(~0u, (b_first & 0x3FFF) + turn.slot * (R::B_BYTES / 16), 0);
#pragma unroll
        for (int s = 0; s < N / S; s++) {
          wgmma_fence();
#pragma unroll
          for (int j = 0; j < 4; j++) wgmma_e4m3(sums, unit.a[j], descriptor(low + 2 * j * N + s * S), j ? 1 : anew);
          wgmma_commit();
          wgmma_wait<0>();
          if (s == 0 && used) mbarrier_arrive(used);
#pragma unroll
          for (int i = 0; i < S / 2; i++) {
            float& to = c[s * (S / 8) + i / 4][i % 4];
            to = fmaf(unit.scales.scale[i >> 1 & 1], sums[i / 4][i % 4], to);
          }
        }
        used = empty + 8 * turn.slot;
      }
      add_sums(first, last);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
    if (used) mbarrier_arrive(used);

    if (!join_sums<N>(p, piece, c, half, place)) continue;
    take_factors_out<N>((const float*)(p.x + arranged.factors) + piece.block % wide * N, t, c);
    const int first_row = (first_tile(piece.block) + 4 * half) * TILE_ROWS, column0 = piece.block % wide * N;
    const uint32_t scratch = scratches + 4 * half * R::SCRATCH;
    warpgroup_sync(half);  // all four warps have read what they kept there
    if (p.y_type == BF16)
      store_results<N>(p, c, first_row, column0, scratch, half, place, pack_bf16);
    else if (p.y_type == F16)
      store_results<N>(p, c, first_row, column0, scratch, half, place, pack_halves);
    else
      store_floats<N>(p, c, first_row, column0, place);
  }
  __syncwarp();
#endif
}

}  // namespace taper

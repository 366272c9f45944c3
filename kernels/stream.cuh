// y = x W^T for 17 to 64 columns of activations on compute capability 9.0: weights stream through registers, where
// each warp decodes what wgmma then reads as A, and activations, as they are in memory, through shared memory.
//
// Work split   A block is 64 WGS rows of the matrix x N columns of activations, K in units of 128 columns. A block of
//              the grid takes whole blocks of the product in turn; where that would leave SMs idle, the first `cut` of
//              them are laid end to end and cut into `grid` equal pieces instead, and the rest dealt out whole. All who
//              have a piece of a block leave its sums in `partial`, and add up a share of the block when all have come.
// Warps        WGS warpgroups multiply: a warp decodes a tile of 16 rows, from a ring of its own, a unit at a time; its
//              warpgroup multiplies that while others decode. FEEDERS more warps bring activations into the
//              order that wgmma reads: 16 bytes hold the eight columns of x that two registers of four lanes' A
//              fragments meet, so that chunk q of vector j is columns 32 j + 8 t + 2 q + e (t = 0..3, e = 0, 1); with
//              groups of 16 those of column_of in kquant.cuh.
// Budget       Weights come to 24.6 KB for 128 x 128 of `fixed`: 1500 cycles of an SM's share of the memory. Sixteen
//              warps take 1400 for 64 columns of activations. Adding up pieces takes 4 to 10 us, by the bytes in `partial`.
// Order        The sums of a block have one order: by K within a piece, then pieces. Pieces depend on the shape and
//              the grid only, so the result is the same from run to run.
//
// Launch       grid: at most the SMs (blocks wait for each other); block Stream<L, N, WGS>::BLOCK; dynamic shared
//              memory Stream<L, N, WGS>::BYTES. x: bf16, rows x_stride apart. partial, unless cut = 0: 2 * grid * 64
//              WGS * N floats; arrived: 2 * grid zeroed words, zero again at the end. cut: fewer than two blocks for
//              each of the grid. May be launched with programmatic stream serialisation (see product.cuh).
#pragma once
#include "stream_parts.cuh"
#include "stream_units.cuh"

namespace taper {

template <class L, int N, int WGS>
__device__ __forceinline__ void stream_product(const Prefill& p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Stream<L, N, WGS>;
  extern __shared__ __align__(128) uint8_t memory[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const Shape<L> shape(p.rows, p.cols);
  const uint32_t xs = shared_address(memory), x_full = xs + S::BARRIERS_AT, x_empty = x_full + 8 * S::X_SLOTS,
                 bars = x_empty + 8 * S::X_SLOTS;
  const uint32_t wide = ceil_div(p.batch, N), me = blockIdx.x, grid = gridDim.x,
                 blocks = ceil_div(p.rows, S::ROWS) * wide;
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::X_SLOTS; s++)
      mbarrier_init(x_full + 8 * s, S::FEEDERS), mbarrier_init(x_empty + 8 * s, S::WARPS);
    for (int s = 0; s < S::WARPS * S::SLOTS; s++) mbarrier_init(bars + 8 * s, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  const Pieces pieces(shape.units, p.cut);
  constexpr bool MOVE_REGISTERS = WGS == 4 || N >= 128 || StreamUnit<L>::APART;
  if (warp >= S::WARPS) {
    if constexpr (MOVE_REGISTERS) give_registers<WGS == 4 ? 64 : WGS == 3 ? 80 : 88>();
    wait_for_previous_kernel();
    using F = Feeder<L, N, WGS>;
    const F feeder{p, (int)threadIdx.x - 32 * S::WARPS, ((size_t)p.x & 15) == 0 && p.x_stride % 8 == 0};
    Pieces piece = pieces;
    bool more = piece.next(me, grid, blocks);
    uint32_t u = more ? piece.first : 0;
    int row0 = more ? piece.block % wide * N : 0;
    constexpr int LAST = F::STEPS - 1;
    uint4 now[F::EACH_STEP], then[F::EACH_STEP];
    const auto next = [&] {
      if (++u == piece.last) more = piece.next(me, grid, blocks), u = piece.first, row0 = piece.block % wide * N;
    };
    Turn<S::X_SLOTS> turn;
    const auto wait = [&] { mbarrier_wait(x_empty + 8 * turn.slot, turn.phase ^ 1); };
    const auto done = [&] {
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(x_full + 8 * turn.slot);
      turn.next();
    };
    // `then` is the second step of the unit, or the next unit.
    bool one = more;
    if (one) feeder.template load<0>(now, row0, u * UNIT_COLS);
#pragma unroll 1
    while (one) {
      if (LAST == 0) next();
      const bool two = LAST || more;
      if (two) feeder.template load<LAST>(then, row0, u * UNIT_COLS);
      wait();
      feeder.template store<0>(now, xs + turn.slot * S::X_BYTES);
      if (LAST == 0) done();
      if (!two) break;
      next();
      one = more;
      if (one) feeder.template load<0>(now, row0, u * UNIT_COLS);
      if (LAST == 0) wait();
      feeder.template store<LAST>(then, xs + turn.slot * S::X_BYTES);
      done();
    }
    __syncwarp();
  } else {
    if constexpr (MOVE_REGISTERS) take_registers<WGS == 4 ? 104 : WGS == 3 ? 144 : 168>();
    const int half = warp >> 2, place = threadIdx.x & 127;
    const uint32_t scratch = xs + S::SCRATCH_AT + half * S::SCRATCH, mine = scratch + (warp & 3) * (S::SCRATCH / 4),
                   ring = xs + S::RINGS_AT + warp * S::SLOTS * S::SLOT_BYTES, full = bars + 8 * warp * S::SLOTS;
    const uint64_t policy = wide > 1 ? evict_normal_policy() : evict_first_policy();
    // Where the warp's tile of a block is. Tiles past the matrix's last repeat its first: their products are dropped.
    const auto tile_of = [&](uint32_t block) {
      const int tile = block / wide * S::WARPS + warp;
      return p.weights + (tile < shape.tiles ? tile * shape.tile_bytes() : 0);
    };
    Pieces ahead = pieces;
    bool more = ahead.next(me, grid, blocks);
    uint32_t to_fetch = more ? ahead.first : 0;
    const uint8_t* tile = tile_of(more ? ahead.block : 0);
    const auto count_from = [](uint32_t u, uint32_t last) { return min(last - u, S::UNITS - u % S::UNITS); };
    const auto fetch = [&](uint32_t slot) {
      if (!more) return;
      const uint32_t count = count_from(to_fetch, ahead.last), stage = to_fetch / L::UNITS;
      if (elected()) {
        const uint32_t bar = full + 8 * slot, to = ring + slot * S::SLOT_BYTES;
        mbarrier_expect(bar, count * L::UNIT_BYTES + L::TRAILER);
        bulk_copy(to, tile + to_fetch * L::UNIT_BYTES + stage * L::TRAILER, count * L::UNIT_BYTES, bar, policy);
        if (L::TRAILER)
          bulk_copy(to + S::UNITS * L::UNIT_BYTES,
                    tile + min((stage + 1) * L::UNITS, (uint32_t)shape.units) * L::UNIT_BYTES + stage * L::TRAILER,
                    L::TRAILER, bar, policy);
      }
      __syncwarp();
      to_fetch += count;
      if (to_fetch == ahead.last) {
        more = ahead.next(me, grid, blocks), to_fetch = ahead.first;
        if (more) tile = tile_of(ahead.block);
      }
    };
    for (int s = 0; s < S::SLOTS; s++) fetch(s);
    wait_for_previous_kernel();

    Turn<S::X_SLOTS> x_turn;
    Turn<S::SLOTS> turn;
    uint32_t left = 0, unit_at = ring;  // units of the slot that are yet to be read
    constexpr bool APART = StreamUnit<L>::APART;
    StreamUnit<L> unit;
    const uint32_t x_first = (uint32_t)b_descriptor(xs, N * 16);
    const auto descriptor = [](uint32_t low) { return (b_descriptor(0, 0) & ~(uint64_t)0xFFFFFFFF) | low; };
    Pieces piece = pieces;
    // Where the sums of a warpgroup `of` are left: of a block's first piece of the product's block, or another.
    const auto plane = [&](uint32_t block, bool later, uint32_t of) {
      return (float4*)p.partial + (((size_t)block * 2 + later) * WGS + of) * (N / 8) * 128 + place;
    };
    float c[N / 8][4], apart[APART ? N / 8 : 1][4];
    uint32_t a[4][8];
    const auto load = [&](uint32_t u) {
      if (left == 0) {
        mbarrier_wait(full + 8 * turn.slot, turn.phase);
        unit_at = ring + turn.slot * S::SLOT_BYTES, left = count_from(u, piece.last);
      }
      const uint32_t trailer = ring + turn.slot * S::SLOT_BYTES + S::UNITS * L::UNIT_BYTES;
      unit.load(p, unit_at, trailer, u % L::UNITS, lane);
    };
    while (piece.next(me, grid, blocks)) {
#pragma unroll
      for (int i = 0; i < N / 2; i++) c[i / 4][i % 4] = 0;
      load(piece.first);
#pragma unroll 1
      for (uint32_t u = piece.first; u < piece.last; u++) {
#pragma unroll
        for (int j = 0; j < 4; j++) unit.vector(j, a[j]);
        if (unit.needs_repair()) unit.repair(p, 0, 4, a, mine, lane);
        float scale[2];
        if constexpr (APART) {
#pragma unroll
          for (int i = 0; i < N / 2; i++) apart[i / 4][i % 4] = 0;
          scale[0] = unit.scale(0), scale[1] = unit.scale(1);
        }
        mbarrier_wait(x_full + 8 * x_turn.slot, x_turn.phase);
        const uint32_t x = x_first + x_turn.slot * (S::X_BYTES / 16);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 8; k++)
          if constexpr (APART)
            wgmma<false>(apart, a[k / 2] + k % 2 * 4, descriptor(x + k * (N * 2)));
          else
            wgmma<false>(c, a[k / 2] + k % 2 * 4, descriptor(x + k * (N * 2)));
        wgmma_commit();
        unit_at += L::UNIT_BYTES;
        if (--left == 0) {  // all that was read there has been decoded
          __syncwarp();
          fetch(turn.slot);
          turn.next();
        }
        if (u + 1 < piece.last) load(u + 1);
        wgmma_wait<0>();
        if (lane == 0) mbarrier_arrive(x_empty + 8 * x_turn.slot);
        x_turn.next();
        if constexpr (APART) {
#pragma unroll
          for (int i = 0; i < N / 2; i++) {
            asm volatile("" : "+f"(apart[i / 4][i % 4])::"memory");
            c[i / 4][i % 4] = fmaf(scale[i >> 1 & 1], apart[i / 4][i % 4], c[i / 4][i % 4]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");

      if (piece.last - piece.first < piece.units) {  // others have the rest
        float4* to = plane(me, piece.first > 0, half);
#pragma unroll
        for (int i = 0; i < N / 8; i++) __stcg(to + i * 128, make_float4(c[i][0], c[i][1], c[i][2], c[i][3]));
        bar_sync<8, 32 * S::WARPS>();
        const uint32_t first = piece.block * piece.units;
        if (threadIdx.x == 0) atomic_add_ordered(p.arrived + 2 * piece.owner(first, grid), 1);
        continue;
      }
      warpgroup_sync(half);  // all four warps have read what repairs kept in the scratch memory
      store_results<N>(p, c, (piece.block / wide * S::WARPS + 4 * half) * TILE_ROWS, piece.block % wide * N, scratch,
                       half, place, pack_bf16);
    }
    // Blocks that were cut: everybody who has a piece of one adds up some chunks of it, 16 columns of 64 rows each.
    const auto join = [&](uint32_t block) {
      const uint32_t first = block * pieces.units, owner = pieces.owner(first, grid),
                     count = pieces.owner(first + pieces.units - 1, grid) - owner + 1;
      uint32_t* const arrived = p.arrived + 2 * owner;
      if (threadIdx.x == 0) await_count(arrived, count);
      bar_sync<8, 32 * S::WARPS>();
#pragma unroll 1
      for (uint32_t chunk = me - owner + half * count; chunk < WGS * N / 16; chunk += WGS * count) {
        const uint32_t of = chunk % WGS, s = chunk / WGS;
        float sum[2][4] = {};
#pragma unroll 4
        for (uint32_t other = 0; other < count; other++)
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const float4 v = __ldcg(plane(owner + other, other > 0, of) + (2 * s + k) * 128);
            sum[k][0] += v.x, sum[k][1] += v.y, sum[k][2] += v.z, sum[k][3] += v.w;
          }
        store_results<16>(p, sum, (block / wide * S::WARPS + 4 * of) * TILE_ROWS, block % wide * N + 16 * s, scratch,
                          half, place, pack_bf16);
      }
      bar_sync<8, 32 * S::WARPS>();
      if (threadIdx.x == 0 && atomic_add_ordered(arrived + 1, 1) == count - 1) arrived[0] = arrived[1] = 0;
    };
    const uint32_t begin = pieces.start(me, grid), end = pieces.start(me + 1, grid), units = pieces.units;
    if (begin < end && (begin % units || end - begin < units)) join(begin / units);
    if (begin < end && end % units && end / units != begin / units) join(end / units);
  }
#endif
}

}  // namespace taper

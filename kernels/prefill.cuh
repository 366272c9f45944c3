// y = x W^T for many columns of activations (17 to 192) on compute capability 9.0: some warps decode weights into shared
// memory, others do nothing but multiply them there (wgmma with both operands in shared memory).
//
// Work split   A block is 128 rows of the matrix x N columns of activations (N = 32, 64 or 128), K in units of 128
//              columns. CLUSTER blocks of neighbouring rows share the activations: each fetches a part of them for all.
//              A cluster of the grid takes whole clusters of the product in turn; where that would leave SMs idle, the
//              first `cut` of them are laid end to end and cut into as many equal pieces as there are clusters instead,
//              and the rest dealt out whole. Who has the first piece of a block adds the others' sums, in order.
//              For small matrices: PARTS blocks have a part each of the same block's K, and add up through each other's
//              shared memory.
// Warps        Two warpgroups multiply, 64 rows each. Each decoder takes a tile of the block, or half of each of its
//              units, with a ring of its own (prefill_decode.cuh); one warp fetches activations.
// Operands     64 columns of K at a time, swizzled (128 bytes): weights as decoders write them, tensor copies of x as it
//              is. What lies past the matrix's columns comes as zeros.
// Budget       shared memory gives 128 bytes a cycle. For a unit of K that takes, in cycles: weights to the rings and out
//              of them 390, written as bf16 256, read by the tensor cores 256; x to shared memory 2 N, read 4 N. The
//              tensor cores need 8 N. N = 64 takes 1650 cycles, N = 128 1900: a decoder spends some 200 instructions and
//              1100 to 1400 cycles on a unit, most of them waiting for shared memory.
// Order        The sums of a block have one order: by K within a piece, then pieces. Pieces depend on the shape and the
//              grid only, so the result is the same from run to run.
//
// Launch       grid: at most the SMs (blocks wait for each other), in clusters of CLUSTER or PARTS; block
//              PREFILL_BLOCK<N>; dynamic shared memory prefill_shared_bytes<L, N>(). map: x, swizzled, in boxes of 64
//              columns x box_rows rows, a multiple of 8: the batch, or if that is more N, over CLUSTER.
//              partial, unless cut = 0 or PARTS > 1: grid * 128 * N floats; arrived: 2 * grid zeroed words, zero again
//              at the end. cut: fewer than two for each cluster of the grid; with PARTS all blocks, grid: PARTS for each.
//              May be launched with programmatic stream serialisation (see product.cuh).
#pragma once
#include "prefill_decode.cuh"

namespace taper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A warpgroup's sums, in the place of activations that nobody reads any more.
template <int N>
__device__ __forceinline__ void leave_sums(uint32_t to, const float (&c)[N / 8][4], int half, int place) {
  bar_sync<3, CONSUMER_THREADS>();  // the other warpgroup has read them too
  to += half * (N / 8 * 2048) + place * 16;
#pragma unroll
  for (int i = 0; i < N / 8; i++)
    sts128(to + i * 2048, make_uint4(__float_as_uint(c[i][0]), __float_as_uint(c[i][1]), __float_as_uint(c[i][2]),
                                     __float_as_uint(c[i][3])));
}
// Adds up what the blocks of the cluster have left, each its share of the columns.
template <int N, int PARTS>
__device__ __forceinline__ void add_sums(const Prefill& p, const PrefillWork& work, uint32_t from, uint32_t scratch,
                                         int half, int place) {
  const uint32_t part = work.me % PARTS, block = work.me / PARTS;
  from += half * (N / 8 * 2048) + place * 16;
#pragma unroll 1
  for (int s = N / 16 * part / PARTS; s < (int)(N / 16 * (part + 1) / PARTS); s++) {
    float4 v[PARTS][2];
#pragma unroll
    for (int other = 0; other < PARTS; other++)
#pragma unroll
      for (int k = 0; k < 2; k++) v[other][k] = lds_float4_of(from + (2 * s + k) * 2048, other);
    float c[2][4] = {};
#pragma unroll
    for (int other = 0; other < PARTS; other++)
#pragma unroll
      for (int k = 0; k < 2; k++)
        c[k][0] += v[other][k].x, c[k][1] += v[other][k].y, c[k][2] += v[other][k].z, c[k][3] += v[other][k].w;
    store_results<16>(p, c, (block / work.wide * PREFILL_TILES + 4 * half) * TILE_ROWS, block % work.wide * N + 16 * s,
                      scratch + half * 2 * RESULT_BUFFER, half, place, pack_bf16);
  }
}
#endif

// PARTS: of a block's K, each of which another block of the cluster has; then clusters do not share activations.
template <class L, int N, int CLUSTER, int PARTS = 1>
__device__ __forceinline__ void prefill_product(const TensorMap& map, const Prefill& p) {
  static_assert(CLUSTER == 1 || PARTS == 1, "");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using M = PrefillMemory<L, N>;
  extern __shared__ __align__(128) uint8_t memory[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const uint32_t rank = CLUSTER > 1 ? cluster_rank() : 0;
  const PrefillPlaces<L, N, CLUSTER> at((shared_address(memory) + 1023) & ~1023u);
  const PrefillWork work = PrefillWork::of<N, CLUSTER>(p);
  const Pieces pieces(ceil_div(p.cols, UNIT_COLS), p.cut);
  if (threadIdx.x == 0) at.init();
  if (threadIdx.x == 32) prefetch_map(map);
  if (CLUSTER * PARTS > 1)
    cluster_sync();
  else
    __syncthreads();
  let_next_kernel_start();
  if (warp >= CONSUMERS) {
    const int number = warp - CONSUMERS;
    const Decoder decoder{number % PREFILL_TILES, number / PREFILL_TILES, lane, rank};
    if (number == DECODERS<N>) {
      wait_for_previous_kernel();
      Activations<L, N, CLUSTER> activations(map, p, at, work, pieces, rank);
      while (activations.now.more) activations.fetch();
    } else if constexpr (DECODERS<N> == 2 * PREFILL_TILES)
      decode_halves<L, N, CLUSTER>(p, at, work, pieces, decoder);
    else
      decode_units<L, N, CLUSTER>(p, at, work, pieces, decoder);
    __syncwarp();
  } else {
    wait_for_previous_kernel();
    const int half = warp >> 2, place = threadIdx.x & 127;
    const uint32_t scratch = at.scratch + half * M::SCRATCH;
    const auto release = [&](uint32_t a_slot, uint32_t x_slot) {
      if (lane == 0) mbarrier_arrive(at.a_empty + 8 * a_slot);
      if (CLUSTER == 1) {
        if (lane == 0) mbarrier_arrive(at.x_empty + 8 * x_slot);
      } else if (lane < CLUSTER)
        mbarrier_arrive_at(at.x_empty + 8 * x_slot, lane);
    };
    Turn<M::A_SLOTS> a_turn;
    Turn<M::X_SLOTS> x_turn;
    Pieces piece = pieces;
    const uint64_t a_first = swizzled_descriptor(at.a + half * (M::A_BYTES / 2)), x_first = swizzled_descriptor(at.x);
    while (work.next(piece)) {
      float c[N / 8][4];
#pragma unroll
      for (int i = 0; i < N / 2; i++) c[i / 4][i % 4] = 0;
      uint32_t a_used = 0, x_used = 0;
#pragma unroll 1
      for (uint32_t h = 2 * piece.first; h < 2 * piece.last; h++) {
        mbarrier_wait(at.x_full + 8 * x_turn.slot, x_turn.phase);
        mbarrier_wait(at.a_full + 8 * a_turn.slot, a_turn.phase);
        const uint64_t a = a_first + a_turn.slot * (M::A_BYTES / 16), x = x_first + x_turn.slot * (M::X_BYTES / 16);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_shared(c, a + 2 * k, x + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        if (h > 2 * piece.first) release(a_used, x_used);
        a_used = a_turn.slot, x_used = x_turn.slot;
        a_turn.next(), x_turn.next();
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
      release(a_used, x_used);
      const auto plane = [&](uint32_t cluster) {
        return (float4*)p.partial + (((size_t)cluster * CLUSTER + rank) * 2 + half) * (N / 8) * 128 + place;
      };
      const auto flag = [&](uint32_t cluster) { return p.arrived + (cluster * CLUSTER + rank) * 2 + half; };
      if constexpr (PARTS > 1) {  // the one piece of this block
        leave_sums<N>(at.x, c, half, place);
        continue;
      }
      if (piece.first > 0) {  // another cluster adds it
        float4* to = plane(work.me);
#pragma unroll
        for (int i = 0; i < N / 8; i++) __stcg(to + i * 128, make_float4(c[i][0], c[i][1], c[i][2], c[i][3]));
        warpgroup_sync(half);
        if (place == 0) set_flag(flag(work.me));
        continue;
      }
      if (piece.last < piece.units) {
        const uint32_t end = (piece.block + 1) * piece.units;
        for (uint32_t other = work.me + 1; piece.start(other, work.grid) < end; other++) {
          if (piece.start(other, work.grid) == piece.start(other + 1, work.grid)) continue;
          if (place == 0) await_flag(flag(other));
          warpgroup_sync(half);
          if (place == 0) *flag(other) = 0;
          const float4* from = plane(other);
          constexpr int TOGETHER = N % 128 == 0 ? 16 : 8;
#pragma unroll
          for (int i0 = 0; i0 < N / 8; i0 += TOGETHER) {
            float4 v[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) v[i] = __ldcg(from + (i0 + i) * 128);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
              c[i0 + i][0] += v[i].x, c[i0 + i][1] += v[i].y, c[i0 + i][2] += v[i].z, c[i0 + i][3] += v[i].w;
          }
        }
      }
      store_results<N>(p, c, ((piece.block / work.wide * CLUSTER + rank) * PREFILL_TILES + 4 * half) * TILE_ROWS,
                       piece.block % work.wide * N, scratch, half, place, pack_bf16);
    }
  }
  if constexpr (PARTS > 1) {
    cluster_sync();
    if (warp < CONSUMERS) add_sums<N, PARTS>(p, work, at.x, at.scratch, warp >> 2, threadIdx.x & 127);
  }
  if (CLUSTER * PARTS > 1) cluster_sync();  // nobody arrives at the barriers of a block that is gone, or reads its sums
#endif
}

}  // namespace taper

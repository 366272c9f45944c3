// y = x W^T for 17 columns of activations and more on compute capability 9.0: weights stream through registers, where
// each warp decodes what wgmma then reads as A, and activations through shared memory.
//
// Work split   A block is 64 WGS rows of the matrix x N columns of activations, K in units of 128 columns. A block of
//              the grid takes whole blocks of the product in turn; where that would leave SMs idle, the first `cut` of
//              them are laid end to end and cut into `grid` equal pieces instead, and the rest dealt out whole. Who has
//              the first piece of a block adds the others' sums, in order. With parts > 1 each block is that many
//              pieces, of one cluster, whose sums meet in shared memory.
// Warps        WGS warpgroups multiply: a warp decodes a tile of 16 rows, from a ring of its own. FEEDERS more warps
//              bring activations into the order that wgmma reads: 16 bytes hold the eight columns of x that two
//              registers of four lanes' A fragments meet (warpgroup.cuh).
// Order        The sums of a block have one order: by K within a piece, then pieces. Pieces depend on the shape and
//              the grid only, so the result is the same from run to run.
#pragma once
#include "stream_units.cuh"

namespace taper {

#ifndef STREAM_UNITS
#define STREAM_UNITS 2
#endif
#ifndef STREAM_SLOTS
#define STREAM_SLOTS 2
#endif

template <class L, int N, int WGS>
struct Stream {
  static constexpr int WARPS = 4 * WGS, FEEDERS = WGS > 2 ? 4 : 8, BLOCK = 32 * (WARPS + FEEDERS), ROWS = 64 * WGS,
                       X_BYTES = N * UNIT_COLS * 2, UNITS = L::UNIT_BYTES < 1700 ? 4 : WGS > 2 ? 1 : STREAM_UNITS, SLOTS = WGS > 2 ? 2 : STREAM_SLOTS,
                       SLOT_BYTES = UNITS * L::UNIT_BYTES + L::TRAILER, SCRATCH = 2 * RESULT_BUFFER, BARRIERS = 512,
                       ROOM = 232448 - WGS * SCRATCH - BARRIERS - WARPS * SLOTS * SLOT_BYTES, FIT = ROOM / X_BYTES,
                       X_SLOTS = FIT > 6 ? 6 : FIT, RINGS_AT = X_SLOTS * X_BYTES,
                       SCRATCH_AT = RINGS_AT + WARPS * SLOTS * SLOT_BYTES, BARRIERS_AT = SCRATCH_AT + WGS * SCRATCH,
                       BYTES = BARRIERS_AT + BARRIERS;
  static_assert(X_SLOTS >= 2 && 16 * X_SLOTS + 8 * SLOTS * WARPS <= BARRIERS && SLOT_BYTES % 16 == 0, "");
  static_assert(WGS * N * 256 <= RINGS_AT + WARPS * SLOTS * SLOT_BYTES, "");  // sums of parts
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// ---- PTX that only this kernel needs ----
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What lies in the shared memory of block `rank` of the cluster where `at` lies in one's own.
__device__ __forceinline__ float4 lds_float4_of(uint32_t at, uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n\t.reg .b32 r;\n\tmapa.shared::cluster.u32 r, %4, %5;\n\tld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [r];\n\t}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(at), "r"(rank)
      : "memory");
  return v;
}

// Brings activations into order, of a unit at a time.
template <class L, int N, int WGS>
struct Feeder {
  using S = Stream<L, N, WGS>;
  static constexpr int THREADS = 32 * S::FEEDERS, COUNT = N * 16 / THREADS;
  static_assert(N * 16 % THREADS == 0, "");
  const Prefill& p;
  const int tid;
  const bool aligned;
  // Eight activations, from column k on of row n.
  __device__ __forceinline__ void load(uint4 (&v)[COUNT], int row0, int k0) const {
#pragma unroll
    for (int d = 0; d < COUNT; d++) {
      const int i = tid + d * THREADS, n = row0 + i / 4 % N, k = k0 + i / 4 / N * 32 + i % 4 * 8;
      v[d] = make_uint4(0, 0, 0, 0);
      if (n >= p.batch) continue;
      const uint16_t* from = (const uint16_t*)p.x + (size_t)n * p.x_stride + k;
      if (aligned && k + 8 <= p.cols)
        v[d] = __ldcg((const uint4*)from);
      else if (k < p.cols)
        v[d] = load_end(from, p.cols - k);
    }
  }
  __device__ static __noinline__ uint4 load_end(const uint16_t* from, int left) {
    uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (e < left) w[e / 2] |= (uint32_t)from[e] << 16 * (e & 1);
    return make_uint4(w[0], w[1], w[2], w[3]);
  }
  __device__ __forceinline__ void store(const uint4 (&v)[COUNT], uint32_t to) const {
#pragma unroll
    for (int d = 0; d < COUNT; d++) {
      const int i = tid + d * THREADS, n = i / 4 % N, j = i / 4 / N, t = i % 4;
      const uint32_t words[4] = {v[d].x, v[d].y, v[d].z, v[d].w};
      const uint32_t at = to + (4 * j * N + n) * 16;
#pragma unroll
      for (int w = 0; w < 4; w++) {
        if constexpr (L::GROUP == 16) {  // in such an order that lanes meet different banks
          const uint32_t word = t & 2 ? words[w ^ 2] : words[w];
          sts32(at + (t / 2 * 2 + w % 2) * 16 * N + (t % 2 * 2 + (w / 2 ^ t / 2)) * 4, word);
        } else
          sts32(at + w * 16 * N + t * 4, words[w]);
      }
    }
  }
};
#endif

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
    for (int s = 0; s < S::X_SLOTS; s++) mbarrier_init(x_full + 8 * s, S::FEEDERS), mbarrier_init(x_empty + 8 * s, S::WARPS);
    for (int s = 0; s < S::WARPS * S::SLOTS; s++) mbarrier_init(bars + 8 * s, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  const Pieces pieces(shape.units, p.cut);
  if (warp >= S::WARPS) {
    if constexpr (N >= 128 || StreamUnit<L>::APART) give_registers<88>();
    if constexpr (WGS == 4) give_registers<64>();
    wait_for_previous_kernel();
    using F = Feeder<L, N, WGS>;
    const F feeder{p, (int)threadIdx.x - 32 * S::WARPS, ((size_t)p.x & 15) == 0 && p.x_stride % 8 == 0};
    Pieces piece = pieces;
    bool more = piece.next(me, grid, blocks);
    uint32_t u = more ? piece.first : 0;
    uint4 now[F::COUNT], then[F::COUNT];
    const auto load = [&](uint4 (&v)[F::COUNT]) {  // the next unit's, if there is one
      if (!more) return false;
      feeder.load(v, piece.block % wide * N, u * UNIT_COLS);
      if (++u == piece.last) more = piece.next(me, grid, blocks), u = piece.first;
      return true;
    };
    Turn<S::X_SLOTS> turn;
    const auto store = [&](const uint4 (&v)[F::COUNT]) {
      mbarrier_wait(x_empty + 8 * turn.slot, turn.phase ^ 1);
      feeder.store(v, xs + turn.slot * S::X_BYTES);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(x_full + 8 * turn.slot);
      turn.next();
    };
    bool first = load(now);
#pragma unroll 1
    while (first) {
      const bool second = load(then);
      store(now);
      if (!second) break;
      first = load(now);
      store(then);
    }
    __syncwarp();
  } else {
    if constexpr (N >= 128 || StreamUnit<L>::APART) take_registers<168>();
    if constexpr (WGS == 4) take_registers<104>();
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
    const auto count_from = [](uint32_t u, uint32_t last) { return min(last - u, S::UNITS - u % S::UNITS); };
    const auto fetch = [&](uint32_t slot) {
      if (!more) return;
      const uint32_t count = count_from(to_fetch, ahead.last), stage = to_fetch / L::UNITS;
      if (elected()) {
        const uint8_t* tile = tile_of(ahead.block);
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
      if (to_fetch == ahead.last) more = ahead.next(me, grid, blocks), to_fetch = ahead.first;
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
    float c[N / 8][4];
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
      uint32_t used = 0;  // barrier of the activations that the tensor cores may still read
      float apart[APART ? N / 8 : 1][4];
#pragma unroll 1
      for (uint32_t u = piece.first; u < piece.last; u++) {
        uint32_t a[2][8];
        float scale[2];
        if constexpr (APART) {
#pragma unroll
          for (int i = 0; i < N / 2; i++) apart[i / 4][i % 4] = 0;
          scale[0] = unit.scale(0), scale[1] = unit.scale(1);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
          uint32_t(&now)[8] = a[j & 1];
          unit.vector(p, j, now, mine, lane);
          if (j == 0) mbarrier_wait(x_full + 8 * x_turn.slot, x_turn.phase);
          const uint32_t x = x_first + x_turn.slot * (S::X_BYTES / 16) + j * (N * 4);
          wgmma_fence();
          if constexpr (APART)
            wgmma<false>(apart, now, descriptor(x)), wgmma<false>(apart, now + 4, descriptor(x + N * 2));
          else
            wgmma<false>(c, now, descriptor(x)), wgmma<false>(c, now + 4, descriptor(x + N * 2));
          wgmma_commit();
          if (j == 3) {
            unit_at += L::UNIT_BYTES;
            if (--left == 0) {  // all that was read there has been decoded
              __syncwarp();
              fetch(turn.slot);
              turn.next();
            }
            if (u + 1 < piece.last) load(u + 1);
          }
          wgmma_wait<1>();
          if (j == 0 && used && lane == 0) mbarrier_arrive(used);
        }
        if constexpr (APART) {
          wgmma_wait<0>();
#pragma unroll
          for (int i = 0; i < N / 2; i++) {
            asm volatile("" : "+f"(apart[i / 4][i % 4])::"memory");
            c[i / 4][i % 4] = fmaf(scale[i >> 1 & 1], apart[i / 4][i % 4], c[i / 4][i % 4]);
          }
        }
        used = x_empty + 8 * x_turn.slot;
        x_turn.next();
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
      if (lane == 0) mbarrier_arrive(used);

      if (p.parts > 1) {
        bar_sync<8, 32 * S::WARPS>();  // nobody reads activations or weights any more
        const uint32_t to = xs + half * (N / 8 * 2048) + place * 16;
#pragma unroll
        for (int i = 0; i < N / 8; i++)
          sts128(to + i * 2048, make_uint4(__float_as_uint(c[i][0]), __float_as_uint(c[i][1]), __float_as_uint(c[i][2]),
                                           __float_as_uint(c[i][3])));
        continue;
      }
      const auto plane = [&](uint32_t block) {
        return (float4*)p.partial + ((size_t)block * WGS + half) * (N / 8) * 128 + place;
      };
      const auto flag = [&](uint32_t block) { return p.arrived + block * WGS + half; };
      if (piece.first > 0) {  // another adds it
        float4* to = plane(me);
#pragma unroll
        for (int i = 0; i < N / 8; i++) __stcg(to + i * 128, make_float4(c[i][0], c[i][1], c[i][2], c[i][3]));
        warpgroup_sync(half);
        if (place == 0) set_flag(flag(me));
        continue;
      }
      if (piece.last < piece.units) {
        const uint32_t end = (piece.block + 1) * piece.units;
        for (uint32_t other = me + 1; piece.start(other, grid) < end; other++) {
          if (piece.start(other, grid) == piece.start(other + 1, grid)) continue;
          if (place == 0) await_flag(flag(other));
          warpgroup_sync(half);
          if (place == 0) *flag(other) = 0;
          const float4* from = plane(other);
          constexpr int TOGETHER = N >= 128 ? 16 : N / 8;
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
      store_results<N>(p, c, (piece.block / wide * S::WARPS + 4 * half) * TILE_ROWS, piece.block % wide * N, scratch,
                       half, place, pack_bf16);
    }
  }
  if (p.parts > 1) {
    cluster_sync();
    if (warp < S::WARPS) {
      const uint32_t part = me % p.parts, block = me / p.parts;
      const int half = warp >> 2, place = threadIdx.x & 127;
      const uint32_t from = xs + half * (N / 8 * 2048) + place * 16;
#pragma unroll 1
      for (uint32_t s = N / 16 * part / p.parts; s < N / 16 * (part + 1) / p.parts; s++) {
        float c[2][4] = {};
#pragma unroll 4
        for (int other = 0; other < p.parts; other++)
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const float4 v = lds_float4_of(from + (2 * s + k) * 2048, other);
            c[k][0] += v.x, c[k][1] += v.y, c[k][2] += v.z, c[k][3] += v.w;
          }
        store_results<16>(p, c, (block / wide * S::WARPS + 4 * half) * TILE_ROWS, block % wide * N + 16 * s,
                          xs + S::SCRATCH_AT + half * S::SCRATCH, half, place, pack_bf16);
      }
    }
    cluster_sync();  // nobody reads the sums of a block that is gone
  }
#endif
}

}  // namespace taper

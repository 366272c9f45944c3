// The product of layout `pair` (pair.cuh) with up to 16 columns of activations.
//
// As in product.cuh: one block per SM takes whole tiles and a slab of columns; 8 consumer warps, a producer. Here a
// warp takes four units of a stage at a time, the groups of four dealt round to the warps, so a warp meets every fourth
// stage. It could therefore mistake an old phase of a slot's barrier for the new one: each slot has two barriers for
// its arrivals, used in turn, and the ring at least five slots.
//
// Launch   grid groups * slabs; block 288; dynamic shared memory pair_shared_bytes(..); in_flight 3, or 2 with
//          programmatic launch; keep: with 5 slots as many as fit, to PAIR_MOST_KEPT, as all warps wait for one another
//          after so many tiles; slots: then as many as fit, to PAIR_MAX_SLOTS; slot_bytes: the largest stage + 16.
//          slabs, groups, partial, arrived as in product.cuh.
#pragma once
#include "pair.cuh"

namespace taper {

struct PairProduct {
  Product p;  // weights: the stages; overflow: the table of 256 entries
  const uint32_t* offsets;
  int slot_bytes, pad;
};

constexpr int GROUPS_A_STAGE = Pair::UNITS / Pair::GROUP;
constexpr int SHARED_REPAIRS = 64;  // of a stage: more are divided among its groups
constexpr int PAIR_MAX_SLOTS = 8, PAIR_BARRIER_BYTES = 256, ZERO_BYTES = 320;
constexpr int PAIR_MOST_KEPT = 8;  // tiles
__host__ __device__ constexpr int pair_shared_bytes(int cols, int slabs, int columns, int slots, int slot_bytes,
                                                    int keep) {
  return TABLE_BYTES + slots * slot_bytes + PAIR_BARRIER_BYTES + ZERO_BYTES + sums_bytes(keep, columns) +
         columns * activation_stride(slab_width<Pair>(cols, slabs));
}

#if __CUDA_ARCH__ >= 900
struct PairRing {
  uint32_t base, full, empty;
  int slots, slot_bytes;
  int stage = 0, place = 0, round = 0;  // the block's stage that a consumer is at, its slot and how often that was full
  __device__ PairRing(const PairProduct& p, uint32_t base_, uint32_t bars)
      : base(base_), full(bars), empty(bars + 16 * PAIR_MAX_SLOTS), slots(p.p.slots), slot_bytes(p.slot_bytes) {}
  __device__ void init(int tid) {
    if (tid == 0) {
      for (int s = 0; s < slots; s++)
        mbarrier_init(full + 16 * s, 1), mbarrier_init(full + 16 * s + 8, 1),
            mbarrier_init(empty + 8 * s, GROUPS_A_STAGE);
      mbarrier_init_fence();
    }
  }
  // To stage k of the block: slot k % slots, barrier k / slots % 2 of the slot, parity k / slots / 2 % 2.
  __device__ void advance(int k) {
    place += k - stage, stage = k;
    while (place >= slots) place -= slots, round++;
  }
  __device__ uint32_t slot() const { return base + place * slot_bytes; }
  __device__ void wait() const { mbarrier_wait(full + 16 * place + 8 * (round & 1), round >> 1 & 1); }
  __device__ void release(int times) const { mbarrier_arrive(empty + 8 * place, times); }
  // The whole producer warp: its lanes fetch 32 offsets at a time, before they are needed.
  __device__ void produce(const PairProduct& pp, const Part<Pair>& part, int lane) {
    const Product& p = pp.p;
    const int total = part.tiles * part.stages;
    const auto offset = [&](int k) {
      if (k >= total) return make_uint2(0, 0);
      const uint32_t* at =
          pp.offsets + (size_t)(part.tile0 + k / part.stages) * part.shape.stages + part.stage0 + k % part.stages;
      return make_uint2(__ldg(at), __ldg(at + 1));
    };
    const uint64_t policy = evict_first_policy();
    uint2 now = offset(lane), later = offset(32 + lane);
    PairRing landed = *this;
    for (int k = 0; k < total; k++) {
      if (k && k % 32 == 0) now = later, later = offset(k + 32 + lane);
      const uint32_t from = __shfl_sync(~0u, now.x, k & 31), to = __shfl_sync(~0u, now.y, k & 31);
      advance(k);
      if (k >= p.in_flight) landed.advance(k - p.in_flight);
      if (lane == 0) {
        if (k >= p.in_flight) landed.wait();
        if (round) mbarrier_wait(empty + 8 * place, (round & 1) ^ 1);
        const uint32_t bar = full + 16 * place + 8 * (round & 1), bytes = (to - from) * 16;
        mbarrier_expect(bar, bytes);
        bulk_copy(slot(), p.weights + (size_t)from * 16, bytes, bar, policy);
      }
      __syncwarp();
    }
  }
  __device__ void start(const PairProduct&, const Part<Pair>&, int) {}
};
#else
struct PairRing {  // a simple exchange: all threads copy a round of four stages, then decode it
  uint32_t base;
  int slot_bytes, stage = 0;
  __device__ PairRing(const PairProduct& p, uint32_t base_, uint32_t) : base(base_), slot_bytes(p.slot_bytes) {}
  __device__ void init(int) {}
  __device__ void produce(const PairProduct&, const Part<Pair>&, int) {}
  __device__ void advance(int k) { stage = k; }
  __device__ uint32_t slot() const { return base + stage % 4 * slot_bytes; }
  __device__ void load(const PairProduct& pp, const Part<Pair>& part, int first, int last, int tid) {
    for (int k = first; k < last; k++) {
      const uint32_t* at =
          pp.offsets + (size_t)(part.tile0 + k / part.stages) * part.shape.stages + part.stage0 + k % part.stages;
      const uint32_t from = __ldg(at), n = __ldg(at + 1) - from;
      for (uint32_t i = tid; i < n; i += CONSUMER_THREADS)
        async_copy16(base + k % 4 * slot_bytes + 16 * i, pp.p.weights + ((size_t)from + i) * 16);
    }
    async_commit(), async_wait<0>();
  }
};
#endif

// The lanes whose v has the bit.
template <uint32_t BIT>
__device__ __forceinline__ uint32_t ballot(uint32_t v) {
  uint32_t lanes;
  asm volatile("{.reg .pred p; .reg .b32 b; and.b32 b, %1, %2; setp.ne.u32 p, b, 0; vote.sync.ballot.b32 %0, p, -1;}"
               : "=r"(lanes)
               : "r"(v), "n"(BIT));
  return lanes;
}

// Repairs where there is one column of activations. They are sorted by row, so 32 of them are settled by five votes: a
// lane takes those of its rows g and g + 8, each fourth of them.
__device__ __forceinline__ void add_repairs_to_one(uint32_t at, int count, int lane, uint32_t x_column, float (&c)[4]) {
  float sums[2] = {};
  const uint32_t row0 = -(lane >> 2 & 1), row1 = -(lane >> 3 & 1), row2 = -(lane >> 4 & 1);
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const uint32_t e = lds32(at + 4 * min(first + lane, count - 1)),
                   others = (ballot<1>(e) ^ row0) | (ballot<2>(e) ^ row1) | (ballot<4>(e) ^ row2) |
                            ~__ballot_sync(~0u, first + lane < count),
                   bottom = ballot<8>(e), mine[2] = {~others & ~bottom, ~others & bottom};
    int i = lane & 3;
    const int n[2] = {__popc(mine[0]), __popc(mine[1])}, from[2] = {__ffs(mine[0]) - 1, __ffs(mine[1]) - 1};
    do {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint32_t r = __shfl_sync(~0u, e, from[h] + i);
        if (i < n[h])
          sums[h] = fmaf(__uint_as_float(r & 0xFFFF0000u), __uint_as_float(lds16(x_column + (r >> 3 & 0x7FE)) << 16),
                         sums[h]);
      }
      i += 4;
    } while (__any_sync(~0u, i < n[0] || i < n[1]));
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sums[h] += __shfl_xor_sync(~0u, sums[h], 1), sums[h] += __shfl_xor_sync(~0u, sums[h], 2);
    c[2 * h] += sums[h];
  }
}

// Sixteen repairs are one more product: its columns of A hold a weight in the repair's row, B the activations that it
// meets. The zeros of A must not meet infinities, so B has +-1 in their place, and for NaN: what the main product makes
// of the weight's stand-in is infinite, or NaN, already.
template <int NB>
__device__ __forceinline__ void add_repairs(uint32_t at, int count, int lane, const uint32_t (&x_column)[NB],
                                            float (&c)[NB][4]) {
  const uint32_t g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int first = 0; first < count; first += 16) {
    uint32_t top[2] = {0, 0}, bottom[2] = {0, 0}, k[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int which = first + 8 * (i >> 1) + 2 * t + (i & 1);
      const uint32_t e = lds32(at + 4 * min(which, count - 1)), row = which < count ? e & 15 : 16;
      k[i] = e >> 3 & 0x7FE;
      const uint32_t value = i & 1 ? e & 0xFFFF0000u : e >> 16;
      if (row == g) top[i >> 1] |= value;
      if (row == g + 8) bottom[i >> 1] |= value;
    }
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      uint32_t b[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        b[i] = lds16(x_column[nb] + k[2 * i]) | lds16(x_column[nb] + k[2 * i + 1]) << 16;
        const uint32_t not_finite = ((b[i] & 0x7F807F80u) + 0x00800080u) & 0x80008000u;
        if (not_finite) {
          const uint32_t mask = (not_finite >> 15) * 0xFFFFu;
          b[i] = (b[i] & ~mask) | (((b[i] & 0x80008000u) | 0x3F803F80u) & mask);
        }
      }
      mma(c[nb], top[0], bottom[0], top[1], bottom[1], b[0], b[1]);
    }
  }
}

// A group of units of a stage (fewer at its end) times their activations. `column` is the byte of the stage's first
// column in a row of activations.
template <int NB>
__device__ __forceinline__ void multiply_group(uint32_t stage, uint32_t units, uint32_t first, uint32_t table, int lane,
                                               const uint32_t (&x_row)[NB], uint32_t zeros, uint32_t column, bool one,
                                               uint32_t turn, float (&c0)[NB][4], float (&c1)[NB][4]) {
  constexpr int U = Pair::GROUP;
  const uint32_t bytes = stage + pair_header_bytes(units), tail = bytes + units * Pair::UNIT_BYTES,
                 head = stage + STAGE_HEAD + UNIT_HEAD * first, at_lane = bytes + first * Pair::UNIT_BYTES + lane * 16,
                 all_repairs = pair_repairs(stage);
  // One of a stage's groups does all its repairs, in each tile another; if they are many they share them.
  const uint32_t share = first / U, sole = turn % GROUPS_A_STAGE * U < units ? turn % GROUPS_A_STAGE : 0;
  uint32_t repairs = share == sole ? all_repairs : 0, repairs_at = tail;
  if (all_repairs > SHARED_REPAIRS) {
    const uint32_t from = all_repairs * share / GROUPS_A_STAGE,
                   end = first + U < units ? all_repairs * (share + 1) / GROUPS_A_STAGE : all_repairs;
    repairs_at += 4 * from, repairs = end - from;
  }
  PairStreams<U> streams;
  uint32_t at[U], x_at[U][NB];
#pragma unroll
  for (int u = 0; u < U; u++) {
    // A unit that is not there: the first again, times zero (finite weights: exponent 255 is not in the table).
    const bool there = u == 0 || first + u < units;
    const int unit = there ? u : 0;
    at[u] = at_lane + unit * Pair::UNIT_BYTES;
#pragma unroll
    for (int nb = 0; nb < NB; nb++)
      x_at[u][nb] = there ? x_row[nb] + column + (first + u) * UNIT_COLS * 2 : zeros + (lane & 3) * 16;
    streams.start(u, head + unit * UNIT_HEAD, tail, lane);
  }
  const uint32_t first_x = column - (lane & 3) * 16;
  if (NB == 1 && one && repairs) add_repairs_to_one(repairs_at, repairs, lane, x_row[0] + first_x, c1[0]);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint4 s[U];
#pragma unroll
    for (int u = 0; u < U; u++) s[u] = lds128(at[u] + 512 * j);
    uint4 x[U];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint32_t entry[U][4];
      streams.next(table, lane * 4, entry);
      if (NB == 1 && h == 0) {
#pragma unroll
        for (int u = 0; u < U; u++) x[u] = lds128(x_at[u][0] + 64 * j);
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        uint32_t a[4];
        join4(a, h ? s[u].z : s[u].x, h ? s[u].w : s[u].y, entry[u]);
#pragma unroll
        for (int nb = 0; nb < NB; nb++) {
          uint2 b = h ? make_uint2(x[u].z, x[u].w) : make_uint2(x[u].x, x[u].y);
          if (NB > 1) b = lds64(x_at[u][nb] + 64 * j + 8 * h);
          mma(h ? c1[nb] : c0[nb], a[0], a[1], a[2], a[3], b.x, b.y);
        }
      }
    }
  }
  if (NB == 1 && one) return;
  uint32_t x_column[NB];
#pragma unroll
  for (int nb = 0; nb < NB; nb++) x_column[nb] = x_row[nb] + first_x;
  add_repairs<NB>(repairs_at, repairs, lane, x_column, c1);
}

template <int NB>
__device__ __forceinline__ void pair_product(const PairProduct& pp) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Product& p = pp.p;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const Part<Pair> part(p);
  const int parts = p.x_type + 1, columns = p.batch * parts,
            stride = activation_stride(slab_width<Pair>(p.cols, p.slabs)), padded_rows = part.shape.tiles * TILE_ROWS;
  const uint32_t table = shared_address(memory), ring_at = table + TABLE_BYTES,
                 bars = ring_at + p.slots * pp.slot_bytes;
  const uint32_t zeros = bars + PAIR_BARRIER_BYTES, sums = zeros + ZERO_BYTES, xs = sums + sums_bytes(p.keep, columns);
  PairRing ring(pp, ring_at, bars);
  ring.init(tid - CONSUMER_THREADS);
  __syncthreads();
  if (warp == CONSUMERS) return ring.produce(pp, part, lane);
  const Table<CONSUMER_THREADS> entries(p.overflow, tid);
  if (tid < ZERO_BYTES / 4) sts32(zeros + 4 * tid, 0);
  let_next_kernel_start();
  entries.store(table, tid);
  wait_for_previous_kernel();
  load_activations<CONSUMER_THREADS>(xs, stride, p.x, p.x_type, p.x_stride, p.batch, p.cols, part.first_col(),
                                     part.width(), tid);
  async_commit();
  async_wait<0>();
  bar_sync<1, CONSUMER_THREADS>();

  uint32_t x_row[NB];
#pragma unroll
  for (int nb = 0; nb < NB; nb++) x_row[nb] = xs + min(8 * nb + g, columns - 1) * stride + t * 16;
  const uint32_t my_sums = sums + ((warp * columns + 2 * t) * TILE_ROWS + g) * 4;
  // Groups of a tile: a last stage may have fewer than the others.
  const int last_units = part.shape.units_of(part.stage0 + part.stages - 1),
            groups = GROUPS_A_STAGE * (part.stages - 1) + ceil_div(last_units, Pair::GROUP);
  float c0[NB][4] = {}, c1[NB][4] = {};

  for (int first_tile = 0; first_tile < part.tiles; first_tile += p.keep) {
    const int kept = min(p.keep, part.tiles - first_tile), n = kept * groups;
    uint32_t tile = (uint32_t)warp / groups, in = warp - tile * groups;
    const auto work = [&](int q) {
      const uint32_t stage = in / GROUPS_A_STAGE, k = (first_tile + tile) * part.stages + stage,
                     units = part.shape.units_of(part.stage0 + stage), first = in % GROUPS_A_STAGE * Pair::GROUP;
      ring.advance(k);
#if __CUDA_ARCH__ >= 900
      ring.wait();
#endif
      multiply_group<NB>(ring.slot(), units, first, table, lane, x_row, zeros, stage * Pair::UNITS * UNIT_COLS * 2,
                         columns == 1, first_tile + tile + stage, c0, c1);
      const RowShifts shifts(ring.slot(), lane);
#if __CUDA_ARCH__ >= 900
      __syncwarp();
      if (lane == 0) ring.release(first == 0 ? 1 + GROUPS_A_STAGE - ceil_div(units, Pair::GROUP) : 1);
#endif
      in += CONSUMERS;
      const uint32_t was = tile;
      while ((int)in >= groups) in -= groups, tile++;
      if (tile == was && q + CONSUMERS < n) return;
      // sums[kept][warp][column][row]
      const uint32_t mine = my_sums + was * CONSUMERS * columns * TILE_ROWS * 4;
      const float scale[2] = {power_of_two(shifts.top), power_of_two(shifts.bottom)};
#pragma unroll
      for (int nb = 0; nb < NB; nb++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = 8 * nb + 2 * t + (i & 1);
          if (column < columns)
            sts_float(mine + ((8 * nb + (i & 1)) * TILE_ROWS + 8 * (i >> 1)) * 4,
                      (c0[nb][i] + c1[nb][i]) * scale[i >> 1]);
          c0[nb][i] = c1[nb][i] = 0;
        }
    };
#if __CUDA_ARCH__ >= 900
    for (int q = warp; q < n; q += CONSUMERS) work(q);
#else
    // A round of groups lies in few stages; at most four of them are loaded together.
    for (int q0 = 0; q0 < n; q0 += CONSUMERS) {
      const auto stage_of = [&](int q) {
        return (first_tile + q / groups) * part.stages + q % groups / GROUPS_A_STAGE;
      };
      for (int first = q0, end = min(q0 + CONSUMERS, n); first < end;) {
        int last = first;
        while (last < end && stage_of(last) - stage_of(first) < 4) last++;
        ring.load(pp, part, stage_of(first), stage_of(last - 1) + 1, tid);
        bar_sync<1, CONSUMER_THREADS>();
        if (q0 + warp >= first && q0 + warp < last) work(q0 + warp);
        bar_sync<1, CONSUMER_THREADS>();
        first = last;
      }
    }
#endif
    bar_sync<1, CONSUMER_THREADS>();
    for (int i = tid; i < kept * p.batch * TILE_ROWS; i += CONSUMER_THREADS) {
      const int row = i & (TILE_ROWS - 1), m = i / TILE_ROWS % p.batch, k = i / TILE_ROWS / p.batch;
      float sum = 0;
      for (int s = 0; s < parts; s++)
        for (int w = 0; w < min(groups, CONSUMERS); w++)  // the warps that had a group of this tile
          sum += lds_float(
              sums +
              (((k * CONSUMERS + (k * groups + w) % CONSUMERS) * columns + m * parts + s) * TILE_ROWS + row) * 4);
      hand_on(p, padded_rows, part.slab, (part.tile0 + first_tile + k) * TILE_ROWS + row, m, sum);
    }
    if (first_tile + p.keep < part.tiles) bar_sync<1, CONSUMER_THREADS>();
  }
  add_slabs(p, part.tile0, part.tiles, padded_rows, sums, tid);
}

}  // namespace taper

// y = x W^T for many columns of activations (65 to a thousand) on compute capability 9.0: weights are decoded into the
// registers that wgmma reads as A; of two warpgroups one decodes while the tensor cores have what the other decoded.
//
// Work split   A block is 128 rows of the matrix x N columns of activations (N = 128, 192 or 256), K in units of
//              128 columns. A block of the grid takes whole blocks of the product in turn; where that would leave SMs
//              idle, the first `cut` of them are laid end to end and cut into `grid` equal pieces instead, and the rest
//              dealt out whole. What becomes of the sums of pieces: prefill_join.cuh.
// Warps        Two warpgroups of consumers, 64 rows each, a tile of 16 rows a warp; and one whose first warp fetches
//              activations and whose others fetch weights, into a ring each. Accumulators take N / 2 registers.
// Order of x   First the grid brings x into the order of shared memory (prefill_order.cuh), so that one bulk copy
//              fetches 64 columns of K: block of N columns of activations, vector of 32 columns of K, then as in
//              stream.cuh 16 bytes with the eight values that two registers of four lanes' A fragments meet: chunk q of
//              vector j is columns 32 j + 8 t + 2 q + e (t = 0..3, e = 0, 1), with groups of 16 those of column_of in
//              kquant.cuh. What lies past the matrix's columns or the batch is zero.
// Turns        A warpgroup waits for its turn, has the tensor cores multiply half a unit, decodes the other half
//              meanwhile (if N > 128), has it multiplied too and passes the turn on; then it decodes half of the next
//              unit. Without turns both would decode at the same time, and then both wait for the tensor cores.
// Budget       A unit of N = 256 is 2048 cycles of the tensor cores; it takes 2280 of `fixed` (2130 if no weight needed
//              a repair). Decoding takes 300 instructions of each of two warps a scheduler (`fixed`). An SM gets 64 KB
//              of x a unit, which all of them together could not read from the second-level cache in that time: what
//              several read at about the same time is read once, if copies have no cache hint (bulk_copy in ptx.cuh).
//              Before the first product 4.5 us pass (4096 columns, 512 rows), 3 of them for the order of x; 12 with
//              14336 columns. Results take 2 us, sums of two pieces 4 more. At 28672 x 4096 it is the power limit of
//              an H200 that counts: its clock falls from 1.8 to 1.4 GHz.
// Order        The sums of a block have one order: by K within a piece, then who adds them up his own and the others' in
//              turn. Pieces depend on the shape and `grid` only, so the result is the same from run to run.
//
// Launch       grid: at most the SMs (blocks wait for each other); block 384; dynamic shared memory
//              prefill_shared_bytes<L, N>(). x: bf16, rows x_stride apart. arranged: batch rounded up to N, * units *
//              256 bytes, 128-byte aligned. partial, unless cut = 0: 2 * grid * 128 * N floats; arrived: 2 * grid + 2
//              zeroed words, zero again at the end. cut: fewer than two blocks for each of the grid. May be launched with
//              programmatic stream serialisation (see product.cuh).
#pragma once
#include "prefill_join.cuh"
#include "prefill_order.cuh"
#include "stream_units.cuh"

namespace taper {

constexpr int PREFILL_TILES = 8, PREFILL_BLOCK = CONSUMER_THREADS + 128;

// What lies in shared memory: activations by half units, weights by units, the trailers of their stages, scratch memory
// (of four warps: two buffers of results; of one: a vector of weights), barriers.
template <class L, int N>
struct PrefillRings {
  static constexpr int A_BYTES = PREFILL_TILES * L::UNIT_BYTES, TRAILERS = PREFILL_TILES * L::TRAILER,
                       B_BYTES = N * 128, SCRATCH = RESULT_BUFFER / 2, FIXED = CONSUMERS * SCRATCH + 640,
                       ROOM = 232448 - FIXED, PAIRED = ROOM / (A_BYTES + TRAILERS + 2 * B_BYTES),
                       A_SLOTS = PAIRED < 3    ? 3
                                 : PAIRED > 12 ? 12
                                               : PAIRED,
                       B_SLOTS = PAIRED > 3 ? 2 * A_SLOTS : (ROOM - 3 * (A_BYTES + TRAILERS)) / B_BYTES;
  static_assert(B_SLOTS >= 2 && 16 * (A_SLOTS + B_SLOTS) <= 640, "");
};
template <class L, int N>
__host__ __device__ constexpr int prefill_shared_bytes() {
  using R = PrefillRings<L, N>;
  return R::FIXED + R::A_SLOTS * (R::A_BYTES + R::TRAILERS) + R::B_SLOTS * R::B_BYTES;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Where things are in a block's shared memory.
template <class L, int N>
struct PrefillPlaces {
  using R = PrefillRings<L, N>;
  uint32_t b_ring, a_ring, trailers, scratches, a_full, a_empty, b_full, b_empty;
  __device__ explicit PrefillPlaces(const uint8_t* memory)
      : b_ring(shared_address(memory)),
        a_ring(b_ring + R::B_SLOTS * R::B_BYTES),
        trailers(a_ring + R::A_SLOTS * R::A_BYTES),
        scratches(trailers + R::A_SLOTS * R::TRAILERS),
        a_full(scratches + CONSUMERS * R::SCRATCH),
        a_empty(a_full + 8 * R::A_SLOTS),
        b_full(a_empty + 8 * R::A_SLOTS),
        b_empty(b_full + 8 * R::B_SLOTS) {}
};

// Fetches the weights of the block's pieces, those of every FETCHERS-th part of its tiles. Trailers come with the first
// unit of a stage, and of a piece.
template <class L, int N, class FirstTile, class Next>
__device__ __forceinline__ void fetch_weights(const Prefill& p, const PrefillPlaces<L, N>& at, const Shape<L>& shape,
                                              Pieces piece, int fetcher, FirstTile first_tile, Next next) {
  using R = PrefillRings<L, N>;
  constexpr int EACH = ceil_div(PREFILL_TILES, FETCHERS);
  const int first_of_mine = fetcher * EACH, mine = min(EACH, PREFILL_TILES - first_of_mine);
  // Read once, or twice within moments, and not to push activations out of the second-level cache.
  const uint64_t policy = evict_first_policy();
  Turn<R::A_SLOTS> turn, trailer;
  while (next(piece)) {
    // Tiles past the matrix's last repeat its first: their products are dropped.
    const uint8_t* from[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int tile = first_tile(piece.block) + first_of_mine + i;
      from[i] = p.weights + (tile < shape.tiles ? tile * shape.tile_bytes() : 0);
    }
    for (int u = piece.first; u < piece.last; u++, turn.next()) {
      const uint32_t bar = at.a_full + 8 * turn.slot,
                     to = at.a_ring + turn.slot * R::A_BYTES + first_of_mine * L::UNIT_BYTES;
      const int stage = u / L::UNITS;
      const bool first = L::TRAILER > 0 && (u == piece.first || u % L::UNITS == 0);
      const size_t begin = stage * Shape<L>::stage_bytes(), offset = begin + (u - stage * L::UNITS) * L::UNIT_BYTES;
      mbarrier_wait(at.a_empty + 8 * turn.slot, turn.phase ^ 1);
      mbarrier_expect(bar, mine * (L::UNIT_BYTES + (first ? L::TRAILER : 0)));
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (i < mine) bulk_copy(to + i * L::UNIT_BYTES, from[i] + offset, L::UNIT_BYTES, bar, policy);
      if (!first) continue;
      const uint32_t trailers = at.trailers + trailer.slot * R::TRAILERS + first_of_mine * L::TRAILER;
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (i < mine)
          bulk_copy(trailers + i * L::TRAILER, from[i] + begin + shape.units_of(stage) * L::UNIT_BYTES, L::TRAILER, bar,
                    policy);
      trailer.next();
    }
  }
}

// Fetches activations.
template <class L, int N, class Next>
__device__ __forceinline__ void fetch_activations(const Prefill& p, const PrefillPlaces<L, N>& at, Pieces piece,
                                                  int wide, Next next) {
  using R = PrefillRings<L, N>;
  Turn<R::B_SLOTS> turn;
  while (next(piece)) {
    const uint8_t* from = p.arranged + (size_t)(piece.block % wide) * piece.units * 2 * R::B_BYTES;
    for (uint32_t h = 2 * piece.first; h < 2 * piece.last; h++, turn.next()) {
      const uint32_t bar = at.b_full + 8 * turn.slot;
      mbarrier_wait(at.b_empty + 8 * turn.slot, turn.phase ^ 1);
      mbarrier_expect(bar, R::B_BYTES);
      bulk_copy(at.b_ring + turn.slot * R::B_BYTES, from + (size_t)h * R::B_BYTES, R::B_BYTES, bar);
    }
  }
}
#endif

template <class L, int N>
__device__ __forceinline__ void prefill_product(const Prefill& p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using R = PrefillRings<L, N>;
  extern __shared__ __align__(128) uint8_t memory[];
  // By a shuffle, so that neither is computed anew from the thread's number wherever it is used.
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = __shfl_sync(~0u, threadIdx.x & 31, threadIdx.x & 31);
  const PrefillPlaces<L, N> at(memory);
  const Shape<L> shape(p.rows, p.cols);
  const auto wide = [&] { return ceil_div(p.batch + nothing(), N); };
  const auto next = [&](Pieces& piece) {
    return piece.next(blockIdx.x + nothing(), gridDim.x,
                      ceil_div(p.rows + nothing(), PREFILL_TILES * TILE_ROWS) * wide());
  };
  const auto first_tile = [&](int block) { return block / wide() * PREFILL_TILES; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::A_SLOTS; s++)
      mbarrier_init(at.a_full + 8 * s, FETCHERS), mbarrier_init(at.a_empty + 8 * s, 32 * CONSUMERS);
    for (int s = 0; s < R::B_SLOTS; s++)
      mbarrier_init(at.b_full + 8 * s, 1), mbarrier_init(at.b_empty + 8 * s, CONSUMERS);
    mbarrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  Pieces piece(shape.units, p.cut);
  if (warp >= CONSUMERS) {
    give_registers<56>();
    if (lane > 0) return;
    if (warp == CONSUMERS) {
      wait_for_previous_kernel();
      await_order(p);
      fetch_activations<L, N>(p, at, piece, wide(), next);
    } else {
      fetch_weights<L, N>(p, at, shape, piece, warp - CONSUMERS - 1, first_tile, next);
    }
    return;
  }
  take_registers<224>();
  wait_for_previous_kernel();
  put_in_order<L::GROUP, N>(p, shape.units);
  const int half = warp >> 2, place = threadIdx.x & 127;
  const uint32_t scratch = at.scratches + warp * R::SCRATCH;
  const auto release = [&](uint32_t bar) {
    if (lane == 0) mbarrier_arrive(bar);
  };
  Turn<R::A_SLOTS> a_turn, trailer_turn;
  Turn<R::B_SLOTS> b_turn;
  float c[N / 8][4];
  StreamUnit<L, false> unit;
  uint32_t trailer = 0, loaded = 0, a[4][8];
  const auto load = [&](int u, bool first) {
    mbarrier_wait(at.a_full + 8 * a_turn.slot, a_turn.phase);
    loaded = at.a_empty + 8 * a_turn.slot;
    if (first || u % L::UNITS == 0)
      trailer = at.trailers + trailer_turn.slot * R::TRAILERS + warp * L::TRAILER, trailer_turn.next();
    unit.load(p, at.a_ring + a_turn.slot * R::A_BYTES + warp * L::UNIT_BYTES, trailer, u % L::UNITS, lane);
    a_turn.next();
  };
  const auto x_there = [&] { mbarrier_wait(at.b_full + 8 * b_turn.slot, b_turn.phase); };
  // Whether all of a unit is decoded before the turn: half a unit's products of few columns end before the other half is.
  constexpr bool BEFORE = N < 192;
  const auto decode = [&](int from, int to) {
#pragma unroll
    for (int j = from; j < to; j++) unit.vector(j, a[j]);
    unit.repair(p, from, to, a, scratch, lane);
  };
  // The low words of descriptors; the high one is the same for all.
  const uint32_t b_first = (uint32_t)b_descriptor(at.b_ring, N * 16);
  const auto descriptor = [](uint32_t low) { return (b_descriptor(0, 0) & ~(uint64_t)0xFFFFFFFF) | low; };
  // The products with two vectors of the unit, which have activations of their own; where those are to be released.
  const auto multiply = [&](int j0) {
    const uint32_t b = b_first + b_turn.slot * (R::B_BYTES / 16), used = at.b_empty + 8 * b_turn.slot;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<false>(c, a[j0 + k / 2] + k % 2 * 4, descriptor(b + k * (N * 2)));
    wgmma_commit();
    b_turn.next();
    return used;
  };
  // The barriers of turns: each is passed by one warpgroup's waiting and the other's arrival.
  constexpr int TURN = 4;
  if (half == 1) bar_arrive_of<CONSUMER_THREADS>(TURN);
  while (next(piece)) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) c[i / 4][i % 4] = 0;
    load(piece.first, true);
    if (!BEFORE) decode(0, 2);
    for (int u = piece.first; u < piece.last; u++) {
      if (BEFORE) decode(0, 4);
      x_there();
      bar_sync_of<CONSUMER_THREADS>(TURN + half);
      const uint32_t first = multiply(0);
      if (!BEFORE) decode(2, 4);
      x_there();
      const uint32_t second = multiply(2);
      bar_arrive_of<CONSUMER_THREADS>(TURN + 1 - half);
      // Only now: an arrival may overtake loads that went before it, but the products have had all they brought.
      mbarrier_arrive(loaded);
      const bool more = u + 1 < piece.last;
      if (more) load(u + 1, false);
      wgmma_wait<1>();
      release(first);
      if (!BEFORE && more) decode(0, 2);
      wgmma_wait<0>();
      release(second);
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");

    const int row = (first_tile(piece.block) + 4 * half) * TILE_ROWS, column = piece.block % wide() * N;
    const uint32_t out = at.scratches + 4 * half * R::SCRATCH;
    if (piece.last - piece.first < piece.units) {
      join_pieces<N>(p, piece, c, row, column, out, half, place);
      continue;
    }
    warpgroup_sync(half);  // all four warps have read what repairs kept in the scratch memory
    store_results<N>(p, c, row, column, out, half, place, pack_bf16);
  }
  if (half == 0) bar_sync_of<CONSUMER_THREADS>(TURN);  // what the other's last turn passed on
#endif
}

}  // namespace taper

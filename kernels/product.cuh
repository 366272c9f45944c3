// y (batch x rows) = x (batch x cols) W^T (+ bias): decode in registers, multiply on tensor cores. Up to 16 columns of
// activations. Layouts with groups: kquant_narrow.cuh.
//
// Work split   one block per SM takes a run of whole tiles (16 rows) and one of `slabs` slabs of the columns, cut at
//              stages.
// Warps        TEAMS teams of 8 consumers, which take the block's tiles in turn: warp w takes unit w of every stage; 1
//              producer that keeps a ring of stages filled (sm_90: one bulk copy a stage and mbarriers; before: each
//              consumer copies its own units with cp.async and the producer idles). It begins before the consumers do.
// Products     of bf16; layouts of integers multiply up to 8 columns as bytes (byte_product.cuh), unless activations
// are
//              f32, not finite or huge.
// Budget       per weight at 12 bits and 4.5 TB/s: 9 thread-instructions. Spent, by layout: see the layout's file.
// In flight    48 KB an SM; more is slower (the copies of an SM share its bandwidth, so all of them arrive late). The
//              ring holds more, so that it can go on filling while the block still waits for the activations.
// Activations  come by the stages of weights, which are multiplied as soon as theirs are there; with up to 8 columns and
//              one team, and where they are not bf16, all before the first.
// Order        Every sum has one order: units of a warp by column, then warps, then slabs. The result is the same from
//              run to run.
// Non-finite   Products are those of the exact weights, so infinities and NaN come out as in the exact product.
//
// Launch       a block of block_of(TEAMS) threads for each group of each slab, dynamic shared memory
//              product_shared_bytes(..)
//              groups      min(tiles, SMs / slabs), longer_groups the same; where slabs differ in length, of either so
//                          many that the block with most stages has as few as can be
//              slabs       the fewest whose shared memory fits; more while 2 * tiles * slabs <= SMs and slabs < stages
//              columns     batch * parts <= 8 for _8, <= 16 for _16; parts: 1 for bf16, 2 for f16, 3 for f32
//                          activations
//              in_flight   48 KB in stages, to the nearest; slots: as many as fit, to 2 * in_flight, to 3 * in_flight
//                          with programmatic launch; at least 3, with two teams 2 more than are in flight, of floats 3,
//                          which may be as few as have 32 KB; keep: tiles_kept(columns, TEAMS)
//              partial     slabs * batch * tiles * 16 floats; arrived: `tiles` zeroed words, zero again at the end;
//                          neither if slabs = 1
//              May be launched with programmatic stream serialisation: weights are fetched while the previous kernel
//              still runs, so they, the overflow list and the scales must have been complete before that kernel began.
#pragma once
#include <type_traits>

#include "byte_product.cuh"
#include "multiply.cuh"
#include "sums.cuh"

namespace taper {

// Activations of bf16 on their way, copied stage by stage of weights (compute capability 9.0): a barrier for each of
// the first stages, the last one for all that follow.
template <int THREADS>
struct Arrivals {
  uint32_t bars;  // 0 if there is nothing to wait for
#if __CUDA_ARCH__ >= 900
  __device__ void init() const {
    for (int i = 0; i < ARRIVALS; i++) mbarrier_init(bars + 8 * i, THREADS);
  }
  __device__ void wait(int stage) const {
    if (bars) mbarrier_wait(bars + 8 * min(stage, ARRIVALS - 1), 0);
  }
  // Copies columns first .. first + width of all rows, which come to lie `stride` bytes apart; false if they cannot be
  // copied so.
  __device__ __forceinline__ bool send(const Product& p, uint32_t to, int stride, int first, int width, int tid) const {
    constexpr int STAGE = 8 * UNIT_COLS, CHUNKS = STAGE / 8;  // a thread always has the same eight columns of a stage
    if (p.x_type != BF16 || (((size_t)p.x | (size_t)(p.x_stride * 2)) & 15) || first + width > p.cols) return false;
    const int col = tid % CHUNKS * 8;
    to += tid / CHUNKS * stride + col * 2;
    const uint16_t* x = (const uint16_t*)p.x + (size_t)(tid / CHUNKS) * p.x_stride + first + col;
    for (int from = 0, stage = 0; from < width; from += STAGE, stage++) {
      if (from + col < width)
        for (int row = tid / CHUNKS, i = 0; row < p.batch; row += THREADS / CHUNKS, i += THREADS / CHUNKS)
          async_copy16(to + from * 2 + i * stride, x + from + (size_t)i * p.x_stride);
      if (stage < ARRIVALS - 1 || from + STAGE >= width) async_arrive(bars + 8 * min(stage, ARRIVALS - 1));
    }
    return true;
  }
#else
  __device__ void init() const {}
  __device__ void wait(int) const {}
  __device__ bool send(const Product&, uint32_t, int, int, int, int) const { return false; }
#endif
};

// Whether they do. With few columns and one team all of them are there about when the first weights are, and a look at
// each stage costs more than it gains.
__host__ __device__ constexpr bool by_stages(int eights, int teams) { return HOPPER && (eights > 1 || teams > 1); }

// Activations as columns of bf16: exact whatever they are.
template <class L, int NB, int TEAMS>
struct Bf16Columns {
  static constexpr bool BY_STAGES = by_stages(NB, TEAMS);
  using Arriving = Arrivals<CONSUMER_THREADS * TEAMS>;
  Arriving arrivals;  // waited for while the first tile is multiplied
  uint32_t x_row[NB], at = 0;
  uint4 x[4];
  float c0[NB][4] = {}, c1[NB][4] = {};

  // Columns past the last repeat it: their products are computed and dropped.
  __device__ Bf16Columns(uint32_t xs, int stride, int columns, int lane, Arriving arrivals_) : arrivals(arrivals_) {
#pragma unroll
    for (int nb = 0; nb < NB; nb++)
      x_row[nb] = xs + min(8 * nb + (lane >> 2), columns - 1) * stride + (lane & 3) * lane_bytes<L>();
  }
  __device__ __forceinline__ void wait(int stage) const {
    if (BY_STAGES) arrivals.wait(stage);
  }
  // Before the weights of the slab's unit `unit` are waited for.
  __device__ __forceinline__ void prefetch(int unit) {
    at = unit * (UNIT_COLS * 2);
    if constexpr (NB == 1)
#pragma unroll
      for (int j = 0; j < 4; j++) x[j] = lds_fragment<L>(x_row[0] + at + j * 64);
  }
  __device__ __forceinline__ void multiply(const Product& p, uint32_t unit_at, uint32_t trailer, int u, int lane, int,
                                           int) {
    multiply_unit<L, NB>(unit_at, trailer, u, lane, p.overflow, c0, c1, [&](int j, int nb) {
      return NB == 1 ? pick(j, x[0], x[1], x[2], x[3]) : lds_fragment<L>(x_row[nb] + at + j * 64);
    });
  }
  // The tile's sums to mine[column][row] in shared memory; zero again.
  __device__ __forceinline__ void store(uint32_t mine, int columns, int lane) {
    arrivals = {0};
    const int first = 2 * (lane & 3);
    const uint32_t to = mine + (first * TILE_ROWS + (lane >> 2)) * 4;
#pragma unroll
    for (int nb = 0; nb < NB; nb++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = 8 * nb + (i & 1);
        const float sum = c0[nb][i] + c1[nb][i];
        if (first + column < columns) sts_float(to + (column * TILE_ROWS + 8 * (i >> 1)) * 4, sum);
        c0[nb][i] = c1[nb][i] = 0;
      }
  }
};

// The tiles of a team. `columns` of activations are summed, `parts` of them to each row of x.
template <class L, int TEAMS, class Columns>
__device__ __forceinline__ void all_tiles(const Product& p, const Part<L>& part, Ring<L, TEAMS>& ring, Columns& how,
                                          int team, int columns, int parts, uint32_t sums, int padded_rows) {
  const int tid = threadIdx.x % CONSUMER_THREADS, lane = tid & 31, warp = tid >> 5;
  const auto wait_for_team = [&] {
    if constexpr (TEAMS == 1)
      bar_sync<1, CONSUMER_THREADS>();
    else
      bar_sync_of<CONSUMER_THREADS>(2 + team);
  };
  for (int tile = team, kept = 0; tile < part.tiles; tile += TEAMS) {
    const int step = min(TEAMS, part.tiles - tile + team);
    for (int s = 0; s < part.stages; s++) {
      const int units = part.shape.units_of(part.stage0 + s);
      how.wait(s);
      if (warp < units) how.prefetch(s * L::UNITS + warp);
      ring.wait();
      for (int u = warp; u < units; u += CONSUMERS) {
        if (L::UNITS > CONSUMERS && u != warp) how.prefetch(s * L::UNITS + u);
        how.multiply(p, ring.unit(warp, u), ring.trailer(warp, units), u, lane, s * L::UNITS + u,
                     part.first_col() + (s * L::UNITS + u) * UNIT_COLS);
      }
      ring.done(p, part, warp, lane, step);
    }
    // sums[kept][warp][column][row]
    how.store(sums + (kept * CONSUMERS + warp) * columns * TILE_ROWS * 4, columns, lane);
    if (++kept < p.keep && tile + TEAMS < part.tiles) continue;
    wait_for_team();
    const int first = part.tile0 + tile - (kept - 1) * TEAMS;
    for (int i = tid; i < kept * p.batch * TILE_ROWS; i += CONSUMER_THREADS) {
      const int row = i & (TILE_ROWS - 1), m = i / TILE_ROWS % p.batch, k = i / TILE_ROWS / p.batch;
      float sum = 0;
      for (int s = 0; s < parts; s++)
#pragma unroll
        for (int w = 0; w < CONSUMERS; w++)
          sum += lds_float(sums + (((k * CONSUMERS + w) * columns + m * parts + s) * TILE_ROWS + row) * 4);
      hand_on(p, padded_rows, part.slab, (first + k * TEAMS) * TILE_ROWS + row, m, sum);
    }
    kept = 0;
    if (tile + TEAMS < part.tiles) wait_for_team();
  }
}

template <class L, int NB, int TEAMS>
__device__ __forceinline__ void narrow_product(const Product& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int THREADS = CONSUMER_THREADS * TEAMS;
  // `warp` counts within the team. One team is 0 for the compiler too, which so finds more that all lanes have in
  // common.
  const bool producer = threadIdx.x >= THREADS;
  const int tid = threadIdx.x, lane = tid & 31, team = TEAMS == 1 ? 0 : tid / CONSUMER_THREADS,
            warp = tid / 32 % CONSUMERS;
  const Part<L> part(p);
  const int parts = p.x_type + 1, columns = p.batch * parts, padded_rows = part.shape.tiles * TILE_ROWS;
  const uint32_t ring_at = shared_address(memory), bars = ring_at + p.slots * slot_bytes<L>(),
                 all_sums = bars + BARRIER_BYTES + ARRIVAL_BYTES, sums = all_sums + team * sums_bytes(p.keep, columns),
                 xs = all_sums + TEAMS * sums_bytes(p.keep, columns);
  constexpr bool BY_STAGES = by_stages(NB, TEAMS);
  const Arrivals<THREADS> arrivals{bars + BARRIER_BYTES};
  const int width = slab_width<L>(p.cols, p.slabs), stride = activation_stride(width);
  Ring<L, TEAMS> ring(p, ring_at, bars);
  if (producer) {
    if (BY_STAGES && lane == 0) arrivals.init();
    ring.init(lane);
    __syncwarp();
    bar_arrive<0, THREADS + 32>();
    if (lane == 0) ring.produce(p, part);
    return;
  }
  bar_sync<0, THREADS + 32>();
  if (TEAMS > 1) ring.slot = team;
  let_next_kernel_start();
  wait_for_previous_kernel();  // everything below may touch what the previous kernel wrote, or reads
  bool done = false;
  if constexpr (byte_rows<L>() && NB == 1) {
    if (p.x_type != F32 && p.batch <= byte_rows<L>()) {
      const Planes planes(xs, width);
      const auto make = [&](auto halves) {
        return make_planes<THREADS, decltype(halves)::value>(planes, p.x, p.x_stride, p.batch, p.cols, part.first_col(),
                                                             part.width(), tid);
      };
      const bool large = p.x_type == F16 ? make(std::true_type()) : make(std::false_type());
      done = !bar_any<1, THREADS>(large);
      if (done) {
        ring.start(p, part, warp, lane);
        const auto multiply = [&](auto how) {
          all_tiles<L, TEAMS>(p, part, ring, how, team, p.batch, 1, sums, padded_rows);
        };
        if (byte_rows<L>() <= 2 || p.batch <= 2)
          multiply(PlaneColumns<L, true>(planes, p.batch, lane));
        else if constexpr (byte_rows<L>() > 2)
          multiply(PlaneColumns<L, false>(planes, p.batch, lane));
      }
    }
  }
  if (!done) {
    const bool coming = BY_STAGES && arrivals.send(p, xs, stride, part.first_col(), part.width(), tid);
    if (!coming) {
      load_activations<THREADS>(xs, stride, p.x, p.x_type, p.x_stride, p.batch, p.cols, part.first_col(), part.width(),
                                tid);
      async_commit();
    }
    ring.start(p, part, warp, lane);
    if (!coming) {
#if __CUDA_ARCH__ >= 900
      async_wait<0>();
#else
      async_wait<2>();  // the two stages that `start` sent for may still be on their way
#endif
      bar_sync<1, THREADS>();
    }
    Bf16Columns<L, NB, TEAMS> how(xs, stride, columns, lane, {coming ? arrivals.bars : 0});
    all_tiles<L, TEAMS>(p, part, ring, how, team, columns, parts, sums, padded_rows);
  }
  add_slabs<THREADS>(p, part.tile0, part.tiles, padded_rows, all_sums, tid);
}

}  // namespace taper

// y = x W^T for up to 16 columns of activations and layouts with groups (kquant.cuh): product.cuh's split of the work
// and order of sums, with these differences.
//
// Warps        TEAMS teams of eight consumers, which take the block's tiles in turn. A unit is read into registers and
//              its stage given back before it is multiplied.
// Sums         of groups of activations are made first, for all units (kquant_product.cuh).
// Non-finite   a block whose activations have infinities or NaN, or whose matrix has such scales, multiplies each
//              weight as three bf16 parts.
// In flight    27 KB an SM.
//
// Launch       as product.cuh, with block product_block<L>() and dynamic shared memory product_shared_bytes(.., TEAMS);
//              slots as many as fit, to 16, and with teams TEAMS more than in_flight (Ring); keep tiles_kept(columns,
//              TEAMS); `overflow` is what repack_stage set
#pragma once
#include <type_traits>

#include "kquant_product.cuh"
#include "sums.cuh"

namespace taper {

template <class L, int NB, int TEAMS>
__device__ __forceinline__ void group_product(const Product& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int THREADS = CONSUMER_THREADS * TEAMS;
  // `warp` counts within the team.
  const int tid = threadIdx.x, lane = tid & 31, team = tid / CONSUMER_THREADS, warp = tid / 32 % CONSUMERS,
            g = lane >> 2, t = lane & 3;
  const Part<L> part(p);
  const int columns = p.batch * (p.x_type + 1);
  const int stride = activation_stride(slab_width<L>(p.cols, p.slabs)), padded_rows = part.shape.tiles * TILE_ROWS;
  const uint32_t ring_at = shared_address(memory), bars = ring_at + p.slots * slot_bytes<L>(),
                 all_sums = bars + BARRIER_BYTES, sums = all_sums + team * sums_bytes(p.keep, columns),
                 xs = all_sums + TEAMS * sums_bytes(p.keep, columns);
  Ring<L, TEAMS> ring(p, ring_at, bars);
  ring.init(tid - THREADS);
  __syncthreads();
  if (team == TEAMS) {
    if (lane == 0) ring.produce(p, part);
    return;
  }
  bool exact = *p.overflow != 0;  // something is not finite
  let_next_kernel_start();
  wait_for_previous_kernel();  // everything below may touch what the previous kernel wrote, or reads
  load_activations<THREADS>(xs, stride, p.x, p.x_type, p.x_stride, p.batch, p.cols, part.first_col(), part.width(),
                            tid);
  async_commit();
  ring.slot = team;
  ring.start(p, part, warp, lane);
#if __CUDA_ARCH__ >= 900
  async_wait<0>();
#else
  async_wait<2>();  // the two stages that `start` sent for may still be on their way
#endif
  bar_sync<1, THREADS>();
  const uint32_t table = xs + columns * stride;
  const bool large = sum_groups<L, THREADS>(table, xs, stride, columns, part.width() / UNIT_COLS, tid);
  exact = bar_any<1, THREADS>(exact || large);

  // Columns past the last repeat it: their products are computed and dropped.
  uint32_t x_row[NB];
  uint32_t entry[NB];
#pragma unroll
  for (int nb = 0; nb < NB; nb++) {
    const int column = min(8 * nb + g, columns - 1);
    x_row[nb] = xs + column * stride + t * lane_bytes<L>() + warp * (UNIT_COLS * 2);
    entry[nb] = table + (warp * columns + column) * group_sums_bytes<L>();
  }
  const int next_entries = L::UNITS * columns * group_sums_bytes<L>();
  // Stages in which the warp has a unit.
  const int own_stages = ceil_div(part.shape.units - part.stage0 * L::UNITS - warp, L::UNITS);

  // What the team's warps have stored of `kept` tiles from `first` on, every TEAMS-th.
  const auto add_warps = [&](int kept, int first) {
    const int parts = p.x_type + 1;
    for (int i = tid % CONSUMER_THREADS; i < kept * p.batch * TILE_ROWS; i += CONSUMER_THREADS) {
      const int row = i & (TILE_ROWS - 1), m = i / TILE_ROWS % p.batch, k = i / TILE_ROWS / p.batch;
      float sum = 0;
      for (int s = 0; s < parts; s++)
#pragma unroll
        for (int w = 0; w < CONSUMERS; w++)
          sum += lds_float(sums + (((k * CONSUMERS + w) * columns + m * parts + s) * TILE_ROWS + row) * 4);
      hand_on(p, padded_rows, part.slab, (part.tile0 + first + k * TEAMS) * TILE_ROWS + row, m, sum);
    }
  };
  const auto all_tiles = [&](auto exactly) {
    constexpr bool EXACT = decltype(exactly)::value;
    float c[NB][4] = {};
    [[maybe_unused]] const Constants constants(t);
    for (int tile = team, kept = 0; tile < part.tiles; tile += TEAMS) {
      const int step = min(TEAMS, part.tiles - tile + team);
      uint32_t at = 0;
      [[maybe_unused]] uint32_t to_entry = 0;
      for (int s = 0; s < part.stages; s++, at += L::UNITS * (UNIT_COLS * 2), to_entry += next_entries) {
        const bool own = s < own_stages;
        uint4 x[4];
        if (NB == 1 && own) {  // before the wait: these are here already
#pragma unroll
          for (int j = 0; j < 4; j++) x[j] = lds_fragment<L>(x_row[0] + at + j * 64);
        }
        const auto fragment = [&](int j, int nb) {
          return NB == 1 ? pick(j, x[0], x[1], x[2], x[3]) : lds_fragment<L>(x_row[nb] + at + j * 64);
        };
        ring.wait();
        const uint32_t unit_at = ring.unit(warp, warp),
                       trailer = ring.trailer(warp, part.shape.units_of(part.stage0 + s));
        if constexpr (EXACT) {
          if (own) multiply_exactly<L, NB>(unit_at, trailer, warp, lane, c, fragment);
          ring.done(p, part, warp, lane, step);
        } else {
          GroupUnit<L> unit;
          if (own) unit.load(unit_at, trailer, warp, lane);
          ring.done(p, part, warp, lane, step);
          if (!own) continue;
          multiply<L, NB>(unit, constants, c, fragment, [&](int nb) { return lds_sums<L>(entry[nb] + to_entry, t); });
        }
      }
      // sums[kept][warp][column][row], of each team
      const uint32_t mine = sums + (kept * CONSUMERS + warp) * columns * TILE_ROWS * 4;
#pragma unroll
      for (int nb = 0; nb < NB; nb++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = 8 * nb + 2 * t + (i & 1);
          if (column < columns) sts_float(mine + (column * TILE_ROWS + g + 8 * (i >> 1)) * 4, c[nb][i]);
          c[nb][i] = 0;
        }
      if (++kept < p.keep && tile + TEAMS < part.tiles) continue;
      bar_sync_of<CONSUMER_THREADS>(2 + team);
      add_warps(kept, tile - (kept - 1) * TEAMS);
      kept = 0;
      if (tile + TEAMS < part.tiles) bar_sync_of<CONSUMER_THREADS>(2 + team);
    }
  };
  if (exact)
    all_tiles(std::true_type());
  else
    all_tiles(std::false_type());
  add_slabs<THREADS>(p, part.tile0, part.tiles, padded_rows, all_sums, tid);
}

}  // namespace taper

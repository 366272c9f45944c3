// y = x W^T for 2 to 16 rows of activations and layouts with groups (kquant.cuh) on compute capability 9.0:
// product.cuh's split of the work and order of sums, in f16 on the tensor cores.
//
// Weights      a code left where it lies in the low bits of an f16 is a subnormal number, code * 2^-24 (rows g) or
//              code * 2^-20 (rows g+8), exactly: one LOP3 makes two. A group's products are summed by themselves and
//              scaled as f32; what minima and zeros take away is a small product for each pair of units, of those as
//              f16 with the sums X of each group's activations, each in two f16 parts.
// Activations  f16 in shared memory (kquant_few_rows.cuh). A bf16 of 2^-17 or more is exact. Where the largest of one of a
//              block's rows is not between 2^-9 and 2^10, all are multiplied by powers of two that bring each row's
//              largest to 2^9.
// Warps        four teams of four, which take the block's tiles in turn; a warp takes a pair of units of each stage,
//              which share what a superblock has. Three warps of the producer's group add up what the warps of a team
//              have of a tile, while the team goes on; that of its last tile it adds up itself.
// Non-finite   a block whose activations have infinities, NaN or 2^65 and more, or whose matrix has such scales,
//              multiplies each weight as three bf16 parts (kquant_product.cuh).
//
// Budget       warp-instructions for a unit of 2048 weights (SASS of sm_90a, loop and waits included): Q4_K 126 for up
//              to 8 rows, 160 for up to 16, integers of 4 bits in groups of 128 91 and 112. Of Q4_K's 160, 40 are for
//              codes, 17 products, 32 to scale, 18 for scales, 8 loads of activations. With fewer than some 110
//              registers those loads wait for one another. At 16 rows the instructions of a unit need 40 cycles of a
//              multiprocessor, shared memory some 45: 32 for activations, which each tile reads anew. A warp waits 8
//              cycles for each instruction: an end of a tile, some 100 of them one after the other, took a team 1000
//              cycles, and its quick warps 700 more.
// In flight    54 KB an SM of codes of 4 and 8 bits; others, of which a warp has more to do, are faster with 36.
//
// Launch       as product.cuh, with block FEW_BLOCK and dynamic shared memory few_shared_bytes(..); x_type bf16 or
//              f16; slots as many as fit, to 16, and FEW_TEAMS more than in_flight; slabs, where one does not fit, of at
//              most four stages
#pragma once
#include <type_traits>

#include "kquant_few_rows.cuh"
#include "kquant_product.cuh"
#include "sums.cuh"

namespace taper {

// The producer's warpgroup gives registers to the others: of 640 * 96 they take 512 * 112.
constexpr int FEW_BLOCK = FEW_THREADS + 128, FEW_TEAMS = 4, FEW_WARPS = 4, FEW_TEAM_THREADS = 128, FEW_ADDERS = 3;

template <class L, int NB>
__host__ __device__ constexpr int few_shared_bytes(int cols, int slabs, int slots) {
  return slots * slot_bytes<L>(true) + BARRIER_BYTES + FEW_ROW_BYTES + FEW_TEAMS * FEW_WARPS * NB * 512 +
         slab_width<L>(cols, slabs) / UNIT_COLS * NB * (2048 + few_group_bytes<L>()) + 16 * FEW_TEAMS;
}

// ---- products ----
// sum += the unit's groups' products, scaled but for factors of rows and 2^-24 or 2^-20.
template <class L, int NB>
__device__ __forceinline__ void multiply_in_place(const GroupUnit<L>& unit, const Constants& k, uint32_t x,
                                                  uint32_t eight, float (&sum)[NB][4]) {
  const uint32_t xs[2] = {x, x ^ 64};
  constexpr int PARTS = L::GROUP == 16 ? 2 : 1;  // groups in a vector
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    L::C::in_place(unit.raw[j], a);
    float scale[PARTS][2];
    if constexpr (L::GROUP != 128) {
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int group = PARTS * j + part;
          scale[part][h] = unit.scales.scale(group >= 4, k.choose(group & 3), h, k);
        }
    }
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint4 b = lds128(xs[j & 1] + nb * eight + j / 2 * 128);
      if constexpr (L::GROUP == 128) {
        mma_f16(sum[nb], a[0], a[1], a[2], a[3], b.x, b.y);
        mma_f16(sum[nb], a[4], a[5], a[6], a[7], b.z, b.w);
      } else {
        float c[PARTS][4] = {};
        mma_f16(c[0], a[0], a[1], a[2], a[3], b.x, b.y);
        mma_f16(c[PARTS - 1], a[4], a[5], a[6], a[7], b.z, b.w);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
          for (int i = 0; i < 4; i++) sum[nb][i] = fmaf(scale[part][i >> 1], c[part][i], sum[nb][i]);
      }
    }
  }
}

// c += a warp's OWN units of a stage times their activations. x and table: the lane's fragments and sums of the first.
template <class L, int NB, int OWN, class Done>
__device__ __forceinline__ void multiply_pair(uint32_t at, uint32_t trailer, int first, int lane, int g,
                                              const Constants& k, uint32_t x, uint32_t eight, uint32_t table,
                                              float (&c)[NB][4], Done done) {
  constexpr float UP[2] = {16777216.0f, 16777216.0f / (1 << L::C::SECOND)};
  constexpr int ZERO = L::MAGIC ? L::ZERO : 128;
  if (OWN == 0) return done();
  float sum[NB][4] = {}, lacks[NB][4] = {};
  uint32_t a[4] = {};
  typename L::S rows;
  rows.load_rows(trailer, first, g);
  GroupUnit<L> unit[2];
#pragma unroll
  for (int i = 0; i < OWN; i++) unit[i].load(at + i * L::UNIT_BYTES, lane, g);
  done();
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    if constexpr (L::GROUP == 128) {
      float of_unit[NB][4] = {};
      multiply_in_place<L, NB>(unit[i], k, x + i * (UNIT_COLS * 2), eight, of_unit);
      float scale[2], zero[2];  // times -scale
#pragma unroll
      for (int h = 0; h < 2; h++) {
        scale[h] = unit[i].scales.scale[h] * UP[h];
        zero[h] = unit[i].scales.scale[h] * -(float)unit[i].scales.zero(h);
      }
#pragma unroll
      for (int nb = 0; nb < NB; nb++) {
        const uint2 both = lds64(table + (i * NB + nb) * 32);
        const float sums[2] = {__uint_as_float(both.x), __uint_as_float(both.y)};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          c[nb][e] = fmaf(scale[e >> 1], of_unit[nb][e], c[nb][e]);
          c[nb][e] = fmaf(zero[e >> 1], sums[e & 1], c[nb][e]);
        }
      }
    } else {
      multiply_in_place<L, NB>(unit[i], k, x + i * (UNIT_COLS * 2), eight, sum);
      uint32_t low[2], high[2];
      unit[i].scales.halves(0, k, low);
      if constexpr (L::GROUP == 16) {
        unit[i].scales.halves(1, k, high);
#pragma unroll
        for (int nb = 0; nb < NB; nb++) {
          const uint2 b = lds64(table + (i * NB + nb) * 256);
          mma_f16(lacks[nb], low[0], low[1], high[0], high[1], b.x, b.y);
        }
      } else {
        a[2 * i] = low[0], a[2 * i + 1] = low[1];
      }
    }
  }
  if constexpr (L::GROUP != 128) {
    if constexpr (L::GROUP == 32) {
#pragma unroll
      for (int nb = 0; nb < NB; nb++) {
        const uint2 b = lds64(table + nb * 256);
        mma_f16(lacks[nb], a[0], a[1], a[2], a[3], b.x, OWN == 2 ? b.y : 0);
      }
    }
#pragma unroll
    for (int e = 0; e < NB * 4; e++) {
      float& to = c[e / 4][e % 4];
      const int h = e >> 1 & 1;
      to = fmaf(UP[h] * rows.row(h), sum[e / 4][e % 4], to);
      if constexpr (L::MINS)
        to = fmaf(-rows.row_min(h), lacks[e / 4][e % 4], to);
      else
        to = fmaf(-ZERO * rows.row(h), lacks[e / 4][e % 4], to);
    }
  }
}

// The same in bf16 parts, of activations as they lie in memory from a column on.
template <class L, int NB>
__device__ __forceinline__ void multiply_units_exactly(const Product& p, int column, uint32_t at, uint32_t trailer,
                                                       int first, int own, int lane, float (&c)[NB][4]) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int i = 0; i < own; i++)
#pragma unroll 1
    for (int part = 0; part <= p.x_type; part++)
      multiply_exactly<L, NB>(at + i * L::UNIT_BYTES, trailer, first + i, lane, c, [&](int j, int nb) {
        const uint16_t* const row = (const uint16_t*)p.x + (size_t)min(8 * nb + g, p.batch - 1) * p.x_stride;
        const int k = column + UNIT_COLS * i + 32 * j + (L::GROUP == 16 ? 4 : 8) * t;
        uint32_t w[4] = {};
#pragma unroll
        for (int e = 0; e < 8; e++) {
          const int from = k + e + (L::GROUP == 16 && e >= 4 ? 12 : 0);
          if (from < p.cols) w[e / 2] |= (uint32_t)row[from] << 16 * (e & 1);
        }
#pragma unroll
        for (int q = 0; q < 4 && p.x_type == F16; q++) {
          uint32_t low[3], high[3];
          split(half_to_float(w[q] & 0xFFFF), 2, low), split(half_to_float(w[q] >> 16), 2, high);
          w[q] = __byte_perm(part ? low[1] : low[0], part ? high[1] : high[0], 0x7632);
        }
        return make_uint4(w[0], w[1], w[2], w[3]);
      });
}

template <class L, int NB>
__device__ __forceinline__ void few_product(const Product& p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int WARP_BYTES = TILE_ROWS * NB * 32, TILE_BYTES = FEW_WARPS * WARP_BYTES;
  // `warp` counts within the team.
  const int tid = threadIdx.x, lane = keep(tid & 31), team = tid / FEW_TEAM_THREADS, warp = keep(tid / 32 % FEW_WARPS),
            g = keep(lane >> 2), t = lane & 3, first = 2 * warp;
  const Part<L> part(p);
  const int padded_rows = part.shape.tiles * TILE_ROWS, units = part.width() / UNIT_COLS;
  const uint32_t ring_at = shared_address(memory), bars = ring_at + p.slots * slot_bytes<L>(),
                 rows_at = bars + BARRIER_BYTES, all_sums = rows_at + FEW_ROW_BYTES,
                 sums = all_sums + team * TILE_BYTES, xs = all_sums + FEW_TEAMS * TILE_BYTES,
                 table = xs + part.stages * (NB * 8 * L::UNITS * UNIT_COLS * 2),
                 table_end = table + part.stages * (L::UNITS * NB * few_group_bytes<L>());
  const FewRows<L, NB> rows(p, part, rows_at, xs, table, tid);
  Ring<L, FEW_TEAMS, FEW_WARPS> ring(p, ring_at, bars);
  ring.init(tid - FEW_THREADS);
  rows.init(tid);
  // Barriers of a team: its sums of a tile are there; behind it: they have been added.
  const auto stored = [&](int team) { return table_end + 16 * team; };
  if (tid == 0) {
    for (int i = 0; i < FEW_TEAMS; i++) mbarrier_init(stored(i), FEW_WARPS), mbarrier_init(stored(i) + 8, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  // Adds what the warps of the tile's team have stored; called by `count` threads.
  const auto add_warps = [&](int tile, int id, int count) {
    const uint32_t from = all_sums + tile % FEW_TEAMS * TILE_BYTES;
    for (int i = id; i < 8 * TILE_ROWS; i += count) {
      const int r = i % TILE_ROWS, m = i / TILE_ROWS * NB, row = (part.tile0 + tile) * TILE_ROWS + r;
      if (m >= p.batch) break;
      const uint32_t at = from + ((m >> 3) * TILE_ROWS + r) * 32 + (m & 7) * 4;
      float of[NB] = {};
#pragma unroll
      for (int w = 0; w < FEW_WARPS; w++) {
        if constexpr (NB == 1) {
          of[0] += lds_float(at + w * WARP_BYTES);
        } else {
          const uint2 v = lds64(at + w * WARP_BYTES);
          of[0] += __uint_as_float(v.x), of[1] += __uint_as_float(v.y);
        }
      }
#pragma unroll
      for (int e = 0; e < NB; e++) of[e] *= rows.undo(m + e);
      const bool two = NB == 2 && m + 1 < p.batch;
      if (p.slabs > 1) {
        float* const to = p.partial + ((size_t)part.slab * p.batch + m) * padded_rows + row;
        to[0] = of[0];
        if (two) to[padded_rows] = of[NB - 1];
      } else {
        finish(p, row, m, of[0]);
        if (two) finish(p, row, m + 1, of[NB - 1]);
      }
    }
  };
  if (team == FEW_TEAMS) {
    give_registers<32>();
    if (tid == FEW_THREADS) ring.produce(p, part);
    if (warp > 0) {
      wait_for_previous_kernel();
      // Tiles that are not their teams' last. All of a team's are one adder's: who waits for a phase must have seen the
      // one before.
      for (int tile = 0; tile + FEW_TEAMS < part.tiles; tile++) {
        if (tile % FEW_TEAMS % FEW_ADDERS != warp - 1) continue;
        const uint32_t bar = stored(tile % FEW_TEAMS);
        mbarrier_wait(bar, tile / FEW_TEAMS & 1);
        add_warps(tile, lane, 32);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(bar + 8);
      }
      if (p.slabs > 1) bar_arrive<6, FEW_THREADS + 32 * FEW_ADDERS>();
    }
    return;
  }
  take_registers<112>();
  const bool special = *p.overflow != 0;  // weights that are not finite
  let_next_kernel_start();
  wait_for_previous_kernel();  // everything below may touch what the previous kernel wrote, or reads
  const bool exact = rows.arrange(special);
  ring.slot = team;

  const int last_units = units - (part.stages - 1) * L::UNITS;
  // Stages in which the warp has both its units.
  const int full_stages = ceil_div(units - first - 1, L::UNITS);
  const auto all_tiles = [&](auto exactly) {
    constexpr bool EXACT = decltype(exactly)::value;
    [[maybe_unused]] const Constants constants(t);
    const uint32_t eight = 8 * rows.stride(),
                   x_first = xs + g * rows.stride() + first * (UNIT_COLS * 2) + (t * 16 ^ (g & 1) * 64),
                   table_first = table + first * NB * few_group_bytes<L>() + (L::GROUP == 128 ? t : lane) * 8;
    for (int tile = team; tile < part.tiles; tile += FEW_TEAMS) {
      const int step = min(FEW_TEAMS, part.tiles - tile + team);
      uint32_t x_at = x_first, table_at = table_first;
      float c[NB][4] = {};
      int s = 0;
      // A stage of which the warp has so many units.
      const auto stage = [&](auto own, bool last) {
        constexpr int OWN = decltype(own)::value;
        ring.wait();
        const uint32_t at = ring.unit(warp, first), trailer = ring.trailer(warp, last ? last_units : L::UNITS);
        const auto done = [&] { ring.done(p, part, warp, lane, step); };
        if constexpr (EXACT) {
          float more[NB][4] = {};
          if (OWN)
            multiply_units_exactly<L, NB>(p, part.first_col() + (s * L::UNITS + first) * UNIT_COLS, at, trailer, first,
                                          OWN, lane, more);
#pragma unroll
          for (int e = 0; e < NB * 4; e++) c[e / 4][e % 4] += more[e / 4][e % 4];
          done();
        } else {
          multiply_pair<L, NB, OWN>(at, trailer, first, lane, g, constants, x_at, eight, table_at, c, done);
        }
        x_at += L::UNITS * UNIT_COLS * 2, table_at += L::UNITS * NB * few_group_bytes<L>();
      };
      for (; s < full_stages; s++) stage(std::integral_constant<int, 2>(), s + 1 == part.stages);
      if (s < part.stages) {
        if (last_units > first)
          stage(std::integral_constant<int, 1>(), true);
        else
          stage(std::integral_constant<int, 0>(), true);
      }
      // sums[team][warp][eight rows of x][row][row of x]
      const uint32_t mine = sums + warp * WARP_BYTES + g * 32 + t * 8;
      if (tile >= FEW_TEAMS) mbarrier_wait(stored(team) + 8, tile / FEW_TEAMS - 1 & 1);
#pragma unroll
      for (int nb = 0; nb < NB; nb++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          sts64(mine + nb * 512 + h * 256, __float_as_uint(c[nb][2 * h]), __float_as_uint(c[nb][2 * h + 1]));
      if (tile + FEW_TEAMS < part.tiles) {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(stored(team));
      } else {
        bar_sync_of<FEW_TEAM_THREADS>(2 + team);
        add_warps(tile, tid % FEW_TEAM_THREADS, FEW_TEAM_THREADS);
      }
    }
  };
  if (exact)
    all_tiles(std::true_type());
  else
    all_tiles(std::false_type());
  if (p.slabs > 1)  // what the adders hand on is there too
    bar_sync<6, FEW_THREADS + 32 * FEW_ADDERS>();
  add_slabs<FEW_THREADS>(p, part.tile0, part.tiles, padded_rows, all_sums, tid);
#endif
}

}  // namespace taper

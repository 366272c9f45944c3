// y = x W^T for one row of activations and layouts with groups (kquant.cuh), in integers on the tensor cores:
// product.cuh's split of the work and order of sums, kquant_narrow.cuh's teams.
//
// Weights      stay codes, as bytes. One product takes a vector of 32 columns.
// Activations  become, once a launch, integers of 16 bits times a power of two for each group of 16 or 32 columns, as
//              two planes of signed bytes: x = 2^n (256 high + low). A bf16 that is at least 1/128 of its group's
//              largest is exact; what is smaller is rounded to 2^-16 of that.
// Groups       and planes become columns of B: column 2 k + plane is zero but for group k's columns. So a unit's four
//              groups of 32 share one accumulator, lane t of each row has both planes of group t, and eight groups of
//              16 take two accumulators.
// Non-finite   a block whose activations have infinities, NaN or 2^65 and more, or whose matrix has such scales,
//              multiplies each weight as three bf16 parts (kquant_product.cuh).
//
// Budget       warp-instructions for a unit of 2048 weights (SASS of sm_90a, loop and waits included): Q4_K 80, Q5_K
//              120, Q6_K 122, Q8_0 62, integers of 4 bits in groups of 128 65. Of Q4_K's 16 are for codes, 4 products, 16
//              for scales and minima, 18 loads. At 4.5 bits and 4.5 TB/s there are 240 for each scheduler.
// In flight    54 KB an SM.
//
// Launch       as kquant_narrow.cuh, with dynamic shared memory single_shared_bytes(..); teams are of SINGLE_EACH-th
//              as many warps, and so more; batch 1, x_type bf16 or f16
#pragma once
#include <type_traits>

#include "kquant_product.cuh"
#include "sums.cuh"

namespace taper {

// Units of a stage that a warp takes: a pair on Hopper shares what a superblock of 256 columns has.
constexpr int SINGLE_EACH = HOPPER ? 2 : 1;

constexpr int ZEROS_BYTES = 256 + 16;  // some zeros, and some where a pair's second unit looks for them
// For each unit of activations: the power of two and the sum of each group (see Quantised).
template <class L>
__host__ __device__ constexpr int plane_sums_bytes() {
  return L::GROUP == 16 ? 64 : 32;
}
template <class L>
__host__ __device__ constexpr int single_shared_bytes(int cols, int slabs, int parts, int slots, int teams,
                                                      bool hopper) {
  const int width = slab_width<L>(cols, slabs);
  return slots * slot_bytes<L>(hopper) + BARRIER_BYTES + sums_bytes(tiles_kept(1, teams), 1, teams) +
         parts * activation_stride(width) + width / UNIT_COLS * plane_sums_bytes<L>() + ZEROS_BYTES;
}

// Activations as planes. Of a vector 64 bytes: the high plane's 32, the low plane's. Of a plane 16 bytes for either
// register of a B fragment, in the order that Codes::bytes gives codes.
// What `sums` hold of a group: its power of two, and what a product of it lacks: with minima, the sum of its
// activations; with a zero for each row, minus the sum of its integers; otherwise that times the code of zero.
template <class L, int THREADS>
__device__ __forceinline__ bool quantise_row(uint32_t planes, uint32_t sums, const Product& p, int first, int width,
                                             int tid) {
  constexpr int DEEP = 4, ZERO = L::MAGIC ? L::ZERO : 128;
  constexpr float MAGIC = 12582912 + 128;  // plus an integer of 16 bits: that integer + 128 in the low half
  const int chunks = width / 8;
  const bool aligned = ((size_t)p.x & 15) == 0, halves = p.x_type == F16;
  bool large = false;
  for (int base = tid; base - tid < chunks; base += DEEP * THREADS) {
    uint4 raw[DEEP];
#pragma unroll
    for (int d = 0; d < DEEP; d++) {
      const int chunk = base + d * THREADS;
      raw[d] = chunk < chunks ? load_eight(p.x, first + 8 * chunk, p.cols, aligned) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int d = 0; d < DEEP; d++) {
      const int chunk = base + d * THREADS;
      if (chunk - tid >= chunks) break;  // for the whole block
      const uint32_t w[4] = {raw[d].x, raw[d].y, raw[d].z, raw[d].w};
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) most = __vmaxu2(most, w[i] & 0x7FFF7FFFu);
      most = __vmaxu2(most, __shfl_xor_sync(~0u, most, 1));
      if (L::GROUP != 16) most = __vmaxu2(most, __shfl_xor_sync(~0u, most, 2));
      most = max(most & 0xFFFF, most >> 16);
      const uint32_t bits = halves ? __float_as_uint(half_to_float(most)) : most << 16;
      large |= bits >= 0x60000000u;  // 2^65
      // x * up is below 2^15 - 128, so that its high byte is a signed one.
      const uint32_t exponent = max(bits + 0x10000u >> 23, 15u);
      const float up = __uint_as_float((268 - exponent) << 23), down = __uint_as_float((exponent - 14) << 23);
      uint32_t q[8];
      int sum = (int)-(8 * 0x4B400080u);  // the bits of MAGIC
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const uint32_t half = i & 1 ? w[i / 2] >> 16 : w[i / 2] & 0xFFFF;
        q[i] = __float_as_uint(fmaf(halves ? half_to_float(half) : __uint_as_float(half << 16), up, MAGIC));
        sum += q[i];
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      if (L::GROUP != 16) sum += __shfl_xor_sync(~0u, sum, 2);
      uint32_t high[2], low[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t even = __byte_perm(q[4 * i], q[4 * i + 2], 0x5140),
                       odd = __byte_perm(q[4 * i + 1], q[4 * i + 3], 0x5140);
        high[i] = __byte_perm(even, odd, 0x7632), low[i] = __byte_perm(even, odd, 0x5410) ^ 0x80808080u;
      }
      if (chunk >= chunks) continue;
      const uint32_t vector = planes + (chunk >> 2) * 64;
      if (L::GROUP == 16) {
        sts64(vector + 8 * (chunk & 3), high[0], high[1]);
        sts64(vector + 8 * (chunk & 3) + 32, low[0], low[1]);
      } else {
        const uint32_t at = vector + 4 * (chunk & 3);
        sts32(at, high[0]), sts32(at + 16, high[1]), sts32(at + 32, low[0]), sts32(at + 48, low[1]);
      }
      const uint32_t lacks =
          L::MINS && L::GROUP != 128 ? __float_as_uint(down * sum) : (uint32_t)-(L::GROUP == 128 ? 1 : ZERO) * sum;
      if (L::GROUP == 16 && chunk % 2 == 0)
        sts64(sums + (chunk >> 4) * 64 + (chunk >> 1 & 3) * 16 + (chunk >> 3 & 1) * 8, __float_as_uint(down), lacks);
      if (L::GROUP != 16 && chunk % 4 == 0) sts64(sums + (chunk >> 2) * 8, __float_as_uint(down), lacks);
    }
  }
  return large;
}

// The activations of a unit that a lane needs, from shared memory.
template <class L>
struct PlaneUnit {
  uint4 b[2];
  uint32_t down[2], lacks[2];
};
// Where they are, of a warp's EACH neighbouring units.
template <class L, int EACH>
struct PlaneRow {
  uint32_t at[2], step[2], sums;
  __device__ __forceinline__ PlaneRow(uint32_t planes, uint32_t sums_, uint32_t zeros, int first, int lane)
      : sums(sums_ + first * plane_sums_bytes<L>() + (lane & 3) * (plane_sums_bytes<L>() / 4)) {
    const int column = lane & 7, matrix = lane >> 3, group = column >> 1;
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const bool own = L::GROUP == 16 ? group == matrix : group == 2 * q + (matrix >> 1);
      const int vector = 2 * q + (matrix >> 1);
      at[q] = own ? planes + first * 256 + vector * 64 + (column & 1) * 32 + (matrix & 1) * 16 : zeros;
      step[q] = own ? L::UNITS * 256 : 0;
    }
  }
  __device__ __forceinline__ PlaneUnit<L> load(int i) const {
    PlaneUnit<L> x;
    x.b[0] = lds_matrices(at[0] + 256 * i), x.b[1] = lds_matrices(at[1] + 256 * i);
    const uint32_t s = sums + i * plane_sums_bytes<L>();
    if (L::GROUP == 16) {
      const uint4 both = lds128(s);
      x.down[0] = both.x, x.lacks[0] = both.y, x.down[1] = both.z, x.lacks[1] = both.w;
    } else {
      const uint2 both = lds64(s);
      x.down[0] = both.x, x.lacks[0] = both.y;
    }
    return x;
  }
  __device__ __forceinline__ void next() {
    at[0] += step[0], at[1] += step[1], sums += L::UNITS * plane_sums_bytes<L>();
  }
};

// sum[h] += what the lane's groups add to row g + 8 h but for the row's factor, and mins[h] what its minima take away.
template <class L>
__device__ __forceinline__ void multiply_planes(const GroupUnit<L>& unit, const Constants& k, const PlaneUnit<L>& x,
                                                float (&sum)[2], float (&mins)[2]) {
  constexpr int SETS = L::GROUP == 16 ? 2 : 1, TIMES = L::C::SECOND_TIMES;
  int d[SETS][4] = {};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[4];
    L::C::bytes(unit.raw[j], a);
    const uint4& b = x.b[j / 2];
    mma_bytes(d[SETS == 2 ? j / 2 : 0], a, j & 1 ? b.z : b.x, j & 1 ? b.w : b.y);
  }
#pragma unroll
  for (int set = 0; set < SETS; set++) {
    float scale[2], min[2];
    unit.scales.lane(set, k, scale, min);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int v = 256 * d[set][2 * h] + d[set][2 * h + 1];
      if constexpr (L::GROUP == 128)
        v += (int)x.lacks[set] * unit.scales.zero(h) * (h ? TIMES : 1);
      else if (!L::MINS)
        v += (int)x.lacks[set] * (h ? TIMES : 1);
      sum[h] = fmaf(scale[h], __uint_as_float(x.down[set]) * (h ? 1.0f / TIMES : 1) * v, sum[h]);
      if (L::MINS && L::GROUP != 128) mins[h] = fmaf(min[h], __uint_as_float(x.lacks[set]), mins[h]);
    }
  }
}

// A warp takes EACH neighbouring units of a stage.
template <class L, int EACH, int THREADS>
__device__ __forceinline__ void single_product(const Product& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int WARPS = L::UNITS / EACH, TEAM_THREADS = 32 * WARPS, TEAMS = THREADS / TEAM_THREADS;
  // `warp` counts within the team.
  const int tid = threadIdx.x, lane = keep(tid & 31), team = tid / TEAM_THREADS, warp = keep(tid / 32 % WARPS),
            g = keep(lane >> 2), t = lane & 3, first = warp * EACH;
  const Part<L> part(p);
  const int columns = p.x_type + 1;
  const int stride = activation_stride(slab_width<L>(p.cols, p.slabs)), padded_rows = part.shape.tiles * TILE_ROWS;
  const uint32_t ring_at = shared_address(memory), bars = ring_at + p.slots * slot_bytes<L>(),
                 all_sums = bars + BARRIER_BYTES, sums = all_sums + team * p.keep * WARPS * TILE_ROWS * 4,
                 xs = all_sums + TEAMS * p.keep * WARPS * TILE_ROWS * 4, table = xs + columns * stride,
                 zeros = table + part.width() / UNIT_COLS * plane_sums_bytes<L>();
  Ring<L, TEAMS, WARPS> ring(p, ring_at, bars);
  ring.init(tid - THREADS);
  __syncthreads();
  if (team == TEAMS) {
    if (lane == 0) ring.produce(p, part);
    return;
  }
  bool exact = *p.overflow != 0;  // something is not finite
  let_next_kernel_start();
  wait_for_previous_kernel();  // everything below may touch what the previous kernel wrote, or reads
  ring.slot = team;
  ring.start(p, part, warp, lane);
  if (tid < ZEROS_BYTES / 4) sts32(zeros + 4 * tid, 0);
  const bool large = quantise_row<L, THREADS>(xs, table, p, part.first_col(), part.width(), tid);
  exact = bar_any<1, THREADS>(exact || large);
  if (exact) {
    load_activations<THREADS>(xs, stride, p.x, p.x_type, p.x_stride, 1, p.cols, part.first_col(), part.width(), tid);
    async_commit();
    async_wait<0>();
    bar_sync<1, THREADS>();
  }

  const int units = part.width() / UNIT_COLS, last_units = units - (part.stages - 1) * L::UNITS;
  // Stages in which the warp has all its units.
  const int full_stages = ceil_div(units - first - (EACH - 1), L::UNITS);
  // What the team's warps have stored of `kept` tiles from `from` on, every TEAMS-th.
  const auto add_warps = [&](int kept, int from) {
    for (int i = tid % TEAM_THREADS; i < kept * TILE_ROWS; i += TEAM_THREADS) {
      const int row = i & (TILE_ROWS - 1), k = i / TILE_ROWS;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += lds_float(sums + ((k * WARPS + w) * TILE_ROWS + row) * 4);
      hand_on(p, padded_rows, part.slab, (part.tile0 + from + k * TEAMS) * TILE_ROWS + row, 0, sum);
    }
  };
  const auto all_tiles = [&](auto exactly) {
    constexpr bool EXACT = decltype(exactly)::value;
    [[maybe_unused]] const Constants constants(t);
    const PlaneRow<L, EACH> row(xs, table, zeros, first, lane);
    for (int tile = team, kept = 0; tile < part.tiles; tile += TEAMS) {
      const int step = min(TEAMS, part.tiles - tile + team);
      PlaneRow<L, EACH> x_at = row;
      float c[2] = {};
      uint32_t exact_at = xs + min(g, columns - 1) * stride + t * lane_bytes<L>() + first * (UNIT_COLS * 2);
      // A stage of which the warp has so many units.
      const auto stage = [&](auto own, bool last) {
        constexpr int OWN = decltype(own)::value;
        PlaneUnit<L> x[EACH];
        if (!EXACT) {  // before the wait: these are here already
#pragma unroll
          for (int i = 0; i < OWN; i++) x[i] = x_at.load(i);
          x_at.next();
        }
        ring.wait();
        const uint32_t at = ring.unit(warp, first), trailer = ring.trailer(warp, last ? last_units : L::UNITS);
        if constexpr (EXACT) {
          float sum[1][4] = {};
#pragma unroll 1
          for (int i = 0; i < OWN; i++)
            multiply_exactly<L, 1>(at + i * L::UNIT_BYTES, trailer, first + i, lane, sum, [&](int j, int) {
              return lds_fragment<L>(exact_at + i * (UNIT_COLS * 2) + j * 64);
            });
          if (t == 0)  // the row's parts are columns 0 and 1
            c[0] += columns == 2 ? sum[0][0] + sum[0][1] : sum[0][0],
                c[1] += columns == 2 ? sum[0][2] + sum[0][3] : sum[0][2];
          exact_at += L::UNITS * (UNIT_COLS * 2);
          ring.done(p, part, warp, lane, step);
        } else {
          GroupUnit<L> unit[EACH];
#pragma unroll
          for (int i = 0; i < OWN; i++) unit[i].load_lane(at + i * L::UNIT_BYTES, lane, g);
          if (OWN) unit[0].scales.load_rows(trailer, first, g);
          ring.done(p, part, warp, lane, step);
          float sum[2] = {}, mins[2] = {};
#pragma unroll
          for (int i = 0; i < OWN; i++) multiply_planes<L>(unit[i], constants, x[i], sum, mins);
#pragma unroll
          for (int h = 0; h < 2; h++) {
            if (OWN) c[h] = fmaf(unit[0].scales.row(h), sum[h], c[h]);
            if constexpr (L::MINS && L::GROUP != 128)
              if (OWN) c[h] = fmaf(-unit[0].scales.row_min(h), mins[h], c[h]);
          }
        }
      };
      int s = 0;
      for (; s < full_stages; s++) stage(std::integral_constant<int, EACH>(), s + 1 == part.stages);
      if (s < part.stages) {
        if (EACH > 1 && last_units > first)
          stage(std::integral_constant<int, 1>(), true);
        else
          stage(std::integral_constant<int, 0>(), true);
      }
#pragma unroll
      for (int h = 0; h < 2; h++)
        for (int d = 1; d < 4; d *= 2) c[h] += __shfl_xor_sync(~0u, c[h], d);
      // sums[kept][warp][row], of each team
      if (t < 2) sts_float(sums + ((kept * WARPS + warp) * TILE_ROWS + g + 8 * t) * 4, t ? c[1] : c[0]);
      if (++kept < p.keep && tile + TEAMS < part.tiles) continue;
      bar_sync_of<TEAM_THREADS>(2 + team);
      add_warps(kept, tile - (kept - 1) * TEAMS);
      kept = 0;
      if (tile + TEAMS < part.tiles) bar_sync_of<TEAM_THREADS>(2 + team);
    }
  };
  if (exact)
    all_tiles(std::true_type());
  else
    all_tiles(std::false_type());
  add_slabs<THREADS>(p, part.tile0, part.tiles, padded_rows, all_sums, tid);
}

}  // namespace taper

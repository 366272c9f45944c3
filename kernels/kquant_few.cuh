// y = x W^T for 2 to 16 rows of activations and layouts with groups (kquant.cuh) on compute capability 9.0:
// product.cuh's split of the work and order of sums, in f16 on the tensor cores.
//
// Weights      a code left where it lies in the low bits of an f16 is a subnormal number, code * 2^-24 (rows g) or
//              code * 2^-20 (rows g+8), exactly: one LOP3 makes two. A group's products are summed by themselves and
//              scaled as f32; what minima and zeros take away is a small product for each pair of units, of those as
//              f16 with the sums X of each group's activations, each in two f16 parts.
// Activations  f16 in shared memory, in the order of B fragments. A bf16 of 2^-17 or more is exact. Where the largest of
//              one of a block's rows is not between 2^-9 and 2^10, all are multiplied by powers of two that bring each
//              row's largest to 2^9.
// Warps        four teams of four, which take the block's tiles in turn; a warp takes a pair of units of each stage,
//              which share what a superblock has.
// Non-finite   a block whose activations have infinities, NaN or 2^65 and more, or whose matrix has such scales,
//              multiplies each weight as three bf16 parts (kquant_product.cuh).
//
// Budget       warp-instructions for a unit of 2048 weights (SASS of sm_90a, loop and waits included): Q4_K 126 for up
//              to 8 rows, 160 for up to 16, integers of 4 bits in groups of 128 91 and 112. Of Q4_K's 160, 40 are for
//              codes, 17 products, 32 to scale, 18 for scales, 8 loads of activations. With fewer than some 110
//              registers those loads wait for one another. At 16 rows a unit takes 85 cycles of a multiprocessor, where
//              the instructions need 40 and shared memory some 45: 32 for activations, which each tile reads anew.
// In flight    36 KB an SM: activations come the faster the fewer weights are on their way.
//
// Launch       as product.cuh, with block FEW_BLOCK and dynamic shared memory few_shared_bytes(..); x_type bf16 or
//              f16; slots as many as fit, to 16, and FEW_TEAMS more than in_flight; keep: tiles whose sums a team keeps;
//              slabs, where one does not fit, of at most four stages
#pragma once
#include <type_traits>

#include "kquant_product.cuh"
#include "sums.cuh"

namespace taper {

// The producer's warpgroup has one thread at work, and gives its registers to the others: of 640 * 96 they take 512 *
// 112.
constexpr int FEW_THREADS = 512, FEW_BLOCK = FEW_THREADS + 128, FEW_TEAMS = 4, FEW_WARPS = 4, FEW_TEAM_THREADS = 128,
              ROW_WORDS = 32;

// Sums of groups of a unit, for eight rows of activations.
template <class L>
__host__ __device__ constexpr int few_group_bytes() {
  return L::GROUP == 128 ? 32 : L::GROUP == 16 ? 256 : 128;
}
template <class L, int NB>
__host__ __device__ constexpr int few_shared_bytes(int cols, int slabs, int slots, int keep) {
  return slots * slot_bytes<L>(true) + BARRIER_BYTES + 4 * ROW_WORDS + FEW_TEAMS * keep * FEW_WARPS * NB * 512 +
         slab_width<L>(cols, slabs) / UNIT_COLS * NB * (2048 + few_group_bytes<L>());
}

// ---- activations ----
// Of each unit of columns and eight rows 2048 bytes: vector j's fragments at 512 j, lane by lane. Those of rows past
// the last hold anything: what comes of them is dropped.

// Eight of them as f16, times `up` if SCALED.
template <int TYPE, bool SCALED>
__device__ __forceinline__ uint4 as_halves(const uint4& raw, float up) {
  if (!SCALED && TYPE == F16) return raw;
  uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float low = TYPE == F16 ? half_to_float(w[i] & 0xFFFF) : __uint_as_float(w[i] << 16),
          high = TYPE == F16 ? half_to_float(w[i] >> 16) : __uint_as_float(w[i] & 0xFFFF0000u);
    if (SCALED) low *= up, high *= up;
    w[i] = pack_halves(low, high);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}
// Sums of groups. With groups of 32 or 16 lane 4 g + t has group t's of column g, in two f16 parts: 8 bytes for the
// pair of units, or for groups t and t + 4. With one group for each unit, sums of columns 2t and 2t + 1 as f32.
template <class L, int NB>
__device__ __forceinline__ void sum_unit(uint32_t xs, uint32_t table, int unit, int lane) {
  constexpr uint32_t ONES = 0x3C003C00u;
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int nb = 0; nb < NB; nb++) {
    const int task = unit * NB + nb;
    float of[8][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint4 b = lds128(xs + task * 2048 + j * 512 + lane * 16);
      const int low = L::GROUP == 16 ? 2 * j : L::GROUP == 32 ? j : 0;
      mma_f16(of[low], ONES, ONES, ONES, ONES, b.x, b.y);
      mma_f16(of[L::GROUP == 16 ? low + 1 : low], ONES, ONES, ONES, ONES, b.z, b.w);
    }
    if constexpr (L::GROUP == 128) {
      if (g == 0) sts64(table + task * 32 + t * 8, __float_as_uint(of[0][0]), __float_as_uint(of[0][1]));
    } else {
#pragma unroll
      for (int set = 0; set < (L::GROUP == 16 ? 2 : 1); set++) {
        // Those of columns 2t and 2t + 1 are in all lanes of that t.
        const float even = g & 2   ? g & 1 ? of[4 * set + 3][0] : of[4 * set + 2][0]
                           : g & 1 ? of[4 * set + 1][0]
                                   : of[4 * set][0],
                    odd = g & 2   ? g & 1 ? of[4 * set + 3][1] : of[4 * set + 2][1]
                          : g & 1 ? of[4 * set + 1][1]
                                  : of[4 * set][1];
        const float sum = __shfl_sync(~0u, g & 4 ? odd : even, 4 * (t + 4 * (g & 1)) + (g >> 1));
        const uint32_t high = float_to_half(sum), low = float_to_half(sum - half_to_float(high));
        const uint32_t at = L::GROUP == 16 ? table + task * 256 + lane * 8 + set * 4
                                           : table + ((unit >> 1) * NB + nb) * 256 + lane * 8 + (unit & 1) * 4;
        sts32(at, high | low << 16);
      }
    }
  }
}

// Puts all of them into their places, and the largest magnitudes of rows, as bits of the type, into most[]. SCALED:
// times powers of two for the rows, which are in `ups`. A thread takes the same columns of all rows, all on their way
// at once; a warp takes two units, and adds them up.
template <class L, int NB, int TYPE, bool SCALED>
__device__ __forceinline__ void arrange_rows(uint32_t xs, uint32_t table, uint32_t* most, uint32_t ups,
                                             const Product& p, int first, int width, int tid) {
  const int chunks = width / 8;
  const bool whole = (((size_t)p.x | (size_t)(p.x_stride * 2)) & 15) == 0 && first + width <= p.cols;
  for (int chunk = tid; chunk - tid % 32 < chunks; chunk += FEW_THREADS) {  // whole warps
    const uint16_t* const x = (const uint16_t*)p.x + first + 8 * chunk;
    const int c = chunk & 3;
    const bool there = chunk < chunks;
    const uint32_t at = xs + (chunk >> 4) * (NB * 2048) + (chunk >> 2 & 3) * 512 +
                        (L::GROUP == 16 ? (c & 1) * 32 + (c >> 1) * 8 : c * 16);
    const auto put = [&](int row, const uint4& raw) {
      if (!SCALED) {
        uint32_t m = __vmaxu2(__vmaxu2(raw.x & 0x7FFF7FFFu, raw.y & 0x7FFF7FFFu),
                              __vmaxu2(raw.z & 0x7FFF7FFFu, raw.w & 0x7FFF7FFFu));
        atomicMax(most + row, max(m & 0xFFFF, m >> 16));  // the compiler makes it one of the warp
      }
      const uint4 b = as_halves<TYPE, SCALED>(raw, SCALED ? lds_float(ups + 4 * row) : 1);
      const uint32_t to = at + (row >> 3) * 2048 + (row & 7) * 64;
      if (!there) return;
      if (L::GROUP == 16)  // halves of two groups
        sts64(to, b.x, b.y), sts64(to + 16, b.z, b.w);
      else
        sts128(to, b);
    };
    if (whole) {
      uint4 raw[8 * NB];
#pragma unroll
      for (int row = 0; row < 8 * NB; row++) {
        raw[row] = make_uint4(0, 0, 0, 0);
        if (row < p.batch && there) raw[row] = *(const uint4*)(x + (size_t)row * p.x_stride);
      }
#pragma unroll
      for (int row = 0; row < 8 * NB; row++)
        if (row < p.batch) put(row, raw[row]);
    } else {
#pragma unroll 1
      for (int row = 0; row < p.batch; row++)
        put(row, there ? load_eight((const uint16_t*)p.x + (size_t)row * p.x_stride, first + 8 * chunk, p.cols, false)
                       : make_uint4(0, 0, 0, 0));
    }
    __syncwarp();
    for (int unit = chunk / 32 * 2; unit < min(chunk / 32 * 2 + 2, width / UNIT_COLS); unit++)
      sum_unit<L, NB>(xs, table, unit, tid % 32);
  }
}
template <class L, int NB, bool SCALED>
__device__ __forceinline__ void arrange_rows(uint32_t xs, uint32_t table, uint32_t* most, uint32_t ups,
                                             const Product& p, int first, int width, int tid) {
  if (p.x_type == F16)
    arrange_rows<L, NB, F16, SCALED>(xs, table, most, ups, p, first, width, tid);
  else
    arrange_rows<L, NB, BF16, SCALED>(xs, table, most, ups, p, first, width, tid);
}

// ---- products ----
// sum += the unit's groups' products, scaled but for factors of rows and 2^-24 or 2^-20.
template <class L, int NB>
__device__ __forceinline__ void multiply_in_place(const GroupUnit<L>& unit, const Constants& k, uint32_t x,
                                                  float (&sum)[NB][4]) {
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
      const uint4 b = lds128(x + nb * 2048 + j * 512);
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
                                              const Constants& k, uint32_t x, uint32_t table, float (&c)[NB][4],
                                              Done done) {
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
      multiply_in_place<L, NB>(unit[i], k, x + i * NB * 2048, of_unit);
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
      multiply_in_place<L, NB>(unit[i], k, x + i * NB * 2048, sum);
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
  constexpr int WARP_BYTES = TILE_ROWS * NB * 32, TILE_BYTES = FEW_WARPS * WARP_BYTES, QUADS = 2 * NB;
  // `warp` counts within the team.
  const int tid = threadIdx.x, lane = keep(tid & 31), team = tid / FEW_TEAM_THREADS, warp = keep(tid / 32 % FEW_WARPS),
            g = keep(lane >> 2), t = lane & 3, first = 2 * warp;
  const Part<L> part(p);
  const int padded_rows = part.shape.tiles * TILE_ROWS, units = part.width() / UNIT_COLS;
  const uint32_t ring_at = shared_address(memory), bars = ring_at + p.slots * slot_bytes<L>(),
                 rows_at = bars + BARRIER_BYTES, all_sums = rows_at + 4 * ROW_WORDS,
                 sums = all_sums + team * p.keep * TILE_BYTES, xs = all_sums + FEW_TEAMS * p.keep * TILE_BYTES,
                 table = xs + units * NB * 2048;
  uint32_t* const most = (uint32_t*)(memory + (rows_at - ring_at));  // of rows; behind them what undoes their scales
  Ring<L, FEW_TEAMS, FEW_WARPS> ring(p, ring_at, bars);
  ring.init(tid - FEW_THREADS);
  if (tid < ROW_WORDS) most[tid] = 0;
  __syncthreads();
  if (team == FEW_TEAMS) {
    give_registers<24>();
    if (tid == FEW_THREADS) ring.produce(p, part);
    return;
  }
  take_registers<112>();
  const bool special = *p.overflow != 0;  // weights that are not finite
  let_next_kernel_start();
  wait_for_previous_kernel();  // everything below may touch what the previous kernel wrote, or reads
  arrange_rows<L, NB, false>(xs, table, most, 0, p, part.first_col(), part.width(), tid);
  bar_sync<1, FEW_THREADS>();
  bool unfit = false, large = false;
  uint32_t exponent = 136;
  if (lane < p.batch) {
    const uint32_t bits = p.x_type == F16 ? __float_as_uint(half_to_float(most[lane])) : most[lane] << 16;
    large = bits >= 0x60000000u;                                  // 2^65
    unfit = bits && (bits < 0x3B000000u || bits >= 0x44800000u);  // 2^-9, 2^10
    exponent = max(bits >> 23, 10u);
  }
  const bool exact = special || __any_sync(~0u, large), scaled = __any_sync(~0u, unfit) && !exact;
  if (scaled) {
    const uint32_t ups = rows_at + 2 * ROW_WORDS;
    if (tid < p.batch) sts_float(ups + 4 * tid, __uint_as_float((263 - exponent) << 23));
    bar_sync<1, FEW_THREADS>();
    arrange_rows<L, NB, true>(xs, table, most, ups, p, part.first_col(), part.width(), tid);
    bar_sync<1, FEW_THREADS>();
    if (tid < p.batch) sts_float(ups + 4 * tid, __uint_as_float((exponent - 9) << 23));  // what undoes it, for the end
    bar_sync<1, FEW_THREADS>();
  }
  ring.slot = team;

  const int last_units = units - (part.stages - 1) * L::UNITS;
  // Stages in which the warp has both its units.
  const int full_stages = ceil_div(units - first - 1, L::UNITS);
  // What the team's warps have stored of `kept` tiles from `from` on, every FEW_TEAMS-th.
  const auto add_warps = [&](int kept, int from) {
    for (int i = tid % FEW_TEAM_THREADS; i < kept * TILE_ROWS * QUADS; i += FEW_TEAM_THREADS) {
      const int row = i % TILE_ROWS, quad = i / TILE_ROWS % QUADS, k = i / (TILE_ROWS * QUADS);
      if (4 * quad >= p.batch) continue;
      const uint32_t at = sums + k * TILE_BYTES + ((quad >> 1) * TILE_ROWS + row) * 32 + (quad & 1) * 16;
      float of[4] = {};
#pragma unroll
      for (int w = 0; w < FEW_WARPS; w++) {
        const uint4 v = lds128(at + w * WARP_BYTES);
        of[0] += __uint_as_float(v.x), of[1] += __uint_as_float(v.y), of[2] += __uint_as_float(v.z),
            of[3] += __uint_as_float(v.w);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int m = 4 * quad + e;
        if (m >= p.batch) break;
        if (scaled) of[e] *= lds_float(rows_at + 2 * ROW_WORDS + 4 * m);
        hand_on(p, padded_rows, part.slab, (part.tile0 + from + k * FEW_TEAMS) * TILE_ROWS + row, m, of[e]);
      }
    }
  };
  const auto all_tiles = [&](auto exactly) {
    constexpr bool EXACT = decltype(exactly)::value;
    [[maybe_unused]] const Constants constants(t);
    const uint32_t x_first = xs + first * NB * 2048 + lane * 16,
                   table_first = table + first * NB * few_group_bytes<L>() + (L::GROUP == 128 ? t : lane) * 8;
    for (int tile = team, kept = 0; tile < part.tiles; tile += FEW_TEAMS) {
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
          multiply_pair<L, NB, OWN>(at, trailer, first, lane, g, constants, x_at, table_at, c, done);
        }
        x_at += L::UNITS * NB * 2048, table_at += L::UNITS * NB * few_group_bytes<L>();
      };
      for (; s < full_stages; s++) stage(std::integral_constant<int, 2>(), s + 1 == part.stages);
      if (s < part.stages) {
        if (last_units > first)
          stage(std::integral_constant<int, 1>(), true);
        else
          stage(std::integral_constant<int, 0>(), true);
      }
      // sums[kept][warp][eight rows of x][row][row of x], of each team
      const uint32_t mine = sums + kept * TILE_BYTES + warp * WARP_BYTES + g * 32 + t * 8;
#pragma unroll
      for (int nb = 0; nb < NB; nb++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          sts64(mine + nb * 512 + h * 256, __float_as_uint(c[nb][2 * h]), __float_as_uint(c[nb][2 * h + 1]));
      if (++kept < p.keep && tile + FEW_TEAMS < part.tiles) continue;
      bar_sync_of<FEW_TEAM_THREADS>(2 + team);
      add_warps(kept, tile - (kept - 1) * FEW_TEAMS);
      kept = 0;
      if (tile + FEW_TEAMS < part.tiles) bar_sync_of<FEW_TEAM_THREADS>(2 + team);
    }
  };
  if (exact)
    all_tiles(std::true_type());
  else
    all_tiles(std::false_type());
  add_slabs<FEW_THREADS>(p, part.tile0, part.tiles, padded_rows, all_sums, tid);
#endif
}

}  // namespace taper

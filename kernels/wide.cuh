// y = x W^T for 17 to 64 columns of activations.
//
// A block has one stage of columns (at most 1024: `slabs` = stages) and a run of tiles. So warp w meets the same 128
// columns in every tile and keeps its activations in registers, as B fragments: 8 NB words a lane (64 for 32 columns,
// 128 for 64). What costs is the sum over the warps of each tile, through shared memory, in two buffers so that one
// barrier a tile is enough. The slabs' sums meet in `partial`; when all blocks of a group have arrived, they share out
// its tiles and add the planes in one order.
//
// Budget   per unit at 64 columns: 176 instructions to decode, 64 products, 100 to store and add sums; 115 cycles of
//          shared memory's time (24 each for the weights' way in and out, 64 for sums), against 203 in which 12-bit
//          weights arrive at 3 TB/s.
//
// Launch   grid groups * slabs, slabs = stages (more than the SMs: not possible, blocks of a group wait for each
//          other), groups = min(tiles, SMs / slabs); block 256 (a ninth warp would leave each thread 168 registers);
//          dynamic shared memory wide_shared_bytes(..); slots 3 to 8, never fewer (the ring of sm_80 always has three);
//          in_flight is not used.
//          partial: slabs * batch * tiles * 16 floats; arrived: 2 * groups zeroed words, zero again at the end (neither
//          if slabs = 1).
#pragma once
#include "product.cuh"

namespace taper {

constexpr int WIDE_BLOCK = CONSUMER_THREADS,
              SUM_STRIDE = 20;  // floats between columns: what a warp stores at once falls into 32 banks
__host__ __device__ constexpr int wide_sums_bytes(int columns) { return CONSUMERS * columns * SUM_STRIDE * 4; }
template <class L>
__host__ __device__ constexpr int wide_group_sums_bytes(int columns) {
  return CONSUMERS * (columns <= 32 ? 32 : 64) * group_sums_bytes<L>();
}
template <class L>
__host__ __device__ constexpr int wide_shared_bytes(int columns, int slots, bool hopper) {
  return slots * slot_bytes<L>(hopper) + BARRIER_BYTES + 2 * wide_sums_bytes(columns) +
         wide_group_sums_bytes<L>(columns);
}

#if __CUDA_ARCH__ >= 900
// The block's barrier after each tile also says that its slot is free, so there is no producer: thread 0 sends for the
// next stage.
template <class L>
struct WideRing {
  uint32_t base, full, slot = 0, phase = 0, fill = 0;
  int next = 0;  // tile to send for
  __device__ WideRing(const Product& p, const Part<L>& part, uint32_t base_, uint32_t bars, int tid)
      : base(base_), full(bars) {
    if (tid == 0) {
      for (int s = 0; s < p.slots; s++) mbarrier_init(full + 8 * s, 1);
      mbarrier_init_fence();
      for (int s = 0; s < p.slots; s++) send(p, part);
    }
    __syncthreads();
  }
  __device__ void send(const Product& p, const Part<L>& part) {
    if (next == part.tiles) return;
    const uint8_t* src =
        p.weights + (part.tile0 + next++) * part.shape.tile_bytes() + part.stage0 * Shape<L>::stage_bytes();
    const uint32_t bytes = part.shape.units_of(part.stage0) * L::UNIT_BYTES + L::TRAILER;
    mbarrier_expect(full + 8 * fill, bytes);
    bulk_copy(base + fill * slot_bytes<L>(), src, bytes, full + 8 * fill, evict_first_policy());
    fill = (int)fill == p.slots - 1 ? 0 : fill + 1;
  }
  __device__ void start(const Product&, const Part<L>&, int, int) {}
  __device__ void wait() { mbarrier_wait(full + 8 * slot, phase); }
  __device__ void done(const Product& p, const Part<L>& part, int warp, int lane) {
    if (warp == 0 && lane == 0) send(p, part);
    if ((int)++slot == p.slots) slot = 0, phase ^= 1;
  }
  __device__ uint32_t unit(int u) const { return base + slot * slot_bytes<L>() + u * L::UNIT_BYTES; }
  __device__ uint32_t trailer(int, int units) const { return unit(units); }
};
#else
template <class L>
struct WideRing : Ring<L> {
  __device__ WideRing(const Product& p, const Part<L>&, uint32_t base, uint32_t bars, int) : Ring<L>(p, base, bars) {}
  __device__ uint32_t unit(int u) const { return Ring<L>::unit(0, u); }
};
#endif

// The B fragments of this warp's unit: b[j][nb] is vector j of column 8 nb + g. Columns past the last repeat it.
template <class L, int NB>
__device__ __forceinline__ void load_fragments(uint4 (&b)[4][NB], const Product& p, int first, int width, int columns,
                                               uint32_t staging, int tid) {
  const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, k = first + warp * UNIT_COLS;
  if (p.x_type == BF16 && first + width <= p.cols && ((size_t)p.x & 15) == 0 && p.x_stride % 8 == 0) {
    if (warp * UNIT_COLS < width) {
#pragma unroll
      for (int nb = 0; nb < NB; nb++) {
        const uint8_t* from =
            (const uint8_t*)p.x + ((size_t)min(8 * nb + g, columns - 1) * p.x_stride + k) * 2 + t * lane_bytes<L>();
#pragma unroll
        for (int j = 0; j < 4; j++, from += 64) {
          if constexpr (L::GROUP != 16) {
            b[j][nb] = *(const uint4*)from;
          } else {
            const uint2 low = *(const uint2*)from, high = *(const uint2*)(from + 32);
            b[j][nb] = make_uint4(low.x, low.y, high.x, high.y);
          }
        }
      }
    }
    return;
  }
  // Other types and what is not aligned: through shared memory, two warps' columns at a time.
  constexpr int STEP = 2 * UNIT_COLS, STRIDE = activation_stride(STEP);
  for (int at = 0; at < width; at += STEP) {
    load_activations<CONSUMER_THREADS>(staging, STRIDE, p.x, p.x_type, p.x_stride, p.batch, p.cols, first + at,
                                       min(STEP, width - at), tid);
    async_commit();
    async_wait<0>();
    bar_sync<1, CONSUMER_THREADS>();
    if (warp / 2 == at / STEP) {
#pragma unroll
      for (int nb = 0; nb < NB; nb++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          b[j][nb] = lds_fragment<L>(staging + min(8 * nb + g, columns - 1) * STRIDE + (warp & 1) * UNIT_COLS * 2 +
                                     j * 64 + t * lane_bytes<L>());
    }
    bar_sync<1, CONSUMER_THREADS>();
  }
}

template <class L, int NB>
__device__ __forceinline__ void wide_product(const Product& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const Part<L> part(p);
  const int parts = p.x_type + 1, columns = p.batch * parts, padded_rows = part.shape.tiles * TILE_ROWS,
            units = part.shape.units_of(part.stage0);
  const uint32_t ring_at = shared_address(memory), bars = ring_at + p.slots * slot_bytes<L>();
  uint32_t sums = bars + BARRIER_BYTES, other_sums = sums + wide_sums_bytes(columns);
  WideRing<L> ring(p, part, ring_at, bars, tid);
  let_next_kernel_start();
  wait_for_previous_kernel();
  uint4 b[4][NB];
  load_fragments<L, NB>(b, p, part.first_col(), part.width(), columns, sums, tid);
  ring.start(p, part, warp, lane);
  // Layouts with groups: what the warp's unit needs of the activations' sums, and whether something is not finite.
  [[maybe_unused]] const uint32_t table =
      bars + BARRIER_BYTES + 2 * wide_sums_bytes(columns) + warp * 8 * NB * group_sums_bytes<L>();
  [[maybe_unused]] bool exact = false;
  if constexpr (L::GROUP >= 16) {
    uint32_t large = __ldg(p.overflow);
    if (warp < units) {
#pragma unroll
      for (int nb = 0; nb < NB; nb++) {
        float d[4][L::GROUP == 16 ? 2 : 1][4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          large |= large_bits(b[j][nb]);
          if (L::AWAY) add_columns<L>(d[j], b[j][nb]);
        }
        if (L::AWAY) store_sums<L>(table + 8 * nb * group_sums_bytes<L>(), 8, d, lane);
      }
    }
    exact = __any_sync(~0u, large != 0);
  }
  [[maybe_unused]] const auto constants = [&] {
    if constexpr (L::GROUP >= 16)
      return Constants(t);
    else
      return 0;
  }();
  for (int tile = 0; tile < part.tiles; tile++) {
    ring.wait();
    if (warp < units) {
      float c[NB][4] = {};
      const uint32_t at = ring.unit(warp), trailer = ring.trailer(warp, units);
      const auto fragment = [&](int j, int nb) { return pick(j, b[0][nb], b[1][nb], b[2][nb], b[3][nb]); };
      if constexpr (L::GROUP >= 16) {
        if (exact) {
          multiply_exactly<L, NB>(at, trailer, warp, lane, c, fragment);
        } else {
          GroupUnit<L> unit;
          unit.load(at, trailer, warp, lane);
          multiply<L, NB>(unit, constants, c, fragment,
                          [&](int nb) { return lds_sums<L>(table + (8 * nb + g) * group_sums_bytes<L>(), t); });
        }
      } else {
        multiply_unit<L, NB>(at, trailer, warp, lane, p.overflow, c, fragment);
      }
      const uint32_t mine = sums + (warp * columns * SUM_STRIDE + g) * 4;  // sums[warp][column][row]
#pragma unroll
      for (int nb = 0; nb < NB; nb++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = 8 * nb + 2 * t + (i & 1);
          if (column < columns) sts_float(mine + (column * SUM_STRIDE + 8 * (i >> 1)) * 4, c[nb][i]);
        }
    }
    bar_sync<1, CONSUMER_THREADS>();
    ring.done(p, part, warp, lane);
    for (int i = tid; i < p.batch * 4; i += CONSUMER_THREADS) {  // four rows of one row of activations
      const int m = i >> 2, row = (part.tile0 + tile) * TILE_ROWS + (i & 3) * 4;
      float sum[4] = {0, 0, 0, 0};
      for (int q = 0; q < parts; q++)
#pragma unroll
        for (int w = 0; w < CONSUMERS; w++) {
          if (w >= units) break;
          const uint4 v = lds128(sums + ((w * columns + m * parts + q) * SUM_STRIDE + (i & 3) * 4) * 4);
          sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y), sum[2] += __uint_as_float(v.z),
              sum[3] += __uint_as_float(v.w);
        }
      if (p.slabs > 1)
        *(float4*)(p.partial + ((size_t)part.slab * p.batch + m) * padded_rows + row) =
            make_float4(sum[0], sum[1], sum[2], sum[3]);
      else
#pragma unroll
        for (int e = 0; e < 4; e++) finish(p, row + e, m, sum[e]);
    }
    const uint32_t swap = sums;
    sums = other_sums, other_sums = swap;
  }
  if (p.slabs == 1) return;

  // All slabs of the group meet, then each block adds up its share of the tiles.
  meet(p, part.group, tid);
  const int from = part.tiles * part.slab / p.slabs, to = part.tiles * (part.slab + 1) / p.slabs;
  add_planes<CONSUMER_THREADS>(p, part.tile0 + from, to - from, p.slabs, tid,
                               [&](int slab, int m) { return p.partial + ((size_t)slab * p.batch + m) * padded_rows; });
}

}  // namespace taper

// y = x W^T for 33 to 64 columns of activations on compute capability 9.0: products of whole warpgroups (wgmma,
// sm_90a).
//
// A block has one stage of columns (`slabs` = stages) and a run of tiles. Its activations stay in shared memory, in the
// order that wgmma reads, and are read once for four tiles: by a warpgroup, each of whose warps has decoded one tile's
// unit into the registers that are the product's A. Two warpgroups halve the stage's units between them; the second
// hands its sums to the first through shared memory. Each warp keeps a private ring of units. The slabs' sums meet in
// `partial` as in wide.cuh.
//
// Order of x   16 bytes hold the eight columns of x that two registers of four lanes' A fragments hold: chunk q of
//              vector j is columns 32 j + 8 t + 2 q + e (t = 0..3, e = 0, 1). Chunks lie one after another, within one
//              the columns of activations.
// Budget       per unit: 250 instructions to decode, 64 cycles of the tensor cores, 4 KB of x from shared memory; 203
//              cycles in which 12-bit weights arrive at 3 TB/s. Some 10 us of a launch are not the weights': x (17 MB
//              out of the L2 for all blocks), the slabs' sums.
//
// Launch       grid groups * slabs, slabs = stages (at most the SMs: blocks of a group wait for each other), groups =
//              min(tiles, SMs / slabs); block 256; dynamic shared memory warpgroup_shared_bytes(..); slots 3. partial:
//              slabs * batch * parts * tiles * 16 floats; arrived: 2 * groups zeroed words, zero again at the end.
#pragma once
#include "wgmma.cuh"
#include "wide.cuh"

namespace taper {

template <class L>
__host__ __device__ constexpr int warp_slot_bytes() {
  return L::UNIT_BYTES + L::TRAILER;
}
// x, the second warpgroup's sums, rings and their barriers. NB: eights of columns of activations.
template <class L, int NB>
__host__ __device__ constexpr int warpgroup_shared_bytes(int slots) {
  return (L::UNITS * UNIT_COLS * 2 * 8 + 128 * 16) * NB + CONSUMERS * slots * (warp_slot_bytes<L>() + 8) + 128;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Sixteen bytes of column n, from column 32 j + 8 i of x on, to where wgmma reads them.
template <int GROUP, int NC>
__device__ __forceinline__ void put_columns(uint32_t xs, int n, int j, int i, uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const int q = GROUP == 16 ? i / 2 * 2 + w % 2 : w, t = GROUP == 16 ? i % 2 * 2 + w / 2 : i;
    sts32(xs + ((j * 4 + q) * NC + n) * 16 + t * 4, words[w]);
  }
}

// Columns [first, first + width) of x to shared memory as bf16, in the order above; columns of activations past the
// last are zero.
template <int GROUP, int NB>
__device__ __forceinline__ void arrange_activations(uint32_t xs, const Product& p, int first, int width, int columns,
                                                    uint32_t staging, int tid) {
  constexpr int NC = 8 * NB;
  const int pieces = width / 32 * NC * 4;
  if (p.x_type == BF16 && first + width <= p.cols && ((size_t)p.x & 15) == 0 && p.x_stride % 8 == 0) {
    constexpr int DEEP = 8;
    for (int base = tid; base < pieces; base += DEEP * CONSUMER_THREADS) {
      uint4 v[DEEP];
#pragma unroll
      for (int d = 0; d < DEEP; d++) {
        const int at = base + d * CONSUMER_THREADS, i = at & 3, n = at / 4 % NC, j = at / 4 / NC;
        v[d] = at < pieces && n < columns
                   ? *(const uint4*)((const uint16_t*)p.x + (size_t)n * p.x_stride + first + 32 * j + 8 * i)
                   : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int d = 0; d < DEEP; d++) {
        const int at = base + d * CONSUMER_THREADS;
        if (at < pieces) put_columns<GROUP, NC>(xs, at / 4 % NC, at / 4 / NC, at & 3, v[d]);
      }
    }
    return;
  }
  constexpr int STEP = 64, STRIDE = activation_stride(STEP);  // NC rows of 192 bytes fit where the sums will be
  for (int at = 0; at < width; at += STEP) {
    load_activations<CONSUMER_THREADS>(staging, STRIDE, p.x, p.x_type, p.x_stride, p.batch, p.cols, first + at, STEP,
                                       tid);
    async_commit();
    async_wait<0>();
    __syncthreads();
    for (int piece = tid; piece < STEP / 32 * NC * 4; piece += CONSUMER_THREADS) {
      const int i = piece & 3, n = piece / 4 % NC, j = piece / 4 / NC;
      put_columns<GROUP, NC>(xs, n, at / 32 + j, i,
                             n < columns ? lds128(staging + n * STRIDE + j * 64 + i * 16) : make_uint4(0, 0, 0, 0));
    }
    __syncthreads();
  }
}

// The units that one warp takes: of each of its tiles (every fourth of the block's) those of its warpgroup's half.
template <class L>
struct WarpUnits {
  uint32_t base, bars, slot = 0, phase = 0, fill = 0;
  int slots, tile, unit;  // to send for next
  const int tiles, first, last;
  const uint8_t* const stage_at;
  const Shape<L> shape;
  const int units;
  __device__ WarpUnits(const Product& p, const Part<L>& part, uint32_t base_, uint32_t bars_, int warp, int first_,
                       int last_)
      : base(base_),
        bars(bars_),
        slots(p.slots),
        tile(warp & 3),
        unit(first_),
        tiles(part.tiles),
        first(first_),
        last(last_),
        stage_at(p.weights + part.tile0 * part.shape.tile_bytes() + part.stage0 * Shape<L>::stage_bytes()),
        shape(part.shape),
        units(part.shape.units_of(part.stage0)) {}
  __device__ void send() {  // one lane
    if (tile >= tiles || first == last) return;
    const uint8_t* src = stage_at + tile * shape.tile_bytes();
    const uint64_t policy = evict_first_policy();
    const uint32_t to = base + fill * warp_slot_bytes<L>(), bar = bars + 8 * fill;
    mbarrier_expect(bar, L::UNIT_BYTES + L::TRAILER);
    bulk_copy(to, src + unit * L::UNIT_BYTES, L::UNIT_BYTES, bar, policy);
    if (L::TRAILER) bulk_copy(to + L::UNIT_BYTES, src + units * L::UNIT_BYTES, L::TRAILER, bar, policy);
    if (++unit == last) unit = first, tile += 4;
    fill = (int)fill == slots - 1 ? 0 : fill + 1;
  }
  __device__ uint32_t wait() const {
    mbarrier_wait(bars + 8 * slot, phase);
    return base + slot * warp_slot_bytes<L>();
  }
  __device__ void done(int lane) {
    __syncwarp();
    if (lane == 0) send();
    if ((int)++slot == slots) slot = 0, phase ^= 1;
  }
};
// The second warpgroup's sums join the first's, which leaves them, times factor(column), in the slab's plane. `row`:
// the lane's first.
template <int NB, class Factor>
__device__ __forceinline__ void join_halves(const Product& p, const float (&c)[NB][4], uint32_t sums, int slab,
                                            int columns, int padded_rows, int row, bool there, int tid, Factor factor) {
  const uint32_t spot = sums + (tid & 127) * 4;
  const bool second = tid >= 128;
  if (second) {
#pragma unroll
    for (int i = 0; i < NB * 4; i++) sts_float(spot + i * 512, c[i / 4][i % 4]);
  }
  __syncthreads();
  if (!second && there) {
    float* to = p.partial + (size_t)slab * columns * padded_rows + row;
#pragma unroll
    for (int i = 0; i < NB * 4; i++) {
      const int column = 8 * (i / 4) + 2 * (tid & 3) + (i & 1);
      const float sum = c[i / 4][i % 4] + lds_float(spot + i * 512);
      if (column < columns) to[(size_t)column * padded_rows + 8 * (i >> 1 & 1)] = sum * factor(column);
    }
  }
  __syncthreads();
}

// When all slabs of the block's group have come so far, its share of the tiles is added up.
template <class L>
__device__ __forceinline__ void add_halves(const Product& p, const Part<L>& part, int columns, int padded_rows,
                                           int tid) {
  meet(p, part.group, tid);
  const int parts = p.x_type + 1, from = part.tiles * part.slab / p.slabs, to = part.tiles * (part.slab + 1) / p.slabs;
  add_planes<CONSUMER_THREADS>(p, part.tile0 + from, to - from, p.slabs * parts, tid, [&](int term, int m) {
    return p.partial + ((size_t)(term / parts) * columns + m * parts + term % parts) * padded_rows;
  });
}
#endif

template <class L, int NB>
__device__ __forceinline__ void warpgroup_product(const Product& p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int NC = 8 * NB, X_BYTES = L::UNITS * UNIT_COLS * 2 * NC;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, half = warp >> 2;
  const Part<L> part(p);
  const int parts = p.x_type + 1, columns = p.batch * parts, padded_rows = part.shape.tiles * TILE_ROWS,
            units = part.shape.units_of(part.stage0);
  const uint32_t xs = shared_address(memory), sums = xs + X_BYTES, rings = sums + 128 * 16 * NB,
                 bars = rings + CONSUMERS * p.slots * warp_slot_bytes<L>();
  const int middle = (units + 1) / 2, first = half ? middle : 0, last = half ? units : middle;
  WarpUnits<L> mine(p, part, rings + warp * p.slots * warp_slot_bytes<L>(), bars + warp * p.slots * 8, warp, first,
                    last);
  if (lane == 0) {
    for (int s = 0; s < p.slots; s++) mbarrier_init(mine.bars + 8 * s, 1);
    mbarrier_init_fence();
    for (int s = 0; s < p.slots; s++) mine.send();
  }
  __syncwarp();
  let_next_kernel_start();
  wait_for_previous_kernel();
  arrange_activations<L::GROUP, NB>(xs, p, part.first_col(), part.width(), columns, sums, tid);
  fence_async_proxy();
  __syncthreads();

  for (int tile0 = 0; tile0 < part.tiles; tile0 += 4) {
    const bool there = tile0 + (warp & 3) < part.tiles;
    float c[NB][4] = {};
    for (int u = first; u < last; u++) {
      uint32_t a[4][8] = {};
      [[maybe_unused]] float scale[2] = {0, 0};
      if (there) {
        const uint32_t at = mine.wait();
        if constexpr (L::GROUP == 128) {
          typename L::S scales;
          scales.load(at + L::C::BYTES, at + L::UNIT_BYTES, u, lane >> 2);
          scale[0] = scales.scale[0], scale[1] = scales.scale[1];
#pragma unroll
          for (int j = 0; j < 4; j++) integers<L>(L::C::load(at, lane, j), scales, two_128(), a[j]);
        } else
          decode_unit<L>(at, at + L::UNIT_BYTES, u, lane, p.overflow, [&](int j, const uint32_t (&v)[8]) {
#pragma unroll
            for (int r = 0; r < 8; r++) a[j][r] = v[r];
          });
        mine.done(lane);
      }
      __syncwarp();
      const auto multiply = [&](float (&d)[NB][4]) {
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint32_t x = xs + (u * 4 + j) * 4 * NC * 16;
          wgmma<false>(d, a[j], b_descriptor(x, NC * 16));
          wgmma<false>(d, a[j] + 4, b_descriptor(x + 2 * NC * 16, NC * 16));
        }
        wgmma_commit();
        wgmma_wait();
      };
      if constexpr (L::GROUP == 128) {
        float d[NB][4] = {};
        multiply(d);
#pragma unroll
        for (int i = 0; i < NB * 4; i++) c[i / 4][i % 4] = fmaf(scale[i >> 1 & 1], d[i / 4][i % 4], c[i / 4][i % 4]);
      } else
        multiply(c);
    }
    join_halves<NB>(p, c, sums, part.slab, columns, padded_rows,
                    (part.tile0 + tile0 + (warp & 3)) * TILE_ROWS + (lane >> 2), there, tid, [](int) { return 1.0f; });
  }
  add_halves(p, part, columns, padded_rows, tid);
#endif
}

}  // namespace taper

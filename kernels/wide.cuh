// y = x W^T for 17 to 64 columns of activations.
//
// With so many columns the sums of a tile are too many to be added across warps for every tile, and the activations are what fills shared
// memory. So each warp works alone: it takes a run of whole units (of its block's tiles, within the block's slab of columns), keeps a
// private ring of three units, and leaves its sums in `partial` when it comes to another tile. At most two warps share a tile; the second
// leaves its sums in a plane of its own. When all slabs of a group have arrived, its blocks share out the tiles and add the planes
// in one order.
//
// Budget   per unit and 8 columns: 8 products and 2 KB of activations from shared memory: at 64 columns 128 cycles a unit of
//          shared memory's time, against 235 in which dense bf16 weights would arrive.
//
// Launch   grid groups * slabs (never more blocks than SMs: blocks of a group wait for each other)     block 256
//          dynamic shared memory wide_shared_bytes(..)    partial: 2 * slabs * batch * parts * tiles * 16 floats
//          arrived: 2 * groups zeroed words, zero again at the end.     slots 3, in_flight is not used.
#pragma once
#include "product.cuh"

namespace taper {

constexpr int WIDE_BLOCK = 256, WIDE_WARPS = 8, WIDE_SLOTS = 3;
template <class L> __host__ __device__ constexpr int wide_slot_bytes() { return L::UNIT_BYTES + L::TRAILER; }
template <class L> __host__ __device__ constexpr int wide_shared_bytes(int cols, int slabs, int columns) {
  return WIDE_WARPS * WIDE_SLOTS * (wide_slot_bytes<L>() + 8) + 64 + columns * activation_stride(slab_width<L>(cols, slabs));
}

// The runs of units that the warps of a block take.
struct Runs {
  int units, active;  // units of a tile within the slab; warps with work
  long long total;
  __device__ Runs(int tiles, int units_) : units(units_), active(min(WIDE_WARPS, tiles)), total((long long)tiles * units_) {}
  __device__ int first(int warp) const { return warp >= active ? (int)total : (int)(total * warp / active); }
  __device__ bool shared(int tile) const {  // do two warps share it?
    for (int w = 1; w < active; w++)
      if (first(w) / units == tile && first(w) % units != 0) return true;
    return false;
  }
};

template <class L> struct PrivateRing {
  uint32_t base, bars, slot = 0, phase = 0, fill = 0;
  const uint8_t* tile_at;  // of the next unit to copy
  int stage, unit;
  const int stage0, stages;
  const Shape<L> shape;
  __device__ PrivateRing(uint32_t memory, const Product& p, const Part<L>& part, const Runs& runs, int warp, int lane)
      : base(memory + warp * WIDE_SLOTS * wide_slot_bytes<L>()), bars(memory + WIDE_WARPS * WIDE_SLOTS * wide_slot_bytes<L>() + warp * WIDE_SLOTS * 8),
        stage0(part.stage0), stages(part.stages), shape(part.shape) {
    const int first = runs.first(warp), tile = first / runs.units, u = first - tile * runs.units;
    tile_at = p.weights + (part.tile0 + tile) * shape.tile_bytes();
    stage = u / L::UNITS, unit = u - stage * L::UNITS;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      for (int s = 0; s < WIDE_SLOTS; s++) mbarrier_init(bars + 8 * s, 1);
      mbarrier_init_fence();
    }
    __syncwarp();
#endif
  }
  __device__ void copy_next(bool more, int lane) {
    if (more) {
      const int units = shape.units_of(stage0 + stage);
      const uint8_t* src = tile_at + (stage0 + stage) * Shape<L>::stage_bytes();
      const uint32_t to = base + fill * wide_slot_bytes<L>();
#if __CUDA_ARCH__ >= 900
      if (lane == 0) {
        const uint64_t policy = evict_first_policy();
        mbarrier_expect(bars + 8 * fill, L::UNIT_BYTES + L::TRAILER);
        bulk_copy(to, src + unit * L::UNIT_BYTES, L::UNIT_BYTES, bars + 8 * fill, policy);
        bulk_copy(to + L::UNIT_BYTES, src + units * L::UNIT_BYTES, L::TRAILER, bars + 8 * fill, policy);
      }
#else
      for (int i = lane; i < L::UNIT_BYTES / 16; i += 32) async_copy16(to + 16 * i, src + unit * L::UNIT_BYTES + 16 * i);
      for (int i = lane; i < L::TRAILER / 16; i += 32) async_copy16(to + L::UNIT_BYTES + 16 * i, src + units * L::UNIT_BYTES + 16 * i);
#endif
      if (++unit == units) {
        unit = 0;
        if (++stage == stages) stage = 0, tile_at += shape.tile_bytes();
      }
      fill = fill == WIDE_SLOTS - 1 ? 0 : fill + 1;
    }
#if __CUDA_ARCH__ < 900
    async_commit();
#endif
  }
  __device__ void wait() {
#if __CUDA_ARCH__ >= 900
    mbarrier_wait(bars + 8 * slot, phase);
#else
    async_wait<WIDE_SLOTS - 1>();
    __syncwarp();
#endif
  }
  __device__ void next() {
    if (++slot == WIDE_SLOTS) slot = 0, phase ^= 1;
  }
};

template <class L, int NB> __device__ __forceinline__ void wide_product(const Product& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const Part<L> part(p);
  const int parts = p.x_type + 1, columns = p.batch * parts, stride = activation_stride(slab_width<L>(p.cols, p.slabs)), padded_rows = part.shape.tiles * TILE_ROWS;
  const uint32_t at = shared_address(memory), xs = at + WIDE_WARPS * WIDE_SLOTS * (wide_slot_bytes<L>() + 8) + 64;
  const Runs runs(part.tiles, part.width() / UNIT_COLS);
  PrivateRing<L> ring(at, p, part, runs, warp, lane);
  int item = runs.first(warp), left = runs.first(warp + 1) - item;
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < WIDE_SLOTS; i++) ring.copy_next(i < left, lane);  // weights do not depend on the previous kernel
#endif
  let_next_kernel_start();
  wait_for_previous_kernel();
  load_activations<WIDE_BLOCK>(xs, stride, p.x, p.x_type, p.x_stride, p.batch, p.cols, part.first_col(), part.width(), tid);
  async_commit();
  async_wait<0>();
#if __CUDA_ARCH__ < 900
  for (int i = 0; i < WIDE_SLOTS; i++) ring.copy_next(i < left, lane);
#endif
  __syncthreads();

  uint32_t x_row[NB];
#pragma unroll
  for (int nb = 0; nb < NB; nb++) x_row[nb] = xs + min(8 * nb + g, columns - 1) * stride + t * 16;
  float c[NB][4];
#pragma unroll
  for (int i = 0; i < NB * 4; i++) c[i / 4][i % 4] = 0;
  const size_t plane = (size_t)columns * padded_rows;
  int tile = item / runs.units, u = item - tile * runs.units;
  bool second = u != 0;  // another warp has the tile's first units
  for (; left > 0; left--) {
    const uint32_t slot = ring.base + ring.slot * wide_slot_bytes<L>();
    ring.wait();
    multiply_unit<L, NB>(slot, slot + L::UNIT_BYTES, u % L::UNITS, lane, p.overflow, c, [&](int j, int nb) { return lds128(x_row[nb] + u * UNIT_COLS * 2 + j * 64); });
    __syncwarp();
    ring.copy_next(left > WIDE_SLOTS, lane);
    ring.next();
    if (++u < runs.units && left > 1) continue;
    float* to = p.partial + (2 * part.slab + second) * plane + (size_t)(part.tile0 + tile) * TILE_ROWS + g;
#pragma unroll
    for (int nb = 0; nb < NB; nb++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = 8 * nb + 2 * t + (i & 1);
        if (column < columns) to[(size_t)column * padded_rows + 8 * (i >> 1)] = c[nb][i];
        c[nb][i] = 0;
      }
    u = 0, tile++, second = false;
  }

  // All slabs of the group meet, then each block adds up its share of the tiles.
  __threadfence();
  __syncthreads();
  if (p.slabs > 1) {
    if (tid == 0) {
      atomicAdd(p.arrived + part.group, 1u);
      while (*(volatile uint32_t*)(p.arrived + part.group) < (uint32_t)p.slabs) __nanosleep(20);
      __threadfence();
      if (atomicAdd(p.arrived + p.groups + part.group, 1u) == (uint32_t)p.slabs - 1) p.arrived[part.group] = p.arrived[p.groups + part.group] = 0;
    }
    __syncthreads();
  }
  const int tile_first = part.tiles * part.slab / p.slabs, tile_last = part.tiles * (part.slab + 1) / p.slabs;
  // Which tiles have a second plane; the rings are idle now, so their memory holds the answers.
  for (int i = tid; i < (tile_last - tile_first) * p.slabs; i += WIDE_BLOCK) {
    const int s = i % p.slabs, from = part.shape.stages * s / p.slabs, to = part.shape.stages * (s + 1) / p.slabs;
    const int units = min(to * L::UNITS, part.shape.units) - from * L::UNITS;
    memory[i] = Runs(part.tiles, units).shared(tile_first + i / p.slabs);
  }
  __syncthreads();
  for (int i = tid; i < (tile_last - tile_first) * p.batch * TILE_ROWS; i += WIDE_BLOCK) {
    const int k = i / (p.batch * TILE_ROWS), in = i - k * p.batch * TILE_ROWS, m = in / TILE_ROWS;
    const int row = (part.tile0 + tile_first + k) * TILE_ROWS + in % TILE_ROWS;
    float sum = 0;
    for (int s = 0; s < p.slabs; s++)
      for (int q = 0; q < parts; q++) {
        const float* from = p.partial + 2 * s * plane + (size_t)(m * parts + q) * padded_rows + row;
        sum += __ldcg(from);
        if (memory[k * p.slabs + s]) sum += __ldcg(from + plane);
      }
    finish(p, row, m, sum);
  }
}

}  // namespace taper

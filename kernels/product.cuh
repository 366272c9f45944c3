// y (batch x rows) = x (batch x cols) W^T (+ bias): decode in registers, multiply on tensor cores. Up to 16 columns of activations.
//
// Work split   one block per SM takes a run of whole tiles (16 rows) and one of `slabs` slabs of the columns, cut at stages.
// Warps        8 consumers, warp w takes unit w of every stage; 1 producer that keeps a ring of stages filled (sm_90: one bulk copy a
//              stage and mbarriers; before: each consumer copies its own units with cp.async and the producer idles).
// Budget       per weight at 12 bits and 4.5 TB/s: 9 thread-instructions. Spent, by layout: see the layout's file.
// In flight    3 stages of 24 KB; more is slower (the copies of an SM share its bandwidth, so all of them arrive late).
// Order        Every sum has one order: units of a warp by column, then warps, then slabs. The result is the same from run to run.
// Non-finite   Products are those of the exact weights, so infinities and NaN come out as in the exact product.
//
// Launch       grid  groups * slabs      block 288      dynamic shared memory  product_shared_bytes(..)
//              groups = min(tiles, SMs / slabs); slabs: the fewest whose shared memory fits, more while tiles * slabs <= SMs / 2
//              and slabs < stages. partial: slabs * batch * tiles * 16 floats (slabs > 1). arrived: `groups` zeroed words (slabs > 1), zero
//              again when the kernel ends. batch * parts <= 8 (narrow_1) or 16 (narrow_2), parts = 1 bf16, 2 f16, 3 f32 activations.
//              May be launched with programmatic stream serialisation: weights are fetched while the previous kernel still runs, so
//              weights, overflow list and scales must have been complete before the kernel that precedes it in the stream.
#pragma once
#include "activations.cuh"
#include "unit.cuh"

namespace taper {

struct Product {
  const uint8_t* weights;
  const uint32_t* overflow;
  const float* row_scale;  // a factor for each row, or null
  const void* x;
  const void* bias;  // of type y_type, or null
  void* y;
  float* partial;
  uint32_t* arrived;
  int rows, cols, batch;
  int x_stride, y_stride;  // elements between rows of x and of y
  int x_type, y_type;      // Type
  int groups, slabs;
  int slots, in_flight;    // stages in the ring, stages on their way at most
  int keep;                // tiles whose sums wait in shared memory to be added together
};

constexpr int CONSUMERS = 8, CONSUMER_THREADS = 32 * CONSUMERS, BLOCK = CONSUMER_THREADS + 32;
constexpr int MAX_SLOTS = 16, BARRIER_BYTES = 256;

// On compute capability 8 each warp keeps its own copy of the trailer.
template <class L> __host__ __device__ constexpr int slot_bytes() { return ceil_div(L::UNITS * L::UNIT_BYTES + CONSUMERS * L::TRAILER, 128) * 128; }
__host__ __device__ constexpr int activation_stride(int width) { return width * 2 + 64; }  // + 64: rows start in different banks
template <class L> __host__ __device__ constexpr int slab_width(int cols, int slabs) {
  return ceil_div(ceil_div(ceil_div(cols, UNIT_COLS), L::UNITS), slabs) * L::UNITS * UNIT_COLS;
}
__host__ __device__ constexpr int tiles_kept(int columns) { return columns <= 4 ? 8 : 32 / columns; }
__host__ __device__ constexpr int sums_bytes(int keep, int columns) { return keep * columns * CONSUMERS * TILE_ROWS * 4; }
template <class L> __host__ __device__ constexpr int product_shared_bytes(int cols, int slabs, int columns, int slots) {
  return slots * slot_bytes<L>() + BARRIER_BYTES + sums_bytes(tiles_kept(columns), columns) + columns * activation_stride(slab_width<L>(cols, slabs));
}

// What one block works on.
template <class L> struct Part {
  Shape<L> shape;
  int slab, group, tile0, tiles, stage0, stages;
  __device__ explicit Part(const Product& p) : shape(p.rows, p.cols) {
    slab = blockIdx.x / p.groups, group = blockIdx.x - slab * p.groups;
    tile0 = (int)((long long)shape.tiles * group / p.groups), tiles = (int)((long long)shape.tiles * (group + 1) / p.groups) - tile0;
    stage0 = shape.stages * slab / p.slabs, stages = shape.stages * (slab + 1) / p.slabs - stage0;
  }
  __device__ int first_col() const { return stage0 * L::UNITS * UNIT_COLS; }
  __device__ int width() const { return min(stages * L::UNITS, shape.units - stage0 * L::UNITS) * UNIT_COLS; }
};

// ---- the ring of stages ----
#if __CUDA_ARCH__ >= 900
template <class L> struct Ring {
  uint32_t base, full, empty, slot = 0, phase = 0;
  int slots;
  __device__ Ring(const Product& p, uint32_t base_, uint32_t bars) : base(base_), full(bars), empty(bars + 8 * MAX_SLOTS), slots(p.slots) {}
  __device__ void init(int tid) {
    if (tid == 0) {
      for (int s = 0; s < slots; s++) mbarrier_init(full + 8 * s, 1), mbarrier_init(empty + 8 * s, CONSUMERS);
      mbarrier_init_fence();
    }
  }
  __device__ void next() {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
  // One thread copies all stages of the block, at most p.in_flight of them on their way.
  __device__ void produce(const Product& p, const Part<L>& part) {
    const uint64_t policy = evict_first_policy();
    uint32_t landed = 0, landed_phase = 0;
    int ahead = 0;
    for (int tile = 0; tile < part.tiles; tile++) {
      const uint8_t* src = p.weights + (part.tile0 + tile) * part.shape.tile_bytes() + part.stage0 * Shape<L>::stage_bytes();
      for (int s = 0; s < part.stages; s++, src += Shape<L>::stage_bytes()) {
        if (ahead++ >= p.in_flight) {
          mbarrier_wait(full + 8 * landed, landed_phase);
          if (++landed == slots) landed = 0, landed_phase ^= 1;
        }
        mbarrier_wait(empty + 8 * slot, phase ^ 1);
        const uint32_t bytes = part.shape.units_of(part.stage0 + s) * L::UNIT_BYTES + L::TRAILER;
        mbarrier_expect(full + 8 * slot, bytes);
        bulk_copy(base + slot * slot_bytes<L>(), src, bytes, full + 8 * slot, policy);
        next();
      }
    }
  }
  __device__ void start(const Product&, const Part<L>&, int, int) {}
  __device__ void wait() { mbarrier_wait(full + 8 * slot, phase); }
  __device__ void done(const Product&, const Part<L>&, int, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + 8 * slot);
    next();
  }
  __device__ uint32_t unit(int, int u) const { return base + slot * slot_bytes<L>() + u * L::UNIT_BYTES; }
  __device__ uint32_t trailer(int, int units) const { return base + slot * slot_bytes<L>() + units * L::UNIT_BYTES; }
};
#else
template <class L> struct Ring {  // three slots; each warp copies and waits for its own units only
  uint32_t base, slot = 0;
  int tile = 0, stage = 0, fill = 0;
  __device__ Ring(const Product&, uint32_t base_, uint32_t) : base(base_) {}
  __device__ void init(int) {}
  __device__ void produce(const Product&, const Part<L>&) {}
  __device__ void copy_next(const Product& p, const Part<L>& part, int warp, int lane) {
    if (tile < part.tiles) {
      const int units = part.shape.units_of(part.stage0 + stage);
      const uint8_t* src = p.weights + (part.tile0 + tile) * part.shape.tile_bytes() + (part.stage0 + stage) * Shape<L>::stage_bytes();
      const uint32_t to = base + fill * slot_bytes<L>();
      for (int u = warp; u < units; u += CONSUMERS)
        for (int i = lane; i < L::UNIT_BYTES / 16; i += 32) async_copy16(to + u * L::UNIT_BYTES + 16 * i, src + u * L::UNIT_BYTES + 16 * i);
      for (int i = lane; i < L::TRAILER / 16; i += 32)
        async_copy16(to + L::UNITS * L::UNIT_BYTES + warp * L::TRAILER + 16 * i, src + units * L::UNIT_BYTES + 16 * i);
      if (++stage == part.stages) stage = 0, tile++;
      fill = fill == 2 ? 0 : fill + 1;
    }
    async_commit();  // also when nothing is left: the waits count groups
  }
  __device__ void start(const Product& p, const Part<L>& part, int warp, int lane) { copy_next(p, part, warp, lane), copy_next(p, part, warp, lane); }
  __device__ void wait() { async_wait<1>(), __syncwarp(); }
  __device__ void done(const Product& p, const Part<L>& part, int warp, int lane) {
    __syncwarp();
    copy_next(p, part, warp, lane);
    slot = slot == 2 ? 0 : slot + 1;
  }
  __device__ uint32_t unit(int, int u) const { return base + slot * slot_bytes<L>() + u * L::UNIT_BYTES; }
  __device__ uint32_t trailer(int warp, int) const { return base + slot * slot_bytes<L>() + L::UNITS * L::UNIT_BYTES + warp * L::TRAILER; }
};
#endif

// c += unit * activations; x(j, nb) is the B fragment of vector j and columns 8 nb to 8 nb + 7. Two sums for each element (the two halves of
// a vector) keep two chains of products going where one row of activations has no other.
template <class L, int NB, class X>
__device__ __forceinline__ void multiply_unit(uint32_t at, uint32_t trailer, int u, int lane, const uint32_t* overflow, float (&c0)[NB][4], float (&c1)[NB][4], X x) {
  const auto products = [&](float (&d0)[NB][4], float (&d1)[NB][4]) {
    decode_unit<L>(at, trailer, u, lane, overflow, [&](int j, const uint32_t (&a)[8]) {
#pragma unroll
      for (int nb = 0; nb < NB; nb++) {
        const uint4 b = x(j, nb);
        mma(d0[nb], a[0], a[1], a[2], a[3], b.x, b.y);
        mma(d1[nb], a[4], a[5], a[6], a[7], b.z, b.w);
      }
    });
  };
  if constexpr (L::SCALED) {
    const float scale = L::unit_scale(trailer, u);
    float d0[NB][4] = {}, d1[NB][4] = {};
    products(d0, d1);
#pragma unroll
    for (int i = 0; i < NB * 4; i++) c0[i / 4][i % 4] += scale * (d0[i / 4][i % 4] + d1[i / 4][i % 4]);
  } else products(c0, c1);
}
// The same with one sum for each element, for products with many columns.
template <class L, int NB, class X>
__device__ __forceinline__ void multiply_unit(uint32_t at, uint32_t trailer, int u, int lane, const uint32_t* overflow, float (&c)[NB][4], X x) {
  const auto products = [&](float (&d)[NB][4]) {
    decode_unit<L>(at, trailer, u, lane, overflow, [&](int j, const uint32_t (&a)[8]) {
      uint4 b[NB];
#pragma unroll
      for (int nb = 0; nb < NB; nb++) b[nb] = x(j, nb);
#pragma unroll
      for (int nb = 0; nb < NB; nb++) mma(d[nb], a[0], a[1], a[2], a[3], b[nb].x, b[nb].y);
#pragma unroll
      for (int nb = 0; nb < NB; nb++) mma(d[nb], a[4], a[5], a[6], a[7], b[nb].z, b[nb].w);
    });
  };
  if constexpr (L::SCALED) {
    const float scale = L::unit_scale(trailer, u);
    float d[NB][4] = {};
    products(d);
#pragma unroll
    for (int i = 0; i < NB * 4; i++) c[i / 4][i % 4] += scale * d[i / 4][i % 4];
  } else products(c);
}

// The last step of every product: scale, bias, rounding.
__device__ __forceinline__ void finish(const Product& p, int row, int m, float v) {
  if (row >= p.rows) return;
  if (p.row_scale) v *= p.row_scale[row];
  if (p.bias) v += load_value(p.bias, row, p.y_type);
  store_value(p.y, (size_t)m * p.y_stride + row, p.y_type, v);
}

// A block hands on its sum for (row, m), `row` counted from tile 0: to y, or to the slab's plane of partial sums.
__device__ __forceinline__ void hand_on(const Product& p, int padded_rows, int slab, int row, int m, float v) {
  if (p.slabs == 1) finish(p, row, m, v);
  else p.partial[((size_t)slab * p.batch + m) * padded_rows + row] = v;
}

// Adds `terms` planes of partial sums, in their order, for `tiles` tiles from tile0, and finishes the outputs. plane(term, tile, m) is where
// the term's rows for m start, null where the tile has no such term. Loads go out eight at a time: each takes 600 cycles.
template <int THREADS, class Plane> __device__ __forceinline__ void add_planes(const Product& p, int tile0, int tiles, int terms, int tid, Plane plane) {
  const int quads = TILE_ROWS / 4;
  for (int i = tid; i < tiles * p.batch * quads; i += THREADS) {
    const int k = i / (p.batch * quads), in = i - k * p.batch * quads, m = in / quads, row = (tile0 + k) * TILE_ROWS + in % quads * 4;
    float sum[4] = {0, 0, 0, 0};
    for (int first = 0; first < terms; first += 8) {
      float4 v[8];
#pragma unroll
      for (int d = 0; d < 8; d++) {
        const float* from = first + d < terms ? plane(first + d, k, m) : nullptr;
        v[d] = from ? __ldcg((const float4*)(from + row)) : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int d = 0; d < 8; d++) sum[0] += v[d].x, sum[1] += v[d].y, sum[2] += v[d].z, sum[3] += v[d].w;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) finish(p, row + e, m, sum[e]);
  }
}

// The last block of a group adds the slabs, in their order. `scratch` is any word of shared memory.
__device__ __forceinline__ void add_slabs(const Product& p, int group, int tile0, int tiles, int padded_rows, uint32_t scratch, int tid) {
  if (p.slabs == 1) return;

  __threadfence();
  bar_sync<1, CONSUMER_THREADS>();
  if (tid == 0) {
    const uint32_t before = atomicAdd(p.arrived + group, 1);
    if (before == (uint32_t)p.slabs - 1) p.arrived[group] = 0;
    sts32(scratch, before);
  }
  bar_sync<1, CONSUMER_THREADS>();
  if (lds32(scratch) != (uint32_t)p.slabs - 1) return;
  __threadfence();
  add_planes<CONSUMER_THREADS>(p, tile0, tiles, p.slabs, tid, [&](int slab, int, int m) { return p.partial + ((size_t)slab * p.batch + m) * padded_rows; });
}

template <class L, int NB> __device__ __forceinline__ void narrow_product(const Product& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const Part<L> part(p);
  const int columns = p.batch * (p.x_type + 1);
  const uint32_t ring_at = shared_address(memory), bars = ring_at + p.slots * slot_bytes<L>(), sums = bars + BARRIER_BYTES, xs = sums + sums_bytes(p.keep, columns);
  const int stride = activation_stride(slab_width<L>(p.cols, p.slabs)), padded_rows = part.shape.tiles * TILE_ROWS;
  Ring<L> ring(p, ring_at, bars);
  ring.init(tid - CONSUMER_THREADS);
  __syncthreads();
  if (warp == CONSUMERS) {
    if (lane == 0) ring.produce(p, part);
    return;
  }
  let_next_kernel_start();
  wait_for_previous_kernel();  // everything below may touch what the previous kernel wrote, or reads
  load_activations<CONSUMER_THREADS>(xs, stride, p.x, p.x_type, p.x_stride, p.batch, p.cols, part.first_col(), part.width(), tid);
  async_commit();
  ring.start(p, part, warp, lane);
#if __CUDA_ARCH__ >= 900
  async_wait<0>();
#else
  async_wait<2>();  // the two stages that `start` sent for may still be on their way
#endif
  bar_sync<1, CONSUMER_THREADS>();

  // Columns past the last repeat it: their products are computed and dropped.
  uint32_t x_row[NB];
#pragma unroll
  for (int nb = 0; nb < NB; nb++) x_row[nb] = xs + min(8 * nb + g, columns - 1) * stride + t * 16;
  float c0[NB][4], c1[NB][4];
#pragma unroll
  for (int i = 0; i < NB * 4; i++) c0[i / 4][i % 4] = c1[i / 4][i % 4] = 0;

  for (int tile = 0, kept = 0; tile < part.tiles; tile++) {
    for (int s = 0; s < part.stages; s++) {
      const int units = part.shape.units_of(part.stage0 + s);
      uint4 x[4];
      uint32_t at = (s * L::UNITS + warp) * (UNIT_COLS * 2);
      if (NB == 1 && warp < units) {  // before the wait: these are here already
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = lds128(x_row[0] + at + j * 64);
      }
      ring.wait();
      for (int u = warp; u < units; u += CONSUMERS, at += CONSUMERS * UNIT_COLS * 2) {
        if (L::UNITS > CONSUMERS && NB == 1 && u != warp) {
#pragma unroll
          for (int j = 0; j < 4; j++) x[j] = lds128(x_row[0] + at + j * 64);
        }
        multiply_unit<L, NB>(ring.unit(warp, u), ring.trailer(warp, units), u, lane, p.overflow, c0, c1,
                             [&](int j, int nb) { return NB == 1 ? x[j] : lds128(x_row[nb] + at + j * 64); });
      }
      ring.done(p, part, warp, lane);
    }
    // sums[kept][warp][column][row]
    const uint32_t mine = sums + (kept * CONSUMERS + warp) * columns * TILE_ROWS * 4;
#pragma unroll
    for (int nb = 0; nb < NB; nb++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = 8 * nb + 2 * t + (i & 1);
        if (column < columns) sts_float(mine + (column * TILE_ROWS + g + 8 * (i >> 1)) * 4, c0[nb][i] + c1[nb][i]);
        c0[nb][i] = c1[nb][i] = 0;
      }
    if (++kept < p.keep && tile + 1 < part.tiles) continue;
    bar_sync<1, CONSUMER_THREADS>();
    const int parts = p.x_type + 1, first = part.tile0 + tile + 1 - kept;
    for (int i = tid; i < kept * p.batch * TILE_ROWS; i += CONSUMER_THREADS) {
      const int row = i & (TILE_ROWS - 1), m = i / TILE_ROWS % p.batch, k = i / TILE_ROWS / p.batch;
      float sum = 0;
      for (int s = 0; s < parts; s++)
#pragma unroll
        for (int w = 0; w < CONSUMERS; w++) sum += lds_float(sums + (((k * CONSUMERS + w) * columns + m * parts + s) * TILE_ROWS + row) * 4);
      hand_on(p, padded_rows, part.slab, (first + k) * TILE_ROWS + row, m, sum);
    }
    kept = 0;
    if (tile + 1 < part.tiles) bar_sync<1, CONSUMER_THREADS>();
  }
  add_slabs(p, part.group, part.tile0, part.tiles, padded_rows, sums, tid);
}

}  // namespace taper

// BF16 matrices at rest: decoded to memory, and y = x W^T without a decoded weight in memory, on tensor cores.
//
// How bands are decoded: rans_band.cuh. A block stays on its multiprocessor; each of its warps takes every so many-th
// part of a band.
//
// Product. All lanes hold weights of the same row, so the tensor cores are given eight eights of its columns as if they
// were eight rows: lane l's pair of columns is row l / 4 of A, and with the activations of the same columns as column l
// / 4 of B the diagonal of the product holds what belongs together. Seven eighths of the work are for nothing, and
// still it is one instruction for 256 weights. Two rows of the band are the halves of A. A part's sums go to `partial`;
// the last part of a row of them adds them, in the order of the columns: the same result from run to run.
//
// Of every kernel there are four: without levels or with them, for tiles that are all 256 columns wide or with a last
// one that is _narrow.
//
// Launch   grid at most the multiprocessors, block at most RANS_THREADS, dynamic shared memory RANS_TABLES + a warp's
//          RANS_RING_BYTES + 512 * columns; columns: batch * parts <= 1, or <= 8 for _8. Parts of an
//          activation: 1 for bf16, 2 for f16, 3 for f32. Without _8 x must be 4-byte aligned. partial: tile columns *
//          batch * rows floats; arrived: a zeroed word for each row of parts, zero at the end. Products may be launched
//          with programmatic stream serialisation: only the stream is read before the wait.
#include "parts.cuh"
#include "rans_band.cuh"

namespace {

using namespace taper;

struct RansBlock {
  Bytes stream;
  RansTable table;
  uint32_t ring, warps, warp;
  uint8_t* rest;  // behind the rings

  __device__ RansBlock(const uint8_t* bytes, const Plan& plan, uint8_t* memory)
      : stream{bytes, plan.total},
        table(memory),
        ring(kept(shared_address(memory) + RANS_TABLES + threadIdx.x / 32 * RANS_RING_BYTES)),
        warps(blockDim.x / 32),
        warp(threadIdx.x / 32),
        rest(memory + RANS_TABLES + warps * RANS_RING_BYTES) {}
};

struct Nothing {
  __device__ __forceinline__ void operator()(uint32_t, uint32_t, const RansRings&, uint32_t) const {}
};

// Part `line` from the top of tile column `col`, which is in the matrix. WHOLE: all tiles are 256 columns wide.
template <bool LEVELS, bool WHOLE, class Sink>
__device__ __forceinline__ void take_part(const Plan& plan, const RansBlock& block, const RansIndex& index,
                                          uint32_t line, uint32_t col, Sink& sink, uint32_t* status) {
  const uint32_t band_row = line / index.parts, part = line % index.parts, top = line * index.rows,
                 band = band_row * plan.tile_cols + col;
  const uint4 at = __ldg((const uint4*)index.places + band);
  const RansPlace place = {at.x, at.y, at.z, at.w};
  const RansWork work = {top,
                         min(index.rows, plan.rows - top),
                         band_row,
                         col,
                         part == 0 ? nullptr : index.later + (uint64_t)band * (index.parts - 1) + part - 1,
                         part == index.parts - 1 || top + index.rows >= plan.rows};
  if (WHOLE || rans_width(plan, col) == TILE)
    rans_part<LEVELS, true>(plan, block.stream, place, block.table, block.ring, work, sink, Nothing(), status);
  else
    rans_part<LEVELS, false>(plan, block.stream, place, block.table, block.ring, work, sink, Nothing(), status);
}

struct Nowhere {
  __device__ __forceinline__ void meanwhile(uint32_t, uint32_t, bool) {}
  __device__ __forceinline__ void operator()(uint32_t, const RansRows&, bool) {}
  __device__ __forceinline__ void end(uint32_t) {}
};

// Makes the index.
__device__ __forceinline__ void make_index(const uint8_t* bytes, const Plan& plan, const RansIndex& index,
                                           uint32_t* status) {
  extern __shared__ __align__(128) uint8_t memory[];
  const RansBlock block(bytes, plan, memory);
  RansTable::make(plan, block.stream, memory);
  if (blockIdx.x == 0) {
    const uint32_t* const table = (const uint32_t*)memory;
    for (uint32_t i = threadIdx.x; i < SLOTS + 256; i += blockDim.x)
      index.table[i] = table[i < SLOTS ? i : SLOTS + (i - SLOTS) * LANES];
  }
  const uint32_t lane = stream_lane(), bands = (plan.rows + BAND_ROWS - 1) / BAND_ROWS * plan.tile_cols;
  for (uint32_t i = block.warp * gridDim.x + blockIdx.x; i < bands; i += gridDim.x * block.warps) {
    const uint32_t band_row = i / plan.tile_cols, col = i % plan.tile_cols, top = band_row * BAND_ROWS;
    const RansPlace place = rans_place(plan, block.stream, band_row / 4 * plan.tile_cols + col, band_row / 4,
                                       band_row % 4, rans_width(plan, col));
    if (lane == 0) index.places[i] = place;
    RansPart* const later = index.later + (uint64_t)i * (index.parts - 1);
    const auto before = [&](uint32_t row, uint32_t state, const RansRings& rings, uint32_t escapes) {
      if (row == 0 || row % index.rows != 0) return;
      RansPart& part = later[row / index.rows - 1];
      part.states[lane] = state;
      if (lane == 0) part.words = rings.taken(place.word_bytes) / 2, part.escapes = escapes;
    };
    const RansWork work = {top, min(BAND_ROWS, plan.rows - top), band_row, col, nullptr, true};
    Nowhere nowhere;
    rans_part<false, false>(plan, block.stream, place, block.table, block.ring, work, nowhere, before, status);
  }
}

// `count` rows of a matrix from row `from` on to `out`.
struct RansToMemory {
  uint8_t* out;                              // of row `from`, this lane's columns
  uint32_t stride, top, from, count, steps;  // `steps`: of a row

  __device__ __forceinline__ void meanwhile(uint32_t, uint32_t, bool) {}
  __device__ __forceinline__ void end(uint32_t) {}
  __device__ __forceinline__ void operator()(uint32_t row, const RansRows& weights, bool two) const {
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
      const uint32_t at = top + row + r - from;
      if ((r == 1 && !two) || at >= count) continue;
      uint32_t* const line = (uint32_t*)(out + (uint64_t)at * stride);
#pragma unroll
      for (uint32_t s = 0; s < RANS_STEPS; s++)
        if (s < steps) line[32 * s] = weights[r][s];
    }
  }
};

template <bool LEVELS, bool WHOLE>
__device__ __forceinline__ void decode(const uint8_t* bytes, const Plan& plan, const RansIndex& index, uint32_t first,
                                       uint32_t rows, uint8_t* out, uint64_t stride, uint32_t* status) {
  extern __shared__ __align__(128) uint8_t memory[];
  const RansBlock block(bytes, plan, memory);
  RansTable::fetch(index, memory);
  const uint32_t top = first / index.rows, across = plan.tile_cols,
                 parts = ((first + rows - 1) / index.rows - top + 1) * across;
  RansTable::wait();
  for (uint32_t i = block.warp * gridDim.x + blockIdx.x; i < parts; i += gridDim.x * block.warps) {
    const uint32_t line = top + i / across, col = i % across;
    RansToMemory sink = {
        out + col * TILE * 2 + stream_lane() * 4,       (uint32_t)stride, line * index.rows, first, rows,
        WHOLE ? RANS_STEPS : rans_width(plan, col) / 64};
    take_part<LEVELS, WHOLE>(plan, block, index, line, col, sink, status);
  }
}

// Multiplies a part's rows with the activations of its columns. SINGLE: one column of them, in registers.
template <bool SINGLE>
struct RansMultiply {
  uint32_t x[RANS_STEPS];
  uint32_t room;   // shared: 512 bytes of the warp for each column of activations; SINGLE: for sums of sixteen rows
  uint32_t place;  // SINGLE: where this lane's part of the diagonal goes, or 0
  uint32_t batch, parts, plane;
  float* sums;     // of the part's first row; otherwise of the lane's first row of W and of activations
  uint32_t limit;  // rows of the part; otherwise the lane stores sums of pairs of rows before that one

  // The diagonal is in lanes 0, 9, 18, 27 (even columns) and 4, 13, 22, 31 (odd ones). Without SINGLE each has the sum
  // of one row of W with one of x in the end.
  static __device__ __forceinline__ bool odd() { return threadIdx.x >> 2 & 1; }
  static __device__ __forceinline__ bool on_diagonal() { return threadIdx.x % 4 == threadIdx.x % 32 / 8; }
  static __device__ __forceinline__ uint32_t of_batch() { return (threadIdx.x >> 2 & 2) | (threadIdx.x >> 4 & 1); }

  // A lane's sums of a row of W, then of the next, with one row of activations: those of four lanes are to be added.
  __device__ __forceinline__ float diagonal(const float (&c)[4]) const {
    return (odd() ? c[3] : c[0]) + __shfl_xor_sync(ALL, odd() ? c[1] : c[2], 4);
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const RansRows& w, uint4 x) {
    mma(c, w[0][0], w[1][0], w[0][1], w[1][1], x.x, x.y);
    mma(c, w[0][2], w[1][2], w[0][3], w[1][3], x.z, x.w);
  }

  // SINGLE: two rows' diagonals are put away while the next two rows are decoded, and added up once for sixteen rows.
  float c[4] = {0, 0, 0, 0};
  __device__ __forceinline__ void meanwhile(uint32_t step, uint32_t row, const bool first) {
    if (!SINGLE) return;
    // At row 0 there is nothing yet: what is put away is overwritten, and no row is before the first.
    if (step == 0) put_away(row - 2);
    if (step == 3 && first && row % 16 == 0) add_up(row - 16);
  }
  __device__ __forceinline__ void put_away(uint32_t row) const {
    if (place) sts64(place + row % 16 * 32, __float_as_uint(odd() ? c[1] : c[0]), __float_as_uint(odd() ? c[3] : c[2]));
  }
  __device__ __forceinline__ void add_up(uint32_t before) const {
    __syncwarp();
    const uint32_t lane = lane_again(), row = before + lane / 4 * 2 + lane % 2;
    const uint4 v = lds128(room + 16 * lane);  // two of the eight values of two rows
    const float one = __uint_as_float(v.x) + __uint_as_float(v.z), other = __uint_as_float(v.y) + __uint_as_float(v.w);
    float sum = (lane % 2 ? other : one) + __shfl_xor_sync(ALL, lane % 2 ? one : other, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    if (lane % 4 < 2 && row < limit) sums[row] = sum;
    __syncwarp();
  }
  __device__ __forceinline__ void end(uint32_t rows) const {
    if (!SINGLE) return;
    const uint32_t last = (rows - 1) / 2 * 2;
    put_away(last), add_up(last / 16 * 16);
  }

  __device__ __forceinline__ void operator()(uint32_t row, const RansRows& w, bool) {
    if (SINGLE) {
      c[0] = c[1] = c[2] = c[3] = 0;
      multiply(c, w, make_uint4(x[0], x[1], x[2], x[3]));
      return;
    }
    const bool high = of_batch() & 2, low = of_batch() & 1;
#pragma unroll 1
    for (uint32_t m = 0; m < batch; m += 4) {  // rows past the last repeat it
      float v[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; i++) {
        float c[4] = {0, 0, 0, 0};
        const uint32_t at = room + threadIdx.x % 32 * 16 + min(m + i, batch - 1) * parts * 512;
        multiply(c, w, lds128(at));
        for (uint32_t part = 1; part < parts; part++) multiply(c, w, lds128(at + part * 512));
        v[i] = diagonal(c);
      }
      const float first = (high ? v[2] : v[0]) + __shfl_xor_sync(ALL, high ? v[0] : v[2], 9);
      const float second = (high ? v[3] : v[1]) + __shfl_xor_sync(ALL, high ? v[1] : v[3], 9);
      const float sum = (low ? second : first) + __shfl_xor_sync(ALL, low ? first : second, 18);
      if (row < limit && m + of_batch() < batch) sums[(uint64_t)m * plane + row] = sum;
    }
  }
};

// Those of a column of tiles; zeros where it lacks some.
template <bool WHOLE, bool SINGLE>
__device__ __forceinline__ void fetch_activations(const Plan& plan, const Activations& a, uint32_t col,
                                                  RansMultiply<SINGLE>& sink) {
  const uint32_t lane = stream_lane(), room = sink.room + threadIdx.x % 32 * 16, parts = a.dtype,
                 steps = WHOLE ? RANS_STEPS : rans_width(plan, col) / 64;
  if constexpr (SINGLE) {
#pragma unroll
    for (uint32_t s = 0; s < RANS_STEPS; s++)
      sink.x[s] = s < steps ? ((const uint32_t*)a.x)[col * TILE / 2 + 32 * s + lane] : 0;
  } else if (parts == 1) {
    const uint16_t* x = (const uint16_t*)a.x + col * TILE + 2 * lane;
    for (uint32_t m = 0; m < a.batch; m++, x += plan.cols)
#pragma unroll
      for (uint32_t s = 0; s < RANS_STEPS; s++)
        sts32(room + m * 512 + 4 * s, s < steps ? x[64 * s] | x[64 * s + 1] << 16 : 0);
    __syncwarp();
  } else {
#pragma unroll 1
    for (uint32_t i = 0; i < a.batch * RANS_STEPS; i++) {
      const uint32_t m = i / RANS_STEPS, s = i % RANS_STEPS;
      const uint64_t at = (uint64_t)m * plan.cols + col * TILE + 64 * s + 2 * lane;
      uint32_t one[3], other[3];
      split(s < steps ? load_value(a.x, at, a.dtype) : 0, parts, one);
      split(s < steps ? load_value(a.x, at + 1, a.dtype) : 0, parts, other);
#pragma unroll
      for (uint32_t part = 0; part < 3; part++)
        if (part < parts) sts32(room + (m * parts + part) * 512 + 4 * s, __byte_perm(one[part], other[part], 0x7632));
    }
    __syncwarp();
  }
}

// Counts a warp that has stored its sums, and orders what others have stored before what is read next.
__device__ __forceinline__ uint32_t add_release(uint32_t* count) {
  uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before;
}
__device__ __forceinline__ void fence_acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

template <bool LEVELS, bool WHOLE, bool SINGLE>
__device__ __forceinline__ void product(const uint8_t* bytes, const Plan& plan, const RansIndex& index,
                                        const Activations& a, uint32_t* status) {
  extern __shared__ __align__(128) uint8_t memory[];
  const RansBlock block(bytes, plan, memory);
  RansTable::fetch(index, memory);
  let_next_kernel_start();
  const uint32_t lane = threadIdx.x % 32, across = plan.tile_cols, down = (plan.rows + index.rows - 1) / index.rows,
                 parts = a.dtype, columns = a.batch * parts;
  RansMultiply<SINGLE> sink;
  sink.room = kept(shared_address(block.rest) + block.warp * columns * 512);
  sink.place = kept(sink.on_diagonal() ? sink.room + lane / 4 * 8 : 0);
  sink.batch = a.batch, sink.parts = parts, sink.plane = plan.rows;
  RansTable::wait();
  wait_for_previous_kernel();
  for (uint32_t i = block.warp * gridDim.x + blockIdx.x; i < across * down; i += gridDim.x * block.warps) {
    const uint32_t line = i / across, col = i % across, top = line * index.rows;
    fetch_activations<WHOLE>(plan, a, col, sink);
    if (SINGLE) {
      sink.sums = a.partial + (uint64_t)col * plan.rows + top;
      sink.limit = kept(min(index.rows, plan.rows - top));
    } else {
      sink.sums = a.partial + ((uint64_t)col * a.batch + sink.of_batch()) * plan.rows + top + sink.odd();
      sink.limit = lane % 9 == 0 || lane % 9 == 4 ? min(index.rows, plan.rows - top) - sink.odd() : 0;
    }
    asm volatile("" : "+l"(sink.sums));
    take_part<LEVELS, WHOLE>(plan, block, index, line, col, sink, status);

    __syncwarp();
    uint32_t before = lane == 0 ? add_release(a.arrived + line) : 0;
    before = __shfl_sync(ALL, before, 0);
    if (before != across - 1) continue;
    if (lane == 0) a.arrived[line] = 0;
    fence_acquire();
    constexpr uint32_t DEEP = 32;  // loads in flight
    const uint32_t end = min(top + index.rows, plan.rows);
    for (uint32_t m = 0; m < a.batch; m++) {
      for (uint32_t row = top + lane; row < end; row += 32) {
        float sum = 0;
        for (uint32_t c = 0; c < across; c += DEEP) {
          float v[DEEP];
#pragma unroll
          for (uint32_t d = 0; d < DEEP; d++)
            v[d] = c + d < across ? __ldcg(a.partial + ((uint64_t)(c + d) * a.batch + m) * plan.rows + row) : 0;
#pragma unroll
          for (uint32_t d = 0; d < DEEP; d++) sum += v[d];
        }
        store_value(a.y, (uint64_t)m * plan.rows + row, a.dtype, sum);
      }
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(RANS_THREADS, 1)
    rans_index(const uint8_t* bytes, const __grid_constant__ Plan plan, const __grid_constant__ RansIndex index,
               uint32_t* status) {
  make_index(bytes, plan, index, status);
}

#define RANS_KERNELS(SUFFIX, LEVELS, WHOLE)                                                             \
  extern "C" __global__ void __launch_bounds__(RANS_THREADS, 1) rans_decode##SUFFIX(                    \
      const uint8_t* bytes, const __grid_constant__ Plan plan, const __grid_constant__ RansIndex index, \
      uint32_t first, uint32_t rows, uint8_t* out, uint64_t stride, uint32_t* status) {                 \
    decode<LEVELS, WHOLE>(bytes, plan, index, first, rows, out, stride, status);                        \
  }                                                                                                     \
  extern "C" __global__ void __launch_bounds__(RANS_THREADS, 1) rans_product_1##SUFFIX(                 \
      const uint8_t* bytes, const __grid_constant__ Plan plan, const __grid_constant__ RansIndex index, \
      const __grid_constant__ Activations a, uint32_t* status) {                                        \
    product<LEVELS, WHOLE, true>(bytes, plan, index, a, status);                                        \
  }                                                                                                     \
  extern "C" __global__ void __launch_bounds__(RANS_THREADS, 1) rans_product_8##SUFFIX(                 \
      const uint8_t* bytes, const __grid_constant__ Plan plan, const __grid_constant__ RansIndex index, \
      const __grid_constant__ Activations a, uint32_t* status) {                                        \
    product<LEVELS, WHOLE, false>(bytes, plan, index, a, status);                                       \
  }
RANS_KERNELS(, false, true)
RANS_KERNELS(_levels, true, true)
RANS_KERNELS(_narrow, false, false)
RANS_KERNELS(_narrow_levels, true, false)

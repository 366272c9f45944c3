// Stages of layout `pair` to dense rows.
//
// A warp decodes a unit, a code after the other; a block of eight shares the table. While it does so, the block's next
// stage is on its way: codes and repairs to shared memory, signs and mantissas to registers.
#pragma once
#include "pair.cuh"

namespace taper {

// A stage in shared memory, as a decoder's warps see it: unit `warp` to one, repairs to all.
struct PairStage {
  uint32_t at, tail, units;
  __device__ PairStage(uint32_t at_, int units_)
      : at(at_), tail(at_ + pair_header_bytes(units_) + units_ * Pair::UNIT_BYTES), units(units_) {}
  // Hands vector j's registers to put(j, a), with exponents of zero for weights that are repaired.
  template <class Put>
  __device__ __forceinline__ void decode(uint32_t table_at, int warp, int lane, Put put) const {
    const uint32_t bytes = at + pair_header_bytes(units) + warp * Pair::UNIT_BYTES;
    const RowShifts shifts(at, lane);
    PairStreams<1> stream;
    stream.start(0, at + STAGE_HEAD + UNIT_HEAD * warp, tail, lane);
#pragma unroll 1
    for (int j = 0; j < 4; j++) {
      const uint4 s = lds128(bytes + 512 * j + 16 * lane);
      uint32_t entry[2][1][4], a[8], half[4];
      stream.next(table_at, lane * 4, entry[0]);
      stream.next(table_at, lane * 4, entry[1]);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        shift_back4(entry[h][0], shifts);
        join4(half, h ? s.z : s.x, h ? s.w : s.y, entry[h][0]);
#pragma unroll
        for (int p = 0; p < 4; p++) a[4 * h + p] = half[p];
      }
      put(j, a);
    }
  }
  // Hands the unit's repairs to put(row in the tile, column in the stage, value), when its weights have been written.
  template <class Put>
  __device__ __forceinline__ void repair(int warp, int lane, Put put) const {
    __syncwarp();
    const int repairs = pair_repairs(at);
    for (int q = lane; q < repairs; q += 32) {
      const uint32_t e = lds32(tail + 4 * q), k = e >> 4 & 1023;
      if ((int)k / UNIT_COLS == warp) put(e & 15, (int)k, repair_value(at, e));
    }
  }
};

// Copies a stage to `at` with all threads of the block.
__device__ __forceinline__ void copy_stage(uint32_t at, const uint8_t* weights, const uint32_t* offset, int tid) {
  const uint32_t from = __ldg(offset), pieces = __ldg(offset + 1) - from;
  const uint64_t policy = evict_first_policy();
  for (uint32_t q = tid; q < pieces; q += 256) async_copy16(at + 16 * q, weights + ((size_t)from + q) * 16, policy);
  async_commit();
}

// A stage on its way: header and tail go to shared memory, signs and mantissas to registers.
struct PairAhead {
  uint32_t first, end;  // 16-byte pieces of the matrix
  __device__ __forceinline__ explicit PairAhead(const uint32_t* offset)
      : first(__ldg(offset)), end(__ldg(offset + 1)) {}
  __device__ __forceinline__ void fetch(const uint8_t* weights, int units, uint32_t slot, int tid,
                                        uint64_t policy) const {
    const int before = pair_header_bytes(units) / 16, between = units * (Pair::UNIT_BYTES / 16),
              pieces = end - first - between;
    const uint8_t* const from = weights + (size_t)first * 16;
    for (int q = tid; q < pieces; q += 256)
      async_copy16(slot + 16 * q, from + (q < before ? q : q + between) * 16, policy);
  }
  __device__ __forceinline__ uint4 bytes(const uint8_t* weights, int units, int warp, int j, int lane,
                                         uint64_t policy) const {
    const uint8_t* const from = weights + (size_t)first * 16 + pair_header_bytes(units) + warp * Pair::UNIT_BYTES;
    return warp < units ? ldg_stream128(from + 512 * j + 16 * lane, policy) : make_uint4(0, 0, 0, 0);
  }
};

// Two vectors' eights of a row in even lanes of g, of the next row in odd ones: stored so that four rows get 128 bytes
// each. `place`: where the lane's eight of the first vector belongs.
__device__ __forceinline__ void store_lines(uint16_t* place, int stride, bool odd, uint4 first, uint4 second) {
  const auto other = [&](uint32_t a, uint32_t b) { return __shfl_xor_sync(~0u, odd ? a : b, 4); };
  const uint4 got = make_uint4(other(first.x, second.x), other(first.y, second.y), other(first.z, second.z),
                               other(first.w, second.w));
  stg128(odd ? place - stride + 32 : place, odd ? got : first);
  stg128(odd ? place + 32 : place + stride, odd ? second : got);
}

// The first `count` of eight weights.
__device__ __forceinline__ void store_some(uint16_t* place, uint4 eight, int count) {
  const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int e = 0; e < 8; e++)
    if (e < count) place[e] = (uint16_t)(pairs[e / 2] >> 16 * (e & 1));
}

// WHOLE: rows and columns are those of whole units, and rows aligned.
template <bool WHOLE>
__device__ __forceinline__ void decode_pairs(const uint8_t* weights, const uint32_t* offsets, const uint32_t* table,
                                             uint16_t* out, int rows, int cols, int stride, int tile0, int stages,
                                             int slot_bytes) {
  extern __shared__ __align__(128) uint8_t memory[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, step = gridDim.x;
  const Shape<Pair> shape(rows, cols);
  const uint32_t table_at = shared_address(memory), slots = table_at + TABLE_BYTES;
  const uint64_t policy = evict_first_policy();
  let_next_kernel_start();
  int i = blockIdx.x;
  if (i >= stages) return;
  const uint32_t* const first_offset = offsets + (size_t)tile0 * shape.stages;
  const auto look = [&](int i) { return PairAhead(first_offset + min(i, stages - 1)); };
  const auto fetch = [&](const PairAhead& stage, int i, int slot, uint4(&bytes)[4]) {
    const int units = shape.units_of((uint32_t)i % (uint32_t)shape.stages);
    stage.fetch(weights, units, slots + slot * slot_bytes, tid, policy);
    async_commit();
#pragma unroll
    for (int j = 0; j < 4; j++) bytes[j] = stage.bytes(weights, units, warp, j, lane, policy);
  };
  uint4 bytes[2][4];
  PairAhead next = look(i + step);
  fetch(look(i), i, 0, bytes[0]);
  Table<256>(table, tid).store(table_at, tid);
  wait_for_previous_kernel();  // which may still be reading what `out` held
  const auto decode = [&](int slot, const uint4(&mine)[4], uint4(&others)[4]) {
    const PairAhead after = look(i + 2 * step);
    if (i + step < stages)
      fetch(next, i + step, slot ^ 1, others), async_wait<1>();
    else
      async_wait<0>();
    __syncthreads();
    const int row = (uint32_t)i / (uint32_t)shape.stages, number = i - row * shape.stages,
              units = shape.units_of(number);
    if (warp < units) {
      const uint32_t at = slots + slot * slot_bytes, tail = at + pair_header_bytes(units);
      const RowShifts shifts(at, lane);
      PairStreams<1> stream;
      stream.start(0, at + STAGE_HEAD + UNIT_HEAD * warp, tail, lane);
      const int unit = number * Pair::UNITS + warp, rows_left = rows - (tile0 + row) * TILE_ROWS - g,
                cols_left = cols - unit * UNIT_COLS - 8 * t;  // from the lane's first weight on
      uint16_t* const to = out + (size_t)row * TILE_ROWS * stride + unit * UNIT_COLS;
      uint16_t* const place = to + (size_t)g * stride + 8 * t;
      uint4 top, bottom;  // eights of rows g and g + 8
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t entry[2][1][4], a[4], b[4];
        stream.next(table_at, lane * 4, entry[0]);
        stream.next(table_at, lane * 4, entry[1]);
        shift_back4(entry[0][0], shifts), shift_back4(entry[1][0], shifts);
        join4(a, mine[j].x, mine[j].y, entry[0][0]);
        join4(b, mine[j].z, mine[j].w, entry[1][0]);
        const uint4 v = make_uint4(a[0], a[2], b[0], b[2]), w = make_uint4(a[1], a[3], b[1], b[3]);
        if (!WHOLE) {
          if (rows_left > 0) store_some(place + 32 * j, v, cols_left - 32 * j);
          if (rows_left > 8) store_some(place + 32 * j + (size_t)8 * stride, w, cols_left - 32 * j);
        } else if (j % 2 == 0) {
          top = v, bottom = w;
        } else {
          store_lines(place + 32 * (j - 1), stride, g & 1, top, v);
          store_lines(place + 32 * (j - 1) + (size_t)8 * stride, stride, g & 1, bottom, w);
        }
      }
      __syncwarp();
      const int repairs = pair_repairs(at);
      for (int q = lane; q < repairs; q += 32) {
        const uint32_t e = lds32(tail + 4 * q), k = e >> 4 & 1023;
        if ((int)k / UNIT_COLS == warp) to[(size_t)(e & 15) * stride + k % UNIT_COLS] = repair_value(at, e);
      }
    }
    __syncthreads();
    next = after, i += step;
  };
  while (true) {
    decode(0, bytes[0], bytes[1]);
    if (i >= stages) break;
    decode(1, bytes[1], bytes[0]);
    if (i >= stages) break;
  }
}

}  // namespace taper

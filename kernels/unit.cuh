// Where a weight lies in the layouts that multiply, and the exact repair of weights that a layout's codes cannot
// express.
//
//   tile    16 rows of the matrix, all columns
//   unit    16 rows x 128 columns = 2048 weights, the work of one warp at a time
//   stage   up to L::UNITS neighbouring units of one tile, then a trailer: one asynchronous copy
//
// The stages of a tile follow one another, and the tiles. Rows and columns are padded to whole units with weights that
// decode to a finite number: padded columns meet activations that are zero, the products of padded rows are dropped.
//
// A unit is four vectors of 32 columns. In vector j lane 4g+t holds 16 weights: rows g (h=0) and g+8 (h=1), columns
// 32j+8t+kk, kk=0..7. Register p = 2*(kk/2)+h holds the two weights kk = 2*(p/2), +1, the lower column in the low half.
// So registers 0..3 and 4..7 are the A fragments of two m16n8k16 products whose K indices are permuted: the B fragments
// of both are the 16 bytes at column 32j+8t of a row of activations, one shared load without any shuffling.
//
// Signs and mantissas of bf16 weights are 2048 bytes: word 128 j + 4 lane + i has those of registers 2 i (bits 0 to 6 and
// 16 to 22; signs 15 and 31, their place in bf16) and 2 i + 1 (all bits 8 on, cyclic in 16).
//
//   trailer  u32 overflow count, u32 overflow offset, L::EXTRA bytes of the layout, ENTRIES u32 repairs
//   repair   value as bf16 << 16 | 1 << 15 | unit in the stage << 11 | slot, or 0 for none
//   slot     512 j + 256 (p/4) + 8 lane + 2 (p%4) + half
//
// A stage with more repairs than its trailer has room for keeps all of them in the matrix's overflow list instead. A
// warp that finds a repair for its unit writes the decoded registers to shared memory (over the unit, which it has read
// by then), lets each lane patch one weight, and reads the registers back: 40 instructions, however many repairs. No
// warp without repairs pays more than a look.
#pragma once
#include "ptx.cuh"

namespace taper {

constexpr int TILE_ROWS = 16, UNIT_COLS = 128, ENTRIES = 20;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The shape of a matrix in layout L.
template <class L>
struct Shape {
  int units, stages, tiles;  // units and stages of a tile
  __host__ __device__ Shape(int rows, int cols)
      : units(ceil_div(cols, UNIT_COLS)), stages(ceil_div(units, L::UNITS)), tiles(ceil_div(rows, TILE_ROWS)) {}
  __host__ __device__ int units_of(int stage) const {
    return units - stage * L::UNITS < L::UNITS ? units - stage * L::UNITS : L::UNITS;
  }
  __host__ __device__ size_t tile_bytes() const { return (size_t)units * L::UNIT_BYTES + (size_t)stages * L::TRAILER; }
  __host__ __device__ static constexpr size_t stage_bytes() { return (size_t)L::UNITS * L::UNIT_BYTES + L::TRAILER; }
};

// Of each half.
__device__ __forceinline__ uint32_t swap_bytes(uint32_t v) { return __byte_perm(v, 0, 0x2301); }
__device__ __forceinline__ uint32_t join(uint32_t signs_and_mantissas, uint32_t exponents) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(signs_and_mantissas), "r"(exponents), "n"(0x807F807F));
  return d;
}
// Register p of a vector.
__device__ __forceinline__ uint32_t join(const uint4& signs_and_mantissas, int p, uint32_t exponents) {
  const uint4& s = signs_and_mantissas;
  const uint32_t word = p < 4 ? p < 2 ? s.x : s.y : p < 6 ? s.z : s.w;
  return join(p & 1 ? swap_bytes(word) : word, exponents);
}
// What the weight in that half of register p has in its word.
__device__ __forceinline__ uint32_t sign_and_mantissa(uint32_t weight, int p, int half) {
  const uint32_t there = weight & 0x807F;
  return (p & 1 ? swap_bytes(there) : there) << 16 * half;
}

__device__ __forceinline__ uint32_t repair(uint32_t value, int unit, int slot) {
  return value << 16 | 0x8000u | unit << 11 | slot;
}
__device__ __forceinline__ int repair_slot(int j, int lane, int p, int half) {
  return 512 * j + 256 * (p >> 2) + 8 * lane + 2 * (p & 3) + half;
}
// The row and the column in the unit.
struct RepairPlace {
  int row, col;
  __device__ __forceinline__ explicit RepairPlace(int slot)
      : row((slot >> 5 & 7) + 8 * (slot >> 1 & 1)),
        col((slot >> 9) * 32 + (slot >> 3 & 3) * 8 + (slot >> 8 & 1) * 4 + (slot >> 1 & 2) + (slot & 1)) {}
};
__device__ __forceinline__ bool repairs_unit(uint32_t entry, int unit) { return (entry >> 11 & 31) == (16u | unit); }

// Decodes one unit and hands vector j's registers to use(j, a). `scratch` is the unit's own place in shared memory.
template <class L, class Use>
__device__ __forceinline__ void decode_unit(uint32_t unit_at, uint32_t trailer, int u, int lane,
                                            const uint32_t* overflow, Use use) {
  // Lanes past the list look at the overflow count: one load and one vote settle both.
  const uint32_t entry = lds32(lane < ENTRIES ? trailer + 8 + L::EXTRA + 4 * lane : trailer);
  typename L::Unit unit;
  unit.load(unit_at, trailer + 8, u, lane);
  const bool mine = lane < ENTRIES ? repairs_unit(entry, u) : entry != 0;
  if (!__any_sync(~0u, mine)) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint32_t a[8];
      unit.vector(j, a);
      use(j, a);
    }
    return;
  }
  constexpr int TOGETHER = L::UNIT_BYTES >= 2048 ? 2 : 1;  // vectors that fit over the unit
  const uint32_t count = lds32(trailer), offset = lds32(trailer + 4);
#pragma unroll
  for (int j0 = 0; j0 < 4; j0 += TOGETHER) {
    uint32_t a[TOGETHER][8];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      unit.vector(j0 + j, a[j]);
      sts128(unit_at + 1024 * j + 16 * lane, make_uint4(a[j][0], a[j][1], a[j][2], a[j][3]));
      sts128(unit_at + 1024 * j + 512 + 16 * lane, make_uint4(a[j][4], a[j][5], a[j][6], a[j][7]));
    }
    __syncwarp();
    auto patch = [&](uint32_t e) {
      const int slot = (int)(e & 2047) - 512 * j0;
      if (repairs_unit(e, u) && slot >= 0 && slot < 512 * TOGETHER) sts16(unit_at + 2 * slot, e >> 16);
    };
    if (lane < ENTRIES) patch(entry);
    for (uint32_t i = lane; i < count; i += 32) patch(__ldg(overflow + offset + i));
    __syncwarp();
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      const uint4 lo = lds128(unit_at + 1024 * j + 16 * lane), hi = lds128(unit_at + 1024 * j + 512 + 16 * lane);
      const uint32_t back[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
      use(j0 + j, back);
    }
  }
#if __CUDA_ARCH__ >= 900
  fence_async_proxy();
#endif
}

}  // namespace taper

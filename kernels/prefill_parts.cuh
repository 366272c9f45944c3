// What prefill.cuh, stream.cuh and fp8.cuh are made of: how blocks are shared out, flags, repairs, results.
#pragma once
#include "product.cuh"
#include "wgmma.cuh"

namespace taper {

struct Prefill {
  const uint8_t* weights;
  const uint32_t* overflow;
  const uint8_t* x;  // bf16; of fp8.cuh arranged
  uint16_t* y;       // bf16
  float* partial;
  uint32_t* arrived;
  int rows, cols, batch, y_stride;
  int cut;            // blocks that are cut into pieces
  int by128, by8;     // 128 and 8, which compilers would turn into shifts (fixed.cuh)
  int y_type;         // as activations.cuh numbers it; bf16 but for fp8.cuh
  int x_stride;       // not of fp8.cuh
  uint8_t* arranged;  // of prefill.cuh: room for x in its order
};

// Warps that fetch weights.
constexpr int FETCHERS = 3;
// Results of 32 columns and 64 rows, as they lie in shared memory before they are written.
constexpr int RESULT_STRIDE = 144, RESULT_BUFFER = 32 * RESULT_STRIDE;

// What one block of the grid works on, piece by piece: its share of the blocks that are cut, then whole ones. What can
// be computed anew is not kept: the loop over K needs the registers.
struct Pieces {
  uint32_t units, cut;          // of the product
  uint32_t at = ~0u;            // the next unit of its share; behind that, whole blocks
  uint32_t block, first, last;  // the piece: units [first, last) of block
  __device__ Pieces(uint32_t units_, uint32_t cut_) : units(units_), cut(cut_) {}
  // Fewer than two blocks of the product for each of the grid are cut, so the product fits for 100,000 units.
  __device__ uint32_t start(uint32_t i, uint32_t grid) const { return cut * units * i / grid; }
  // Who has a unit of the blocks that are cut.
  __device__ uint32_t owner(uint32_t unit, uint32_t grid) const { return ((unit + 1) * grid - 1) / (cut * units); }
  // blocks: of the product.
  __device__ bool next(uint32_t me, uint32_t grid, uint32_t blocks) {
    const uint32_t end = start(me + 1, grid);
    if (at == ~0u) at = start(me, grid);
    if (at < end) {
      block = at / units, first = at - block * units, last = min(units, first + (end - at));
      at += last - first;
      return true;
    }
    block = cut + me + (at++ - end) * grid, first = 0, last = units;
    return block < blocks;
  }
};

// A barrier of four warps, the first ones or those after them.
__device__ __forceinline__ void warpgroup_sync(int half) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + half) : "memory");
}
__device__ __forceinline__ void set_flag(uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
// Until others have counted so far.
__device__ __forceinline__ void await_count(uint32_t* count, uint32_t enough) {
  uint32_t v;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(count) : "memory");
  while (v < enough);
}
__device__ __forceinline__ void await_flag(uint32_t* flag) { await_count(flag, 1); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// ---- PTX that only compute capability 9.0 has, or these kernels need ----
// Nought, of which the compiler does not know: what is added to it is computed where it is used, not kept.
__device__ __forceinline__ uint32_t nothing() {
  uint32_t v;
  asm volatile("mov.u32 %0, 0;" : "=r"(v));
  return v;
}
__device__ __forceinline__ uint64_t evict_normal_policy() {
  uint64_t p;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(p));
  return p;
}
__device__ __forceinline__ void store_transposed(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
// Position in a ring of barriers.
template <int SLOTS>
struct Turn {
  uint32_t slot = 0, phase = 0;
  __device__ void next() {
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
};

// Puts in the repairs of a stage that are for vector j of `unit` where they are many, through `scratch`, 1 KB of shared
// memory of the warp's: `count` in the overflow list, or one in each lane's `entry`.
__device__ __forceinline__ void patch_listed(const uint32_t* list, uint32_t entry, uint32_t count, uint32_t unit, int j,
                                             uint32_t (&a)[8], uint32_t scratch, int lane) {
  sts128(scratch + 16 * lane, make_uint4(a[0], a[1], a[2], a[3]));
  sts128(scratch + 512 + 16 * lane, make_uint4(a[4], a[5], a[6], a[7]));
  __syncwarp();
#pragma unroll 1
  for (uint32_t i = lane; i < count; i += 32) {
    const uint32_t e = list ? __ldg(list + i) : entry;
    if ((e >> 9 & 127) == (unit << 2 | j)) sts16(scratch + 2 * (e & 511), e >> 16);
  }
  __syncwarp();
  const uint4 lo = lds128(scratch + 16 * lane), hi = lds128(scratch + 512 + 16 * lane);
  a[0] = lo.x, a[1] = lo.y, a[2] = lo.z, a[3] = lo.w, a[4] = hi.x, a[5] = hi.y, a[6] = hi.z, a[7] = hi.w;
  __syncwarp();
}

// A warpgroup's 64 rows x N columns, rounded in pairs by `pack`. Where all rows are there they go through shared memory, so that whole
// lines of 128 bytes are written.
template <int N, class Pack>
__device__ __forceinline__ void store_results(const Prefill& p, const float (&c)[N / 8][4], int first_row, int column0,
                                              uint32_t scratch, int half, int place, Pack pack) {
  const int lane = place & 31, warp = place >> 5, g = lane >> 2, t = lane & 3;
  if (((size_t)p.y & 15) == 0 && p.y_stride % 8 == 0 && first_row + 4 * TILE_ROWS <= p.rows) {
    const uint32_t out = scratch + (8 * (lane >> 4) + (lane & 7)) * RESULT_STRIDE + (lane >> 3 & 1) * 16 + warp * 32,
                   in = scratch + place / 8 * RESULT_STRIDE + place % 8 * 16;
    uint16_t* to = p.y + (size_t)(column0 + place / 8) * p.y_stride + first_row + place % 8 * 8;
    const int left = p.batch - column0 - place / 8;
#pragma unroll
    for (int n = 0; n < N; n += 32) {
      const uint32_t buffer = n / 32 % 2 * RESULT_BUFFER;
#pragma unroll
      for (int h = 0; h < 2 && n + 16 * h < N; h++) {
        const float (&lo)[4] = c[n / 8 + 2 * h], (&hi)[4] = c[n / 8 + 2 * h + 1];
        store_transposed(out + buffer + 16 * h * RESULT_STRIDE, pack(lo[0], lo[1]), pack(lo[2], lo[3]),
                         pack(hi[0], hi[1]), pack(hi[2], hi[3]));
      }
      warpgroup_sync(half);
#pragma unroll
      for (int i = 0; i < 2 && n + 16 * i < N; i++) {
        const uint4 v = lds128(in + buffer + 16 * i * RESULT_STRIDE);
        if (left > n + 16 * i) *(uint4*)(to + (size_t)(n + 16 * i) * p.y_stride) = v;
      }
    }
    warpgroup_sync(half);  // the scratch memory is free again
    return;
  }
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    const int row = first_row + warp * TILE_ROWS + g + 8 * (i >> 1 & 1),
              column = column0 + 8 * (i / 4) + 2 * t + (i & 1);
    if (row < p.rows && column < p.batch) p.y[(size_t)column * p.y_stride + row] = (uint16_t)pack(c[i / 4][i % 4], 0);
  }
}
#endif

}  // namespace taper

// What prefill_wide.cuh is made of: the order of activations, repairs.
#pragma once
#include "prefill_parts.cuh"

namespace taper {

// Warps that fetch weights.
constexpr int FETCHERS = 3;

struct Arrange {
  const uint16_t* x;  // bf16
  uint8_t* out;
  int x_stride, batch, cols;
  int width, padded;  // N of the product that follows; the batch rounded up to it
};

// x (batch x cols) in prefill_wide.cuh's order, a thread per vector and column of activations.
__device__ __forceinline__ void arrange(const Arrange& p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = i % p.padded, j = i / p.padded,
            vectors = ceil_div(p.cols, UNIT_COLS) * 4;
  if (j >= vectors) return;
  uint4 v[4];
  const uint16_t* from = p.x + (size_t)n * p.x_stride + 32 * j;
  if (n < p.batch && 32 * j + 32 <= p.cols && ((size_t)from & 15) == 0) {
#pragma unroll
    for (int t = 0; t < 4; t++) v[t] = ((const uint4*)from)[t];
  } else {
#pragma unroll
    for (int t = 0; t < 4; t++) {
      uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 0; e < 8; e++)
        if (n < p.batch && 32 * j + 8 * t + e < p.cols) w[e / 2] |= (uint32_t)from[8 * t + e] << 16 * (e & 1);
      v[t] = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
  uint4* to = (uint4*)p.out + ((size_t)(n / p.width) * vectors + j) * 4 * p.width + n % p.width;
  to[0] = make_uint4(v[0].x, v[1].x, v[2].x, v[3].x);
  to[p.width] = make_uint4(v[0].y, v[1].y, v[2].y, v[3].y);
  to[2 * p.width] = make_uint4(v[0].z, v[1].z, v[2].z, v[3].z);
  to[3 * p.width] = make_uint4(v[0].w, v[1].w, v[2].w, v[3].w);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Nought, of which the compiler does not know: what is added to it is computed where it is used, not kept.
__device__ __forceinline__ uint32_t nothing() {
  uint32_t v;
  asm volatile("mov.u32 %0, 0;" : "=r"(v));
  return v;
}
// The repairs that a unit needs. Most need none or one, so those of a stage's own list are taken one after another, by
// the lane that has the weight; those of the overflow list are many, and go through shared memory.
struct Repairs {
  uint32_t entry, vectors = 0, stage = 0, unit = 0;  // stage: where its trailer is
  __device__ __forceinline__ void load(uint32_t trailer, int extra, int u, int lane) {
    entry = lds32(lane < ENTRIES ? trailer + 8 + extra + 4 * lane : trailer);
    unit = 16u | u, stage = trailer;
    const bool mine = lane < ENTRIES ? repairs_unit(entry, u) : entry != 0;
    vectors = 0;
    if (!__any_sync(~0u, mine)) return;
    vectors = __reduce_or_sync(~0u, !mine ? 0u : lane < ENTRIES ? 1u << (entry >> 9 & 3) : 15u);
  }
  __device__ __forceinline__ void patch(int j, uint32_t (&a)[8], uint32_t scratch, int lane,
                                        const uint32_t* overflow) const {
    if (const uint32_t count = lds32(stage)) return patch_many(count, j, a, scratch, lane, overflow);
    uint32_t left = __ballot_sync(~0u, lane < ENTRIES && (entry >> 9 & 127) == (unit << 2 | j));
#pragma unroll 1
    while (left) {
      const uint32_t e = __shfl_sync(~0u, entry, __ffs(left) - 1);
      left &= left - 1;
      const uint32_t place = (int)(e >> 3 & 31) == lane ? (e >> 6 & 4) | (e >> 1 & 3) : 8,
                     halves = e & 1 ? 0x7610 : 0x3276;
#pragma unroll
      for (uint32_t p = 0; p < 8; p++)
        if (place == p) a[p] = __byte_perm(a[p], e, halves);
    }
  }
  __device__ __forceinline__ void patch_many(uint32_t count, int j, uint32_t (&a)[8], uint32_t scratch, int lane,
                                             const uint32_t* overflow) const {
    overflow += lds32(stage + 4);
    sts128(scratch + 16 * lane, make_uint4(a[0], a[1], a[2], a[3]));
    sts128(scratch + 512 + 16 * lane, make_uint4(a[4], a[5], a[6], a[7]));
    __syncwarp();
#pragma unroll 1
    for (uint32_t i = lane; i < count; i += 32) {
      const uint32_t e = __ldg(overflow + i);
      if ((e >> 9 & 127) == (unit << 2 | j)) sts16(scratch + 2 * (e & 511), e >> 16);
    }
    __syncwarp();
    const uint4 lo = lds128(scratch + 16 * lane), hi = lds128(scratch + 512 + 16 * lane);
    a[0] = lo.x, a[1] = lo.y, a[2] = lo.z, a[3] = lo.w, a[4] = hi.x, a[5] = hi.y, a[6] = hi.z, a[7] = hi.w;
    __syncwarp();
  }
};

#endif

}  // namespace taper

// What stream.cuh is made of: shared memory, and activations on their way.
#pragma once
#include "prefill_parts.cuh"

namespace taper {

// What lies in shared memory: activations by units, each warp's ring, results, barriers.
template <class L, int N, int WGS>
struct Stream {
  static constexpr int WARPS = 4 * WGS, FEEDERS = WGS > 2 ? 4 : 8, BLOCK = 32 * (WARPS + FEEDERS), ROWS = 64 * WGS;
  // A copy is of some 4 to 6 KB, and two are on their way for each warp, or of four warpgroups half of that.
  static constexpr int UNITS = (L::UNIT_BYTES < 1700 ? 4 : 2) / (WGS == 4 ? 2 : 1), SLOTS = 2,
                       SLOT_BYTES = UNITS * L::UNIT_BYTES + L::TRAILER, X_BYTES = N * UNIT_COLS * 2,
                       SCRATCH = 2 * RESULT_BUFFER, BARRIERS = 512,
                       ROOM = 232448 - WGS * SCRATCH - BARRIERS - WARPS * SLOTS * SLOT_BYTES, FIT = ROOM / X_BYTES,
                       X_SLOTS = FIT > 6 ? 6 : FIT;
  static constexpr int RINGS_AT = X_SLOTS * X_BYTES, SCRATCH_AT = RINGS_AT + WARPS * SLOTS * SLOT_BYTES,
                       BARRIERS_AT = SCRATCH_AT + WGS * SCRATCH, BYTES = BARRIERS_AT + BARRIERS;
  static_assert(X_SLOTS >= 2 && 16 * X_SLOTS + 8 * SLOTS * WARPS <= BARRIERS && SLOT_BYTES % 16 == 0, "");
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A thread of those that bring activations into order: COUNT times eight of a unit's.
template <class L, int N, int WGS>
struct Feeder {
  using S = Stream<L, N, WGS>;
  static constexpr int THREADS = 32 * S::FEEDERS, COUNT = N * 16 / THREADS;
  // A unit's come in so many steps, two of which are in a thread's registers.
  static constexpr int STEPS = COUNT > 4 && S::FEEDERS == 4 ? 2 : 1, EACH_STEP = COUNT / STEPS;
  static_assert(N * 16 % THREADS == 0 && COUNT % STEPS == 0, "");
  static constexpr int EACH = THREADS / 4;  // rows, of 32 columns, that all threads bring at once
  const Prefill& p;
  const int tid;
  const bool aligned;
  __device__ __forceinline__ int row(int d) const { return EACH <= N ? tid / 4 + d * EACH % N : tid / 4 % N; }
  __device__ __forceinline__ int vector(int d) const { return EACH <= N ? d * EACH / N : tid / 4 / N + d * (EACH / N); }
  // Those of rows `row0` and on, from column k0 on. What lies outside of x is zero.
  template <int STEP>
  __device__ __forceinline__ void load(uint4 (&v)[EACH_STEP], int row0, int k0) const {
    const uint16_t* from = (const uint16_t*)p.x + (size_t)row0 * p.x_stride + k0 + tid % 4 * 8;
    const int left = p.batch - row0;
    if (aligned && k0 + UNIT_COLS <= p.cols) {
#pragma unroll
      for (int e = 0; e < EACH_STEP; e++) {
        const int d = STEP * EACH_STEP + e;
        v[e] = make_uint4(0, 0, 0, 0);
        if (row(d) < left) v[e] = __ldcg((const uint4*)(from + (size_t)row(d) * p.x_stride + 32 * vector(d)));
      }
    } else {
#pragma unroll
      for (int e = 0; e < EACH_STEP; e++) {
        const int d = STEP * EACH_STEP + e, k = 32 * vector(d) + tid % 4 * 8;
        v[e] = make_uint4(0, 0, 0, 0);
        if (row(d) < left) v[e] = load_end(from + (size_t)row(d) * p.x_stride + 32 * vector(d), p.cols - k0 - k);
      }
    }
  }
  template <int STEP>
  __device__ __forceinline__ void store(const uint4 (&v)[EACH_STEP], uint32_t to) const {
#pragma unroll
    for (int e = 0; e < EACH_STEP; e++) {
      const int d = STEP * EACH_STEP + e, n = row(d), j = vector(d), t = tid % 4;
      const uint32_t words[4] = {v[e].x, v[e].y, v[e].z, v[e].w};
      const uint32_t at = to + (4 * j * N + n) * 16;
#pragma unroll
      for (int w = 0; w < 4; w++) {
        if constexpr (L::GROUP == 16) {  // in such an order that lanes meet different banks
          const uint32_t word = t & 2 ? words[w ^ 2] : words[w];
          sts32(at + (t / 2 * 2 + w % 2) * 16 * N + (t % 2 * 2 + (w / 2 ^ t / 2)) * 4, word);
        } else
          sts32(at + w * 16 * N + t * 4, words[w]);
      }
    }
  }
};
#endif

}  // namespace taper

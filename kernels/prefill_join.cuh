// Sums of blocks that prefill.cuh has cut into pieces. Who goes on to other pieces leaves all of his sums to the others:
// to the one who has the first piece, or, if two have nothing else to do, half of the columns to each. So an SM that writes
// 17 bytes a cycle writes 64 KB of them (N = 256), not 128, and as much less of the result.
#pragma once
#include "prefill_parts.cuh"

namespace taper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Of a piece of a block, by both warpgroups. c: the piece's sums; row, column: of the warpgroup's in y; scratch: as for
// store_results.
template <int N>
__device__ __forceinline__ void join_pieces(const Prefill& p, const Pieces& piece, float (&c)[N / 8][4], int row,
                                            int column, uint32_t scratch, int half, int place) {
  constexpr int HALF = N / 16;
  const uint32_t me = blockIdx.x + nothing(), grid = gridDim.x, begin = piece.block * piece.units,
                 end = begin + piece.units, owner = piece.owner(begin, grid), last = piece.owner(end - 1, grid),
                 rank = me - owner, count = last - owner + 1;
  // Whether two add up, and whether this block of the grid is one of them, the second.
  const bool both = count - (piece.start(last + 1, grid) > end) > 1, adds = rank < 1 + both, second = rank == 1;
  // A block of the grid may leave sums of two: of one's first piece, and of another's last.
  const auto plane = [&](uint32_t other) {
    return (float4*)p.partial + ((other * 2 + (other > owner)) * 2 + half) * (size_t)(2 * HALF) * 128 + place;
  };
  const auto leave = [&](int i, int at) {
    __stcg(plane(me) + at * 128, make_float4(c[i][0], c[i][1], c[i][2], c[i][3]));
  };
  if (!adds) {
#pragma unroll
    for (int i = 0; i < 2 * HALF; i++) leave(i, i);
  } else if (both) {  // the columns that it adds up come to the front
#pragma unroll
    for (int i = 0; i < HALF; i++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float v = c[i][k];
        c[i][k] = second ? c[HALF + i][k] : v, c[HALF + i][k] = second ? v : c[HALF + i][k];
      }
#pragma unroll
    for (int i = 0; i < HALF; i++) leave(HALF + i, second ? i : HALF + i);
  }
  uint32_t* const arrived = p.arrived + 2 * owner;
  bar_sync<8, CONSUMER_THREADS>();
  if (threadIdx.x == 0) atomic_add_ordered(arrived, 1);
  if (!adds) return;
  if (threadIdx.x == 0) await_count(arrived, count);
  bar_sync<8, CONSUMER_THREADS>();
  const auto add = [&](const float4* from, int first) {
    float4 v[HALF];
#pragma unroll
    for (int i = 0; i < HALF; i++) v[i] = __ldcg(from + i * 128);
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      float (&sum)[4] = c[first + i];
      sum[0] += v[i].x, sum[1] += v[i].y, sum[2] += v[i].z, sum[3] += v[i].w;
    }
  };
#pragma unroll 1
  for (uint32_t other = 0; other < count; other++) {
    if (other == rank) continue;
    const float4* const from = plane(owner + other);
    add(from + (second ? HALF * 128 : 0), 0);
    if (!both) add(from + HALF * 128, HALF);
  }
  if (both)
    store_results<N / 2>(p, reinterpret_cast<float (&)[HALF][4]>(c), row, column + (second ? N / 2 : 0), scratch, half,
                         place, pack_bf16);
  else
    store_results<N>(p, c, row, column, scratch, half, place, pack_bf16);
  if (threadIdx.x == 0 && atomic_add_ordered(arrived + 1, 1) == both) arrived[0] = arrived[1] = 0;
}
#endif

}  // namespace taper

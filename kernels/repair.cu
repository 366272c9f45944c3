// Pass 2 of every packing: gives each stage whose repairs exceed its trailer a place in the overflow list.
#include "dense.cuh"

using namespace taper;

// One block of 1024 threads. plan: a uint4 for each stage, {repairs, ..} becomes {0 or repairs, offset, ..}; z and w
// are kept. totals, zeroed before the first row block of a matrix, run on from one to the next:
//   [0] entries used in the overflow list (above its capacity: entries were lost, the layout must not be used)
//   [1] repairs   [2] stages that overflow   [3] most repairs in one stage   [4] stages
extern "C" __global__ void __launch_bounds__(1024) repair_scan(uint4* plan, int stages, uint32_t* totals) {
  __shared__ uint32_t sums[32];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  uint32_t used = totals[0], repairs = 0, overflowing = 0, worst = 0;
  for (int first = 0; first < stages; first += 1024) {
    const int i = first + tid;
    const uint32_t n = i < stages ? plan[i].x : 0, listed = n > ENTRIES ? n : 0;
    repairs += n, overflowing += listed != 0, worst = max(worst, n);
    const uint32_t in_warp = before_lane(listed, lane);
    if (lane == 31) sums[warp] = in_warp + listed;
    __syncthreads();
    uint32_t before = used, all = 0;
    for (int w = 0; w < 32; w++) before += w < warp ? sums[w] : 0, all += sums[w];
    if (i < stages) plan[i].x = listed, plan[i].y = before + in_warp;
    used += all;
    __syncthreads();
  }
  repairs = __reduce_add_sync(~0u, repairs), overflowing = __reduce_add_sync(~0u, overflowing),
  worst = __reduce_max_sync(~0u, worst);
  if (lane == 0) atomicAdd(totals + 1, repairs), atomicAdd(totals + 2, overflowing), atomicMax(totals + 3, worst);
  if (tid == 0) totals[0] = used, totals[4] += stages;
}

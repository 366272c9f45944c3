// One new token's attention: its queries and keys are rotated, its key and value written to the cache, and its queries
// attend to all keys up to it. What candle does in a dozen launches, in one.
//
//   q           batch, heads, size         the products' results, not rotated
//   k, v        batch, kv_heads, size      the same
//   keys,
//   values      batch, kv_heads, capacity, size: the cache; position `position` is written, those before are read
//   cos, sin    size / 2 for each position
//   y           batch, heads, size
//
// Grid: splits of the positions, kv_heads * chunks (a chunk is the G queries of a kv head that a block takes), batch.
// A graph that is replayed has splits for all that the cache has room for, and reads the position from memory: blocks
// past the last split end at once. Which positions a split has depends on the capacity alone, so that the sums are the
// same for every grid.
// `lanes` threads, each with 8 values, hold a key; the block's groups of them take positions in turn, with a running
// maximum and sum for each query (online softmax, Milakov and Gimelshein 2018). Groups are joined in shared memory,
// splits in device memory by the block that comes last; both in one order, so that the result is the same from run to
// run.
//
// Budget: the cache is read once for each chunk: 2 * size values a position and kv head, at the memory's bandwidth from
// some thousand positions on. Below that the launch and the chain of loads dominate, so spans are short (64 positions).
// May be launched with programmatic stream serialisation.
#include "elements.cuh"
#include "ptx.cuh"

using namespace taper;

struct Step {
  const void *q, *k, *v, *cos, *sin;
  void *keys, *values, *y;
  float* partial;      // for each block: G queries of {maximum, sum, size values}
  uint32_t* arrived;   // for each y and z of the grid: zero before and after
  const uint32_t* at;  // the position, if not null: complete before the kernel before this one began
  uint32_t heads, kv_heads, size, lanes, capacity, position, span;
  float scale;  // of scores, times log2(e)
};

constexpr int THREADS = 128, VALUES = 8;

// Values `first` .. `first + 7` of a head, rotated by a position's angles.
template <class T>
__device__ __forceinline__ void rotated(const T* head, const T* cos, const T* sin, int size, int first,
                                        float (&out)[VALUES]) {
  const int half = size / 2;
#pragma unroll
  for (int j = 0; j < VALUES; j++) {
    const int i = first + j, pair = i < half ? i : i - half;
    const float a = widened(head[pair]), b = widened(head[pair + half]);
    const float c = widened(cos[pair]), s = widened(sin[pair]);
    out[j] = i < half ? a * c - b * s : a * s + b * c;
  }
}

// Sums that a query has gathered. An empty one has maximum -inf and sum 0.
struct Gathered {
  float maximum = -INFINITY, sum = 0;

  // The factor of what was gathered before once a score joins; the score's own weight comes back in `weight`.
  __device__ __forceinline__ float join(float score, float& weight) {
    const float most = fmaxf(maximum, score);
    // A score of -inf that is the first one has nothing to be compared with, and counts for nothing.
    const float before = most == -INFINITY ? 0 : exp2f(maximum - most);
    weight = most == -INFINITY ? 0 : exp2f(score - most);
    maximum = most, sum = sum * before + weight;
    return before;
  }
};

template <class T, int G>
__device__ __forceinline__ void attend(const Step& s) {
  extern __shared__ float shared[];
  const int size = s.size, lanes = s.lanes, groups = THREADS / lanes;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, first = lane * VALUES;
  const bool active = first < size;
  const uint32_t chunks = s.heads / s.kv_heads / G, kv = blockIdx.y / chunks, chunk = blockIdx.y % chunks;
  const uint32_t newest = s.at ? *s.at : s.position;
  const uint32_t batch = blockIdx.z, split = blockIdx.x, splits = newest / s.span + 1;
  if (split >= splits) return;
  let_next_kernel_start();
  const size_t head = (size_t)batch * s.heads + (size_t)kv * (s.heads / s.kv_heads) + chunk * G;
  const size_t kv_head = (size_t)batch * s.kv_heads + kv;
  const T* const cos = (const T*)s.cos + (size_t)newest * (size / 2);
  const T* const sin = (const T*)s.sin + (size_t)newest * (size / 2);
  T* const keys = (T*)s.keys + kv_head * s.capacity * size + first;
  T* const values = (T*)s.values + kv_head * s.capacity * size + first;

  wait_for_previous_kernel();
  float q[G][VALUES] = {}, sums[G][VALUES] = {};
  Gathered gathered[G];
  if (active)
    for (int g = 0; g < G; g++) rotated((const T*)s.q + (head + g) * size, cos, sin, size, first, q[g]);

  const auto take = [&](const float (&k)[VALUES], const float (&v)[VALUES], bool inside) {
#pragma unroll
    for (int g = 0; g < G; g++) {
      float score = 0;
#pragma unroll
      for (int j = 0; j < VALUES; j++) score += q[g][j] * k[j];
      for (int apart = lanes / 2; apart > 0; apart /= 2) score += __shfl_xor_sync(~0u, score, apart);
      if (!inside) continue;
      float weight;
      const float before = gathered[g].join(score * s.scale, weight);
#pragma unroll
      for (int j = 0; j < VALUES; j++) sums[g][j] = sums[g][j] * before + weight * v[j];
    }
  };

  const uint32_t begin = split * s.span, end = min(begin + s.span, newest);
  // All threads of a warp take part in each round, as they exchange sums.
  for (uint32_t at = begin; at < end; at += groups) {
    const uint32_t position = at + group;
    float k[VALUES] = {}, v[VALUES] = {};
    if (position < end && active) {
      const auto key = Eight<T>::load(keys + (size_t)position * size);
      const auto value = Eight<T>::load(values + (size_t)position * size);
#pragma unroll
      for (int j = 0; j < VALUES; j++) k[j] = key[j], v[j] = value[j];
    }
    take(k, v, position < end);
  }
  if (split + 1 == splits) {
    // The new token: as the cache will have it, rounded.
    Eight<T> key = {}, value = {};
    float k[VALUES] = {}, v[VALUES] = {};
    if (active) {
      rotated((const T*)s.k + kv_head * size, cos, sin, size, first, k);
      value = Eight<T>::load((const T*)s.v + kv_head * size + first);
    }
#pragma unroll
    for (int j = 0; j < VALUES; j++) key.values[j] = narrowed<T>(k[j]), k[j] = key[j], v[j] = value[j];
    take(k, v, group == 0);
    if (group == 0 && active && chunk == 0) {
      key.store(keys + (size_t)newest * size);
      value.store(values + (size_t)newest * size);
    }
  }

  // Groups to shared memory: {maximum, sum, values} of each query.
  const int line = size + 2;
  for (int g = 0; g < G; g++) {
    float* const to = shared + (group * G + g) * line;
    if (lane == 0) to[0] = gathered[g].maximum, to[1] = gathered[g].sum;
    if (active)
      for (int j = 0; j < VALUES; j++) to[2 + first + j] = sums[g][j];
  }
  __syncthreads();

  // Joins `count` lines, `apart` floats apart, at value i.
  const auto joined = [&](const float* from, int count, size_t apart, int i, float& maximum, float& sum) {
    float value = 0;
    maximum = -INFINITY, sum = 0;
    for (int c = 0; c < count; c++) maximum = fmaxf(maximum, __ldcg(from + c * apart));
    for (int c = 0; c < count; c++) {
      const float most = __ldcg(from + c * apart);
      const float factor = most == -INFINITY ? 0 : exp2f(most - maximum);
      sum += factor * __ldcg(from + c * apart + 1), value += factor * __ldcg(from + c * apart + 2 + i);
    }
    return value;
  };
  const auto joined_groups = [&](int g, int i, float& maximum, float& sum) {
    float value = 0;
    maximum = -INFINITY, sum = 0;
    for (int c = 0; c < groups; c++) maximum = fmaxf(maximum, shared[(c * G + g) * line]);
    for (int c = 0; c < groups; c++) {
      const float* const from = shared + (c * G + g) * line;
      const float factor = from[0] == -INFINITY ? 0 : exp2f(from[0] - maximum);
      sum += factor * from[1], value += factor * from[2 + i];
    }
    return value;
  };
  T* const y = (T*)s.y + head * size;
  const size_t place = (size_t)batch * gridDim.y + blockIdx.y;
  float* const partial = s.partial + place * splits * G * line;
  for (int at = threadIdx.x; at < G * size; at += THREADS) {
    const int g = at / size, i = at % size;
    float maximum, sum;
    const float value = joined_groups(g, i, maximum, sum);
    if (splits == 1) {
      y[at] = narrowed<T>(value / sum);
    } else {
      float* const to = partial + (split * G + g) * line;
      to[2 + i] = value;
      if (i == 0) to[0] = maximum, to[1] = sum;
    }
  }
  if (splits == 1) return;
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(s.arrived + place, 1) == splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int at = threadIdx.x; at < G * size; at += THREADS) {
    const int g = at / size, i = at % size;
    float maximum, sum;
    const float value = joined(partial + g * line, splits, (size_t)G * line, i, maximum, sum);
    y[at] = narrowed<T>(value / sum);
  }
  if (threadIdx.x == 0) s.arrived[place] = 0;
}

#define ATTEND(NAME, T, G)                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) attend_##NAME##_##G(const __grid_constant__ Step s) { \
    attend<T, G>(s);                                                                                          \
  }
#define ATTEND_ALL(NAME, T) ATTEND(NAME, T, 1) ATTEND(NAME, T, 2) ATTEND(NAME, T, 4) ATTEND(NAME, T, 8)
ATTEND_ALL(bf16, __nv_bfloat16)
ATTEND_ALL(f16, __half)
ATTEND_ALL(f32, float)

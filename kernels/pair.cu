// Layout `pair` (pair.cuh): counted, made from dense rows, turned back into them, multiplied.
//
// The host makes the code from the counts. Any prefix code does whose lengths are at most 8, whose pairs hold no
// exponent 255, and that has one symbol for the pair (0, 0), which all pairs without a symbol of their own fall back to
// (whole or by half: (e, 0) and (0, e) may be symbols too).
//     codes[256 e0 + e1]   bits of the code, first bit lowest | length << 8 | 1 << 12 if e0 is not what the code
//                          decodes to | 1 << 13 likewise e1
//     table[256]           entry of the code that the low bits of the index begin with
#include "pair_code.cuh"
#include "pair_decode.cuh"
#include "pair_product.cuh"

using namespace taper;

// The level of each row and the most that it may be shifted by (level << 8 | most). Adds levels of rows that may be
// shifted, and their number, to `mean` if `first` (the matrix's first row block). Grid: rows / 8, block 256.
extern "C" __global__ void __launch_bounds__(256) pair_levels(const uint16_t* dense, int rows, int cols, int stride,
                                                              int first, uint32_t* levels, unsigned long long* mean) {
  const int row = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= rows) return;
  const uint16_t* const from = dense + (size_t)row * stride;
  const bool aligned = ((size_t)from & 15) == 0;
  uint32_t sum = 0, count = 0, least = 255;
  for (int k = 8 * lane; k < cols; k += 256) {
    const uint4 eight = load_eight(from, k, cols, aligned);
    const uint32_t w[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint32_t weight = w[i / 2] >> 16 * (i & 1) & 0x7FFF, e = weight >> 7;
      if (k + i >= cols || e == 255 || weight == 0) continue;
      sum += e, count++, least = min(least, e);
    }
  }
  sum = __reduce_add_sync(~0u, sum), count = __reduce_add_sync(~0u, count), least = __reduce_min_sync(~0u, least);
  if (lane) return;
  const uint32_t level = count ? (uint32_t)((16ull * sum + count / 2) / count) : 0,
                 most = count ? min(least / 2, (uint32_t)MOST_SHIFT) : 0;
  levels[row] = level << 8 | most;
  if (first && most) atomicAdd(mean, (unsigned long long)level), atomicAdd(mean + 1, 1ull);
}

// The rows' shifts, and to counts[65536] how often shifted exponents e0, e1 of neighbours occur (256 e0 + e1). Any
// grid.
constexpr int COUNT_FROM = 72, COUNT_WIDTH = 64;  // the exponents that weights have: counted in shared memory
extern "C" __global__ void __launch_bounds__(256)
    pair_count(const uint16_t* dense, int rows, int cols, int stride, const uint32_t* levels,
               const unsigned long long* mean, uint8_t* shifts, uint32_t* counts) {
  __shared__ uint32_t near[COUNT_WIDTH * COUNT_WIDTH];
  for (int i = threadIdx.x; i < COUNT_WIDTH * COUNT_WIDTH; i += 256) near[i] = 0;
  __syncthreads();
  const int pairs = cols / 2;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const uint16_t* at = dense + (size_t)row * stride;
    const int shift = shift_of(levels[row], mean);
    if (threadIdx.x == 0) shifts[row] = (uint8_t)shift;
    for (int i = threadIdx.x; i < pairs; i += 256) {
      const int e0 = shifted(at[2 * i], shift) >> 7 & 255, e1 = shifted(at[2 * i + 1], shift) >> 7 & 255,
                n0 = e0 - COUNT_FROM, n1 = e1 - COUNT_FROM;
      if ((n0 | n1) >= 0 && n0 < COUNT_WIDTH && n1 < COUNT_WIDTH)
        atomicAdd(near + n0 * COUNT_WIDTH + n1, 1u);
      else
        atomicAdd(counts + 256 * e0 + e1, 1u);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < COUNT_WIDTH * COUNT_WIDTH; i += 256)
    if (near[i]) atomicAdd(counts + 256 * (COUNT_FROM + i / COUNT_WIDTH) + COUNT_FROM + i % COUNT_WIDTH, near[i]);
}

// Pass 1, block per stage: its size in 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
    pair_size(const uint16_t* dense, int rows, int cols, int stride, const uint8_t* shifts, const uint16_t* codes,
              int filler, uint32_t* sizes) {
  __shared__ int lengths[8][32], words[8];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shape<Pair> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages, units = shape.units_of(stage);
  if (warp < units) {
    const LaneCodes mine = lane_codes(
        LaneWeights(dense, shifts, rows, cols, stride, tile, stage * Pair::UNITS + warp, lane), codes, filler);
    lengths[warp][lane] = mine.length;
    __syncwarp();
    const LaneStarts starts(lengths[warp], lane);
    const int repairs = __reduce_add_sync(~0u, mine.repairs[0] + mine.repairs[1]);
    if (lane == 0) words[warp] = ceil_div(starts.bits, 32) + repairs;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (int u = 0; u < units; u++) total += words[u];
    sizes[blockIdx.x] =
        total > MAX_TAIL ? IMPOSSIBLE : ceil_div(pair_header_bytes(units) + units * Pair::UNIT_BYTES + 4 * total, 16);
  }
}

// Pass 2, one block of 1024 threads: sizes of n stages to offsets[0..n], which go on from totals[0] (zero before the
// first row block). totals: [0] 16-byte pieces so far, [1] the largest stage's, [2] the most that header and tail of a
// stage have; if [1] is IMPOSSIBLE the matrix needs another layout.
extern "C" __global__ void __launch_bounds__(1024)
    pair_scan(const uint32_t* sizes, int n, int cols, uint32_t* offsets, uint32_t* totals) {
  __shared__ uint32_t sums[32];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const Shape<Pair> shape(1, cols);
  uint32_t base = totals[0], most = 0, besides = 0;
  for (int first = 0; first < n; first += 1024) {
    const int i = first + tid;
    const uint32_t mine = i < n ? sizes[i] : 0;
    most = max(most, mine);
    if (i < n) besides = max(besides, mine - shape.units_of(i % shape.stages) * (Pair::UNIT_BYTES / 16));
    const uint32_t in_warp = before_lane(mine, lane);
    if (lane == 31) sums[warp] = in_warp + mine;
    __syncthreads();
    uint32_t before = base, all = 0;
    for (int w = 0; w < 32; w++) before += w < warp ? sums[w] : 0, all += sums[w];
    if (i < n) offsets[i] = before + in_warp;
    base += all;
    __syncthreads();
  }
  most = __reduce_max_sync(~0u, most), besides = __reduce_max_sync(~0u, besides);
  if (lane == 0) atomicMax(totals + 1, most), atomicMax(totals + 2, besides);
  if (tid == 0) offsets[n] = totals[0] = base;
}

// Pass 3, block per stage. `offsets` and `shifts` are those of these rows, `weights` is the whole matrix.
extern "C" __global__ void __launch_bounds__(256)
    pair_pack(const uint16_t* dense, int rows, int cols, int stride, const uint8_t* shifts, const uint16_t* codes,
              int filler, const uint32_t* offsets, uint8_t* weights) {
  __shared__ int lengths[8][32], words[8], repairs[8];
  __shared__ int places[TILE_ROWS * 8 * 4];  // repairs of each row, unit and t; then how many are before
  __shared__ uint32_t buffer[8][MAX_WORDS];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const Shape<Pair> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages, units = shape.units_of(stage),
            header = pair_header_bytes(units);
  uint8_t *out = weights + (size_t)offsets[blockIdx.x] * 16, *bytes = out + header;
  uint32_t* const stream = (uint32_t*)(bytes + units * Pair::UNIT_BYTES);
  const LaneWeights mine(dense, shifts, rows, cols, stride, tile, stage * Pair::UNITS + warp, lane);
  uint32_t* const head = (uint32_t*)(out + STAGE_HEAD + UNIT_HEAD * warp);
  int* const place = places + (g * 8 + warp) * 4 + t;
  constexpr int LOWER = 8 * 8 * 4;  // from row g's place to row g + 8's
  int spacing = 0;
  place[0] = place[LOWER] = 0;
  if (warp < units) {
    const LaneCodes codes_of_lane = lane_codes(mine, codes, filler);
    lengths[warp][lane] = codes_of_lane.length;
    place[0] = codes_of_lane.repairs[0], place[LOWER] = codes_of_lane.repairs[1];
    for (int i = lane; i < MAX_WORDS; i += 32) buffer[warp][i] = 0;
    __syncwarp();
    const LaneStarts starts(lengths[warp], lane);
    spacing = starts.spacing;
    int end = 0, d = 0;
    for (int i = 0; i <= lane; i++) {
      d = LaneStarts::delta(end, i * spacing);
      end = i * spacing + 2 * d + lengths[warp][i];
    }
    const int start = lane * spacing + 2 * d;
    uint32_t five = 0;
    for (int i = 0; i < LANES_A_WORD; i++) {
      const int from = lane * LANES_A_WORD + i, other = __shfl_sync(~0u, d, from & 31);
      if (from < 32) five |= (uint32_t)(other & ((1 << START_BITS) - 1)) << START_BITS * i;
    }
    if (lane < UNIT_HEAD / 4 - 1) head[1 + lane] = five;
#pragma unroll
    for (int i = 0; i < PAIR_BITS / 32; i++) {
      const int at = start + 32 * i;
      if (codes_of_lane.bits[i] == 0) continue;
      atomicOr(&buffer[warp][at / 32], codes_of_lane.bits[i] << (at & 31));
      if (at & 31) atomicOr(&buffer[warp][at / 32 + 1], codes_of_lane.bits[i] >> (32 - (at & 31)));
    }
    const int all = __reduce_add_sync(~0u, codes_of_lane.repairs[0] + codes_of_lane.repairs[1]);
    if (lane == 0) words[warp] = ceil_div(starts.bits, 32), repairs[warp] = all;
  }
  if (warp == 0) {
    const uint32_t top = __reduce_or_sync(~0u, (uint32_t)mine.shifts[0] << 4 * g),
                   bottom = __reduce_or_sync(~0u, (uint32_t)mine.shifts[1] << 4 * g);
    if (lane == 0) ((uint32_t*)out)[0] = top, ((uint32_t*)out)[1] = bottom;
  }
  __syncthreads();
  if (warp == 0) {  // sums up to each place: of a lane's sixteen, then over lanes
    int* const sixteen = places + 16 * lane;
    int sum = 0;
    for (int i = 0; i < 16; i++) sum += sixteen[i];
    int before = (int)before_lane(sum, lane);
    for (int i = 0; i < 16; i++) {
      const int here = sixteen[i];
      sixteen[i] = before, before += here;
    }
  }
  __syncthreads();
  int all_words = 0, first_word = 0, all_repairs = 0;
  for (int u = 0; u < units; u++) {
    if (u < warp) first_word += words[u];
    all_words += words[u], all_repairs += repairs[u];
  }
  first_word += all_repairs;
  const int used = all_words + all_repairs;
  if (used > MAX_TAIL) return;  // whoever reads pair_scan's totals refuses the matrix
  if (tid < -used % 4 + (used % 4 ? 4 : 0)) stream[used + tid] = 0;
  if (warp >= units) return;
  if (lane == 0) head[0] = first_word | (spacing - 1) << 24;
  if (tid == 0) ((uint32_t*)out)[2] = all_repairs, ((uint32_t*)out)[3] = 0;
  for (int i = lane; i < words[warp]; i += 32) stream[first_word + i] = buffer[warp][i];
  int at[2] = {place[0], place[LOWER]};
  uint32_t sm[4] = {0, 0, 0, 0};
  each_pair(mine, codes, filler, [&](int j, int p, uint32_t w0, uint32_t w1, uint32_t, bool repair0, bool repair1) {
    const int h = p & 1;
    // Under a repair lies a value of the weight's sign, below 2^-126 but not zero: zero times infinity would be NaN.
    const auto half = [](uint32_t w, bool repaired) { return (w & 0x8000) | (repaired ? 1 : w & 0x7F); };
    sm[p / 2] |= sign_and_mantissa(half(w0, repair0), p, 0) | sign_and_mantissa(half(w1, repair1), p, 1);
    const uint32_t place = (warp * UNIT_COLS + 32 * j + 8 * t + (p & ~1)) << 4 | (g + 8 * h);
    if (repair0) stream[at[h]++] = w0 << 16 | place;
    if (repair1) stream[at[h]++] = w1 << 16 | (place + 16);
    if (p == 7) {
      ((uint4*)(bytes + warp * Pair::UNIT_BYTES))[32 * j + lane] = make_uint4(sm[0], sm[1], sm[2], sm[3]);
      sm[0] = sm[1] = sm[2] = sm[3] = 0;
    }
  });
}

// Dense rows again. As many blocks as fit, each takes every gridDim.x-th of `stages` stages (tiles tile0 ...); out's
// first row is row 16 tile0. Dynamic shared memory: TABLE_BYTES + 2 * slot_bytes, of which each is room for the longest
// header and tail. While a stage is decoded the next one is on its way.
extern "C" __global__ void __launch_bounds__(256, 3)
    pair_decode(const uint8_t* weights, const uint32_t* offsets, const uint32_t* table, uint16_t* out, int rows,
                int cols, int stride, int tile0, int stages, int slot_bytes) {
  if (rows % TILE_ROWS == 0 && cols % UNIT_COLS == 0 && ((size_t)out & 15) == 0 && stride % 8 == 0)
    decode_pairs<true>(weights, offsets, table, out, rows, cols, stride, tile0, stages, slot_bytes);
  else
    decode_pairs<false>(weights, offsets, table, out, rows, cols, stride, tile0, stages, slot_bytes);
}

// Row ids[i] to row i of out; an id outside the table gives zeros. Grid: ids, stages; block and shared memory as above.
extern "C" __global__ void __launch_bounds__(256)
    pair_ids(const uint8_t* weights, const uint32_t* offsets, const uint32_t* table, const uint32_t* ids, uint16_t* out,
             int rows, int cols, int stride) {
  extern __shared__ __align__(128) uint8_t memory[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const Shape<Pair> shape(rows, cols);
  const uint32_t table_at = shared_address(memory), at = table_at + TABLE_BYTES, id = ids[blockIdx.x];
  const int number = blockIdx.y, tile = (int)(id / TILE_ROWS), row = (int)(id % TILE_ROWS),
            units = shape.units_of(number), left = number * Pair::UNITS * UNIT_COLS;
  uint16_t* const line = out + (size_t)blockIdx.x * stride;
  if (id >= (uint32_t)rows) {
    for (int k = left + tid; k < min(cols, left + Pair::UNITS * UNIT_COLS); k += 256) line[k] = 0;
    return;
  }
  copy_stage(at, weights, offsets + (size_t)tile * shape.stages + number, tid);
  Table<256>(table, tid).store(table_at, tid);
  async_wait<0>();
  __syncthreads();
  if (warp >= units) return;
  const PairStage stage(at, units);
  stage.decode(table_at, warp, lane, [&](int j, const uint32_t (&a)[8]) {
    const int k = left + warp * UNIT_COLS + 32 * j + t * 8;
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (k + e < cols && g == (row & 7))
        line[k + e] = (uint16_t)((row & 8 ? a[2 * (e / 2) + 1] : a[2 * (e / 2)]) >> 16 * (e & 1));
  });
  stage.repair(warp, lane, [&](int r, int k, uint16_t value) {
    if (r == row) line[left + k] = value;
  });
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1) pair_product_8(const __grid_constant__ PairProduct p) {
  pair_product<1>(p);
}
extern "C" __global__ void __launch_bounds__(BLOCK, 1) pair_product_16(const __grid_constant__ PairProduct p) {
  pair_product<2>(p);
}

// Activations of kquant_few.cuh: f16 in shared memory, and the sums of their groups.
//
// Layout       row by row. Of odd rows the halves of each 128 bytes have changed places, so that eight lanes, which read
//              16 bytes each of two rows, meet no bank twice. With groups of 16, 16 bytes hold four columns of each of a
//              vector's two groups. Rows past the last hold anything: what comes of them is dropped.
// Copies       rows come as they are, by bulk copies, two for each warp: loads by threads take twice as long, copies of a
//              stage each 0.3 us longer. Warps have a row, or with up to eight rows half of one, wait for its columns only,
//              and turn them in place.
// Conversion   a product with the unit matrix makes bf16 f32, of which one instruction packs two: 3 for four values, not 6.
// Sums         of 32 columns are a product with ones: a lane's 8 columns are words of the A operand's rows g and g+8.
// Range        the largest magnitudes of rows are known when all are turned. Where one does not suit f16, or rows lie badly
//              in memory, all is done again, slowly, from memory.
//
// Budget       16 rows of 4096 columns (H200, by leaving parts out): 1.2 us for the copies, 0.5 for reading and writing
//              what came, 0.25 to convert, 0.2 for sums, 0.1 for magnitudes.
#pragma once
#include "kquant.cuh"
#include "ring.cuh"

namespace taper {

constexpr int FEW_THREADS = 512;
// Largest magnitudes of rows and what undoes their scales, 64 bytes each; two barriers for each warp.
constexpr int FEW_ROW_BYTES = 64 + 64 + 2 * 8 * (FEW_THREADS / 32);

// Sums of groups of a unit, for eight rows of activations.
template <class L>
__host__ __device__ constexpr int few_group_bytes() {
  return L::GROUP == 128 ? 32 : L::GROUP == 16 ? 256 : 128;
}

// The larger magnitudes of pairs of f16; NaN is the largest.
__device__ __forceinline__ uint32_t larger_halves(uint32_t most, uint32_t pair) {
  asm("{.reg .b32 m; abs.f16x2 m, %1; max.NaN.f16x2 %0, %0, m;}" : "+r"(most) : "r"(pair));
  return most;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A warp's part of them: init() before the block's first barrier, arrange() when the previous kernel has ended.
template <class L, int NB>
struct FewRows {
  static constexpr int ROW_WARPS = 2 / NB, BATCH = 4, PAIR_CHUNKS = 2 * UNIT_COLS / 8, PAIR_BYTES = 16 * PAIR_CHUNKS;

  const Product& p;
  const Part<L>& part;
  uint32_t most, ups, bars, row_at, table;
  int row, lane, units, chunks, begin, end;  // chunks: of eight columns of x; begin, end: the warp's pairs of units
  bool leads;                                // one thread of those that have the row

  __device__ __forceinline__ FewRows(const Product& p_, const Part<L>& part_, uint32_t at, uint32_t xs, uint32_t table_,
                                     int tid)
      : p(p_), part(part_), most(at), ups(at + 64), bars(at + 128 + tid / 32 * 16), table(table_) {
    const int warp = tid / 32;
    units = part.width() / UNIT_COLS;
    chunks = min(part.width(), p.cols - part.first_col()) / 8;
    const int pairs = (units + 1) / 2;
    lane = tid & 31, row = warp / ROW_WARPS, leads = lane == 0 && warp % ROW_WARPS == 0,
    begin = pairs * (warp % ROW_WARPS) / ROW_WARPS, end = pairs * (warp % ROW_WARPS + 1) / ROW_WARPS;
    row_at = xs + row * stride();
  }
  __device__ __forceinline__ int stride() const { return (units + 1) / 2 * PAIR_BYTES; }
  // Of the warp's pairs one barrier is for those before `middle`, one for the others.
  __device__ __forceinline__ int middle() const {
    return min(begin + (end - begin + 2 * BATCH - 1) / (2 * BATCH) * BATCH, end);
  }
  __device__ __forceinline__ int bytes(int from, int to) const {
    return (min(to * PAIR_CHUNKS, chunks) - min(from * PAIR_CHUNKS, chunks)) * 16;
  }
  __device__ __forceinline__ void init(int tid) const {
    if (tid < 16) sts32(most + 4 * tid, 0), sts_float(ups + 4 * tid, 1);
    if (tid < FEW_THREADS && lane == 0) {
      mbarrier_init(bars, 1), mbarrier_init(bars + 8, 1);
      mbarrier_init_fence();
      mbarrier_expect(bars, bytes(begin, middle())), mbarrier_expect(bars + 8, bytes(middle(), end));
    }
  }
  __device__ __forceinline__ void fetch() const {
    const uint16_t* const from = (const uint16_t*)p.x + (size_t)row * p.x_stride + part.first_col();
    const auto copy = [&](int first, int last, uint32_t bar) {
      if (const int count = bytes(first, last))
        bulk_copy(row_at + first * PAIR_BYTES, from + first * (2 * UNIT_COLS), count, bar);
    };
    copy(begin, middle(), bars), copy(middle(), end, bars + 8);
  }

  // Eight columns to their place of the pair's 512 bytes `at`; `c` counts 16 bytes.
  __device__ __forceinline__ void put(uint32_t at, int c, const uint4& b) const {
    const uint32_t swap = (row & 1) * 64;
    if constexpr (L::GROUP == 16) {
      const uint32_t to = at + ((c & ~3) * 16 ^ swap) + (c & 1) * 32 + (c >> 1 & 1) * 8;
      sts64(to, b.x, b.y), sts64(to + 16, b.z, b.w);
    } else {
      sts128(at + (c * 16 ^ swap), b);
    }
  }
  // The sums of a lane's groups of columns, which four lanes share.
  struct Sums {
    float of[2];
  };
  template <int TYPE>
  __device__ __forceinline__ Sums sums_of(const uint4& b) const {
    // With groups of 16, even columns of the result are for lanes 0 and 1 of four, odd ones for 2 and 3.
    const bool on = L::GROUP != 16 || (lane >> 1 & 1) == (lane >> 2 & 1);
    float sum[4] = {};
    if (TYPE == F16) {
      const uint32_t ones = on ? 0x3C003C00u : 0;
      mma_f16(sum, b.x, b.y, b.z, b.w, ones, ones);
    } else {
      const uint32_t ones = on ? TWO_1 : 0;
      mma(sum, b.x, b.y, b.z, b.w, ones, ones);
    }
    return {sum[0] + sum[2], sum[1] + sum[3]};
  }
  // Of pair `pair`. One lane of four has to; `mine` says which.
  __device__ __forceinline__ void store_sums(int pair, Sums s, bool mine) const {
    const int g = lane >> 2, nb = row >> 3, r = row & 7;
    const auto halves = [](float sum) {
      const uint32_t high = float_to_half(sum);
      return high | float_to_half(sum - half_to_float(high)) << 16;
    };
    if constexpr (L::GROUP == 128) {
      s.of[0] += __shfl_xor_sync(~0u, s.of[0], 4), s.of[0] += __shfl_xor_sync(~0u, s.of[0], 8);
      if (mine && (g & 3) == 0) sts_float(table + ((2 * pair + (g >> 2)) * NB + nb) * 32 + r * 4, s.of[0]);
    } else if constexpr (L::GROUP == 16) {
      // Group 2g + e of the pair: in its unit group t' + 4 set.
      if (mine)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int in = (2 * g + e) & 7;
          sts32(table + ((2 * pair + (g >> 2)) * NB + nb) * 256 + (4 * r + (in & 3)) * 8 + (in >> 2) * 4,
                halves(s.of[e]));
        }
    } else {
      if (mine) sts32(table + (pair * NB + nb) * 256 + (4 * r + (g & 3)) * 8 + (g >> 2) * 4, halves(s.of[0]));
    }
  }

  // What the warp has of its row as f16; largest magnitudes of two halves.
  template <int TYPE>
  __device__ __forceinline__ uint32_t turn() const {
    const int g = lane >> 2, t = lane & 3;
    const uint32_t unit_matrix = g >> 1 == t ? g & 1 ? 0x3F800000u : 0x3F80u : 0;
    uint32_t largest = 0, any = 0;
#pragma unroll 1
    for (int first = begin; first < end; first += BATCH) {
      if (first == begin) mbarrier_wait(bars, 0);
      if (first == middle()) mbarrier_wait(bars + 8, 0);
      const uint32_t at = row_at + first * PAIR_BYTES;
      // Of the warp's columns from the lane's first on, so many chunks are there, and so many units.
      const int there = min(end * PAIR_CHUNKS, chunks) - first * PAIR_CHUNKS - lane,
                room = min(2 * end, units) - 2 * first - (lane >> 4);
      uint4 b[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        b[i] = make_uint4(0, 0, 0, 0);
        if (i * PAIR_CHUNKS < there) b[i] = lds128(at + i * PAIR_BYTES + lane * 16);
      }
      __syncwarp();
      Sums sums = {};
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        any |= b[i].x | b[i].y | b[i].z | b[i].w;
        const Sums of = sums_of<TYPE>(b[i]);
        if (t == i) sums = of;
        if (TYPE == BF16) {
          float f[2][4] = {};
          mma_half(f[0], b[i].x, b[i].y, unit_matrix), mma_half(f[1], b[i].z, b[i].w, unit_matrix);
          b[i] = make_uint4(pack_halves(f[0][0], f[0][1]), pack_halves(f[0][2], f[0][3]), pack_halves(f[1][0], f[1][1]),
                            pack_halves(f[1][2], f[1][3]));
        }
        largest = larger_halves(larger_halves(larger_halves(larger_halves(largest, b[i].x), b[i].y), b[i].z), b[i].w);
        if (2 * i < room) put(at + i * PAIR_BYTES, lane, b[i]);
      }
      store_sums(first + t, sums, first + t < end);
    }
    const uint32_t bits = max(largest & 0xFFFF, largest >> 16);
    return bits == 0 && any & 0x7FFF7FFFu ? 1 : bits;
  }

  // From memory, wherever it lies: the largest magnitude, as bits of its type, of the warp's columns; or these as f16,
  // times `up`.
  template <bool PUT>
  __device__ __forceinline__ uint32_t go_over(float up) const {
    const bool aligned = (((size_t)p.x | (size_t)(p.x_stride * 2)) & 15) == 0;
    uint32_t largest = 0;
#pragma unroll 1
    for (int pair = begin; pair < end; pair++) {
      const bool there = 2 * pair + (lane >> 4) < units;
      uint4 b = make_uint4(0, 0, 0, 0);
      if (there)
        b = load_eight((const uint16_t*)p.x + (size_t)row * p.x_stride, part.first_col() + pair * 256 + lane * 8,
                       p.cols, aligned);
      uint32_t* const w = &b.x;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (!PUT) {
          const uint32_t m = w[k] & 0x7FFF7FFFu;
          largest = max(largest, max(m & 0xFFFF, m >> 16));
        } else if (p.x_type == F16) {
          w[k] = pack_halves(half_to_float(w[k] & 0xFFFF) * up, half_to_float(w[k] >> 16) * up);
        } else {
          w[k] = pack_halves(__uint_as_float(w[k] << 16) * up, __uint_as_float(w[k] & 0xFFFF0000u) * up);
        }
      }
      if (!PUT) continue;
      store_sums(pair, sums_of<F16>(b), lane % 4 == 0);
      if (there) put(row_at + pair * PAIR_BYTES, lane, b);
    }
    return largest;
  }

  // Of the row's largest magnitude, what the warp has found.
  __device__ __forceinline__ void note(uint32_t bits) const {
    bits = __reduce_max_sync(~0u, bits);
    if (lane == 0) reds_max(most + 4 * row, bits);
  }
  // All of them, after the previous kernel's end; whether the bf16 parts are to be multiplied instead.
  __device__ __forceinline__ bool arrange(bool special) const {
    const bool own = row < p.batch, well = (((size_t)p.x | (size_t)(p.x_stride * 2)) & 15) == 0 && p.cols % 8 == 0;
    if (well && own) {
      if (lane == 0) fetch();
      note(p.x_type == F16 ? turn<F16>() : turn<BF16>());
    }
    bar_sync<1, FEW_THREADS>();
    const uint32_t bits = lane < p.batch ? lds32(most + 4 * lane) : 0;
    const bool unfit = !well || __any_sync(~0u, bits && (bits < 0x1800 || bits >= 0x6400));  // 2^-9, 2^10
    return special || unfit && scale(own);
  }
  // The same from memory, each row times a power of two.
  __device__ __forceinline__ bool scale(bool own) const {
    bar_sync<1, FEW_THREADS>();
    if (leads) sts32(most + 4 * row, 0);
    bar_sync<1, FEW_THREADS>();
    if (own) note(go_over<false>(1));
    bar_sync<1, FEW_THREADS>();
    const auto largest = [&](int of) {
      const uint32_t bits = lds32(most + 4 * of);
      return p.x_type == F16 ? __float_as_uint(half_to_float(bits)) : bits << 16;
    };
    if (__any_sync(~0u, lane < p.batch && largest(lane) >= 0x60000000u)) return true;  // 2^65
    const uint32_t exponent = largest(row) ? max(largest(row) >> 23, 10u) : 136;
    if (own) go_over<true>(__uint_as_float((263 - exponent) << 23));
    if (leads) sts_float(ups + 4 * row, __uint_as_float((exponent - 9) << 23));
    bar_sync<1, FEW_THREADS>();
    return false;
  }
  // What undoes the scale of a row, for the end.
  __device__ __forceinline__ float undo(int m) const { return lds_float(ups + 4 * m); }
};
#endif

}  // namespace taper

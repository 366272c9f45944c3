// Layout `pair`: entropy-coded exponents, 10.9 bits a weight for a Gaussian, 11.1 with heavy tails.
//
// Two weights that share a register (neighbours in a row) share one code of at most 8 bits, so that a table of 256
// words decodes it:
//     entry   exponent of the first << 7 | of the second << 23 | length of the code: shift count and operand of the
//             joining LOP3 in one
// The pairs that are worth a code have one; of all others the exponents decode to zero and the weights are repairs. So
// the main product adds nothing for them that matters (a value below 2^-126 with the weight's own sign), and a repair
// is simply weight times activation, exact also for infinities. Exponent 255 is never in the table, exponent 0 needs no
// repair.
//
// Rows differ in scale, and one code serves the whole matrix: each row is first divided by a power of two, 0 to 15,
// that brings it near the others. Exponents from 1 to 254 are lowered by it, to no less than it; zeros stay what they
// are, and rows with other weights below 2^-126 are left alone. Products multiply a row's sum by its power, decoders
// add it to the exponents.
//
//   stage   n <= 8 units of one tile (unit.cuh)
//           2 x u32          the tile's row shifts, 4 bits each, first row lowest
//           2 x u32          number of repairs, 0
//           n x 32 bytes     first word of `tail` | (A - 1) << 24, A: the bits between lanes; then d of each lane, 6
//           bits,
//                            signed: five lanes a word, lowest first
//           n x 2048 bytes   signs and mantissas (unit.cuh)
//           tail             repairs, sorted by row: shifted value as bf16 << 16 | column in the stage << 4 | row;
//                            then each unit's words: lane i's codes start at bit i A + 2 d[i], least significant bit
//                            first, 32 pairs: j, then p
// Stages are padded to 16 bytes; stage i of the matrix (tile by tile) is at 16 * offsets[i], offsets[tiles * stages] is
// the end.
//
// A tail of more than 4095 words cannot be: such a matrix (most of its weights repairs) needs another layout, and its
// stages would not fit a ring anyway.
//
// Budget per pair: LOP3 + LDS to look up, SHF to go on, IADD for the bits used, LOP3 and half a PRMT to join: 5.5
// and 1.5 for windows and refills. The table is there once for each lane (32 KB), so that look-ups never meet in a
// bank. A look-up chain is long: each warp runs four units at once, 32 chains an SM.
#pragma once
#include "sums.cuh"

namespace taper {

struct Pair {
  static constexpr int UNITS = 8, GROUP = 4;            // units that a warp decodes at once
  static constexpr int UNIT_BYTES = 2048, TRAILER = 0;  // of Shape only counts are used
};
constexpr int TABLE_BYTES = 256 * 128;
constexpr int MOST_SHIFT = 15;                                    // of a row
constexpr int PAIR_BITS = 256, MAX_WORDS = 265, MAX_TAIL = 4095;  // bits of a lane, words of a unit, of a tail at most

constexpr int STAGE_HEAD = 16, UNIT_HEAD = 32, LANES_A_WORD = 5, START_BITS = 6;
__host__ __device__ constexpr int pair_header_bytes(int units) { return STAGE_HEAD + units * UNIT_HEAD; }
__device__ __forceinline__ uint32_t pair_repairs(uint32_t stage) { return lds32(stage + 8); }

// Shifts of the rows that a lane has.
struct RowShifts {
  uint32_t top, bottom;  // of rows g and g + 8
  __device__ __forceinline__ RowShifts(uint32_t stage, int lane) {
    const uint2 all = lds64(stage);
    top = all.x >> (lane & ~3) & 15, bottom = all.y >> (lane & ~3) & 15;
  }
};
__device__ __forceinline__ float power_of_two(uint32_t n) { return __uint_as_float((127 + n) << 23); }
// An entry's exponents back to what they were: zero stays zero, all others are `shift` at least.
__device__ __forceinline__ uint32_t shift_back(uint32_t entry, uint32_t shift) {
  return entry + __vminu2(entry, shift * 0x00800080u);
}
// The same for a repair's value, which is not shifted if it is not finite.
__device__ __forceinline__ uint16_t repair_value(uint32_t stage, uint32_t repair) {
  const uint32_t value = repair >> 16, shift = lds32(stage + (repair >> 1 & 4)) >> 4 * (repair & 7) & 15;
  return (uint16_t)((value & 0x7F80) == 0x7F80 ? value : value + (shift << 7));
}

// The table on its way to shared memory, where entry i of lane l is at 128 i + 4 l.
template <int THREADS>
struct Table {
  static constexpr int N = 2048 / THREADS;
  uint32_t v[N];
  __device__ __forceinline__ Table(const uint32_t* table, int tid) {
#pragma unroll
    for (int q = 0; q < N; q++) v[q] = __ldg(table + (tid + q * THREADS) / 8);
  }
  __device__ __forceinline__ void store(uint32_t at, int tid) const {
#pragma unroll
    for (int q = 0; q < N; q++) sts128(at + (tid + q * THREADS) * 16, make_uint4(v[q], v[q], v[q], v[q]));
  }
};

// U units side by side: their places in the bit streams and the next three words of each. A look-up takes bits 7 to 14
// of a window, which are 128 times the code's index: so windows begin seven bits early.
template <int U>
struct PairStreams {
  uint32_t bit[U], at[U], w0[U], w1[U], w2[U];
  // `head`: the unit's, `tail`: the stage's.
  __device__ __forceinline__ void start(int u, uint32_t head, uint32_t tail, int lane) {
    const uint32_t word = lds32(head), starts = lds32(head + 4 + lane / LANES_A_WORD * 4);
    const int d = (int)(starts << (32 - START_BITS - lane % LANES_A_WORD * START_BITS)) >> (32 - START_BITS),
              first = (int)(word >> 24) * lane + (2 * d + (lane - 7));
    bit[u] = first;
    at[u] = tail + (word & 0xFFFF) * 4 + (first >> 5) * 4;
    w0[u] = lds32(at[u]), w1[u] = lds32(at[u] + 4), w2[u] = lds32(at[u] + 8);
  }
  // Four codes of every unit, at most 32 bits. Shifts are by the low 5 bits of an entry: the length.
  __device__ __forceinline__ void next(uint32_t table, uint32_t lane4, uint32_t (&entry)[U][4]) {
    uint32_t window[U], later[U];
#pragma unroll
    for (int u = 0; u < U; u++)
      window[u] = __funnelshift_r(w0[u], w1[u], bit[u]), later[u] = __funnelshift_r(w1[u], w2[u], bit[u]);
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
      for (int u = 0; u < U; u++) entry[u][r] = lds32(((window[u] & 0x7F80) | lane4) + table);
      if (r < 3) {
#pragma unroll
        for (int u = 0; u < U; u++) window[u] = __funnelshift_r(window[u], r == 0 ? later[u] : 0, entry[u][r]);
      }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      // Only the low 6 bits of `bit` are used from here on, so the exponents in the entries may be added too.
      const uint32_t before = bit[u];
      bit[u] = bit[u] + entry[u][0] + entry[u][1];
      bit[u] = bit[u] + entry[u][2] + entry[u][3];
      if (U == 1) {
        if ((bit[u] ^ before) & 32) {
          w0[u] = w1[u], w1[u] = w2[u];
          w2[u] = lds32(at[u] + 12);
          at[u] += 4;
        }
        continue;
      }
      // In PTX: from the above the compiler makes a load to another register and a move from there. (For decoders,
      // short of registers, it does better.) blockDim.y is 1; the multiplier has nothing else to do.
      asm volatile(
          "{.reg .pred p; .reg .b32 c; and.b32 c, %4, 32; setp.ne.u32 p, c, 0; @p mov.b32 %0, %1; @p mov.b32 %1, %2; "
          "@p ld.shared.u32 %2, [%3 + 12]; @p mad.lo.u32 %3, %5, 4, %3;}"
          : "+r"(w0[u]), "+r"(w1[u]), "+r"(w2[u]), "+r"(at[u])
          : "r"(bit[u] ^ before), "r"(blockDim.y)
          : "memory");
    }
  }
};

__device__ __forceinline__ void shift_back4(uint32_t (&entry)[4], const RowShifts& shifts) {
#pragma unroll
  for (int p = 0; p < 4; p++) entry[p] = shift_back(entry[p], p & 1 ? shifts.bottom : shifts.top);
}
// Registers 4 h .. 4 h + 3 of a vector from half its bytes and four entries.
__device__ __forceinline__ void join4(uint32_t (&a)[4], uint32_t s0, uint32_t s1, const uint32_t (&entry)[4]) {
  a[0] = join(s0, entry[0]), a[1] = join(swap_bytes(s0), entry[1]);
  a[2] = join(s1, entry[2]), a[3] = join(swap_bytes(s1), entry[3]);
}

}  // namespace taper

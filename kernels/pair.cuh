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
//   stage   n <= 8 units of one tile (unit.cuh)
//           n x u32          first word | (A - 1) << 12 | repairs << 20 (words of `tail`; A: the bits between lanes)
//           n x 32 bytes     d (i8) of each lane; padded to 16 bytes
//           n x 2048 bytes   sign and mantissa as in `fixed`
//           tail             repairs of all units in their order: value as bf16 << 16 | column in the stage << 4 | row;
//                            then each unit's words: lane i's codes start at bit i A + 2 d[i], least significant bit
//                            first, 32 pairs: j, then p
// Stages are padded to 16 bytes; stage i of the matrix (tile by tile) is at 16 * offsets[i], offsets[tiles * stages] is
// the end.
//
// A tail of more than 4095 words cannot be: such a matrix (most of its weights repairs) needs another layout, and its
// stages would not fit a ring anyway.
//
// Budget per pair: PRMT + LDS to look up, SHF to go on, IADD for the bits used, PRMT + LOP3 to join: 7 with refills;
// 5.2 instructions a weight in all. The table is there once for each lane (32 KB), so that look-ups never meet in a
// bank. A look-up chain is long: each warp runs four units at once, 32 chains an SM.
#pragma once
#include "sums.cuh"

namespace taper {

struct Pair {
  static constexpr int UNITS = 8, GROUP = 4;            // units that a warp decodes at once
  static constexpr int UNIT_BYTES = 2048, TRAILER = 0;  // of Shape only counts are used
};
constexpr int TABLE_BYTES = 256 * 128;
constexpr int PAIR_BITS = 256, MAX_WORDS = 265, MAX_TAIL = 4095;  // bits of a lane, words of a unit, of a tail at most

__host__ __device__ constexpr int pair_header_bytes(int units) { return (units * 36 + 15) / 16 * 16; }

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

// U units side by side: their places in the bit streams and the next three words of each.
template <int U>
struct PairStreams {
  uint32_t bit[U], at[U], w0[U], w1[U], w2[U];
  __device__ __forceinline__ void start(int u, uint32_t tail, uint32_t head, int d, int lane) {
    bit[u] = ((head >> 12 & 255) + 1) * lane + 2 * d;
    at[u] = tail + (head & 4095) * 4 + (bit[u] >> 5) * 4;
    w0[u] = lds32(at[u]), w1[u] = lds32(at[u] + 4), w2[u] = lds32(at[u] + 8);
  }
  // Four codes of every unit, at most 32 bits.
  __device__ __forceinline__ void next(uint32_t table_of_lane, uint32_t by128, uint32_t (&entry)[U][4]) {
    uint32_t window[U];
#pragma unroll
    for (int u = 0; u < U; u++) window[u] = __funnelshift_r(w0[u], w1[u], bit[u]);
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
      for (int u = 0; u < U; u++) entry[u][r] = lds32((window[u] & 0xFF) * by128 + table_of_lane);
      if (r < 3) {
#pragma unroll
        for (int u = 0; u < U; u++)
          window[u] = __funnelshift_r(window[u], 0, entry[u][r]);  // by the low 5 bits: the length
      }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      // Only the low 6 bits of `bit` are used from here on, so the exponents in the entries may be added too.
      const uint32_t before = bit[u];
      bit[u] = bit[u] + entry[u][0] + entry[u][1];
      bit[u] = bit[u] + entry[u][2] + entry[u][3];
      if ((bit[u] ^ before) & 32) {
        w0[u] = w1[u], w1[u] = w2[u];
        w2[u] = lds32(at[u] + 12);
        at[u] += 4;
      }
    }
  }
};

__device__ __forceinline__ uint32_t join(uint32_t signs_and_mantissas, uint32_t exponents) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(signs_and_mantissas), "r"(exponents), "n"(0x807F807F));
  return d;
}
// Registers 4 h .. 4 h + 3 of a vector from half its bytes and four entries.
__device__ __forceinline__ void join4(uint32_t (&a)[4], uint32_t s0, uint32_t s1, const uint32_t (&entry)[4]) {
  a[0] = join(__byte_perm(s0, 0, 0x2200), entry[0]), a[1] = join(__byte_perm(s0, 0, 0x3311), entry[1]);
  a[2] = join(__byte_perm(s1, 0, 0x2200), entry[2]), a[3] = join(__byte_perm(s1, 0, 0x3311), entry[3]);
}
__device__ __forceinline__ int lds_s8(uint32_t a) { return (int8_t)lds8(a); }

}  // namespace taper

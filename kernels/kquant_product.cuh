// One unit of a layout with groups (kquant.cuh) times its activations, on tensor cores.
//
// Codes stay integers: put into the mantissa of a bf16 128 they are 128 + code, exactly. A group's products c are
// summed by themselves and scaled as f32; what is to be subtracted, (128 + zero) * scale + minimum for each activation,
// is left to two small products for the whole unit, of the scales and minima as integers with the sums X of each
// group's activations (Scales in kquant.cuh). Those are made once a launch, in three bf16 parts each. So nothing is
// rounded before the f32 sums, whatever the scales.
// Where something is not finite, or an activation is 2^65 or more, a block multiplies each weight as three bf16 parts
// instead, as activations.cuh has them: infinities and NaN are then those of the exact product. Activations are looked
// at when their groups are summed; of weights `overflow` says it, which repack_stage sets.
//
// Budget   warp-instructions for a unit of 2048 weights, Q4_K (SASS of sm_90a, loop and waits included): 188 for up to
//          8 columns (2.9 thread-instructions a weight), of them 60 for codes, 30 for scales, 15 for what is
//          subtracted, 12 products, 24 to scale; 232 for 16 columns; integers of 4 bits in groups of 128: 134 and 165.
//          At 4.5 bits and 3 TB/s there are 360 for each scheduler, and half of these go to a pipe that takes one in
//          two cycles: 16 warps hide what each waits for. One row of bf16 or f16, and a few on compute capability 9.0,
//          have kernels that take fewer: kquant_single.cuh and kquant_few.cuh.
#pragma once
#include "kquant.cuh"
#include "ring.cuh"

namespace taper {

// Vector j's weights, over the rows' scales, each in three bf16 parts as activations.cuh has them.
template <class L>
__device__ __forceinline__ void exact_parts(const typename L::S& scales, uint32_t at, int lane, int j,
                                            const float (&inverse)[2], uint32_t (&exact)[3][8]) {
  uint32_t a[8];
  L::C::expand(L::C::load(at, lane, j), TWO_128, a);
#pragma unroll
  for (int p = 0; p < 8; p++) {
    float scale, min;
    scales.template of<true>(L::GROUP == 16 ? 2 * j + (p >> 2) : j, p & 1, scale, min);
    uint32_t lo[3], hi[3];
    split(L::value(__uint_as_float(a[p] << 16), scale, min) * inverse[p & 1], 3, lo);
    split(L::value(__uint_as_float(a[p] & 0xFFFF0000u), scale, min) * inverse[p & 1], 3, hi);
#pragma unroll
    for (int s = 0; s < 3; s++) exact[s][p] = __byte_perm(lo[s], hi[s], 0x7632);
  }
}

// c += unit * activations with such weights: where something is not finite.
template <class L, int NB, class X>
__device__ __forceinline__ void multiply_exactly(uint32_t at, uint32_t trailer, int u, int lane, float (&c)[NB][4],
                                                 X x) {
  typename L::S scales;
  scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
#pragma unroll 1
  for (int j = 0; j < 4; j++) {
    uint32_t exact[3][8];
    exact_parts<L>(scales, at, lane, j, {1, 1}, exact);
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint4 b = x(j, nb);
#pragma unroll
      for (int s = 0; s < 3; s++) {
        mma(c[nb], exact[s][0], exact[s][1], exact[s][2], exact[s][3], b.x, b.y);
        mma(c[nb], exact[s][4], exact[s][5], exact[s][6], exact[s][7], b.z, b.w);
      }
    }
  }
}

// ---- sums of groups of activations ----
// For each unit and column of activations: the sums of its groups, each in three bf16 parts, as the B fragments that
// lifts and minima (kquant.cuh) are multiplied with: lane t's are those of group t, 8 bytes, and with groups of 16
// those of group t + 4 behind them. One group a unit has but one sum.

// Whether an activation in b is not finite or so large that sums might not be: 2^65 or more.
__device__ __forceinline__ uint32_t large_bits(const uint4& b) {
  return ((b.x & b.x << 1) | (b.y & b.y << 1) | (b.z & b.z << 1) | (b.w & b.w << 1)) & 0x40004000u;
}
// d[part] += the sums of vector j's columns, of each group that is in it.
template <class L>
__device__ __forceinline__ void add_columns(float (&d)[L::GROUP == 16 ? 2 : 1][4], const uint4& b) {
  mma(d[0], TWO_1, TWO_1, TWO_1, TWO_1, b.x, b.y);
  mma(d[L::GROUP == 16], TWO_1, TWO_1, TWO_1, TWO_1, b.z, b.w);
}
// What add_columns gave for the four vectors of eight columns of activations, whose entries are at `at`; `count` of
// them are to be stored. Every lane has the sums of columns 2t and 2t+1, and stores vector g/2's of one.
template <class L>
__device__ __forceinline__ void store_sums(uint32_t at, int count, const float (&d)[4][L::GROUP == 16 ? 2 : 1][4],
                                           int lane) {
  const int g = lane >> 2, column = 2 * (lane & 3) + (g & 1);
#pragma unroll
  for (int part = 0; part < (L::GROUP == 16 ? 2 : 1); part++) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float of_j = g & 1 ? d[j][part][1] : d[j][part][0];
      if (L::GROUP == 128)
        sum += of_j;
      else if (g >> 1 == j)
        sum = of_j;
    }
    uint32_t parts[3];
    cut_in_three(L::S::AWAY_IN_SUMS ? -(L::MAGIC + L::ZERO) * sum : sum, parts);
    const uint32_t entry = at + column * group_sums_bytes<L>();
    const int group = L::GROUP == 16 ? 2 * (g >> 1) + part : g >> 1;
    if (column < count && (L::GROUP != 128 || g < 2))
      sts64(entry + (L::GROUP == 16    ? 16 * (group & 3) + 8 * (group >> 2)
                     : L::GROUP == 128 ? 0
                                       : 8 * group),
            __byte_perm(parts[0], parts[1], 0x7632), parts[2] >> 16);
  }
}
// The entries of `units` units, by unit, then column, made by THREADS threads from activations in shared memory. True
// if one of this lane's is large.
template <class L, int THREADS>
__device__ __forceinline__ bool sum_groups(uint32_t table, uint32_t xs, int stride, int columns, int units, int tid) {
  const int lane = tid & 31, total = columns * units;
  uint32_t large = 0;
  for (int first = tid / 32 * 8; first < total; first += THREADS / 4) {
    const int entry = min(first + (lane >> 2), total - 1), unit = entry / columns;
    const uint32_t at = xs + (entry - unit * columns) * stride + unit * (UNIT_COLS * 2) + (lane & 3) * lane_bytes<L>();
    float d[4][L::GROUP == 16 ? 2 : 1][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint4 b = lds_fragment<L>(at + 64 * j);
      large |= large_bits(b);
      if (L::AWAY) add_columns<L>(d[j], b);
    }
    if (L::AWAY) store_sums<L>(table + first * group_sums_bytes<L>(), total - first, d, lane);
  }
  return large != 0;
}
// A lane's fragment of such an entry.
template <class L>
__device__ __forceinline__ uint4 lds_sums(uint32_t entry, int t) {
  if constexpr (L::GROUP == 16) return lds128(entry + 16 * t);
  const uint2 b = lds64(L::GROUP == 128 ? entry : entry + 8 * t);
  return make_uint4(b.x, b.y, 0, 0);
}

// ---- products ----
// What a lane needs of a unit, in registers.
template <class L>
struct GroupUnit {
  typename L::C::Raw raw[4];
  typename L::S scales;
  __device__ __forceinline__ void load(uint32_t at, uint32_t trailer, int u, int lane) {
#pragma unroll
    for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j);
    scales.load(at + L::C::BYTES, trailer, u, lane >> 2);
  }
  // Without the factors of rows.
  __device__ __forceinline__ void load(uint32_t at, int lane, int g) {
#pragma unroll
    for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j);
    scales.load_groups(at + L::C::BYTES, g);
  }
  // Of the scales only those of the lane's own groups, and without the factors of rows (Scales::lane in kquant.cuh).
  __device__ __forceinline__ void load_lane(uint32_t at, int lane, int g) {
#pragma unroll
    for (int j = 0; j < 4; j++) raw[j] = L::C::load(at, lane, j);
    scales.load_lane(at + L::C::BYTES, g, lane & 3);
  }
};

// c += what a unit adds up to, given `sum`: that of its groups' products, scaled but for the factors of rows. It lacks
// what is to be subtracted: `sums(nb)`, as lds_sums gives them, times lifts and minima.
template <class L, int NB, class Sums>
__device__ __forceinline__ void finish_groups(const typename L::S& scales, const Constants& k, float (&c)[NB][4],
                                              float (&sum)[NB][4], Sums sums) {
  using S = typename L::S;
  if constexpr (L::AWAY) {
    constexpr int SETS = L::GROUP == 16 ? 2 : 1;
    uint4 b[NB];
#pragma unroll
    for (int nb = 0; nb < NB; nb++) b[nb] = sums(nb);
    const auto add = [&](float (&to)[NB][4], const uint32_t (&a)[2], int set) {
#pragma unroll
      for (int nb = 0; nb < NB; nb++) {
        mma_half(to[nb], a[0], a[1], set ? b[nb].z : b[nb].x);
        mma_half(to[nb], a[0], a[1], set ? b[nb].w : b[nb].y);
      }
    };
#pragma unroll
    for (int set = 0; set < SETS; set++)
#pragma unroll
      for (int n = 0; n < S::LIFTS; n++) {
        uint32_t a[2];
        scales.template lift<L::MAGIC + L::ZERO>(n, set, k, a);
        add(sum, a, set);
      }
    if constexpr (S::MIN_SUMS) {
      float mins[NB][4] = {};
#pragma unroll
      for (int set = 0; set < SETS; set++) {
        uint32_t a[2];
        scales.min(set, k, a);
        add(mins, a, set);
      }
#pragma unroll
      for (int i = 0; i < NB * 4; i++)
        c[i / 4][i % 4] = fmaf(-scales.row_min(i >> 1 & 1), mins[i / 4][i % 4], c[i / 4][i % 4]);
    }
  }
#pragma unroll
  for (int i = 0; i < NB * 4; i++) c[i / 4][i % 4] = fmaf(scales.row(i >> 1 & 1), sum[i / 4][i % 4], c[i / 4][i % 4]);
}

// c += unit * activations; x(j, nb) is the B fragment of vector j and columns 8 nb to 8 nb + 7.
template <class L, int NB, class X, class Sums>
__device__ __forceinline__ void multiply_groups(const GroupUnit<L>& unit, const Constants& k, float (&c)[NB][4], X x,
                                                Sums sums) {
  constexpr int PARTS = L::GROUP == 16 ? 2 : 1;  // groups in a vector
  float sum[NB][4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    L::C::expand(unit.raw[j], k.two_128, a);
    float scale[PARTS][2];
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int group = PARTS * j + part;
        scale[part][h] = unit.scales.scale(group >= 4, k.choose(group & 3), h, k);
      }
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint4 b = x(j, nb);
      float d[PARTS][4] = {};
      mma(d[0], a[0], a[1], a[2], a[3], b.x, b.y);
      mma(d[PARTS - 1], a[4], a[5], a[6], a[7], b.z, b.w);
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          sum[nb][i] = j + part ? fmaf(scale[part][i >> 1], d[part][i], sum[nb][i]) : scale[part][i >> 1] * d[part][i];
    }
  }
  finish_groups<L, NB>(unit.scales, k, c, sum, sums);
}

// a[p]: code - zero of vector j as two bf16, exactly, in a layout with one group for each row of a unit.
template <class L>
__device__ __forceinline__ void integers(const typename L::C::Raw& raw, const typename L::S& scales, uint32_t magic,
                                         uint32_t (&a)[8]) {
  L::C::expand(raw, magic, a);
#pragma unroll
  for (int p = 0; p < 8; p++) a[p] = fma_bf16x2(a[p], TWO_1, scales.away(p & 1));
}

// c += unit * activations in such a layout: what the whole unit adds up to, and what its zeros take away, is scaled
// once.
template <class L, int NB, class X, class Sums>
__device__ __forceinline__ void multiply_integers(const GroupUnit<L>& unit, const Constants& k, float (&c)[NB][4], X x,
                                                  Sums sums) {
  constexpr int SUMS = NB > 4 ? 1 : 2;  // chains of products
  float d[SUMS][NB][4] = {};
  const uint32_t away[2] = {k.rows & 3 ? 0 : unit.scales.away(0), k.rows & 3 ? 0 : unit.scales.away(1)};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t a[8];
    L::C::expand(unit.raw[j], k.two_128, a);
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint4 b = x(j, nb);
      mma(d[0][nb], a[0], a[1], a[2], a[3], b.x, b.y);
      mma(d[SUMS - 1][nb], a[4], a[5], a[6], a[7], b.z, b.w);
    }
  }
#pragma unroll
  for (int nb = 0; nb < NB; nb++) {
    const uint4 b = sums(nb);
    mma_half(d[0][nb], away[0], away[1], b.x);
    mma_half(d[SUMS - 1][nb], away[0], away[1], b.y);
  }
#pragma unroll
  for (int i = 0; i < NB * 4; i++) {
    const float sum = SUMS == 1 ? d[0][i / 4][i % 4] : d[0][i / 4][i % 4] + d[SUMS - 1][i / 4][i % 4];
    c[i / 4][i % 4] = fmaf(unit.scales.scale[i >> 1 & 1], sum, c[i / 4][i % 4]);
  }
}

// Either of them.
template <class L, int NB, class X, class Sums>
__device__ __forceinline__ void multiply(const GroupUnit<L>& unit, const Constants& k, float (&c)[NB][4], X x,
                                         Sums sums) {
  if constexpr (L::GROUP == 128)
    multiply_integers<L, NB>(unit, k, c, x, sums);
  else
    multiply_groups<L, NB>(unit, k, c, x, sums);
}

}  // namespace taper

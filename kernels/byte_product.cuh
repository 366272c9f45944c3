// Products of bytes on integer tensor cores, for layouts of small integers: a unit times the planes of its activations
// (planes.cuh). A group's sums of products are integers of 22 bits; each lane has the three planes' of the same weights
// and rows of x, joins them and scales them as f32.
#pragma once
#include "ring.cuh"

namespace taper {

// Up to 8 rows of x: three products, one with each plane of all. PAIR: up to two rows, whose planes are columns of one
// product, those of row m from column 4 m on; so lanes t = 2 m and 2 m + 1 share its sums.
template <class L, bool PAIR>
struct PlaneColumns {
  static constexpr int PRODUCTS = PAIR ? 1 : PLANES, OWN = PAIR ? 2 : 4;
  const Planes planes;
  uint32_t x_at[PRODUCTS];
  float factor[2];  // PAIR: of the lane's two planes
  float c[OWN] = {};

  // Rows past the last repeat it: their products are computed and dropped.
  __device__ PlaneColumns(const Planes& planes_, int batch, int lane) : planes(planes_) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < PRODUCTS; i++)
      x_at[i] = (PAIR ? planes.row(min(g >> 2, batch - 1)) + min(g & 3, PLANES - 1) * planes.stride
                      : planes.row(min(g, batch - 1)) + i * planes.stride) +
                t * 16;
    factor[0] = t & 1 ? 1 : 65536, factor[1] = t & 1 ? 0 : 256;
  }
  __device__ __forceinline__ void wait(int) const {}
  __device__ __forceinline__ void prefetch(int) {}
  // The row of x, and the half of the tile's rows, of sum c[i].
  __device__ __forceinline__ static int row_of(int i, int lane) {
    return PAIR ? (lane & 3) >> 1 : 2 * (lane & 3) + i % 2;
  }
  __device__ __forceinline__ static int half_of(int i) { return PAIR ? i : i >> 1; }
  // c += unit u of a stage, the slab's unit `unit`, whose first column is `col`.
  __device__ __forceinline__ void multiply(const Product& p, uint32_t at, uint32_t trailer, int u, int lane, int unit,
                                           int col) {
    // Lanes past the list look at the overflow count: one load and one vote settle both.
    const uint32_t entry = lds32(lane < ENTRIES ? trailer + 8 + L::EXTRA + 4 * lane : trailer);
    typename L::Unit weights;
    weights.load(at, trailer + 8, u, lane);
    const float unit_scale = L::unit_scale(trailer, u), byte_scale = unit_scale / L::SHIFTED;
    int d[PRODUCTS][4] = {};
#pragma unroll
    for (int two = 0; two < 2; two++) {
      uint4 b[PRODUCTS];
#pragma unroll
      for (int i = 0; i < PRODUCTS; i++) b[i] = lds128(x_at[i] + unit * PLANE_UNIT + 64 * two);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint32_t a[4];
        weights.bytes(2 * two + j, a);
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++)
          mma_s8(d[i], a[0], a[1], a[2], a[3], j ? b[i].z : b[i].x, j ? b[i].w : b[i].y);
      }
    }
    // The power of two first: it is exact, and nothing overflows that the exact product would not.
    if constexpr (PAIR) {
      const float s = lds_float(planes.scale(unit, row_of(0, lane)));
#pragma unroll
      for (int h = 0; h < 2; h++)
        c[h] = fmaf(byte_scale, s * fmaf(factor[0], d[0][2 * h], factor[1] * d[0][2 * h + 1]), c[h]);
    } else {
      const uint2 both = lds64(planes.scale(unit, row_of(0, lane)));
#pragma unroll
      for (int i = 0; i < 4; i++)
        c[i] = fmaf(byte_scale,
                    __uint_as_float(i % 2 ? both.y : both.x) * fmaf(65536.0f, d[0][i], fmaf(256.0f, d[1][i], d[2][i])),
                    c[i]);
    }
    const bool mine = lane < ENTRIES ? repairs_unit(entry, u) : entry != 0;
    if (__any_sync(~0u, mine)) repair(p, entry, trailer, u, lane, unit, col, unit_scale);
  }
  // Integers that are repairs are zero. What they add, one after the other, by the lanes that have their row.
  __device__ __forceinline__ void repair(const Product& p, uint32_t entry, uint32_t trailer, int u, int lane, int unit,
                                         int col, float unit_scale) {
    const uint32_t count = lds32(trailer), offset = lds32(trailer + 4);
    for (uint32_t first = 0; first < (count ? count : 32u); first += 32) {
      uint32_t mine = lane < ENTRIES ? entry : 0;
      if (count) mine = first + lane < count ? __ldg(p.overflow + offset + first + lane) : 0;
      for (uint32_t left = __ballot_sync(~0u, repairs_unit(mine, u)); left; left &= left - 1) {
        const Repair r(__shfl_sync(~0u, mine, __ffs(left) - 1));
        if (lane >> 2 != r.g || (PAIR && lane & 1)) continue;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
          const int m = row_of(i, lane);
          if (m < p.batch && half_of(i) == r.h) c[i] += unit_scale * r.value * activation(p, m, unit, col, r);
        }
      }
    }
  }
  struct Repair {  // see unit.cuh
    float value;
    int j, g, t, h, kk;
    __device__ __forceinline__ explicit Repair(uint32_t e) {
      value = __uint_as_float(e & 0xFFFF0000u);
      const int slot = e & 2047, p = (slot >> 8 & 1) * 4 + (slot >> 1 & 3);
      j = slot >> 9, g = slot >> 5 & 7, t = slot >> 3 & 3, h = p & 1, kk = 2 * (p >> 1) + (slot & 1);
    }
  };
  // What the repaired weight meets in row m. From 2^10 on planes have it exactly; what is less beside a larger value
  // may still be all that matters, if the weight is large.
  __device__ __forceinline__ float activation(const Product& p, int m, int unit, int col, const Repair& r) const {
    const uint32_t from =
        planes.row(m) + unit * PLANE_UNIT + 64 * (r.j / 2) + 16 * r.t + 8 * (r.j & 1) + place_in_plane(r.kk);
    const int n = (int)(int8_t)lds8(from) * 65536 + (int)(int8_t)lds8(from + planes.stride) * 256 +
                  (int)(int8_t)lds8(from + 2 * planes.stride);
    if (abs(n) >= 1024) return lds_float(planes.scale(unit, m)) * n;
    return load_value(p.x, (size_t)m * p.x_stride + col + 32 * r.j + 8 * r.t + r.kk, p.x_type);
  }
  // The tile's sums to mine[column][row] in shared memory; zero again.
  __device__ __forceinline__ void store(uint32_t mine, int columns, int lane) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int m = row_of(i, lane);
      if (PAIR) c[i] += __shfl_xor_sync(~0u, c[i], 1);
      if (m < columns && !(PAIR && lane & 1))
        sts_float(mine + (m * TILE_ROWS + (lane >> 2) + 8 * half_of(i)) * 4, c[i]);
      c[i] = 0;
    }
  }
};

}  // namespace taper

// Products of bytes on integer tensor cores, for layouts of small integers: a unit times the planes of its activations
// (planes.cuh). A group's sums of products are integers of 22 bits; each lane has the three planes' of the same weights
// and rows of x, joins them and scales them as f32.
#pragma once
#include "ring.cuh"

namespace taper {

// What `multiply` takes of 8 NB rows of x.
template <class L, int NB>
struct PlaneColumns {
  const Planes planes;
  uint32_t x_row[NB];
  float c[NB][4] = {};

  // Rows past the last repeat it: their products are computed and dropped.
  __device__ PlaneColumns(const Planes& planes_, int batch, int lane) : planes(planes_) {
#pragma unroll
    for (int nb = 0; nb < NB; nb++)
      x_row[nb] = planes.row(min(8 * nb + (lane >> 2), batch - 1)) + (lane & 3) * 16;
  }
  __device__ __forceinline__ void prefetch(int) {}
  // c += unit u of a stage, the slab's unit `unit`, whose first column is `col`.
  __device__ __forceinline__ void multiply(const Product& p, uint32_t at, uint32_t trailer, int u, int lane, int unit,
                                           int col) {
    // Lanes past the list look at the overflow count: one load and one vote settle both.
    const uint32_t entry = lds32(lane < ENTRIES ? trailer + 8 + L::EXTRA + 4 * lane : trailer);
    typename L::Unit weights;
    weights.load(at, trailer + 8, u, lane);
    const float unit_scale = L::unit_scale(trailer, u);
    int d[NB][PLANES][4] = {};
#pragma unroll
    for (int two = 0; two < 2; two++) {
      uint4 b[NB][PLANES];
#pragma unroll
      for (int i = 0; i < NB * PLANES; i++)
        b[i / PLANES][i % PLANES] =
            lds128(x_row[i / PLANES] + i % PLANES * planes.stride + unit * PLANE_UNIT + 64 * two);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint32_t a[4];
        weights.bytes(2 * two + j, a);
#pragma unroll
        for (int nb = 0; nb < NB; nb++)
#pragma unroll
          for (int q = 0; q < PLANES; q++)
            mma_s8(d[nb][q], a[0], a[1], a[2], a[3], j ? b[nb][q].z : b[nb][q].x, j ? b[nb][q].w : b[nb][q].y);
      }
    }
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
      const uint2 bits = lds64(planes.scale(unit, 8 * nb + 2 * (lane & 3)));
      const float scale[2] = {__uint_as_float(bits.x) * (unit_scale / L::SHIFTED),
                              __uint_as_float(bits.y) * (unit_scale / L::SHIFTED)};
#pragma unroll
      for (int i = 0; i < 4; i++)
        c[nb][i] = fmaf(scale[i & 1], fmaf(65536.0f, d[nb][0][i], fmaf(256.0f, d[nb][1][i], d[nb][2][i])), c[nb][i]);
    }
    const bool mine = lane < ENTRIES ? repairs_unit(entry, u) : entry != 0;
    if (__any_sync(~0u, mine)) repair(p, entry, trailer, u, lane, unit, col, unit_scale);
  }
  // Integers that are repairs are zero: what they add. One after the other, by the lanes that have their row.
  __device__ __forceinline__ void repair(const Product& p, uint32_t entry, uint32_t trailer, int u, int lane, int unit,
                                      int col, float unit_scale) {
    const uint32_t count = lds32(trailer), offset = lds32(trailer + 4);
    for (uint32_t first = 0; first < (count ? count : 32u); first += 32) {
      uint32_t mine = lane < ENTRIES ? entry : 0;
      if (count) mine = first + lane < count ? __ldg(p.overflow + offset + first + lane) : 0;
      for (uint32_t left = __ballot_sync(~0u, repairs_unit(mine, u)); left; left &= left - 1) {
        const uint32_t e = __shfl_sync(~0u, mine, __ffs(left) - 1);
        // The slot (unit.cuh): the lane whose weight it is, its register and half.
        const int j = e >> 9 & 3, to_lane = e >> 3 & 31, pair = (e >> 8 & 1) * 4 + (e >> 1 & 3), h = pair & 1,
                  t = to_lane & 3, kk = 2 * (pair >> 1) + (e & 1);
        if (lane >> 2 != to_lane >> 2) continue;
        const float value = __uint_as_float(e & 0xFFFF0000u);
        const bool finite = fabsf(value) < __uint_as_float(0x7F800000u);
#pragma unroll
        for (int i = 0; i < NB * 2; i++) {
          const int m = i / 2 * 8 + 2 * (lane & 3) + i % 2;
          if (m >= p.batch) continue;
          float x;
          if (finite) {
            const uint32_t from = planes.row(m) + unit * PLANE_UNIT + 64 * (j / 2) + 16 * t + 8 * (j & 1) +
                                  ((kk & 4) | (kk & 1) << 1 | (kk >> 1 & 1));
            const int n = (int)(int8_t)lds8(from) * 65536 + (int)(int8_t)lds8(from + planes.stride) * 256 +
                          (int)(int8_t)lds8(from + 2 * planes.stride);
            x = lds_float(planes.scale(unit, m)) * n;
          } else {  // only 0 gives NaN, not what is 0 beside larger values
            x = load_value(p.x, (size_t)m * p.x_stride + col + 32 * j + 8 * t + kk, p.x_type);
          }
          const float add = unit_scale * value * x;
          c[i / 2][i % 2] += h ? 0 : add, c[i / 2][2 + i % 2] += h ? add : 0;
        }
      }
    }
  }
  __device__ __forceinline__ float take(int nb, int i) {
    const float sum = c[nb][i];
    c[nb][i] = 0;
    return sum;
  }
};

}  // namespace taper

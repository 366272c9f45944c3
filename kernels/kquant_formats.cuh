// ggml's blocks as files have them, and those of 4-bit integers in groups of 128: what `repack` reads. The truth is
// src/codec/kquant/parts.rs; these are the same blocks, one code and one group at a time.
#pragma once
#include "kquant.cuh"

namespace taper {

__device__ __forceinline__ uint32_t half_at(const uint8_t* b, int at) { return b[at] | b[at + 1] << 8; }

// A block's group: `group` counts within the block.
struct Superblock {
  static constexpr int LEN = 256;
  const uint8_t* b;
  int group;
};
struct SixBits : Superblock {  // Q4_K, Q5_K: d, dmin, 12 bytes of scales and minima, ..
  __device__ uint32_t d() const { return half_at(b, 0); }
  __device__ uint32_t dmin() const { return half_at(b, 2); }
  __device__ uint32_t scale() const {
    const uint8_t* s = b + 4;
    return group < 4 ? s[group] & 63 : (s[4 + group] & 15) | s[group - 4] >> 6 << 4;
  }
  __device__ uint32_t min() const {
    const uint8_t* s = b + 4;
    return group < 4 ? s[4 + group] & 63 : s[4 + group] >> 4 | s[group] >> 6 << 4;
  }
};
struct Q4_K {
  static constexpr int BYTES = 144;
  using Group = SixBits;
  __device__ static int code(const uint8_t* b, int k) { return b[16 + k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15; }
};
struct Q5_K {
  static constexpr int BYTES = 176;
  using Group = SixBits;
  __device__ static int code(const uint8_t* b, int k) {
    return (b[48 + k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15) | (b[16 + k % 32] >> (k / 32) & 1) << 4;
  }
};
struct Q6_K {
  static constexpr int BYTES = 210;
  struct Group : Superblock {
    __device__ uint32_t d() const { return half_at(b, 208); }
    __device__ int scale() const { return (int8_t)b[192 + group]; }
  };
  __device__ static int code(const uint8_t* b, int k) {
    const int half = k / 128, i = k % 128;
    return (b[64 * half + i % 64] >> (i / 64 * 4) & 15) | (b[128 + 32 * half + i % 32] >> (i / 32 * 2) & 3) << 4;
  }
};
// Of each 32 bytes first the lowest two bits, then the next.
__device__ __forceinline__ int pair_at(const uint8_t* b, int k) {
  return b[k / 128 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3;
}
struct Q2_K {
  static constexpr int BYTES = 84;
  struct Group : Superblock {
    __device__ uint32_t d() const { return half_at(b, 80); }
    __device__ uint32_t dmin() const { return half_at(b, 82); }
    __device__ uint32_t scale() const { return b[group] & 15; }
    __device__ uint32_t min() const { return b[group] >> 4; }
  };
  __device__ static int code(const uint8_t* b, int k) { return pair_at(b + 16, k); }
};
struct Q3_K {
  static constexpr int BYTES = 110;
  struct Group : Superblock {
    __device__ uint32_t d() const { return half_at(b, 108); }
    __device__ int scale() const {
      const uint8_t* s = b + 96;
      return ((s[group % 8] >> (group / 8 * 4) & 15) | (s[8 + group % 4] >> (group / 4 * 2) & 3) << 4) - 32;
    }
  };
  __device__ static int code(const uint8_t* b, int k) { return pair_at(b + 32, k) | (b[k % 32] >> (k / 32) & 1) << 2; }
};

// Blocks of 32: d, perhaps the negated minimum, perhaps fifth bits, nibbles.
template <int BITS, bool MINS>
struct Block32 {
  static constexpr int CODES = BITS == 5 ? 4 + (MINS ? 4 : 2) : MINS ? 4 : 2, BYTES = CODES + (BITS == 8 ? 32 : 16);
  struct Group {
    static constexpr int LEN = 32;
    const uint8_t* b;
    int group;
    __device__ uint32_t d() const { return half_at(b, 0); }
    __device__ uint32_t dmin() const { return half_at(b, 2); }
  };
  __device__ static int code(const uint8_t* b, int k) {
    if (BITS == 8) return b[CODES + k] ^ 128;
    const int low = b[CODES + k % 16] >> (k / 16 * 4) & 15;
    return BITS == 5 ? low | (b[CODES - 4 + k / 8] >> (k % 8) & 1) << 4 : low;
  }
};

// 128 weights with one scale: d, the code that means zero, a byte of nothing, nibbles (those of the first 64 below).
struct Int4G128 {
  static constexpr int BYTES = 68;
  struct Group {
    static constexpr int LEN = 128;
    const uint8_t* b;
    int group;
    __device__ uint32_t d() const { return half_at(b, 0); }
    __device__ uint32_t zero() const { return b[2] & 31; }
  };
  __device__ static int code(const uint8_t* b, int k) { return b[4 + k % 64] >> (k / 64 * 4) & 15; }
};

using LayoutQ4K = KQuant<Q4_K, 4, Six>;
using LayoutQ5K = KQuant<Q5_K, 5, Six>;
using LayoutQ6K = KQuant<Q6_K, 6, SignedBytes, 32>;
using LayoutQ2K = KQuant<Q2_K, 2, Fours>;
using LayoutQ3K = KQuant<Q3_K, 3, SignedBytes, 4>;
using LayoutQ40 = KQuant<Block32<4, false>, 4, Halves<false>, 8>;
using LayoutQ41 = KQuant<Block32<4, true>, 4, Halves<true>>;
using LayoutQ50 = KQuant<Block32<5, false>, 5, Halves<false>, 16>;
using LayoutQ51 = KQuant<Block32<5, true>, 5, Halves<true>>;
using LayoutQ80 = KQuant<Block32<8, false>, 8, Halves<false>>;
using LayoutInt4G128 = KQuant<Int4G128, 4, Zeros>;

// Blocks of `rows` whole rows as the file has them, one row after another, to tiles. A block of 256 threads for each
// stage, a warp for each unit; `weights` points at the first tile of these rows. cols: whole blocks. *not_finite
// becomes 1 if a scale or minimum is infinite or none.
template <class L>
__device__ __forceinline__ void repack_stage(const uint8_t* blocks, int rows, int cols, uint8_t* weights,
                                             uint32_t* not_finite) {
  using F = typename L::Source;
  constexpr int LEN = F::Group::LEN;
  const int lane = threadIdx.x & 31, u = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const Shape<L> shape(rows, cols);
  const int stage = blockIdx.x % shape.stages, tile = blockIdx.x / shape.stages, units = shape.units_of(stage);
  uint8_t* out = weights + tile * shape.tile_bytes() + stage * Shape<L>::stage_bytes();
  const int first = (stage * L::UNITS + u) * UNIT_COLS;  // column
  const auto block_at = [&](int row, int col) {
    return blocks + ((size_t)(tile * TILE_ROWS + row) * (cols / LEN) + col / LEN) * F::BYTES;
  };
  const auto inside = [&](int row, int col) { return tile * TILE_ROWS + row < rows && col < cols; };
  if (u < units) {
    uint8_t* unit = out + u * L::UNIT_BYTES;
#pragma unroll 1
    for (int j = 0; j < 4; j++) {
      uint8_t codes[16];
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const int row = g + 8 * (i / 2 & 1), col = first + 32 * j + column_of<L::GROUP>(i / 2, t) + (i & 1);
        codes[i] = inside(row, col) ? F::code(block_at(row, col), col % LEN) : L::ZERO;
      }
      L::C::store(unit, lane, j, codes);
    }
    const uint8_t zeros[L::UNIT_BYTES > 0 ? 256 : 1] = {};
    if (lane < TILE_ROWS) {
      uint32_t odd = 0;
      L::S::store(unit + L::C::BYTES, out + units * L::UNIT_BYTES, u, lane, [&](int group) {
        const int col = first + group * L::GROUP;
        const typename F::Group of{inside(lane, col) ? block_at(lane, col) : zeros, col % LEN / L::GROUP};
        odd |= (of.d() & 0x7C00) == 0x7C00;
        if constexpr (L::MINS && LEN != 128) odd |= (of.dmin() & 0x7C00) == 0x7C00;
        return of;
      });
      if (odd) *not_finite = 1;
    }
  }
}

}  // namespace taper

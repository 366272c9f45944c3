// Matrices in ggml's block formats: random blocks, what they stand for, and the layouts of kernels/kquant.cuh.
#pragma once
#include "../../kernels/kquant.cu"
#include "../../kernels/kquant_small.cu"
#include "staged.cuh"

namespace bench {

// Where a format's f16 scales lie in a block, and whether the second is a minimum.
template <class F>
struct Floats;
template <>
struct Floats<Q4_K> {
  static constexpr int D = 0, DMIN = 2;
};
template <>
struct Floats<Q5_K> : Floats<Q4_K> {};
template <>
struct Floats<Q6_K> {
  static constexpr int D = 208, DMIN = -1;
};
template <>
struct Floats<Q2_K> {
  static constexpr int D = 80, DMIN = 82;
};
template <>
struct Floats<Q3_K> {
  static constexpr int D = 108, DMIN = -1;
};
template <int BITS, bool MINS>
struct Floats<Block32<BITS, MINS>> {
  static constexpr int D = 0, DMIN = MINS ? 2 : -1;
};

template <>
struct Floats<Int4G128> {
  static constexpr int D = 0, DMIN = -1;
};

__device__ __forceinline__ uint16_t random_scale(Kind kind, uint64_t key) {
  const uint32_t h = hash(key);
  float v = 1e-3f * (0.5f + uniform(key + 1));
  if (kind == ROW_COL || kind == STUDENT_T) v *= expf(normal(key));
  if (kind == TINY_ROWS) v *= 1e-4f;
  if (kind == ZEROS && h % 3 == 0) v = 0;
  if (kind == RANDOM_BITS) return (h & 0x7C00) == 0x7C00 ? h & 0xBFFF : h & 0xFFFF;
  if (kind == NON_FINITE && h % 97 == 0) return h % 2 ? 0x7C00 : 0xFC00;
  if (kind == NON_FINITE && h % 97 == 1) return 0x7E00;
  return to_f16(v);
}

// `count` blocks: random codes and scales. Any grid.
template <class F>
__global__ void make_blocks(uint8_t* blocks, size_t count, Kind kind, uint64_t seed) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += step) {
    uint8_t* b = blocks + i * F::BYTES;
    for (int k = 0; k < F::BYTES; k++)
      b[k] = kind == CONSTANT ? 0x57 : hash((i * 512 + k) * 0x9E3779B97F4A7C15ULL + seed);
    const auto put = [&](int at, uint32_t half) { b[at] = half, b[at + 1] = half >> 8; };
    // Loaders refuse integers with scales that are infinite or none.
    put(Floats<F>::D, random_scale(std::is_same_v<F, Int4G128> && kind == NON_FINITE ? NORMAL : kind, 4 * i + seed));
    if (Floats<F>::DMIN >= 0) put(Floats<F>::DMIN, random_scale(kind, 4 * i + 2 + seed));
  }
}

// The values of a matrix of blocks, in f32 and rounded to the type; and what bounds the rounding of sums of its
// products, which are of codes and groups, not of weights. Any grid.
template <class L>
__global__ void dequantize(const uint8_t* blocks, float* exact, uint16_t* rounded, float* spread, int rows, int cols,
                           Type type) {
  using F = typename L::Source;
  using Group = typename F::Group;
  constexpr int LEN = Group::LEN;
  const size_t step = (size_t)gridDim.x * blockDim.x, count = (size_t)rows * cols;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += step) {
    const uint8_t* b = blocks + i / LEN * F::BYTES;
    const int k = i % LEN;
    const Group group{b, k / L::GROUP};
    const float d = half_to_float(group.d());
    float scale = d, min = 0;
    if constexpr (LEN == 256) scale = d * group.scale();
    if constexpr (L::MINS && LEN == 256) min = half_to_float(group.dmin()) * group.min();
    if constexpr (L::MINS && LEN == 32) min = -half_to_float(group.dmin());
    if constexpr (LEN == 128) min = d * group.zero();
    const int code = F::code(b, k), zero = L::MAGIC ? L::ZERO : 128;
    float v = __fmul_rn(scale, code - zero);
    if (L::MINS) v = __fsub_rn(v, min);
    exact[i] = v, spread[i] = LEN == 128 ? fabsf(v) : fabsf(scale) * (128 + abs(code - zero)) + fabsf(min);
    rounded[i] = type == F16 ? to_f16(v) : to_bf16(v);
  }
}

template <class L>
struct KQuantKernels;
#define BLOCK_KERNELS(LAYOUT, L)                                                  \
  template <>                                                                                         \
  struct KQuantKernels<L> {                                                                           \
    static constexpr const char* NAME = #LAYOUT;                                                      \
    static constexpr auto repack = LAYOUT##_repack;                                                   \
    static constexpr auto decode = LAYOUT##_decode;                                                   \
    static Products products() {                                                                      \
      return {(void*)LAYOUT##_product_8,    (void*)LAYOUT##_product_16,   (void*)LAYOUT##_product_32, \
              (void*)LAYOUT##_product_64,   (void*)LAYOUT##_product_1, \
              (void*)LAYOUT##_few_8,        (void*)LAYOUT##_few_16};    \
    }                                                                                                 \
  };
BLOCK_KERNELS(q4_k, LayoutQ4K)
BLOCK_KERNELS(q5_k, LayoutQ5K)
BLOCK_KERNELS(q6_k, LayoutQ6K)
BLOCK_KERNELS(q8_0, LayoutQ80)
BLOCK_KERNELS(q2_k, LayoutQ2K)
BLOCK_KERNELS(q3_k, LayoutQ3K)
BLOCK_KERNELS(q4_0, LayoutQ40)
BLOCK_KERNELS(q4_1, LayoutQ41)
BLOCK_KERNELS(q5_0, LayoutQ50)
BLOCK_KERNELS(q5_1, LayoutQ51)
BLOCK_KERNELS(int4_g128, LayoutInt4G128)

template <class L>
class KQuantMatrix {
 public:
  using Layout = L;
  using Format = typename L::Source;
  static constexpr const char* NAME = KQuantKernels<L>::NAME;
  static constexpr int MOST_COLUMNS = 64, LEN = Format::Group::LEN;
  static constexpr bool SCALED = true, BLOCKS = true, INTEGERS = L::GROUP == 128;

  static void prepare(const Device& device) {
    const Products p = KQuantKernels<L>::products();
    allow_shared_memory(device,
                        {p.to_8, p.to_16, p.to_32, p.to_64, p.single, p.few_8, p.few_16});
  }
  static Buffer<uint8_t> make(int rows, int cols, Kind kind, uint64_t seed) {
    const size_t count = (size_t)rows * (cols / LEN);
    Buffer<uint8_t> blocks(count * Format::BYTES);
    make_blocks<Format><<<1056, 256>>>(blocks.get(), count, kind, seed);
    return blocks;
  }

  KQuantMatrix(const Device& device, const DenseMatrix& dense, int block_rows = ALL_ROWS)
      : device_(device), dense_(dense), shape_(dense.rows, dense.cols) {
    bytes_ = (size_t)shape_.tiles * shape_.tile_bytes();
    weights_ = Buffer<uint8_t>(bytes_);
    weights_.fill(0xEE, bytes_);
    not_finite_ = Buffer<uint32_t>(1);
    not_finite_.fill(0, 1);
    for (int row = 0; row < dense.rows; row += block_rows)
      repack(dense.blocks.get(), row, std::min(block_rows, dense.rows - row), nullptr);
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());
  }

  size_t bytes() const { return bytes_; }
  const uint8_t* weights() const { return weights_.get(); }
  double bits() const { return bytes_ * 8.0 / ((double)dense_.rows * dense_.cols); }
  std::string details() const { return "file: " + std::to_string(Format::BYTES * 8.0 / LEN).substr(0, 6); }
  const Shape<L>& shape() const { return shape_; }

  bool decode(const uint8_t* weights, uint16_t* out, Type type, int stride, int tile0, int tiles,
              cudaStream_t stream) const {
    const Config how(tiles * shape_.stages, 256, 0, stream, true);
    CUDA(cudaLaunchKernelEx(&how.config, KQuantKernels<L>::decode, weights, (void*)out, (int)type, dense_.rows,
                            dense_.cols, stride, tile0));
    return true;
  }
  Launch plan(int batch, Type x_type, bool programmatic) const {
    return plan_staged(device_, shape_, KQuantKernels<L>::products(), weights_.get(), dense_, batch, x_type, programmatic,
                       not_finite_.get());
  }
  // Rows `row` and on from a file's blocks.
  void repack(const uint8_t* blocks, int row, int rows, cudaStream_t stream) const {
    KQuantKernels<L>::repack<<<ceil_div(rows, TILE_ROWS) * shape_.stages, 256, 0, stream>>>(
        blocks + (size_t)row * (dense_.cols / LEN) * Format::BYTES, rows, dense_.cols,
        weights_.get() + row / TILE_ROWS * shape_.tile_bytes(), not_finite_.get());
  }

 private:
  const Device& device_;
  const DenseMatrix& dense_;
  Shape<L> shape_;
  size_t bytes_;
  Buffer<uint8_t> weights_;
  Buffer<uint32_t> not_finite_;
};

}  // namespace bench

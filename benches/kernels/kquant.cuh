// Matrices in ggml's block formats (blocks.cuh) and the layouts of kernels/kquant.cuh.
#pragma once
#include "../../kernels/kquant.cu"
#include "../../kernels/kquant_small.cu"
#include "blocks.cuh"
#include "staged.cuh"

namespace bench {

template <class L>
struct KQuantKernels;
#define BLOCK_KERNELS(LAYOUT, L)                                                                  \
  template <>                                                                                     \
  struct KQuantKernels<L> {                                                                       \
    static constexpr const char* NAME = #LAYOUT;                                                  \
    static constexpr auto repack = LAYOUT##_repack;                                               \
    static constexpr auto decode = LAYOUT##_decode;                                               \
    static Products products() {                                                                  \
      return {(void*)LAYOUT##_product_8,  (void*)LAYOUT##_product_16, (void*)LAYOUT##_product_32, \
              (void*)LAYOUT##_product_64, (void*)LAYOUT##_product_1,  (void*)LAYOUT##_few_8,      \
              (void*)LAYOUT##_few_16};                                                            \
    }                                                                                             \
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
    allow_shared_memory(device, {p.to_8, p.to_16, p.to_32, p.to_64, p.single, p.few_8, p.few_16});
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
    return plan_staged(device_, shape_, KQuantKernels<L>::products(), weights_.get(), dense_, batch, x_type,
                       programmatic, not_finite_.get());
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

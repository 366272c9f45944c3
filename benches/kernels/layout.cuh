// The layout of a program that is about one, LAYOUT: `fixed` unless the compiler is told another (kernels/kquant_formats.cuh).
#pragma once
#ifndef LAYOUT
#define LAYOUT Fixed
#endif
#include "../../kernels/fixed.cu"
#include "../../kernels/repair.cu"
#include "blocks.cuh"
#include "many_rows.cuh"

namespace bench {

using namespace taper;

using L = LAYOUT;
constexpr bool BLOCKS = L::GROUP >= 16;

template <class L>
__global__ void __launch_bounds__(256)
    repack(const uint8_t* blocks, int rows, int cols, uint8_t* weights, uint32_t* not_finite) {
  repack_stage<L>(blocks, rows, cols, weights, not_finite);
}
// Random blocks, and their values as weights.
template <class L>
static void make_blocks_of(DenseMatrix& dense, Kind kind) {
  if constexpr (L::GROUP >= 16) {
    using F = typename L::Source;
    const int rows = dense.rows, cols = dense.cols;
    const size_t count = (size_t)rows * (cols / F::Group::LEN);
    dense.blocks = Buffer<uint8_t>(count * F::BYTES);
    make_blocks<F><<<1056, 256>>>(dense.blocks.get(), count, kind, 1);
    Buffer<float> exact((size_t)rows * cols), spread((size_t)rows * cols);
    dequantize<L>
        <<<1056, 256>>>(dense.blocks.get(), exact.get(), dense.weights.get(), spread.get(), rows, cols, bench::BF16);
    CUDA(cudaDeviceSynchronize());
    if (L::GROUP == 128) dense.row_scales = std::move(exact);  // integers are not rounded
  }
}
template <class L>
static void repack_all(const DenseMatrix& dense, int stages, uint8_t* weights, uint32_t* not_finite) {
  if constexpr (L::GROUP >= 16)
    repack<L><<<stages, 256>>>(dense.blocks.get(), dense.rows, dense.cols, weights, not_finite);
}

// A matrix in the layout.
class Packed {
 public:
  Packed(const DenseMatrix& dense) : shape_(dense.rows, dense.cols) {
    bytes_ = (size_t)shape_.tiles * shape_.tile_bytes();
    weights_ = Buffer<uint8_t>(bytes_), weights_.fill(0xEE, bytes_);
    const int stages = shape_.tiles * shape_.stages;
    if (BLOCKS) {
      overflow_ = Buffer<uint32_t>(1), overflow_.fill(0, 1);
      repack_all<L>(dense, stages, weights_.get(), overflow_.get());
      CUDA(cudaDeviceSynchronize());
      return;
    }
    const uint32_t capacity = (uint32_t)std::min<size_t>((size_t)dense.rows * dense.cols + 1024, 1u << 28);
    overflow_ = Buffer<uint32_t>(capacity);
    const Buffer<uint32_t> totals(8);
    totals.fill(0, 8);
    const Buffer<uint4> plan(stages);
    fixed_plan<<<stages, 256>>>(dense.weights.get(), dense.rows, dense.cols, dense.stride, plan.get());
    repair_scan<<<1, 1024>>>(plan.get(), stages, totals.get());
    fixed_pack<<<stages, 256>>>(dense.weights.get(), dense.rows, dense.cols, dense.stride, plan.get(), weights_.get(),
                                overflow_.get(), capacity);
    CUDA(cudaDeviceSynchronize());
  }
  size_t bytes() const { return bytes_; }
  const uint8_t* weights() const { return weights_.get(); }
  const uint32_t* overflow() const { return overflow_.get(); }
  const Shape<L>& shape() const { return shape_; }

 private:
  Shape<L> shape_;
  size_t bytes_;
  Buffer<uint8_t> weights_;
  Buffer<uint32_t> overflow_;
};

static DenseMatrix matrix(int rows, int cols, Kind kind) {
  DenseMatrix dense(rows, cols, cols);
  dense.weights = Buffer<uint16_t>((size_t)rows * cols);
  if (BLOCKS) {
    make_blocks_of<L>(dense, kind);
    return dense;
  }
  make_weights<<<1056, 256>>>(dense.weights.get(), (size_t)rows * cols, cols, kind, 1);
  return dense;
}

}  // namespace bench

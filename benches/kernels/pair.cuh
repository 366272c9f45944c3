// A matrix in layout `pair`: the same members as Staged (staged.cuh), but stages of their own sizes, found by a code
// that the host makes from counts.
#pragma once
#include <string>
#include <vector>

#include "code_of_pairs.h"
#include "launch.cuh"

namespace bench {

using namespace taper;

class PairMatrix {
 public:
  static constexpr const char* NAME = "pair";
  static constexpr bool BLOCKS = false, F16_WEIGHTS = false;
  static void suit(uint16_t*, size_t) {}
  static constexpr int MOST_COLUMNS = 16;
  static constexpr bool SCALED = false;

  static void prepare(const Device& device) {
    allow_shared_memory(device, {(void*)pair_product_8, (void*)pair_product_16, (void*)pair_decode});
  }

  PairMatrix(const Device& device, const DenseMatrix& dense, int block_rows = ALL_ROWS)
      : device_(device), dense_(dense), shape_(dense.rows, dense.cols) {
    const size_t stages = (size_t)shape_.tiles * shape_.stages;
    offsets_ = Buffer<uint32_t>(stages + 1);
    shifts_ = Buffer<uint8_t>(dense.rows), levels_ = Buffer<uint32_t>(dense.rows),
    mean_ = Buffer<unsigned long long>(2);
    make_code(block_rows);
    const Buffer<uint32_t> sizes(stages), totals(3);
    totals.fill(0, 3);
    each_block(block_rows, [&](const uint16_t* from, int row, int rows, int stages, uint32_t* offsets) {
      size(from, row, rows, stages, sizes.get(), nullptr);
      pair_scan<<<1, 1024>>>(sizes.get(), stages, dense.cols, offsets, totals.get());
    });
    uint32_t pieces[3];  // of 16 bytes: in all, in the largest stage, at most besides signs and mantissas
    totals.download(pieces, 3);
    slot_bytes_ = pieces[1] * 16 + 16, decode_bytes_ = pieces[2] * 16 + 16;
    const bool possible = pieces[1] < IMPOSSIBLE;
    bytes_ = possible ? (size_t)pieces[0] * 16 : 16;
    weights_ = Buffer<uint8_t>(bytes_);
    if (possible) {
      weights_.fill(0xEE, bytes_);  // whatever packing forgets is no weight
      each_block(block_rows, [&](const uint16_t* from, int row, int rows, int stages, uint32_t* offsets) {
        pack(from, row, rows, stages, offsets, nullptr);
      });
    }
    CUDA(cudaDeviceSynchronize());
  }

  size_t bytes() const { return bytes_; }
  const uint8_t* weights() const { return weights_.get(); }
  double bits() const {
    return (bytes_ + 4.0 * shape_.tiles * shape_.stages) * 8 / ((double)dense_.rows * dense_.cols);
  }
  std::string details() const {
    char text[120];
    snprintf(text, sizeof text, "codes and repairs %.3f bits, %d symbols, largest stage %d bytes", code_bits_ + 8,
             symbols_, slot_bytes_ - 16);
    return text;
  }

  // Dense rows of `tiles` tiles from `tile0` on; false if the matrix's stages do not fit.
  bool decode(const uint8_t* weights, uint16_t* out, Type, int stride, int tile0, int tiles,
              cudaStream_t stream) const {
    const int shared = TABLE_BYTES + 2 * decode_bytes_, stages = tiles * shape_.stages;
    if (shared > device_.shared_limit) return false;
    int blocks = 0;
    CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, pair_decode, 256, shared));
    const Config how(std::min(stages, blocks * device_.multiprocessors), 256, shared, stream, true);
    CUDA(cudaLaunchKernelEx(&how.config, pair_decode, weights, offsets_.get(), table_.get(), out, dense_.rows,
                            dense_.cols, stride, tile0, stages, decode_bytes_));
    return true;
  }

  Launch plan(int batch, Type x_type, bool programmatic) const {
    const int columns = batch * (x_type + 1);
    const auto fits = [&](int slabs, int slots, int keep) {
      return pair_shared_bytes(dense_.cols, slabs, columns, slots, slot_bytes_, keep) <= device_.shared_limit;
    };
    Launch launch;
    Product& p = launch.product();
    p.weights = weights_.get(), p.overflow = table_.get(), launch.pair.offsets = offsets_.get();
    p.rows = dense_.rows, p.cols = dense_.cols, p.batch = batch, p.x_type = x_type;
    launch.pair.slot_bytes = slot_bytes_;
    int slabs = 1;
    while (slabs <= shape_.stages && !fits(slabs, 5, 1)) slabs++;
    launch.fits = slabs <= shape_.stages;
    if (!launch.fits) return launch;
    while (shape_.tiles * slabs * 2 <= device_.multiprocessors && slabs < shape_.stages) slabs++;
    p.keep = PAIR_MOST_KEPT;
    while (!fits(slabs, 5, p.keep)) p.keep--;
    p.slots = 5;
    while (p.slots < PAIR_MAX_SLOTS && fits(slabs, p.slots + 1, p.keep)) p.slots++;
    p.in_flight = programmatic ? 2 : 3;
    launch.kernel = columns <= 8 ? (void*)pair_product_8 : (void*)pair_product_16, launch.block = BLOCK;
    launch.shared_bytes = pair_shared_bytes(dense_.cols, slabs, columns, p.slots, slot_bytes_, p.keep);
    launch.split(device_, slabs, shape_.tiles, shape_.stages, columns);
    return launch;
  }

  const Shape<Pair>& shape() const { return shape_; }
  const uint32_t* offsets() const { return offsets_.get(); }

  // The passes of packing, each over `rows` dense rows from row `row` on, of `stages` stages.
  void count(const uint16_t* from, int row, int rows, uint32_t* counts, cudaStream_t stream) const {
    pair_levels<<<ceil_div(rows, 8), 256, 0, stream>>>(from, rows, dense_.cols, dense_.stride, row == 0, levels_.get(),
                                                       mean_.get());
    pair_count<<<264, 256, 0, stream>>>(from, rows, dense_.cols, dense_.stride, levels_.get(), mean_.get(),
                                        shifts_.get() + row, counts);
  }
  void size(const uint16_t* from, int row, int rows, int stages, uint32_t* sizes, cudaStream_t stream) const {
    pair_size<<<stages, 256, 0, stream>>>(from, rows, dense_.cols, dense_.stride, shifts_.get() + row, codes_.get(),
                                          filler_, sizes);
  }
  void pack(const uint16_t* from, int row, int rows, int stages, const uint32_t* offsets, cudaStream_t stream) const {
    pair_pack<<<stages, 256, 0, stream>>>(from, rows, dense_.cols, dense_.stride, shifts_.get() + row, codes_.get(),
                                          filler_, offsets, weights_.get());
  }

 private:
  void make_code(int block_rows) {
    const Buffer<uint32_t> counts(65536);
    counts.fill(0, 65536), mean_.fill(0, 2);
    each_block(block_rows, [&](const uint16_t* from, int row, int rows, int, uint32_t*) {
      count(from, row, rows, counts.get(), nullptr);
    });
    std::vector<uint32_t> counted(65536);
    counts.download(counted.data(), 65536);
    const CodeOfPairs code = make_code_of_pairs(counted);
    filler_ = code.filler, code_bits_ = code.bits, symbols_ = code.symbols;
    codes_ = Buffer<uint16_t>(65536), table_ = Buffer<uint32_t>(256);
    codes_.upload(code.codes.data(), 65536), table_.upload(code.table.data(), 256);
  }

  // Calls use(dense rows, the first, how many, their stages, their offsets) for each block of rows.
  template <class Use>
  void each_block(int block_rows, const Use& use) const {
    for (int row = 0; row < dense_.rows; row += block_rows) {
      const int rows = std::min(block_rows, dense_.rows - row);
      use(dense_.weights.get() + (size_t)row * dense_.stride, row, rows, ceil_div(rows, TILE_ROWS) * shape_.stages,
          offsets_.get() + (size_t)(row / TILE_ROWS) * shape_.stages);
    }
  }

  const Device& device_;
  const DenseMatrix& dense_;
  Shape<Pair> shape_;
  size_t bytes_;
  int slot_bytes_, decode_bytes_, filler_, symbols_;
  double code_bits_;
  Buffer<uint8_t> weights_;
  Buffer<uint16_t> codes_;
  Buffer<uint32_t> table_, offsets_, levels_;
  Buffer<uint8_t> shifts_;
  Buffer<unsigned long long> mean_;
};

}  // namespace bench

// Whether the kernels are right: packed, decoded and multiplied on the card, against the dense weights and an f64
// product of them.
//
// Weights decode to the same words, whatever they are (scaled integers to the nearest value of the type). Products
// differ from the reference by no more than their own rounding and that of f32 sums, and several launches one behind
// the other give the same bits.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "kquant.cuh"
#include "reference.cuh"

namespace bench {

struct Tally {
  int checks = 0, failures = 0, skipped = 0;
};

struct Case {
  int rows, cols;
  Kind kind;
  std::vector<int> batches;
  Type x_type = BF16;
  bool special_x = false;
  int row_padding = 0, x_padding = 0;  // values between rows that belong to none
  bool bias = true;
  int block_rows = 512;
  bool verbose = true;
  float x_scale = 1;
};

// The matrix of a case; `exact` and `rounded`: what its scaled integers stand for.
template <class M>
DenseMatrix make_dense(const Case& c, Buffer<float>& exact, Buffer<uint16_t>& rounded, Buffer<float>& spread,
                       Type out_type) {
  DenseMatrix dense(c.rows, c.cols, c.cols + c.row_padding);
  const size_t count = (size_t)c.rows * dense.stride, outputs = (size_t)c.rows * c.cols;
  if constexpr (M::BLOCKS) {
    dense.blocks = M::make(c.rows, c.cols, c.kind, 11 + c.rows + c.cols);
    exact = Buffer<float>(outputs), rounded = Buffer<uint16_t>(outputs), spread = Buffer<float>(outputs);
    dequantize<typename M::Layout>
        <<<1056, 256>>>(dense.blocks.get(), exact.get(), rounded.get(), spread.get(), c.rows, c.cols, out_type);
    return dense;
  } else {
    dense.weights = Buffer<uint16_t>(count + 64);
    if constexpr (!M::SCALED) {
      make_weights<<<1056, 256>>>(dense.weights.get(), count, dense.stride, c.kind, 17 + c.rows * 31 + c.cols);
      M::suit(dense.weights.get(), count);
    } else {
      // Kinds choose what an integer matrix can differ in: spread, values that are none, and which scales it has.
      const float spread = c.kind == RANDOM_BITS ? 300 : M::SPREAD_CHECK;
      const int odd = c.kind % 3 == 1 ? 1 : c.kind == ZEROS ? 2 : 0;
      make_integers<<<1056, 256>>>(dense.weights.get(), count, spread, odd, 7 + c.rows + c.cols);
      dense.tile_scale_stride = (c.cols + 255) / 256;
      const size_t tiles = (size_t)dense.tile_scale_stride * ((c.rows + 255) / 256);
      if (c.kind % 2) {
        dense.tile_scales = Buffer<float>(tiles);
        make_scales<<<blocks_for(tiles), 256>>>(dense.tile_scales.get(), tiles, 3);
      } else if (c.kind % 4 == 0) {
        dense.row_scales = Buffer<float>(c.rows);
        make_scales<<<blocks_for(c.rows), 256>>>(dense.row_scales.get(), c.rows, 3);
      }
      exact = Buffer<float>(outputs), rounded = Buffer<uint16_t>(outputs);
      apply_scales<<<1056, 256>>>(dense.weights.get(), dense.stride, dense.tile_scales.get(), dense.tile_scale_stride,
                                  dense.row_scales.get(), exact.get(), rounded.get(), c.rows, c.cols, out_type);
    }
    return dense;
  }
}

template <class M>
class Checker {
 public:
  Checker(const Device& device, const Case& c, Tally& tally)
      : c_(c),
        tally_(tally),
        device_(device),
        decoded_type_(c.kind % 2 ? F16 : BF16),
        dense_(make_dense<M>(c, exact_, rounded_, spread_, decoded_type_)),
        packed_(device, dense_, c.block_rows) {}

  void run() {
    decode();
    for (const int batch : c_.batches)
      for (const Type y_type : {BF16, F16, F32}) {
        const int columns = batch * (c_.x_type + 1);
        if (columns > M::MOST_COLUMNS || (y_type != BF16 && y_type != c_.x_type)) continue;
        if (!packed_.plan(batch, c_.x_type, false).fits)
          tally_.skipped++;
        else
          products(batch, y_type);
      }
  }

 private:
  void decode() {
    // Rows whose stride is odd take the slow way out; two calls, the second from a tile in the middle on.
    const int stride = (c_.cols + 7) / 8 * 8 + (c_.row_padding ? 3 : 0), tiles = packed_.shape().tiles,
              half = tiles / 2;
    const size_t count = (size_t)c_.rows * stride;
    const Buffer<uint16_t> out(count);
    out.fill(0xEE, count);
    const auto part = [&](int tile0, int n) {
      return packed_.decode(packed_.weights(), out.get() + (size_t)tile0 * taper::TILE_ROWS * stride, decoded_type_,
                            stride, tile0, n, nullptr);
    };
    unsigned long long wrong = 0;
    if ((half == 0 || part(0, half)) && part(half, tiles - half)) {
      const Buffer<unsigned long long> count_wrong(1);
      count_wrong.fill(0, 1);
      compare_words<<<528, 256>>>(M::SCALED ? rounded_.get() : dense_.weights.get(),
                                  M::SCALED ? c_.cols : dense_.stride, out.get(), stride, c_.rows, c_.cols,
                                  count_wrong.get());
      count_wrong.download(&wrong, 1);
      tally_.checks++;
    } else {
      tally_.skipped++;
    }
    if (wrong) tally_.failures++;
    if (wrong || c_.verbose)
      printf("%s%s %dx%d %s: %llu words decode wrong; %.3f bits/weight, %s\n", wrong ? "FAIL " : "", M::NAME, c_.rows,
             c_.cols, name_of(c_.kind), wrong, packed_.bits(), packed_.details().c_str());
  }

  void products(int batch, Type y_type) {
    const int x_stride = c_.cols + c_.x_padding, y_stride = c_.rows + (c_.x_padding ? 5 : 0);
    const size_t x_count = (size_t)batch * x_stride, outputs = (size_t)batch * c_.rows;
    const Buffer<uint8_t> x_memory((x_count + 8) * bytes_of(c_.x_type)), bias((size_t)c_.rows * bytes_of(y_type));
    const Buffer<double> wanted(outputs), magnitudes(outputs);
    uint8_t* const x = x_memory.get() + (c_.x_padding ? bytes_of(c_.x_type) : 0);  // padded: not aligned either
    make_activations<<<blocks_for(x_count), 256>>>(x, x_count, c_.x_type, c_.special_x, 5 + batch, c_.x_scale);
    make_activations<<<blocks_for(c_.rows), 256>>>(bias.get(), c_.rows, y_type, false, 9);
    const void* added = c_.bias ? bias.get() : nullptr;
    reference<<<c_.rows, 128>>>(dense_.weights.get(), dense_.stride, exact_.get(), spread_.get(), x, c_.x_type,
                                x_stride, added, y_type, wanted.get(), magnitudes.get(), c_.rows, c_.cols, batch);
    for (const bool programmatic : {false, true}) {
      const auto launch_to = [&](void* y) {
        Launch launch = packed_.plan(batch, c_.x_type, programmatic);
        launch.bind(x, x_stride, y, y_stride, y_type, added);
        return launch;
      };
      product(launch_to, programmatic, y_type, y_stride, wanted.get(), magnitudes.get());
    }
  }

  template <class F>
  void product(const F& launch_to, bool programmatic, Type y_type, int y_stride, const double* wanted,
               const double* magnitudes) {
    const int batch = launch_to(nullptr).product().batch;
    const size_t bytes = (size_t)batch * y_stride * bytes_of(y_type);
    const Buffer<uint8_t> y(bytes), again(bytes);
    const Buffer<Comparison> comparison(1);
    comparison.fill(0, 1), y.fill(0xFF, bytes);
    const Launch launch = launch_to(y.get()), repeated = launch_to(again.get());
    launch.run(nullptr, programmatic);
    // A single row is rounded to integers of 16 bits (kquant_single.cuh), which costs some 1e-6 of the magnitudes where a
    // row has 128 columns, and up to five times that among thousands of outputs.
    const double within = M::BLOCKS && batch == 1 ? 6e-6 : 2e-6;
    compare_products<<<blocks_for((size_t)c_.rows * batch), 256>>>(y.get(), y_type, y_stride, wanted, magnitudes,
                                                                   c_.rows, batch, within, comparison.get());
    Comparison result;
    comparison.download(&result, 1);
    tally_.checks++;
    static const char* const types[] = {"bf16", "f16", "f32"};
    const auto describe = [&](const char* prefix, const char* suffix) {
      printf("%s%s %dx%d %s, batch %d, x %s%s, y %s, %s, %d slabs%s\n", prefix, M::NAME, c_.rows, c_.cols,
             name_of(c_.kind), batch, types[c_.x_type], c_.special_x ? " with infinities" : "", types[y_type],
             programmatic ? "programmatic" : "plain", launch.product().slabs, suffix);
    };
    char text[100];
    const double error = std::sqrt(result.error / result.norm);
    if (result.wrong) {
      tally_.failures++;
      snprintf(text, sizeof text, ": %llu outputs wrong, relative error %.2e", result.wrong, error);
      describe("FAIL ", text);
    } else if (c_.verbose && !programmatic) {
      snprintf(text, sizeof text, ": relative error %.2e", error);
      describe("  ", text);
    }
    std::vector<uint8_t> first(bytes), other(bytes);
    y.download(first.data(), bytes);
    for (int round = 0; round < 2; round++) {
      again.fill(0xFF, bytes);
      for (int i = 0; i < 3; i++) repeated.run(nullptr, programmatic);
      again.download(other.data(), bytes);
      if (memcmp(first.data(), other.data(), bytes) == 0) continue;
      tally_.failures++;
      describe("FAIL ", ": repeated launches give other bits");
    }
  }

  const Case& c_;
  Tally& tally_;
  const Device& device_;
  Type decoded_type_;
  Buffer<float> exact_, spread_;
  Buffer<uint16_t> rounded_;
  DenseMatrix dense_;
  M packed_;
};

}  // namespace bench

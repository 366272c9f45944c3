// How long the kernels take, beside cuBLAS on the dense bf16 matrix. Both read copies in turn that no cache holds
// (timing.cuh): more than 700 MB of dense weights, 650 MB of packed ones.
//
// Products are bf16 in and out. Rows of the table: a plain launch; a programmatic one, which fetches weights while the
// kernel before it still runs; and, for matrices that fit, all of it in the
// second-level cache. TB/s are bytes of weights over time, bits/weight count everything that is stored.
#pragma once
#include <type_traits>

#include "cublas.cuh"
#include "kquant.cuh"
#include "pair.cuh"
#include "staged.cuh"
#include "timing.cuh"

namespace bench {

constexpr int LAUNCHES = 48;  // in a graph
constexpr size_t DENSE_BYTES = 700000000, PACKED_BYTES = 650000000;
constexpr size_t SMALL_WEIGHTS = 20000000;  // packed, these stay in the cache
constexpr int MOST_X = 64 * 32768;

inline double per_second(double weights, double us) { return weights / us * 1e-6; }  // 10^12

template <class L>
void time_conversions(const Staged<L>& packed, const DenseMatrix& dense, const Rotation& from, const Rotation& copies,
                      uint16_t* out) {
  const Shape<L>& shape = packed.shape();
  const double weights = (double)dense.rows * dense.cols;
  const Buffer<uint4> plan((size_t)shape.tiles * shape.stages);
  const Buffer<uint32_t> totals(8);
  totals.fill(0, 8);
  const double pack = time_launches(
      8,
      [&](int i, cudaStream_t stream) {
        packed.pack((const uint16_t*)from.of(i), 0, dense.rows, 1 << 20, plan.get(), totals.get(), stream);
      },
      3);
  const double decode = time_launches(
      24,
      [&](int i, cudaStream_t stream) { packed.decode(copies.of(i), out, BF16, dense.cols, 0, shape.tiles, stream); },
      5);
  printf("  pack %.1f us = %.2f T weights/s, decode to memory %.1f us = %.2f T weights/s\n", pack,
         per_second(weights, pack), decode, per_second(weights, decode));
  // As products of many rows do: a block of rows after the other to the same place.
  printf("  decode through a work space of");
  for (const int megabytes : {4, 8, 12, 16, 24, 32}) {
    const int rows = std::max(TILE_ROWS, (int)(megabytes * 1e6 / (dense.cols * 2)) / TILE_ROWS * TILE_ROWS),
              blocks = dense.rows / rows;
    if (!blocks) continue;
    const double us = time_launches(
        6,
        [&](int i, cudaStream_t stream) {
          for (int b = 0; b < blocks; b++)
            packed.decode(copies.of(i), out, BF16, dense.cols, b * rows / TILE_ROWS, rows / TILE_ROWS, stream);
        },
        5);
    printf(" %d MB: %.2f", megabytes, per_second((double)blocks * rows * dense.cols, us));
  }
  printf(" T weights/s\n");
}

template <class L>
void time_conversions(const KQuantMatrix<L>& packed, const DenseMatrix& dense, const Rotation&, const Rotation& copies,
                      uint16_t* out) {
  const double weights = (double)dense.rows * dense.cols;
  const double repack =
      time_launches(8, [&](int, cudaStream_t stream) { packed.repack(dense.blocks.get(), 0, dense.rows, stream); }, 3);
  const double decode = time_launches(
      24,
      [&](int i, cudaStream_t stream) {
        packed.decode(copies.of(i), out, BF16, dense.cols, 0, packed.shape().tiles, stream);
      },
      5);
  printf("  repack %.1f us = %.2f T weights/s, decode to memory %.1f us = %.2f T weights/s\n", repack,
         per_second(weights, repack), decode, per_second(weights, decode));
}

inline void time_conversions(const PairMatrix& packed, const DenseMatrix& dense, const Rotation&,
                             const Rotation& copies, uint16_t* out) {
  const Shape<Pair>& shape = packed.shape();
  const int stages = shape.tiles * shape.stages;
  const uint16_t* from = dense.weights.get();
  const Buffer<uint32_t> sizes(stages), counts(65536);
  const double decode = time_launches(
      12,
      [&](int i, cudaStream_t stream) { packed.decode(copies.of(i), out, BF16, dense.cols, 0, shape.tiles, stream); },
      5);
  const double count =
      time_launches(3, [&](int, cudaStream_t stream) { packed.count(from, 0, dense.rows, counts.get(), stream); }, 3);
  const double size = time_launches(
      3, [&](int, cudaStream_t stream) { packed.size(from, 0, dense.rows, stages, sizes.get(), stream); }, 3);
  const double pack = time_launches(
      3, [&](int, cudaStream_t stream) { packed.pack(from, 0, dense.rows, stages, packed.offsets(), stream); }, 3);
  printf("  count %.0f us, size %.0f us, pack %.0f us, decode to memory %.1f us = %.2f T weights/s\n", count, size,
         pack, decode, per_second((double)dense.rows * dense.cols, decode));
}

// One row of the table.
struct Row {
  int batch;
  const char* kernel;
  double us, bits, bytes, cublas_us;
  int slabs;
  void print() const {
    printf("  %5d  %-24s %8.2f %12.3f %7.2f ", batch, kernel, us, bits, bytes / us * 1e-6);
    if (cublas_us > 0)
      printf("%9.3f ", cublas_us / us);
    else
      printf("%9s ", "-");
    if (slabs) printf("%6d", slabs);
    printf("\n");
  }
};

template <class M>
void time_matrix(const Device& device, const Cublas& cublas, const DenseMatrix& dense, const char* kind, const void* x,
                 void* y) {
  const int rows = dense.rows, cols = dense.cols;
  const size_t weights = (size_t)rows * cols;
  const M packed(device, dense);
  const Rotation dense_copies(dense.weights.get(), weights * 2, DENSE_BYTES);
  const Rotation copies(packed.weights(), packed.bytes(), PACKED_BYTES);
  printf("\n%s %dx%d %s: %.3f bits/weight, %s\n", M::NAME, rows, cols, kind, packed.bits(), packed.details().c_str());
  {
    const Buffer<uint16_t> out(weights);
    time_conversions(packed, dense, dense_copies, copies, out.get());
  }
  printf("  batch  kernel                         us  bits/weight    TB/s  x cuBLAS  slabs\n");
  for (const int batch : {1, 4, 8, 16, 32, 64}) {
    if (batch > M::MOST_COLUMNS) continue;
    const double cublas_us = time_launches(LAUNCHES, [&](int i, cudaStream_t stream) {
      cublas.product(stream, dense_copies.of(i), x, y, rows, cols, batch);
    });
    Row{batch, "cuBLAS", cublas_us, 16, weights * 2.0, cublas_us, 0}.print();
    const auto time = [&](bool programmatic, bool cached, const char* name) {
      Launch launch = packed.plan(batch, BF16, programmatic);
      if (!launch.fits) {
        printf("  %5d  %-24s stages do not fit the shared memory\n", batch, name);
        return;
      }
      launch.bind(x, cols, y, rows, BF16);
      const double us = time_launches(LAUNCHES, [&](int i, cudaStream_t stream) {
        (cached ? launch : launch.with(copies.of(i))).run(stream, programmatic);
      });
      // cuBLAS was not timed in the cache, so there is no ratio for that.
      Row{batch, name, us, packed.bits(), (double)packed.bytes(), cached ? 0 : cublas_us, launch.product().slabs}
          .print();
    };
    time(false, false, "plain");
    time(true, false, "programmatic");
    if (weights < SMALL_WEIGHTS && batch <= 8) {
      time(false, true, "plain, cached");
      time(true, true, "programmatic, cached");
    }
  }
}

// Shapes of Llama's layers, and some narrower ones.
template <class M>
void time_layout(const Device& device, const Cublas& cublas) {
  static const Buffer<uint16_t> x = [] {
    Buffer<uint16_t> made(MOST_X * 2);
    make_activations<<<MOST_X / 256, 256>>>(made.get(), MOST_X, BF16, false, 3);
    return made;
  }();
  static const Buffer<uint16_t> y(MOST_X * 2);
  constexpr bool PAIR = std::is_same_v<M, PairMatrix>;
  constexpr bool INTEGERS = [] {
    if constexpr (M::BLOCKS)
      return M::INTEGERS;
    else
      return false;
  }();
  M::prepare(device);
  std::vector<std::pair<int, int>> shapes = {{6144, 4096},  {4096, 4096}, {14336, 4096}, {28672, 4096},
                                             {4096, 14336}, {8192, 2048}, {2048, 5632}};
  if (INTEGERS) shapes.push_back({8192, 8192});  // what others' kernels for them are compared at
  for (const auto& [rows, cols] : shapes) {
    if ((M::SCALED && !M::BLOCKS && rows == 6144) || (PAIR && rows == 2048)) continue;
    DenseMatrix dense(rows, cols, cols);
    const size_t count = (size_t)rows * cols;
    dense.weights = Buffer<uint16_t>(count);
    if constexpr (M::BLOCKS) {
      make_weights<<<1056, 256>>>(dense.weights.get(), count, cols, NORMAL, 1);  // for cuBLAS
      dense.blocks = M::make(rows, cols, NORMAL, 5);
      time_matrix<M>(device, cublas, dense, "random blocks", x.get(), y.get());
    } else if constexpr (M::SCALED) {
      make_integers<<<1056, 256>>>(dense.weights.get(), count, M::SPREAD_TIME, 0, 7);
      dense.row_scales = Buffer<float>(rows);
      make_scales<<<blocks_for(rows), 256>>>(dense.row_scales.get(), rows, 3);
      time_matrix<M>(device, cublas, dense, "normal integers", x.get(), y.get());
    } else {
      // The bits of `pair` depend on the distribution, its speed hardly; `fixed` takes any.
      std::vector<Kind> kinds = {PAIR ? STUDENT_T : ROW_COL};
      if (rows == 14336)
        kinds = PAIR ? std::vector<Kind>{NORMAL, STUDENT_T, ROW_COL} : std::vector<Kind>{ROW_COL, STUDENT_T};
      for (const Kind kind : kinds) {
        make_weights<<<1056, 256>>>(dense.weights.get(), count, cols, kind, 1);
        M::suit(dense.weights.get(), count);
        time_matrix<M>(device, cublas, dense, name_of(kind), x.get(), y.get());
      }
    }
  }
}

}  // namespace bench

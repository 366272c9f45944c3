// Checks and times the products of many rows of activations (kernels/prefill.cuh, compute capability 9.0) beside cuBLAS.
// From the top of the repository:
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o target/prefill benches/kernels/prefill.cu -ldl
//     target/prefill check [--small]    against f64, and repeated launches against each other; exit status 1 on failure
//     target/prefill time               every width, blocks whole and in pieces; times include bringing activations into order
//
// -DLAYOUT=LayoutQ4K and so on (kernels/kquant_formats.cuh) take another layout than `fixed`.
#include "../../kernels/prefill_entry.cuh"
#include "layout.cuh"

using namespace bench;

PREFILLS(bench, LAYOUT)

struct Width {
  int columns, shared;
  const void* kernel;
};
static const Width WIDTHS[] = {{128, prefill_shared_bytes<L, 128>(), (void*)bench_prefill_128},
                               {192, prefill_shared_bytes<L, 192>(), (void*)bench_prefill_192},
                               {256, prefill_shared_bytes<L, 256>(), (void*)bench_prefill_256}};

// How blocks are shared out: each to one block of the grid, in pieces of equal length, or each in as many pieces.
constexpr int WHOLE = 0, CUT = 1, MOST_PIECES = 8;

// A product, planned as src/cuda/prefill.rs does.
struct Launches {
  Prefill p = {};
  Width width;
  int grid;
  bool fits;
  Buffer<uint8_t> arranged;

  Launches(const Device& device, const Packed& packed, const DenseMatrix& dense, int batch, const Width& width_,
           int cut)
      : width(width_) {
    CUDA(cudaFuncSetAttribute(width.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, width.shared));
    const Shape<L>& shape = packed.shape();
    const long long wide = ceil_div(batch, width.columns), blocks = ceil_div(shape.tiles, PREFILL_TILES) * wide;
    fits = cut <= CUT || (cut * blocks <= device.multiprocessors && cut <= shape.units);
    grid = (int)std::min<long long>(device.multiprocessors, cut == WHOLE ? blocks
                                                            : cut == CUT ? blocks * shape.units
                                                                         : cut * blocks);
    if (cut && blocks % grid) p.cut = (int)std::min(blocks, blocks % grid + grid);
    arranged = Buffer<uint8_t>(wide * width.columns * shape.units * 256);
    p.weights = packed.weights(), p.overflow = packed.overflow();
    p.rows = dense.rows, p.cols = dense.cols, p.batch = batch;
    p.by128 = 128, p.by8 = 8;
    p.partial = device.partial.get(), p.arrived = device.arrived.get(), p.arranged = arranged.get();
  }
  void run(const uint16_t* x, int x_stride, const uint8_t* weights, uint16_t* y, int y_stride, cudaStream_t stream,
           bool programmatic) {
    p.x = (const uint8_t*)x, p.x_stride = x_stride, p.weights = weights, p.y = y, p.y_stride = y_stride;
    const Config how(grid, PREFILL_BLOCK, width.shared, stream, programmatic);
    void* arguments[] = {(void*)&p};
    CUDA(cudaLaunchKernelExC(&how.config, width.kernel, arguments));
  }
};

static std::string name_of(const Width& width, int cut) {
  return std::to_string(width.columns) + (cut == WHOLE ? "" : cut == CUT ? " cut" : " in " + std::to_string(cut));
}

static void check(const Device& device, int rows, int cols, Kind kind, std::initializer_list<int> batches, int pad = 0,
                  bool special_x = false, int rounds = 3) {
  if (BLOCKS) cols = (cols + 255) / 256 * 256;
  const DenseMatrix dense = matrix(rows, cols, kind);
  const Packed packed(dense);
  for (int batch : batches)
    for (const Width& width : WIDTHS)
      for (int cut = WHOLE; cut <= MOST_PIECES; cut++) {
        if (width.columns >= batch + 128) continue;
        const int x_stride = cols + pad, y_stride = rows + pad;
        const Buffer<uint16_t> x((size_t)batch * x_stride);
        make_activations<<<blocks_for((size_t)batch * x_stride), 256>>>(x.get(), (size_t)batch * x_stride, bench::BF16,
                                                                        special_x, 5);
        Launches launches(device, packed, dense, batch, width, cut);
        if (!launches.fits) continue;
        const Outcome outcome = repeat(
            rounds, rows, batch, y_stride,
            [&](uint16_t* y, bool programmatic) {
              launches.run(x.get(), x_stride, packed.weights(), y, y_stride, 0, programmatic);
            },
            [&](const uint16_t* y, const Sample& sample, uint32_t* errors) {
              check_outputs<<<sample.blocks(), 256>>>(dense.weights.get(), nullptr, BLOCKS ? 1e-5 : 4e-6, x.get(),
                                                      x_stride, y, y_stride, rows, cols, batch, sample.count,
                                                      sample.step, errors);
            });
        if (outcome.failed())
          printf("FAILED: %dx%d %s, %d rows of x, width %s: %s\n", rows, cols, name_of(kind), batch,
                 name_of(width, cut).c_str(), outcome.text().c_str());
      }
}

static void time_shape(const Device& device, const Cublas& cublas, int rows, int cols) {
  const DenseMatrix dense = matrix(rows, cols, ROW_COL);
  const Packed packed(dense);
  const Rotation plain(dense.weights.get(), (size_t)rows * cols * 2, 700000000),
      copies(packed.weights(), packed.bytes(), 650000000);
  for (int batch : {128, 192, 256, 512, 1024})
    time_beside(cublas, plain, rows, cols, batch, [&](const uint16_t* x, uint16_t* y, const auto& time) {
      for (const Width& width : WIDTHS)
        for (int cut = WHOLE; cut <= MOST_PIECES; cut++) {
          if (width.columns >= batch + 128) continue;
          Launches launches(device, packed, dense, batch, width, cut);
          if (!launches.fits) continue;
          time(name_of(width, cut),
               [&](int i, cudaStream_t stream) { launches.run(x, cols, copies.of(i), y, rows, stream, true); });
        }
    });
}

static void check_all(const Device& device, bool small) {
  check(device, 128, 128, NORMAL, {64});
  check(device, 256, 1024, NORMAL, {65, 256});
  check(device, 37, 2050, STUDENT_T, {65, 257}, 3);
  check(device, 130, 600, SPECIALS, {100}, 1);
  check(device, 300, 700, RANDOM_BITS, {130});
  check(device, 512, 1500, NON_FINITE, {140}, 8);
  if (!small) {
    check(device, 1, 1, NORMAL, {70});
    check(device, 600, 600, ROW_COL, {33, 130, 300});
    check(device, 37, 9000, STUDENT_T, {65, 257}, 3);
    check(device, 130, 2050, SPECIALS, {100, 512}, 1);
    check(device, 512, 1500, ROW_COL, {200}, 0, true);
    check(device, 4096, 4096, ROW_COL, {512});
    check(device, 14336, 4096, STUDENT_T, {512});
    check(device, 14336, 4096, STUDENT_T, {64, 128}, 0, false, 200);
    check(device, 300, 3000, STUDENT_T, {64, 192}, 0, false, 500);
  }
}

int main(int argc, char** argv) { return program("prefill", argc, argv, check_all, time_shape); }

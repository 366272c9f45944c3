// Checks and times the products of 17 to 64 rows of activations (kernels/stream.cuh, compute capability 9.0) beside
// cuBLAS. From the top of the repository:
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o target/stream benches/kernels/stream.cu -ldl
//     target/stream check [--small]    against f64, and repeated launches against each other; exit status 1 on failure
//     target/stream time               every kernel, blocks whole, cut for all multiprocessors, and cut evenly
//
// -DLAYOUT=LayoutQ4K, LayoutInt4G128 and so on (kernels/kquant_formats.cuh) take another layout than `fixed`. More
// kernels are tried than the crate has of a layout.
#include "../../kernels/stream.cuh"
#include "layout.cuh"

using namespace bench;
using namespace taper;

#define STREAM(N, WGS)                                                      \
  extern "C" __global__ void __launch_bounds__(Stream<L, N, WGS>::BLOCK, 1) \
      stream_##N##_##WGS(const __grid_constant__ Prefill p) {               \
    stream_product<L, N, WGS>(p);                                           \
  }
STREAM(32, 2)
STREAM(64, 2)
STREAM(32, 4)
STREAM(64, 4)
STREAM(32, 3)
STREAM(64, 3)
STREAM(128, 2)

struct Width {
  int columns, wgs, threads, shared;
  const void* kernel;
};
template <int N, int WGS>
static Width width_of(const void* kernel) {
  using S = Stream<L, N, WGS>;
  return {N, WGS, S::BLOCK, S::BYTES, kernel};
}
static const Width WIDTHS[] = {width_of<32, 2>((void*)stream_32_2),  width_of<64, 2>((void*)stream_64_2),
                               width_of<32, 4>((void*)stream_32_4),  width_of<64, 4>((void*)stream_64_4),
                               width_of<32, 3>((void*)stream_32_3),  width_of<64, 3>((void*)stream_64_3),
                               width_of<128, 2>((void*)stream_128_2)};

// A product. pieces: 0 leaves blocks whole, 1 cuts them so that all multiprocessors have as much to do, others are
// those of each block.
struct Launches {
  Prefill p = {};
  Width width;
  int grid = 0;

  Launches(const Device& device, const Packed& packed, const DenseMatrix& dense, int batch, const Width& width_,
           int pieces)
      : width(width_) {
    CUDA(cudaFuncSetAttribute(width.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, width.shared));
    const Shape<L>& shape = packed.shape();
    const long long blocks = ceil_div(shape.tiles, 4 * width.wgs) * (long long)ceil_div(batch, width.columns);
    if (pieces > 1) {
      if (blocks * pieces <= device.multiprocessors && shape.units >= pieces) grid = p.cut = blocks, grid *= pieces;
    } else {
      grid = (int)std::min<long long>(device.multiprocessors, pieces ? blocks * shape.units : blocks);
      if (pieces && blocks % grid) p.cut = (int)std::min(blocks, blocks % grid + grid);
      if (pieces && !p.cut) grid = 0;
    }
    p.weights = packed.weights(), p.overflow = packed.overflow();
    p.rows = dense.rows, p.cols = dense.cols, p.batch = batch;
    p.by128 = 128, p.by8 = 8;
    p.partial = device.partial.get(), p.arrived = device.arrived.get();
  }
  void run(const uint16_t* x, int x_stride, const uint8_t* weights, uint16_t* y, int y_stride, cudaStream_t stream,
           bool programmatic) {
    p.x = (const uint8_t*)x, p.x_stride = x_stride, p.weights = weights, p.y = y, p.y_stride = y_stride;
    const Config how(grid, width.threads, width.shared, stream, programmatic);
    void* arguments[] = {(void*)&p};
    CUDA(cudaLaunchKernelExC(&how.config, width.kernel, arguments));
  }
};

static std::string name_of(const Width& width, int pieces) {
  std::string s = std::to_string(width.columns) + "/" + std::to_string(64 * width.wgs);
  return s + (pieces > 1 ? " in " + std::to_string(pieces) : pieces ? " cut" : "");
}

static void check(const Device& device, int rows, int cols, Kind kind, std::initializer_list<int> batches, int pad = 0,
                  bool special_x = false, int rounds = 3) {
  if (BLOCKS) cols = (cols + 255) / 256 * 256;
  const DenseMatrix dense = matrix(rows, cols, kind);
  const Packed packed(dense);
  for (int batch : batches)
    for (const Width& width : WIDTHS)
      for (int pieces = 0; pieces <= 8; pieces++) {
        Launches launches(device, packed, dense, batch, width, pieces);
        if (width.columns >= batch + 128 || !launches.grid) continue;
        const int x_stride = cols + pad, y_stride = rows + pad;
        const Buffer<uint16_t> x((size_t)batch * x_stride);
        make_activations<<<blocks_for((size_t)batch * x_stride), 256>>>(x.get(), (size_t)batch * x_stride, bench::BF16,
                                                                        special_x, 5);
        const Outcome outcome = repeat(
            rounds, rows, batch, y_stride,
            [&](uint16_t* y, bool programmatic) {
              launches.run(x.get(), x_stride, packed.weights(), y, y_stride, 0, programmatic);
            },
            [&](const uint16_t* y, const Sample& sample, uint32_t* errors) {
              check_outputs<<<sample.blocks(), 256>>>(dense.weights.get(), dense.row_scales.get(), BLOCKS ? 1e-5 : 4e-6,
                                                      x.get(), x_stride, y, y_stride, rows, cols, batch, sample.count,
                                                      sample.step, errors);
            });
        if (outcome.failed())
          printf("FAILED: %dx%d %s, %d rows of x, %s: %s\n", rows, cols, name_of(kind), batch,
                 name_of(width, pieces).c_str(), outcome.text().c_str());
      }
}

static void time_shape(const Device& device, const Cublas& cublas, int rows, int cols) {
  const DenseMatrix dense = matrix(rows, cols, ROW_COL);
  const Packed packed(dense);
  const Rotation plain(dense.weights.get(), (size_t)rows * cols * 2, 700000000),
      copies(packed.weights(), packed.bytes(), 650000000);
  for (int batch : {32, 64, 128})
    time_beside(cublas, plain, rows, cols, batch, [&](const uint16_t* x, uint16_t* y, const auto& time) {
      for (const Width& width : WIDTHS)
        for (int pieces = 0; pieces <= 8; pieces++) {
          Launches launches(device, packed, dense, batch, width, pieces);
          if (width.columns < std::min(batch, 128) || width.columns >= 2 * std::max(batch, 32) || !launches.grid)
            continue;
          if (pieces > 1 && launches.grid < 90) continue;
          time(name_of(width, pieces),
               [&](int i, cudaStream_t stream) { launches.run(x, cols, copies.of(i), y, rows, stream, true); });
        }
    });
}

static void check_all(const Device& device, bool small) {
  check(device, 128, 128, NORMAL, {64});
  check(device, 256, 1024, NORMAL, {65});
  check(device, 37, 2056, STUDENT_T, {65}, 8);
  check(device, 130, 600, SPECIALS, {40}, 8);
  check(device, 300, 704, RANDOM_BITS, {130});
  check(device, 512, 1504, NON_FINITE, {140}, 8);
  if (!small) {
    check(device, 1, 8, NORMAL, {17, 70});
    check(device, 600, 600, ROW_COL, {33, 130, 300});
    check(device, 37, 9000, STUDENT_T, {65, 257}, 8);
    check(device, 130, 2056, SPECIALS, {100}, 3);
    check(device, 512, 1504, ROW_COL, {200}, 0, true);
    check(device, 4096, 4096, ROW_COL, {32, 64, 128});
    check(device, 6144, 4096, ROW_COL, {17, 64});
    check(device, 14336, 4096, STUDENT_T, {64, 128}, 0, false, 20);
    check(device, 300, 3000, STUDENT_T, {20, 64, 192}, 0, false, 50);
  }
}

int main(int argc, char** argv) { return program("stream", argc, argv, check_all, time_shape); }

// Checks and times the products of 17 to 128 rows of activations (kernels/stream.cuh, compute capability 9.0) beside
// cuBLAS. From the top of the repository:
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o target/stream benches/kernels/stream.cu -ldl
//     target/stream check [--small]    against f64, and repeated launches against each other; exit status 1 on failure
//     target/stream time               every kernel, blocks whole, cut for all multiprocessors, and cut evenly
//
// -DLAYOUT=LayoutQ4K, LayoutInt4G128 and so on (kernels/kquant_formats.cuh) take another layout than `fixed`. More
// kernels are tried than the crate has of a layout.
#include <cstring>
#include <string>

#ifndef LAYOUT
#define LAYOUT Fixed
#endif
#include "../../kernels/fixed.cu"
#include "../../kernels/repair.cu"
#include "../../kernels/stream.cuh"
#include "blocks.cuh"
#include "cublas.cuh"
#include "timing.cuh"

using namespace bench;
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
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = width.threads, config.dynamicSmemBytes = width.shared,
    config.stream = stream;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute, config.numAttrs = programmatic;
    void* arguments[] = {(void*)&p};
    CUDA(cudaLaunchKernelExC(&config, width.kernel, arguments));
  }
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

// One warp an output: y against the sum in f64. errors[0]: how many are wrong, [1]: the first one's place + 1.
__global__ void check_outputs(const uint16_t* w, const float* exact, const uint16_t* x, int x_stride, const uint16_t* y,
                              int y_stride, int rows, int cols, int batch, long long count, long long step,
                              uint32_t* errors) {
  const long long warp = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / 32;
  if (warp >= count) return;
  const long long place = warp * step % ((long long)rows * batch);
  const int m = place / rows, row = place % rows, lane = threadIdx.x % 32;
  double sum = 0, size = 0;
  for (int k = lane; k < cols; k += 32) {
    const double t = (double)(exact ? exact[(size_t)row * cols + k] : from_bf16(w[(size_t)row * cols + k])) *
                     from_bf16(x[(size_t)m * x_stride + k]);
    sum += t, size += fabs(t);
  }
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o), size += __shfl_xor_sync(~0u, size, o);
  const double got = from_bf16(y[(size_t)m * y_stride + row]);
  const bool fine = isnan(sum)   ? isnan(got)
                    : isinf(sum) ? got == sum
                                 : fabs(got - sum) <= fabs(sum) / 250 + (BLOCKS ? 1e-5 : 4e-6) * size + 1e-38;
  if (lane == 0 && !fine && atomicAdd(errors, 1) == 0) errors[1] = (uint32_t)(place + 1);
}

static int checks = 0, failures = 0;

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
        const size_t outputs = (size_t)batch * y_stride;
        Buffer<uint16_t> x((size_t)batch * x_stride), y(outputs);
        make_activations<<<blocks_for((size_t)batch * x_stride), 256>>>(x.get(), (size_t)batch * x_stride, bench::BF16,
                                                                        special_x, 5);
        std::vector<uint16_t> first(outputs), again(outputs);
        bool same = true, kept = true;
        const Buffer<uint32_t> errors(2);
        for (int round = 0; round < rounds; round++) {
          y.fill(0x77, outputs);
          launches.run(x.get(), x_stride, packed.weights(), y.get(), y_stride, 0, round != 1);
          CUDA(cudaDeviceSynchronize());
          y.download((round ? again : first).data(), outputs);
          if (round) {
            same = same && first == again;
            continue;
          }
          errors.fill(0, 2);
          const long long all = (long long)rows * batch, count = std::min<long long>(all, 200000);
          check_outputs<<<(int)((count * 32 + 255) / 256), 256>>>(dense.weights.get(), dense.row_scales.get(), x.get(),
                                                                  x_stride, y.get(), y_stride, rows, cols, batch, count,
                                                                  all == count ? 1 : 102949, errors.get());
        }
        uint32_t e[2];
        errors.download(e, 2);
        for (int m = 0; m < batch; m++)
          for (int r = rows; r < y_stride; r++) kept = kept && first[(size_t)m * y_stride + r] == 0x7777;
        checks++;
        if (!e[0] && same && kept) continue;
        failures++;
        printf("FAILED: %dx%d %s, %d rows of x, %s: %u wrong (first of x's row %d, row %d)%s%s\n", rows, cols,
               name_of(kind), batch, name_of(width, pieces).c_str(), e[0], (int)((e[1] - 1) / rows),
               (int)((e[1] - 1) % rows), same ? "" : ", not the same twice", kept ? "" : ", wrote past the rows");
      }
}

static void time_shape(const Device& device, const Cublas& cublas, int rows, int cols,
                       std::initializer_list<int> batches) {
  const DenseMatrix dense = matrix(rows, cols, ROW_COL);
  const Packed packed(dense);
  const size_t weights = (size_t)rows * cols;
  const Rotation plain(dense.weights.get(), weights * 2, 700000000),
      copies(packed.weights(), packed.bytes(), 650000000);
  for (int batch : batches) {
    Buffer<uint16_t> x((size_t)batch * cols), y((size_t)batch * rows);
    make_activations<<<blocks_for((size_t)batch * cols), 256>>>(x.get(), (size_t)batch * cols, bench::BF16, false, 5);
    const double peer = time_launches(16, [&](int i, cudaStream_t stream) {
      cublas.product(stream, plain.of(i), x.get(), y.get(), rows, cols, batch);
    });
    std::string text;
    double best = 1e9;
    for (const Width& width : WIDTHS)
      for (int pieces = 0; pieces <= 8; pieces++) {
        Launches launches(device, packed, dense, batch, width, pieces);
        if (width.columns < std::min(batch, 128) || width.columns >= 2 * std::max(batch, 32) || !launches.grid)
          continue;
        if (pieces > 1 && launches.grid < 90) continue;
        const double us = time_launches(16, [&](int i, cudaStream_t stream) {
          launches.run(x.get(), cols, copies.of(i), y.get(), rows, stream, true);
        });
        char line[64];
        snprintf(line, sizeof line, "  %s %.1f", name_of(width, pieces).c_str(), us);
        text += line, best = std::min(best, us);
      }
    printf("%dx%d %d rows: cuBLAS %.1f; best %.1f us (%.2fx) |%s\n", rows, cols, batch, peer, best, peer / best,
           text.c_str());
  }
}

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const bool timed = argc == 2 && !strcmp(argv[1], "time"), small = argc == 3 && !strcmp(argv[2], "--small");
  if (!timed && !(argc >= 2 && !strcmp(argv[1], "check") && argc == 2 + small))
    return fputs("usage: stream check [--small] | stream time\n", stderr), 2;
  const Device device;
  if (timed) {
    const Cublas cublas;
    for (auto [rows, cols] :
         {std::pair{6144, 4096}, {4096, 4096}, {14336, 4096}, {28672, 4096}, {4096, 14336}, {8192, 2048}})
      time_shape(device, cublas, rows, cols, {32, 64, 128});
    return 0;
  }
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
  printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}

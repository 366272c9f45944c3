// Checks and times the products of 4-bit integers with activations rounded to e4m3 (kernels/fp8.cuh, compute capability
// 9.0) beside cuBLAS on the bf16 matrix. From the top of the repository:
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o target/fp8 benches/kernels/fp8.cu -ldl
//     target/fp8 check [--small]    against f64 of the rounded activations, and repeated launches against each other;
//                                   prints what the rounding costs; exit status 1 on failure
//     target/fp8 time               every width, blocks whole and cut; times include the arranging of activations
//
// -DMMA, with -arch=sm_89 or later, takes the kernels of other GPUs (kernels/fp8_mma.cuh), which 9.0 can run too.
#ifdef MMA
#include "../../kernels/fp8_mma.cu"
constexpr int THREADS = taper::FP8_MMA_BLOCK;
#else
#include "../../kernels/fp8.cu"
constexpr int THREADS = taper::PREFILL_BLOCK;
#endif
#include "many_rows.cuh"
#include "kquant.cuh"

using namespace bench;

using Matrix = KQuantMatrix<LayoutInt4G128>;

struct Width {
  int columns, shared;
  const void* kernel;
};
#ifdef MMA
#define WIDTH(N) {N, fp8_mma_shared_bytes<LayoutInt4G128, N>(), (void*)fp8_mma_product_##N}
static const Width WIDTHS[] = {WIDTH(64), WIDTH(128)};
#else
#define WIDTH(N) {N, fp8_shared_bytes<LayoutInt4G128, N>(), (void*)fp8_product_##N}
static const Width WIDTHS[] = {WIDTH(64), WIDTH(128), WIDTH(256)};
#endif
constexpr int TILES = 8;  // of a block

// A product and the arranging of its activations, planned as src/cuda/fp8.rs does.
struct Launches {
  Prefill p = {};
  Width width;
  int padded, grid, units, multiprocessors;

  Launches(const Device& device, const Matrix& packed, const DenseMatrix& dense, int batch, const Width& width_,
           bool cut)
      : width(width_), multiprocessors(device.multiprocessors) {
    CUDA(cudaFuncSetAttribute(width.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, width.shared));
    const auto& shape = packed.shape();
    padded = ceil_div(batch, width.columns) * width.columns, units = shape.units;
    const long long blocks = ceil_div(shape.tiles, TILES) * (long long)(padded / width.columns);
    grid = (int)std::min<long long>(device.multiprocessors, cut ? blocks * units : blocks);
    if (cut && blocks % grid) p.cut = (int)std::min(blocks, blocks % grid + grid);
    p.weights = packed.weights();
    p.rows = dense.rows, p.cols = dense.cols, p.batch = batch;
    p.partial = device.partial.get(), p.arrived = device.arrived.get();
  }
  size_t arranged_bytes() const { return Fp8Arranged(padded, units).bytes; }
  void run(const uint16_t* x, int x_stride, uint8_t* arranged, const uint8_t* weights, uint16_t* y, int y_stride,
           cudaStream_t stream, bool programmatic) {
    p.x = arranged, p.weights = weights, p.y = y, p.y_stride = y_stride;
    const Config first(padded, fp8_arrangers(p.cols), 0, stream, programmatic && padded > 2 * multiprocessors);
    CUDA(cudaLaunchKernelEx(&first.config, fp8_arrange,
                            Fp8Arrange{x, arranged, bench::BF16, x_stride, p.batch, p.cols, width.columns, padded}));
    const Config second(grid, THREADS, width.shared, stream, programmatic);
    void* arguments[] = {(void*)&p};
    CUDA(cudaLaunchKernelExC(&second.config, width.kernel, arguments));
  }
};

static DenseMatrix matrix(int rows, int cols, Kind kind) {
  DenseMatrix dense(rows, cols, cols);
  dense.blocks = Matrix::make(rows, cols, kind, 1);
  return dense;
}

// Rows of activations as they are rounded: another way than the kernel does it. A thread each.
__global__ void round_rows(const uint16_t* x, int x_stride, double* out, int cols, int batch) {
  const int m = blockIdx.x * blockDim.x + threadIdx.x;
  if (m >= batch) return;
  double most = 0;
  bool finite = true;
  for (int k = 0; k < cols; k++) {
    const double v = fabs((double)from_bf16(x[(size_t)m * x_stride + k]));
    if (!(v <= 1e300)) finite = false;
    most = fmax(most, v);
  }
  int e = 0;
  const double mantissa = frexp(most, &e);  // 0.5 to 1
  double scale = most > 0 ? ldexp(1.0, 9 - e - (mantissa > 0.875)) : 1;
  if (most < 1e-30) scale = ldexp(1.0, 100);
  for (int k = 0; k < cols; k++) {
    const double v = from_bf16(x[(size_t)m * x_stride + k]) * scale;
    int at = 0;
    frexp(v, &at);
    const double step = ldexp(1.0, max(at - 4, -9));
    out[(size_t)m * cols + k] = finite ? rint(v / step) * step / scale : NAN;
  }
}

// One warp an output. errors[0]: how many are wrong, [1]: the first one's place + 1; worst: of the errors over the sum
// of magnitudes; squares: of the rounding's errors and of the exact products.
__global__ void check_rounded(const float* w, const double* rounded, const uint16_t* x, int x_stride, const uint16_t* y,
                              int y_stride, int rows, int cols, int batch, long long count, long long step,
                              uint32_t* errors, float* worst, double* squares) {
  const long long warp = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / 32;
  if (warp >= count) return;
  const long long place = warp * step % ((long long)rows * batch);
  const int m = place / rows, row = place % rows, lane = threadIdx.x % 32;
  double sum = 0, size = 0, exact = 0;
  for (int k = lane; k < cols; k += 32) {
    const double v = w[(size_t)row * cols + k], t = v * rounded[(size_t)m * cols + k];
    sum += t, size += fabs(t), exact += v * from_bf16(x[(size_t)m * x_stride + k]);
  }
  for (int o = 16; o; o /= 2) {
    sum += __shfl_xor_sync(~0u, sum, o), size += __shfl_xor_sync(~0u, size, o);
    exact += __shfl_xor_sync(~0u, exact, o);
  }
  const double got = from_bf16(y[(size_t)m * y_stride + row]), error = fmax(0.0, fabs(got - sum) - fabs(sum) / 250);
  const bool fine = isfinite(sum) ? error <= 2e-4 * size + 1e-38 : !isfinite(got);
  if (lane) return;
  if (isfinite(sum)) {
    atomicMax((int*)worst, __float_as_int((float)(error / (size + 1e-300))));
    atomicAdd(squares, (sum - exact) * (sum - exact)), atomicAdd(squares + 1, exact * exact);
  }
  if (!fine && atomicAdd(errors, 1) == 0) errors[1] = (uint32_t)(place + 1);
}

static std::string name_of(const Width& width, bool cut) { return std::to_string(width.columns) + (cut ? " cut" : ""); }

static void check(const Device& device, int rows, int cols, Kind kind, std::initializer_list<int> batches, int pad = 0,
                  bool special_x = false) {
  const DenseMatrix dense = matrix(rows, cols, kind);
  const Matrix packed(device, dense);
  const size_t weights = (size_t)rows * cols;
  const Buffer<float> exact(weights), spread(weights);
  const Buffer<uint16_t> unused(weights);
  dequantize<LayoutInt4G128>
      <<<1056, 256>>>(dense.blocks.get(), exact.get(), unused.get(), spread.get(), rows, cols, bench::BF16);
  for (int batch : batches)
    for (const Width& width : WIDTHS)
      for (bool cut : {false, true}) {
        if (width.columns >= batch + 128) continue;
        const int x_stride = cols + pad, y_stride = rows + pad;
        const Buffer<uint16_t> x((size_t)batch * x_stride);
        make_activations<<<blocks_for((size_t)batch * x_stride), 256>>>(x.get(), (size_t)batch * x_stride, bench::BF16,
                                                                        special_x, 5);
        const Buffer<double> rounded((size_t)batch * cols), squares(2);
        round_rows<<<ceil_div(batch, 32), 32>>>(x.get(), x_stride, rounded.get(), cols, batch);
        Launches launches(device, packed, dense, batch, width, cut);
        const Buffer<uint8_t> arranged(launches.arranged_bytes());
        const Buffer<float> worst(1);
        worst.fill(0, 1), squares.fill(0, 2);
        const Outcome outcome = repeat(
            3, rows, batch, y_stride,
            [&](uint16_t* y, bool programmatic) {
              launches.run(x.get(), x_stride, arranged.get(), packed.weights(), y, y_stride, 0, programmatic);
            },
            [&](const uint16_t* y, const Sample& sample, uint32_t* errors) {
              check_rounded<<<sample.blocks(), 256>>>(exact.get(), rounded.get(), x.get(), x_stride, y, y_stride, rows,
                                                      cols, batch, sample.count, sample.step, errors, worst.get(),
                                                      squares.get());
            });
        float most;
        double q[2];
        worst.download(&most, 1), squares.download(q, 2);
        if (!outcome.failed() && width.columns != 128) continue;
        char more[96];
        snprintf(more, sizeof more, ", error %.1e of the sum of magnitudes; rounding of x costs %.4f", most,
                 sqrt(q[0] / q[1]));
        printf("%s%dx%d %s, %d rows of x, width %s: %s\n", outcome.failed() ? "FAILED: " : "", rows, cols,
               name_of(kind), batch, name_of(width, cut).c_str(), outcome.text(more).c_str());
      }
}

static void time_shape(const Device& device, const Cublas& cublas, int rows, int cols) {
  const DenseMatrix dense = matrix(rows, cols, NORMAL);
  const Matrix packed(device, dense);
  const size_t weights = (size_t)rows * cols;
  const Buffer<float> exact(weights), spread(weights);
  const Buffer<uint16_t> rounded(weights);
  dequantize<LayoutInt4G128>
      <<<1056, 256>>>(dense.blocks.get(), exact.get(), rounded.get(), spread.get(), rows, cols, bench::BF16);
  const Rotation plain(rounded.get(), weights * 2, 700000000), copies(packed.weights(), packed.bytes(), 650000000);
  for (int batch : {64, 128, 256, 512, 1024})
    time_beside(cublas, plain, rows, cols, batch, [&](const uint16_t* x, uint16_t* y, const auto& time) {
      for (const Width& width : WIDTHS)
        for (bool cut : {false, true}) {
          if (width.columns >= batch + 128 || (width.columns == 64 && batch > 128)) continue;
          Launches launches(device, packed, dense, batch, width, cut);
          const Buffer<uint8_t> arranged(launches.arranged_bytes());
          time(name_of(width, cut), [&](int i, cudaStream_t stream) {
            launches.run(x, cols, arranged.get(), copies.of(i), y, rows, stream, true);
          });
        }
    });
}

static void check_all(const Device& device, bool small) {
  check(device, 128, 128, NORMAL, {64});
  check(device, 256, 1024, NORMAL, {65, 256});
  check(device, 40, 2048, STUDENT_T, {65, 257}, 8);
  check(device, 130, 640, RANDOM_BITS, {100}, 1);
  check(device, 520, 1536, CONSTANT, {140}, 8, true);
  if (!small) {
    check(device, 1, 128, NORMAL, {70});
    check(device, 600, 640, ROW_COL, {33, 130, 300});
    check(device, 40, 8960, STUDENT_T, {65, 257}, 3);
    check(device, 130, 2048, ZEROS, {100, 512}, 1);
    check(device, 512, 1536, TINY_ROWS, {200}, 0, true);
    check(device, 4096, 4096, ROW_COL, {512});
    check(device, 14336, 4096, STUDENT_T, {64, 512});
  }
}

int main(int argc, char** argv) { return program("fp8", argc, argv, check_all, time_shape); }

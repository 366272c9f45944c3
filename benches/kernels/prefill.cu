// Checks and times the products of `fixed` with many rows of activations (kernels/prefill.cuh, compute capability 9.0)
// beside cuBLAS. From the top of the repository:
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o target/prefill benches/kernels/prefill.cu -ldl
//     target/prefill check [--small]    against f64, and repeated launches against each other; exit status 1 on failure
//     target/prefill time               every width, blocks whole and cut; times include the arranging of activations
#include <cstring>

#include "../../kernels/prefill.cu"
#include "cublas.cuh"
#include "staged.cuh"
#include "timing.cuh"

using namespace bench;

struct Width {
  int columns, shared;
  const void* kernel;
};
static const Width WIDTHS[] = {{128, prefill_shared_bytes<Fixed, 128>(), (void*)fixed_prefill_128},
                               {192, prefill_shared_bytes<Fixed, 192>(), (void*)fixed_prefill_192},
                               {256, prefill_shared_bytes<Fixed, 256>(), (void*)fixed_prefill_256}};

// A product and the arranging of its activations, planned as src/cuda/prefill.rs does.
struct Launches {
  Prefill p = {};
  Width width;
  int padded, grid, units;

  Launches(const Device& device, const Staged<Fixed>& packed, const DenseMatrix& dense, int batch, const Width& width_,
           bool cut)
      : width(width_) {
    CUDA(cudaFuncSetAttribute(width.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, width.shared));
    const Shape<Fixed>& shape = packed.shape();
    padded = ceil_div(batch, width.columns) * width.columns, units = shape.units;
    const long long blocks = ceil_div(shape.tiles, PREFILL_TILES) * (long long)(padded / width.columns);
    grid = (int)std::min<long long>(device.multiprocessors, cut ? blocks * units : blocks);
    if (cut && blocks % grid) p.cut = (int)std::min(blocks, blocks % grid + grid);
    p.weights = packed.weights(), p.overflow = packed.overflow();
    p.rows = dense.rows, p.cols = dense.cols, p.batch = batch;
    p.by128 = 128, p.by8 = 8;
    p.partial = device.partial.get(), p.arrived = device.arrived.get();
  }
  size_t arranged_bytes() const { return (size_t)padded * units * 256; }
  void run(const uint16_t* x, int x_stride, uint8_t* arranged, const uint8_t* weights, uint16_t* y, int y_stride,
           cudaStream_t stream, bool programmatic) {
    p.x = arranged, p.weights = weights, p.y = y, p.y_stride = y_stride;
    const Config first(ceil_div(padded * units * 4, 256), 256, 0, stream, programmatic);
    CUDA(cudaLaunchKernelEx(&first.config, prefill_arrange,
                            Arrange{x, arranged, x_stride, p.batch, p.cols, width.columns, padded}));
    const Config second(grid, PREFILL_BLOCK, width.shared, stream, programmatic);
    void* arguments[] = {(void*)&p};
    CUDA(cudaLaunchKernelExC(&second.config, width.kernel, arguments));
  }
};

static DenseMatrix matrix(int rows, int cols, Kind kind) {
  DenseMatrix dense(rows, cols, cols);
  dense.weights = Buffer<uint16_t>((size_t)rows * cols);
  make_weights<<<1056, 256>>>(dense.weights.get(), (size_t)rows * cols, cols, kind, 1);
  return dense;
}

// One warp an output: y against the sum in f64. errors[0]: how many are wrong, [1]: the first one's place + 1.
__global__ void check_outputs(const uint16_t* w, const uint16_t* x, int x_stride, const uint16_t* y, int y_stride,
                              int rows, int cols, int batch, long long count, long long step, uint32_t* errors) {
  const long long warp = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / 32;
  if (warp >= count) return;
  const long long place = warp * step % ((long long)rows * batch);
  const int m = place / rows, row = place % rows, lane = threadIdx.x % 32;
  double sum = 0, size = 0;
  for (int k = lane; k < cols; k += 32) {
    const double t = (double)from_bf16(w[(size_t)row * cols + k]) * from_bf16(x[(size_t)m * x_stride + k]);
    sum += t, size += fabs(t);
  }
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o), size += __shfl_xor_sync(~0u, size, o);
  const double got = from_bf16(y[(size_t)m * y_stride + row]);
  const bool fine = isnan(sum)   ? isnan(got)
                    : isinf(sum) ? got == sum
                                 : fabs(got - sum) <= fabs(sum) / 250 + 4e-6 * size + 1e-38;
  if (lane == 0 && !fine && atomicAdd(errors, 1) == 0) errors[1] = (uint32_t)(place + 1);
}

static int checks = 0, failures = 0;

static void check(const Device& device, int rows, int cols, Kind kind, std::initializer_list<int> batches, int pad = 0,
                  bool special_x = false, int rounds = 3) {
  const DenseMatrix dense = matrix(rows, cols, kind);
  const Staged<Fixed> packed(device, dense);
  for (int batch : batches)
    for (const Width& width : WIDTHS)
      for (bool cut : {false, true}) {
        if (width.columns >= batch + 128) continue;
        const int x_stride = cols + pad, y_stride = rows + pad;
        const size_t outputs = (size_t)batch * y_stride;
        Buffer<uint16_t> x((size_t)batch * x_stride), y(outputs);
        make_activations<<<blocks_for((size_t)batch * x_stride), 256>>>(x.get(), (size_t)batch * x_stride, bench::BF16,
                                                                        special_x, 5);
        Launches launches(device, packed, dense, batch, width, cut);
        const Buffer<uint8_t> arranged(launches.arranged_bytes());
        std::vector<uint16_t> first(outputs), again(outputs);
        bool same = true, kept = true;
        const Buffer<uint32_t> errors(2);
        for (int round = 0; round < rounds; round++) {
          y.fill(0x77, outputs);
          launches.run(x.get(), x_stride, arranged.get(), packed.weights(), y.get(), y_stride, 0, round != 1);
          CUDA(cudaDeviceSynchronize());
          y.download((round ? again : first).data(), outputs);
          if (round) {
            same = same && first == again;
            continue;
          }
          errors.fill(0, 2);
          const long long all = (long long)rows * batch, count = std::min<long long>(all, 200000);
          check_outputs<<<(int)((count * 32 + 255) / 256), 256>>>(dense.weights.get(), x.get(), x_stride, y.get(),
                                                                  y_stride, rows, cols, batch, count,
                                                                  all == count ? 1 : 102949, errors.get());
        }
        uint32_t e[2];
        errors.download(e, 2);
        for (int m = 0; m < batch; m++)
          for (int r = rows; r < y_stride; r++) kept = kept && first[(size_t)m * y_stride + r] == 0x7777;
        checks++;
        if (!e[0] && same && kept) continue;
        failures++;
        printf("FAILED: %dx%d %s, %d rows of x, width %d%s: %u wrong (first of x's row %d, row %d)%s%s\n", rows, cols,
               name_of(kind), batch, width.columns, cut ? ", cut" : "", e[0], (int)((e[1] - 1) / rows),
               (int)((e[1] - 1) % rows), same ? "" : ", not the same twice", kept ? "" : ", wrote past the rows");
      }
}

static void time_shape(const Device& device, const Cublas& cublas, int rows, int cols,
                       std::initializer_list<int> batches) {
  const DenseMatrix dense = matrix(rows, cols, ROW_COL);
  const Staged<Fixed> packed(device, dense);
  const size_t weights = (size_t)rows * cols;
  const Rotation plain(dense.weights.get(), weights * 2, 700000000),
      copies(packed.weights(), packed.bytes(), 650000000);
  for (int batch : batches) {
    Buffer<uint16_t> x((size_t)batch * cols), y((size_t)batch * rows);
    make_activations<<<blocks_for((size_t)batch * cols), 256>>>(x.get(), (size_t)batch * cols, bench::BF16, false, 5);
    const auto peer = [&] {
      return time_launches(16, [&](int i, cudaStream_t stream) {
        cublas.product(stream, plain.of(i), x.get(), y.get(), rows, cols, batch);
      });
    };
    const double before = peer();
    std::string text;
    double best = 1e9;
    for (const Width& width : WIDTHS)
      for (bool cut : {false, true}) {
        if (width.columns >= batch + 128) continue;
        Launches launches(device, packed, dense, batch, width, cut);
        const Buffer<uint8_t> arranged(launches.arranged_bytes());
        const double us = time_launches(16, [&](int i, cudaStream_t stream) {
          launches.run(x.get(), cols, arranged.get(), copies.of(i), y.get(), rows, stream, true);
        });
        char line[64];
        snprintf(line, sizeof line, "  %d%s %.1f", width.columns, cut ? " cut" : "", us);
        text += line, best = std::min(best, us);
      }
    const double after = peer();
    printf("%dx%d %4d rows: cuBLAS %.1f before, %.1f after; best %.1f us (%.2fx of the mean) |%s\n", rows, cols, batch,
           before, after, best, (before + after) / 2 / best, text.c_str());
  }
}

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const bool timed = argc == 2 && !strcmp(argv[1], "time"), small = argc == 3 && !strcmp(argv[2], "--small");
  if (!timed && !(argc >= 2 && !strcmp(argv[1], "check") && argc == 2 + small))
    return fputs("usage: prefill check [--small] | prefill time\n", stderr), 2;
  const Device device;
  if (timed) {
    const Cublas cublas;
    for (auto [rows, cols] :
         {std::pair{6144, 4096}, {4096, 4096}, {14336, 4096}, {28672, 4096}, {4096, 14336}, {8192, 2048}})
      time_shape(device, cublas, rows, cols, {128, 192, 256, 512, 1024});
    return 0;
  }
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
  printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}

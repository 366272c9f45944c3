// Checks and times the products of `fixed` with many rows of activations (kernels/prefill.cuh, compute capability 9.0)
// beside cuBLAS. From the top of the repository:
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o target/prefill benches/kernels/prefill.cu -ldl
//     target/prefill check [--small]    against f64, and repeated launches against each other; exit status 1 on failure
//     target/prefill time               every width, blocks whole, cut and in parts; times include the arranging of
//                                      activations, where they are arranged
#include <cuda.h>
#include <dlfcn.h>

#include <cstring>

#include "../../kernels/prefill.cu"
#include "../../kernels/prefill_wide.cu"
#include "cublas.cuh"
#include "staged.cuh"
#include "timing.cuh"

using namespace bench;

struct Width {
  int columns, cluster, parts, threads, shared;
  const void* kernel;
  bool arranged = false;  // whether it takes arranged activations (prefill_wide.cuh)
};
template <int N>
static Width width_of(const void* kernel, int parts = 1) {
  return {N, parts > 1 ? parts : CLUSTER, parts, PREFILL_BLOCK<N>, prefill_shared_bytes<Fixed, N>(), kernel};
}
template <int N>
static Width wide_of(const void* kernel) {
  return {N, 1, 1, PREFILL_WIDE_BLOCK, prefill_wide_shared_bytes<Fixed, N>(), kernel, true};
}
static const Width WIDTHS[] = {
    width_of<32>((void*)fixed_prefill_32),           width_of<64>((void*)fixed_prefill_64),
    width_of<128>((void*)fixed_prefill_128),         width_of<32>((void*)fixed_prefill_32_in_2, 2),
    width_of<32>((void*)fixed_prefill_32_in_3, 3),   width_of<64>((void*)fixed_prefill_64_in_2, 2),
    width_of<64>((void*)fixed_prefill_64_in_3, 3),   width_of<128>((void*)fixed_prefill_128_in_2, 2),
    width_of<128>((void*)fixed_prefill_128_in_3, 3), wide_of<192>((void*)fixed_prefill_192),
    wide_of<256>((void*)fixed_prefill_256)};

// x (batch x cols, bf16) in swizzled boxes of 64 columns and `rows` rows.
static TensorMap map_of(const uint16_t* x, int x_stride, int batch, int cols, int rows) {
  static const auto encode =
      (decltype(&cuTensorMapEncodeTiled))dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuTensorMapEncodeTiled");
  TensorMap map;
  static_assert(sizeof map == sizeof(CUtensorMap), "");
  const cuuint64_t sizes[] = {(cuuint64_t)cols, (cuuint64_t)batch}, strides[] = {(cuuint64_t)x_stride * 2};
  const cuuint32_t box[] = {64, (cuuint32_t)rows}, steps[] = {1, 1};
  const CUresult result = encode((CUtensorMap*)&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void*)x, sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) fprintf(stderr, "cuTensorMapEncodeTiled: %d\n", (int)result), exit(1);
  return map;
}

// A product, planned as src/cuda/prefill.rs does.
struct Launches {
  Prefill p = {};
  Width width;
  int grid = 0;  // clusters; none: the kernel does not take it so
  int padded, units;
  Buffer<uint8_t> arranged;

  Launches(const Device& device, const Staged<Fixed>& packed, const DenseMatrix& dense, int batch, const Width& width_,
           bool cut)
      : width(width_) {
    CUDA(cudaFuncSetAttribute(width.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, width.shared));
    const Shape<Fixed>& shape = packed.shape();
    const int sharing = width.cluster / width.parts, clusters = device.multiprocessors / width.cluster;
    const long long blocks = ceil_div(shape.tiles, PREFILL_TILES * sharing) * (long long)ceil_div(batch, width.columns);
    if (width.parts > 1) {
      if (cut && blocks <= clusters && shape.units >= width.parts) grid = p.cut = (int)blocks;
    } else {
      grid = (int)std::min<long long>(clusters, cut ? blocks * shape.units : blocks);
      if (cut && blocks % grid) p.cut = (int)std::min(blocks, blocks % grid + grid);
      if (cut && !p.cut) grid = 0;
    }
    p.weights = packed.weights(), p.overflow = packed.overflow();
    p.rows = dense.rows, p.cols = dense.cols, p.batch = batch;
    p.by128 = 128, p.by8 = 8, p.box_rows = ceil_div(ceil_div(std::min(batch, width.columns), sharing), 8) * 8;
    p.partial = device.partial.get(), p.arrived = device.arrived.get();
    padded = ceil_div(batch, width.columns) * width.columns, units = shape.units;
    if (width.arranged) arranged = Buffer<uint8_t>((size_t)padded * units * 256), p.x = arranged.get();
  }
  void run(const uint16_t* x, int x_stride, const uint8_t* weights, uint16_t* y, int y_stride, cudaStream_t stream,
           bool programmatic) {
    p.weights = weights, p.y = y, p.y_stride = y_stride;
    const Config config(grid * width.cluster, width.threads, width.shared, stream, programmatic);
    if (width.arranged) {
      const Config first(ceil_div(padded * units * 4, 256), 256, 0, stream, programmatic);
      CUDA(cudaLaunchKernelEx(&first.config, prefill_arrange,
                              Arrange{x, arranged.get(), x_stride, p.batch, p.cols, width.columns, padded}));
      void* arguments[] = {(void*)&p};
      CUDA(cudaLaunchKernelExC(&config.config, width.kernel, arguments));
      return;
    }
    TensorMap map = map_of(x, x_stride, p.batch, p.cols, p.box_rows);
    void* arguments[] = {(void*)&map, (void*)&p};
    CUDA(cudaLaunchKernelExC(&config.config, width.kernel, arguments));
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
        Launches launches(device, packed, dense, batch, width, cut);
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
               name_of(kind), batch, width.columns,
               width.parts > 1 ? ", in parts"
               : cut           ? ", cut"
                               : "",
               e[0], (int)((e[1] - 1) / rows), (int)((e[1] - 1) % rows), same ? "" : ", not the same twice",
               kept ? "" : ", wrote past the rows");
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
        Launches launches(device, packed, dense, batch, width, cut);
        const bool narrow = width.columns < batch && width.columns < 128;
        if (width.columns >= 2 * std::max(batch, 32) || narrow || !launches.grid) continue;
        const double us = time_launches(16, [&](int i, cudaStream_t stream) {
          launches.run(x.get(), cols, copies.of(i), y.get(), rows, stream, true);
        });
        char line[64];
        const std::string parts = width.parts > 1 ? " in " + std::to_string(width.parts) : cut ? " cut" : "";
        snprintf(line, sizeof line, "  %d%s %.1f", width.columns, parts.c_str(), us);
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
      time_shape(device, cublas, rows, cols, {32, 64, 128, 256, 512, 1024});
    return 0;
  }
  check(device, 128, 128, NORMAL, {64});
  check(device, 256, 1024, NORMAL, {65, 256});
  check(device, 37, 2056, STUDENT_T, {65, 257}, 8);
  check(device, 130, 600, SPECIALS, {40}, 8);
  check(device, 300, 704, RANDOM_BITS, {130});
  check(device, 512, 1504, NON_FINITE, {140}, 8);
  if (!small) {
    check(device, 1, 8, NORMAL, {17, 70});
    check(device, 600, 600, ROW_COL, {33, 130, 300});
    check(device, 37, 9000, STUDENT_T, {65, 257}, 8);
    check(device, 130, 2056, SPECIALS, {100, 512}, 8);
    check(device, 512, 1504, ROW_COL, {200}, 0, true);
    check(device, 4096, 4096, ROW_COL, {512});
    check(device, 14336, 4096, STUDENT_T, {512});
    check(device, 14336, 4096, STUDENT_T, {64, 128}, 0, false, 200);
    check(device, 300, 3000, STUDENT_T, {64, 192}, 0, false, 500);
  }
  printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}

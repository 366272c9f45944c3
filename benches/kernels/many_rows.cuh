// What the programs that check and time products with many rows of activations have in common: stream.cu, prefill.cu, fp8.cu.
#pragma once
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "common.cuh"
#include "cublas.cuh"
#include "data.cuh"
#include "timing.cuh"

namespace bench {

// One warp an output: y against the sum in f64 over the weights, which are `exact` if that is not null. errors[0]: how
// many are wrong, [1]: the first one's place + 1.
static __global__ void check_outputs(const uint16_t* w, const float* exact, double of_size, const uint16_t* x,
                                     int x_stride, const uint16_t* y, int y_stride, int rows, int cols, int batch,
                                     long long count, long long step, uint32_t* errors) {
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
                                 : fabs(got - sum) <= fabs(sum) / 250 + of_size * size + 1e-38;
  if (lane == 0 && !fine && atomicAdd(errors, 1) == 0) errors[1] = (uint32_t)(place + 1);
}

// Some of a product's outputs, or all: `count` of them, `step` apart, a warp each.
struct Sample {
  long long count, step;
  Sample(int rows, int batch) {
    const long long all = (long long)rows * batch;
    count = std::min<long long>(all, 200000), step = all == count ? 1 : 102949;
  }
  int blocks() const { return (int)((count * 32 + 255) / 256); }
};

static int checks = 0, failures = 0;

// What came of a product's runs.
struct Outcome {
  int rows;
  uint32_t errors[2] = {};        // as check_outputs counts them
  bool same = true, kept = true;  // the same every time; nothing was written between the rows

  bool failed() const { return errors[0] || !same || !kept; }
  // "3 wrong (...)", with `more` behind it.
  std::string text(const char* more = "") const {
    return std::to_string(errors[0]) + " wrong (first of x's row " + std::to_string((int)((errors[1] - 1) / rows)) +
           ", row " + std::to_string((int)((errors[1] - 1) % rows)) + ")" + more +
           (same ? "" : ", not the same twice") + (kept ? "" : ", wrote past the rows");
  }
};

// Runs run(y, programmatic) so many times, and examine(y, sample, errors) after the first.
template <class Run, class Examine>
static Outcome repeat(int rounds, int rows, int batch, int y_stride, const Run& run, const Examine& examine) {
  const size_t outputs = (size_t)batch * y_stride;
  const Buffer<uint16_t> y(outputs);
  const Buffer<uint32_t> errors(2);
  std::vector<uint16_t> first(outputs), again(outputs);
  Outcome outcome{rows};
  for (int round = 0; round < rounds; round++) {
    y.fill(0x77, outputs);
    run(y.get(), round != 1);
    CUDA(cudaDeviceSynchronize());
    y.download((round ? again : first).data(), outputs);
    if (round) {
      outcome.same = outcome.same && first == again;
      continue;
    }
    errors.fill(0, 2);
    examine(y.get(), Sample(rows, batch), errors.get());
  }
  errors.download(outcome.errors, 2);
  for (int m = 0; m < batch; m++)
    for (int r = rows; r < y_stride; r++) outcome.kept = outcome.kept && first[(size_t)m * y_stride + r] == 0x7777;
  checks++, failures += outcome.failed();
  return outcome;
}

// Times of kernels, and cuBLAS's on the dense weights before and after them. each(x, y, time) is called once; it calls
// time(name, run) for every kernel.
template <class Each>
static void time_beside(const Cublas& cublas, const Rotation& dense, int rows, int cols, int batch, const Each& each) {
  const Buffer<uint16_t> x((size_t)batch * cols), y((size_t)batch * rows);
  make_activations<<<blocks_for((size_t)batch * cols), 256>>>(x.get(), (size_t)batch * cols, BF16, false, 5);
  const auto peer = [&] {
    return time_launches(16, [&](int i, cudaStream_t stream) {
      cublas.product(stream, dense.of(i), x.get(), y.get(), rows, cols, batch);
    });
  };
  const double before = peer();
  std::string text;
  double best = 1e9;
  each(x.get(), y.get(), [&](const std::string& name, const auto& run) {
    const double us = time_launches(16, run);
    char line[64];
    snprintf(line, sizeof line, "  %s %.1f", name.c_str(), us);
    text += line, best = std::min(best, us);
  });
  const double after = peer();
  printf("%dx%d %4d rows: cuBLAS bf16 %.1f before, %.1f after; best %.1f us (%.2fx of the mean) |%s\n", rows, cols,
         batch, before, after, best, (before + after) / 2 / best, text.c_str());
}

// The program: `check [--small]` calls check(device, small), `time` calls time(device, cublas, rows, cols) for each shape.
template <class Check, class Time>
static int program(const char* name, int argc, char** argv, const Check& check, const Time& time) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const bool timed = argc == 2 && !strcmp(argv[1], "time"), small = argc == 3 && !strcmp(argv[2], "--small");
  if (!timed && !(argc >= 2 && !strcmp(argv[1], "check") && argc == 2 + small))
    return fprintf(stderr, "usage: %s check [--small] | %s time\n", name, name), 2;
  const Device device;
  if (timed) {
    const Cublas cublas;
    for (auto [rows, cols] :
         {std::pair{6144, 4096}, {4096, 4096}, {14336, 4096}, {28672, 4096}, {4096, 14336}, {8192, 2048}})
      time(device, cublas, rows, cols);
    return 0;
  }
  check(device, small);
  printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}

}  // namespace bench

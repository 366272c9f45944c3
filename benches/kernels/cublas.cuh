// The peer: cuBLAS on the same card, in the same process. Loaded at run time, so that `check` needs no cuBLAS.
#pragma once
#include <dlfcn.h>

#include "common.cuh"

namespace bench {

class Cublas {
 public:
  Cublas() {
    const char* const names[] = {"libcublas.so.13", "/usr/local/cuda/lib64/libcublas.so.13",
                                 "/usr/local/cuda/targets/x86_64-linux/lib/libcublas.so.13", "libcublas.so.12",
                                 "/usr/local/cuda/lib64/libcublas.so.12"};
    void* library = nullptr;
    for (const char* name : names)
      if ((library = dlopen(name, RTLD_NOW | RTLD_GLOBAL))) break;
    if (!library) fail("not found: name its folder in LD_LIBRARY_PATH");
    const auto create = (int (*)(void**))dlsym(library, "cublasCreate_v2");
    const auto set_workspace = (int (*)(void*, void*, size_t))dlsym(library, "cublasSetWorkspace_v2");
    set_stream_ = (int (*)(void*, cudaStream_t))dlsym(library, "cublasSetStream_v2");
    gemm_ = (Gemm)dlsym(library, "cublasGemmEx");
    if (!create || !set_workspace || !set_stream_ || !gemm_) fail("lacks a function");
    if (create(&handle_)) fail("could not start");
    // A work space of its own: graphs may not allocate one.
    workspace_ = Buffer<uint8_t>(WORKSPACE_BYTES);
    if (set_workspace(handle_, workspace_.get(), WORKSPACE_BYTES)) fail("takes no work space");
  }

  // y (batch x rows) = x (batch x cols) W^T, all bf16, sums in f32, cuBLAS chooses the algorithm.
  void product(cudaStream_t stream, const void* weights, const void* x, void* y, int rows, int cols, int batch) const {
    enum { TRANSPOSED = 1, PLAIN = 0, BF16_VALUES = 14, F32_SUMS = 68, ANY_ALGORITHM = -1 };  // of cublas_api.h
    const float one = 1, zero = 0;
    set_stream_(handle_, stream);
    if (gemm_(handle_, TRANSPOSED, PLAIN, rows, batch, cols, &one, weights, BF16_VALUES, cols, x, BF16_VALUES, cols,
              &zero, y, BF16_VALUES, rows, F32_SUMS, ANY_ALGORITHM))
      fail("refused a product");
  }

 private:
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                       const void*, void*, int, int, int, int);
  static constexpr size_t WORKSPACE_BYTES = 64 << 20;

  [[noreturn]] static void fail(const char* why) {
    fprintf(stderr, "cuBLAS, which `time` compares with, %s\n", why);
    exit(1);
  }

  void* handle_ = nullptr;
  Gemm gemm_ = nullptr;
  int (*set_stream_)(void*, cudaStream_t) = nullptr;
  Buffer<uint8_t> workspace_;
};

}  // namespace bench

// Error checks, device memory that frees itself, and what is known about the card.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace bench {

// A failed call ends the program: later results would mean nothing.
#define CUDA(call)                                                                              \
  do {                                                                                          \
    const cudaError_t error = (call);                                                           \
    if (error != cudaSuccess) {                                                                 \
      fflush(stdout);                                                                           \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      exit(1);                                                                                  \
    }                                                                                           \
  } while (0)

// Device memory for `count` values, or none.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) { CUDA(cudaMalloc(&data_, count * sizeof(T))); }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { cudaFree(data_); }
  T* get() const { return data_; }
  void fill(int byte, size_t count) const { CUDA(cudaMemset(data_, byte, count * sizeof(T))); }
  void upload(const T* from, size_t count) const {
    CUDA(cudaMemcpy(data_, from, count * sizeof(T), cudaMemcpyHostToDevice));
  }
  void download(T* to, size_t count) const { CUDA(cudaMemcpy(to, data_, count * sizeof(T), cudaMemcpyDeviceToHost)); }

 private:
  T* data_ = nullptr;
};

__global__ void built_for_warpgroups(int* answer) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  *answer = 1;
#else
  *answer = 0;
#endif
}

struct Device {
  static constexpr size_t PARTIAL_FLOATS = 64u << 20, ARRIVED_WORDS = 1 << 14;

  int multiprocessors = 0, shared_limit = 0;  // dynamic shared memory of a block at most
  bool warpgroups = false;                    // Hopper, and this program has code for it
  Buffer<float> partial;                      // work space of products whose columns are cut into slabs
  Buffer<uint32_t> arrived;

  // Takes the first card and prints what it is: no time means anything without.
  Device() {
    CUDA(cudaSetDevice(0));
    cudaDeviceProp card;
    CUDA(cudaGetDeviceProperties(&card, 0));
    multiprocessors = card.multiProcessorCount, shared_limit = (int)card.sharedMemPerBlockOptin;
    int clock = 0, memory_clock = 0, driver = 0, runtime = 0;
    CUDA(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
    CUDA(cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, 0));
    CUDA(cudaDriverGetVersion(&driver));
    CUDA(cudaRuntimeGetVersion(&runtime));
    printf("%s, compute capability %d.%d, %d multiprocessors of %d bytes\n", card.name, card.major, card.minor,
           multiprocessors, shared_limit);
    printf("clocks at most %d MHz, memory %d MHz: %d bits, twice a clock: %.2f TB/s; CUDA %d.%d, driver for %d.%d\n",
           clock / 1000, memory_clock / 1000, card.memoryBusWidth, 2e3 * memory_clock * card.memoryBusWidth / 8 * 1e-12,
           runtime / 1000, runtime % 1000 / 10, driver / 1000, driver % 1000 / 10);
    partial = Buffer<float>(PARTIAL_FLOATS), arrived = Buffer<uint32_t>(ARRIVED_WORDS);
    arrived.fill(0, ARRIVED_WORDS);
    ask_for_warpgroups(card);
  }

 private:
  void ask_for_warpgroups(const cudaDeviceProp& card) {
    const Buffer<int> answer(1);
    built_for_warpgroups<<<1, 1>>>(answer.get());
    if (cudaGetLastError() == cudaErrorNoKernelImageForDevice) {
      fprintf(stderr, "this program was built for another card; build it with -arch=sm_%d%d\n", card.major, card.minor);
      exit(1);
    }
    int built = 0;
    answer.download(&built, 1);
    warpgroups = built != 0;
  }
};

// A launch that may begin while the kernel before it still runs (programmatic stream serialisation), or a plain one.
struct Config {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  Config(dim3 grid, int block, int shared_bytes, cudaStream_t stream, bool programmatic) {
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    if (programmatic) config.attrs = &attribute, config.numAttrs = 1;
  }
};

}  // namespace bench

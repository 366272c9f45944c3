// How a launch is timed: many of them in one graph, so that the host is not measured, and the graph several times.
#pragma once
#include <algorithm>
#include <vector>

#include "common.cuh"

namespace bench {

// Microseconds a launch: the median over `replays` of a graph of launch(0, stream) .. launch(launches - 1, stream).
// Those take turns with copies of their weights, so that none of them are still in the cache.
template <class F>
double time_launches(int launches, const F& launch, int replays = 7) {
  static const cudaStream_t stream = [] {
    cudaStream_t created;
    CUDA(cudaStreamCreate(&created));
    return created;
  }();
  launch(0, stream);  // outside the graph first: errors show here, and modules are loaded
  CUDA(cudaStreamSynchronize(stream));
  CUDA(cudaGetLastError());
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; i++) launch(i, stream);
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&ready, graph, 0));
  cudaEvent_t begin, end;
  CUDA(cudaEventCreate(&begin));
  CUDA(cudaEventCreate(&end));
  CUDA(cudaGraphLaunch(ready, stream));
  CUDA(cudaStreamSynchronize(stream));
  std::vector<double> times;
  for (int r = 0; r < replays; r++) {
    CUDA(cudaEventRecord(begin, stream));
    CUDA(cudaGraphLaunch(ready, stream));
    CUDA(cudaEventRecord(end, stream));
    CUDA(cudaEventSynchronize(end));
    float milliseconds;
    CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
    times.push_back(milliseconds * 1000.0 / launches);
  }
  CUDA(cudaGetLastError());
  CUDA(cudaGraphExecDestroy(ready));
  CUDA(cudaGraphDestroy(graph));
  CUDA(cudaEventDestroy(begin));
  CUDA(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Copies of `bytes` on the card, one behind the other, to be read in turn: together more than `total`, far more than
// any cache, and at least two.
class Rotation {
 public:
  Rotation(const void* from, size_t bytes, size_t total) : step_((bytes + 255) / 256 * 256) {
    copies_ = std::max<size_t>(2, (total + bytes - 1) / bytes);
    data_ = Buffer<uint8_t>(step_ * copies_);
    for (size_t c = 0; c < copies_; c++)
      CUDA(cudaMemcpy(data_.get() + c * step_, from, bytes, cudaMemcpyDeviceToDevice));
  }
  uint8_t* of(int launch) const { return data_.get() + launch % copies_ * step_; }

 private:
  size_t step_, copies_;
  Buffer<uint8_t> data_;
};

}  // namespace bench

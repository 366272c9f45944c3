// A product, planned: which kernel, in how many blocks, with what arguments. How to plan one is in ../../kernels.
#pragma once
#include <algorithm>
#include <climits>
#include <initializer_list>

#include "../../kernels/repair.cu"
#include "../../kernels/fixed.cu"
#include "../../kernels/float8.cu"
#include "../../kernels/integers.cu"
#include "../../kernels/pair.cu"
#include "../../kernels/window.cu"
#include "data.cuh"

namespace bench {

constexpr int ALL_ROWS = 1 << 30;  // as rows of a block: the whole matrix at once

// Groups of tiles for each slab of the columns, so that the block with most stages has as few as can be. Slabs that have a
// stage more than others have groups of their own number.
struct Groups {
  int each, longer, blocks, most;  // most: stages of a block
  Groups(int tiles, int stages, int slabs, int processors) {
    using taper::ceil_div;
    const int length = stages / slabs, more = stages % slabs, less = slabs - more;
    each = longer = std::min(tiles, std::max(1, processors / slabs));
    most = ceil_div(tiles, each) * (length + (more > 0));
    for (int time = length + 1; more && time < most; time++) {
      const int fewest = ceil_div(tiles, time / length), fewest_longer = ceil_div(tiles, time / (length + 1));
      if (fewest * less + fewest_longer * more > processors) continue;
      each = std::min(tiles, (processors - fewest_longer * more) / less);
      longer = std::min(tiles, (processors - each * less) / more);
      most = time;
    }
    blocks = each * less + longer * more;
  }
};

struct Launch {
  const void* kernel = nullptr;
  int grid = 0, block = 0, shared_bytes = 0;
  bool fits = true;  // else the matrix's stages are too large for the card's shared memory
  // What kernels take; those that take one product only read the first.
  union {
    taper::Products each = {};
    taper::PairProduct pair;
  };

  Launch() { each.each[1].first_block = each.each[2].first_block = INT_MAX; }

  taper::Product& product() { return each.each[0]; }
  const taper::Product& product() const { return each.each[0]; }

  // The same launch with other weights.
  Launch with(const uint8_t* weights) const {
    Launch other = *this;
    other.product().weights = weights;
    return other;
  }

  // Where the activations are and where the product goes; rows are `x_stride` and `y_stride` values apart.
  void bind(const void* x, int x_stride, void* y, int y_stride, Type y_type, const void* bias = nullptr) {
    taper::Product& p = product();
    p.x = x, p.y = y, p.bias = bias, p.x_stride = x_stride, p.y_stride = y_stride, p.y_type = y_type;
  }

  // Slabs of columns and groups of tiles for that many blocks, and the work space.
  void split(const Device& device, int slabs, int tiles, int stages, int columns) {
    taper::Product& p = product();
    const Groups groups(tiles, stages, slabs, device.multiprocessors);
    p.slabs = slabs, p.groups = groups.each, p.longer_groups = groups.longer;
    p.partial = device.partial.get(), p.arrived = device.arrived.get();
    grid = groups.blocks;
    if (tiles > Device::ARRIVED_WORDS) {
      fprintf(stderr, "the work space is too small for %d tiles\n", tiles);
      exit(1);
    }
    if ((size_t)slabs * columns * tiles * taper::TILE_ROWS > Device::PARTIAL_FLOATS) {
      fprintf(stderr, "the work space is too small for %d slabs of %d tiles\n", slabs, tiles);
      exit(1);
    }
  }

  void run(cudaStream_t stream, bool programmatic) const;
};

inline void Launch::run(cudaStream_t stream, bool programmatic) const {
  const Config how(grid, block, shared_bytes, stream, programmatic);
  void* arguments[] = {(void*)&each};
  CUDA(cudaLaunchKernelExC(&how.config, kernel, arguments));
}

// The dynamic shared memory that a block of the kernel may have.
inline int shared_room(const Device& device, const void* kernel) {
  cudaFuncAttributes attributes;
  CUDA(cudaFuncGetAttributes(&attributes, kernel));
  return device.shared_limit - (int)attributes.sharedSizeBytes;
}

// Lets the kernels have as much of it as the card has.
inline void allow_shared_memory(const Device& device, std::initializer_list<const void*> kernels) {
  for (const void* kernel : kernels)
    if (kernel)
      CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_room(device, kernel)));
}

}  // namespace bench

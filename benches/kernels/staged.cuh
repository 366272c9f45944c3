// Matrices in the layouts of equal stages: floats and integers. pair.cuh is the same for `pair`.
#pragma once
#include <string>
#include <type_traits>

#include "../../kernels/kquant_few.cuh"
#include "../../kernels/kquant_single.cuh"
#include "launch.cuh"

namespace bench {

using namespace taper;

struct Products {
  const void *to_8, *to_16, *to_32, *to_64;            // by columns of activations
  const void* single = nullptr;                        // one row, where the layout has it
  const void *few_8 = nullptr, *few_16 = nullptr;      // 2 to 16 rows likewise
  const void *teams_8 = nullptr, *teams_16 = nullptr;  // two teams, where the layout has one otherwise
};

// The kernels of layout L under one set of names. SPREAD_*: standard deviation of the integers it is tried with.
template <class L>
struct Kernels;

#define FLOAT_KERNELS(LAYOUT, L)                                                                                 \
  template <>                                                                                                    \
  struct Kernels<L> {                                                                                            \
    static constexpr const char* NAME = #LAYOUT;                                                                 \
    static constexpr float SPREAD_CHECK = 0, SPREAD_TIME = 0;                                                    \
    static Products products() {                                                                                 \
      return {(void*)LAYOUT##_product_8,                                                                         \
              (void*)LAYOUT##_product_16,                                                                        \
              (void*)LAYOUT##_product_32,                                                                        \
              (void*)LAYOUT##_product_64,                                                                        \
              nullptr,                                                                                           \
              nullptr,                                                                                           \
              nullptr,                                                                                           \
              (void*)LAYOUT##_teams_8,                                                                           \
              (void*)LAYOUT##_teams_16};                                                                         \
    }                                                                                                            \
    static void plan(int grid, cudaStream_t stream, const uint16_t* dense, int rows, int cols, int stride,       \
                     uint4* plan) {                                                                              \
      LAYOUT##_plan<<<grid, 256, 0, stream>>>(dense, rows, cols, stride, plan);                                  \
    }                                                                                                            \
    static void pack(int grid, cudaStream_t stream, const uint16_t* dense, int rows, int cols, int stride,       \
                     const float*, int, int, const uint4* plan, uint8_t* weights, uint32_t* overflow,            \
                     uint32_t capacity) {                                                                        \
      LAYOUT##_pack<<<grid, 256, 0, stream>>>(dense, rows, cols, stride, plan, weights, overflow, capacity);     \
    }                                                                                                            \
    static void decode(const Config& how, const uint8_t* weights, const uint32_t* overflow, const float*,        \
                       uint16_t* out, Type, int rows, int cols, int stride, int tile0) {                         \
      CUDA(cudaLaunchKernelEx(&how.config, LAYOUT##_decode, weights, overflow, out, rows, cols, stride, tile0)); \
    }                                                                                                            \
  };
FLOAT_KERNELS(fixed, Fixed)
FLOAT_KERNELS(window, Window)
FLOAT_KERNELS(e4m3, E4M3)
FLOAT_KERNELS(e5m2, E5M2)

// Rounds weights of the size that data.cuh makes, towards zero, to what the layout is for. Some stay what they are.
template <class L>
__global__ void round_to_bytes(uint16_t* weights, size_t count) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += step) {
    const float v = 64 * from_bf16(weights[i]), least = ldexpf(1, (int)(L::POWER / 128) - 253);  // of normal numbers
    if (!(fabsf(v) < 256)) continue;
    const uint32_t bits = to_bf16(v);
    weights[i] = fabsf(v) < least ? to_bf16(truncf(v / least * (128 >> L::UP)) / (128 >> L::UP) * least)
                                  : (uint16_t)(bits >> L::UP << L::UP);
  }
}

#define INTEGER_KERNELS(LAYOUT, L, CHECK, TIME)                                                                        \
  template <>                                                                                                          \
  struct Kernels<L> {                                                                                                  \
    static constexpr const char* NAME = #LAYOUT;                                                                       \
    static constexpr float SPREAD_CHECK = CHECK, SPREAD_TIME = TIME;                                                   \
    static Products products() {                                                                                       \
      return {(void*)LAYOUT##_product_8, (void*)LAYOUT##_product_16, (void*)LAYOUT##_product_32,                       \
              (void*)LAYOUT##_product_64, nullptr};                                                                    \
    }                                                                                                                  \
    static void plan(int grid, cudaStream_t stream, const uint16_t* dense, int rows, int cols, int stride,             \
                     uint4* plan) {                                                                                    \
      LAYOUT##_plan<<<grid, 256, 0, stream>>>(dense, rows, cols, stride, plan);                                        \
    }                                                                                                                  \
    static void pack(int grid, cudaStream_t stream, const uint16_t* dense, int rows, int cols, int stride,             \
                     const float* tile_scales, int scale_stride, int row0, const uint4* plan, uint8_t* weights,        \
                     uint32_t* overflow, uint32_t capacity) {                                                          \
      LAYOUT##_pack<<<grid, 256, 0, stream>>>(dense, rows, cols, stride, tile_scales, scale_stride, row0, plan,        \
                                              weights, overflow, capacity);                                            \
    }                                                                                                                  \
    static void decode(const Config& how, const uint8_t* weights, const uint32_t* overflow, const float* row_scales,   \
                       uint16_t* out, Type type, int rows, int cols, int stride, int tile0) {                          \
      CUDA(cudaLaunchKernelEx(&how.config, LAYOUT##_decode, weights, overflow, row_scales, out, (int)type, rows, cols, \
                              stride, tile0));                                                                         \
    }                                                                                                                  \
  };
INTEGER_KERNELS(int8, Int8, 30, 30)
INTEGER_KERNELS(int5, IntN<5>, 4.2f, 3.9f)
INTEGER_KERNELS(int4, IntN<4>, 2, 1.9f)

// How a product of stages of equal size is launched (see kernels/product.cuh and wide.cuh).
template <class L>
Launch plan_staged(const Device& device, const Shape<L>& shape, const Products& kernels, const uint8_t* weights,
                   const DenseMatrix& dense, int batch, Type x_type, bool programmatic,
                   const uint32_t* overflow = nullptr) {
  constexpr int STAGE = (int)Shape<L>::stage_bytes();
  const int columns = batch * (x_type + 1),
            limit = shared_room(device, kernels.to_8);  // f16 and f32 take two and three columns
  const bool hopper = device.warpgroups;
  Launch launch;
  Product& p = launch.product();
  p.weights = weights, p.overflow = overflow, p.row_scale = dense.row_scales.get();
  p.rows = dense.rows, p.cols = dense.cols, p.batch = batch, p.x_type = x_type;
  int slabs = 1;
  if constexpr (L::GROUP >= 16)
    if (kernels.few_8 && batch > 1 && batch <= 16 && x_type != F32 && hopper) {
      const auto shared = [&](int slots) {
        return batch <= 8 ? few_shared_bytes<L, 1>(dense.cols, slabs, slots)
                          : few_shared_bytes<L, 2>(dense.cols, slabs, slots);
      };
      constexpr int WANTED = L::C::BYTES == 4 * 256 || L::C::BYTES == 8 * 256 ? 55296 : 36864;
      const int in_flight = std::max(1, (WANTED + STAGE / 2) / STAGE),
                least = FEW_TEAMS + std::min(in_flight, ceil_div(32768, STAGE));  // Ring in ring.cuh
      while (shared(least) > limit && slabs < shape.stages) slabs++;
      // Where slabs meet anyway, activations of more than four stages take longer to come than more sums to add.
      if (slabs > 1) slabs = std::max(slabs, ceil_div(shape.stages, 4));
      while (shape.tiles * slabs * 2 <= device.multiprocessors && slabs < shape.stages) slabs++;
      p.slots = least, launch.fits = shared(least) <= limit;
      while (p.slots < 16 && shared(p.slots + 1) <= limit) p.slots++;
      p.in_flight = std::min(in_flight, p.slots - FEW_TEAMS);
      launch.kernel = batch <= 8 ? kernels.few_8 : kernels.few_16, launch.block = FEW_BLOCK;
      launch.shared_bytes = shared(p.slots);
      launch.split(device, slabs, shape.tiles, shape.stages, columns);
      return launch;
    }
  if (columns <= 16) {
    int teams = taper::teams<L>(hopper);
    const bool single = batch == 1 && x_type != F32 && kernels.single;
    const int wanted = L::GROUP < 16 ? 49152
                       : single      ? 55296
                                     : 27648,
              in_flight = std::max(1, (wanted + STAGE / 2) / STAGE);
    // Slots that teams need besides those on their way: Ring in ring.cuh.
    const auto apart = [&](int teams) { return teams == 1 ? 0 : single ? 2 * teams : teams; };
    const auto least = [&](int teams) {
      // Floats with a slab more, and so more slots, are faster than with the fewest of both.
      constexpr int MORE = L::GROUP == 0 && !L::SCALED;
      return teams > 1 ? std::min(in_flight, ceil_div(32768, STAGE)) + apart(teams) + MORE : 3;
    };
    const auto shared = [&](int slots, int teams, int slabs) {
      if constexpr (L::GROUP >= 16)
        if (single) return single_shared_bytes<L>(dense.cols, slabs, columns, slots, teams, hopper);
      return product_shared_bytes<L>(dense.cols, slabs, batch, x_type + 1, slots, teams, hopper);
    };
    const auto fewest = [&](int teams) {
      int slabs = 1;
      while (shared(least(teams), teams, slabs) > limit && slabs < shape.stages) slabs++;
      return slabs;
    };
    // Two teams gain where there are many columns, if their slots leave room for those, or few stages.
    const auto gain = [&] {
      if (columns <= 4) return std::is_same_v<L, Window> || shape.tiles * shape.stages <= 8 * device.multiprocessors;
      return columns <= 8 ? fewest(1) > 1 || fewest(2) == 1 : fewest(2) <= fewest(1);
    };
    const bool choose = hopper && kernels.teams_8 && gain();
    if (choose) teams = 2;
    slabs = fewest(teams);
    while (shape.tiles * slabs * 2 <= device.multiprocessors && slabs < shape.stages) slabs++;
    const int most = L::GROUP < 16 ? (programmatic ? 3 : 2) * in_flight : 16;
    p.slots = least(teams), p.keep = tiles_kept(single ? 1 : columns, teams);
    launch.fits = shared(p.slots, teams, slabs) <= limit;
    while (p.slots < std::min(16, most) && shared(p.slots + 1, teams, slabs) <= limit) p.slots++;
    p.in_flight = std::min(in_flight, p.slots - apart(teams));
    launch.kernel = single ? kernels.single : columns <= 8 ? kernels.to_8 : kernels.to_16;
    if (choose) launch.kernel = columns <= 8 ? kernels.teams_8 : kernels.teams_16;
    launch.block = block_of(teams), launch.shared_bytes = shared(p.slots, teams, slabs);
  } else {
    slabs = shape.stages;
    p.slots = p.in_flight = std::min(16, (73728 + STAGE - 1) / STAGE);
    launch.kernel = columns <= 32 ? kernels.to_32 : kernels.to_64, launch.block = WIDE_BLOCK;
    while (wide_shared_bytes<L>(columns, p.slots, hopper) > limit) p.slots--;
    launch.shared_bytes = wide_shared_bytes<L>(columns, p.slots, hopper);
  }
  launch.split(device, slabs, shape.tiles, shape.stages, columns);
  return launch;
}

template <class L>
class Staged {
 public:
  static constexpr const char* NAME = Kernels<L>::NAME;
  static constexpr bool BLOCKS = false;
  static constexpr int MOST_COLUMNS = 64;
  static constexpr bool SCALED = L::SCALED;
  static constexpr float SPREAD_CHECK = Kernels<L>::SPREAD_CHECK, SPREAD_TIME = Kernels<L>::SPREAD_TIME;

  static void prepare(const Device& device) {
    const Products p = Kernels<L>::products();
    allow_shared_memory(device, {p.to_8, p.to_16, p.to_32, p.to_64, p.teams_8, p.teams_16});
  }

  // Makes weights what the layout is for.
  static void suit(uint16_t* weights, size_t count) {
    if constexpr (std::is_same_v<L, E4M3> || std::is_same_v<L, E5M2>) round_to_bytes<L><<<1056, 256>>>(weights, count);
  }

  // Packs `block_rows` rows at a time, as a loader does that never holds the whole matrix dense.
  Staged(const Device& device, const DenseMatrix& dense, int block_rows = ALL_ROWS)
      : device_(device), dense_(dense), shape_(dense.rows, dense.cols) {
    bytes_ = (size_t)shape_.tiles * shape_.tile_bytes();
    weights_ = Buffer<uint8_t>(bytes_);
    weights_.fill(0xEE, bytes_);  // whatever packing forgets is no weight
    capacity_ = (uint32_t)std::min<size_t>((size_t)dense.rows * dense.cols + 1024, 1u << 28);
    overflow_ = Buffer<uint32_t>(capacity_);
    const Buffer<uint32_t> totals(8);
    totals.fill(0, 8);
    const Buffer<uint4> plan((size_t)shape_.tiles * shape_.stages);
    for (int row = 0; row < dense.rows; row += block_rows)
      pack(dense.weights.get() + (size_t)row * dense.stride, row, std::min(block_rows, dense.rows - row), capacity_,
           plan.get(), totals.get(), nullptr);
    totals.download(totals_, 5);
    CUDA(cudaGetLastError());
  }

  size_t bytes() const { return bytes_; }
  const uint8_t* weights() const { return weights_.get(); }
  const uint32_t* overflow() const { return overflow_.get(); }
  double bits() const { return (bytes_ + 4.0 * totals_[0]) * 8 / ((double)dense_.rows * dense_.cols); }
  std::string details() const {
    char text[120];
    snprintf(text, sizeof text, "%u repairs (%.4f%%), at most %u a stage, %u stages overflow", totals_[1],
             100.0 * totals_[1] / dense_.rows / dense_.cols, totals_[3], totals_[2]);
    return text;
  }

  // Dense rows of `tiles` tiles from `tile0` on.
  bool decode(const uint8_t* weights, uint16_t* out, Type type, int stride, int tile0, int tiles,
              cudaStream_t stream) const {
    const dim3 grid(shape_.stages, tiles);
    Kernels<L>::decode(Config(grid, 256, 0, stream, true), weights, overflow_.get(), dense_.row_scales.get(), out, type,
                       dense_.rows, dense_.cols, stride, tile0);
    return true;
  }

  Launch plan(int batch, Type x_type, bool programmatic) const {
    return plan_staged(device_, shape_, Kernels<L>::products(), weights_.get(), dense_, batch, x_type, programmatic,
                       overflow_.get());
  }

  const Shape<L>& shape() const { return shape_; }

  // Rows `row` and on from dense ones. plan: for each stage; totals: see repair.cu.
  void pack(const uint16_t* from, int row, int rows, uint32_t capacity, uint4* plan, uint32_t* totals,
            cudaStream_t stream) const {
    const int stages = ceil_div(rows, TILE_ROWS) * shape_.stages;
    Kernels<L>::plan(stages, stream, from, rows, dense_.cols, dense_.stride, plan);
    repair_scan<<<1, 1024, 0, stream>>>(plan, stages, totals);
    Kernels<L>::pack(stages, stream, from, rows, dense_.cols, dense_.stride, dense_.tile_scales.get(),
                     dense_.tile_scale_stride, row, plan, weights_.get() + row / TILE_ROWS * shape_.tile_bytes(),
                     overflow_.get(), capacity);
  }

 private:
  const Device& device_;
  const DenseMatrix& dense_;
  Shape<L> shape_;
  size_t bytes_;
  uint32_t capacity_, totals_[5];
  Buffer<uint8_t> weights_;
  Buffer<uint32_t> overflow_;
};

}  // namespace bench

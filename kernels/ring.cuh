// What a product kernel is given, which part of it a block does, and how weights reach the block's shared memory.
#pragma once
#include "planes.cuh"
#include "unit.cuh"

namespace taper {

struct Product {
  const uint8_t* weights;
  const uint32_t* overflow;
  const float* row_scale;  // a factor for each row, or null
  const void* x;
  const void* bias;  // of type y_type, or null
  void* y;
  float* partial;
  uint32_t* arrived;
  int rows, cols, batch;
  int x_stride, y_stride;  // elements between rows of x and of y
  int x_type, y_type;      // Type
  int groups, slabs;       // groups of tiles for each slab; of slabs with a stage more than others `longer_groups`
  int slots, in_flight;    // stages in the ring, stages on their way at most
  int keep;                // tiles whose sums wait in shared memory to be added together
  int first_block;         // of the grid, where products share a launch
  int longer_groups;
};

// Products with the same activations in one launch; of two the third's first block is past the grid.
struct Products {
  Product each[3];

  __device__ __forceinline__ const Product& mine() const {
    return each[(blockIdx.x >= each[1].first_block) + (blockIdx.x >= each[2].first_block)];
  }
};

constexpr int CONSUMERS = 8, CONSUMER_THREADS = 32 * CONSUMERS, BLOCK = CONSUMER_THREADS + 32;
// Whether this is code for compute capability 9.0; the host is to ask the device.
constexpr bool HOPPER =
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
    false;
#else
    true;
#endif
// Whether layout L has its weights as bytes (integers.cuh), and how many rows of activations it multiplies as such.
template <class L>
__host__ __device__ constexpr int byte_rows() {
  if constexpr (L::GROUP == 0 && L::SCALED)
    return L::BYTE_ROWS;
  else
    return 0;
}

// Teams of eight consumers that share a block's tiles. What a warp does with a unit is a chain of instructions that
// wait for one another: a second team hides that, and halves the time that preparing activations takes; a third gains
// nothing. Layouts of floats (floats.cuh) have products with either.
template <class L>
__host__ __device__ constexpr int teams(bool hopper = HOPPER) {
  return (L::GROUP >= 16 || byte_rows<L>()) && hopper ? 2 : 1;
}
__host__ __device__ constexpr int block_of(int teams) { return CONSUMER_THREADS * teams + 32; }
template <class L>
__host__ __device__ constexpr int product_block() {
  return block_of(teams<L>());
}
constexpr int MAX_SLOTS = 16, BARRIER_BYTES = 256, ARRIVALS = 8;
// Twice their room: activations that do not begin at a multiple of 128 bytes cost one row half a microsecond.
constexpr int ARRIVAL_BYTES = 2 * 8 * ARRIVALS;

// On compute capability 8 each warp keeps its own copy of the trailer.
template <class L>
__host__ __device__ constexpr int slot_bytes(bool hopper = HOPPER) {
  return ceil_div(L::UNITS * L::UNIT_BYTES + (hopper ? 1 : CONSUMERS) * L::TRAILER, 128) * 128;
}
__host__ __device__ constexpr int activation_stride(int width) {
  return width * 2 + 64;
}  // + 64: rows start in different banks
template <class L>
__host__ __device__ constexpr int slab_width(int cols, int slabs) {
  return ceil_div(ceil_div(ceil_div(cols, UNIT_COLS), L::UNITS), slabs) * L::UNITS * UNIT_COLS;
}
// Tiles whose sums a team keeps.
__host__ __device__ constexpr int tiles_kept(int columns, int teams = 1) {
  return (columns <= 4 ? 8 : 32 / columns) / teams;
}
__host__ __device__ constexpr int sums_bytes(int keep, int columns, int teams = 1) {
  return keep * columns * CONSUMERS * teams * TILE_ROWS * 4;
}
// Sums of groups of activations for each unit and column of them: kquant_product.cuh.
template <class L>
__host__ __device__ constexpr int group_sums_bytes() {
  if constexpr (L::GROUP < 16)
    return 0;
  else
    return !L::AWAY ? 0 : L::GROUP == 128 ? 8 : 8 * UNIT_COLS / L::GROUP;
}
// `batch` rows of `width` activations, each of which is `parts` columns of bf16, or where bytes are multiplied three
// planes.
template <class L>
__host__ __device__ constexpr int activations_bytes(int width, int batch, int parts) {
  const int columns = batch * parts * (activation_stride(width) + width / UNIT_COLS * group_sums_bytes<L>()),
            planes = parts < 3 && batch * parts <= 8 && batch <= byte_rows<L>() ? planes_bytes(width, batch) : 0;
  return columns > planes ? columns : planes;
}
template <class L>
__host__ __device__ constexpr int product_shared_bytes(int cols, int slabs, int batch, int parts, int slots, int teams,
                                                       bool hopper) {
  const int columns = batch * parts;
  return slots * slot_bytes<L>(hopper) + BARRIER_BYTES + ARRIVAL_BYTES +
         sums_bytes(tiles_kept(columns, teams), columns, teams) +
         activations_bytes<L>(slab_width<L>(cols, slabs), batch, parts);
}

// Activations of vector j as B fragments: 16 bytes of a row of x from column 32j + 8t on, or with groups of 16 the two
// times 8 bytes that column_of in kquant.cuh says. `at` is where the lane's first are.
template <class L>
__host__ __device__ constexpr int lane_bytes() {
  return L::GROUP == 16 ? 8 : 16;
}
template <class L>
__device__ __forceinline__ uint4 lds_fragment(uint32_t at) {
  if constexpr (L::GROUP != 16) return lds128(at);
  const uint2 low = lds64(at), high = lds64(at + 32);
  return make_uint4(low.x, low.y, high.x, high.y);
}
// b[j] where j is not known at compile time in one place, and the array stays in registers for that.
__device__ __forceinline__ uint4 pick(int j, const uint4& b0, const uint4& b1, const uint4& b2, const uint4& b3) {
  return j < 2 ? j == 0 ? b0 : b1 : j == 2 ? b2 : b3;
}

// What one block works on. Slabs that have a stage more than others are the first ones.
template <class L>
struct Part {
  Shape<L> shape;
  int slab, group, tile0, tiles, stage0, stages;
  __device__ explicit Part(const Product& p)
      : shape(p.rows, p.cols), slab(0), group(blockIdx.x - p.first_block), stage0(0), stages(shape.stages) {
    int groups = p.groups;
    if (p.slabs > 1) {
      const int each = shape.stages / p.slabs, longer = shape.stages - each * p.slabs,
                blocks = longer * p.longer_groups;
      const bool more = group < blocks;
      if (more)
        groups = p.longer_groups;
      else
        group -= blocks;
      slab = group / groups, group -= slab * groups;
      if (!more) slab += longer;
      stage0 = slab * each + min(slab, longer), stages = each + more;
    }
    const int each = shape.tiles / groups, more = shape.tiles - each * groups;  // so many groups have one more
    tile0 = group * each + min(group, more), tiles = each + (group < more);
  }
  __device__ int first_col() const { return stage0 * L::UNITS * UNIT_COLS; }
  __device__ int width() const { return min(stages * L::UNITS, shape.units - stage0 * L::UNITS) * UNIT_COLS; }
};

// ---- the ring of stages ----
#if __CUDA_ARCH__ >= 900
template <class L, int TEAMS = 1, int WARPS = CONSUMERS>
struct Ring {
  uint32_t base, full, empty, slot = 0, phase = 0;
  int slots;
  __device__ Ring(const Product& p, uint32_t base_, uint32_t bars)
      : base(base_), full(bars), empty(bars + 8 * MAX_SLOTS), slots(p.slots) {}
  __device__ void init(int tid) {
    if (tid == 0) {
      for (int s = 0; s < slots; s++) mbarrier_init(full + 8 * s, 1), mbarrier_init(empty + 8 * s, WARPS);
      mbarrier_init_fence();
    }
  }
  __device__ void next() {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
  // One thread copies all stages of the block, at most p.in_flight of them on their way. With several teams there are
  // TEAMS more slots than that: a team would else take another's stage, not yet there, for one that is two rounds on.
  __device__ void produce(const Product& p, const Part<L>& part) {
    const uint64_t policy = evict_first_policy();
    const int in_flight = TEAMS > 1 ? min(p.in_flight, slots - TEAMS) : p.in_flight;
    uint32_t landed = 0, landed_phase = 0;
    int ahead = 0;
    const auto send = [&](const uint8_t* src, int s) {
      if (ahead++ >= in_flight) {
        mbarrier_wait(full + 8 * landed, landed_phase);
        if (++landed == slots) landed = 0, landed_phase ^= 1;
      }
      mbarrier_wait(empty + 8 * slot, phase ^ 1);
      const uint32_t bytes = part.shape.units_of(part.stage0 + s) * L::UNIT_BYTES + L::TRAILER;
      mbarrier_expect(full + 8 * slot, bytes);
      bulk_copy(base + slot * slot_bytes<L>(), src, bytes, full + 8 * slot, policy);
      next();
    };
    for (int tile = 0; tile < part.tiles; tile += TEAMS) {
      const uint8_t* src =
          p.weights + (part.tile0 + tile) * part.shape.tile_bytes() + part.stage0 * Shape<L>::stage_bytes();
      const int together = min(TEAMS, part.tiles - tile);
      for (int s = 0; s < part.stages; s++, src += Shape<L>::stage_bytes())
        for (int k = 0; k < together; k++)
          send(src + k * part.shape.tile_bytes(), s);  // stages of their tiles alternate
    }
  }
  __device__ void start(const Product&, const Part<L>&, int, int) {}
  __device__ void wait() { mbarrier_wait(full + 8 * slot, phase); }
  // The team's next stage is `step` stages on: TEAMS, or as many as have a last tile.
  __device__ void done(const Product&, const Part<L>&, int, int lane, int step = TEAMS) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + 8 * slot);
    if (TEAMS == 1)
      next();
    else if ((int)(slot += step) >= slots)
      slot -= slots, phase ^= 1;
  }
  __device__ uint32_t unit(int, int u) const { return base + slot * slot_bytes<L>() + u * L::UNIT_BYTES; }
  __device__ uint32_t trailer(int, int units) const { return base + slot * slot_bytes<L>() + units * L::UNIT_BYTES; }
};
#else
template <class L, int TEAMS = 1, int = CONSUMERS>
struct Ring {  // three slots; each warp copies and waits for its own units only
  uint32_t base, slot = 0;
  int tile = 0, stage = 0, fill = 0;
  __device__ Ring(const Product&, uint32_t base_, uint32_t) : base(base_) {}
  __device__ void init(int) {}
  __device__ void produce(const Product&, const Part<L>&) {}
  __device__ void copy_next(const Product& p, const Part<L>& part, int warp, int lane) {
    if (tile < part.tiles) {
      const int units = part.shape.units_of(part.stage0 + stage);
      const uint8_t* src =
          p.weights + (part.tile0 + tile) * part.shape.tile_bytes() + (part.stage0 + stage) * Shape<L>::stage_bytes();
      const uint32_t to = base + fill * slot_bytes<L>();
      for (int u = warp; u < units; u += CONSUMERS)
        for (int i = lane; i < L::UNIT_BYTES / 16; i += 32)
          async_copy16(to + u * L::UNIT_BYTES + 16 * i, src + u * L::UNIT_BYTES + 16 * i);
      for (int i = lane; i < L::TRAILER / 16; i += 32)
        async_copy16(to + L::UNITS * L::UNIT_BYTES + warp * L::TRAILER + 16 * i, src + units * L::UNIT_BYTES + 16 * i);
      if (++stage == part.stages) stage = 0, tile++;
      fill = fill == 2 ? 0 : fill + 1;
    }
    async_commit();  // also when nothing is left: the waits count groups
  }
  __device__ void start(const Product& p, const Part<L>& part, int warp, int lane) {
    copy_next(p, part, warp, lane), copy_next(p, part, warp, lane);
  }
  __device__ void wait() { async_wait<1>(), __syncwarp(); }
  __device__ void done(const Product& p, const Part<L>& part, int warp, int lane, int = 1) {
    __syncwarp();
    copy_next(p, part, warp, lane);
    slot = slot == 2 ? 0 : slot + 1;
  }
  __device__ uint32_t unit(int, int u) const { return base + slot * slot_bytes<L>() + u * L::UNIT_BYTES; }
  __device__ uint32_t trailer(int warp, int) const {
    return base + slot * slot_bytes<L>() + L::UNITS * L::UNIT_BYTES + warp * L::TRAILER;
  }
};
#endif

}  // namespace taper

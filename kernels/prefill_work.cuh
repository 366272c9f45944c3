// What the kernels for many columns of activations share (prefill.cuh): shared memory, who does what, and activations
// on their way.
#pragma once
#include "cluster.cuh"
#include "prefill_operands.cuh"

namespace taper {

// Warps that decode: one for each tile of the block, or two, with half a unit each, where registers allow it.
template <int N>
constexpr int DECODERS = N <= 64 ? 16 : 8;
// Besides them eight warps multiply, and one fetches activations.
template <int N>
constexpr int PREFILL_BLOCK = CONSUMER_THREADS + 32 * (DECODERS<N> + 1);

// What lies in shared memory: activations and decoded weights by halves of units, each decoder's ring, results,
// barriers.
template <class L, int N>
struct PrefillMemory {
  // Both are swizzled, which asks for multiples of 1024 bytes.
  static constexpr int X_BYTES = N * 128, A_BYTES = PREFILL_TILES * TILE_ROWS * 128,
                       SLOT_BYTES = DECODERS<N> == 16 ? half_slot<L>() : L::UNIT_BYTES + operand_trailer<L>(),
                       SCRATCH = 2 * RESULT_BUFFER, A_SLOTS = 4,
                       X_SLOTS = N == 128  ? 5
                                 : N == 64 ? 6
                                           : 8,
                       BARRIERS = 1024,
                       ROOM = 232448 - 1024 - X_SLOTS * X_BYTES - A_SLOTS * A_BYTES - 2 * SCRATCH - BARRIERS,
                       FIT = ROOM / SLOT_BYTES / DECODERS<N>, SLOTS = FIT > 4 ? 4 : FIT;
  static_assert(SLOTS >= 2 && 16 * (X_SLOTS + A_SLOTS) + 8 * SLOTS * DECODERS<N> <= BARRIERS, "");
  static constexpr int A_AT = X_SLOTS * X_BYTES, RINGS_AT = A_AT + A_SLOTS * A_BYTES,
                       SCRATCH_AT = RINGS_AT + DECODERS<N> * SLOTS * SLOT_BYTES,
                       BARRIERS_AT = (SCRATCH_AT + 2 * SCRATCH + 15) / 16 * 16, BYTES = BARRIERS_AT + BARRIERS;
};
template <class L, int N>
__host__ __device__ constexpr int prefill_shared_bytes() {
  return PrefillMemory<L, N>::BYTES + 1024;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class L, int N, int CLUSTER>
struct PrefillPlaces {
  using M = PrefillMemory<L, N>;
  uint32_t x, a, rings, scratch, x_full, x_empty, a_full, a_empty, ring_bars;
  __device__ explicit PrefillPlaces(uint32_t memory)
      : x(memory),
        a(memory + M::A_AT),
        rings(memory + M::RINGS_AT),
        scratch(memory + M::SCRATCH_AT),
        x_full(memory + M::BARRIERS_AT),
        x_empty(x_full + 8 * M::X_SLOTS),
        a_full(x_empty + 8 * M::X_SLOTS),
        a_empty(a_full + 8 * M::A_SLOTS),
        ring_bars(a_empty + 8 * M::A_SLOTS) {}
  __device__ void init() const {
    for (int s = 0; s < M::X_SLOTS; s++)
      mbarrier_init(x_full + 8 * s, 1), mbarrier_init(x_empty + 8 * s, CONSUMERS * CLUSTER);
    for (int s = 0; s < M::A_SLOTS; s++)
      mbarrier_init(a_full + 8 * s, PREFILL_TILES), mbarrier_init(a_empty + 8 * s, CONSUMERS);
    for (int s = 0; s < DECODERS<N> * M::SLOTS; s++) mbarrier_init(ring_bars + 8 * s, 1);
    mbarrier_init_fence();
  }
};

// Who takes part: clusters of blocks that share activations, or single blocks.
struct PrefillWork {
  uint32_t me, grid, wide, blocks;  // wide: blocks of columns of activations
  template <int N, int CLUSTER>
  __device__ static PrefillWork of(const Prefill& p) {
    PrefillWork w;
    w.me = blockIdx.x / CLUSTER, w.grid = gridDim.x / CLUSTER, w.wide = ceil_div(p.batch, N);
    w.blocks = ceil_div(p.rows, CLUSTER * PREFILL_TILES * TILE_ROWS) * w.wide;
    return w;
  }
  __device__ bool next(Pieces& piece) const { return piece.next(me, grid, blocks); }
};

// What one of them does, unit of K by unit of K.
struct Cursor {
  Pieces piece;
  const PrefillWork& work;
  uint32_t u;  // unit of K
  bool more;
  __device__ Cursor(const PrefillWork& work_, Pieces piece_) : piece(piece_), work(work_) { start(); }
  __device__ void start() { more = work.next(piece), u = piece.first; }
  __device__ bool next() {  // whether it is of another piece
    if (++u < piece.last) return false;
    start();
    return true;
  }
  __device__ uint32_t row_block() const { return piece.block / work.wide; }
  __device__ uint32_t column_block() const { return piece.block % work.wide; }
};

// Fetches activations, by halves of units.
template <class L, int N, int CLUSTER>
struct Activations {
  using M = PrefillMemory<L, N>;
  const TensorMap& map;
  const PrefillPlaces<L, N, CLUSTER>& at;
  Cursor now;
  const uint32_t rank, box_rows;
  uint32_t half = 0;
  uint64_t policy = evict_normal_policy();
  Turn<M::X_SLOTS> turn;
  __device__ Activations(const TensorMap& map_, const Prefill& p, const PrefillPlaces<L, N, CLUSTER>& at_,
                         const PrefillWork& work, Pieces pieces, uint32_t rank_)
      : map(map_), at(at_), now(work, pieces), rank(rank_), box_rows(p.box_rows) {}
  // The next half, when everybody is done with what lies in its place. By a whole warp. Columns of activations that the
  // boxes do not reach are what lay there: their products are dropped.
  __device__ __forceinline__ void fetch() {
    if (!now.more) return;
    mbarrier_wait(at.x_empty + 8 * turn.slot, turn.phase ^ 1);
    if (elected()) {
      const uint32_t bar = at.x_full + 8 * turn.slot, to = at.x + turn.slot * M::X_BYTES + rank * box_rows * 128;
      const int column = now.u * UNIT_COLS + half * 64, row = now.column_block() * N + rank * box_rows;
      mbarrier_expect(bar, CLUSTER * box_rows * 128);
      if (CLUSTER == 1)
        tensor_copy(to, map, column, row, bar, policy);
      else
        tensor_copy_to_all(to, map, column, row, bar, (1 << CLUSTER) - 1, policy);
    }
    __syncwarp();
    turn.next();
    half ^= 1;
    if (half == 0) now.next();
  }
};
#endif

}  // namespace taper

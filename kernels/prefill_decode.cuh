// The warps of prefill.cuh that decode: each fetches units of its own and writes them as 16-bit weights where the
// tensor cores read them.
//
// Repairs   (unit.cuh) are patched in what has been written.
#pragma once
#include "prefill_work.cuh"

namespace taper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A decoder's place: tile `tile` of its block, and which half of each unit where it has only one.
struct Decoder {
  int tile, part, lane;
  uint32_t rank;  // of the block in its cluster
};

// Where the units of a tile are in global memory, piece by piece.
template <class L, int CLUSTER>
struct Source {
  const Prefill& p;
  const Decoder& of;
  const Shape<L> shape;
  Cursor now;
  const uint8_t* tile = nullptr;
  uint64_t policy;
  __device__ Source(const Prefill& p_, const PrefillWork& work, Pieces pieces, const Decoder& of_)
      : p(p_), of(of_), shape(p_.rows, p_.cols), now(work, pieces) {
    // Other blocks of columns read the same weights soon.
    policy = work.wide > 1 ? evict_normal_policy() : evict_first_policy();
    start();
  }
  __device__ __forceinline__ void start() {
    // Tiles past the matrix's last repeat its first: their products are dropped.
    const int at = (now.row_block() * CLUSTER + of.rank) * PREFILL_TILES + of.tile;
    tile = p.weights + (at < shape.tiles ? at * shape.tile_bytes() : 0);
  }
  __device__ __forceinline__ void next() {
    if (now.next()) start();
  }
  __device__ const uint8_t* unit() const { return tile + now.u * L::UNIT_BYTES + now.u / L::UNITS * L::TRAILER; }
  __device__ const uint8_t* trailer() const {
    const uint32_t stage = now.u / L::UNITS;
    return tile + min((stage + 1) * L::UNITS, (uint32_t)shape.units) * L::UNIT_BYTES + stage * L::TRAILER +
           Operand<L>::trailer_at(now.u);
  }
};

// What repairs a unit: of lane i < ENTRIES the i-th repair of the stage, of the others words of the trailer.
struct PrefillRepairs {
  uint32_t entry = 0;
  bool any = false;
  template <class L>
  __device__ __forceinline__ void load(uint32_t trailer, int lane) {
    entry = lds32(trailer + (lane < ENTRIES ? 8 + L::EXTRA + 4 * lane : lane % 2 * 4));
  }
  __device__ __forceinline__ void look(uint32_t unit, int lane) {
    any = __any_sync(~0u, lane < ENTRIES ? repairs_unit(entry, unit) : lane % 2 == 0 && entry != 0);
  }
  // Patches vectors 2 part and 2 part + 1, which have been written to the tile at `tile_at`.
  __device__ __forceinline__ void patch(uint32_t tile_at, uint32_t unit, int part, int lane,
                                        const uint32_t* overflow) const {
    const auto patch = [&](uint32_t e) {
      if ((e >> 10 & 63) != ((16 | unit) << 1 | part)) return;
      const uint32_t j = e >> 9 & 1, g = e >> 5 & 7, t = e >> 3 & 3, p = (e >> 6 & 4) | (e >> 1 & 3);
      sts16(tile_at + (g + 8 * (p & 1)) * 128 + ((4 * j + t) ^ g) * 16 + 4 * (p >> 1) + 2 * (e & 1), e >> 16);
    };
    const uint32_t count = __shfl_sync(~0u, entry, 30), offset = __shfl_sync(~0u, entry, 31);
    if (lane < ENTRIES) patch(entry);
#pragma unroll 1
    for (uint32_t i = lane; i < count; i += 32) patch(__ldg(overflow + offset + i));
  }
};

// Hands half a unit, which has been decoded to `a`, to the tensor cores: when they have read what lies in its place.
template <class L, int N, int CLUSTER>
__device__ __forceinline__ void hand_over(const Prefill& p, const PrefillPlaces<L, N, CLUSTER>& at, const Decoder& of,
                                          uint32_t half, uint32_t unit, int part, const uint32_t (&a)[2][8],
                                          const PrefillRepairs& repairs) {
  using M = PrefillMemory<L, N>;
  const uint32_t slot = half % M::A_SLOTS, phase = half / M::A_SLOTS & 1,
                 tile_at = at.a + slot * M::A_BYTES + of.tile * (TILE_ROWS * 128);
  mbarrier_wait(at.a_empty + 8 * slot, phase ^ 1);
  const uint32_t to = tile_at + lane_place<L::GROUP>(of.lane);
  store_vector<L::GROUP>(to, 0, a[0]), store_vector<L::GROUP>(to, 1, a[1]);
  if (Operand<L>::REPAIRS && repairs.any) {
    __syncwarp();
    repairs.patch(tile_at, unit % L::UNITS, part, of.lane, p.overflow);
  }
  fence_async_proxy();
  __syncwarp();
  if (of.lane == 0) mbarrier_arrive(at.a_full + 8 * slot);
}

// What of an array must have been computed has been used.
__device__ __forceinline__ void computed(const uint32_t (&a)[2][8]) {
  asm volatile("" ::"r"(a[0][0]), "r"(a[1][7]) : "memory");
}

// Whole units.
template <class L, int N, int CLUSTER>
__device__ __forceinline__ void decode_units(const Prefill& p, const PrefillPlaces<L, N, CLUSTER>& at,
                                             const PrefillWork& work, Pieces pieces, const Decoder& of) {
  using M = PrefillMemory<L, N>;
  using O = Operand<L>;
  const uint32_t ring = at.rings + of.tile * M::SLOTS * M::SLOT_BYTES, bars = at.ring_bars + of.tile * M::SLOTS * 8;
  Source<L, CLUSTER> source(p, work, pieces, of);
  const auto fetch = [&](uint32_t slot) {
    if (!source.now.more) return;
    if (elected()) {
      const uint32_t bar = bars + 8 * slot, to = ring + slot * M::SLOT_BYTES;
      mbarrier_expect(bar, M::SLOT_BYTES);
      bulk_copy(to, source.unit(), L::UNIT_BYTES, bar, source.policy);
      if (O::TRAILER) bulk_copy(to + L::UNIT_BYTES, source.trailer(), O::TRAILER, bar, source.policy);
    }
    __syncwarp();
    source.next();
  };
  for (int s = 0; s < M::SLOTS; s++) fetch(s);
  Cursor now(work, pieces);
  Turn<M::SLOTS> turn;
  O unit;
  PrefillRepairs next_repairs;
  bool loaded = false;
  const auto load = [&] {
    const uint32_t unit_at = ring + turn.slot * M::SLOT_BYTES, trailer = unit_at + L::UNIT_BYTES;
    unit.load(p, unit_at, trailer, now.u % L::UNITS, of.lane);
    if constexpr (O::REPAIRS) next_repairs.load<L>(trailer, of.lane);
  };
  for (uint32_t half = 0; now.more; half += 2) {
    const uint32_t u = now.u;
    if (!loaded) mbarrier_wait(bars + 8 * turn.slot, turn.phase), load();
    if constexpr (O::REPAIRS) next_repairs.look(u % L::UNITS, of.lane);
    const PrefillRepairs repairs = next_repairs;
    uint32_t a[2][8];
    unit.vector(0, a[0]), unit.vector(1, a[1]);
    hand_over<L, N, CLUSTER>(p, at, of, half, u, 0, a, repairs);
    unit.vector(2, a[0]), unit.vector(3, a[1]);
    computed(a);  // so all of the unit has arrived in registers
    __syncwarp();
    fetch(turn.slot);
    turn.next(), now.next();
    // The next unit's bytes come while this one's are written.
    loaded = now.more && mbarrier_test(bars + 8 * turn.slot, turn.phase);
    if (loaded) load();
    hand_over<L, N, CLUSTER>(p, at, of, half + 1, u, 1, a, repairs);
  }
}

// One half of each unit.
template <class L, int N, int CLUSTER>
__device__ __forceinline__ void decode_halves(const Prefill& p, const PrefillPlaces<L, N, CLUSTER>& at,
                                              const PrefillWork& work, Pieces pieces, const Decoder& of) {
  using M = PrefillMemory<L, N>;
  using O = Operand<L>;
  const int number = of.part * PREFILL_TILES + of.tile;
  const uint32_t ring = at.rings + number * M::SLOTS * M::SLOT_BYTES, bars = at.ring_bars + number * M::SLOTS * 8;
  Source<L, CLUSTER> source(p, work, pieces, of);
  const auto fetch = [&](uint32_t slot) {
    if (!source.now.more) return;
    if (elected()) {
      const uint32_t bar = bars + 8 * slot, to = ring + slot * M::SLOT_BYTES;
      mbarrier_expect(bar, O::HALF_BYTES);
      O::fetch_half(source.unit(), source.trailer(), of.part, [&](int offset, const uint8_t* from, int bytes) {
        bulk_copy(to + offset, from, bytes, bar, source.policy);
      });
    }
    __syncwarp();
    source.next();
  };
  for (int s = 0; s < M::SLOTS; s++) fetch(s);
  Cursor now(work, pieces);
  Turn<M::SLOTS> turn;
  for (uint32_t half = of.part; now.more; half += 2, now.next(), turn.next()) {
    const uint32_t unit_at = ring + turn.slot * M::SLOT_BYTES;
    mbarrier_wait(bars + 8 * turn.slot, turn.phase);
    O unit;
    unit.load_half(p, unit_at, now.u % L::UNITS, of.part, of.lane);
    PrefillRepairs repairs;
    if constexpr (O::REPAIRS)
      repairs.load<L>(unit_at + O::HALF_TRAILER, of.lane), repairs.look(now.u % L::UNITS, of.lane);
    uint32_t a[2][8];
    unit.vector(0, a[0]), unit.vector(1, a[1]);
    computed(a);
    __syncwarp();
    fetch(turn.slot);
    hand_over<L, N, CLUSTER>(p, at, of, half, now.u, of.part, a, repairs);
  }
}
#endif

}  // namespace taper

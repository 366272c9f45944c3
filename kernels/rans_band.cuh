// BF16 matrices from their tile streams at speed: what `decode_band` does for every kind, for the one that there is
// most of.
//
//   For       kind and dtype BF16, 4-bit classes by rANS, 8 raw bits, levels or not, columns a multiple of 256.
//   Warp      takes one band: 64 rows x 256 columns, a row in four steps of 32 symbols. In step s lane l decodes
//   columns
//             64 s + 2 l and the next one, two rows at a time.
//   Words     in a ring of the warp, 4 chunks of 512 bytes, which cp.async fills. Two rows take at most one chunk, so
//             the ring is looked after once for two rows. The first chunk has a copy behind the last: within two rows
//             addresses go straight on.
//   Raw bits  two bytes a lane and step from memory, two rows ahead. Prefetching 16 rows ahead into the L2 was slower.
//   Tables    slots   4096 words: frequency | symbol << 12 | (slot - start) << 20
//             pairs   256 symbols x 8 copies: exponent of the first weight << 7 | of the second << 23 | 1 if the first
//                     is an escape | 1 << 16 if the second is
//
// Bounds: the sections of a band are compared with the stream once, before anything is decoded. In the ring no address
// can leave it, whatever the words are, and past the section's end it is filled with zeros. A band that does not lie
// within its tile gives zeros and a status.
//
// Budget, thread-instructions a weight: 14, with levels 16, of which the ALU, which takes half of what can be issued,
// should get 6. Spent with levels, escapes and tables included: 23. A symbol waits for the one before it in its lane,
// some 150 cycles: seven warps a scheduler are to hide that, and a quarter to a half of the time they do not.
#pragma once
#include "ptx.cuh"
#include "tile_values.cuh"

namespace taper {

// Mirrored by `cuda::rans`.
constexpr int RANS_THREADS = 896;
constexpr uint32_t RANS_CHUNK = 512, RANS_RING = 4 * RANS_CHUNK, RANS_RING_BYTES = RANS_RING + RANS_CHUNK;
constexpr uint32_t RANS_COPIES = 8, RANS_PAIRS = 4 * 256 * RANS_COPIES;
constexpr uint32_t RANS_TABLES = 1040 + (RANS_PAIRS - 16) + RANS_PAIRS + 4 * SLOTS;
constexpr uint32_t RANS_STEPS = 4;  // of a row

// The weights of two rows in a lane: pairs of BF16.
using RansRows = uint32_t[2][RANS_STEPS];

// What a block's warps share.
struct RansTables {
  uint32_t slots, pairs;  // shared addresses; `pairs` of the lane's own copy

  // By all threads of the block. `memory`: RANS_TABLES bytes, 16-byte aligned. `pairs` lies at a multiple of its size,
  // so that a place in it needs no addition.
  __device__ RansTables(const Plan& plan, Bytes stream, uint8_t* memory) {
    const uint32_t at = shared_address(memory), skip = (at + 1040 + RANS_PAIRS - 1) / RANS_PAIRS * RANS_PAIRS - at;
    uint32_t *const exponents = (uint32_t*)(memory + skip), *const table = exponents + RANS_PAIRS / 4;
    for (uint32_t i = threadIdx.x; i < RANS_PAIRS / 4; i += blockDim.x) {
      const uint32_t symbol = i / RANS_COPIES, first = symbol & 15, second = symbol >> 4;
      exponents[i] = plan.map[first] << 7 | plan.map[second] << 23 | (first == plan.escape ? 1 : 0) |
                     (second == plan.escape ? 1 << 16 : 0);
    }
    build_table(stream, table, (uint32_t*)memory);
    slots = at + skip + RANS_PAIRS, pairs = at + skip + threadIdx.x % RANS_COPIES * 4;
  }

  // The next symbol of the lane: its entry in `slots`, and in `pairs`.
  __device__ __forceinline__ uint32_t entry(uint32_t state) const {
    uint32_t entry;
    asm volatile("{.reg .u32 a; mad.lo.u32 a, %1, 4, %2; ld.shared.u32 %0, [a];}"
                 : "=r"(entry)
                 : "r"(state & (SLOTS - 1)), "r"(slots));
    return entry;
  }
  __device__ __forceinline__ uint32_t exponents(uint32_t entry) const {
    static_assert(RANS_COPIES == 8, "the shift below");
    uint32_t e;
    asm("ld.shared.u32 %0, [%1];" : "=r"(e) : "r"(pairs | (entry >> 7 & 255 * 4 * RANS_COPIES)));
    return e;
  }
};

// One step: lanes whose state fell too low take the next words in their order. `below`: the lanes before this one.
__device__ __forceinline__ void rans_refill(uint32_t& state, uint32_t& at, uint32_t below) {
  asm volatile(
      "{.reg .pred low; .reg .u32 all, rank, place, word;\n\t"
      "setp.lt.u32 low, %0, 65536;\n\t"
      "vote.sync.ballot.b32 all, low, -1;\n\t"
      "and.b32 rank, all, %2;\n\t"
      "popc.b32 rank, rank;\n\t"
      "mad.lo.u32 place, rank, 2, %1;\n\t"
      "@low ld.shared.u16 word, [place];\n\t"
      "@low mad.lo.u32 %0, %0, 65536, word;\n\t"
      "popc.b32 all, all;\n\t"
      "mad.lo.u32 %1, all, 2, %1;}"
      : "+r"(state), "+r"(at)
      : "r"(below));
}

// Where the sections of a band lie.
struct RansBand {
  const uint8_t *coded, *raw, *escapes;
  uint32_t word_bytes, listed, rows;
  bool sound;  // all of it lies within the stream

  __device__ RansBand(const Plan& plan, Bytes stream, uint32_t tile, uint32_t tile_row, uint32_t index) {
    const uint64_t record = HEADER_BYTES + TABLE_BYTES + (uint64_t)RECORD_BYTES * tile;
    const uint64_t offset = stream.load(record, 8), size = stream.u32(record + 16);
    const Bytes data = stream.part(offset, size);
    const uint32_t tile_rows = min(TILE, plan.rows - tile_row * TILE), bands = (tile_rows + BAND_ROWS - 1) / BAND_ROWS;
    uint64_t start = align16(8 * bands);
    uint32_t coded_bytes = 0;
    listed = 0;
    for (uint32_t b = 0; b <= index; b++) {
      if (b > 0) start += align16(coded_bytes) + BAND_ROWS * TILE + align16(listed);
      coded_bytes = data.u32(8 * b), listed = data.u32(8 * b + 4);
    }
    rows = min(BAND_ROWS, tile_rows - index * BAND_ROWS);
    const uint64_t raw_at = start + align16(coded_bytes), end = raw_at + rows * TILE + listed;
    sound = data.len == size && (offset & 15) == 0 && coded_bytes >= 4 * LANES && end <= data.len;
    coded = data.p + start, raw = data.p + raw_at, escapes = raw + rows * TILE, word_bytes = coded_bytes - 4 * LANES;
  }
};

// Sixteen bytes to shared memory, zeros if not `there`.
__device__ __forceinline__ void async_copy16_or_zeros(uint32_t dst, const void* src, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(there ? 16 : 0) : "memory");
}

// The words of a band on their way through the warp's ring.
struct RansWords {
  const uint8_t* from;                           // this lane's part of the first chunk
  uint32_t bytes, place, ring, at, sent, taken;  // `place`: of the lane in the ring; `sent`, `taken`: bytes

  __device__ RansWords(const RansBand& band, uint32_t ring_)
      : from(band.coded + 4 * LANES + threadIdx.x % 32 * 16), ring(ring_), sent(0), taken(0) {
    place = ring + threadIdx.x % 32 * 16;
    bytes = band.word_bytes - min(band.word_bytes, threadIdx.x % 32 * 16);  // from the lane's part on
    __syncwarp();                                                           // the last band's words have been read
    for (int i = 0; i < 4; i++) fetch(), async_commit();
  }
  __device__ __forceinline__ void fetch() {
    const uint32_t slot = sent % RANS_RING;
    const bool there = sent < bytes;
    async_copy16_or_zeros(place + slot, from + sent, there);
    if (slot == 0) async_copy16_or_zeros(place + RANS_RING, from + sent, there);
    sent += RANS_CHUNK;
  }
  // Before two rows: the chunk of the next word and the one after it are there. A chunk is fetched into the place of
  // one that has been used up, at most one each time; those of the last two times may still be on their way.
  __device__ __forceinline__ void begin() {
    __syncwarp();
    if (taken + RANS_RING - sent >= RANS_CHUNK) fetch();
    async_commit();
    async_wait<2>();
    __syncwarp();
    at = ring + taken % RANS_RING;
  }
  __device__ __forceinline__ void end() { taken += at - (ring + taken % RANS_RING); }
};

// The weights of two columns from their exponents and raw bytes.
__device__ __forceinline__ uint32_t join_bf16(uint32_t raw, uint32_t exponents) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(__byte_perm(raw, 0, 0x1100)), "r"(exponents), "n"(0x807F807F));
  return d;
}

// Decodes band `index` of the tile in that place with one warp, whose ring is at `ring`.
// sink(row, weights, two): two rows of the band, or its last one.
template <bool LEVELS, class Sink>
__device__ __forceinline__ void rans_band(const Plan& plan, Bytes stream, const RansTables& tables, uint32_t ring,
                                          uint32_t tile_row, uint32_t tile_col, uint32_t index, const Sink& sink,
                                          uint32_t* status) {
  const uint32_t lane = threadIdx.x % 32, below = (1u << lane) - 1, tile = tile_row * plan.tile_cols + tile_col;
  const RansBand band(plan, stream, tile, tile_row, index);
  const uint32_t rows = band.rows;
  RansRows weights;
  if (!band.sound) {
    for (uint32_t i = 0; i < RANS_STEPS; i++) weights[0][i] = weights[1][i] = 0;
    for (uint32_t row = 0; row < rows; row += 2) sink(row, weights, row + 1 < rows);
    if (lane == 0) atomicMin(status, tile * 8 + UNFINISHED);
    return;
  }
  RansWords words(band, ring);
  uint32_t state = __ldg((const uint32_t*)band.coded + lane);
  const uint8_t* const raw_of_lane = band.raw + 2 * lane;
  const auto raw_of = [&](uint32_t row, uint32_t s) {
    return (uint32_t)__ldg((const uint16_t*)(raw_of_lane + min(row, rows - 1) * TILE + 64 * s));
  };
  uint32_t raw[2][RANS_STEPS];
#pragma unroll
  for (uint32_t i = 0; i < 8; i++) raw[i / 4][i % 4] = raw_of(i / 4, i % 4);
  // Levels: of the rows 2 lane and 2 lane + 1, and of the lane's columns, one in each half.
  uint32_t of_rows = 0, of_cols[RANS_STEPS];
  if (LEVELS) {
    const uint64_t row = plan.scales + tile_row * TILE + index * BAND_ROWS + 2 * lane;
    of_rows = (uint32_t)(stream.load(row, 1) | stream.load(row + 1, 1) << 8);
#pragma unroll
    for (uint32_t s = 0; s < RANS_STEPS; s++) {
      const uint64_t col = plan.scales + plan.rows + tile_col * TILE + 64 * s + 2 * lane;
      of_cols[s] = (uint32_t)(stream.load(col, 1) | stream.load(col + 1, 1) << 16);
    }
  }
  uint32_t escape = 0;
#pragma unroll 1
  for (uint32_t row = 0; row < rows; row += 2) {
    words.begin();
    const bool two = row + 1 < rows;
    const uint32_t of_two = LEVELS ? __shfl_sync(ALL, of_rows, row / 2) : 0;
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
      if (r == 1 && !two) break;
      const uint32_t of_row = LEVELS ? __byte_perm(of_two, 0, r == 0 ? 0x4040 : 0x4141) : 0;
      uint32_t e[RANS_STEPS], marks = 0;
#pragma unroll
      for (uint32_t s = 0; s < RANS_STEPS; s++) {
        const uint32_t entry = tables.entry(state);
        e[s] = tables.exponents(entry);
        state = (entry & 4095) * (state >> 12) + (entry >> 20);
        rans_refill(state, words.at, below);
        marks |= e[s];
        // Carries over an exponent's end go to a bit that the sign replaces.
        if (LEVELS)
          asm("mad.lo.u32 %0, %1, 8, %0;" : "+r"(e[s]) : "r"(__vminu2(of_cols[s] + of_row, 0x00ff00ff) & 0x00f000f0));
      }
      if (__any_sync(ALL, marks & 0x10001)) {  // a few rows in a hundred
#pragma unroll
        for (uint32_t s = 0; s < RANS_STEPS; s++) {
          const uint32_t one = __ballot_sync(ALL, e[s] & 1), other = __ballot_sync(ALL, e[s] & 0x10000);
          uint32_t i = escape + __popc(one & below) + __popc(other & below);
          const auto listed = [&](uint32_t i) { return i < band.listed ? (uint32_t)__ldg(band.escapes + i) : 0; };
          if (e[s] & 1) e[s] = (e[s] & ~0x7f80u) | listed(i++) << 7;
          if (e[s] & 0x10000) e[s] = (e[s] & ~0x7f800000u) | listed(i) << 23;
          escape += __popc(one) + __popc(other);
        }
      }
#pragma unroll
      for (uint32_t s = 0; s < RANS_STEPS; s++) {
        weights[r][s] = join_bf16(raw[r][s], e[s]);
        raw[r][s] = raw_of(row + 2 + r, s);
      }
    }
    words.end();
    sink(row, weights, two);
  }
  const bool finished = __all_sync(ALL, state == LOW) && words.taken == band.word_bytes;
  if (lane == 0 && (!finished || escape != band.listed)) {
    atomicMin(status, tile * 8 + (finished ? ESCAPE_COUNT : UNFINISHED));
  }
}

}  // namespace taper

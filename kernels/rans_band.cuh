// BF16 matrices from their tile streams at speed: what `decode_band` does for every kind, for the one that there is
// most of.
//
//   For       kind and dtype BF16, 4-bit classes by rANS, 8 raw bits, levels (which never add up to more than 255) or
//             not, columns a multiple of 64. Tiles are 256 columns wide but for the last one, perhaps, which has code
//             of its own: fewer steps in a row.
//   Index     made when the matrix is uploaded: where the sections of each band lie, and, so that several warps share a
//             band, the 32 states before each of its parts but the first, with the words and escapes gone by. A band
//             has 1, 2 or 4 parts: 0, 0.07 or 0.2 bits a weight.
//   Warp      takes one part of a band: up to 64 rows x 256 columns, a row in four steps of 32 symbols. In step s lane
//             l decodes columns 64 s + 2 L and the next one, L = `stream_lane()`, two rows at a time. Lanes are not
//             taken in their order because ldmatrix then gives each the raw bits of eight steps at once.
//   Words     in a ring of the warp, 4 chunks of 512 bytes, which cp.async fills, looked after once for four rows.
//             These take at most two chunks, copies of which lie behind the last: within four rows addresses go
//             straight on.
//   Raw bits  of four rows, and of the four after them.
//   Table     of 4096 slots, as the reference has it: frequency | symbol << 12 | (slot - start) << 20.
//   Pairs     of exponents, of each symbol: that of the first weight << 7 | of the second << 23 | 1 if the first is an
//             escape | 1 << 16 if the second is. Each lane has its own copy, in a bank of its own: a step then takes
//             8.0 wavefronts of shared memory, and 9.6 with one table of slots and pairs.
//   Levels    eight times that of the row and eight times that of the column are added to the exponent: sixteenths of
//             an octave end where the mantissa's bits will be, carries where the sign will be.
//
// Bounds: the sections of a band are compared with the stream when the index is made. In the ring no address can leave
// it, whatever the words are, and past the section's end it is filled with zeros. A band that does not lie within its
// tile gives zeros and a status.
//
// Budget: 27 to 30 instructions a step of 64 weights, 33.8 with escapes, chunks and all that is done once for a
// part: 16.9 thread-instructions a weight (ncu, one row of activations, levels, 14336x4096). No unit is full there:
// issue slots are 68% busy, the shared memory's pipe 62%, the ALUs 57%. A symbol waits for the one before it in its
// lane, through two loads from shared memory, a vote and a count of bits: 210 cycles with two warps a scheduler, 350
// with seven. Registers and shared memory are for eight of them.
#pragma once
#include "ptx.cuh"
#include "tile_values.cuh"
#include "unit.cuh"

namespace taper {

// Mirrored by `cuda::rans`.
constexpr int RANS_THREADS = 1024;
constexpr uint32_t RANS_CHUNK = 512, RANS_RING = 4 * RANS_CHUNK;
constexpr uint32_t RANS_FOUR = 4 * TILE;                   // raw bits of four rows
constexpr uint32_t RANS_RAW = RANS_RING + 2 * RANS_CHUNK;  // where they lie in a warp's rings
constexpr uint32_t RANS_RING_BYTES = RANS_RAW + 2 * RANS_FOUR;
constexpr uint32_t RANS_SLOTS = 4 * SLOTS, RANS_TABLES = RANS_SLOTS + 256 * 4 * LANES;
constexpr uint32_t RANS_STEPS = 4;  // of a row

// The weights of two rows in a lane: pairs of BF16.
using RansRows = uint32_t[2][RANS_STEPS];

// Where the sections of a band lie.
struct RansPlace {
  uint32_t coded;  // sixteenths of its offset in the stream
  uint32_t word_bytes, listed;
  uint32_t sound;  // all of it lies within the stream
};

// What has gone by before a part that is not a band's first.
struct RansPart {
  uint32_t states[LANES];
  uint32_t words, escapes;
};

// Bands from left to right, then down; of each the parts after the first. Mirrors `cuda::rans::Index`.
struct RansIndex {
  RansPlace* places;
  RansPart* later;
  uint32_t* table;       // and pairs
  uint32_t parts, rows;  // of a band; of a part: 64 / parts
};

// A warp's lane; not kept in a register.
__device__ __forceinline__ uint32_t lane_again() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The lane of the stream that this one decodes, and those that decode lanes before it.
__device__ __forceinline__ uint32_t stream_lane() { return threadIdx.x % 4 * 8 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ uint32_t stream_lanes_before() {
  const uint32_t lane = threadIdx.x % 32, column = 0x11111111;
  return column * ((1u << lane % 4) - 1) | (column << lane % 4 & ((1u << lane / 4 * 4) - 1));
}

// The same value in a register: the compiler would rather compute it again in every step.
__device__ __forceinline__ uint32_t kept(uint32_t value) { return __shfl_sync(ALL, value, threadIdx.x % 32); }

// What a block's warps share: the table and the pairs.
struct RansTable {
  uint32_t slots, lane;  // shared address; four times the lane

  __device__ RansTable(const uint8_t* memory) : slots(shared_address(memory)), lane(kept(threadIdx.x % 32 * 4)) {}

  // Made by all threads of a block. `memory`: RANS_TABLES bytes, 16-byte aligned.
  static __device__ void make(const Plan& plan, Bytes stream, uint8_t* memory) {
    build_table(stream, (uint32_t*)memory, (uint32_t*)(memory + RANS_SLOTS));
    const auto pair = [&](uint32_t symbol) {
      const uint32_t first = symbol & 15, second = symbol >> 4;
      return plan.map[first] << 7 | plan.map[second] << 23 | (first == plan.escape ? 1 : 0) |
             (second == plan.escape ? 1 << 16 : 0);
    };
    make_pairs(memory, pair);
    __syncthreads();
  }
  // Or fetched; they are there after `wait`, by all threads too.
  static __device__ __forceinline__ void fetch(const RansIndex& index, uint8_t* memory) {
    for (uint32_t i = threadIdx.x; i < RANS_SLOTS / 16; i += blockDim.x)
      async_copy16(shared_address(memory) + 16 * i, (const uint4*)index.table + i);
    async_commit();
    make_pairs(memory, [&](uint32_t symbol) { return __ldg(index.table + SLOTS + symbol); });
  }
  static __device__ __forceinline__ void wait() {
    async_wait<0>();
    __syncthreads();
  }
  template <class Pair>
  static __device__ __forceinline__ void make_pairs(uint8_t* memory, const Pair& pair) {
    for (uint32_t i = threadIdx.x; i < 256 * LANES / 4; i += blockDim.x) {
      const uint32_t value = pair(i / (LANES / 4));
      ((uint4*)(memory + RANS_SLOTS))[i] = make_uint4(value, value, value, value);
    }
  }
  __device__ __forceinline__ uint32_t slot(uint32_t state) const { return load(slots + (state * 4 & 4 * (SLOTS - 1))); }
  __device__ __forceinline__ uint32_t exponents(uint32_t slot) const {
    return load(slots + RANS_SLOTS + ((slot >> 5 & 255 * 4 * LANES) | lane));
  }
  static __device__ __forceinline__ uint32_t load(uint32_t at) {
    uint32_t v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
  }
};

// One step: lanes whose state fell too low take the next words in their order; the others read one too, which costs
// less than not to. `below`: the lanes before this one.
__device__ __forceinline__ void rans_refill(uint32_t& state, uint32_t& at, uint32_t below) {
  asm volatile(
      "{.reg .pred low; .reg .u32 all, rank, place, word;\n\t"
      "setp.lt.u32 low, %0, 65536;\n\t"
      "vote.sync.ballot.b32 all, low, -1;\n\t"
      "and.b32 rank, all, %2;\n\t"
      "popc.b32 rank, rank;\n\t"
      "mad.lo.u32 place, rank, 2, %1;\n\t"
      "ld.shared.u16 word, [place];\n\t"
      "@low mad.lo.u32 %0, %0, 65536, word;\n\t"
      "popc.b32 all, all;\n\t"
      "mad.lo.u32 %1, all, 2, %1;}"
      : "+r"(state), "+r"(at)
      : "r"(below));
}

// Columns of a tile.
__device__ __forceinline__ uint32_t rans_width(const Plan& plan, uint32_t col) {
  return min(TILE, plan.cols - col * TILE);
}

// Where band `index` of a tile of that width lies, from the tile's record.
__device__ inline RansPlace rans_place(const Plan& plan, Bytes stream, uint32_t tile, uint32_t tile_row, uint32_t index,
                                       uint32_t width) {
  const uint64_t record = HEADER_BYTES + TABLE_BYTES + (uint64_t)RECORD_BYTES * tile;
  const uint64_t offset = stream.load(record, 8), size = stream.u32(record + 16);
  const Bytes data = stream.part(offset, size);
  const uint32_t tile_rows = min(TILE, plan.rows - tile_row * TILE), bands = (tile_rows + BAND_ROWS - 1) / BAND_ROWS;
  uint64_t start = align16(8 * bands);
  uint32_t coded_bytes = 0, listed = 0;
  for (uint32_t b = 0; b <= index; b++) {
    if (b > 0) start += align16(coded_bytes) + align16(BAND_ROWS * width) + align16(listed);
    coded_bytes = data.u32(8 * b), listed = data.u32(8 * b + 4);
  }
  const uint32_t rows = min(BAND_ROWS, tile_rows - index * BAND_ROWS);
  const uint64_t end = start + align16(coded_bytes) + align16(rows * width) + listed;
  const bool sound = data.len == size && (offset & 15) == 0 && coded_bytes >= 4 * LANES && end <= data.len &&
                     offset + start < 1ull << 36 &&
                     plan.scales + plan.rows + plan.cols <= stream.len;  // levels, if there are any
  return {(uint32_t)((offset + start) / 16), coded_bytes - 4 * LANES, listed, sound};
}

// Sixteen bytes to shared memory, zeros if not `there`.
__device__ __forceinline__ void async_copy16_or_zeros(uint32_t dst, const void* src, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(there ? 16 : 0) : "memory");
}

// The words of a band from word `gone` on, and the raw bits of a part, on their way through the warp's rings.
struct RansRings {
  const uint8_t *from, *raw_from;  // the lane's part of what is fetched next
  int32_t left, raw_left;          // bytes from there on
  uint32_t four;                   // bytes of four rows
  uint32_t ring, oldest, at;       // the chunk that `at`, the place of the next word, is in

  __device__ RansRings(const uint8_t* words, uint32_t word_bytes, uint32_t gone, const uint8_t* raw, uint32_t raw_bytes,
                       uint32_t width, uint32_t ring_)
      : four(4 * width), ring(ring_), oldest(ring_), at(0) {
    const uint32_t skip = 2 * gone / 16 * 16 + threadIdx.x % 32 * 16;
    from = words + skip, raw_from = raw + threadIdx.x % 32 * 16;
    left = (int32_t)(min(word_bytes, MOST) - skip), raw_left = (int32_t)(raw_bytes - threadIdx.x % 32 * 16);
    __syncwarp();  // the last part's have been read
    fetch(), fetch(), fetch_raw(0), fetch(), fetch();
    async_commit();
    at = ring + 2 * gone % 16;
  }
  // Another chunk into the place of the oldest.
  __device__ __forceinline__ void fetch() {
    const uint32_t to = oldest + lane_again() * 16;
    async_copy16_or_zeros(to, from, left > 0);
    if (oldest < ring + 2 * RANS_CHUNK) async_copy16_or_zeros(to + RANS_RING, from, left > 0);
    from += RANS_CHUNK, left -= RANS_CHUNK, oldest += RANS_CHUNK;
    if (oldest == ring + RANS_RING) oldest = ring, at -= RANS_RING;
  }
  // The next four rows' to `slot`: 0 or RANS_FOUR. If they are narrow, what follows them comes along.
  __device__ __forceinline__ void fetch_raw(uint32_t slot) {
    const uint32_t to = ring + RANS_RAW + lane_again() * 16 + slot;
    async_copy16_or_zeros(to, raw_from, raw_left > 0);
    async_copy16_or_zeros(to + 512, raw_from + 512, raw_left > 512);
    raw_from += four, raw_left -= (int32_t)four;
  }
  // Before four rows, whose raw bits are at `slot`: these and two chunks from the next word on are there. What is
  // fetched now may still be on its way, but for a second chunk, which hardly ever is to be fetched: then it is waited
  // for.
  __device__ __forceinline__ void begin(uint32_t slot) {
    __syncwarp();
    fetch_raw(slot ^ RANS_FOUR);
    if (at >= oldest + RANS_CHUNK) fetch();
    if (at >= oldest + RANS_CHUNK) {
      fetch();
      async_commit();
      async_wait<0>();
    }
    async_commit();
    async_wait<1>();
    __syncwarp();
  }
  // Bytes of words before the next one.
  __device__ __forceinline__ uint32_t taken(uint32_t word_bytes) const {
    return min(word_bytes, MOST) - left - threadIdx.x % 32 * 16 - RANS_RING + at - oldest;
  }
  static constexpr uint32_t MOST = 1 << 20;  // of words that a band could take
};

// Raw bits of a lane's columns in two rows, of four steps: those of the first row in the low halves. `at`: where this
// lane looks for sixteen bytes of the first row, if it is an even one, or of the second.
__device__ __forceinline__ void load_raw(uint32_t (&raw)[RANS_STEPS], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw[0]), "=r"(raw[1]), "=r"(raw[2]), "=r"(raw[3])
               : "r"(at)
               : "memory");
}

// A part of a band, as one warp decodes it.
struct RansWork {
  uint32_t top, rows;      // the first row in the matrix; how many there are
  uint32_t band_row, col;  // the band's place in the matrix
  const RansPart* before;  // null for a band's first part
  bool last;               // of the band
};

// Exponents that are escapes, a few in ten thousand, are read from the band's list.
template <uint32_t ROWS>
__device__ __forceinline__ void take_escapes(uint32_t (&e)[2][RANS_STEPS], uint32_t& escape, const uint8_t* escapes,
                                             uint32_t count, uint32_t below) {
  constexpr uint32_t ALL_STEPS = ROWS * RANS_STEPS;
#pragma unroll 1
  for (uint32_t step = 0; step < ALL_STEPS; step++) {
    uint32_t exponents = e[0][0];
    if (__any_sync(ALL, exponents & 0x10001)) {
      const uint32_t one = __ballot_sync(ALL, exponents & 1), other = __ballot_sync(ALL, exponents & 0x10000);
      uint32_t at = escape + __popc(one & below) + __popc(other & below);
      const auto listed = [&](uint32_t at) { return at < count ? (uint32_t)__ldg(escapes + at) : 0; };
      if (exponents & 1) exponents = (exponents & ~0x7f80u) | listed(at++) << 7;
      if (exponents & 0x10000) exponents = (exponents & ~0x7f800000u) | listed(at) << 23;
      escape += __popc(one) + __popc(other);
    }
    // The first becomes the last, until it is the first again: registers have no index.
#pragma unroll
    for (uint32_t i = 0; i + 1 < ALL_STEPS; i++)
      e[i / RANS_STEPS][i % RANS_STEPS] = e[(i + 1) / RANS_STEPS][(i + 1) % RANS_STEPS];
    e[ROWS - 1][RANS_STEPS - 1] = exponents;
  }
}

// Decodes it, with the warp's ring. sink(row, weights, two): two rows of the part, or its last one;
// sink.meanwhile(step, row, first): while the first of them is decoded, or the third of four; sink.end(rows): after
// all. before(row, state, rings, escapes): what has gone by before a row of the part. WHOLE: the tile is 256 columns
// wide; otherwise the columns that it lacks are given as zeros.
template <bool LEVELS, bool WHOLE, class Sink, class Before>
__device__ __forceinline__ void rans_part(const Plan& plan, Bytes stream, const RansPlace& band, const RansTable& table,
                                          uint32_t ring, const RansWork& work, Sink& sink, const Before& before,
                                          uint32_t* status) {
  const uint32_t lane = stream_lane(), below = kept(stream_lanes_before()), rows = work.rows;
  const uint32_t tile = work.band_row / 4 * plan.tile_cols + work.col;
  const uint32_t width = WHOLE ? TILE : kept(rans_width(plan, work.col)), steps = width / 64;
  RansRows weights;
  if (!band.sound) {
    for (uint32_t i = 0; i < RANS_STEPS; i++) weights[0][i] = weights[1][i] = 0;
#pragma unroll 1
    for (uint32_t row = 0; row < rows; row += 2) {
      for (uint32_t s = 0; s < RANS_STEPS; s++) sink.meanwhile(s, row, row % 4 == 0);
      sink(row, weights, row + 1 < rows);
    }
    sink.end(rows);
    if (lane == 0) atomicMin(status, tile * 8 + UNFINISHED);
    return;
  }
  const uint8_t* const coded = stream.p + 16ull * band.coded;
  const uint32_t gone = work.before ? __ldg(&work.before->words) : 0;
  uint32_t escape = work.before ? __ldg(&work.before->escapes) : 0;
  uint32_t state = __ldg((work.before ? work.before->states : (const uint32_t*)coded) + lane);
  const uint32_t above = work.top - work.band_row * BAND_ROWS;  // rows of the band before the part
  const uint8_t* const raws = coded + 4 * LANES + (band.word_bytes + 15) / 16 * 16;
  const uint8_t* const escapes = raws + min(BAND_ROWS, plan.rows - work.band_row * BAND_ROWS) * width;  // of the band
  if (escape < band.listed) asm volatile("prefetch.global.L1 [%0];" ::"l"(escapes + escape));
  RansRings rings(coded + 4 * LANES, band.word_bytes, gone, raws + above * width, rows * width, width, ring);
  const uint32_t matrix = threadIdx.x % 32 / 8, line = threadIdx.x % 8;
  const uint32_t raw_of_lane = kept(ring + RANS_RAW + line % 2 * width + 64 * matrix + line / 2 * 16);
  // Levels, times eight: of the rows 2 i and 2 i + 1 in the lane i, and of the lane's columns, one in each half.
  uint32_t of_rows = 0, of_cols[RANS_STEPS];
  if (LEVELS) {
    // Past the last row are levels of columns.
    const uint32_t pair = 2 * (threadIdx.x % 32);
    const uint8_t *const of_row = stream.p + plan.scales + work.top + pair, *const of_col = stream.p + plan.scales +
                                                                                            plan.rows +
                                                                                            work.col * TILE + 2 * lane;
    if (pair < rows) of_rows = (__ldg(of_row) | __ldg(of_row + 1) << 16) * 8;
#pragma unroll
    for (uint32_t s = 0; s < RANS_STEPS; s++) {
      of_cols[s] = 0;
      if (WHOLE || s < steps) of_cols[s] = kept((__ldg(of_col + 64 * s) | __ldg(of_col + 64 * s + 1) << 16) * 8);
    }
  }
  uint32_t row = 0, slot = 0;
  const auto two_rows = [&](const bool first) {
    const uint32_t of_two = LEVELS ? __shfl_sync(ALL, of_rows, row / 2) : 0;
    uint32_t e[2][RANS_STEPS], marks = 0, raw[RANS_STEPS];
    const auto decode_row = [&](const uint32_t r) {
      const uint32_t of_row = LEVELS ? __byte_perm(of_two, 0, r == 0 ? 0x1010 : 0x3232) : 0;
#pragma unroll
      for (uint32_t s = 0; s < RANS_STEPS; s++) {
        e[r][s] = 0;
        if (WHOLE || s < steps) {
          const uint32_t slot = table.slot(state);
          e[r][s] = table.exponents(slot);
          state = (slot & 4095) * (state >> 12) + (slot >> 20);
          rans_refill(state, rings.at, below);
          marks |= e[r][s];
          if (LEVELS) e[r][s] += of_cols[s] + of_row;
        }
        if (r == 0) sink.meanwhile(s, row, first);
      }
    };
    const auto join_row = [&](const uint32_t r) {
#pragma unroll
      for (uint32_t s = 0; s < RANS_STEPS; s++)
        weights[r][s] = WHOLE || s < steps ? join(__byte_perm(raw[s], 0, r == 0 ? 0x1100 : 0x3322), e[r][s]) : 0;
    };
    const uint32_t raw_at = raw_of_lane + slot + (first ? 0 : 2 * width);
    decode_row(0);
    if (row + 1 == rows) {
      if (__any_sync(ALL, marks & 0x10001)) take_escapes<1>(e, escape, escapes, band.listed, below);
      load_raw(raw, raw_at);
      join_row(0);
      weights[1][0] = weights[1][1] = weights[1][2] = weights[1][3] = 0;
      sink(row, weights, false);
    } else {
      decode_row(1);
      if (__any_sync(ALL, marks & 0x10001)) take_escapes<2>(e, escape, escapes, band.listed, below);
      load_raw(raw, raw_at);
      join_row(0), join_row(1);
      sink(row, weights, true);
    }
    row += 2;
  };
#pragma unroll 1
  for (;; slot ^= RANS_FOUR) {
    before(row, state, rings, escape);
    rings.begin(slot);
    two_rows(true);
    if (row >= rows) break;
    two_rows(false);
    if (row >= rows) break;
  }
  sink.end(rows);
  if (!work.last) return;
  const bool finished = __all_sync(ALL, state == LOW) && rings.taken(band.word_bytes) == band.word_bytes;
  if (lane == 0 && (!finished || escape != band.listed)) {
    atomicMin(status, tile * 8 + (finished ? ESCAPE_COUNT : UNFINISHED));
  }
}

}  // namespace taper

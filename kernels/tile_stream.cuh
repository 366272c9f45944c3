// A tile stream (the README's format) as the GPU reads it: how a matrix is coded, where its bytes lie, its decode table,
// and the symbols of a band.
//
// The decoder is total: every read is clamped to the stream, every look-up masked, every write is in the band. Damage gives
// wrong weights and a status, nothing worse. It must equal `codec::band` byte for byte.
//
// A symbol waits for the one before it in the same lane: a look-up, a product, a ballot, two shuffles, some 150 cycles and
// 25 instructions for 32 symbols. So many warps must be resident: some 25 a multiprocessor hide it.
#pragma once
#include <stdint.h>

namespace taper {

constexpr uint32_t TILE = 256, BAND_ROWS = 64, LANES = 32;
constexpr uint32_t BAND_WEIGHTS = TILE * BAND_ROWS;
constexpr uint32_t HEADER_BYTES = 64, TABLE_BYTES = 512, RECORD_BYTES = 32;
constexpr uint32_t SLOTS = 4096, LOW = 1u << 16;
constexpr uint32_t ALL = 0xffffffffu;

enum Kind : uint8_t { BF16 = 1, F16 = 2, F32 = 3, F8E4M3 = 4, F8E5M2 = 5, INT8 = 6, RATE = 7 };
enum Scale : uint8_t { NO_SCALES = 0, PER_MATRIX = 1, PER_ROW = 2, PER_TILE = 3, LEVELS = 4 };
enum Predictor : uint8_t { NONE = 0, LEFT = 1, UP = 2, AVERAGE = 3, GRADIENT = 4 };
// Quantised weights may be rounded to the tensor's dtype (as it has them), only to `out` (as products take them), or stay integers
// without their scale (escapes divided by it).
enum Form : uint32_t { AS_STORED = 0, UNROUNDED = 1, INTEGERS = 2 };
enum Status : uint32_t { UNFINISHED = 1, ESCAPE_COUNT = 2 };

// How one matrix is coded, from its header. Passed by value. Mirrors `cuda::decode::Plan`.
struct Plan {
    uint64_t total;          // bytes of the stream
    uint64_t scales;         // offset of the scales or levels
    uint32_t rows, cols;
    uint32_t tile_cols;
    uint8_t kind, dtype;     // Kind; of dtypes only the float kinds and I8 (6)
    uint8_t class_bits, coding;
    uint8_t raw_bits, scale;
    uint8_t escape;          // the escape class, 255 if there is none
    uint8_t out;             // dtype to write: as `dtype`
    uint8_t map[16];
    uint32_t form;           // Form: what quantised weights become
};

// Bytes that may be read: [p, p + len).
struct Bytes {
    const uint8_t *p;
    uint64_t len;

    __device__ Bytes part(uint64_t start, uint64_t bytes) const {
        start = min(start, len);
        return {p + start, min(bytes, len - start)};
    }
    // `n` bytes (1, 2, 4 or 8) at `at`, little-endian; zeros past the end.
    __device__ uint64_t load(uint64_t at, uint32_t n) const {
        const uint8_t *q = p + at;
        if (at + n <= len && ((uintptr_t)q & (n - 1)) == 0) {
            if (n == 8) return __ldg((const unsigned long long *)q);
            if (n == 4) return __ldg((const uint32_t *)q);
            if (n == 2) return __ldg((const uint16_t *)q);
            return __ldg(q);
        }
        uint64_t value = 0;
        for (uint32_t k = 0; k < n && at + k < len; k++) value |= (uint64_t)__ldg(q + k) << (8 * k);
        return value;
    }
    __device__ uint32_t u32(uint64_t at) const { return (uint32_t)load(at, 4); }
};

__device__ inline uint64_t align16(uint64_t n) { return (n + 15) & ~15ull; }

// Bytes of all planes of a field: `bits` bits of each of `n` weights.
__device__ inline uint32_t field_bytes(uint32_t n, uint32_t bits) {
    uint32_t bytes = n * (bits / 8);
    for (uint32_t width = 4; width > 0; width /= 2)
        if (bits & width) bytes += (n * width + 7) / 8;
    return bytes;
}

__device__ inline bool has_table(const Plan &plan) { return plan.coding == 1; }

// Bytes of buffer that a warp needs: a ring of words and the symbols of 256 weights, and for INT8 the differences of a band.
// Mirrors `cuda::decode::buffer_bytes`.
constexpr uint32_t GROUP = 8 * LANES, CHUNK = 128, RING_BYTES = 4 * CHUNK;
// So many bytes ahead words are fetched into the L2, and raw bits.
constexpr uint32_t WORDS_AHEAD = 8 * CHUNK, RAW_AHEAD = 8 * GROUP;
__device__ inline uint32_t buffer_bytes(const Plan &plan) {
    return (has_table(plan) ? RING_BYTES + GROUP : 0) + (plan.kind == INT8 ? BAND_WEIGHTS : 0);
}

// Into the L2: a warp decodes 256 weights in about the time that memory takes.
__device__ inline void prefetch(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Fills the 4096 slots of the decode table, by all threads of a block: frequency | symbol << 12 | (slot - start) << 20.
// `starts` is scratch of 257 words.
__device__ inline void build_table(Bytes stream, uint32_t *table, uint32_t *starts) {
    const Bytes freqs = stream.part(HEADER_BYTES, TABLE_BYTES);
    const uint32_t lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        // Warp 0 sums: 8 frequencies a lane, then across lanes.
        uint32_t sums[8], sum = 0;
        for (uint32_t k = 0; k < 8; k++) {
            sums[k] = sum;
            sum += (uint32_t)freqs.load(2 * (8 * lane + k), 2);
        }
        uint32_t before = sum;
        for (uint32_t step = 1; step < 32; step *= 2) {
            const uint32_t other = __shfl_up_sync(ALL, before, step);
            if (lane >= step) before += other;
        }
        before -= sum;
        for (uint32_t k = 0; k < 8; k++) starts[8 * lane + k] = min(before + sums[k], SLOTS);
        if (lane == 31) starts[256] = SLOTS;
    }
    __syncthreads();
    // A warp fills the slots of a symbol. Whatever the frequencies are, every slot gets an entry.
    for (uint32_t symbol = threadIdx.x / 32; symbol < 256; symbol += blockDim.x / 32) {
        const uint32_t start = starts[symbol], frequency = starts[symbol + 1] - start;
        for (uint32_t k = lane; k < frequency; k += 32) table[start + k] = (frequency & 0xfff) | symbol << 12 | k << 20;
    }
    __syncthreads();
}

// The symbols of a band: 32 lanes hold 32 states. A step gives one symbol in every lane, and the lanes whose state fell below
// 2^16 take the next words in the order of their numbers.
//
// Words are in a ring of the warp in shared memory, 4 chunks of 64; the next chunk is on its way in a register of each lane. Four
// steps take at most two chunks, some two thirds of one as a rule.
struct Symbols {
    const uint8_t *words;
    uint32_t length; // of the words, in bytes
    const uint32_t *table;
    uint8_t *ring;
    uint32_t state, below;
    uint32_t taken = 0, filled = 3 * CHUNK; // bytes of words that have been used, and that are or were in the ring
    uint32_t next_chunk;

    // `ring`: null if there are no symbols.
    __device__ Symbols(Bytes coded, const uint32_t *table_, uint8_t *ring_) : table(table_), ring(ring_) {
        if (ring == nullptr) return;
        const uint32_t lane = threadIdx.x % 32;
        const Bytes rest = coded.part(4 * LANES, coded.len);
        // Words lie at multiples of 16 bytes; others would be damage, and so are none.
        words = rest.p, length = (uintptr_t)words % 16 == 0 ? (uint32_t)rest.len : 0;
        state = coded.u32(4 * lane), below = (1u << lane) - 1;
        uint32_t chunks[3];
        for (uint32_t i = 0; i < 3; i++) chunks[i] = load(i * CHUNK + 4 * lane);
        next_chunk = load(3 * CHUNK + 4 * lane);
        for (uint32_t i = 0; i < 3; i++) *(uint32_t *)(ring + i * CHUNK + 4 * lane) = chunks[i];
        __syncwarp();
    }
    // Two words; zeros past the end.
    __device__ uint32_t load(uint32_t at) const {
        if (at + 4 <= length) return __ldg((const uint32_t *)(words + at));
        return at + 2 <= length ? __ldg((const uint16_t *)(words + at)) : 0;
    }
    // Before every four steps.
    __device__ void prepare() {
#pragma unroll 1
        while (filled - taken < 2 * CHUNK) {
            const uint32_t lane = threadIdx.x % 32;
            *(uint32_t *)(ring + filled % RING_BYTES + 4 * lane) = next_chunk;
            filled += CHUNK;
            next_chunk = load(filled + 4 * lane);
            if (filled + WORDS_AHEAD < length) prefetch(words + filled + WORDS_AHEAD);
        }
        __syncwarp();
    }
    // The lane's next symbol.
    __device__ uint32_t next() {
        const uint32_t entry = table[state & (SLOTS - 1)];
        state = (entry & 0xfff) * (state >> 12) + (entry >> 20);
        const bool needs = state < LOW;
        const uint32_t all = __ballot_sync(ALL, needs);
        const uint32_t word = *(const uint16_t *)(ring + (taken + 2 * __popc(all & below)) % RING_BYTES);
        if (needs) state = state << 16 | word;
        taken += 2 * __popc(all);
        return entry >> 12 & 255;
    }
    // Whether states and words are what they must be at the end.
    __device__ bool finished() const { return __all_sync(ALL, state == LOW) && taken == length; }
};

} // namespace taper

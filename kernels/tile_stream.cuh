// One band of a tile stream, decoded by one warp: the format of the README ("A tile stream") in CUDA.
//
// A band is up to 64 rows x 256 columns. A warp decodes it in three steps:
//   1. symbols  rANS only: 32 lanes hold 32 states; a step gives one symbol in every lane, and the lanes whose state fell
//               below 2^16 take the next words in the order of their numbers. Symbols go to the warp's buffer.
//   2. join     each lane takes 8 consecutive weights: classes, raw planes, escapes -> codes.
//   3. int8     differences -> weights (predictors), in the buffer.
// Codes are then turned into the tensor's own dtype and from there into the dtype asked for, and written.
//
// Budget, BF16 `rans`: 8 KB of buffer a warp, 16 KB of table a block. A step costs about 20 instructions for 64 weights and
// is bound by its own latency (a look-up, a product, a ballot, two shuffles), so many warps must be resident.
//
// The decoder is total: every read is clamped to the stream, every look-up masked, every write is in the band. Damage gives
// wrong weights and a status, nothing worse. It must equal `codec::band` byte for byte.
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

// Bytes of buffer that a warp needs. Mirrors `cuda::decode::buffer_bytes`.
__device__ inline uint32_t buffer_bytes(const Plan &plan) {
    if (plan.kind == INT8 || plan.class_bits == 8) return BAND_WEIGHTS;
    return plan.coding == 1 ? BAND_WEIGHTS / 2 : 0;
}

// Fills the 4096 slots of the decode table, by all threads of a block: symbol | frequency << 8 | (slot - start) << 20.
// `starts` is scratch of 257 words.
__device__ inline void build_table(Bytes stream, uint32_t *table, uint32_t *starts) {
    const Bytes freqs = stream.part(HEADER_BYTES, TABLE_BYTES);
    if (threadIdx.x < 32) {
        // Warp 0 sums: 8 frequencies a lane, then across lanes.
        uint32_t sums[8], sum = 0;
        for (uint32_t k = 0; k < 8; k++) {
            sums[k] = sum;
            sum += (uint32_t)freqs.load(2 * (8 * threadIdx.x + k), 2);
        }
        uint32_t before = sum;
        for (uint32_t step = 1; step < 32; step *= 2) {
            const uint32_t other = __shfl_up_sync(ALL, before, step);
            if (threadIdx.x >= step) before += other;
        }
        before -= sum;
        for (uint32_t k = 0; k < 8; k++) starts[8 * threadIdx.x + k] = min(before + sums[k], SLOTS);
        if (threadIdx.x == 31) starts[256] = SLOTS;
    }
    __syncthreads();
    for (uint32_t slot = threadIdx.x; slot < SLOTS; slot += blockDim.x) {
        // The last symbol that starts at or before the slot and is not empty.
        uint32_t low = 0, high = 256;
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (starts[middle] <= slot) low = middle; else high = middle;
        }
        const uint32_t frequency = starts[low + 1] - starts[low];
        table[slot] = low | (frequency & 0xfff) << 8 | (slot - starts[low]) << 20;
    }
    __syncthreads();
}

// Step 1. Decodes `count` symbols (a multiple of 32) into `out`. False if states or words are not what they must be.
__device__ inline bool decode_symbols(Bytes coded, const uint32_t *table, uint8_t *out, uint32_t count) {
    const uint32_t lane = threadIdx.x % 32, below = (1u << lane) - 1;
    uint32_t state = coded.u32(4 * lane);
    const Bytes words = coded.part(4 * LANES, coded.len);
    // The next 192 words: in each of three registers a lane holds two neighbours. 64 words last about 6 steps, so that
    // loads have some hundred cycles.
    uint64_t ahead = 3 * 128;
    uint32_t w0 = words.u32(4 * lane), w1 = words.u32(128 + 4 * lane), w2 = words.u32(256 + 4 * lane);
    uint32_t at = 0, taken = 0;
    for (uint32_t i = lane; i < count; i += LANES) {
        const uint32_t entry = table[state & (SLOTS - 1)];
        out[i] = (uint8_t)entry;
        state = ((entry >> 8) & 0xfff) * (state >> 12) + (entry >> 20);
        const bool needs = state < LOW;
        const uint32_t all = __ballot_sync(ALL, needs);
        const uint32_t index = at + __popc(all & below);
        const uint32_t from0 = __shfl_sync(ALL, w0, index / 2), from1 = __shfl_sync(ALL, w1, index / 2);
        const uint32_t pair = index < 64 ? from0 : from1;
        const uint32_t word = index % 2 ? pair >> 16 : pair & 0xffff;
        if (needs) state = state << 16 | word;
        at += __popc(all);
        taken += __popc(all);
        if (at >= 64) {
            at -= 64;
            w0 = w1;
            w1 = w2;
            w2 = words.u32(ahead + 4 * lane);
            ahead += 128;
        }
    }
    return __all_sync(ALL, state == LOW) && 2ull * taken == words.len;
}

// `state << 16 | word` etc. is all integer work; floats appear only below.

__device__ inline float bits_f32(uint32_t bits) { return __uint_as_float(bits); }

// Rounding to nearest even, NaNs kept: as the `half` crate does it.
__device__ inline uint32_t to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

__device__ inline uint32_t to_f16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return (bits >> 16 & 0x8000) | 0x7e00 | (bits >> 13 & 0x3ff);
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

__device__ inline float f16_f32(uint32_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((uint16_t)bits));
    return value;
}

__device__ inline float e4m3_f32(uint32_t bits) {
    const uint32_t sign = (bits & 0x80) << 24, magnitude = bits & 0x7f;
    const float value = bits_f32(magnitude << 20) * bits_f32((127 + 120) << 23);
    return bits_f32((magnitude == 0x7f ? 0x7fc00000 : __float_as_uint(value)) | sign);
}

__device__ inline uint32_t round_to(uint8_t dtype, float value) {
    return dtype == BF16 ? to_bf16(value) : dtype == F16 ? to_f16(value) : __float_as_uint(value);
}

__device__ inline float value_of(uint8_t dtype, uint32_t bits) {
    switch (dtype) {
        case BF16: return bits_f32(bits << 16);
        case F16: return f16_f32(bits);
        case F32: return bits_f32(bits);
        case F8E4M3: return e4m3_f32(bits);
        case F8E5M2: return f16_f32(bits << 8);
        default: return (float)(int8_t)bits;
    }
}

__device__ inline bool quantised(const Plan &plan) {
    return plan.scale == PER_MATRIX || plan.scale == PER_ROW || plan.scale == PER_TILE;
}

// From a decoded value (a code of the plan's kind; the bits of an f32 for quantised kinds) to the dtype to write.
__device__ inline uint32_t finish(const Plan &plan, uint32_t value) {
    uint32_t own = value;
    if (quantised(plan) && plan.form != AS_STORED) return round_to(plan.out, bits_f32(value));
    if (quantised(plan)) own = round_to(plan.dtype, bits_f32(value));
    else if (plan.kind == BF16 && plan.dtype == F32) own = value << 16;
    else if (plan.kind == BF16 && plan.dtype == F16) own = to_f16(bits_f32(value << 16));
    return plan.out == plan.dtype ? own : round_to(plan.out, value_of(plan.dtype, own));
}

__device__ inline uint32_t dtype_bytes(uint8_t dtype) { return dtype == F32 ? 4 : dtype <= F16 ? 2 : 1; }

// Where a band's weights go: rows [from, to) of it, the first to `out`, `stride` bytes apart.
struct Target {
    uint8_t *out;
    uint64_t stride;
    uint32_t from, to;
};

// One band.
struct Band {
    const Plan &plan;
    Bytes stream;
    uint32_t tile, row, col; // index of the tile; place of the band in the matrix
    uint32_t rows, cols;     // of the band
    Target target;

    __device__ uint32_t weights() const { return rows * cols; }

    __device__ float scale(uint32_t r) const {
        const uint64_t index = plan.scale == PER_ROW ? row + r : plan.scale == PER_TILE ? tile : 0;
        return bits_f32(stream.u32(plan.scales + 4 * index));
    }

    // Writes up to 8 values (`count`) that start at weight `first`.
    __device__ void write(uint32_t first, const uint32_t *values, uint32_t count) const {
        uint32_t r = first / cols, c = first % cols;
        const uint32_t size = dtype_bytes(plan.out);
        uint8_t *line = target.out + (uint64_t)(r - target.from) * target.stride;
        uint8_t *place = line + (uint64_t)c * size;
        if (count == 8 && c + 8 <= cols && ((uintptr_t)place & (8 * size - 1) & 15) == 0) {
            if (r < target.from || r >= target.to) return;
            if (size == 2) {
                uint4 packed = {values[0] | values[1] << 16, values[2] | values[3] << 16, values[4] | values[5] << 16,
                                values[6] | values[7] << 16};
                *(uint4 *)place = packed;
            } else if (size == 4) {
                ((uint4 *)place)[0] = make_uint4(values[0], values[1], values[2], values[3]);
                ((uint4 *)place)[1] = make_uint4(values[4], values[5], values[6], values[7]);
            } else {
                for (uint32_t k = 0; k < 8; k++) place[k] = (uint8_t)values[k];
            }
            return;
        }
        for (uint32_t k = 0; k < count; k++) {
            if (r >= target.from && r < target.to) {
                uint8_t *at = target.out + (uint64_t)(r - target.from) * target.stride + (uint64_t)c * size;
                for (uint32_t b = 0; b < size; b++) at[b] = (uint8_t)(values[k] >> (8 * b));
            }
            if (++c == cols) { c = 0; r++; }
        }
    }
};

// The classes of 8 weights, one in each byte.
__device__ inline uint64_t classes_of(const Plan &plan, uint32_t n, uint32_t first, Bytes coded, const uint8_t *symbols) {
    if (plan.class_bits == 8) return *(const unsigned long long *)(symbols + first);
    uint64_t classes = 0;
    if (plan.class_bits == 4) {
        const uint32_t pairs = has_table(plan) ? *(const uint32_t *)(symbols + first / 2) : (uint32_t)coded.load(first / 2, 4);
        for (uint32_t k = 0; k < 8; k++) classes |= (uint64_t)(pairs >> (4 * k) & 15) << (8 * k);
    } else {
        const uint32_t low = (uint32_t)coded.load(first / 4, 2), high = (uint32_t)coded.load((2 * n + 7) / 8 + first / 8, 1);
        for (uint32_t k = 0; k < 8; k++)
            classes |= (uint64_t)((low >> (2 * k) & 3) | (high >> k & 1) << 2) << (8 * k);
    }
    return classes;
}

// The raw bits of 8 weights: planes of 8 bits from the lowest bits up, then of 4, 2 and 1.
__device__ inline void raw_of(uint32_t bits, uint32_t n, uint32_t first, Bytes raw, uint32_t *out) {
    for (uint32_t k = 0; k < 8; k++) out[k] = 0;
    uint32_t start = 0, shift = 0;
    for (uint32_t width = 8; shift < bits;) {
        if (bits - shift < width) { width /= 2; continue; }
        const uint64_t bytes = raw.load(start + first / 8 * width, width);
        const uint32_t mask = (1u << width) - 1;
        for (uint32_t k = 0; k < 8; k++) out[k] |= ((uint32_t)(bytes >> (k * width)) & mask) << shift;
        start += (n * width + 7) / 8;
        shift += width;
    }
}

// The code with that exponent, sign and mantissa (sign on top of the mantissa in `raw`).
__device__ inline uint32_t join_float(uint8_t kind, uint32_t high, uint32_t raw) {
    const uint32_t mantissa = kind == BF16 ? 7 : kind == F16 ? 10 : kind == F32 ? 23 : kind == F8E4M3 ? 3 : 2;
    const uint32_t exponent = kind == BF16 || kind == F32 ? 8 : kind == F8E4M3 ? 4 : 5;
    const uint32_t sign = raw >> mantissa & 1;
    return sign << (mantissa + exponent) | (high & ((1u << exponent) - 1)) << mantissa | (raw & ((1u << mantissa) - 1));
}

// Step 3. Differences to weights, in place. Lane `l` works on row `l` of 32, one column behind the lane above it, so that
// what it needs from there is a shuffle away. Every predictor fits; none of them is common.
__device__ inline void undo_predictor(uint8_t predictor, uint8_t *weights, uint32_t rows, uint32_t cols) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t base = 0; base < rows; base += 32) {
        const uint32_t r = base + lane;
        uint32_t left = 0, corner = 0;
        for (uint32_t step = 0; step < cols + 31; step++) {
            // The weight that the lane above found in the step before: the one above this one.
            uint32_t up = __shfl_up_sync(ALL, left, 1);
            const uint32_t c = step - lane;
            const bool active = step >= lane && c < cols && r < rows;
            if (active) {
                if (lane == 0) up = base == 0 ? 0 : weights[(base - 1) * cols + c];
                uint32_t guess = 0;
                if (predictor == LEFT) guess = left;
                if (predictor == UP) guess = up;
                if (predictor == AVERAGE) guess = (uint32_t)(((int32_t)(int8_t)left + (int32_t)(int8_t)up) >> 1);
                if (predictor == GRADIENT) guess = left + up - corner;
                left = (weights[r * cols + c] + guess) & 0xff;
                weights[r * cols + c] = (uint8_t)left;
                corner = up;
            }
        }
        __syncwarp();
    }
}

// Decodes band `index` of tile `tile` with one warp. `buffer` is the warp's own, `table` the block's (rANS only).
__device__ inline void decode_band(const Plan &plan, Bytes stream, const uint32_t *table, const uint8_t *map,
                                   uint8_t *buffer, uint32_t tile, uint32_t index, Target target, uint32_t *status) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t top = tile / plan.tile_cols * TILE, left = tile % plan.tile_cols * TILE;
    const uint32_t tile_rows = min(TILE, plan.rows - top), bands = (tile_rows + BAND_ROWS - 1) / BAND_ROWS;
    const uint32_t skip = index * BAND_ROWS;
    const Band band = {plan, stream, tile, top + skip, left, min(BAND_ROWS, tile_rows - skip), min(TILE, plan.cols - left),
                       target};
    const uint32_t n = band.weights();

    // Where the band's sections lie.
    const uint64_t record = HEADER_BYTES + TABLE_BYTES + (uint64_t)RECORD_BYTES * tile;
    const Bytes data = stream.part(stream.load(record, 8), stream.u32(record + 16));
    const uint8_t predictor = (uint8_t)stream.load(record + 24, 1);
    const uint32_t escape_bytes = plan.kind == RATE ? 4 : 1;
    uint64_t start = align16(8 * bands);
    uint32_t coded_bytes = 0, escapes = 0;
    for (uint32_t b = 0; b <= index; b++) {
        const uint32_t weights = min(BAND_ROWS, tile_rows - b * BAND_ROWS) * band.cols;
        coded_bytes = data.u32(8 * b);
        escapes = data.u32(8 * b + 4);
        if (b < index)
            start += align16(coded_bytes) + align16(field_bytes(weights, plan.raw_bits)) + align16((uint64_t)escapes * escape_bytes);
    }
    const uint32_t raw_bytes = field_bytes(n, plan.raw_bits);
    const Bytes coded = data.part(start, coded_bytes);
    const Bytes raw = data.part(start + align16(coded_bytes), raw_bytes);
    const Bytes listed = data.part(start + align16(coded_bytes) + align16(raw_bytes), (uint64_t)escapes * escape_bytes);

    // Symbols of 4-bit classes lie in the second half of an INT8 buffer: weights, twice as many, are written from its
    // start and never overtake them.
    uint8_t *symbols = buffer + (plan.kind == INT8 && plan.class_bits == 4 ? BAND_WEIGHTS / 2 : 0);
    bool finished = true;
    if (has_table(plan)) finished = decode_symbols(coded, table, symbols, (n + 63) / 64 * 64 * plan.class_bits / 8);
    __syncwarp();

    const bool in_bytes = plan.kind == INT8;
    const bool uniform_scale = quantised(plan) && plan.scale != PER_ROW;
    const float scale = uniform_scale ? band.scale(0) : 1.0f;
    const int32_t bias = (1 << (max((uint32_t)plan.class_bits, 1u) - 1)) - 1;
    uint32_t found = 0;
    for (uint32_t group = 0; group < n; group += 8 * LANES) {
        const uint32_t first = group + 8 * lane;
        const uint32_t count = first < n ? min(8u, n - first) : 0;
        uint64_t classes = 0;
        uint32_t values[8], marked = 0;
        if (count > 0) {
            raw_of(plan.raw_bits, n, first, raw, values);
            if (plan.class_bits > 0) classes = classes_of(plan, n, first, coded, symbols);
            if (plan.class_bits > 0 && plan.escape != 255 || plan.class_bits == 8 && plan.kind == RATE) {
                for (uint32_t k = 0; k < count; k++) marked |= (uint32_t)((classes >> (8 * k) & 255) == plan.escape) << k;
            }
        }
        // The place of this lane's first escape in the list.
        uint32_t place = found;
        if (__ballot_sync(ALL, marked != 0) != 0) {
            uint32_t sum = __popc(marked);
            for (uint32_t step = 1; step < 32; step *= 2) {
                const uint32_t other = __shfl_up_sync(ALL, sum, step);
                if (lane >= step) sum += other;
            }
            place += sum - __popc(marked);
            found += __shfl_sync(ALL, sum, 31);
        }
        if (count > 0 && plan.class_bits > 0) {
            uint32_t r = first / band.cols, c = first % band.cols;
            for (uint32_t k = 0; k < count; k++) {
                const uint32_t cls = (uint32_t)(classes >> (8 * k)) & 255;
                const bool escaped = marked >> k & 1;
                if (plan.kind == RATE) {
                    const int32_t q = (int32_t)(((uint32_t)((int32_t)cls - bias) << plan.raw_bits) | values[k]);
                    const float step = uniform_scale ? scale : band.scale(r);
                    if (plan.form == INTEGERS)
                        values[k] = __float_as_uint(escaped ? bits_f32(listed.u32(4ull * place)) / step : (float)q);
                    else
                        values[k] = escaped ? listed.u32(4ull * place) : __float_as_uint(__fmul_rn((float)q, step));
                } else if (plan.class_bits == 8) {
                    values[k] = cls;
                } else {
                    uint32_t high = map[cls & 15];
                    if (plan.scale == LEVELS) {
                        const uint32_t of_row = (uint32_t)stream.load(plan.scales + band.row + r, 1);
                        const uint32_t of_col = (uint32_t)stream.load(plan.scales + plan.rows + band.col + c, 1);
                        high = (high + (min(255u, of_row + of_col) >> 4)) & 255;
                    }
                    if (escaped) high = (uint32_t)listed.load(place, 1);
                    values[k] = plan.kind == INT8 ? (high << 4 | (values[k] & 15)) & 255 : join_float(plan.kind, high, values[k]);
                }
                place += escaped;
                if (++c == band.cols) { c = 0; r++; }
            }
        }
        if (in_bytes) {
            __syncwarp(); // all have read their symbols
            for (uint32_t k = 0; k < count; k++) buffer[first + k] = (uint8_t)values[k];
        } else if (count > 0) {
            for (uint32_t k = 0; k < count; k++) values[k] = finish(plan, values[k]);
            band.write(first, values, count);
        }
    }
    if (in_bytes) {
        __syncwarp();
        if (predictor != NONE) undo_predictor(predictor, buffer, band.rows, band.cols);
        for (uint32_t first = 8 * lane; first < n; first += 8 * LANES) {
            const uint32_t count = min(8u, n - first);
            uint32_t values[8];
            for (uint32_t k = 0; k < count; k++) {
                const float q = (float)(int8_t)buffer[first + k];
                const bool one = !quantised(plan) || plan.form == INTEGERS;
                const float by = one ? 1.0f : uniform_scale ? scale : band.scale((first + k) / band.cols);
                const uint32_t value = quantised(plan) ? __float_as_uint(__fmul_rn(q, by)) : buffer[first + k];
                values[k] = finish(plan, value);
            }
            band.write(first, values, count);
        }
    }
    if (lane == 0) {
        const bool counted = found == escapes && listed.len == (uint64_t)escapes * escape_bytes;
        const uint32_t code = !finished ? UNFINISHED : !counted ? ESCAPE_COUNT : 0;
        if (code != 0) atomicMin(status, tile * 8 + code);
    }
    __syncwarp(); // the buffer is free again
}

} // namespace taper

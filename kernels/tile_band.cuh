// One band of a tile stream, decoded by one warp and handed on.
//
// A band is up to 64 rows x 256 columns. A warp takes 256 weights at a time, 8 neighbours in each lane:
//   1. symbols  rANS only: 4 or 8 steps of all lanes, through the warp's buffer
//   2. join     classes, raw planes, escapes -> codes
//   3. int8     differences -> weights (predictors), when the band is complete in the buffer
// Codes are then turned into the tensor's own dtype and from there into the dtype asked for, and given to a sink:
//   write(first, values, count)   up to 8 values from weight `first` of the band on, row by row
//   group(end)                    by all lanes, when all weights before `end` have been given
#pragma once
#include "tile_values.cuh"

namespace taper {

// Writes rows [from, to) of a band, the first to `out`, `stride` bytes apart.
struct ToRows {
    const Plan &plan;
    uint8_t *out;
    uint64_t stride;
    uint32_t from, to, cols;

    __device__ void write(uint32_t first, const uint32_t *values, uint32_t count) const {
        uint32_t r = first / cols, c = first % cols;
        const uint32_t size = dtype_bytes(plan.out);
        uint8_t *place = out + (uint64_t)(r - from) * stride + (uint64_t)c * size;
        if (count == 8 && c + 8 <= cols && ((uintptr_t)place & (8 * size - 1) & 15) == 0) {
            if (r < from || r >= to) return;
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
#pragma unroll
        for (uint32_t k = 0; k < 8; k++) {
            if (k < count && r >= from && r < to) {
                uint8_t *at = out + (uint64_t)(r - from) * stride + (uint64_t)c * size;
                for (uint32_t b = 0; b < size; b++) at[b] = (uint8_t)(values[k] >> (8 * b));
            }
            if (++c == cols) { c = 0; r++; }
        }
    }
    __device__ void group(uint32_t) const {}
};

// One band.
struct Band {
    const Plan &plan;
    Bytes stream;
    uint32_t tile, row, col; // index of the tile; place of the band in the matrix
    uint32_t rows, cols;     // of the band

    __device__ float scale(uint32_t r) const {
        const uint64_t index = plan.scale == PER_ROW ? row + r : plan.scale == PER_TILE ? tile : 0;
        return bits_f32(stream.u32(plan.scales + 4 * index));
    }
};

// The classes of 8 weights, one in each byte.
// `symbols` are the lane's own, if there are such.
__device__ inline uint64_t classes_of(const Plan &plan, uint32_t n, uint32_t first, Bytes coded, const uint8_t *symbols) {
    if (plan.class_bits == 8) return *(const unsigned long long *)symbols;
    uint32_t low, high; // four weights each
    if (plan.class_bits == 4) {
        const uint32_t pairs = has_table(plan) ? *(const uint32_t *)symbols : (uint32_t)coded.load(first / 2, 4);
        const uint32_t even = pairs & 0x0f0f0f0f, odd = pairs >> 4 & 0x0f0f0f0f;
        low = __byte_perm(even, odd, 0x5140), high = __byte_perm(even, odd, 0x7362);
    } else {
        const uint32_t twos = (uint32_t)coded.load(first / 4, 2), ones = (uint32_t)coded.load((2 * n + 7) / 8 + first / 8, 1);
        low = high = 0;
        for (uint32_t k = 0; k < 4; k++) {
            low |= ((twos >> (2 * k) & 3) | (ones >> k & 1) << 2) << (8 * k);
            high |= ((twos >> (2 * k + 8) & 3) | (ones >> (k + 4) & 1) << 2) << (8 * k);
        }
    }
    return (uint64_t)high << 32 | low;
}

// Which of 8 bytes are `value`, a bit for each.
__device__ inline uint32_t equal_bytes(uint64_t bytes, uint32_t value) {
    const uint32_t all = value * 0x01010101u;
    const auto bits = [](uint32_t mask) { return (mask & 0x08040201u) * 0x01010101u >> 24; };
    return bits(__vcmpeq4((uint32_t)bytes, all)) | bits(__vcmpeq4((uint32_t)(bytes >> 32), all)) << 4;
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

__device__ inline uint32_t mantissa_bits(uint8_t kind) {
    return kind == BF16 ? 7 : kind == F16 ? 10 : kind == F32 ? 23 : kind == F8E4M3 ? 3 : 2;
}

// Where `high` stands in a code: the exponent of a float, the upper half of an INT8 weight.
__device__ inline uint32_t high_mask(const Plan &plan) {
    if (plan.kind == INT8) return 0xf0;
    const uint32_t exponent = plan.kind == BF16 || plan.kind == F32 ? 8 : plan.kind == F8E4M3 ? 4 : 5;
    return ((1u << exponent) - 1) << mantissa_bits(plan.kind);
}

__device__ inline uint32_t high_in_place(const Plan &plan, uint32_t high) {
    return high << (plan.kind == INT8 ? 4 : mantissa_bits(plan.kind)) & high_mask(plan);
}

// The code with that high part and raw bits; a float's sign is on top of its mantissa in them.
__device__ inline uint32_t join(const Plan &plan, uint32_t high, uint32_t raw) {
    if (plan.kind == INT8) return high_in_place(plan, high) | (raw & 15);
    const uint32_t mantissa = mantissa_bits(plan.kind);
    const uint32_t sign = (raw >> mantissa & 1) * (high_mask(plan) + (1u << mantissa));
    return sign | high_in_place(plan, high) | (raw & ((1u << mantissa) - 1));
}

// The same code with another high part.
__device__ inline uint32_t exchange(const Plan &plan, uint32_t high, uint32_t code) {
    return high_in_place(plan, high) | (code & ~high_mask(plan));
}

// Differences to weights, in place. Lane `l` works on row `l` of 32, one column behind the lane above it, so that
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

// Where the sections of band `index` of a tile lie.
struct Sections {
    Bytes coded, raw, listed;
    uint32_t escapes, escape_bytes;
    uint8_t predictor;

    __device__ Sections(const Plan &plan, Bytes stream, uint32_t tile, uint32_t tile_rows, uint32_t index, uint32_t cols) {
        const uint64_t record = HEADER_BYTES + TABLE_BYTES + (uint64_t)RECORD_BYTES * tile;
        const Bytes data = stream.part(stream.load(record, 8), stream.u32(record + 16));
        const uint32_t bands = (tile_rows + BAND_ROWS - 1) / BAND_ROWS;
        predictor = (uint8_t)stream.load(record + 24, 1);
        escape_bytes = plan.kind == RATE ? 4 : 1;
        uint64_t start = align16(8 * bands);
        uint32_t coded_bytes = 0, raw_bytes = 0;
        for (uint32_t b = 0; b <= index; b++) {
            if (b > 0) start += align16(coded_bytes) + align16(raw_bytes) + align16((uint64_t)escapes * escape_bytes);
            coded_bytes = data.u32(8 * b), escapes = data.u32(8 * b + 4);
            raw_bytes = field_bytes(min(BAND_ROWS, tile_rows - b * BAND_ROWS) * cols, plan.raw_bits);
        }
        coded = data.part(start, coded_bytes);
        raw = data.part(start + align16(coded_bytes), raw_bytes);
        listed = data.part(start + align16(coded_bytes) + align16(raw_bytes), (uint64_t)escapes * escape_bytes);
    }
};

// Decodes band `index` of tile `tile` with one warp. `buffer` is the warp's own, `table` the block's (rANS only).
template <class Sink>
__device__ inline void decode_band(const Plan &plan, Bytes stream, const uint32_t *table, const uint8_t *map,
                                   uint8_t *buffer, uint32_t tile, uint32_t index, Sink &sink, uint32_t *status) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t top = tile / plan.tile_cols * TILE, left = tile % plan.tile_cols * TILE;
    const uint32_t tile_rows = min(TILE, plan.rows - top), skip = index * BAND_ROWS;
    const Band band = {plan, stream, tile, top + skip, left, min(BAND_ROWS, tile_rows - skip), min(TILE, plan.cols - left)};
    const uint32_t n = band.rows * band.cols;

    const Sections sections(plan, stream, tile, tile_rows, index, band.cols);
    const Bytes coded = sections.coded, raw = sections.raw, listed = sections.listed;
    const uint32_t escapes = sections.escapes, escape_bytes = sections.escape_bytes;

    uint8_t *const symbols = buffer + (has_table(plan) ? RING_BYTES : 0), *const weights = symbols + (has_table(plan) ? GROUP : 0);
    const uint32_t bytes_of_lane = plan.class_bits; // 8 weights' symbols
    uint32_t steps = has_table(plan) ? (n + 63) / 64 * (plan.class_bits / 4) : 0;
    Symbols coded_symbols(coded, table, has_table(plan) ? buffer : nullptr);

    const bool in_bytes = plan.kind == INT8;
    const bool uniform_scale = quantised(plan) && plan.scale != PER_ROW;
    const float scale = uniform_scale ? band.scale(0) : 1.0f;
    const int32_t bias = (1 << (max((uint32_t)plan.class_bits, 1u) - 1)) - 1;
    uint32_t found = 0;
    for (uint32_t group = 0; group < n; group += GROUP) {
        const uint32_t first = group + 8 * lane;
        const uint32_t count = first < n ? min(8u, n - first) : 0;
        uint64_t classes = 0;
        uint32_t values[8], marked = 0;
        if (count > 0) raw_of(plan.raw_bits, n, first, raw, values); // on their way during the steps
        if (has_table(plan)) {
            const uint32_t now = min(steps, plan.class_bits);
            steps -= now;
#pragma unroll 4
            for (uint32_t step = 0; step < now; step++) {
                if (step % 4 == 0) coded_symbols.prepare();
                symbols[step * LANES + lane] = (uint8_t)coded_symbols.next();
            }
            __syncwarp();
        }
        if (count > 0) {
            if (plan.class_bits > 0) classes = classes_of(plan, n, first, coded, symbols + lane * bytes_of_lane);
            if (plan.class_bits > 0 && (plan.escape != 255 || plan.class_bits == 8 && plan.kind == RATE))
                marked = equal_bytes(classes, plan.escape) & ((1u << count) - 1);
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
        if (count > 0 && plan.class_bits > 0 && (plan.kind == RATE || plan.class_bits < 8)) {
            uint32_t r = first / band.cols, c = first % band.cols;
#pragma unroll
            for (uint32_t k = 0; k < 8; k++) { // past `count` nothing comes of it
                const uint32_t cls = (uint32_t)(classes >> (8 * k)) & 255;
                if (plan.kind == RATE) {
                    const int32_t q = (int32_t)(((uint32_t)((int32_t)cls - bias) << plan.raw_bits) | values[k]);
                    const float step = uniform_scale ? scale : band.scale(r);
                    const bool escaped = marked >> k & 1;
                    const uint32_t listed_bits = escaped ? listed.u32(4ull * place) : 0;
                    if (plan.form == INTEGERS)
                        values[k] = __float_as_uint(escaped ? bits_f32(listed_bits) / step : (float)q);
                    else
                        values[k] = escaped ? listed_bits : __float_as_uint(__fmul_rn((float)q, step));
                    place += escaped;
                } else {
                    uint32_t high = map[cls & 15];
                    if (plan.scale == LEVELS) {
                        const uint32_t of_row = (uint32_t)stream.load(plan.scales + band.row + r, 1);
                        const uint32_t of_col = (uint32_t)stream.load(plan.scales + plan.rows + band.col + c, 1);
                        high = (high + (min(255u, of_row + of_col) >> 4)) & 255;
                    }
                    values[k] = join(plan, high, values[k]);
                }
                if (++c == band.cols) { c = 0; r++; }
            }
            if (plan.kind != RATE && marked) {
#pragma unroll
                for (uint32_t k = 0; k < 8; k++)
                    if (marked >> k & 1) values[k] = exchange(plan, (uint32_t)listed.load(place++, 1), values[k]);
            }
        } else if (plan.class_bits == 8) {
#pragma unroll
            for (uint32_t k = 0; k < 8; k++) values[k] = (uint32_t)(classes >> (8 * k)) & 255;
        }
        __syncwarp(); // all have read their symbols
        if (in_bytes) {
#pragma unroll
            for (uint32_t k = 0; k < 8; k++)
                if (k < count) weights[first + k] = (uint8_t)values[k];
            continue;
        }
#pragma unroll
        for (uint32_t k = 0; k < 8; k++) values[k] = finish(plan, values[k]);
        if (count > 0) sink.write(first, values, count);
        sink.group(min(n, group + GROUP));
    }
    if (in_bytes) {
        __syncwarp();
        if (sections.predictor != NONE) undo_predictor(sections.predictor, weights, band.rows, band.cols);
        for (uint32_t group = 0; group < n; group += GROUP) {
            const uint32_t first = group + 8 * lane, count = first < n ? min(8u, n - first) : 0;
            uint32_t values[8];
#pragma unroll
            for (uint32_t k = 0; k < 8; k++) {
                if (k >= count) break;
                const float q = (float)(int8_t)weights[first + k];
                const bool one = !quantised(plan) || plan.form == INTEGERS;
                const float by = one ? 1.0f : uniform_scale ? scale : band.scale((first + k) / band.cols);
                const uint32_t value = quantised(plan) ? __float_as_uint(__fmul_rn(q, by)) : weights[first + k];
                values[k] = finish(plan, value);
            }
            if (count > 0) sink.write(first, values, count);
            sink.group(min(n, group + GROUP));
        }
    }
    const bool finished = !has_table(plan) || coded_symbols.finished();
    if (lane == 0) {
        const bool counted = found == escapes && listed.len == (uint64_t)escapes * escape_bytes;
        const uint32_t code = !finished ? UNFINISHED : !counted ? ESCAPE_COUNT : 0;
        if (code != 0) atomicMin(status, tile * 8 + code);
    }
    __syncwarp(); // the buffer is free again
}


} // namespace taper

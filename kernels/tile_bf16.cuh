// One band of a BF16 matrix as they usually are (4-bit classes by rANS, 8 raw bits, with levels or not), whose columns are a
// multiple of eight: what `decode_band` does for every kind, by pairs of weights.
//
// A symbol of rANS is the classes of two weights. A table of 256 words in shared memory has what it stands for: exponent of the
// first << 7 | that of the second << 23, and in the mantissas' places marks: 1 if the first is an escape, 1 << 16 if the second
// is. A logical operation joins them with two raw bytes. Levels are eight times that of the row and eight times that of the column,
// added to the exponents: sixteenths of an octave end in the mantissas' places, carries in the signs'.
//
// A symbol waits for the one before it: the symbols of 256 weights are decoded while the 256 before them are joined.
//
// Budget of 256 weights, for each lane eight: 4 symbols of 22 instructions, 30 to join.
#pragma once
#include "tile_band.cuh"

namespace taper {

// Bytes that a warp needs: a ring of words, symbols of twice 256 weights, and levels of 256 columns.
constexpr uint32_t BF16_SYMBOLS = GROUP, BF16_LEVELS = 2 * TILE, BF16_BUFFER = RING_BYTES + BF16_SYMBOLS + BF16_LEVELS;
// Of a block: the decode table, then pairs.
constexpr uint32_t BF16_TABLES = 4 * SLOTS + 4 * 256;

// Made by all threads of a block. `tables`: BF16_TABLES bytes and 257 words of scratch.
__device__ inline void build_bf16_tables(const Plan &plan, Bytes stream, uint8_t *tables) {
    build_table(stream, (uint32_t *)tables, (uint32_t *)(tables + BF16_TABLES));
    uint32_t *const pairs = (uint32_t *)(tables + 4 * SLOTS);
    for (uint32_t symbol = threadIdx.x; symbol < 256; symbol += blockDim.x) {
        const uint32_t first = symbol & 15, second = symbol >> 4;
        pairs[symbol] = plan.map[first] << 7 | plan.map[second] << 23 | (first == plan.escape ? 1 : 0) |
                        (second == plan.escape ? 1 << 16 : 0);
    }
    __syncthreads();
}

template <bool VALUE> struct Constant { static constexpr bool value = VALUE; };

// Those of `raw` where the mantissa and the sign are, else of `exponents`.
__device__ inline uint32_t join_pair(uint32_t raw, uint32_t exponents) {
    return (raw & 0x807F807F) | (exponents & 0x7F807F80);
}

// Exponents of weights that are marked are the next ones of the list, of which `found` are gone. How many these are.
__device__ inline uint32_t take_escapes(uint32_t (&e)[4], bool marked, Bytes listed, uint32_t found) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t mine = 0;
    for (uint32_t k = 0; k < 4; k++) mine += marked ? __popc(e[k] & 0x10001) : 0;
    uint32_t sum = mine;
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += other;
    }
    uint32_t place = found + sum - mine;
    for (uint32_t k = 0; k < 4; k++) {
        const bool first = marked && e[k] & 1, second = marked && e[k] & 0x10000;
        if (first) e[k] = (e[k] & 0xFFFF0000) | (uint32_t)listed.load(place++, 1) << 7;
        if (second) e[k] = (e[k] & 0xFFFF) | (uint32_t)listed.load(place++, 1) << 23;
    }
    return __shfl_sync(ALL, sum, 31);
}

// Decodes band `index` of tile `tile` with one warp. The sink takes eights, first weight of the band, row and column in the band:
//   write(first, row, column, pairs)   by lanes that have one
//   group(end)                         by all lanes, when all weights before `end` have been given
template <bool HAS_LEVELS, class Sink>
__device__ inline void decode_bf16(const Plan &plan, Bytes stream, const uint8_t *tables, uint8_t *buffer, uint32_t tile,
                                   uint32_t index, Sink &sink, uint32_t *status) {
    const uint32_t *const pairs = (const uint32_t *)(tables + 4 * SLOTS);
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t top = tile / plan.tile_cols * TILE, left = tile % plan.tile_cols * TILE;
    const uint32_t tile_rows = min(TILE, plan.rows - top), skip = index * BAND_ROWS;
    const uint32_t rows = min(BAND_ROWS, tile_rows - skip), cols = min(TILE, plan.cols - left), n = rows * cols;
    const Sections sections(plan, stream, tile, tile_rows, index, cols);
    const Bytes raw = sections.raw, listed = sections.listed;

    uint8_t *const symbols = buffer + RING_BYTES;
    Symbols coded(sections.coded, (const uint32_t *)tables, buffer);
    // Levels, times eight: of rows 2 l and 2 l + 1 in lane l, of columns in the buffer.
    uint16_t *const of_cols = (uint16_t *)(symbols + BF16_SYMBOLS);
    uint32_t of_rows = 0;
    if (HAS_LEVELS) {
        const uint64_t of_row = plan.scales + top + skip + 2 * lane, of_col = plan.scales + plan.rows + left;
        if (2 * lane < rows) of_rows = 8 * (uint32_t)stream.load(of_row, 1);
        if (2 * lane + 1 < rows) of_rows |= (uint32_t)stream.load(of_row + 1, 1) << 19;
        for (uint32_t c = lane; c < cols; c += 32) of_cols[c] = 8 * (uint32_t)stream.load(of_col + c, 1);
        __syncwarp();
    }

    // Sections lie at multiples of 16 bytes. What is damaged gives some weights or other, and a status.
    const bool sound = raw.len == n && (uintptr_t)raw.p % 8 == 0;
    const auto raw_of = [&](uint32_t first) { return sound && first < n ? __ldg((const uint2 *)(raw.p + first)) : make_uint2(0, 0); };
    uint2 next_raw = raw_of(8 * lane);
    uint32_t row = 8 * lane / cols, col = 8 * lane % cols, found = 0;
    const uint32_t more_rows = GROUP / cols, more_cols = GROUP % cols;
    const auto symbols_of = [&](uint32_t group) { return symbols + group / GROUP % 2 * (GROUP / 2); };
    const auto decode = [&](uint32_t group, uint32_t step) { symbols_of(group)[step * LANES + lane] = (uint8_t)coded.next(); };
    // One group, and meanwhile the symbols of the next. WHOLE: there are 256 of its weights.
    const auto take = [&](uint32_t group, auto whole) {
        constexpr bool WHOLE = decltype(whole)::value;
        const uint32_t first = group + 8 * lane, next = group + GROUP;
        const uint2 bytes = next_raw;
        next_raw = raw_of(next + 8 * lane);
        if (sound && first + RAW_AHEAD < n) prefetch(raw.p + first + RAW_AHEAD);
        coded.prepare();
        const uint32_t four = *(const uint32_t *)(symbols_of(group) + 4 * lane);
        if (WHOLE) decode(next, 0), decode(next, 1);
        uint32_t e[4];
#pragma unroll
        for (uint32_t k = 0; k < 4; k++) e[k] = pairs[four >> 8 * k & 255];
        if (HAS_LEVELS) {
            const uint32_t two = __shfl_sync(ALL, of_rows, row / 2), of_row = __byte_perm(two, 0, row % 2 ? 0x3232 : 0x1010);
            const uint4 four_pairs = *(const uint4 *)(of_cols + col);
            const uint32_t of_pair[4] = {four_pairs.x, four_pairs.y, four_pairs.z, four_pairs.w};
#pragma unroll
            for (uint32_t k = 0; k < 4; k++) e[k] += __vminu2(of_row + of_pair[k], 255 * 0x00080008u);
        }
        const bool marked = first < n && (e[0] | e[1] | e[2] | e[3]) & 0x10001;
        if (__any_sync(ALL, marked)) found += take_escapes(e, marked, listed, found);
        if (WHOLE) decode(next, 2), decode(next, 3);
        const uint4 weights = {join_pair(__byte_perm(bytes.x, 0, 0x1100), e[0]), join_pair(__byte_perm(bytes.x, 0, 0x3322), e[1]),
                               join_pair(__byte_perm(bytes.y, 0, 0x1100), e[2]), join_pair(__byte_perm(bytes.y, 0, 0x3322), e[3])};
        if (first < n) sink.write(first, row, col, weights);
        sink.group(min(n, next));
        row += more_rows, col += more_cols;
        if (col >= cols) col -= cols, row++;
        if (!WHOLE)
            for (uint32_t step = 0; step < 4 && next + 64 * step < n; step++) decode(next, step);
    };
    coded.prepare();
    for (uint32_t step = 0; step < 4 && 64 * step < n; step++) decode(0, step);
    uint32_t group = 0;
#pragma unroll 1
    for (; group + 2 * GROUP <= n; group += GROUP) take(group, Constant<true>());
#pragma unroll 1
    for (; group < n; group += GROUP) take(group, Constant<false>());
    const bool finished = coded.finished();
    if (lane == 0) {
        const bool counted = found == sections.escapes && listed.len == sections.escapes;
        const uint32_t code = !finished || !sound ? UNFINISHED : !counted ? ESCAPE_COUNT : 0;
        if (code != 0) atomicMin(status, tile * 8 + code);
    }
    __syncwarp(); // the buffer is free again
}

} // namespace taper

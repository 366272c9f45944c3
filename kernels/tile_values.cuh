// Weights of a tile stream as numbers: codes of its kinds, rounded to the dtypes asked for.
#pragma once
#include "tile_stream.cuh"

namespace taper {

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

// What is multiplied: contiguous rows of `dtype`. Mirrors `cuda::hybrid::Activations`.
struct Activations {
    const void *x;
    void *y;
    float *partial;
    uint32_t *arrived;
    uint32_t batch, dtype;
};

__device__ inline float load_value(const void *values, uint64_t at, uint32_t dtype) {
    return dtype == F32 ? ((const float *)values)[at] : value_of(dtype, ((const uint16_t *)values)[at]);
}

__device__ inline void store_value(void *values, uint64_t at, uint32_t dtype, float value) {
    if (dtype == F32) ((float *)values)[at] = value;
    else ((uint16_t *)values)[at] = (uint16_t)round_to(dtype, value);
}

} // namespace taper

//! AVX2: 8 rANS lanes a vector, 32 weights a step.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

pub(super) mod dot;
pub(super) mod int8;

use super::{Bf16Join, load};
use crate::codec::rans::{Decoder, LANES};
use crate::codec::table::DecodeTable;

/// True if the machine has every extension used here.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("bmi1")
}

/// For each set of lanes that need a word, which of the next words each lane takes.
static EXPAND: [[u8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut word) = (0, 0);
        while lane < 8 {
            table[mask][lane] = word;
            word += (mask >> lane & 1) as u8;
            lane += 1;
        }
        mask += 1;
    }
    table
};

/// Decodes `plane.len()` symbols of a coded substream; false if it does not end as it must.
pub(super) fn rans(coded: &[u8], table: &DecodeTable, plane: &mut [u8]) -> bool {
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { rans_avx2(coded, table, plane) }
}

#[target_feature(enable = "avx2,popcnt,bmi1")]
fn rans_avx2(coded: &[u8], table: &DecodeTable, plane: &mut [u8]) -> bool {
    let mut decoder = Decoder::new(coded);
    let words = decoder.words;
    let mut steps = plane.chunks_exact_mut(LANES);
    let states = decoder.states.as_mut_ptr();
    // SAFETY: the states are 32 u32s, four vectors.
    let mut x: [__m256i; 4] = std::array::from_fn(|v| unsafe { _mm256_loadu_si256(states.add(8 * v).cast()) });
    let mut at = 0;
    // A step takes at most 32 words. The last steps, near the end of the words, are left to the scalar decoder.
    while at + 2 * LANES <= words.len()
        && let Some(out) = steps.next()
    {
        let mut symbols = [_mm256_setzero_si256(); 4];
        for (x, symbol) in x.iter_mut().zip(&mut symbols) {
            // SAFETY: table slots are masked to 12 bits; vector `v` reads 8 words after at most 8·v of the 32 that are
            // there; masks have 8 bits.
            unsafe {
                let slot = _mm256_and_si256(*x, _mm256_set1_epi32(0xfff));
                let entry = _mm256_i32gather_epi32::<4>(table.0.as_ptr().cast(), slot);
                *symbol = _mm256_and_si256(entry, _mm256_set1_epi32(0xff));
                let freq = _mm256_and_si256(_mm256_srli_epi32::<8>(entry), _mm256_set1_epi32(0xfff));
                let y = _mm256_mullo_epi32(freq, _mm256_srli_epi32::<12>(*x));
                let y = _mm256_add_epi32(y, _mm256_srli_epi32::<20>(entry));
                // y < 2^16, as its upper half is zero.
                let short = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(y), _mm256_setzero_si256());
                let mask = _mm256_movemask_ps(_mm256_castsi256_ps(short)) as usize & 255;
                let next = _mm256_cvtepu16_epi32(_mm_loadu_si128(words.as_ptr().add(at).cast()));
                let order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(EXPAND[mask].as_ptr().cast()));
                let full = _mm256_or_si256(_mm256_slli_epi32::<16>(y), _mm256_permutevar8x32_epi32(next, order));
                *x = _mm256_blendv_epi8(y, full, short);
                at += 2 * mask.count_ones() as usize;
            }
        }
        // Packing interleaves 128-bit halves; the permutation puts groups of four symbols back in order.
        let (front, back) = (_mm256_packus_epi32(symbols[0], symbols[1]), _mm256_packus_epi32(symbols[2], symbols[3]));
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(front, back), order);
        // SAFETY: `out` has 32 bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), packed) };
    }
    for (v, x) in x.iter().enumerate() {
        // SAFETY: as for the load.
        unsafe { _mm256_storeu_si256(states.add(8 * v).cast(), *x) };
    }
    decoder.taken = at / 2;
    for out in steps {
        decoder.decode(table, out);
    }
    decoder.finished()
}

/// Runs `f`, compiled for these instructions where it is inlined.
#[inline(always)]
pub(super) fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    #[target_feature(enable = "avx2,fma,popcnt,bmi1")]
    fn inner<R>(f: impl FnOnce() -> R) -> R {
        f()
    }
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { inner(f) }
}

/// Adds the products of whole blocks of weights and activations to 64 lanes.
pub(super) fn add_blocks(lanes: &mut [f32; 64], weights: &[[f32; 64]], x: &[[f32; 64]]) {
    #[target_feature(enable = "avx2,fma")]
    fn inner(lanes: &mut [f32; 64], weights: &[[f32; 64]], x: &[[f32; 64]]) {
        // SAFETY: every array has 64 values, eight vectors.
        unsafe {
            let mut sums: [__m256; 8] = std::array::from_fn(|v| _mm256_loadu_ps(lanes.as_ptr().add(8 * v)));
            for (w, x) in weights.iter().zip(x) {
                for (v, sum) in sums.iter_mut().enumerate() {
                    let (w, x) = (_mm256_loadu_ps(w.as_ptr().add(8 * v)), _mm256_loadu_ps(x.as_ptr().add(8 * v)));
                    *sum = _mm256_fmadd_ps(w, x, *sum);
                }
            }
            for (v, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(lanes.as_mut_ptr().add(8 * v), *sum);
            }
        }
    }
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { inner(lanes, weights, x) }
}

/// Replaces each byte below 16 by what `map` has for it.
pub(super) fn lookup(map: &[u8; 16], bytes: &mut [u8]) {
    #[target_feature(enable = "avx2")]
    fn inner(map: &[u8; 16], bytes: &mut [u8]) {
        // SAFETY: the map has 16 bytes.
        let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(map.as_ptr().cast()) });
        let (whole, rest) = bytes.as_chunks_mut::<32>();
        for bytes in whole {
            // SAFETY: the array has 32 bytes.
            unsafe {
                let at = bytes.as_mut_ptr().cast();
                _mm256_storeu_si256(at, _mm256_shuffle_epi8(table, _mm256_loadu_si256(at)));
            }
        }
        rest.iter_mut().for_each(|b| *b = map[usize::from(*b & 15)]);
    }
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { inner(map, bytes) }
}

/// Joins the BF16 weights from `first` on, as many as `out` holds.
pub(super) fn join_bf16(join: &mut Bf16Join, first: usize, out: &mut [u8]) {
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { join_bf16_avx2(join, first, out) }
}

#[target_feature(enable = "avx2,popcnt,bmi1")]
fn join_bf16_avx2(join: &mut Bf16Join, first: usize, out: &mut [u8]) {
    // SAFETY: the map has 16 bytes.
    let map = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(join.map.as_ptr().cast()) });
    let escape = _mm256_set1_epi8(join.escape() as i8);
    for (step, out) in out.chunks_mut(64).enumerate() {
        let i = first + 32 * step;
        let class = if join.class_bits == 4 { class4(join, i) } else { class3(join, i) };
        let raw: [u8; 32] = load(join.raw, i);
        // SAFETY: the array has 32 bytes.
        let raw = unsafe { _mm256_loadu_si256(raw.as_ptr().cast()) };
        let mut high = _mm256_shuffle_epi8(map, class);
        if !join.shifts.is_empty() {
            let shifts: [u8; 32] = load(join.shifts, i);
            // SAFETY: the array has 32 bytes.
            high = _mm256_add_epi8(high, unsafe { _mm256_loadu_si256(shifts.as_ptr().cast()) });
        }
        // Weights behind the end of a partial step are no escapes.
        let valid = u64::from(u32::MAX) >> (32 - out.len() / 2);
        let escaped = _mm256_movemask_epi8(_mm256_cmpeq_epi8(class, escape)) as u32 as u64 & valid;
        if escaped != 0 {
            let mut patched = [0u8; 32];
            // SAFETY: the array has 32 bytes.
            unsafe { _mm256_storeu_si256(patched.as_mut_ptr().cast(), high) };
            join.patch(escaped, &mut patched);
            // SAFETY: the array has 32 bytes.
            high = unsafe { _mm256_loadu_si256(patched.as_ptr().cast()) };
        }
        let [even, odd] = interleave(high, raw);
        let weights = [_mm256_permute2x128_si256::<0x20>(even, odd), _mm256_permute2x128_si256::<0x31>(even, odd)];
        // SAFETY: a full step has 64 bytes of output; a partial one goes through an array of them.
        unsafe {
            if out.len() == 64 {
                _mm256_storeu_si256(out.as_mut_ptr().cast(), weights[0]);
                _mm256_storeu_si256(out.as_mut_ptr().add(32).cast(), weights[1]);
            } else {
                let bytes: [u8; 64] = std::mem::transmute(weights);
                out.copy_from_slice(&bytes[..out.len()]);
            }
        }
    }
}

/// BF16 weights of exponents and raw bytes: of each 16, the first 8 in the first vector.
#[target_feature(enable = "avx2")]
#[inline]
fn interleave(high: __m256i, raw: __m256i) -> [__m256i; 2] {
    // Upper byte: sign, then seven exponent bits. Lower byte: the last exponent bit, then the mantissa.
    let mantissa = _mm256_set1_epi8(0x7f);
    let select = |ones, zeros| _mm256_or_si256(_mm256_and_si256(mantissa, ones), _mm256_andnot_si256(mantissa, zeros));
    let upper = select(_mm256_srli_epi16::<1>(high), raw);
    let lower = select(raw, _mm256_slli_epi16::<7>(high));
    [_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)]
}

/// 32 classes of a 4-bit plane.
#[target_feature(enable = "avx2")]
#[inline]
fn class4(join: &Bf16Join, i: usize) -> __m256i {
    let plane: [u8; 16] = load(join.plane, i / 2);
    // SAFETY: the array has 16 bytes.
    spread4(unsafe { _mm_loadu_si128(plane.as_ptr().cast()) })
}

/// 32 nibbles, each in a byte.
#[target_feature(enable = "avx2")]
#[inline]
fn spread4(plane: __m128i) -> __m256i {
    let spread = _mm256_cvtepu8_epi16(plane);
    _mm256_and_si256(_mm256_or_si256(spread, _mm256_slli_epi16::<4>(spread)), _mm256_set1_epi8(15))
}

/// 32 classes of a 2-bit and a 1-bit plane.
#[target_feature(enable = "avx2")]
#[inline]
fn class3(join: &Bf16Join, i: usize) -> __m256i {
    let plane = i64::from_le_bytes(load(join.plane, i / 4));
    spread3(plane, i32::from_le_bytes(load(join.plane, join.high_plane + i / 8)))
}

/// 32 pairs of bits, each in a byte, under their third bits.
#[target_feature(enable = "avx2")]
#[inline]
fn spread3(plane: i64, top: i32) -> __m256i {
    let spread = _mm256_cvtepu8_epi32(_mm_set1_epi64x(plane));
    let spread = _mm256_or_si256(spread, _mm256_slli_epi32::<6>(spread));
    let spread = _mm256_or_si256(spread, _mm256_slli_epi32::<12>(spread));
    let low = _mm256_and_si256(spread, _mm256_set1_epi8(3));
    let repeat = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
    let bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(top), repeat), bit);
    _mm256_or_si256(low, _mm256_and_si256(_mm256_cmpeq_epi8(bytes, bit), _mm256_set1_epi8(4)))
}

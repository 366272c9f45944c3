//! AVX-512: 16 rANS lanes a vector, 64 weights a step.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{Bf16Join, load};
use crate::Result;
use crate::codec::band::{self, Band, Scratch};
use crate::codec::rans::{Decoder, LANES, LOW};
use crate::codec::table::DecodeTable;

/// True if the machine has every extension used here.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vbmi2")
        && is_x86_feature_detected!("popcnt")
}

/// Decodes `plane.len()` symbols of a coded substream; false if it does not end as it must.
pub(super) fn rans(coded: &[u8], table: &DecodeTable, plane: &mut [u8]) -> bool {
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { rans_avx512(coded, table, plane) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn rans_avx512(coded: &[u8], table: &DecodeTable, plane: &mut [u8]) -> bool {
    let mut decoder = Decoder::new(coded);
    let words = decoder.words;
    let mut steps = plane.chunks_exact_mut(LANES);
    // SAFETY: the states are 32 u32s, two vectors.
    let (mut low, mut high) = unsafe {
        (_mm512_loadu_si512(decoder.states.as_ptr().cast()), _mm512_loadu_si512(decoder.states.as_ptr().add(16).cast()))
    };
    let mut at = 0;
    // A step takes at most 32 words. The last steps, near the end of the words, are left to the scalar decoder.
    while at + 2 * LANES <= words.len()
        && let Some(out) = steps.next()
    {
        // SAFETY: table slots are masked to 12 bits; the words read lie within `words`, as the first half takes at most
        // 16 of the 32 that are there; `out` has 32 bytes.
        unsafe {
            let mut half = |x: __m512i, out: *mut u8| {
                let slot = _mm512_and_si512(x, _mm512_set1_epi32(0xfff));
                let entry = _mm512_i32gather_epi32::<4>(slot, table.0.as_ptr().cast());
                _mm_storeu_si128(out.cast(), _mm512_cvtepi32_epi8(entry));
                let freq = _mm512_and_si512(_mm512_srli_epi32::<8>(entry), _mm512_set1_epi32(0xfff));
                let x = _mm512_mullo_epi32(freq, _mm512_srli_epi32::<12>(x));
                let x = _mm512_add_epi32(x, _mm512_srli_epi32::<20>(entry));
                let short = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(LOW as i32));
                let next = _mm512_cvtepu16_epi32(_mm256_loadu_si256(words.as_ptr().add(at).cast()));
                let x = _mm512_mask_slli_epi32::<16>(x, short, x);
                at += 2 * short.count_ones() as usize;
                _mm512_or_si512(x, _mm512_maskz_expand_epi32(short, next))
            };
            low = half(low, out.as_mut_ptr());
            high = half(high, out.as_mut_ptr().add(16));
        }
    }
    // SAFETY: as for the load.
    unsafe {
        _mm512_storeu_si512(decoder.states.as_mut_ptr().cast(), low);
        _mm512_storeu_si512(decoder.states.as_mut_ptr().add(16).cast(), high);
    }
    decoder.taken = at / 2;
    for out in steps {
        decoder.decode(table, out);
    }
    decoder.finished()
}

/// [`band::join`], compiled for AVX-512.
pub(super) fn join(band: &Band, scratch: &mut Scratch, out: &mut [u8], stride: usize) -> Result<()> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
    fn inner(band: &Band, scratch: &mut Scratch, out: &mut [u8], stride: usize) -> Result<()> {
        band::join(band, scratch, out, stride)
    }
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { inner(band, scratch, out, stride) }
}

/// Joins the BF16 weights from `first` on, as many as `out` holds.
pub(super) fn join_bf16(join: &mut Bf16Join, first: usize, out: &mut [u8]) {
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { join_bf16_avx512(join, first, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn join_bf16_avx512(join: &mut Bf16Join, first: usize, out: &mut [u8]) {
    // SAFETY: the map has 16 bytes.
    let map = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(join.map.as_ptr().cast()) });
    let escape = _mm512_set1_epi8(join.escape() as i8);
    let nibbles = _mm512_set1_epi64(0x1c18_1410_0c08_0400);
    let pairs = _mm512_set1_epi64(0x0e0c_0a08_0604_0200);
    let mantissa = _mm512_set1_epi8(0x7f);
    // Where each quarter of the two interleaved halves belongs.
    let (front, back) = (_mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4));
    for (step, out) in out.chunks_mut(128).enumerate() {
        let i = first + 64 * step;
        // SAFETY: loads are from arrays of their size.
        let (class, raw) = unsafe {
            let class = if join.class_bits == 4 {
                let plane: [u8; 32] = load(join.plane, i / 2);
                let spread = _mm512_cvtepu32_epi64(_mm256_loadu_si256(plane.as_ptr().cast()));
                _mm512_and_si512(_mm512_multishift_epi64_epi8(nibbles, spread), _mm512_set1_epi8(15))
            } else {
                let plane: [u8; 16] = load(join.plane, i / 4);
                let top = u64::from_le_bytes(load(join.plane, join.high_plane + i / 8));
                let spread = _mm512_cvtepu16_epi64(_mm_loadu_si128(plane.as_ptr().cast()));
                let class = _mm512_and_si512(_mm512_multishift_epi64_epi8(pairs, spread), _mm512_set1_epi8(3));
                _mm512_mask_add_epi8(class, top, class, _mm512_set1_epi8(4))
            };
            let raw: [u8; 64] = load(join.raw, i);
            (class, _mm512_loadu_si512(raw.as_ptr().cast()))
        };
        let mut high = _mm512_shuffle_epi8(map, class);
        // Weights behind the end of a partial step are no escapes.
        let valid = u64::MAX >> (64 - out.len() / 2);
        let escaped = _mm512_cmpeq_epi8_mask(class, escape) & valid;
        if escaped != 0 {
            let values = join.take_escapes(escaped.count_ones() as usize);
            // SAFETY: the buffer has 64 bytes.
            let values = unsafe { _mm512_loadu_si512(values.as_ptr().cast()) };
            high = _mm512_mask_expand_epi8(high, escaped, values);
        }
        // Upper byte: sign, then seven exponent bits. Lower byte: the last exponent bit, then the mantissa.
        let upper = _mm512_ternarylogic_epi64::<0xCA>(mantissa, _mm512_srli_epi16::<1>(high), raw);
        let lower = _mm512_ternarylogic_epi64::<0xCA>(mantissa, raw, _mm512_slli_epi16::<7>(high));
        let (even, odd) = (_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper));
        let weights = [_mm512_permutex2var_epi64(even, front, odd), _mm512_permutex2var_epi64(even, back, odd)];
        // SAFETY: a full step has 128 bytes of output; a partial one goes through an array of them.
        unsafe {
            if out.len() == 128 {
                _mm512_storeu_si512(out.as_mut_ptr().cast(), weights[0]);
                _mm512_storeu_si512(out.as_mut_ptr().add(64).cast(), weights[1]);
            } else {
                let bytes: [u8; 128] = std::mem::transmute(weights);
                out.copy_from_slice(&bytes[..out.len()]);
            }
        }
    }
}

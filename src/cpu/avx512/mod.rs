//! AVX-512: 16 rANS lanes a vector, 64 weights a step.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

pub(super) mod dot;
pub(super) mod int8;

use super::{Bf16Join, load};
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

/// Decodes the symbols of `N` coded substreams side by side, so that one's latencies hide the other's; for each of them
/// false if it does not end as it must.
pub(super) fn rans<const N: usize>(coded: [&[u8]; N], table: &DecodeTable, planes: [&mut [u8]; N]) -> [bool; N] {
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { rans_avx512(coded, table, planes) }
}

/// A substream in registers.
struct Stream<'a> {
    low: __m512i,
    high: __m512i,
    words: &'a [u8],
    /// Bytes of `words` taken.
    at: usize,
}

impl Stream<'_> {
    /// A step takes at most 32 words. The last steps, near the end of the words, are left to the scalar decoder.
    #[inline(always)]
    fn ready(&self) -> bool {
        self.at + 2 * LANES <= self.words.len()
    }

    /// One symbol in each lane.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
    #[inline]
    fn step(&mut self, table: &DecodeTable, out: &mut [u8; LANES]) {
        debug_assert!(self.ready());
        for (x, out) in [&mut self.low, &mut self.high].into_iter().zip(out.chunks_exact_mut(16)) {
            // SAFETY: table slots are masked to 12 bits; the words read lie within `words`, as the first half takes at
            // most 16 of the 32 that are there; `out` has 16 bytes.
            unsafe {
                let slot = _mm512_and_si512(*x, _mm512_set1_epi32(0xfff));
                let entry = _mm512_i32gather_epi32::<4>(slot, table.0.as_ptr().cast());
                _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(entry));
                let freq = _mm512_and_si512(_mm512_srli_epi32::<8>(entry), _mm512_set1_epi32(0xfff));
                let y = _mm512_mullo_epi32(freq, _mm512_srli_epi32::<12>(*x));
                let y = _mm512_add_epi32(y, _mm512_srli_epi32::<20>(entry));
                let short = _mm512_cmplt_epu32_mask(y, _mm512_set1_epi32(LOW as i32));
                let next = _mm512_cvtepu16_epi32(_mm256_loadu_si256(self.words.as_ptr().add(self.at).cast()));
                let y = _mm512_mask_slli_epi32::<16>(y, short, y);
                self.at += 2 * short.count_ones() as usize;
                *x = _mm512_or_si512(y, _mm512_maskz_expand_epi32(short, next));
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn rans_avx512<const N: usize>(coded: [&[u8]; N], table: &DecodeTable, mut planes: [&mut [u8]; N]) -> [bool; N] {
    let mut decoders = coded.map(Decoder::new);
    let mut streams: [Stream; N] = std::array::from_fn(|i| {
        let Decoder { states, words, .. } = &decoders[i];
        // SAFETY: the states are 32 u32s, two vectors.
        let load = |at: usize| unsafe { _mm512_loadu_si512(states.as_ptr().add(at).cast()) };
        Stream { low: load(0), high: load(16), words, at: 0 }
    });
    let steps = planes.iter().map(|plane| plane.len() / LANES).min().unwrap_or(0);
    let mut done = 0;
    while done < steps && streams.iter().all(Stream::ready) {
        for (stream, plane) in streams.iter_mut().zip(&mut planes) {
            if let Some(out) = plane[LANES * done..].first_chunk_mut() {
                stream.step(table, out);
            }
        }
        done += 1;
    }
    // What one substream has left when another is through.
    std::array::from_fn(|i| {
        let (stream, decoder) = (&mut streams[i], &mut decoders[i]);
        let mut rest = planes[i][LANES * done..].chunks_exact_mut(LANES);
        while stream.ready()
            && let Some(out) = rest.next()
        {
            if let Some(out) = out.first_chunk_mut() {
                stream.step(table, out);
            }
        }
        // SAFETY: as for the load.
        unsafe {
            _mm512_storeu_si512(decoder.states.as_mut_ptr().cast(), stream.low);
            _mm512_storeu_si512(decoder.states.as_mut_ptr().add(16).cast(), stream.high);
        }
        decoder.taken = stream.at / 2;
        rest.for_each(|out| decoder.decode(table, out));
        decoder.finished()
    })
}

/// Runs `f`, compiled for these instructions where it is inlined.
#[inline(always)]
pub(super) fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    #[target_feature(enable = "fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
    fn inner<R>(f: impl FnOnce() -> R) -> R {
        f()
    }
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { inner(f) }
}

/// Joins the BF16 weights from `first` on, as many as `out` holds.
pub(super) fn join_bf16(join: &mut Bf16Join, first: usize, out: &mut [u8]) {
    assert!(available());
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { join_bf16_avx512(join, first, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn join_bf16_avx512(join: &mut Bf16Join, first: usize, out: &mut [u8]) {
    // Where each quarter of the two interleaved halves belongs.
    let (front, back) = (_mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4));
    for (step, out) in out.chunks_mut(128).enumerate() {
        let [even, odd] = weights64(join, first + 64 * step, out.len() / 2);
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

/// The 64 weights from `i` on, of which `count` are there: of each 16, the first 8 in the first vector.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
#[inline]
fn weights64(join: &mut Bf16Join, i: usize, count: usize) -> [__m512i; 2] {
    let mantissa = _mm512_set1_epi8(0x7f);
    // SAFETY: loads are from arrays of their size.
    let (map, class, raw) = unsafe {
        let map = _mm512_broadcast_i32x4(_mm_loadu_si128(join.map.as_ptr().cast()));
        let class = if join.class_bits == 4 {
            let plane: [u8; 32] = load(join.plane, i / 2);
            let spread = _mm512_cvtepu32_epi64(_mm256_loadu_si256(plane.as_ptr().cast()));
            let nibbles = _mm512_set1_epi64(0x1c18_1410_0c08_0400);
            _mm512_and_si512(_mm512_multishift_epi64_epi8(nibbles, spread), _mm512_set1_epi8(15))
        } else {
            let plane: [u8; 16] = load(join.plane, i / 4);
            let top = u64::from_le_bytes(load(join.plane, join.high_plane + i / 8));
            let spread = _mm512_cvtepu16_epi64(_mm_loadu_si128(plane.as_ptr().cast()));
            let pairs = _mm512_set1_epi64(0x0e0c_0a08_0604_0200);
            let class = _mm512_and_si512(_mm512_multishift_epi64_epi8(pairs, spread), _mm512_set1_epi8(3));
            _mm512_mask_add_epi8(class, top, class, _mm512_set1_epi8(4))
        };
        let raw: [u8; 64] = load(join.raw, i);
        (map, class, _mm512_loadu_si512(raw.as_ptr().cast()))
    };
    let mut high = _mm512_shuffle_epi8(map, class);
    if !join.shifts.is_empty() {
        let shifts: [u8; 64] = load(join.shifts, i);
        // SAFETY: the array has 64 bytes.
        high = _mm512_add_epi8(high, unsafe { _mm512_loadu_si512(shifts.as_ptr().cast()) });
    }
    // Weights behind the end of a partial step are no escapes.
    let valid = u64::MAX >> (64 - count);
    let escaped = _mm512_cmpeq_epi8_mask(class, _mm512_set1_epi8(join.escape() as i8)) & valid;
    if escaped != 0 {
        let values = join.take_escapes(escaped.count_ones() as usize);
        // SAFETY: the buffer has 64 bytes.
        let values = unsafe { _mm512_loadu_si512(values.as_ptr().cast()) };
        high = _mm512_mask_expand_epi8(high, escaped, values);
    }
    // Upper byte: sign, then seven exponent bits. Lower byte: the last exponent bit, then the mantissa.
    let upper = _mm512_ternarylogic_epi64::<0xCA>(mantissa, _mm512_srli_epi16::<1>(high), raw);
    let lower = _mm512_ternarylogic_epi64::<0xCA>(mantissa, raw, _mm512_slli_epi16::<7>(high));
    [_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)]
}

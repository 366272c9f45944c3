//! NEON: 4 rANS lanes a vector, 16 weights a step. Without a gather, table entries are loaded lane by lane.
#![allow(unsafe_code)]

use std::arch::aarch64::*;

pub(super) mod dot;
pub(super) mod int8;

use super::{Bf16Join, load};
use crate::codec::rans::{Decoder, LANES};
use crate::codec::table::DecodeTable;

/// For each set of lanes that need a word, which bytes of the next words each 32-bit lane takes; 255 gives zero.
static EXPAND: [[u8; 16]; 16] = {
    let mut table = [[255; 16]; 16];
    let mut mask = 0;
    while mask < 16 {
        let (mut lane, mut word) = (0, 0);
        while lane < 4 {
            if mask >> lane & 1 == 1 {
                table[mask][4 * lane] = 2 * word;
                table[mask][4 * lane + 1] = 2 * word + 1;
                word += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    table
};

/// Decodes `plane.len()` symbols of a coded substream; false if it does not end as it must.
pub(super) fn rans(coded: &[u8], table: &DecodeTable, plane: &mut [u8]) -> bool {
    let mut decoder = Decoder::new(coded);
    let words = decoder.words;
    let mut steps = plane.chunks_exact_mut(LANES);
    let mut at = 0;
    // A step takes at most 32 words. The last steps, near the end of the words, are left to the scalar decoder.
    while at + 2 * LANES <= words.len()
        && let Some(out) = steps.next()
    {
        for (states, symbols) in decoder.states.chunks_exact_mut(4).zip(out.chunks_exact_mut(4)) {
            let entries: [u32; 4] = std::array::from_fn(|lane| table.0[(states[lane] & 0xfff) as usize]);
            symbols.iter_mut().zip(entries).for_each(|(symbol, entry)| *symbol = entry as u8);
            // SAFETY: NEON is part of AArch64; states and entries are 4 u32s, an expansion 16 bytes, and 4 of the 8
            // vectors' words are read after at most 28 of the 32 that are there (8 bytes of at least 8).
            unsafe {
                let (x, entry) = (vld1q_u32(states.as_ptr()), vld1q_u32(entries.as_ptr()));
                let freq = vandq_u32(vshrq_n_u32::<8>(entry), vdupq_n_u32(0xfff));
                let x = vmlaq_u32(vshrq_n_u32::<20>(entry), freq, vshrq_n_u32::<12>(x));
                let short = vceqzq_u32(vshrq_n_u32::<16>(x));
                let bits: [u32; 4] = [1, 2, 4, 8];
                let mask = vaddvq_u32(vandq_u32(short, vld1q_u32(bits.as_ptr()))) as usize & 15;
                let next = vcombine_u8(vld1_u8(words.as_ptr().add(at)), vdup_n_u8(0));
                let next = vreinterpretq_u32_u8(vqtbl1q_u8(next, vld1q_u8(EXPAND[mask].as_ptr())));
                let full = vorrq_u32(vshlq_n_u32::<16>(x), next);
                vst1q_u32(states.as_mut_ptr(), vbslq_u32(short, full, x));
                at += 2 * mask.count_ones() as usize;
            }
        }
    }
    decoder.taken = at / 2;
    for out in steps {
        decoder.decode(table, out);
    }
    decoder.finished()
}

/// Replaces each byte below 16 by what `map` has for it.
pub(super) fn lookup(map: &[u8; 16], bytes: &mut [u8]) {
    let (whole, rest) = bytes.as_chunks_mut::<16>();
    for bytes in whole {
        // SAFETY: NEON is part of AArch64; both arrays have 16 bytes.
        unsafe { vst1q_u8(bytes.as_mut_ptr(), vqtbl1q_u8(vld1q_u8(map.as_ptr()), vld1q_u8(bytes.as_ptr()))) };
    }
    rest.iter_mut().for_each(|b| *b = map[usize::from(*b & 15)]);
}

/// Joins the BF16 weights from `first` on, as many as `out` holds.
pub(super) fn join_bf16(join: &mut Bf16Join, first: usize, out: &mut [u8]) {
    for (step, out) in out.chunks_mut(32).enumerate() {
        let i = first + 16 * step;
        let classes: [u8; 16] = if join.class_bits == 4 { class4(join, i) } else { class3(join, i) };
        let raw: [u8; 16] = load(join.raw, i);
        // SAFETY: NEON is part of AArch64; every array has the size of what is loaded from or stored to it.
        unsafe {
            let (class, raw) = (vld1q_u8(classes.as_ptr()), vld1q_u8(raw.as_ptr()));
            let mut high = vqtbl1q_u8(vld1q_u8(join.map.as_ptr()), class);
            if !join.shifts.is_empty() {
                let shifts: [u8; 16] = load(join.shifts, i);
                high = vaddq_u8(high, vld1q_u8(shifts.as_ptr()));
            }
            let marked = vceqq_u8(class, vdupq_n_u8(join.escape()));
            if vmaxvq_u8(marked) != 0 {
                let mut patched = [0u8; 16];
                vst1q_u8(patched.as_mut_ptr(), high);
                let escape = join.escape();
                // Weights behind the end of a partial step are no escapes.
                let valid = classes[..out.len() / 2].iter().enumerate().filter(|&(_, &c)| c == escape);
                let mask = valid.fold(0u64, |mask, (lane, _)| mask | 1 << lane);
                join.patch(mask, &mut patched);
                high = vld1q_u8(patched.as_ptr());
            }
            // Upper byte: sign, then seven exponent bits. Lower byte: the last exponent bit, then the mantissa.
            let mantissa = vdupq_n_u8(0x7f);
            let upper = vbslq_u8(mantissa, vshrq_n_u8::<1>(high), raw);
            let lower = vbslq_u8(mantissa, raw, vshlq_n_u8::<7>(high));
            let mut weights = [0u8; 32];
            vst1q_u8(weights.as_mut_ptr(), vzip1q_u8(lower, upper));
            vst1q_u8(weights.as_mut_ptr().add(16), vzip2q_u8(lower, upper));
            out.copy_from_slice(&weights[..out.len()]);
        }
    }
}

/// 16 classes of a 4-bit plane.
fn class4(join: &Bf16Join, i: usize) -> [u8; 16] {
    let plane: [u8; 8] = load(join.plane, i / 2);
    std::array::from_fn(|lane| plane[lane / 2] >> (4 * (lane % 2)) & 15)
}

/// 16 classes of a 2-bit and a 1-bit plane.
fn class3(join: &Bf16Join, i: usize) -> [u8; 16] {
    let plane = u32::from_le_bytes(load(join.plane, i / 4));
    let top = u16::from_le_bytes(load(join.plane, join.high_plane + i / 8));
    std::array::from_fn(|lane| (plane >> (2 * lane) & 3) as u8 | (top >> lane & 1) as u8 * 4)
}

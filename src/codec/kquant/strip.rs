//! The layout that products run on: strips of 16 rows.
//!
//! A strip holds the quants of all its blocks, then their scales. A *group of four* columns of the 16 rows is 64 quants:
//! quant `4 r + i` belongs to row `r` and column `i` of the group, so that one byte dot product instruction on a vector of
//! 64 adds four columns to the sums of 16 rows. Quants are cut into planes of 8, 4, 2 or 1 bits; 64 bytes of a plane of
//! `b` bits hold `8/b` groups, the first in the lowest bits.
//!
//! | bits of a quant | planes, lowest bits first |
//! |---|---|
//! | 8 | 8 |
//! | 6 | 4, 2 |
//! | 5 | 4, 1 |
//! | 4 | 4 |
//! | 3 | 2, 1 |
//! | 2 | 2 |
//!
//! | what follows, for each block | bytes |
//! |---|---|
//! | scales, signed: 16 rows for each group of weights (blocks of 256 only) | 128 or 256 |
//! | minima: 16 rows for each pair of groups, a byte each (Q4_K, Q5_K), or a nibble (Q2_K) | 128 |
//! | `d`, an `f16` for each row | 32 |
//! | `dmin` likewise, if the format has minima | 32 |
//!
//! Rows past the matrix's last are zeros.

use super::parts::{Format, MAX_LEN, Parts};

/// Rows of a strip.
pub const ROWS: usize = 16;
/// Bytes of a block's quants when each takes one: a *panel*, groups of four one after the other.
pub const PANEL: usize = ROWS * MAX_LEN;

/// Sizes and offsets of a format's strips.
pub trait StripFormat: Format {
    /// Bytes of a block's quants.
    const QUANTS: usize = ROWS * Self::LEN * Self::BITS as usize / 8;
    /// Bytes of a block's scales.
    const SCALES: usize = if Self::LEN == MAX_LEN { ROWS * Self::LEN / Self::GROUP } else { 0 };
    /// Bytes of a block's minima.
    const MINIMA: usize = if Self::LEN == MAX_LEN && Self::MINS { 128 } else { 0 };
    /// Offset of `d` in what follows the quants.
    const D: usize = Self::SCALES + Self::MINIMA;
    /// Bytes of a block besides its quants.
    const META: usize = Self::D + ROWS * if Self::MINS { 4 } else { 2 };
    /// Bits of the first plane.
    const LOW: u32 = match Self::BITS {
        8 => 8,
        4..=6 => 4,
        _ => 2,
    };
    /// Bits of the second plane, or 0.
    const HIGH: u32 = Self::BITS - Self::LOW;
    /// Offset of the second plane.
    const HIGH_PLANE: usize = ROWS * Self::LEN * Self::LOW as usize / 8;

    /// Bytes of a strip of `blocks` blocks, a multiple of 64.
    fn strip_bytes(blocks: usize) -> usize {
        (blocks * (Self::QUANTS + Self::META)).next_multiple_of(64)
    }
}

impl<F: Format> StripFormat for F {}

/// Lays out up to 16 rows of blocks, one slice for each, as a strip.
///
/// # Panics
/// If a row is not `blocks` long, or `strip` not [`StripFormat::strip_bytes`].
pub fn pack<F: Format>(rows: &[&[u8]], blocks: usize, strip: &mut [u8]) {
    assert!(rows.len() <= ROWS && strip.len() == F::strip_bytes(blocks));
    let (quants, metas) = strip.split_at_mut(blocks * F::QUANTS);
    quants.fill(0);
    metas.fill(0);
    let mut parts = Parts::default();
    for (r, row) in rows.iter().enumerate() {
        assert_eq!(row.len(), blocks * F::BYTES);
        for (b, block) in row.chunks_exact(F::BYTES).enumerate() {
            F::parts(block, &mut parts);
            pack_quants::<F>(&parts, r, &mut quants[b * F::QUANTS..][..F::QUANTS]);
            pack_meta::<F>(&parts, r, &mut metas[b * F::META..][..F::META]);
        }
    }
}

fn pack_quants<F: Format>(parts: &Parts, r: usize, out: &mut [u8]) {
    let (low, high) = out.split_at_mut(F::HIGH_PLANE);
    for (g, four) in parts.quants[..F::LEN].as_chunks::<4>().0.iter().enumerate() {
        let quants = u32::from_le_bytes(*four);
        let put = |plane: &mut [u8], values: u32, bits: u32| {
            let per = 8 / bits as usize;
            let place = g / per * 4 * ROWS + 4 * r;
            let out = &mut plane[place..place + 4];
            if per == 1 {
                // Byte by byte, which is faster here (measured).
                out.iter_mut().zip(values.to_le_bytes()).for_each(|(out, value)| *out |= value);
                return;
            }
            // No byte's bits reach the next.
            let before = u32::from_le_bytes([out[0], out[1], out[2], out[3]]);
            out.copy_from_slice(&(before | values << (bits as usize * (g % per))).to_le_bytes());
        };
        let mask = u32::from_le_bytes([(255 >> (8 - F::LOW)) as u8; 4]);
        put(low, quants & mask, F::LOW);
        if F::HIGH > 0 {
            put(high, (quants & !mask) >> F::LOW, F::HIGH);
        }
    }
}

fn pack_meta<F: Format>(parts: &Parts, r: usize, out: &mut [u8]) {
    if F::LEN == MAX_LEN {
        for g in 0..F::LEN / F::GROUP {
            out[g * ROWS + r] = parts.scales[g] as u8;
        }
        if F::MINS {
            for (pair, min) in parts.mins[..F::LEN / F::GROUP].as_chunks::<2>().0.iter().enumerate() {
                let out = &mut out[F::SCALES..];
                if F::GROUP == 32 {
                    out[pair * 2 * ROWS + 2 * r..][..2].copy_from_slice(min);
                } else {
                    out[pair * ROWS + r] = min[0] | min[1] << 4;
                }
            }
        }
    }
    out[F::D + 2 * r..][..2].copy_from_slice(&parts.d.to_le_bytes());
    if F::MINS {
        out[F::D + 2 * ROWS + 2 * r..][..2].copy_from_slice(&parts.dmin.to_le_bytes());
    }
}

/// The quants of a block of a strip, a byte each: group of four after group of four.
pub fn unpack<F: Format>(quants: &[u8], panel: &mut [u8]) {
    let (low, high) = quants[..F::QUANTS].split_at(F::HIGH_PLANE);
    for (g, out) in panel[..ROWS * F::LEN].as_chunks_mut::<{ 4 * ROWS }>().0.iter_mut().enumerate() {
        let plane = |plane: &[u8], bits: u32, i: usize| {
            let per = 8 / bits as usize;
            plane[g / per * 4 * ROWS + i] >> (bits as usize * (g % per)) & (255 >> (8 - bits)) as u8
        };
        for (i, out) in out.iter_mut().enumerate() {
            *out = plane(low, F::LOW, i);
            if F::HIGH > 0 {
                *out |= plane(high, F::HIGH, i) << F::LOW;
            }
        }
    }
}

/// One row of a block of a strip, as [`Format::parts`] unpacked it before. `r` is the row in the strip.
pub fn row_parts<F: Format>(quants: &[u8], meta: &[u8], r: usize, parts: &mut Parts) {
    let (low, high) = quants[..F::QUANTS].split_at(F::HIGH_PLANE);
    for (g, four) in parts.quants[..F::LEN].as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let plane = |plane: &[u8], bits: u32, i: usize| {
            let per = 8 / bits as usize;
            plane[g / per * 4 * ROWS + 4 * r + i] >> (bits as usize * (g % per)) & (255 >> (8 - bits)) as u8
        };
        for (i, q) in four.iter_mut().enumerate() {
            *q = plane(low, F::LOW, i);
            if F::HIGH > 0 {
                *q |= plane(high, F::HIGH, i) << F::LOW;
            }
        }
    }
    for g in 0..F::LEN / F::GROUP {
        (parts.scales[g], parts.mins[g]) = (scale::<F>(meta, g, r), min::<F>(meta, g, r));
    }
    let f16_at = |at: usize| half::f16::from_le_bytes([meta[at], meta[at + 1]]);
    parts.d = f16_at(F::D + 2 * r);
    if F::MINS {
        parts.dmin = f16_at(F::D + 2 * ROWS + 2 * r);
    }
}

/// The scale of group `g` of row `r`.
#[inline(always)]
pub fn scale<F: Format>(meta: &[u8], g: usize, r: usize) -> i8 {
    if F::LEN == MAX_LEN { meta[g * ROWS + r] as i8 } else { 1 }
}

/// The minimum of group `g` of row `r`.
#[inline(always)]
pub fn min<F: Format>(meta: &[u8], g: usize, r: usize) -> u8 {
    match (F::MINS, F::LEN == MAX_LEN, F::GROUP) {
        (false, _, _) => 0,
        (true, false, _) => 1,
        (true, true, 32) => meta[F::SCALES + g / 2 * 2 * ROWS + 2 * r + g % 2],
        (true, true, _) => meta[F::SCALES + g / 2 * ROWS + r] >> (4 * (g % 2)) & 15,
    }
}

//! Quantised weights: one integer step per matrix, row or tile.
//!
//! INT8 takes the largest magnitude that shares a scale to ±127. Rate-coded weights take a step that makes the entropy
//! coder's output as large as asked; their integers are unbounded, and what no class reaches is stored as an `f32`.
//! At equal error a uniform step with an entropy coder needs 20–25% fewer bits than INT4 with group scales (Gish and
//! Pierce, "Asymptotically efficient quantizing", 1968: 1.53 dB from the rate-distortion bound).

use half::f16;

use super::geometry::{Geometry, Rect};
use super::kind::{Dtype, ScaleLayout};

/// Rate-coded integers stay below this magnitude; larger ones escape. Keeps every `q` exact in an `f32`.
pub const RATE_LIMIT: f32 = (1 << 20) as f32;
/// The integer that marks a weight to be escaped.
pub const ESCAPED: i32 = i32::MAX;

/// Adding and subtracting this rounds an `f32` below 2^22 to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
pub(crate) fn round(x: f32) -> i32 {
    (x + ROUND).to_bits() as i32 - ROUND.to_bits() as i32
}

/// The INT8 integer of `value`, whose scale is `scale` (0 where all weights are 0).
#[inline(always)]
pub fn int8(value: f32, scale: f32) -> i8 {
    if scale == 0.0 { 0 } else { round((value / scale).clamp(-127.0, 127.0)) as i8 }
}

/// The scale that takes magnitude `max` to 127.
#[inline(always)]
pub fn int8_scale(max: f32) -> f32 {
    max / 127.0
}

/// The rate-coded integer of `value`, or [`ESCAPED`].
#[inline(always)]
pub fn rate(value: f32, step: f32) -> i32 {
    let x = value / step;
    // Not `>=`: NaN escapes too.
    if x.abs() < RATE_LIMIT { round(x) } else { ESCAPED }
}

/// Scales of the weights of one rectangle.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// Not quantised.
    None,
    /// One for all.
    One(f32),
    /// One for each row: little-endian `f32`s.
    Rows(&'a [u8]),
    /// Not quantised; levels of the rows and of the columns.
    Levels {
        /// A byte for each row.
        rows: &'a [u8],
        /// A byte for each column.
        cols: &'a [u8],
    },
}

impl<'a> Scales<'a> {
    /// The part of a matrix's scales (`bytes`, in layout order) that covers `rect` in tile `tile`. Missing scales read
    /// as zero.
    pub fn of(layout: ScaleLayout, bytes: &'a [u8], geometry: Geometry, tile: usize, rect: &Rect) -> Scales<'a> {
        let part = |start: usize, length: usize| bytes.get(start..start + length).unwrap_or(&[]);
        match layout {
            ScaleLayout::None => Scales::None,
            ScaleLayout::Matrix => Scales::One(read_f32(bytes, 0)),
            ScaleLayout::Tile => Scales::One(read_f32(bytes, tile)),
            ScaleLayout::Row => Scales::Rows(part(4 * rect.row, 4 * rect.rows)),
            ScaleLayout::Levels => {
                Scales::Levels { rows: part(rect.row, rect.rows), cols: part(geometry.rows + rect.col, rect.cols) }
            }
        }
    }

    /// The scale of row `row` of the rectangle.
    #[inline(always)]
    pub fn row(&self, row: usize) -> f32 {
        match self {
            Scales::None | Scales::Levels { .. } => 1.0,
            Scales::One(scale) => *scale,
            Scales::Rows(bytes) => read_f32(bytes, row),
        }
    }
}

fn read_f32(bytes: &[u8], index: usize) -> f32 {
    let b = bytes.get(4 * index..4 * index + 4).unwrap_or(&[0; 4]);
    f32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// The value of a BF16, F16 or F32 weight given as its bits.
#[inline(always)]
pub fn to_f32(dtype: Dtype, bits: u32) -> f32 {
    match dtype {
        Dtype::Bf16 => f32::from_bits(bits << 16),
        Dtype::F16 => f16::from_bits(bits as u16).to_f32(),
        _ => f32::from_bits(bits),
    }
}

/// `value` rounded to nearest even. As [`half::bf16::from_f32`], but without a branch, so that loops vectorise.
#[inline(always)]
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    (if value.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

/// Turns decoded values into a tensor's own dtype: `f32`s (4 bytes) are rounded to it, BF16s (2 bytes) widened.
/// Both sides are little-endian; the shorter one ends the work.
#[inline(always)]
pub fn convert(values: &[u8], width: usize, dtype: Dtype, out: &mut [u8]) {
    let narrow = values.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let single = values.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    match (width, dtype) {
        (2, Dtype::F32) => {
            out.chunks_exact_mut(4)
                .zip(narrow)
                .for_each(|(o, v)| o.copy_from_slice(&(u32::from(v) << 16).to_le_bytes()));
        }
        (2, _) => {
            let wide = |v| (widen(dtype, v) as u16).to_le_bytes();
            out.chunks_exact_mut(2).zip(narrow).for_each(|(o, v)| o.copy_from_slice(&wide(v)));
        }
        (_, Dtype::Bf16) => {
            out.chunks_exact_mut(2).zip(single).for_each(|(o, v)| o.copy_from_slice(&to_bf16(v).to_le_bytes()));
        }
        (_, Dtype::F16) => {
            out.chunks_exact_mut(2).zip(single).for_each(|(o, v)| o.copy_from_slice(&f16::from_f32(v).to_le_bytes()));
        }
        _ => out[..values.len()].copy_from_slice(values),
    }
}

/// The value of an F8_E4M3 weight: bias 7, no infinities, NaN where all bits but the sign are set.
#[inline(always)]
pub fn e4m3_to_f32(bits: u8) -> f32 {
    let (sign, magnitude) = (u32::from(bits & 0x80) << 24, u32::from(bits & 0x7f));
    // As an f32 the exponent is 120 too low; multiplying by 2^120 also makes subnormals right.
    let value = f32::from_bits(magnitude << 20) * f32::from_bits((127 + 120) << 23);
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | sign)
}

/// The value of an F8_E5M2 weight: the upper half of an F16.
#[inline(always)]
pub fn e5m2_to_f32(bits: u8) -> f32 {
    f16::from_bits(u16::from(bits) << 8).to_f32()
}

/// The values of little-endian weights.
#[inline(always)]
pub fn to_f32s(dtype: Dtype, weights: &[u8], out: &mut [f32]) {
    let halves = weights.as_chunks::<2>().0.iter().map(|&b| u16::from_le_bytes(b));
    let bytes = weights.iter();
    match dtype {
        Dtype::Bf16 => out.iter_mut().zip(halves).for_each(|(o, b)| *o = f32::from_bits(u32::from(b) << 16)),
        Dtype::F16 => out.iter_mut().zip(halves).for_each(|(o, b)| *o = f16::from_bits(b).to_f32()),
        Dtype::F32 => {
            let words = weights.as_chunks::<4>().0;
            out.iter_mut().zip(words).for_each(|(o, &b)| *o = f32::from_le_bytes(b));
        }
        Dtype::F8E4M3 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = e4m3_to_f32(b)),
        Dtype::F8E5M2 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = e5m2_to_f32(b)),
        Dtype::I8 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = f32::from(b as i8)),
    }
}

/// The BF16 that `bits` (F16 or F32) equals exactly and that restores it bit for bit, if there is one.
#[inline(always)]
pub fn narrow(dtype: Dtype, bits: u32) -> Option<u16> {
    let narrowed = match dtype {
        Dtype::Bf16 => return Some(bits as u16),
        Dtype::F32 => (bits >> 16) as u16,
        _ => (f16::from_bits(bits as u16).to_f32().to_bits() >> 16) as u16,
    };
    (widen(dtype, narrowed) == bits).then_some(narrowed)
}

/// The inverse of [`narrow`]: the bits in `dtype` of a BF16.
#[inline(always)]
pub fn widen(dtype: Dtype, narrowed: u16) -> u32 {
    match dtype {
        Dtype::Bf16 => u32::from(narrowed),
        Dtype::F32 => u32::from(narrowed) << 16,
        _ => u32::from(f16::from_f32(f32::from_bits(u32::from(narrowed) << 16)).to_bits()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even() {
        for (x, q) in [(0.5, 0), (1.5, 2), (-0.5, 0), (-1.5, -2), (2.49, 2), (1_000_000.4, 1_000_000)] {
            assert_eq!(rate(x, 1.0), q);
        }
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2e6] {
            assert_eq!(rate(x, 1.0), ESCAPED);
        }
        assert_eq!(rate(1.0, 0.0), ESCAPED);
        assert_eq!(int8(3.0, 0.0), 0);
        assert_eq!((int8(1e30, 1e-3), int8(-5.0, int8_scale(5.0))), (127, -127));
    }

    #[test]
    fn bf16_rounding_equals_the_half_crate() {
        for bits in (0..=u32::MAX).step_by(9_973).chain([0x7f80_0001, 0xff80_8000, 0x7f7f_ffff, 0x8000, 0x1_8000]) {
            let v = f32::from_bits(bits);
            assert_eq!(to_bf16(v), half::bf16::from_f32(v).to_bits(), "{bits:08x}");
        }
    }

    #[test]
    fn f8_values_are_those_of_their_formats() {
        let e4m3 = [(0x00, 0.0), (0x01, 1.0 / 512.0), (0x08, 1.0 / 64.0), (0x38, 1.0), (0x7e, 448.0), (0xb9, -1.125)];
        assert!(e4m3.iter().all(|&(bits, value)| e4m3_to_f32(bits) == value));
        assert!(e4m3_to_f32(0x7f).is_nan() && e4m3_to_f32(0xff).is_nan());
        assert_eq!(e4m3_to_f32(0x80).to_bits(), 0x8000_0000);
        let e5m2 = [(0x01, 2f32.powi(-16)), (0x3c, 1.0), (0x7b, 57_344.0), (0x7c, f32::INFINITY), (0xc0, -2.0)];
        assert!(e5m2.iter().all(|&(bits, value)| e5m2_to_f32(bits) == value));
    }

    #[test]
    fn narrowing_restores_every_f16_that_it_accepts() {
        let mut accepted = 0;
        for bits in 0..=0xffffu32 {
            if let Some(n) = narrow(Dtype::F16, bits) {
                assert_eq!(widen(Dtype::F16, n), bits);
                accepted += 1;
            }
        }
        // 8 of 11 significant bits: an eighth of the normal numbers, and some more below.
        assert!(accepted > 8_000, "{accepted}");
        assert_eq!(narrow(Dtype::F32, 0x3f80_0001), None);
        assert_eq!(narrow(Dtype::F32, 0x8000_0000), Some(0x8000));
        assert_eq!(narrow(Dtype::F32, 0x7fc0_0000), Some(0x7fc0));
    }
}

//! F16, F32 and FP8 weights to `f32`s, a row at a time: loops over bytes and 32-bit lanes that compilers turn into vectors,
//! and one look-up of exponents by the backend's shuffle.

use super::spread::{find, spread1, spread2, spread4};
use super::{Backend, lookup};
use crate::codec::band::Band;
use crate::codec::quant::{Scales, e4m3_to_f32};
use crate::codec::{Coding, Kind, TILE, planes};

/// The rows of a band of float weights.
pub(super) struct Rows<'a> {
    backend: Backend,
    kind: Kind,
    cols: usize,
    weights: usize,
    class_bits: u32,
    map: &'a [u8; 16],
    escape: Option<u8>,
    /// 4-bit classes, or 2-bit and 1-bit planes.
    classes: &'a [u8],
    raw: &'a [u8],
    row_levels: &'a [u8],
    col_levels: &'a [u8],
    escapes: &'a [u8],
    missing: bool,
}

impl<'a> Rows<'a> {
    /// Those of `band`, whose rANS symbols, if it has any, are in `plane`. `None` if it holds other weights, or rows that do
    /// not start at a byte of every plane.
    pub fn of(backend: Backend, band: &Band<'a>, plane: &'a [u8]) -> Option<Rows<'a>> {
        let (plan, n) = (band.plan, band.weights());
        let here = matches!(plan.kind, Kind::F16 | Kind::F32 | Kind::F8E4M3 | Kind::F8E5M2);
        if !here || !matches!(plan.class_bits, 3 | 4) || !band.cols.is_multiple_of(8) || backend == Backend::Scalar {
            return None;
        }
        let classes = if plan.coding == Coding::Plain { band.bytes.coded } else { plane };
        let (row_levels, col_levels) = match band.scales {
            Scales::Levels { rows, cols } => (rows.get(..band.rows)?, cols.get(..band.cols)?),
            _ => (&[][..], &[][..]),
        };
        Some(Rows {
            backend,
            kind: plan.kind,
            cols: band.cols,
            weights: n,
            class_bits: plan.class_bits,
            map: &plan.map.values,
            escape: plan.map.escape,
            classes: classes.get(..planes::field_bytes(n, plan.class_bits))?,
            raw: band.bytes.raw.get(..planes::field_bytes(n, plan.raw_bits))?,
            row_levels,
            col_levels,
            escapes: band.bytes.escapes,
            missing: false,
        })
    }

    /// Decodes a row; rows must be asked for in order.
    #[inline(always)]
    pub fn row(&mut self, row: usize, out: &mut [f32]) {
        let (first, cols, n) = (row * self.cols, self.cols, self.weights);
        let out = &mut out[..cols];
        let mut high = [0u8; TILE];
        let high = &mut high[..cols];
        self.high_row(row, high);
        // A row of the plane of `width` bits that starts at byte `at` of the raw planes.
        let raw = self.raw;
        let plane = |at: usize, width: usize| &raw[at + first * width / 8..at + (first + cols) * width / 8];
        let mut rest = [0u8; TILE];
        let rest = &mut rest[..cols];
        match self.kind {
            Kind::F32 => {
                let bytes = plane(0, 8).iter().zip(plane(n, 8)).zip(plane(2 * n, 8));
                for (out, (((&a, &b), &c), &high)) in out.iter_mut().zip(bytes.zip(high.iter())) {
                    let (a, b, c, high) = (u32::from(a), u32::from(b), u32::from(c), u32::from(high));
                    *out = f32::from_bits(a | b << 8 | (c & 0x7f) << 16 | high << 23 | c >> 7 << 31);
                }
            }
            Kind::F16 => {
                spread2(plane(n, 2), rest, 0);
                spread1(plane(n + n / 4, 1), rest, 2);
                for (out, ((&low, &rest), &high)) in out.iter_mut().zip(plane(0, 8).iter().zip(&*rest).zip(high.iter()))
                {
                    let (low, rest, high) = (u32::from(low), u32::from(rest), u32::from(high) & 31);
                    *out = f16_to_f32(low | (rest & 3) << 8 | high << 10 | rest >> 2 << 15);
                }
            }
            Kind::F8E4M3 => {
                spread4(plane(0, 4), rest, 0);
                for (out, (&rest, &high)) in out.iter_mut().zip(rest.iter().zip(high.iter())) {
                    *out = e4m3_to_f32(rest & 7 | (high & 15) << 3 | rest >> 3 << 7);
                }
            }
            _ => {
                spread2(plane(0, 2), rest, 0);
                spread1(plane(n / 4, 1), rest, 2);
                for (out, (&rest, &high)) in out.iter_mut().zip(rest.iter().zip(high.iter())) {
                    let code = rest & 3 | (high & 31) << 2 | rest >> 2 << 7;
                    *out = f16_to_f32(u32::from(code) << 8);
                }
            }
        }
    }

    /// The exponents of a row.
    #[inline(always)]
    fn high_row(&mut self, row: usize, high: &mut [u8]) {
        let (first, cols) = (row * self.cols, self.cols);
        if self.class_bits == 4 {
            spread4(&self.classes[first / 2..(first + cols) / 2], high, 0);
        } else {
            let (low, top) = self.classes.split_at(self.weights / 4);
            spread2(&low[first / 4..(first + cols) / 4], high, 0);
            spread1(&top[first / 8..(first + cols) / 8], high, 2);
        }
        let mut classes = [0u8; TILE];
        let classes = &mut classes[..cols];
        classes.copy_from_slice(high);
        lookup(self.backend, self.map, high);
        if let Some(&own) = self.row_levels.get(row) {
            high.iter_mut().zip(self.col_levels).for_each(|(high, &level)| {
                *high = high.wrapping_add(own.saturating_add(level) >> 4);
            });
        }
        if let Some(escape) = self.escape {
            find(classes, escape, |i| {
                self.missing |= self.escapes.is_empty();
                let (&value, rest) = self.escapes.split_first().unwrap_or((&0, &[]));
                (high[i], self.escapes) = (value, rest);
            });
        }
    }

    /// True if every marker had an escape and none is left.
    pub fn finished(&self) -> bool {
        !self.missing && self.escapes.is_empty()
    }
}

/// As `half::f16::to_f32`, but without a branch, so that loops vectorise.
#[inline(always)]
fn f16_to_f32(bits: u32) -> f32 {
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
    // As an f32 the exponent is 112 too low; multiplying by 2^112 also makes subnormals right.
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23)).to_bits();
    let quiet = if magnitude > 0x7c00 { 0x40_0000 } else { 0 };
    let special = 0x7f80_0000 | magnitude << 13 | quiet;
    f32::from_bits(sign | if magnitude >= 0x7c00 { special } else { finite })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_converted_as_the_half_crate_does() {
        for bits in 0..=0xffffu16 {
            let expected = half::f16::from_bits(bits).to_f32();
            assert_eq!(f16_to_f32(bits.into()).to_bits(), expected.to_bits(), "{bits:04x}");
        }
    }
}

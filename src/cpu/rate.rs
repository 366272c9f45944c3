//! Rate-coded weights to `f32`s, a row at a time: loops over bytes and 32-bit lanes that compilers turn into vectors.
//!
//! A weight takes its class (a byte, decoded before), the raw bits of up to three planes, one addition, one shift, a
//! conversion and a product; there is no table. Rows stay in the nearest cache from here to their product.

use super::Backend;
use super::spread::{find, spread1, spread2, spread4};
use crate::codec::band::{Band, Scratch};
use crate::codec::quant::Scales;
use crate::codec::{Kind, TILE, planes};

/// The rows of a band of rate-coded weights.
pub(super) struct Rows<'a> {
    cols: usize,
    classes: &'a [u8],
    raw_bits: u32,
    raw: &'a [u8],
    bias: i32,
    escape: Option<u8>,
    scales: Scales<'a>,
    escapes: &'a [u8],
    missing: bool,
}

impl<'a> Rows<'a> {
    /// Those of `band`, whose rANS symbols are in `scratch`. `None` if it holds other weights, or rows that do not start at
    /// a byte of every plane.
    pub fn of(backend: Backend, band: &Band<'a>, scratch: &'a mut Scratch) -> Option<Rows<'a>> {
        let plan = band.plan;
        if plan.kind != Kind::Rate || !band.cols.is_multiple_of(8) || backend == Backend::Scalar {
            return None;
        }
        if plan.class_bits != 8 {
            super::vectorize(
                backend,
                #[inline(always)]
                || super::fill_classes(band, scratch),
            );
        }
        let classes = if plan.class_bits == 8 { &scratch.plane } else { &scratch.classes };
        let n = band.weights();
        Some(Rows {
            cols: band.cols,
            classes: classes.get(..n)?,
            raw_bits: plan.raw_bits,
            raw: band.bytes.raw.get(..planes::field_bytes(n, plan.raw_bits))?,
            bias: plan.rate_bias(),
            escape: plan.escape_class(),
            scales: band.scales,
            escapes: band.bytes.escapes,
            missing: false,
        })
    }

    /// Decodes a row; rows must be asked for in order.
    #[inline(always)]
    pub fn row(&mut self, row: usize, out: &mut [f32]) {
        let cols = self.cols;
        let (out, scale) = (&mut out[..cols], self.scales.row(row));
        let classes = &self.classes[row * cols..(row + 1) * cols];
        let (bias, shift) = (self.bias, self.raw_bits);
        if shift == 0 {
            out.iter_mut().zip(classes).for_each(|(out, &class)| *out = (i32::from(class) - bias) as f32 * scale);
        } else {
            let mut raw = [0u8; TILE];
            let raw = &mut raw[..cols];
            self.raw_row(row, raw);
            for ((out, &class), &raw) in out.iter_mut().zip(classes).zip(raw.iter()) {
                *out = ((i32::from(class) - bias) << shift | i32::from(raw)) as f32 * scale;
            }
        }
        if let Some(escape) = self.escape {
            find(classes, escape, |i| {
                let next = self.escapes.split_first_chunk::<4>();
                self.missing |= next.is_none();
                let (value, rest) = next.unwrap_or((&[0; 4], &[]));
                (out[i], self.escapes) = (f32::from_le_bytes(*value), rest);
            });
        }
    }

    /// The raw bits of a row. A plane's bytes are spread over lanes of 8, 4 or 2 bytes by shifting copies of them.
    #[inline(always)]
    fn raw_row(&self, row: usize, out: &mut [u8]) {
        let (cols, n, mut planes) = (self.cols, self.classes.len(), self.raw);
        let mut shift = 0;
        for width in [4, 2, 1].into_iter().filter(|width| self.raw_bits & width != 0) {
            let per_byte = 8 / width as usize;
            let (plane, rest) = planes.split_at(n.div_ceil(per_byte));
            planes = rest;
            let bytes = &plane[row * cols / per_byte..(row + 1) * cols / per_byte];
            match width {
                4 => spread4(bytes, out, shift),
                2 => spread2(bytes, out, shift),
                _ => spread1(bytes, out, shift),
            }
            shift += width;
        }
    }

    /// True if every marker had an escape and none is left.
    pub fn finished(&self) -> bool {
        !self.missing && self.escapes.is_empty()
    }
}

//! A matrix to be compressed: row-major little-endian bytes.

use crate::codec::quant::{self, Scales};
use crate::codec::{Dtype, Geometry, Kind, Plan, Rect};
use crate::{Error, Result};

/// Borrowed weights with dtype and shape.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    data: &'a [u8],
    /// Dtype of the weights.
    pub dtype: Dtype,
    /// Shape and tile grid.
    pub geometry: Geometry,
}

impl<'a> Source<'a> {
    /// Checks that `data` holds `rows × cols` weights.
    ///
    /// # Errors
    /// If the shape is empty, larger than the format allows (2^32 − 1 rows or columns), or not that of the data.
    pub fn new(data: &'a [u8], dtype: Dtype, rows: usize, cols: usize) -> Result<Source<'a>> {
        let limit = u32::MAX as usize;
        if rows == 0 || cols == 0 || rows > limit || cols > limit {
            return Err(Error::Unsupported(format!(
                "a {rows}x{cols} matrix: allowed are 1 to {limit} rows and columns"
            )));
        }
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
        if bytes != Some(data.len()) {
            return Err(Error::Invalid(format!(
                "{} bytes are not a {rows}x{cols} matrix of {}",
                data.len(),
                dtype.name()
            )));
        }
        Ok(Source { data, dtype, geometry: Geometry { rows, cols } })
    }

    /// Bytes of the whole matrix.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The bytes of each row of `rect`.
    pub(crate) fn rows(&self, rect: Rect) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let (size, cols, data) = (self.dtype.size(), self.geometry.cols, self.data);
        (rect.row..rect.row + rect.rows).map(move |row| {
            let start = (row * cols + rect.col) * size;
            &data[start..start + rect.cols * size]
        })
    }

    /// The bits of each weight of `rect`, row by row.
    #[inline(always)]
    pub(crate) fn bits(&self, rect: Rect, out: &mut Vec<u32>) {
        out.clear();
        out.reserve(rect.weights());
        for row in self.rows(rect) {
            match self.dtype.size() {
                1 => out.extend(row.iter().map(|&b| u32::from(b))),
                2 => out.extend(row.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])))),
                _ => out.extend(row.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            }
        }
    }

    /// The weights of `rect` as `f32`s (for BF16, F16 and F32 sources).
    #[inline(always)]
    pub(crate) fn values(&self, rect: Rect, bits: &mut Vec<u32>, out: &mut Vec<f32>) {
        self.bits(rect, bits);
        out.clear();
        match self.dtype {
            Dtype::Bf16 => out.extend(bits.iter().map(|&b| f32::from_bits(b << 16))),
            Dtype::F16 => out.extend(bits.iter().map(|&b| quant::to_f32(Dtype::F16, b))),
            _ => out.extend(bits.iter().map(|&b| f32::from_bits(b))),
        }
    }

    /// The codes of `rect` as the plan's kind stores them, before prediction: float bits, INT8 bytes, or rate-coded
    /// integers. `values` is filled for quantised kinds.
    #[inline(always)]
    pub(crate) fn codes(&self, plan: &Plan, scales: Scales, rect: Rect, codes: &mut Vec<u32>, values: &mut Vec<f32>) {
        match plan.kind {
            Kind::Int8 | Kind::Rate if plan.quantised() => {
                self.values(rect, codes, values);
                let rows = codes.chunks_mut(rect.cols).zip(values.chunks(rect.cols));
                for (row, (codes, values)) in rows.enumerate() {
                    let scale = scales.row(row);
                    let pairs = codes.iter_mut().zip(values);
                    if plan.kind == Kind::Int8 {
                        pairs.for_each(|(code, &v)| *code = u32::from(quant::int8(v, scale) as u8));
                    } else {
                        pairs.for_each(|(code, &v)| *code = quant::rate(v, scale) as u32);
                    }
                }
            }
            Kind::Bf16 if self.dtype == Dtype::F32 => {
                self.bits(rect, codes);
                codes.iter_mut().for_each(|code| *code >>= 16);
            }
            Kind::Bf16 if self.dtype == Dtype::F16 => {
                self.bits(rect, codes);
                // Only matrices whose every weight narrows get here.
                codes.iter_mut().for_each(|code| *code = quant::narrow(Dtype::F16, *code).unwrap_or(0).into());
            }
            _ => self.bits(rect, codes),
        }
    }

    /// True if every weight of `rect` is a BF16 in another dtype.
    pub(crate) fn narrows(&self, rect: Rect, bits: &mut Vec<u32>) -> bool {
        self.bits(rect, bits);
        match self.dtype {
            Dtype::Bf16 => true,
            Dtype::F32 => bits.iter().fold(0, |any, b| any | b & 0xffff) == 0,
            Dtype::F16 => bits.iter().all(|&b| quant::narrow(Dtype::F16, b).is_some()),
            _ => false,
        }
    }
}

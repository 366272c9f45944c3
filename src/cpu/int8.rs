//! Products of INT8 weights with activations rounded to 8 bits.
//!
//! # What is computed
//!
//! Each block of 32 columns of an activation gets a scale that takes its largest magnitude to ±127, and its values are
//! rounded to integers, as ggml does for its Q8_0 weights. A block's product with a row of weights is then a sum of
//! integers, and exact. For each tile `t = fma(sum as f32, block's scale, t)` runs over its blocks from left to right,
//! starting at 0, and `y = fma(t, weights' scale, y)` over the tiles. That is one order of additions, so every backend
//! gives the same bits, and a batch gives those of its rows.
//!
//! # What it costs
//!
//! Rounding moves an activation by half its block's scale at most: 1/254 of the block's largest magnitude. For activations
//! with a normal distribution the noise is 0.5% of the result's root mean square, where weights rounded to INT8 by row
//! have 0.9%. Activations that are not finite, or too small for a scale, are multiplied as they are
//! ([`Rows::exact`]): nothing is lost in silence.
//!
//! # Budget
//!
//! A weight is a byte, so reading bounds one row of activations: at 20 GB/s for a core 64 weights take 3.2 ns. The AVX-512
//! kernel spends some 100 instructions on 16 rows × 64 columns: 16 loads with the sign flipped, 16 `vpdpbusd`, and a tree
//! of 44 that adds up lanes so that 16 rows come to stand side by side.

use super::spread::{find, spread1, spread2, spread4};
use super::{Backend, fill_classes, vectorize};
use crate::Result;
use crate::codec::band::{self, Band, BandBytes, ESCAPE_COUNT, Scratch, UNFINISHED};
use crate::codec::quant::{Scales, round};
use crate::codec::{BAND_ROWS, TILE};

/// Columns of an activation that share a scale.
pub const BLOCK: usize = 32;
/// Blocks of a tile.
const TILE_BLOCKS: usize = TILE / BLOCK;
/// Blocks whose largest magnitude is below this (and not 0) would get an inexact scale.
const SMALLEST: f32 = 1e-30;

/// Rows of activations, rounded; each is padded with zeros to whole tiles.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    blocks: usize,
    values: Vec<i8>,
    scales: Vec<f32>,
    /// 128 times the sum of each block: what AVX-512, whose weights are unsigned, has too much.
    offsets: Vec<i32>,
    exact: Vec<usize>,
}

impl Rows {
    /// Rounds rows of `cols` values.
    pub fn new(x: &[f32], cols: usize) -> Rows {
        let tiles = cols.div_ceil(TILE);
        let (m, blocks) = (x.len() / cols.max(1), tiles * TILE_BLOCKS);
        let mut rows = Rows {
            blocks,
            values: vec![0; m * tiles * TILE],
            scales: vec![0.0; m * blocks],
            offsets: vec![0; m * blocks],
            exact: Vec::new(),
        };
        let parts =
            rows.values.chunks_exact_mut((tiles * TILE).max(1)).zip(rows.scales.chunks_exact_mut(blocks.max(1)));
        for (row, (x, (values, scales))) in x.chunks_exact(cols.max(1)).zip(parts).enumerate() {
            let mut fits = true;
            for ((x, q), scale) in x.chunks(BLOCK).zip(values.chunks_exact_mut(BLOCK)).zip(scales) {
                // On bits, where infinity and NaN are the largest.
                let max = f32::from_bits(x.iter().fold(0, |max: u32, v| max.max(v.to_bits() & 0x7fff_ffff)));
                fits &= max == 0.0 || max.is_finite() && max >= SMALLEST;
                *scale = max / 127.0;
                let inverse = if max == 0.0 { 0.0 } else { 127.0 / max };
                q.iter_mut().zip(x).for_each(|(q, &x)| *q = round(x * inverse) as i8);
            }
            if !fits {
                rows.exact.push(row);
            }
        }
        for (offset, q) in rows.offsets.iter_mut().zip(rows.values.as_chunks::<BLOCK>().0) {
            *offset = 128 * q.iter().map(|&q| i32::from(q)).sum::<i32>();
        }
        rows
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.scales.len().checked_div(self.blocks).unwrap_or(0)
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows that must be multiplied as they were: they hold a value that is not finite, or a block too small for a scale.
    pub fn exact(&self) -> &[usize] {
        &self.exact
    }

    /// The part of a row that belongs to the tile at column `col`.
    fn tile(&self, row: usize, col: usize) -> Blocks<'_> {
        let at = row * self.blocks + col / BLOCK;
        let (values, _) = self.values[at * BLOCK..(at + TILE_BLOCKS) * BLOCK].as_chunks();
        Blocks { values, scales: &self.scales[at..at + TILE_BLOCKS], offsets: &self.offsets[at..at + TILE_BLOCKS] }
    }
}

/// A tile's part of one row of activations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks<'a> {
    pub values: &'a [[i8; BLOCK]],
    pub scales: &'a [f32],
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // of `vpdpbusd` only
    pub offsets: &'a [i32],
}

/// The decoded weights of a band: `rows` rows of `stride` bytes, a multiple of 64 up to 256; behind a row's last weight
/// stand zeros.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    bytes: &'a [u8],
    rows: usize,
    stride: usize,
    next: &'a [u8],
}

impl<'a> Weights<'a> {
    /// Takes rows of `stride` bytes.
    ///
    /// # Panics
    /// If the stride is not a multiple of 64 up to 256, or `bytes` are fewer.
    pub fn new(bytes: &'a [u8], rows: usize, stride: usize) -> Weights<'a> {
        assert!(stride.is_multiple_of(64) && stride > 0 && stride <= TILE && bytes.len() >= rows * stride);
        Weights { bytes: &bytes[..rows * stride], rows, stride, next: &[] }
    }

    /// Says what will be multiplied after these weights, so that it is fetched while they are.
    pub fn followed_by(self, next: &'a [u8]) -> Weights<'a> {
        Weights { next, ..self }
    }

    /// What [`Weights::followed_by`] said.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) fn next(&self) -> &'a [u8] {
        self.next
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// A row's weights, as many as `out` takes.
    #[inline(always)]
    pub(super) fn row_f32(&self, row: usize, scales: &Scales, out: &mut [f32]) {
        let scale = scales.row(row);
        let integers = &self.bytes[row * self.stride..];
        out.iter_mut().zip(integers).for_each(|(out, &q)| *out = f32::from(q as i8) * scale);
    }

    /// Bytes from row to row.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// All rows.
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

/// The integers of an INT8 band. `finished` is what [`super::symbols`] returned; they lie in the band, in `scratch`, or
/// where a row must be padded in `padded`.
///
/// # Errors
/// If the band's stream does not end as it must.
pub fn decode<'a>(
    backend: Backend,
    band: &Band<'a>,
    finished: bool,
    scratch: &'a mut Scratch,
    padded: &'a mut Vec<u8>,
) -> Result<Weights<'a>> {
    let (n, cols) = (band.weights(), band.cols);
    if !finished {
        return Err(UNFINISHED);
    }
    // These have no escapes.
    let plain = band.bytes.escapes.is_empty();
    let bytes = if band.plan.class_bits == 0 && plain && band.bytes.raw.len() >= n {
        &band.bytes.raw[..n]
    } else if band.plan.class_bits == 8 && plain && backend != Backend::Scalar {
        band.predictor.inverse(&mut scratch.plane[..n], cols);
        &scratch.plane[..n]
    } else if backend == Backend::Scalar || band.plan.class_bits == 0 {
        band::decode_int8(band, scratch)?;
        &scratch.bytes[..n]
    } else if band.plan.class_bits == 3
        && n.is_multiple_of(8)
        && band.bytes.coded.len() >= n / 4 + n / 8
        && band.bytes.raw.len() >= n / 2
    {
        vectorize(
            backend,
            #[inline(always)]
            || join3(band, &mut scratch.bytes),
        )?;
        &scratch.bytes[..n]
    } else {
        vectorize(
            backend,
            #[inline(always)]
            || {
                fill_classes(band, scratch);
                band::join_int8(band, scratch)
            },
        )?;
        &scratch.bytes[..n]
    };
    if cols.is_multiple_of(64) {
        return Ok(Weights::new(bytes, band.rows, cols));
    }
    let stride = cols.next_multiple_of(64);
    padded.clear();
    padded.resize(band.rows * stride, 0);
    padded
        .chunks_exact_mut(stride)
        .zip(bytes.chunks_exact(cols))
        .for_each(|(to, from)| to[..cols].copy_from_slice(from));
    Ok(Weights::new(padded, band.rows, stride))
}

/// Joins 3-bit classes of high nibbles with low nibbles; their number is a multiple of 8, and all are there.
#[inline(always)]
fn join3(band: &Band, out: &mut Vec<u8>) -> Result<()> {
    let n = band.weights();
    let BandBytes { coded, raw, mut escapes } = band.bytes;
    let (low, high) = coded.split_at(n / 4);
    let m = &band.plan.map.values;
    out.clear();
    out.resize(n, 0);
    let mut missing = false;
    for (part, out) in out.chunks_mut(TILE).enumerate() {
        let (at, len) = (part * TILE, out.len());
        let mut class = [0u8; TILE];
        spread2(&low[at / 4..(at + len) / 4], &mut class[..len], 0);
        spread1(&high[at / 8..(at + len) / 8], &mut class[..len], 2);
        // Choices by each bit, not a look-up, which no compiler makes a vector of.
        let choose = |class: u8, bit: u32, zero: u8, one: u8| zero ^ (zero ^ one) & 0u8.wrapping_sub(class >> bit & 1);
        for (out, &c) in out.iter_mut().zip(&class) {
            let pair = |i: usize| choose(c, 0, m[i], m[i + 1]);
            *out = choose(c, 2, choose(c, 1, pair(0), pair(2)), choose(c, 1, pair(4), pair(6))) << 4;
        }
        find(&class[..len], 7, |i| {
            let (value, rest) = escapes.split_first().unwrap_or((&0, &[]));
            missing |= escapes.is_empty();
            (out[i], escapes) = (value << 4, rest);
        });
        spread4(&raw[at / 2..(at + len) / 2], out, 0);
    }
    band.predictor.inverse(out, band.cols);
    if missing || !escapes.is_empty() { Err(ESCAPE_COUNT) } else { Ok(()) }
}

/// The scale of each row of a band.
fn row_scales(scales: &Scales, rows: usize) -> [f32; BAND_ROWS] {
    std::array::from_fn(|row| if row < rows { scales.row(row) } else { 0.0 })
}

/// Adds to `y`, one value for each row of weights, the product of the tile's part (at column `col`) of row `row` of the
/// activations.
pub fn dot(backend: Backend, weights: &Weights, scales: &Scales, x: &Rows, row: usize, col: usize, y: &mut [f32]) {
    dot_row(backend, weights, &row_scales(scales, weights.rows), x.tile(row, col), &mut y[..weights.rows]);
}

fn dot_row(backend: Backend, weights: &Weights, scales: &[f32; BAND_ROWS], x: Blocks, y: &mut [f32]) {
    match backend {
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 if super::avx512::int8::available() => super::avx512::int8::dot(weights, scales, x, y),
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 | Backend::Avx2 => super::avx2::int8::dot(weights, scales, x, y),
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => super::neon::int8::dot(weights, scales, x, y),
        _ => dot_scalar(weights, scales, x, y),
    }
}

/// As [`dot`] for all rows of activations: `y` is `activations × rows of weights`. `packed` is scratch.
pub fn matmul(
    backend: Backend,
    weights: &Weights,
    scales: &Scales,
    x: &Rows,
    col: usize,
    y: &mut [f32],
    packed: &mut Vec<u8>,
) {
    let scales = row_scales(scales, weights.rows);
    #[cfg(target_arch = "x86_64")]
    if backend == Backend::Avx512 && super::avx512::int8::available() {
        super::avx512::int8::matmul(weights, &scales, x.len(), &|row| x.tile(row, col), y, packed);
        return;
    }
    let _ = packed;
    for (row, y) in y.chunks_exact_mut(weights.rows).enumerate() {
        dot_row(backend, weights, &scales, x.tile(row, col), y);
    }
}

/// The truth.
fn dot_scalar(weights: &Weights, scales: &[f32; BAND_ROWS], x: Blocks, y: &mut [f32]) {
    for ((y, scale), row) in y.iter_mut().zip(scales).zip(weights.bytes.chunks_exact(weights.stride)) {
        let mut t = 0.0f32;
        for (w, (x, &scale)) in row.as_chunks::<BLOCK>().0.iter().zip(x.values.iter().zip(x.scales)) {
            let sum: i32 = w.iter().zip(x).map(|(&w, &x)| i32::from(w as i8) * i32::from(x)).sum();
            t = (sum as f32).mul_add(scale, t);
        }
        *y = t.mul_add(*scale, *y);
    }
}

//! Products of compressed weights with one activation, decoded on the way.
//!
//! # One order of additions
//!
//! Every backend, and the product with uncompressed weights too, adds in the same order, so that results are equal to the
//! last bit: a row of a tile is summed in 64 lanes (column `k` goes to lane `k mod 64`, each step a fused multiply-add),
//! the lanes are added as [`reduce`] says, and the sums of the tiles are added from left to right.
//!
//! BF16 weights go from their planes through registers into the sum. Of the other kinds some rows at a time are decoded to
//! `f32`s that stay in the nearest cache. INT8 weights with scales have an order of their own ([`super::int8`]) unless
//! exact activations are asked for.

use super::bf16::Planes;
use super::{Backend, ended, float, int8, join, rate, vectorize};
use crate::Result;
use crate::codec::band::{Band, Scratch};
use crate::codec::{Kind, TILE, quant};

/// Lanes of a row's sum.
pub const LANES: usize = 64;

/// The sum of the lanes. Lane `16 l + 4 q + i`: first over `q`, then `l` against `l + 2`, `l` against `l + 1`, and `i`
/// likewise: the order in which AVX-512 has them side by side.
#[inline(always)]
pub fn reduce(lanes: &[f32; LANES]) -> f32 {
    let quad = |l: usize, i: usize| {
        let lane = |q: usize| lanes[16 * l + 4 * q + i];
        (lane(0) + lane(1)) + (lane(2) + lane(3))
    };
    let half = |l: usize, i: usize| quad(l, i) + quad(l + 2, i);
    let quarter = |i: usize| half(0, i) + half(1, i);
    (quarter(0) + quarter(2)) + (quarter(1) + quarter(3))
}

/// The product of a row of weights with an activation of the same length.
pub fn dot(backend: Backend, weights: &[f32], x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((blocks, weights), (x_blocks, x)) = (weights.as_chunks::<LANES>(), x.as_chunks::<LANES>());
    add_blocks(backend, &mut lanes, blocks, x_blocks);
    for (lane, (&w, &x)) in lanes.iter_mut().zip(weights.iter().zip(x)) {
        *lane = w.mul_add(x, *lane);
    }
    reduce(&lanes)
}

/// Adds whole blocks of products to the lanes.
fn add_blocks(backend: Backend, lanes: &mut [f32; LANES], weights: &[[f32; LANES]], x: &[[f32; LANES]]) {
    match backend {
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 | Backend::Avx512 => super::avx2::add_blocks(lanes, weights, x),
        _ => {
            for (weights, x) in weights.iter().zip(x) {
                for (lane, (&w, &x)) in lanes.iter_mut().zip(weights.iter().zip(x)) {
                    *lane = w.mul_add(x, *lane);
                }
            }
        }
    }
}

/// An activation, made ready once for all rows.
#[derive(Clone, Debug, Default)]
pub struct Activation {
    natural: Vec<f32>,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    permuted: Vec<f32>,
}

impl Activation {
    /// Takes `x`, one value for each column.
    pub fn new(x: &[f32]) -> Activation {
        Activation { natural: x.to_vec(), permuted: permuted(x) }
    }

    /// Number of columns.
    pub fn len(&self) -> usize {
        self.natural.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.natural.is_empty()
    }
}

/// `x` in the order in which AVX-512 and AVX2 unpack BF16 weights: in each whole block of 64, position `16 q + 4 l + i` holds
/// column `16 l + 4 q + i`.
pub fn permuted(x: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for block in x.chunks_exact(LANES) {
        out.extend((0..LANES).map(|p| block[p % 16 / 4 * 16 + p / 16 * 4 + p % 4]));
    }
    out
}

/// Rows that are decoded before they are multiplied.
const ROWS: usize = 8;

/// Buffers of one thread.
#[derive(Debug, Default)]
pub struct DotScratch {
    /// For [`super::symbols`].
    pub scratch: Scratch,
    /// For [`super::int8::decode`].
    pub padded: Vec<u8>,
    values: Vec<u8>,
    weights: Vec<f32>,
}

/// Adds to `y`, one value for each row of the band, the products of its rows with columns `col..` of the activation.
/// `finished` is what [`super::symbols`] returned for the band.
///
/// # Errors
/// If the band's stream does not end as it must.
pub fn dot_band(
    backend: Backend,
    band: &Band,
    finished: bool,
    scratch: &mut DotScratch,
    x: &Activation,
    col: usize,
    y: &mut [f32],
) -> Result<()> {
    let y = &mut y[..band.rows];
    if backend != Backend::Scalar
        && let Some(mut planes) = Planes::of(band, &scratch.scratch.plane)
    {
        match backend {
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512 => super::avx512::dot::dot(&mut planes, &x.permuted[col..col + band.cols], y),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2 => super::avx2::dot::dot(&mut planes, &x.permuted[col..col + band.cols], y),
            #[cfg(target_arch = "aarch64")]
            Backend::Neon => super::neon::dot::dot(&mut planes, &x.natural[col..col + band.cols], y),
            _ => unreachable!("backend {} is not of this machine", backend.name()),
        }
        return ended(finished, planes.finished());
    }
    let natural = &x.natural[col..col + band.cols];
    if let Some(mut rows) = float::Rows::of(backend, band, &scratch.scratch.plane) {
        dot_rows(
            backend,
            natural,
            y,
            #[inline(always)]
            |row, out| rows.row(row, out),
        );
        return ended(finished, rows.finished());
    }
    if let Some(mut rows) = rate::Rows::of(backend, band, &mut scratch.scratch) {
        dot_rows(
            backend,
            natural,
            y,
            #[inline(always)]
            |row, out| rows.row(row, out),
        );
        return ended(finished, rows.finished());
    }
    if band.plan.kind == Kind::Int8 && backend != Backend::Scalar {
        let weights = int8::decode(backend, band, finished, &mut scratch.scratch, &mut scratch.padded)?;
        dot_rows(
            backend,
            natural,
            y,
            #[inline(always)]
            |row, out| weights.row_f32(row, &band.scales, out),
        );
        return Ok(());
    }
    let mut weights = std::mem::take(&mut scratch.weights);
    weights.resize(band.weights(), 0.0);
    let decoded = values(backend, band, finished, scratch, &mut weights, band.cols);
    for (y, row) in y.iter_mut().zip(weights.chunks_exact(band.cols)) {
        *y += dot(backend, row, natural);
    }
    scratch.weights = weights;
    decoded
}

/// Adds to `y` the products of rows that `decode` gives, some at a time: they stay in the nearest cache.
#[inline(always)]
fn dot_rows(backend: Backend, x: &[f32], y: &mut [f32], mut decode: impl FnMut(usize, &mut [f32])) {
    let mut weights = [[0.0; TILE]; ROWS];
    for (part, y) in y.chunks_mut(ROWS).enumerate() {
        vectorize(
            backend,
            #[inline(always)]
            || {
                for (row, out) in weights.iter_mut().take(y.len()).enumerate() {
                    decode(ROWS * part + row, out);
                }
            },
        );
        y.iter_mut().zip(&weights).for_each(|(y, weights)| *y += dot(backend, &weights[..x.len()], x));
    }
}

/// Decodes a band's weights to `f32`s, in rows of `stride` at `out`; quantised ones are not rounded to their tensor's
/// dtype. `finished` is what [`super::symbols`] returned for the band.
///
/// # Errors
/// If the band's stream does not end as it must.
pub fn values(
    backend: Backend,
    band: &Band,
    finished: bool,
    scratch: &mut DotScratch,
    out: &mut [f32],
    stride: usize,
) -> Result<()> {
    let DotScratch { scratch, values, padded, .. } = scratch;
    if band.plan.kind == Kind::Int8 && backend != Backend::Scalar {
        let weights = int8::decode(backend, band, finished, scratch, padded)?;
        vectorize(
            backend,
            #[inline(always)]
            || {
                for (row, out) in out.chunks_mut(stride).take(band.rows).enumerate() {
                    weights.row_f32(row, &band.scales, &mut out[..band.cols]);
                }
            },
        );
        return Ok(());
    }
    if let Some(mut rows) = float::Rows::of(backend, band, &scratch.plane) {
        vectorize(
            backend,
            #[inline(always)]
            || {
                for (row, out) in out.chunks_mut(stride).take(band.rows).enumerate() {
                    rows.row(row, out);
                }
            },
        );
        return ended(finished, rows.finished());
    }
    if let Some(mut rows) = rate::Rows::of(backend, band, scratch) {
        vectorize(
            backend,
            #[inline(always)]
            || {
                for (row, out) in out.chunks_mut(stride).take(band.rows).enumerate() {
                    rows.row(row, out);
                }
            },
        );
        return ended(finished, rows.finished());
    }
    let dtype = band.plan.value_dtype();
    let row = band.cols * dtype.size();
    values.resize(band.rows * row, 0);
    join(backend, band, finished, scratch, values, row)?;
    vectorize(
        backend,
        #[inline(always)]
        || {
            for (out, values) in out.chunks_mut(stride).zip(values.chunks_exact(row)) {
                quant::to_f32s(dtype, values, &mut out[..band.cols]);
            }
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutation_and_reduction_agree() {
        // The lanes in permuted order, added as the AVX-512 code does.
        let lanes: [f32; LANES] = std::array::from_fn(|k| 1.0 / (k as f32 + 3.0));
        let p = permuted(&lanes);
        let at = |q: usize, j: usize| p[16 * q + j];
        let sum: Vec<f32> = (0..16).map(|j| (at(0, j) + at(1, j)) + (at(2, j) + at(3, j))).collect();
        let half: Vec<f32> = (0..8).map(|j| sum[j] + sum[8 + j]).collect();
        let quarter: Vec<f32> = (0..4).map(|j| half[j] + half[4 + j]).collect();
        let (a, b) = (quarter[0] + quarter[2], quarter[1] + quarter[3]);
        assert_eq!(reduce(&lanes).to_bits(), (a + b).to_bits());
    }
}

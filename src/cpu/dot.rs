//! Products of compressed weights with one activation, decoded on the way.
//!
//! # One order of additions
//!
//! Every backend, and the product with uncompressed weights too, adds in the same order, so that results are equal to the
//! last bit: a row of a tile is summed in 64 lanes (column `k` goes to lane `k mod 64`, each step a fused multiply-add),
//! the lanes are added as [`reduce`] says, and the sums of the tiles are added from left to right.

use super::{Backend, Bf16Join, join, vectorize};
use crate::Result;
use crate::codec::Kind;
use crate::codec::band::{Band, Scratch, UNFINISHED};
use crate::codec::quant;

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
fn dot(backend: Backend, weights: &[f32], x: &[f32]) -> f32 {
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

/// `x` in the order in which AVX-512 unpacks BF16 weights: in each whole block of 64, position `16 q + 4 l + i` holds
/// column `16 l + 4 q + i`.
pub fn permuted(x: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for block in x.chunks_exact(LANES) {
        out.extend((0..LANES).map(|p| block[p % 16 / 4 * 16 + p / 16 * 4 + p % 4]));
    }
    out
}

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
    let classed = band.plan.kind == Kind::Bf16 && band.plan.class_bits > 0;
    #[cfg(target_arch = "x86_64")]
    if backend == Backend::Avx512 && classed && band.cols.is_multiple_of(LANES) {
        let Scratch { plane, shifts, .. } = &mut scratch.scratch;
        let mut join = Bf16Join::new(backend, band, plane, shifts);
        super::avx512::dot_bf16(&mut join, &x.permuted[col..col + band.cols], y);
        return if finished { join.finish() } else { Err(UNFINISHED) };
    }
    let _ = classed;
    let mut weights = std::mem::take(&mut scratch.weights);
    weights.resize(band.weights(), 0.0);
    let decoded = values(backend, band, finished, scratch, &mut weights, band.cols);
    let x = &x.natural[col..col + band.cols];
    for (y, row) in y.iter_mut().zip(weights.chunks_exact(band.cols)) {
        *y += dot(backend, row, x);
    }
    scratch.weights = weights;
    decoded
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
    let DotScratch { scratch, values, .. } = scratch;
    let dtype = band.plan.value_dtype();
    let row = band.cols * dtype.size();
    values.resize(band.rows * row, 0);
    join(backend, band, finished, scratch, values, row)?;
    vectorize(backend, || {
        for (out, values) in out.chunks_mut(stride).zip(values.chunks_exact(row)) {
            quant::to_f32s(dtype, values, &mut out[..band.cols]);
        }
    });
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

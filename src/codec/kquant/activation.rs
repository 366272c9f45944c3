//! Activations quantised to 8 bits, as ggml does for products with quantised weights.
//!
//! In each block (256 values beside weights in blocks of 256, else 32) the largest magnitude becomes 127; the others are
//! rounded to the nearest integer, ties away from zero. What is lost is at most half a step, 1/254 of the block's largest value, and
//! in blocks of 32, whose scales are rounded to `f16`, another 1/2048 of a value.
//! A block with a NaN or an infinity gives NaN.

use half::f16;

/// Rows of quantised activations with the sums that products need.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Activation {
    /// Number of rows.
    pub rows: usize,
    /// Values of a row.
    pub cols: usize,
    /// Values of a block: 256 or 32.
    pub block: usize,
    /// Rows of quants.
    pub quants: Vec<i8>,
    /// What a block's quants are multiplied by.
    pub scales: Vec<f32>,
    /// Sums of 16 quants.
    pub sums16: Vec<i16>,
    /// Sums of 32 quants.
    pub sums32: Vec<i16>,
}

/// One row's parts of an [`Activation`], to be filled.
#[derive(Debug)]
pub struct RowMut<'a> {
    block: usize,
    quants: &'a mut [i8],
    scales: &'a mut [f32],
    sums16: &'a mut [i16],
    sums32: &'a mut [i16],
}

impl Activation {
    /// Zeros for `rows` rows of `cols` values, a multiple of 32, and of 256 if `block` is.
    pub fn zeros(rows: usize, cols: usize, block: usize) -> Activation {
        assert!(block == 256 || block == 32, "blocks have 256 or 32 values");
        assert!(cols.is_multiple_of(block), "{cols} columns are no whole blocks of {block}");
        Activation {
            rows,
            cols,
            block,
            quants: vec![0; rows * cols],
            scales: vec![0.0; rows * cols / block],
            sums16: vec![0; rows * cols / 16],
            sums32: vec![0; rows * cols / 32],
        }
    }

    /// Quantises rows of `cols` values.
    pub fn new(x: &[f32], cols: usize, block: usize) -> Activation {
        let mut activation = Activation::zeros(x.len() / cols.max(1), cols, block);
        for (mut row, x) in activation.rows_mut().zip(x.chunks_exact(cols.max(1))) {
            row.quantize(x);
        }
        activation
    }

    /// All rows.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = RowMut<'_>> {
        let (cols, block) = (self.cols.max(block_or(self.block)), block_or(self.block));
        let scales = self.scales.chunks_exact_mut(cols / block);
        let sums = self.sums16.chunks_exact_mut(cols / 16).zip(self.sums32.chunks_exact_mut(cols / 32));
        self.quants
            .chunks_exact_mut(cols)
            .zip(scales)
            .zip(sums)
            .map(move |((quants, scales), (sums16, sums32))| RowMut { block, quants, scales, sums16, sums32 })
    }
}

/// Blocks of an empty activation have some size too.
fn block_or(block: usize) -> usize {
    if block == 0 { 32 } else { block }
}

impl RowMut<'_> {
    /// Quantises one row.
    #[inline(always)]
    pub fn quantize(&mut self, x: &[f32]) {
        let blocks = x.chunks_exact(self.block).zip(self.quants.chunks_exact_mut(self.block));
        for ((x, quants), scale) in blocks.zip(self.scales.iter_mut()) {
            // As integers, magnitudes are in the same order, and NaN is above infinity.
            let largest = x.iter().fold(0, |largest: u32, x| largest.max(x.to_bits() & 0x7fff_ffff));
            let largest = f32::from_bits(largest);
            if !largest.is_finite() {
                *scale = f32::NAN;
                quants.fill(0);
                continue;
            }
            // Divisions in ggml's order, so that quants and scales are its own.
            let inverse = if self.block == 32 { 1.0 / (largest / 127.0) } else { 127.0 / largest };
            // Of subnormal values nothing remains.
            let inverse = if inverse.is_finite() { inverse } else { 0.0 };
            *scale = match (inverse > 0.0, self.block) {
                (false, _) => 0.0,
                (true, 32) => rounded(largest / 127.0),
                (true, _) => 1.0 / inverse,
            };
            for (q, x) in quants.iter_mut().zip(x) {
                *q = round(x * inverse);
            }
        }
        for (sum, quants) in self.sums16.iter_mut().zip(self.quants.as_chunks::<16>().0) {
            *sum = quants.iter().map(|&q| i16::from(q)).sum();
        }
        for (sum, pair) in self.sums32.iter_mut().zip(self.sums16.as_chunks::<2>().0) {
            *sum = pair[0] + pair[1];
        }
    }
}

/// A scale rounded to an `f16`, as ggml stores those of blocks of 32, unless it is too large or small for one.
fn rounded(scale: f32) -> f32 {
    let half = f16::from_f32(scale).to_f32();
    if half.is_finite() && half > 0.0 { half } else { scale }
}

/// The nearest integer of a number within ±127.5, ties away from zero: as [`f32::round`], in instructions that every vector
/// unit has. Just less than a half is added, as with a half the sum could round up; adding 1.5·2²³ to what is whole puts it
/// into the lowest bits.
#[inline(always)]
fn round(x: f32) -> i8 {
    let whole = (x + 0.499_999_97_f32.copysign(x)).trunc();
    (whole + 12_582_912.0).to_bits() as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest() {
        for half in -254..=254 {
            let x = half as f32 / 2.0;
            for x in [x, x.next_up(), x.next_down(), x + 0.25] {
                assert_eq!(f32::from(round(x)), x.round(), "{x}");
            }
        }
    }

    #[test]
    fn blocks_are_quantised_to_half_a_step() {
        for block in [32, 256] {
            let x: Vec<f32> = (0..512).map(|i| ((i * 37 % 101) as f32 - 50.0) * (1.0 + (i / block) as f32)).collect();
            let q = Activation::new(&x, 256, block);
            assert_eq!((q.rows, q.scales.len()), (2, 512 / block));
            for (i, (&x, &quant)) in x.iter().zip(&q.quants).enumerate() {
                let scale = q.scales[i / block];
                assert!((x - scale * f32::from(quant)).abs() <= scale * 0.6, "{x}");
            }
            let sum = |n: usize, i: usize| q.quants[n * i..n * (i + 1)].iter().map(|&q| i16::from(q)).sum::<i16>();
            assert!(q.sums16.iter().enumerate().all(|(i, &s)| s == sum(16, i)));
            assert!(q.sums32.iter().enumerate().all(|(i, &s)| s == sum(32, i)));
        }
    }

    #[test]
    fn what_is_not_finite_stays_so_and_nothing_is_zero() {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 64];
            x[40] = odd;
            let q = Activation::new(&x, 64, 32);
            assert!(q.scales[0] > 0.0 && q.scales[1].is_nan());
        }
        assert_eq!(Activation::new(&[0.0; 32], 32, 32).scales, [0.0]);
        assert_eq!(Activation::new(&[1e-42; 32], 32, 32).quants, [0; 32]);
        assert_eq!(Activation::new(&[f32::MAX; 32], 32, 32).quants, [127; 32]);
        assert_eq!(Activation::new(&[], 32, 32).rows, 0);
    }
}

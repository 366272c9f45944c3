//! Products of ggml's quantised weights, laid out in strips, with 8-bit activations.
//!
//! # One order of additions
//!
//! Every backend computes the same integers and adds the same floats in the same order, so results are equal to the last
//! bit, for any number of rows and threads. For one row of weights and one of activations, block after block:
//!
//! ```text
//! S    = Σ over groups of scale · Σ (quant − ZERO) · x          an exact 32-bit integer
//! N    = Σ over groups of min · Σ x                             likewise
//! y    = fma(S, d · d_x, y)
//! y    = fma(−N, dmin · d_x, y)                                 if the format has minima
//! ```
//!
//! where `x` and `d_x` are the activation's quants and scale.
//!
//! # Budget
//!
//! One row reads each weight once: the memory's bandwidth is the bound (two cores of a Zen 5 machine read 41 to 73 GB/s, and
//! one core's AVX-512 loop takes in 72 GB/s of Q4_K). More rows share the unpacking. With AVX-512 it is done in registers, for
//! up to six rows of activations and two strips at once. Otherwise a *panel* of 32 rows × 256 columns is unpacked to bytes in
//! the first-level cache and multiplied with four rows of activations at a time.
//!
//! Of AVX-512's products a core of that machine makes 477 G/s. 32 columns of Q4_K take 96 instructions for products of six
//! rows and two strips, 12 for scales, and an eighth of 96 for minima and totals, on two ports: 0.80 of that at most.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use half::f16;

use super::Backend;
use super::zeros::Columns;
use crate::codec::kquant::strip::{self, PANEL, ROWS, StripFormat};
use crate::codec::kquant::{Activation, Format, GgmlType, with_format};

/// Strips that are multiplied side by side.
pub const STRIPS: usize = 2;
/// Columns of a panel.
const STEP: usize = 256;
/// Rows of activations whose sums are kept while the panels of two strips pass by.
const ROW_BLOCK: usize = 192;

/// A panel's bytes, for each of the strips.
#[repr(align(64))]
struct Panel([u8; STRIPS * PANEL]);

/// One strip: its quants and what follows them.
#[derive(Clone, Copy)]
struct Strip<'a> {
    quants: &'a [u8],
    meta: &'a [u8],
}

/// What the sums of integers start from, `−ZERO · Σ x` for each group of weights, so that `ZERO` costs nothing later.
/// Empty for formats whose zero is zero.
pub fn bias(ty: GgmlType, x: &Activation) -> Vec<i32> {
    with_format!(ty, F => {
        let sums = if F::GROUP == 16 { &x.sums16 } else { &x.sums32 };
        if F::ZERO == 0 { Vec::new() } else { sums.iter().map(|&sum| -i32::from(F::ZERO) * i32::from(sum)).collect() }
    }, _ => Vec::new())
}

/// `y[m][row] = Σ w[row][k] · x[m][k]` for the rows of one or two strips, whose bytes lie one after the other. `y` has
/// `x.rows` rows and a column for each row of the strips; `bias` is [`bias`]'s.
///
/// # Panics
/// If the sizes do not fit, or the type has no strips.
pub fn product(backend: Backend, ty: GgmlType, strips: &[u8], x: &Activation, bias: &[i32], y: &mut Columns) {
    with_format!(ty, F => product_of::<F>(backend, strips, x, bias, y), _ => panic!("{ty} has no strips"))
}

/// The backend itself, or the best of those that it implies where it lacks an instruction for this.
fn usable(backend: Backend) -> Backend {
    match backend {
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 if avx512::available() => Backend::Avx512,
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 | Backend::Avx2 if avx2::available() => Backend::Avx2,
        #[cfg(target_arch = "aarch64")]
        Backend::Neon if neon::available() => Backend::Neon,
        _ => Backend::Scalar,
    }
}

fn product_of<F: Format>(backend: Backend, strips: &[u8], x: &Activation, bias: &[i32], y: &mut Columns) {
    let backend = usable(backend);
    let blocks = x.cols / F::LEN;
    let bytes = F::strip_bytes(blocks);
    let count = strips.len() / bytes.max(1);
    assert!(x.block == F::LEN && x.cols == blocks * F::LEN && x.quants.len() == x.rows * x.cols);
    assert!((1..=STRIPS).contains(&count) && strips.len() == count * bytes);
    assert!(y.rows() == x.rows && y.cols() == count * ROWS);
    assert!(bias.len() == if F::ZERO == 0 { 0 } else { x.quants.len() / F::GROUP });
    let strips: Vec<Strip> = strips
        .chunks_exact(bytes)
        .map(|strip| {
            let (quants, meta) = strip.split_at(blocks * F::QUANTS);
            Strip { quants, meta: &meta[..blocks * F::META] }
        })
        .collect();
    let job = Job { strips: &strips, x, bias };
    #[cfg(target_arch = "x86_64")]
    if backend == Backend::Avx512 {
        avx512::rows::<F>(&job, y);
        return;
    }
    if x.rows == 1 && backend != Backend::Scalar {
        for (index, y) in y.row(0).chunks_exact_mut(ROWS).enumerate() {
            match backend {
                #[cfg(target_arch = "x86_64")]
                Backend::Avx2 => avx2::row::<F>(&job, index, y),
                #[cfg(target_arch = "aarch64")]
                Backend::Neon => neon::row::<F>(&job, index, y),
                _ => unreachable!("the scalar backend has its own path"),
            }
        }
        return;
    }
    let mut sums = vec![0.0; x.rows * count * ROWS];
    let mut panel = Panel([0; STRIPS * PANEL]);
    let step = STEP / F::LEN;
    for first_row in (0..x.rows).step_by(ROW_BLOCK) {
        let rows = first_row..x.rows.min(first_row + ROW_BLOCK);
        for first in (0..blocks).step_by(step) {
            let chunk = first..blocks.min(first + step);
            if first_row == 0 {
                fetch::<F>(backend, &strips, count * bytes, first, step);
            }
            for (strip, panel) in strips.iter().zip(panel.0.chunks_exact_mut(PANEL)) {
                for (block, panel) in chunk.clone().zip(panel.chunks_exact_mut(ROWS * F::LEN)) {
                    unpack::<F>(backend, &strip.quants[block * F::QUANTS..][..F::QUANTS], panel);
                }
            }
            let y = &mut sums[rows.start * count * ROWS..rows.end * count * ROWS];
            match backend {
                #[cfg(target_arch = "x86_64")]
                Backend::Avx2 => avx2::rows::<F>(&job, &panel, rows.clone(), chunk, y),
                #[cfg(target_arch = "aarch64")]
                Backend::Neon => neon::rows::<F>(&job, &panel, rows.clone(), chunk, y),
                _ => scalar::<F>(&job, &panel, rows.clone(), chunk, y),
            }
        }
    }
    for (row, sums) in sums.chunks_exact(count * ROWS).enumerate() {
        y.row(row).copy_from_slice(sums);
    }
}

/// What a product is made of.
#[derive(Clone, Copy)]
struct Job<'a> {
    strips: &'a [Strip<'a>],
    x: &'a Activation,
    bias: &'a [i32],
}

impl Job<'_> {
    /// What a group's sum of products starts from. `at` is the group's first value in all rows of activations.
    #[inline(always)]
    fn start<F: Format>(&self, at: usize) -> i32 {
        if F::ZERO == 0 { 0 } else { self.bias[at / F::GROUP] }
    }

    /// The sum of a group of activations.
    #[inline(always)]
    fn sum<F: Format>(&self, at: usize) -> i16 {
        if F::GROUP == 16 { self.x.sums16[at / 16] } else { self.x.sums32[at / 32] }
    }
}

/// Fetches what is unpacked next but one: the blocks from `first + 2 · step` on of the strips, or of those that follow them
/// `after` bytes further on.
fn fetch<F: Format>(backend: Backend, strips: &[Strip], after: usize, first: usize, step: usize) {
    for strip in strips {
        let blocks = strip.quants.len() / F::QUANTS;
        let (mut block, mut past) = (first + 2 * step, 0);
        if block >= blocks {
            (block, past) = (block - blocks, after);
        }
        for (bytes, size) in [(strip.quants, F::QUANTS), (strip.meta, F::META)] {
            // What lies behind the strips is never read.
            let at = bytes.as_ptr().wrapping_add(past + block * size);
            match backend {
                #[cfg(target_arch = "x86_64")]
                Backend::Avx2 => avx2::fetch(at, step * size),
                _ => _ = at,
            }
        }
    }
}

/// [`strip::unpack`] with the backend's instructions.
fn unpack<F: Format>(backend: Backend, quants: &[u8], panel: &mut [u8]) {
    match backend {
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 => avx2::unpack::<F>(quants, panel),
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => neon::unpack::<F>(quants, panel),
        _ => strip::unpack::<F>(quants, panel),
    }
}

/// The truth: adds to `y` the products of some blocks, whose panel is unpacked, with some rows of activations.
fn scalar<F: Format>(
    job: &Job,
    panel: &Panel,
    rows: std::ops::Range<usize>,
    blocks: std::ops::Range<usize>,
    y: &mut [f32],
) {
    let x = job.x;
    for (m, y) in rows.zip(y.chunks_exact_mut(job.strips.len() * ROWS)) {
        for ((strip, panel), y) in job.strips.iter().zip(panel.0.chunks_exact(PANEL)).zip(y.chunks_exact_mut(ROWS)) {
            for (block, panel) in blocks.clone().zip(panel.chunks_exact(ROWS * F::LEN)) {
                let meta = &strip.meta[block * F::META..][..F::META];
                let at = m * x.cols + block * F::LEN;
                let (mut products, mut minima) = ([0i32; ROWS], [0i32; ROWS]);
                for (g, panel) in panel.chunks_exact(ROWS * F::GROUP).enumerate() {
                    let at = at + g * F::GROUP;
                    let mut sums = [job.start::<F>(at); ROWS];
                    for (four, x) in panel.chunks_exact(4 * ROWS).zip(x.quants[at..].chunks_exact(4)) {
                        for (sum, quants) in sums.iter_mut().zip(four.chunks_exact(4)) {
                            *sum += quants.iter().zip(x).map(|(&q, &x)| i32::from(q) * i32::from(x)).sum::<i32>();
                        }
                    }
                    for r in 0..ROWS {
                        products[r] += i32::from(strip::scale::<F>(meta, g, r)) * sums[r];
                        minima[r] += i32::from(strip::min::<F>(meta, g, r)) * i32::from(job.sum::<F>(at));
                    }
                }
                let scale = x.scales[at / F::LEN];
                for r in 0..ROWS {
                    y[r] = (products[r] as f32).mul_add(float(meta, F::D, r) * scale, y[r]);
                    if F::MINS {
                        y[r] = (-minima[r] as f32).mul_add(float(meta, F::D + 2 * ROWS, r) * scale, y[r]);
                    }
                }
            }
        }
    }
}

/// The `f16` of row `r` in the field at `at`.
fn float(meta: &[u8], at: usize, r: usize) -> f32 {
    f16::from_le_bytes([meta[at + 2 * r], meta[at + 2 * r + 1]]).to_f32()
}

//! NEON with the dot product extension: one instruction adds four columns to the sums of 4 rows.
//!
//! A group of four columns is four vectors of 4 rows. The instruction is written as assembly, as the compiler's intrinsic
//! for it is not stable. 8-bit quants become signed by turning their highest bit, the others are signed as they are; their
//! `ZERO` is part of what sums start from.
// Tiles are indexed by row and strip, as in the formulas.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::ops::Range;

use half::f16;

use super::{Job, Panel};
use crate::codec::kquant::Format;
use crate::codec::kquant::strip::{self, PANEL, ROWS, StripFormat};

/// Rows of activations that share a panel's loads.
const TILE: usize = 4;

/// True if the machine has the dot product extension.
pub(super) fn available() -> bool {
    is_aarch64_feature_detected!("dotprod")
}

/// Adds to each 32-bit lane the product of its four bytes in `a` and `b`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction works on registers only, and the caller has the feature.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Group `g` of a plane of `bits` bits, 4 of its rows.
///
/// # Safety
/// `plane` is the start of a plane of more than `g` groups.
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn plane(plane: *const u8, bits: u32, g: usize, quarter: usize) -> uint8x16_t {
    let per = 8 / bits as usize;
    // SAFETY: 64 bytes of a plane hold `8/bits` groups, so that all of them lie within the plane.
    let bytes = unsafe { vld1q_u8(plane.add(g / per * 64 + 16 * quarter)) };
    let shifted = vshlq_u8(bytes, vdupq_n_s8(-((bits as usize * (g % per)) as i8)));
    vandq_u8(shifted, vdupq_n_u8((255 >> (8 - bits)) as u8))
}

/// Weights of group of four `g` of a block, unpacked: rows `4 quarter` to `4 quarter + 3`.
///
/// # Safety
/// `block` is the start of the block's `F::QUANTS` bytes, and `g` is less than `F::LEN / 4`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn weights<F: Format>(block: *const u8, g: usize, quarter: usize) -> uint8x16_t {
    // SAFETY: the planes have as many groups as the block.
    unsafe {
        let low = plane(block, F::LOW, g, quarter);
        if F::HIGH == 0 {
            return low;
        }
        let high = plane(block.add(F::HIGH_PLANE), F::HIGH, g, quarter);
        vorrq_u8(low, vshlq_u8(high, vdupq_n_s8(F::LOW as i8)))
    }
}

/// `super::strip::unpack` for one block.
pub(super) fn unpack<F: Format>(quants: &[u8], panel: &mut [u8]) {
    #[target_feature(enable = "neon,dotprod")]
    fn inner<F: Format>(quants: &[u8], panel: &mut [u8]) {
        for (g, out) in panel.chunks_exact_mut(64).enumerate() {
            // SAFETY: `quants` has the block's bytes and `panel` 64 for each group, as the caller asserted.
            unsafe {
                for quarter in 0..4 {
                    vst1q_u8(out.as_mut_ptr().add(16 * quarter), weights::<F>(quants.as_ptr(), g, quarter));
                }
            }
        }
    }
    assert!(available() && quants.len() == F::QUANTS && panel.len() == ROWS * F::LEN);
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { inner::<F>(quants, panel) }
}

/// Writes the products of one strip with the only row of activations to `y`.
pub(super) fn row<F: Format>(job: &Job, strip: usize, y: &mut [f32]) {
    assert!(available() && y.len() == ROWS && job.x.rows == 1);
    y.fill(0.0);
    let (quants, blocks) = (job.strips[strip].quants.as_ptr(), 0..job.x.cols / F::LEN);
    // SAFETY: the assertion above ensures that the CPU has the instructions; a strip has quants for all columns of the
    // activations.
    unsafe { tile::<F, 1, false>(job, strip, quants, 0, blocks, y, ROWS) }
}

/// Adds to `y` the products of some blocks, whose panel is unpacked, with some rows of activations.
pub(super) fn rows<F: Format>(job: &Job, panel: &Panel, mut rows: Range<usize>, blocks: Range<usize>, y: &mut [f32]) {
    assert!(available() && y.len() == rows.len() * job.strips.len() * ROWS && blocks.len() * F::LEN <= 256);
    assert!(rows.end <= job.x.rows && blocks.end * F::LEN <= job.x.cols);
    let stride = job.strips.len() * ROWS;
    let mut y = y;
    while !rows.is_empty() {
        let count = if rows.len() >= TILE { TILE } else { rows.len().min(2) };
        let (now, later) = y.split_at_mut(count * stride);
        for (strip, panel) in panel.0.chunks_exact(PANEL).enumerate().take(job.strips.len()) {
            let (panel, y) = (panel.as_ptr(), &mut now[strip * ROWS..]);
            // SAFETY: the assertions above ensure that the CPU has the instructions, that the panel holds these blocks, and
            // that rows and blocks are within the activations and strips.
            unsafe {
                match count {
                    1 => tile::<F, 1, true>(job, strip, panel, rows.start, blocks.clone(), y, stride),
                    2 => tile::<F, 2, true>(job, strip, panel, rows.start, blocks.clone(), y, stride),
                    _ => tile::<F, TILE, true>(job, strip, panel, rows.start, blocks.clone(), y, stride),
                }
            }
        }
        (y, rows.start) = (later, rows.start + count);
    }
}

/// `M` rows of activations times one strip. Its quants are those of a panel that starts with the first block, or (not
/// `UNPACKED`) the strip's own.
///
/// # Safety
/// The rows from `row` on and the blocks are within the activations and the strip; `quants` has all blocks; `y` has 16
/// values for each row, `stride` apart.
#[target_feature(enable = "neon,dotprod")]
unsafe fn tile<F: Format, const M: usize, const UNPACKED: bool>(
    job: &Job,
    strip: usize,
    quants: *const u8,
    row: usize,
    blocks: Range<usize>,
    y: &mut [f32],
    stride: usize,
) {
    assert!(y.len() >= (M - 1) * stride + ROWS);
    let (cols, y) = (job.x.cols, y.as_mut_ptr());
    let flip = vdupq_n_u8(128);
    // SAFETY: the caller's promises bound every index: `at` is a block's first value in the rows of activations.
    unsafe {
        let mut totals = [[vdupq_n_f32(0.0); 4]; M];
        for m in 0..M {
            for q in 0..4 {
                totals[m][q] = vld1q_f32(y.add(m * stride + 4 * q));
            }
        }
        for (index, block) in blocks.enumerate() {
            let first = row * cols + block * F::LEN;
            let quants = quants.add(index * if UNPACKED { ROWS * F::LEN } else { F::QUANTS });
            let meta = &job.strips[strip].meta[block * F::META..][..F::META];
            let x = job.x.quants.as_ptr().add(first);
            let mut products = [[vdupq_n_s32(0); 4]; M];
            let mut minima = [[vdupq_n_s32(0); 4]; M];
            for group in 0..F::LEN / F::GROUP {
                let at = |m: usize| first + m * cols + group * F::GROUP;
                // Signed 8-bit quants need no zero.
                let mut sums = [[vdupq_n_s32(0); 4]; M];
                if F::BITS < 8 {
                    for m in 0..M {
                        sums[m] = [vdupq_n_s32(job.start::<F>(at(m))); 4];
                    }
                }
                for g in group * F::GROUP / 4..(group + 1) * F::GROUP / 4 {
                    let mut w = [flip; 4];
                    for q in 0..4 {
                        w[q] =
                            if UNPACKED { vld1q_u8(quants.add(64 * g + 16 * q)) } else { weights::<F>(quants, g, q) };
                        if F::BITS == 8 {
                            w[q] = veorq_u8(w[q], flip);
                        }
                    }
                    for m in 0..M {
                        let x =
                            vreinterpretq_s8_s32(vdupq_n_s32(x.add(m * cols + 4 * g).cast::<i32>().read_unaligned()));
                        for q in 0..4 {
                            sums[m][q] = dot(sums[m][q], vreinterpretq_s8_u8(w[q]), x);
                        }
                    }
                }
                for q in 0..4 {
                    if F::LEN == 32 {
                        for m in 0..M {
                            products[m][q] = sums[m][q];
                        }
                    } else {
                        let scales: [i32; 4] =
                            std::array::from_fn(|r| strip::scale::<F>(meta, group, 4 * q + r).into());
                        let scales = vld1q_s32(scales.as_ptr());
                        for m in 0..M {
                            products[m][q] = vmlaq_s32(products[m][q], sums[m][q], scales);
                        }
                    }
                    if F::MINS {
                        let mins: [i32; 4] = std::array::from_fn(|r| strip::min::<F>(meta, group, 4 * q + r).into());
                        let mins = vld1q_s32(mins.as_ptr());
                        for m in 0..M {
                            minima[m][q] = vmlaq_n_s32(minima[m][q], mins, job.sum::<F>(at(m)).into());
                        }
                    }
                }
            }
            for q in 0..4 {
                let floats = |at: usize| {
                    let float = |r: usize| f16::from_le_bytes([meta[at + 8 * q + 2 * r], meta[at + 8 * q + 2 * r + 1]]);
                    let floats: [f32; 4] = std::array::from_fn(|r| float(r).to_f32());
                    vld1q_f32(floats.as_ptr())
                };
                let d = floats(F::D);
                let dmin = if F::MINS { floats(F::D + 2 * ROWS) } else { d };
                for m in 0..M {
                    let scale = *job.x.scales.as_ptr().add((first + m * cols) / F::LEN);
                    let product = vcvtq_f32_s32(products[m][q]);
                    totals[m][q] = vfmaq_f32(totals[m][q], product, vmulq_n_f32(d, scale));
                    if F::MINS {
                        let minima = vcvtq_f32_s32(minima[m][q]);
                        totals[m][q] = vfmsq_f32(totals[m][q], minima, vmulq_n_f32(dmin, scale));
                    }
                }
            }
        }
        for m in 0..M {
            for q in 0..4 {
                vst1q_f32(y.add(m * stride + 4 * q), totals[m][q]);
            }
        }
    }
}

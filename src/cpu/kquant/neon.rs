//! NEON with the dot product extension: one instruction adds four columns to the sums of 4 rows. With the matrix extension
//! (i8mm) and more than one row of activations: one adds eight columns to the sums of 2 rows with 2 rows of activations.
//!
//! A group of four columns is four vectors of 4 rows; for i8mm two groups are unpacked as eight vectors of 2 rows. Both
//! instructions are written as assembly, as the compiler's intrinsics for them are not stable. 8-bit quants become signed by
//! turning their highest bit, the others are signed as they are; their `ZERO` is part of what sums start from.
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

/// True if the machine has the matrix extension.
fn i8mm() -> bool {
    is_aarch64_feature_detected!("i8mm")
}

/// Adds the products of the two rows of eight bytes in `a` with those in `b`: to lane `2 i + j` that of row `i` with row `j`.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn dots(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction works on registers only, and the caller has the feature.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b,
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

/// What the instructions take for quants: those of 8 bits less 128.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn signed<F: Format>(quants: uint8x16_t) -> uint8x16_t {
    if F::BITS == 8 { veorq_u8(quants, vdupq_n_u8(128)) } else { quants }
}

/// [`strip::unpack`] for one block, [`signed`]. With i8mm pairs of groups become, for each two rows, the eight columns of one and of
/// the other.
pub(super) fn unpack<F: Format>(quants: &[u8], panel: &mut [u8]) {
    #[target_feature(enable = "neon,dotprod")]
    fn inner<F: Format>(quants: &[u8], panel: &mut [u8], pairs: bool) {
        for (pair, out) in panel.chunks_exact_mut(128).enumerate() {
            // SAFETY: `quants` has the block's bytes and `panel` 64 for each group, as the caller asserted.
            unsafe {
                let (quants, out) = (quants.as_ptr(), out.as_mut_ptr());
                for quarter in 0..4 {
                    let even = signed::<F>(weights::<F>(quants, 2 * pair, quarter));
                    let odd = signed::<F>(weights::<F>(quants, 2 * pair + 1, quarter));
                    if pairs {
                        let (even, odd) = (vreinterpretq_u32_u8(even), vreinterpretq_u32_u8(odd));
                        vst1q_u32(out.add(32 * quarter).cast(), vzip1q_u32(even, odd));
                        vst1q_u32(out.add(32 * quarter + 16).cast(), vzip2q_u32(even, odd));
                    } else {
                        vst1q_u8(out.add(16 * quarter), even);
                        vst1q_u8(out.add(64 + 16 * quarter), odd);
                    }
                }
            }
        }
    }
    assert!(available() && quants.len() == F::QUANTS && panel.len() == ROWS * F::LEN);
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { inner::<F>(quants, panel, i8mm()) }
}

/// Writes the products of one strip with the only row of activations to `y`.
pub(super) fn row<F: Format>(job: &Job, strip: usize, y: &mut [f32]) {
    assert!(available() && y.len() == ROWS && job.x.rows == 1);
    y.fill(0.0);
    let (quants, blocks) = (job.strips[strip].quants.as_ptr(), 0..job.x.cols / F::LEN);
    // SAFETY: the assertion above ensures that the CPU has the instructions; a strip has quants for all columns of the
    // activations.
    unsafe { tile::<F, 1, STRIP>(job, strip, quants, 0, blocks, y, ROWS) }
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
                match (count, i8mm()) {
                    (1, false) => tile::<F, 1, FOURS>(job, strip, panel, rows.start, blocks.clone(), y, stride),
                    (2, false) => tile::<F, 2, FOURS>(job, strip, panel, rows.start, blocks.clone(), y, stride),
                    (_, false) => tile::<F, TILE, FOURS>(job, strip, panel, rows.start, blocks.clone(), y, stride),
                    (1, true) => tile::<F, 1, PAIRS>(job, strip, panel, rows.start, blocks.clone(), y, stride),
                    (2, true) => tile::<F, 2, PAIRS>(job, strip, panel, rows.start, blocks.clone(), y, stride),
                    (_, true) => tile::<F, TILE, PAIRS>(job, strip, panel, rows.start, blocks.clone(), y, stride),
                }
            }
        }
        (y, rows.start) = (later, rows.start + count);
    }
}

/// Quants of a strip.
const STRIP: u8 = 0;
/// Quants of a panel, for `sdot`.
const FOURS: u8 = 1;
/// Quants of a panel, for `smmla`.
const PAIRS: u8 = 2;

/// `M` rows of activations times one strip. Its quants lie as `LAYOUT` says, those of a panel from the first block on.
///
/// # Safety
/// The rows from `row` on and the blocks are within the activations and the strip; `quants` has all blocks; `y` has 16
/// values for each row, `stride` apart. The CPU has i8mm if the layout is `PAIRS`.
#[target_feature(enable = "neon,dotprod")]
unsafe fn tile<F: Format, const M: usize, const LAYOUT: u8>(
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
            let quants = quants.add(index * if LAYOUT == STRIP { F::QUANTS } else { ROWS * F::LEN });
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
                let fours = group * F::GROUP / 4..(group + 1) * F::GROUP / 4;
                if LAYOUT == PAIRS {
                    sums_of_pairs::<M>(quants, x, cols, fours, &mut sums);
                } else {
                    for g in fours {
                        let mut w = [vdupq_n_u8(0); 4];
                        for q in 0..4 {
                            w[q] = if LAYOUT == STRIP {
                                signed::<F>(weights::<F>(quants, g, q))
                            } else {
                                vld1q_u8(quants.add(64 * g + 16 * q))
                            };
                        }
                        for m in 0..M {
                            let x = x.add(m * cols + 4 * g).cast::<i32>().read_unaligned();
                            let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
                            for q in 0..4 {
                                sums[m][q] = dot(sums[m][q], vreinterpretq_s8_u8(w[q]), x);
                            }
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

/// Adds to sums of `M` rows of activations and 4 times 4 rows of weights the products of some groups of four columns, an even
/// number, of a panel in pairs.
///
/// # Safety
/// The CPU has i8mm; `quants` has 64 bytes for each group, `x` as many columns in `M` rows, `cols` apart.
#[target_feature(enable = "neon,i8mm")]
#[inline]
unsafe fn sums_of_pairs<const M: usize>(
    quants: *const u8,
    x: *const i8,
    cols: usize,
    fours: Range<usize>,
    sums: &mut [[int32x4_t; 4]; M],
) {
    // By pairs of rows of activations and pairs of rows of weights. A lone row of activations is paired with zeros.
    let mut pairs = [[vdupq_n_s32(0); 8]; M];
    for i in 0..M.div_ceil(2) {
        for q in 0..4 {
            let other = if 2 * i + 1 < M { sums[2 * i + 1][q] } else { vdupq_n_s32(0) };
            pairs[i][2 * q] = vzip1q_s32(sums[2 * i][q], other);
            pairs[i][2 * q + 1] = vzip2q_s32(sums[2 * i][q], other);
        }
    }
    for g in fours.start / 2..fours.end / 2 {
        // SAFETY: promised by the caller.
        unsafe {
            let mut xs = [vdupq_n_s8(0); M];
            for i in 0..M.div_ceil(2) {
                let row = |m: usize| vld1_s8(x.add(m * cols + 8 * g));
                xs[i] = vcombine_s8(row(2 * i), if 2 * i + 1 < M { row(2 * i + 1) } else { vdup_n_s8(0) });
            }
            for pair in 0..8 {
                let w = vld1q_u8(quants.add(128 * g + 16 * pair));
                for i in 0..M.div_ceil(2) {
                    pairs[i][pair] = dots(pairs[i][pair], vreinterpretq_s8_u8(w), xs[i]);
                }
            }
        }
    }
    for i in 0..M.div_ceil(2) {
        for q in 0..4 {
            let (front, back) = (pairs[i][2 * q], pairs[i][2 * q + 1]);
            sums[2 * i][q] = vuzp1q_s32(front, back);
            if 2 * i + 1 < M {
                sums[2 * i + 1][q] = vuzp2q_s32(front, back);
            }
        }
    }
}

//! INT8 products with NEON, see [`crate::cpu::int8`].
//!
//! `sdot` (the extension *dotprod*) adds the products of four pairs of bytes to a lane; without it pairs of 16-bit products
//! are added up. The lanes of four rows are added pairwise, so that four rows stand side by side.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use crate::codec::BAND_ROWS;
use crate::cpu::int8::{BLOCK, Blocks, Weights};

/// See [`crate::cpu::int8::dot`].
pub(in crate::cpu) fn dot(weights: &Weights, scales: &[f32; BAND_ROWS], x: Blocks, y: &mut [f32]) {
    assert!(y.len() == weights.rows() && y.len() <= BAND_ROWS);
    assert!(x.values.len() * BLOCK >= weights.stride() && x.scales.len() == x.values.len());
    if is_aarch64_feature_detected!("dotprod") {
        // SAFETY: the CPU has the instruction; all lengths fit.
        unsafe { dot_dotprod(weights, scales, x, y) }
    } else {
        dot_rows(weights, scales, x, y, |sum, w, x| {
            // SAFETY: NEON is part of AArch64. Products of bytes fit 16 bits.
            unsafe {
                let sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(w), vget_low_s8(x)));
                vpadalq_s16(sum, vmull_s8(vget_high_s8(w), vget_high_s8(x)))
            }
        });
    }
}

/// # Safety
/// The CPU must have *dotprod*.
#[target_feature(enable = "dotprod")]
unsafe fn dot_dotprod(weights: &Weights, scales: &[f32; BAND_ROWS], x: Blocks, y: &mut [f32]) {
    dot_rows(weights, scales, x, y, |mut sum, w, x| {
        // SAFETY: the instruction is there and touches registers only. (Its intrinsic is not stable.)
        unsafe {
            asm!(
                "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
                sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    });
}

/// `add` adds the products of 16 pairs to four lanes, in any order.
#[inline(always)]
fn dot_rows(
    weights: &Weights,
    scales: &[f32; BAND_ROWS],
    x: Blocks,
    y: &mut [f32],
    add: impl Fn(int32x4_t, int8x16_t, int8x16_t) -> int32x4_t,
) {
    let (rows, stride) = (weights.rows(), weights.stride());
    for first in (0..rows).step_by(4) {
        let count = (rows - first).min(4);
        // Rows that are not there repeat the last one.
        let row = |i: usize| &weights.bytes()[(first + i.min(count - 1)) * stride..][..stride];
        let row = [row(0), row(1), row(2), row(3)];
        // SAFETY: NEON is part of AArch64; every load is within a row's stride, a multiple of 64, within a block of 32
        // activations, or from an array of its size.
        unsafe {
            let mut t = vdupq_n_f32(0.0);
            for (block, (values, scale)) in x.values[..stride / BLOCK].iter().zip(x.scales).enumerate() {
                let (front, back) = (vld1q_s8(values.as_ptr()), vld1q_s8(values.as_ptr().add(16)));
                let sum: [int32x4_t; 4] = std::array::from_fn(|i| {
                    let at = row[i].as_ptr().add(BLOCK * block).cast::<i8>();
                    add(add(vdupq_n_s32(0), vld1q_s8(at), front), vld1q_s8(at.add(16)), back)
                });
                let sum = vpaddq_s32(vpaddq_s32(sum[0], sum[1]), vpaddq_s32(sum[2], sum[3]));
                t = vfmaq_n_f32(t, vcvtq_f32_s32(sum), *scale);
            }
            let mut out = [0.0f32; 4];
            out[..count].copy_from_slice(&y[first..first + count]);
            let sum = vfmaq_f32(vld1q_f32(out.as_ptr()), t, vld1q_f32(scales[first..first + 4].as_ptr()));
            vst1q_f32(out.as_mut_ptr(), sum);
            y[first..first + count].copy_from_slice(&out[..count]);
        }
    }
}

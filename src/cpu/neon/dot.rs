//! Products of BF16 weights that never leave the registers: 16 weights a step, in their own order; the 64 lanes of a row's
//! sum fill half of the registers.

use std::arch::aarch64::*;

use crate::cpu::bf16::Planes;
use crate::cpu::dot::{LANES, reduce};

/// Adds to each of `y` the product of a row of weights with the activation `x`.
pub(in crate::cpu) fn dot(planes: &mut Planes, x: &[f32], y: &mut [f32]) {
    assert!(x.len() == planes.cols && y.len() * planes.cols == planes.raw.len());
    for (row, y) in y.iter_mut().enumerate() {
        *y += if planes.class_bits == 4 { row_sum::<4>(planes, row, x) } else { row_sum::<3>(planes, row, x) };
    }
}

fn row_sum<const CLASS_BITS: u32>(planes: &mut Planes, row: usize, x: &[f32]) -> f32 {
    // SAFETY: NEON is part of AArch64; loads and stores are from and to arrays of their size.
    unsafe {
        let mut sums = [vdupq_n_f32(0.0); LANES / 4];
        for (block, x) in x.as_chunks::<LANES>().0.iter().enumerate() {
            for (step, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let [front, back] = weights16::<CLASS_BITS>(planes, row, LANES * block + 16 * step);
                let weights = [vget_low_u16(front), vget_high_u16(front), vget_low_u16(back), vget_high_u16(back)];
                for (v, (sum, weights)) in sums.iter_mut().zip(weights).enumerate() {
                    let weights = vreinterpretq_f32_u32(vshll_n_u16::<16>(weights));
                    *sum = vfmaq_f32(*sum, weights, vld1q_f32(x.as_ptr().add(16 * step + 4 * v)));
                }
            }
        }
        let mut lanes = [0.0f32; LANES];
        for (lanes, sum) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
            vst1q_f32(lanes.as_mut_ptr(), sum);
        }
        reduce(&lanes)
    }
}

/// The 16 weights of `row` from `col` on.
#[inline(always)]
fn weights16<const CLASS_BITS: u32>(planes: &mut Planes, row: usize, col: usize) -> [uint16x8_t; 2] {
    let i = row * planes.cols + col;
    let raw = &planes.raw[i..i + 16];
    // SAFETY: NEON is part of AArch64; every slice and array has the size of what is loaded from it.
    unsafe {
        let class = if CLASS_BITS == 4 {
            let plane = vld1_u8(planes.classes[i / 2..i / 2 + 8].as_ptr());
            let nibbles = vzip_u8(vand_u8(plane, vdup_n_u8(15)), vshr_n_u8::<4>(plane));
            vcombine_u8(nibbles.0, nibbles.1)
        } else {
            let plane = &planes.classes[i / 4..i / 4 + 4];
            let top = &planes.tops[i / 8..i / 8 + 2];
            // Each byte of the planes beside itself, shifted and masked to one class.
            let plane = vcombine_u8(vdup_n_u8(0), vreinterpret_u8_u32(vdup_n_u32(u32_of(plane))));
            let repeat: [u8; 16] = std::array::from_fn(|k| 8 + k as u8 / 4);
            let shift: [i8; 16] = std::array::from_fn(|k| -2 * (k as i8 % 4));
            let low = vshlq_u8(vqtbl1q_u8(plane, vld1q_u8(repeat.as_ptr())), vld1q_s8(shift.as_ptr()));
            let bit: [u8; 16] = std::array::from_fn(|k| 1 << (k % 8));
            let tops = vcombine_u8(vdup_n_u8(top[0]), vdup_n_u8(top[1]));
            let high = vandq_u8(vtstq_u8(tops, vld1q_u8(bit.as_ptr())), vdupq_n_u8(4));
            vorrq_u8(vandq_u8(low, vdupq_n_u8(3)), high)
        };
        let mut high = vqtbl1q_u8(vld1q_u8(planes.map.as_ptr()), class);
        if let Some(&own) = planes.row_levels.get(row) {
            let levels = vqaddq_u8(vdupq_n_u8(own), vld1q_u8(planes.col_levels[col..col + 16].as_ptr()));
            high = vaddq_u8(high, vshrq_n_u8::<4>(levels));
        }
        let marked = vceqq_u8(class, vdupq_n_u8((1 << CLASS_BITS) - 1));
        if vmaxvq_u8(marked) != 0 {
            let (mut flags, mut patched) = ([0u8; 16], [0u8; 16]);
            vst1q_u8(flags.as_mut_ptr(), marked);
            vst1q_u8(patched.as_mut_ptr(), high);
            let mask = flags.iter().enumerate().fold(0u64, |mask, (lane, &flag)| mask | u64::from(flag & 1) << lane);
            planes.patch(mask, &mut patched);
            high = vld1q_u8(patched.as_ptr());
        }
        // Upper byte: sign, then seven exponent bits. Lower byte: the last exponent bit, then the mantissa.
        let (raw, mantissa) = (vld1q_u8(raw.as_ptr()), vdupq_n_u8(0x7f));
        let upper = vbslq_u8(mantissa, vshrq_n_u8::<1>(high), raw);
        let lower = vbslq_u8(mantissa, raw, vshlq_n_u8::<7>(high));
        [vreinterpretq_u16_u8(vzip1q_u8(lower, upper)), vreinterpretq_u16_u8(vzip2q_u8(lower, upper))]
    }
}

fn u32_of(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, &b| value << 8 | u32::from(b))
}

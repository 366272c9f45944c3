//! INT8 products with AVX2, see [`crate::cpu::int8`].
//!
//! `vpmaddubsw` multiplies unsigned bytes by signed ones: magnitudes of weights by activations that take their signs. Two
//! products of at most 128 · 127 fit its 16 bits. For 8 rows × 32 columns of weights the lanes of 8 products are added up
//! so that 8 rows stand side by side.

use std::arch::x86_64::*;

use crate::codec::BAND_ROWS;
use crate::cpu::int8::{BLOCK, Blocks, Weights};

/// See [`crate::cpu::int8::dot`].
pub(in crate::cpu) fn dot(weights: &Weights, scales: &[f32; BAND_ROWS], x: Blocks, y: &mut [f32]) {
    assert!(super::available() && y.len() == weights.rows() && y.len() <= BAND_ROWS);
    assert!(x.values.len() * BLOCK >= weights.stride() && x.scales.len() == x.values.len());
    // SAFETY: the assertions above ensure that the CPU has the instructions and that all lengths fit.
    unsafe { dot_avx2(weights, scales, x, y) }
}

/// # Safety
/// `y` has a value for each row; `x` has as many blocks as a row, and a scale for each.
#[target_feature(enable = "avx2,fma")]
unsafe fn dot_avx2(weights: &Weights, scales: &[f32; BAND_ROWS], x: Blocks, y: &mut [f32]) {
    let (rows, stride) = (weights.rows(), weights.stride());
    let ones = _mm256_set1_epi16(1);
    for first in (0..rows).step_by(8) {
        let count = (rows - first).min(8);
        let mut t = _mm256_setzero_ps();
        for block in 0..stride / BLOCK {
            // SAFETY: rows and activations have the 32 bytes of this block. Rows that are not there repeat the last one.
            let p: [__m256i; 8] = unsafe {
                let x = _mm256_loadu_si256(x.values.as_ptr().add(block).cast());
                std::array::from_fn(|i| {
                    let at = weights.bytes().as_ptr().add((first + i.min(count - 1)) * stride + BLOCK * block);
                    let w = _mm256_loadu_si256(at.cast());
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                    _mm256_madd_epi16(pairs, ones)
                })
            };
            let quad = |i: usize| {
                let (ab, cd) = (_mm256_hadd_epi32(p[i], p[i + 1]), _mm256_hadd_epi32(p[i + 2], p[i + 3]));
                _mm256_hadd_epi32(ab, cd)
            };
            let (front, back) = (quad(0), quad(4));
            let sum = _mm256_add_epi32(
                _mm256_permute2x128_si256::<0x20>(front, back),
                _mm256_permute2x128_si256::<0x31>(front, back),
            );
            t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(x.scales[block]), t);
        }
        let mut out = [0.0f32; 8];
        out[..count].copy_from_slice(&y[first..first + count]);
        // SAFETY: the arrays have 8 values, and there are scales for 64 rows.
        unsafe {
            let scale = _mm256_loadu_ps(scales.as_ptr().add(first));
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_fmadd_ps(t, scale, _mm256_loadu_ps(out.as_ptr())));
        }
        y[first..first + count].copy_from_slice(&out[..count]);
    }
}

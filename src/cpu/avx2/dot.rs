//! Products of BF16 weights that never leave the registers: 32 weights a step, in the order of
//! [`crate::cpu::dot::permuted`], of which a vector of eight is a half of one of AVX-512's; see there for the steps.

use std::arch::x86_64::*;

use crate::cpu::bf16::Planes;

/// Adds to each of `y` the product of a row of weights with the activation, whose [`crate::cpu::dot::permuted`] form is `x`.
pub(in crate::cpu) fn dot(planes: &mut Planes, x: &[f32], y: &mut [f32]) {
    assert!(super::available() && x.len() == planes.cols && y.len() * planes.cols == planes.raw.len());
    // SAFETY: the assertion above ensures that the CPU has the instructions and that all lengths fit.
    unsafe {
        match (planes.class_bits, planes.row_levels.is_empty()) {
            (4, true) => dot_avx2::<4, false>(planes, x, y),
            (4, false) => dot_avx2::<4, true>(planes, x, y),
            (_, true) => dot_avx2::<3, false>(planes, x, y),
            (_, false) => dot_avx2::<3, true>(planes, x, y),
        }
    }
}

/// # Safety
/// `x` has the band's columns, `y` its rows.
#[target_feature(enable = "avx2,fma,popcnt,bmi1")]
unsafe fn dot_avx2<const CLASS_BITS: u32, const LEVELS: bool>(planes: &mut Planes, x: &[f32], y: &mut [f32]) {
    for (row, y) in y.iter_mut().enumerate() {
        let mut sums = [[_mm256_setzero_ps(); 4]; 2];
        let mut col = 0;
        while col < planes.cols {
            for (half, sums) in sums.iter_mut().enumerate() {
                // SAFETY: 64 weights of the row start at `col`, as the columns are a multiple of 64; `x` has as many values.
                unsafe {
                    let [even, odd] = weights32::<CLASS_BITS, LEVELS>(planes, row, col + 32 * half);
                    let zero = _mm256_setzero_si256();
                    let weights = [
                        _mm256_unpacklo_epi16(zero, even),
                        _mm256_unpackhi_epi16(zero, even),
                        _mm256_unpacklo_epi16(zero, odd),
                        _mm256_unpackhi_epi16(zero, odd),
                    ];
                    for (q, (sum, weights)) in sums.iter_mut().zip(weights).enumerate() {
                        let x = _mm256_loadu_ps(x.as_ptr().add(col + 16 * q + 8 * half));
                        *sum = _mm256_fmadd_ps(_mm256_castsi256_ps(weights), x, *sum);
                    }
                }
            }
            col += 64;
        }
        // The order of `crate::cpu::dot::reduce`.
        let four = |s: [__m256; 4]| _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3]));
        let half = _mm256_add_ps(four(sums[0]), four(sums[1]));
        let quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
        let pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
        *y += _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
    }
}

/// The 32 weights of `row` from `col` on: of each 16, the first 8 in the first vector.
///
/// # Safety
/// The band has these weights.
#[target_feature(enable = "avx2,popcnt,bmi1")]
#[inline]
unsafe fn weights32<const CLASS_BITS: u32, const LEVELS: bool>(
    planes: &mut Planes,
    row: usize,
    col: usize,
) -> [__m256i; 2] {
    let i = row * planes.cols + col;
    // SAFETY: `Planes::of` checked that every plane covers the band; 32 weights from `i` on are in it.
    let (class, raw, mut high) = unsafe {
        let map = _mm256_broadcastsi128_si256(_mm_loadu_si128(planes.map.as_ptr().cast()));
        let class = if CLASS_BITS == 4 {
            super::spread4(_mm_loadu_si128(planes.classes.as_ptr().add(i / 2).cast()))
        } else {
            let plane = planes.classes.as_ptr().add(i / 4).cast::<i64>().read_unaligned();
            super::spread3(plane, planes.tops.as_ptr().add(i / 8).cast::<i32>().read_unaligned())
        };
        let mut high = _mm256_shuffle_epi8(map, class);
        if LEVELS {
            let own = _mm256_set1_epi8(*planes.row_levels.get_unchecked(row) as i8);
            let levels = _mm256_adds_epu8(own, _mm256_loadu_si256(planes.col_levels.as_ptr().add(col).cast()));
            high = _mm256_add_epi8(high, _mm256_and_si256(_mm256_srli_epi16::<4>(levels), _mm256_set1_epi8(15)));
        }
        (class, _mm256_loadu_si256(planes.raw.as_ptr().add(i).cast()), high)
    };
    let escape = _mm256_set1_epi8((1 << CLASS_BITS) - 1);
    let escaped = _mm256_movemask_epi8(_mm256_cmpeq_epi8(class, escape)) as u32;
    if escaped != 0 {
        let mut patched = [0u8; 32];
        // SAFETY: the array has 32 bytes.
        unsafe {
            _mm256_storeu_si256(patched.as_mut_ptr().cast(), high);
            planes.patch(escaped.into(), &mut patched);
            high = _mm256_loadu_si256(patched.as_ptr().cast());
        }
    }
    super::interleave(high, raw)
}

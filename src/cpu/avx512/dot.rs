//! Products of BF16 weights that never leave the registers.
//!
//! A band's bytes: a plane of 4-bit classes (or one of 2 bits and one of 1 bit), a raw byte a weight, and escapes in order.
//! 64 weights are a step: classes become exponents by a shuffle, escapes are put where their markers are by an expansion,
//! exponents and raw bytes become two vectors of BF16 and then four of `f32`, in the order of
//! [`crate::cpu::dot::permuted`]. Four rows are added up together, in the order of [`crate::cpu::dot::reduce`].
//!
//! Budget: with 12 bits a weight and 20 GB/s for a core, 64 weights take 4.8 ns to read; a step has about 25 instructions.
//!
//! `vdpbf16ps` would halve the multiplications, but it rounds each pair of products on its own, to nearest even and
//! without subnormals, so its sums are not those of the other backends; activations would have to be BF16, too.

use std::arch::x86_64::*;

use crate::cpu::bf16::Planes;

/// Adds to each of `y` the product of a row of weights with the activation, whose [`crate::cpu::dot::permuted`] form is `x`.
pub(in crate::cpu) fn dot(planes: &mut Planes, x: &[f32], y: &mut [f32]) {
    assert!(super::available() && x.len() == planes.cols && y.len() * planes.cols == planes.raw.len());
    // SAFETY: the assertion above ensures that the CPU has the instructions and that all lengths fit.
    unsafe {
        match (planes.class_bits, planes.row_levels.is_empty()) {
            (4, true) => dot_avx512::<4, false>(planes, x, y),
            (4, false) => dot_avx512::<4, true>(planes, x, y),
            (_, true) => dot_avx512::<3, false>(planes, x, y),
            (_, false) => dot_avx512::<3, true>(planes, x, y),
        }
    }
}

/// # Safety
/// `x` has the band's columns, `y` its rows.
#[target_feature(enable = "fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
unsafe fn dot_avx512<const CLASS_BITS: u32, const LEVELS: bool>(planes: &mut Planes, x: &[f32], y: &mut [f32]) {
    let rows = y.len();
    let (mut fours, mut first) = (y.chunks_exact_mut(4), 0);
    for y in &mut fours {
        // SAFETY: these rows are there.
        let sums = std::array::from_fn(|i| unsafe { row_sum::<CLASS_BITS, LEVELS>(planes, first + i, x) });
        for (y, sum) in y.iter_mut().zip(reduce4(sums)) {
            *y += sum;
        }
        first += 4;
    }
    for (y, row) in fours.into_remainder().iter_mut().zip(first..rows) {
        // SAFETY: this row is there.
        let sum = unsafe { row_sum::<CLASS_BITS, LEVELS>(planes, row, x) };
        *y += reduce4([sum; 4])[0];
    }
}

/// The 64 lanes of a row's product, four added up.
///
/// # Safety
/// The row is one of the band, `x` has its columns.
#[target_feature(enable = "fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
#[inline]
unsafe fn row_sum<const CLASS_BITS: u32, const LEVELS: bool>(planes: &mut Planes, row: usize, x: &[f32]) -> __m512 {
    let zero = _mm512_setzero_si512();
    let [mut a, mut b, mut c, mut d] = [_mm512_setzero_ps(); 4];
    let mut col = 0;
    while col < planes.cols {
        // SAFETY: 64 weights of the row start at `col`, as the columns are a multiple of 64; `x` has as many values.
        unsafe {
            let [even, odd] = weights64::<CLASS_BITS, LEVELS>(planes, row, col);
            let x = x.as_ptr().add(col);
            let value = |weights: __m512i| _mm512_castsi512_ps(weights);
            a = _mm512_fmadd_ps(value(_mm512_unpacklo_epi16(zero, even)), _mm512_loadu_ps(x), a);
            b = _mm512_fmadd_ps(value(_mm512_unpackhi_epi16(zero, even)), _mm512_loadu_ps(x.add(16)), b);
            c = _mm512_fmadd_ps(value(_mm512_unpacklo_epi16(zero, odd)), _mm512_loadu_ps(x.add(32)), c);
            d = _mm512_fmadd_ps(value(_mm512_unpackhi_epi16(zero, odd)), _mm512_loadu_ps(x.add(48)), d);
        }
        col += 64;
    }
    _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d))
}

/// The 64 weights of `row` from `col` on: of each 16, the first 8 in the first vector.
///
/// # Safety
/// The band has these weights.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
#[inline]
unsafe fn weights64<const CLASS_BITS: u32, const LEVELS: bool>(
    planes: &mut Planes,
    row: usize,
    col: usize,
) -> [__m512i; 2] {
    let i = row * planes.cols + col;
    // SAFETY: `Planes::of` checked that every plane covers the band; 64 weights from `i` on are in it.
    let (class, raw, mut high) = unsafe {
        // What is read some rows later; behind the band this is a hint and nothing else.
        _mm_prefetch::<_MM_HINT_T0>(planes.raw.as_ptr().wrapping_add(i + AHEAD).cast());
        let map = _mm512_broadcast_i32x4(_mm_loadu_si128(planes.map.as_ptr().cast()));
        let class = if CLASS_BITS == 4 {
            let plane = _mm512_cvtepu32_epi64(_mm256_loadu_si256(planes.classes.as_ptr().add(i / 2).cast()));
            let nibbles = _mm512_set1_epi64(0x1c18_1410_0c08_0400);
            _mm512_and_si512(_mm512_multishift_epi64_epi8(nibbles, plane), _mm512_set1_epi8(15))
        } else {
            let plane = _mm512_cvtepu16_epi64(_mm_loadu_si128(planes.classes.as_ptr().add(i / 4).cast()));
            let top = planes.tops.as_ptr().add(i / 8).cast::<u64>().read_unaligned();
            let pairs = _mm512_set1_epi64(0x0e0c_0a08_0604_0200);
            let class = _mm512_and_si512(_mm512_multishift_epi64_epi8(pairs, plane), _mm512_set1_epi8(3));
            _mm512_mask_add_epi8(class, top, class, _mm512_set1_epi8(4))
        };
        let mut high = _mm512_shuffle_epi8(map, class);
        if LEVELS {
            let own = _mm512_set1_epi8(*planes.row_levels.get_unchecked(row) as i8);
            let levels = _mm512_adds_epu8(own, _mm512_loadu_si512(planes.col_levels.as_ptr().add(col).cast()));
            high = _mm512_add_epi8(high, _mm512_and_si512(_mm512_srli_epi16::<4>(levels), _mm512_set1_epi8(15)));
        }
        (class, _mm512_loadu_si512(planes.raw.as_ptr().add(i).cast()), high)
    };
    let escaped = _mm512_cmpeq_epi8_mask(class, _mm512_set1_epi8((1 << CLASS_BITS) - 1));
    if escaped != 0 {
        high = put_escapes(planes, escaped, high);
    }
    // Upper byte: sign, then seven exponent bits. Lower byte: the last exponent bit, then the mantissa.
    let mantissa = _mm512_set1_epi8(0x7f);
    let upper = _mm512_ternarylogic_epi64::<0xCA>(mantissa, _mm512_srli_epi16::<1>(high), raw);
    let lower = _mm512_ternarylogic_epi64::<0xCA>(mantissa, raw, _mm512_slli_epi16::<7>(high));
    [_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)]
}

/// Puts the next escapes where `mask` has a bit.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
#[inline]
fn put_escapes(planes: &mut Planes, mask: u64, high: __m512i) -> __m512i {
    let count = mask.count_ones() as usize;
    let mut buffer = [0; 64];
    let next = match planes.escapes.first_chunk::<64>() {
        Some(next) => next,
        None => {
            let have = planes.escapes.len();
            buffer[..have].copy_from_slice(planes.escapes);
            planes.missing |= have < count;
            &buffer
        }
    };
    // SAFETY: `next` has 64 bytes.
    let high = unsafe { _mm512_mask_expand_epi8(high, mask, _mm512_loadu_si512(next.as_ptr().cast())) };
    planes.escapes = &planes.escapes[count.min(planes.escapes.len())..];
    high
}

/// Raw bytes that are fetched ahead of use.
const AHEAD: usize = 1024;

/// The sum of each vector's lanes, in the order of [`crate::cpu::dot::reduce`], whose first step is done.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn reduce4([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
    // Halves of two rows, then quarters of four, side by side.
    let half =
        |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
    let (ab, cd) = (half(a, b), half(c, d));
    let quarters =
        _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd), _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd));
    let pairs = _mm512_add_ps(quarters, _mm512_permute_ps::<0b01_00_11_10>(quarters));
    let sums = _mm512_add_ps(pairs, _mm512_permute_ps::<0b10_11_00_01>(pairs));
    let mut lanes = [0.0f32; 16];
    // SAFETY: the array has 16 values.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sums) };
    [lanes[0], lanes[4], lanes[8], lanes[12]]
}

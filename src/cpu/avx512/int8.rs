//! INT8 products with VNNI, see [`crate::cpu::int8`].
//!
//! `vpdpbusd` multiplies unsigned bytes by signed ones: weights have 128 added (their sign bit flipped), and 128 times the
//! sum of the activations is taken off again.
//!
//! One row of activations: for 16 rows × 64 columns of weights 16 products, whose lanes a tree of additions turns into the
//! sums of two blocks for 16 rows side by side. A batch: 16 rows × 4 columns are packed into a vector, so that a lane is a
//! row and nothing is left to be added across lanes; 3 activations × 64 rows of sums stay in registers.

use std::arch::x86_64::*;

use crate::codec::BAND_ROWS;
use crate::cpu::int8::{BLOCK, Blocks, Weights};

/// True if the machine has the instructions.
pub(in crate::cpu) fn available() -> bool {
    super::available() && is_x86_feature_detected!("avx512vnni")
}

/// Rows between what is multiplied and what is fetched: 8 KiB, about half a microsecond of a core's reading.
const AHEAD: usize = 32;

/// See [`crate::cpu::int8::dot`].
pub(in crate::cpu) fn dot(weights: &Weights, scales: &[f32; BAND_ROWS], x: Blocks, y: &mut [f32]) {
    assert!(available() && y.len() == weights.rows() && y.len() <= BAND_ROWS);
    assert!(x.values.len() * BLOCK >= weights.stride() && x.scales.len() == x.values.len());
    assert!(x.offsets.len() == x.values.len());
    // SAFETY: the assertions above ensure that the CPU has the instructions and that all lengths fit.
    unsafe { dot_vnni(weights, scales, x, y) }
}

/// # Safety
/// `y` has a value for each row; `x` has as many blocks as a row, and a scale and an offset for each.
#[target_feature(enable = "fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dot_vnni(weights: &Weights, scales: &[f32; BAND_ROWS], x: Blocks, y: &mut [f32]) {
    let (rows, stride) = (weights.rows(), weights.stride());
    let flip = _mm512_set1_epi8(-128);
    for first in (0..rows).step_by(16) {
        let count = (rows - first).min(16);
        // Rows that are not there repeat the last one.
        let row = |i: usize| {
            // SAFETY: the row is one of `rows`, each of `stride` bytes.
            unsafe { weights.bytes().as_ptr().add((first + i.min(count - 1)) * stride) }
        };
        // The same columns of rows further down, or of what is multiplied next: only addresses, nothing is read there.
        let fetch: [*const u8; 16] = std::array::from_fn(|i| match (first + AHEAD + i).checked_sub(rows) {
            None => weights.bytes().as_ptr().wrapping_add((first + AHEAD + i) * stride),
            Some(beyond) => weights.next().as_ptr().wrapping_add(beyond * stride),
        });
        let mut t = _mm512_setzero_ps();
        for block in (0..stride / BLOCK).step_by(2) {
            // SAFETY: rows and activations have the 64 bytes of these two blocks, as the stride is a multiple of 64.
            let sums = unsafe {
                let x = _mm512_loadu_si512(x.values.as_ptr().add(block).cast());
                let product = |i: usize| {
                    let at = row(i).add(BLOCK * block);
                    _mm_prefetch::<_MM_HINT_T0>(fetch[i].wrapping_add(BLOCK * block).cast());
                    let w = _mm512_xor_si512(_mm512_loadu_si512(at.cast()), flip);
                    _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, x)
                };
                add_lanes(product)
            };
            for (sum, b) in sums.into_iter().zip(block..) {
                let sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(x.offsets[b]));
                t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x.scales[b]), t);
            }
        }
        let mask = (0xffffu32 >> (16 - count)) as __mmask16;
        // SAFETY: masked loads and stores touch `count` values of `y`; there are scales for 64 rows.
        unsafe {
            let (scale, at) = (_mm512_loadu_ps(scales.as_ptr().add(first)), y.as_mut_ptr().add(first));
            let sum = _mm512_fmadd_ps(t, scale, _mm512_maskz_loadu_ps(mask, at));
            _mm512_mask_storeu_ps(at, mask, sum);
        }
    }
}

/// Adds up the lower and the upper eight lanes of 16 vectors: lane `i` of the results belongs to vector `i`.
#[target_feature(enable = "avx512f")]
#[inline]
fn add_lanes(vector: impl Fn(usize) -> __m512i) -> [__m512i; 2] {
    let quad = |i: usize| {
        let [a, b, c, d] = [vector(4 * i), vector(4 * i + 1), vector(4 * i + 2), vector(4 * i + 3)];
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    };
    // A quarter of a vector has four rows; two quarters are a block.
    let pair = |a: __m512i, b: __m512i| {
        _mm512_add_epi32(_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b))
    };
    let (front, back) = (pair(quad(0), quad(1)), pair(quad(2), quad(3)));
    [_mm512_shuffle_i32x4::<0b10_00_10_00>(front, back), _mm512_shuffle_i32x4::<0b11_01_11_01>(front, back)]
}

/// See [`crate::cpu::int8::matmul`]; `x(row)` are the activations.
pub(in crate::cpu) fn matmul<'x>(
    weights: &Weights,
    scales: &[f32; BAND_ROWS],
    m: usize,
    x: &dyn Fn(usize) -> Blocks<'x>,
    y: &mut [f32],
    packed: &mut Vec<u8>,
) {
    assert!(available() && y.len() == m * weights.rows() && weights.rows() <= BAND_ROWS);
    packed.resize(weights.stride() * BAND_ROWS, 0);
    // SAFETY: the assertion above ensures that the CPU has the instructions; `packed` has room for 64 rows.
    unsafe { pack(weights, packed) };
    let mut row = 0;
    while row < m {
        row += match m - row {
            1 => rows_of::<1>(weights, scales, packed, x, row, y),
            2 => rows_of::<2>(weights, scales, packed, x, row, y),
            _ => rows_of::<3>(weights, scales, packed, x, row, y),
        };
    }
}

/// `M` rows of activations from `row` on.
fn rows_of<'x, const M: usize>(
    weights: &Weights,
    scales: &[f32; BAND_ROWS],
    packed: &[u8],
    x: &dyn Fn(usize) -> Blocks<'x>,
    row: usize,
    y: &mut [f32],
) -> usize {
    let x: [Blocks; M] = std::array::from_fn(|i| x(row + i));
    let blocks = weights.stride() / BLOCK;
    assert!(x.iter().all(|x| x.values.len() >= blocks && x.scales.len() >= blocks && x.offsets.len() >= blocks));
    assert!(packed.len() >= weights.stride() * BAND_ROWS);
    let n = weights.rows();
    // SAFETY: `matmul` has asserted that the CPU has the instructions; the lengths were asserted above.
    unsafe { rows_vnni(packed, blocks, scales, &x, &mut y[row * n..(row + M) * n], n) };
    M
}

/// Packs rows of weights, 128 added: `[columns / 4][64 rows][4 columns]`.
///
/// # Safety
/// `packed` has 64 times the stride; rows that are not there are left as they are.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn pack(weights: &Weights, packed: &mut [u8]) {
    let (rows, stride) = (weights.rows(), weights.stride());
    let flip = _mm512_set1_epi8(-128);
    for first in (0..rows).step_by(16) {
        let count = (rows - first).min(16);
        for col in (0..stride).step_by(64) {
            // SAFETY: the rows are there, each with 64 bytes from `col` on, as the stride is a multiple of 64; vector `k` of
            // the 16 goes to the 64 bytes of columns `col + 4 k` and rows from `first` on.
            unsafe {
                let row = |i: usize| {
                    let at = weights.bytes().as_ptr().add((first + i.min(count - 1)) * stride + col);
                    _mm512_xor_si512(_mm512_loadu_si512(at.cast()), flip)
                };
                let columns = transpose(row);
                for (k, column) in columns.into_iter().enumerate() {
                    let at = packed.as_mut_ptr().add((col / 4 + k) * 4 * BAND_ROWS + 4 * first);
                    _mm512_storeu_si512(at.cast(), column);
                }
            }
        }
    }
}

/// A 16×16 matrix of 32-bit values, transposed.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(row: impl Fn(usize) -> __m512i) -> [__m512i; 16] {
    // In quarters of four lanes: quarter `l` of `quads[i][j]` has column `4 l + j` of rows `4 i..4 i + 4`.
    let quads: [[__m512i; 4]; 4] = std::array::from_fn(|i| {
        let [a, b, c, d] = [row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3)];
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ]
    });
    let halves = |j: usize| {
        let [a, b, c, d] = [quads[0][j], quads[1][j], quads[2][j], quads[3][j]];
        let (even_front, even_back) =
            (_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d));
        let (odd_front, odd_back) =
            (_mm512_shuffle_i32x4::<0b11_01_11_01>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d));
        [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(even_front, even_back),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(odd_front, odd_back),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(even_front, even_back),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(odd_front, odd_back),
        ]
    };
    let by_column = [halves(0), halves(1), halves(2), halves(3)];
    std::array::from_fn(|column| by_column[column % 4][column / 4])
}

/// `M` rows of activations times packed weights, added to `y`, `M × n`.
///
/// # Safety
/// `packed` has `32 · blocks` columns of 64 rows; every `x` has so many blocks, scales and offsets; `y` has `M · n` values, and
/// `n` is at most 64.
#[target_feature(enable = "fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows_vnni<const M: usize>(
    packed: &[u8],
    blocks: usize,
    scales: &[f32; BAND_ROWS],
    x: &[Blocks; M],
    y: &mut [f32],
    n: usize,
) {
    let mut t = [[_mm512_setzero_ps(); 4]; M];
    for block in 0..blocks {
        let mut sums: [[__m512i; 4]; M] = std::array::from_fn(|i| {
            // SAFETY: every `x` has so many offsets.
            [unsafe { _mm512_set1_epi32(-*x[i].offsets.get_unchecked(block)) }; 4]
        });
        for k in 0..BLOCK / 4 {
            // SAFETY: `packed` has 256 bytes for each four columns, a block of activations 32.
            unsafe {
                let at = packed.as_ptr().add((block * BLOCK / 4 + k) * 4 * BAND_ROWS);
                let w: [__m512i; 4] = std::array::from_fn(|v| _mm512_loadu_si512(at.add(64 * v).cast()));
                for (sums, x) in sums.iter_mut().zip(x) {
                    let x: *const i32 = x.values.as_ptr().add(block).cast();
                    let x = _mm512_set1_epi32(x.add(k).read_unaligned());
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = _mm512_dpbusd_epi32(*sum, w, x);
                    }
                }
            }
        }
        for ((t, sums), x) in t.iter_mut().zip(sums).zip(x) {
            // SAFETY: every `x` has so many scales.
            let scale = unsafe { _mm512_set1_ps(*x.scales.get_unchecked(block)) };
            for (t, sum) in t.iter_mut().zip(sums) {
                *t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *t);
            }
        }
    }
    for (i, t) in t.into_iter().enumerate() {
        for (v, t) in t.into_iter().enumerate() {
            let count = n.saturating_sub(16 * v).min(16);
            let mask = (0xffffu32 >> (16 - count)) as __mmask16;
            // SAFETY: masked loads and stores touch `count` values of row `i` of `y`.
            unsafe {
                let scale = _mm512_loadu_ps(scales.as_ptr().add(16 * v));
                let at = y.as_mut_ptr().wrapping_add(i * n + 16 * v);
                let sum = _mm512_fmadd_ps(t, scale, _mm512_maskz_loadu_ps(mask, at));
                _mm512_mask_storeu_ps(at, mask, sum);
            }
        }
    }
}

//! AVX2: `maddubs` multiplies unsigned quants with signed activations and adds pairs to 16 bits.
//!
//! A group of four columns is two vectors of 8 rows. Pairs of products are added in 16 bits for as long as they cannot
//! overflow (15·127·2·8 for 4-bit quants); then one multiply-add with the scale, which both halves of a row's 32 bits
//! hold, gives 32-bit sums. `ZERO` is multiplied with the sums of activations in the same way and subtracted once a
//! block. 8-bit quants would overflow at once: their magnitudes are multiplied with activations that take their signs.
// Tiles are indexed by row and strip, as in the formulas.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Job, Panel};
use crate::codec::kquant::Format;
use crate::codec::kquant::strip::{PANEL, ROWS, StripFormat};

/// Rows of activations that share a panel's loads.
const TILE: usize = 4;

/// Bytes that are fetched before they are used, far enough ahead for the memory to answer.
pub(super) const AHEAD: usize = 4096;

/// True if the machine has every extension used here.
pub(super) fn available() -> bool {
    super::super::avx2::available() && is_x86_feature_detected!("f16c")
}

/// Fours whose products can be added in 16 bits.
const fn flush<F: Format>() -> usize {
    match F::BITS {
        8 => 1,
        6 => 2,
        5 => 4,
        _ => F::GROUP / 4,
    }
}

/// Group `g` of a plane of `bits` bits, 8 of its rows.
///
/// # Safety
/// `plane` is the start of a plane of more than `g` groups.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn plane(plane: *const u8, bits: u32, g: usize, half: usize) -> __m256i {
    let per = 8 / bits as usize;
    // SAFETY: 64 bytes of a plane hold `8/bits` groups, so that all of them lie within the plane.
    let bytes = unsafe { _mm256_loadu_si256(plane.add(g / per * 64 + 32 * half).cast()) };
    let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(bits as i32 * (g % per) as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi8((255 >> (8 - bits)) as u8 as i8))
}

/// Asks the memory for some bytes, which need not be there.
pub(super) fn fetch(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        // SAFETY: a hint reads nothing; every x86-64 CPU has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast()) }
    }
}

/// Weights of group of four `g` of a block, unpacked: 8 rows, and 8 more.
///
/// # Safety
/// `block` is the start of the block's `F::QUANTS` bytes, and `g` is less than `F::LEN / 4`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn weights<F: Format>(block: *const u8, g: usize) -> [__m256i; 2] {
    // SAFETY: the planes have as many groups as the block.
    unsafe {
        let low = [plane(block, F::LOW, g, 0), plane(block, F::LOW, g, 1)];
        if F::HIGH == 0 {
            return low;
        }
        let high = block.add(F::HIGH_PLANE);
        let (front, back) = (plane(high, F::HIGH, g, 0), plane(high, F::HIGH, g, 1));
        let up = _mm_cvtsi32_si128(F::LOW as i32);
        [_mm256_or_si256(low[0], _mm256_sll_epi16(front, up)), _mm256_or_si256(low[1], _mm256_sll_epi16(back, up))]
    }
}

/// `super::strip::unpack` for one block.
pub(super) fn unpack<F: Format>(quants: &[u8], panel: &mut [u8]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner<F: Format>(quants: &[u8], panel: &mut [u8]) {
        for (sub, out) in panel.chunks_exact_mut(8 * 64).enumerate() {
            for g in 0..8 {
                // SAFETY: `quants` has the block's bytes and `panel` 64 for each group, as the caller asserted.
                unsafe {
                    let [front, back] = weights::<F>(quants.as_ptr(), 8 * sub + g);
                    _mm256_storeu_si256(out.as_mut_ptr().add(64 * g).cast(), front);
                    _mm256_storeu_si256(out.as_mut_ptr().add(64 * g + 32).cast(), back);
                }
            }
        }
    }
    assert!(available() && quants.len() == F::QUANTS && panel.len() == ROWS * F::LEN);
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { inner::<F>(quants, panel) }
}

/// Products of a vector of quants with four activations in every lane, pairs added to 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn multiply<F: Format>(quants: __m256i, x: __m256i) -> __m256i {
    if F::BITS < 8 {
        return _mm256_maddubs_epi16(quants, x);
    }
    let signed = _mm256_xor_si256(quants, _mm256_set1_epi8(-128));
    _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed))
}

/// Scales of group `g` of 8 rows, in both halves of 32 bits; ones for formats without.
///
/// # Safety
/// `meta` is the start of the block's `F::META` bytes, and `g` is less than `F::LEN / F::GROUP`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn scales<F: Format>(meta: *const u8, g: usize, half: usize) -> __m256i {
    if F::LEN == 32 {
        return _mm256_set1_epi16(1);
    }
    // SAFETY: 16 bytes for each group.
    let wide = unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(meta.add(ROWS * g + 8 * half).cast())) };
    _mm256_blend_epi16::<0b1010_1010>(wide, _mm256_slli_epi32::<16>(wide))
}

/// The minima of two neighbouring groups of 8 rows as pairs of 16-bit numbers.
///
/// # Safety
/// As for [`scales`], with `pair` less than half the number of groups.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn minima<F: Format>(meta: *const u8, pair: usize, half: usize) -> __m256i {
    // SAFETY: 32 bytes for each pair of groups of 32, 16 for each of groups of 16.
    unsafe {
        if F::GROUP == 32 {
            _mm256_cvtepu8_epi16(_mm_loadu_si128(meta.add(F::SCALES + 2 * ROWS * pair + ROWS * half).cast()))
        } else {
            let both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(meta.add(F::SCALES + ROWS * pair + 8 * half).cast()));
            let spread = _mm256_or_si256(both, _mm256_slli_epi32::<12>(both));
            _mm256_and_si256(spread, _mm256_set1_epi32(0x000f_000f))
        }
    }
}

/// The sum over a block's groups of minimum times sum of activations. `at` is the block's first value of the activations.
///
/// # Safety
/// `meta` is the start of the block's `F::META` bytes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn minima_sum<F: Format>(job: &Job, meta: *const u8, at: usize, half: usize) -> __m256i {
    if F::LEN == 32 {
        return _mm256_set1_epi32(job.x.sums32[at / 32].into());
    }
    let sums = if F::GROUP == 16 { &job.x.sums16[at / 16..][..16] } else { &job.x.sums32[at / 32..][..8] };
    let mut total = _mm256_setzero_si256();
    for (pair, sums) in sums.chunks_exact(2).enumerate() {
        // SAFETY: two sums are 4 bytes; there is a pair for each.
        unsafe {
            let product = _mm256_madd_epi16(minima::<F>(meta, pair, half), broadcast(sums.as_ptr()));
            total = _mm256_add_epi32(total, product);
        }
    }
    total
}

/// Four bytes or two 16-bit numbers of an activation, in every lane.
///
/// # Safety
/// `at` is the start of 4 bytes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn broadcast<T>(at: *const T) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe { _mm256_set1_epi32(at.cast::<i32>().read_unaligned()) }
}

/// The `f16`s of 8 rows.
///
/// # Safety
/// `at` is the start of 16 bytes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn floats(at: *const u8) -> __m256 {
    // SAFETY: promised by the caller.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
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
#[target_feature(enable = "avx2,fma,f16c")]
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
    // The last quants are followed by the next strip's, past what follows them in this one.
    let strip_quants = job.strips[strip].quants.len();
    let strip_bytes = F::strip_bytes(strip_quants / F::QUANTS);
    let zero = _mm256_setzero_si256();
    // SAFETY: the caller's promises bound every index: `at` is a block's first value in the rows of activations.
    unsafe {
        let mut totals = [[_mm256_setzero_ps(); 2]; M];
        for m in 0..M {
            for h in 0..2 {
                totals[m][h] = _mm256_loadu_ps(y.add(m * stride + 8 * h));
            }
        }
        for (index, block) in blocks.enumerate() {
            let first = row * cols + block * F::LEN;
            let quants = quants.add(index * if UNPACKED { ROWS * F::LEN } else { F::QUANTS });
            let meta = job.strips[strip].meta.as_ptr().add(block * F::META);
            let ahead =
                AHEAD + if (block + 1) * F::QUANTS + AHEAD > strip_quants { strip_bytes - strip_quants } else { 0 };
            if !UNPACKED {
                fetch(meta.wrapping_add(strip_bytes), F::META);
            }
            let x = job.x.quants.as_ptr().add(first);
            let (mut products, mut zeros) = ([[zero; 2]; M], [[zero; 2]; M]);
            for group in 0..F::LEN / F::GROUP {
                let scales = [scales::<F>(meta, group, 0), scales::<F>(meta, group, 1)];
                if !UNPACKED {
                    // A few lines at a time: of many at once the CPU drops some.
                    let bytes = F::QUANTS / (F::LEN / F::GROUP);
                    fetch(quants.wrapping_add(ahead + group * bytes), bytes);
                }
                for part in 0..F::GROUP / 4 / flush::<F>() {
                    let mut sums = [[zero; 2]; M];
                    for four in 0..flush::<F>() {
                        let g = group * (F::GROUP / 4) + part * flush::<F>() + four;
                        let w = if UNPACKED {
                            let at = quants.add(64 * g).cast::<__m256i>();
                            [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))]
                        } else {
                            weights::<F>(quants, g)
                        };
                        for m in 0..M {
                            let x = broadcast(x.add(m * cols + 4 * g));
                            for h in 0..2 {
                                sums[m][h] = _mm256_add_epi16(sums[m][h], multiply::<F>(w[h], x));
                            }
                        }
                    }
                    for m in 0..M {
                        for h in 0..2 {
                            products[m][h] = _mm256_add_epi32(products[m][h], _mm256_madd_epi16(sums[m][h], scales[h]));
                        }
                    }
                }
                if F::ZERO != 0 && F::BITS < 8 {
                    for m in 0..M {
                        let sum = _mm256_set1_epi32(job.sum::<F>(first + m * cols + group * F::GROUP) as u16 as i32);
                        for h in 0..2 {
                            zeros[m][h] = _mm256_add_epi32(zeros[m][h], _mm256_madd_epi16(scales[h], sum));
                        }
                    }
                }
            }
            for h in 0..2 {
                let d = floats(meta.add(F::D + ROWS * h));
                let dmin = if F::MINS { floats(meta.add(F::D + 2 * ROWS + ROWS * h)) } else { d };
                for m in 0..M {
                    let at = first + m * cols;
                    let scale = _mm256_set1_ps(*job.x.scales.as_ptr().add(at / F::LEN));
                    let mut product = products[m][h];
                    if F::ZERO != 0 && F::BITS < 8 {
                        // A power of two.
                        let shift = _mm_cvtsi32_si128(F::ZERO.trailing_zeros() as i32);
                        product = _mm256_sub_epi32(product, _mm256_sll_epi32(zeros[m][h], shift));
                    }
                    let product = _mm256_cvtepi32_ps(product);
                    totals[m][h] = _mm256_fmadd_ps(product, _mm256_mul_ps(d, scale), totals[m][h]);
                    if F::MINS {
                        let minima = _mm256_cvtepi32_ps(minima_sum::<F>(job, meta, at, h));
                        totals[m][h] = _mm256_fnmadd_ps(minima, _mm256_mul_ps(dmin, scale), totals[m][h]);
                    }
                }
            }
        }
        for m in 0..M {
            for h in 0..2 {
                _mm256_storeu_ps(y.add(m * stride + 8 * h), totals[m][h]);
            }
        }
    }
}

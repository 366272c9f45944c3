//! AVX-512 VNNI: one instruction adds four columns to the sums of 16 rows.
//!
//! A vector holds a group of four columns (see [`crate::codec::kquant::strip`]); the activation's four quants are broadcast
//! to it. Few rows of activations: quants go from memory through registers into the products of four rows, two chains of
//! sums for each hide the instruction's latency. More rows: six rows × two strips of sums, so that two vectors of weights
//! serve twelve products.
// Tiles are indexed by row and strip, as in the formulas.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx2::{AHEAD, fetch};
use super::{Job, Panel};
use crate::codec::kquant::Format;
use crate::codec::kquant::strip::{PANEL, ROWS, StripFormat};

/// True if the machine has every extension used here.
pub(super) fn available() -> bool {
    super::super::avx512::available() && is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("f16c")
}

/// Weights of group of four `g` of a block, unpacked.
///
/// # Safety
/// `block` is the start of the block's `F::QUANTS` bytes, and `g` is less than `F::LEN / 4`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn weights<F: Format>(block: *const u8, g: usize) -> __m512i {
    // SAFETY: 64 bytes of a plane hold `8/bits` groups, so that all of them lie within the plane.
    unsafe {
        let load = |plane: usize, bits: u32| {
            let per = 8 / bits as usize;
            let bytes = _mm512_loadu_si512(block.add(plane + g / per * 64).cast());
            (bytes, bits as i32 * (g % per) as i32)
        };
        let (low, shift) = load(0, F::LOW);
        if F::LOW == 8 {
            return low;
        }
        let low = _mm512_srl_epi16(low, _mm_cvtsi32_si128(shift));
        let low = _mm512_and_si512(low, _mm512_set1_epi8((1 << F::LOW) - 1));
        if F::HIGH == 0 {
            return low;
        }
        let (high, shift) = load(F::HIGH_PLANE, F::HIGH);
        let shift = shift - F::LOW as i32;
        let high = if shift > 0 {
            _mm512_srl_epi16(high, _mm_cvtsi32_si128(shift))
        } else {
            _mm512_sll_epi16(high, _mm_cvtsi32_si128(-shift))
        };
        // (high & mask) | low
        let mask = _mm512_set1_epi8((((1 << F::HIGH) - 1) << F::LOW) as i8);
        _mm512_ternarylogic_epi64::<0xEA>(high, mask, low)
    }
}

/// `super::strip::unpack` for one block.
pub(super) fn unpack<F: Format>(quants: &[u8], panel: &mut [u8]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
    fn inner<F: Format>(quants: &[u8], panel: &mut [u8]) {
        for (sub, out) in panel.chunks_exact_mut(8 * 64).enumerate() {
            for g in 0..8 {
                // SAFETY: `quants` has the block's bytes and `panel` 64 for each group, as the caller asserted.
                unsafe {
                    _mm512_storeu_si512(out.as_mut_ptr().add(64 * g).cast(), weights::<F>(quants.as_ptr(), 8 * sub + g))
                };
            }
        }
    }
    assert!(available() && quants.len() == F::QUANTS && panel.len() == ROWS * F::LEN);
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe { inner::<F>(quants, panel) }
}

/// Scales of group `g` of a block's 16 rows.
///
/// # Safety
/// `meta` is the start of the block's `F::META` bytes, and `g` is less than `F::LEN / F::GROUP`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn scales(meta: *const u8, g: usize) -> __m512i {
    // SAFETY: 16 bytes for each group.
    unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(meta.add(ROWS * g).cast())) }
}

/// The minima of two neighbouring groups as pairs of 16-bit numbers.
///
/// # Safety
/// As for [`scales`], with `pair` less than half the number of groups.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn minima<F: Format>(meta: *const u8, pair: usize) -> __m512i {
    // SAFETY: 32 bytes for each pair of groups of 32, 16 for each of groups of 16.
    unsafe {
        if F::GROUP == 32 {
            _mm512_cvtepu8_epi16(_mm256_loadu_si256(meta.add(F::SCALES + 2 * ROWS * pair).cast()))
        } else {
            let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(meta.add(F::SCALES + ROWS * pair).cast()));
            let spread = _mm512_or_si512(both, _mm512_slli_epi32::<12>(both));
            _mm512_and_si512(spread, _mm512_set1_epi32(0x000f_000f))
        }
    }
}

/// The `f16`s of 16 rows.
///
/// # Safety
/// `at` is the start of 32 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn floats(at: *const u8) -> __m512 {
    // SAFETY: promised by the caller.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
}

/// Four bytes or two 16-bit numbers of an activation, in every lane.
///
/// # Safety
/// `at` is the start of 4 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn broadcast<T>(at: *const T) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe { _mm512_set1_epi32(at.cast::<i32>().read_unaligned()) }
}

/// The sum over a block's groups of minimum times sum of activations. `at` is the block's first value of the activations.
///
/// # Safety
/// `meta` is the start of the block's `F::META` bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn minima_sum<F: Format>(job: &Job, meta: *const u8, at: usize) -> __m512i {
    if F::LEN == 32 {
        return _mm512_set1_epi32(job.x.sums32[at / 32].into());
    }
    let sums = if F::GROUP == 16 { &job.x.sums16[at / 16..][..16] } else { &job.x.sums32[at / 32..][..8] };
    let mut total = _mm512_setzero_si512();
    for (pair, sums) in sums.chunks_exact(2).enumerate() {
        // SAFETY: two sums are 4 bytes; there is a pair for each.
        total = unsafe { _mm512_dpwssd_epi32(total, minima::<F>(meta, pair), broadcast(sums.as_ptr())) };
    }
    total
}

/// Writes the products of one strip with all rows of activations to `y`, which has the rows of all strips. Weights are
/// unpacked in registers, once for each four rows, the first time while they come from memory.
pub(super) fn few_rows<F: Format>(job: &Job, strip: usize, y: &mut [f32]) {
    assert!(available() && y.len() == job.x.rows * job.strips.len() * ROWS);
    for first in (0..job.x.rows).step_by(4) {
        // SAFETY: the assertion above ensures that the CPU has the instructions.
        unsafe {
            match job.x.rows - first {
                1 => few_avx512::<F, 1>(job, strip, first, y),
                2 => few_avx512::<F, 2>(job, strip, first, y),
                3 => few_avx512::<F, 3>(job, strip, first, y),
                _ => few_avx512::<F, 4>(job, strip, first, y),
            }
        }
    }
}

/// `M` rows of activations from `row` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
fn few_avx512<F: Format, const M: usize>(job: &Job, index: usize, row: usize, y: &mut [f32]) {
    let (strip, cols) = (&job.strips[index], job.x.cols);
    let mut totals = [_mm512_setzero_ps(); M];
    let blocks = strip.quants.chunks_exact(F::QUANTS).zip(strip.meta.chunks_exact(F::META));
    let strip_bytes = F::strip_bytes(strip.quants.len() / F::QUANTS);
    for (block, (quants, meta)) in blocks.enumerate() {
        let at = row * cols + block * F::LEN;
        // The last quants are followed by the next strip's, past what follows them in this one.
        let beyond = (block + 1) * F::QUANTS + AHEAD > strip.quants.len();
        let ahead = AHEAD + if beyond { strip_bytes - strip.quants.len() } else { 0 };
        fetch(meta.as_ptr().wrapping_add(strip_bytes), F::META);
        let x = job.x.quants[at..at + (M - 1) * cols + F::LEN].as_ptr();
        let (quants, meta) = (quants.as_ptr(), meta.as_ptr());
        let mut products = [_mm512_setzero_si512(); M];
        for sub in 0..F::LEN / 32 {
            // Two groups of 16, or the even and odd fours of one of 32.
            let mut sums = [[_mm512_setzero_si512(); 2]; M];
            for m in 0..M {
                let start = |half: usize| job.start::<F>(at + m * cols + 32 * sub + half * F::GROUP);
                sums[m][0] = _mm512_set1_epi32(start(0));
                if F::GROUP == 16 {
                    sums[m][1] = _mm512_set1_epi32(start(1));
                }
            }
            for g in 0..8 {
                let half = if F::GROUP == 16 { g / 4 } else { g % 2 };
                // SAFETY: the block has `F::LEN / 4` groups, and as many fours of each row of activations.
                unsafe {
                    // What lies behind the strips is never read.
                    let next = quants.wrapping_add((8 * sub + g) * 8 * F::BITS as usize + ahead);
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                    let weights = weights::<F>(quants, 8 * sub + g);
                    for m in 0..M {
                        let x = broadcast(x.add(m * cols + 32 * sub + 4 * g));
                        sums[m][half] = _mm512_dpbusd_epi32(sums[m][half], weights, x);
                    }
                }
            }
            // SAFETY: the block has a scale for each group.
            unsafe {
                if F::LEN == 32 {
                    for m in 0..M {
                        products[m] = _mm512_add_epi32(sums[m][0], sums[m][1]);
                    }
                } else if F::GROUP == 32 {
                    let scales = scales(meta, sub);
                    for m in 0..M {
                        let sum = _mm512_add_epi32(sums[m][0], sums[m][1]);
                        products[m] = _mm512_add_epi32(products[m], _mm512_mullo_epi32(sum, scales));
                    }
                } else {
                    let (first, second) = (scales(meta, 2 * sub), scales(meta, 2 * sub + 1));
                    for m in 0..M {
                        let first = _mm512_mullo_epi32(sums[m][0], first);
                        let second = _mm512_mullo_epi32(sums[m][1], second);
                        products[m] = _mm512_add_epi32(products[m], _mm512_add_epi32(first, second));
                    }
                }
            }
        }
        for m in 0..M {
            let at = at + m * cols;
            // SAFETY: the block's `d` and `dmin` are 32 bytes each.
            unsafe {
                let scale = _mm512_set1_ps(job.x.scales[at / F::LEN]);
                let factor = _mm512_mul_ps(floats(meta.add(F::D)), scale);
                totals[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[m]), factor, totals[m]);
                if F::MINS {
                    let factor = _mm512_mul_ps(floats(meta.add(F::D + 2 * ROWS)), scale);
                    let minima = _mm512_cvtepi32_ps(minima_sum::<F>(job, meta, at));
                    totals[m] = _mm512_fnmadd_ps(minima, factor, totals[m]);
                }
            }
        }
    }
    for m in 0..M {
        let y = &mut y[((row + m) * job.strips.len() + index) * ROWS..][..ROWS];
        // SAFETY: `y` has 16 values.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), totals[m]) }
    }
}

/// Adds to `y` the products of some blocks, whose panel is unpacked, with some rows of activations.
pub(super) fn rows<F: Format>(job: &Job, panel: &Panel, rows: Range<usize>, blocks: Range<usize>, y: &mut [f32]) {
    assert!(available() && y.len() == rows.len() * job.strips.len() * ROWS && blocks.len() * F::LEN <= 256);
    assert!(rows.end <= job.x.rows && blocks.end * F::LEN <= job.x.cols);
    // SAFETY: the assertion above ensures that the CPU has the instructions.
    unsafe {
        match job.strips {
            [_] => single_avx512::<F>(job, panel, rows, blocks, y),
            _ => rows_avx512::<F>(job, panel, rows, blocks, y),
        }
    }
}

/// Two strips.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
fn rows_avx512<F: Format>(job: &Job, panel: &Panel, mut rows: Range<usize>, blocks: Range<usize>, mut y: &mut [f32]) {
    let panel = panel.0.as_ptr();
    while !rows.is_empty() {
        let count = rows.len().min(6);
        let (now, later) = y.split_at_mut(count * 2 * ROWS);
        // SAFETY: rows and blocks are within the activations and strips, as the caller asserted.
        unsafe {
            match count {
                1 => tile::<F, 1, 2>(job, panel, rows.start, blocks.clone(), now),
                2 => tile::<F, 2, 2>(job, panel, rows.start, blocks.clone(), now),
                3 => tile::<F, 3, 2>(job, panel, rows.start, blocks.clone(), now),
                4 => tile::<F, 4, 2>(job, panel, rows.start, blocks.clone(), now),
                5 => tile::<F, 5, 2>(job, panel, rows.start, blocks.clone(), now),
                _ => tile::<F, 6, 2>(job, panel, rows.start, blocks.clone(), now),
            }
        }
        (y, rows.start) = (later, rows.start + count);
    }
}

/// One strip, as only the last of a matrix is.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
fn single_avx512<F: Format>(job: &Job, panel: &Panel, rows: Range<usize>, blocks: Range<usize>, y: &mut [f32]) {
    for (row, y) in rows.zip(y.chunks_exact_mut(ROWS)) {
        // SAFETY: rows and blocks are within the activations and strips, as the caller asserted.
        unsafe { tile::<F, 1, 1>(job, panel.0.as_ptr(), row, blocks.clone(), y) }
    }
}

/// `M` rows of activations times `C` strips.
///
/// # Safety
/// The rows from `row` on and the blocks are within the activations and strips, `panel` holds `C` panels with the blocks,
/// and `y` has `M × C × 16` values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn tile<F: Format, const M: usize, const C: usize>(
    job: &Job,
    panel: *const u8,
    row: usize,
    blocks: Range<usize>,
    y: &mut [f32],
) {
    let cols = job.x.cols;
    // Indexed loops throughout: what closures return would not stay in registers.
    let y = y.as_mut_ptr();
    // SAFETY: the caller's promises bound every index: `at` is a block's first value in the rows of activations.
    unsafe {
        let mut totals = [[_mm512_setzero_ps(); C]; M];
        let mut metas = [std::ptr::null(); C];
        for m in 0..M {
            for c in 0..C {
                totals[m][c] = _mm512_loadu_ps(y.add((m * C + c) * ROWS));
            }
        }
        for (index, block) in blocks.enumerate() {
            let first = row * cols + block * F::LEN;
            for c in 0..C {
                metas[c] = job.strips[c].meta.as_ptr().add(block * F::META);
            }
            let panel = panel.add(index * ROWS * F::LEN);
            let x = job.x.quants.as_ptr().add(first);
            let mut products = [[_mm512_setzero_si512(); C]; M];
            for group in 0..F::LEN / F::GROUP {
                let mut sums = [[_mm512_setzero_si512(); C]; M];
                if F::ZERO != 0 {
                    for m in 0..M {
                        let start = broadcast(job.bias.as_ptr().add((first + m * cols) / F::GROUP + group));
                        sums[m] = [start; C];
                    }
                }
                for g in group * F::GROUP / 4..(group + 1) * F::GROUP / 4 {
                    let mut w = [_mm512_setzero_si512(); C];
                    for c in 0..C {
                        w[c] = _mm512_loadu_si512(panel.add(c * PANEL + 64 * g).cast());
                    }
                    for m in 0..M {
                        let x = broadcast(x.add(m * cols + 4 * g));
                        for c in 0..C {
                            sums[m][c] = _mm512_dpbusd_epi32(sums[m][c], w[c], x);
                        }
                    }
                }
                if F::LEN == 32 {
                    products = sums;
                } else {
                    for c in 0..C {
                        let scales = scales(metas[c], group);
                        for m in 0..M {
                            products[m][c] = _mm512_add_epi32(products[m][c], _mm512_mullo_epi32(sums[m][c], scales));
                        }
                    }
                }
            }
            let mut minima_of = [[_mm512_setzero_si512(); C]; M];
            if F::MINS && F::LEN == 32 {
                for m in 0..M {
                    minima_of[m] = [_mm512_set1_epi32((*job.x.sums32.as_ptr().add((first + m * cols) / 32)).into()); C];
                }
            } else if F::MINS {
                let sums = if F::GROUP == 16 { job.x.sums16.as_ptr() } else { job.x.sums32.as_ptr() };
                for pair in 0..F::LEN / F::GROUP / 2 {
                    let mut pairs = [_mm512_setzero_si512(); C];
                    for c in 0..C {
                        pairs[c] = minima::<F>(metas[c], pair);
                    }
                    for m in 0..M {
                        let sums = broadcast(sums.add((first + m * cols) / F::GROUP + 2 * pair));
                        for c in 0..C {
                            minima_of[m][c] = _mm512_dpwssd_epi32(minima_of[m][c], pairs[c], sums);
                        }
                    }
                }
            }
            for c in 0..C {
                let d = floats(metas[c].add(F::D));
                let dmin = if F::MINS { floats(metas[c].add(F::D + 2 * ROWS)) } else { d };
                for m in 0..M {
                    let scale = _mm512_set1_ps(*job.x.scales.as_ptr().add((first + m * cols) / F::LEN));
                    let product = _mm512_cvtepi32_ps(products[m][c]);
                    totals[m][c] = _mm512_fmadd_ps(product, _mm512_mul_ps(d, scale), totals[m][c]);
                    if F::MINS {
                        let minima = _mm512_cvtepi32_ps(minima_of[m][c]);
                        totals[m][c] = _mm512_fnmadd_ps(minima, _mm512_mul_ps(dmin, scale), totals[m][c]);
                    }
                }
            }
        }
        for m in 0..M {
            for c in 0..C {
                _mm512_storeu_ps(y.add((m * C + c) * ROWS), totals[m][c]);
            }
        }
    }
}

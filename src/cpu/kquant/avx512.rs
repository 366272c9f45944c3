//! AVX-512 VNNI: one instruction adds four columns to the sums of 16 rows.
//!
//! A vector holds a group of four columns (see [`crate::codec::kquant::strip`]); the activation's four quants are broadcast
//! to it. Quants go from memory or the cache through registers into the products of up to six rows of activations with two
//! strips: 12 of the 32 vector registers are sums of products, 12 sums over groups, and the two vectors of weights and the
//! six broadcasts of a step are 8 loads for 12 products, of which the CPU (Zen 5) takes two a cycle each.
// Tiles are indexed by row and strip, as in the formulas.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use super::avx2::{AHEAD, fetch};
use super::{Job, STRIPS, Strip};
use crate::codec::kquant::strip::{ROWS, StripFormat};
use crate::codec::kquant::{Activation, Format, GgmlType, Parts};
use crate::cpu::zeros::Columns;

/// Rows of activations that share weights in registers.
const TILE: usize = 6;
/// Bytes of strips that are unpacked at once, at most: half of a second-level cache.
const UNPACKED: usize = 1 << 19;

thread_local! {
    /// Unpacked strips.
    static PANELS: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A format whose quants have been unpacked to a byte each.
struct Bytes<F>(PhantomData<F>);

impl<F: Format> Format for Bytes<F> {
    const TYPE: GgmlType = F::TYPE;
    const LEN: usize = F::LEN;
    const BYTES: usize = F::BYTES;
    const GROUP: usize = F::GROUP;
    const BITS: u32 = 8;
    const ZERO: u8 = F::ZERO;
    const MINS: bool = F::MINS;
    type Unpacked = Bytes<F>;

    fn parts(block: &[u8], parts: &mut Parts) {
        F::parts(block, parts)
    }
}

/// True if it is faster to unpack weights once, to the second-level cache, than for every tile (measured: where unpacking takes
/// most and groups are small; products hide it elsewhere).
fn unpacked_first<F: Format>(x: &Activation) -> bool {
    F::BITS < 8 && F::HIGH > 0 && F::GROUP == 16 && x.rows >= 40 && STRIPS * ROWS * x.cols <= UNPACKED
}

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

/// Writes the products of one or two strips with all rows of activations to `y`.
pub(super) fn rows<F: Format>(job: &Job, y: &mut Columns) {
    assert!(available());
    let groups = |of: usize| job.x.rows * (job.x.cols / of);
    assert!(F::ZERO == 0 || job.bias.len() == groups(F::GROUP));
    assert!(
        job.x.scales.len() == groups(F::LEN) && job.x.sums16.len() == groups(16) && job.x.sums32.len() == groups(32)
    );
    if !unpacked_first::<F>(job.x) {
        return tiles::<F>(job, true, y);
    }
    let bytes = ROWS * job.x.cols;
    let mut panels = PANELS.take();
    panels.resize(job.strips.len() * bytes, 0);
    for (strip, panel) in job.strips.iter().zip(panels.chunks_exact_mut(bytes)) {
        unpack::<F>(strip.quants, panel);
    }
    let strips = job.strips.iter().zip(panels.chunks_exact(bytes));
    let strips: Vec<Strip> = strips.map(|(strip, quants)| Strip { quants, meta: strip.meta }).collect();
    tiles::<Bytes<F::Unpacked>>(&Job { strips: &strips, ..*job }, false, y);
    PANELS.set(panels);
}

/// [`strip::unpack`](crate::codec::kquant::strip::unpack) for all blocks of a strip.
fn unpack<F: Format>(quants: &[u8], panel: &mut [u8]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
    fn inner<F: Format>(quants: &[u8], panel: &mut [u8]) {
        for (block, out) in quants.chunks_exact(F::QUANTS).zip(panel.chunks_exact_mut(ROWS * F::LEN)) {
            fetch(block.as_ptr().wrapping_add(AHEAD), F::QUANTS);
            for (sub, out) in out.chunks_exact_mut(8 * 64).enumerate() {
                for g in 0..8 {
                    // SAFETY: `block` has all the block's bytes, `out` 64 for each group of four.
                    unsafe {
                        let weights = weights::<F>(block.as_ptr(), 8 * sub + g);
                        _mm512_storeu_si512(out.as_mut_ptr().add(64 * g).cast(), weights);
                    }
                }
            }
        }
    }
    // SAFETY: the caller asserted that the CPU has the instructions.
    unsafe { inner::<F>(quants, panel) }
}

/// Goes over the rows of activations a tile at a time. `memory`: strips come from memory the first time, and are asked for
/// ahead.
fn tiles<F: Format>(job: &Job, memory: bool, y: &mut Columns) {
    let rows = job.x.rows;
    // As equal as can be: a lone last row would take as long as two.
    let tiles = rows.div_ceil(TILE).max(1);
    for tile in 0..tiles {
        let rows = rows * tile / tiles..rows * (tile + 1) / tiles;
        if memory && tile == 0 {
            rows_of::<F, true>(job, rows, y);
        } else {
            rows_of::<F, false>(job, rows, y);
        }
    }
}

/// One tile's rows of activations, or, with a lone strip as only the last of a matrix is, one after the other.
fn rows_of<F: Format, const FETCH: bool>(job: &Job, rows: Range<usize>, y: &mut Columns) {
    let row = rows.start;
    // SAFETY: callers asserted that the CPU has the instructions.
    unsafe {
        match (rows.len(), job.strips.len()) {
            (1, count) => (0..count).for_each(|strip| tile_of::<F, 1, 1, FETCH>(job, strip, row, y)),
            (2, 2) => tile_of::<F, 2, 2, FETCH>(job, 0, row, y),
            (3, 2) => tile_of::<F, 3, 2, FETCH>(job, 0, row, y),
            (4, 2) => tile_of::<F, 4, 2, FETCH>(job, 0, row, y),
            (5, 2) => tile_of::<F, 5, 2, FETCH>(job, 0, row, y),
            (6, 2) => tile_of::<F, 6, 2, FETCH>(job, 0, row, y),
            _ => rows.for_each(|row| tile_of::<F, 1, 1, FETCH>(job, 0, row, y)),
        }
    }
}

/// `M` rows of activations from `row` on times `C` strips from `strip` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
fn tile_of<F: Format, const M: usize, const C: usize, const FETCH: bool>(
    job: &Job,
    strip: usize,
    row: usize,
    y: &mut Columns,
) {
    let (cols, groups) = (job.x.cols, job.x.cols / F::GROUP);
    let strips: &[Strip; C] = job.strips[strip..].first_chunk().expect("as many strips");
    let (blocks, strip_quants) = (cols / F::LEN, strips[0].quants.len());
    let strip_bytes = F::strip_bytes(blocks);
    let mut totals = [[_mm512_setzero_ps(); C]; M];
    for block in 0..blocks {
        let at = row * cols + block * F::LEN;
        let x = job.x.quants[at..at + (M - 1) * cols + F::LEN].as_ptr();
        let bias = job.bias.as_ptr().wrapping_add(at / F::GROUP);
        let mut quants = [std::ptr::null(); C];
        let mut metas = [std::ptr::null(); C];
        for c in 0..C {
            quants[c] = strips[c].quants[block * F::QUANTS..][..F::QUANTS].as_ptr();
            metas[c] = strips[c].meta[block * F::META..][..F::META].as_ptr();
        }
        // The last quants are followed by the next strips', past what follows them in these.
        let beyond = (block + 1) * F::QUANTS + AHEAD > strip_quants;
        let ahead = AHEAD + if beyond { C * strip_bytes - strip_quants } else { 0 };
        if FETCH {
            for c in 0..C {
                fetch(metas[c].wrapping_add(C * strip_bytes), F::META);
            }
        }
        let mut products = [[_mm512_setzero_si512(); C]; M];
        for sub in 0..F::LEN / 32 {
            for group in 0..32 / F::GROUP {
                // Two chains of sums where there are few, to hide the instruction's latency.
                let chains = if M * C <= 4 { 2 } else { 1 };
                let mut sums = [[[_mm512_setzero_si512(); C]; M]; 2];
                if F::ZERO != 0 {
                    for m in 0..M {
                        // SAFETY: there is one for each group of the activations.
                        let start = unsafe { broadcast(bias.add(m * groups + 32 / F::GROUP * sub + group)) };
                        sums[0][m] = [start; C];
                    }
                }
                for g in group * F::GROUP / 4..(group + 1) * F::GROUP / 4 {
                    // SAFETY: the block has `F::LEN / 4` groups of four, and as many fours of each row of activations.
                    unsafe {
                        let mut w = [_mm512_setzero_si512(); C];
                        for c in 0..C {
                            // A line at a time: of many at once the CPU drops some. What lies behind the strips is never read.
                            if FETCH && g < F::BITS as usize {
                                let line = sub * F::BITS as usize + g;
                                _mm_prefetch::<_MM_HINT_T0>(quants[c].wrapping_add(ahead + 64 * line).cast());
                            }
                            w[c] = weights::<F>(quants[c], 8 * sub + g);
                        }
                        for m in 0..M {
                            let x = broadcast(x.add(m * cols + 32 * sub + 4 * g));
                            for c in 0..C {
                                let sum = &mut sums[g % chains][m][c];
                                *sum = _mm512_dpbusd_epi32(*sum, w[c], x);
                            }
                        }
                    }
                }
                for c in 0..C {
                    let mut scales = sums[0][0][c];
                    if F::LEN != 32 {
                        // SAFETY: a block of 256 has a scale for each group.
                        scales = unsafe { self::scales(metas[c], 32 / F::GROUP * sub + group) };
                    }
                    for m in 0..M {
                        let mut sum = sums[0][m][c];
                        if chains == 2 {
                            sum = _mm512_add_epi32(sum, sums[1][m][c]);
                        }
                        products[m][c] = if F::LEN == 32 {
                            sum
                        } else {
                            _mm512_add_epi32(products[m][c], _mm512_mullo_epi32(sum, scales))
                        };
                    }
                }
            }
        }
        // SAFETY: `d` and `dmin` are 32 bytes each; the activations have a scale for each block, sums for each group.
        unsafe { add_block::<F, M, C>(job, &metas, at, &products, &mut totals) }
    }
    for m in 0..M {
        for c in 0..C {
            let y = &mut y.row(row + m)[(strip + c) * ROWS..][..ROWS];
            // SAFETY: `y` has 16 values.
            unsafe { _mm512_storeu_ps(y.as_mut_ptr(), totals[m][c]) }
        }
    }
}

/// Adds a block's products, less the minima's part, to the totals. `at` is the block's first value of the activations.
///
/// # Safety
/// `metas` are starts of the block's `F::META` bytes; the block is within the `M` rows of activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn add_block<F: Format, const M: usize, const C: usize>(
    job: &Job,
    metas: &[*const u8; C],
    at: usize,
    products: &[[__m512i; C]; M],
    totals: &mut [[__m512; C]; M],
) {
    let cols = job.x.cols;
    // SAFETY: promised by the caller.
    unsafe {
        let mut factors = [[_mm512_setzero_ps(); C]; M];
        for m in 0..M {
            let scale = _mm512_set1_ps(*job.x.scales.get_unchecked((at + m * cols) / F::LEN));
            factors[m] = [scale; C];
        }
        for c in 0..C {
            let d = floats(metas[c].add(F::D));
            for m in 0..M {
                let factor = _mm512_mul_ps(d, factors[m][c]);
                totals[m][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[m][c]), factor, totals[m][c]);
            }
        }
        if F::MINS {
            let minima = minima_sums::<F, M, C>(job, metas, at);
            for c in 0..C {
                let dmin = floats(metas[c].add(F::D + 2 * ROWS));
                for m in 0..M {
                    let factor = _mm512_mul_ps(dmin, factors[m][c]);
                    totals[m][c] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(minima[m][c]), factor, totals[m][c]);
                }
            }
        }
    }
}

/// The sums over a block's groups of minimum times sum of activations. `at` is the block's first value of the activations.
///
/// # Safety
/// As for [`add_block`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn minima_sums<F: Format, const M: usize, const C: usize>(
    job: &Job,
    metas: &[*const u8; C],
    at: usize,
) -> [[__m512i; C]; M] {
    let cols = job.x.cols;
    let mut totals = [[_mm512_setzero_si512(); C]; M];
    // SAFETY: the activations have a sum for each group of the block, two of which are 4 bytes.
    unsafe {
        if F::LEN == 32 {
            for m in 0..M {
                totals[m] = [_mm512_set1_epi32((*job.x.sums32.get_unchecked((at + m * cols) / 32)).into()); C];
            }
            return totals;
        }
        let sums = if F::GROUP == 16 { job.x.sums16.as_ptr() } else { job.x.sums32.as_ptr() };
        for pair in 0..F::LEN / F::GROUP / 2 {
            let mut pairs = [_mm512_setzero_si512(); C];
            for c in 0..C {
                pairs[c] = minima::<F>(metas[c], pair);
            }
            for m in 0..M {
                let sums = broadcast(sums.add((at + m * cols) / F::GROUP + 2 * pair));
                for c in 0..C {
                    totals[m][c] = _mm512_dpwssd_epi32(totals[m][c], pairs[c], sums);
                }
            }
        }
    }
    totals
}

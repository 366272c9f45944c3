//! The first pass over a matrix: its kind, classes, frequencies, scales and predictors.

use rayon::prelude::*;

use super::options::{Codec, Options};
use super::rate;
use super::source::Source;
use crate::Result;
use crate::codec::band::{classify, symbols};
use crate::codec::levels::{self, LevelSums};
use crate::codec::plan::Stage;
use crate::codec::quant::{self, Scales};
use crate::codec::table::entropy_bits;
use crate::codec::{ClassMap, Coding, Dtype, FreqTable, Kind, Plan, Predictor, Rect, ScaleLayout};
use crate::cpu::{self, Backend};

/// What the second pass needs.
#[derive(Debug)]
pub(crate) struct Analysis {
    /// The complete plan.
    pub plan: Plan,
    /// Scales as little-endian `f32`s.
    pub scales: Vec<u8>,
    /// For each tile the predictors worth measuring; empty where only `none` is allowed.
    pub candidates: Vec<Candidates>,
}

/// A set of predictors, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Candidates(u8);

impl Candidates {
    pub fn contains(self, mode: Predictor) -> bool {
        self.0 >> mode as u8 & 1 == 1
    }

    pub fn several(self) -> bool {
        self.0.count_ones() > 1
    }

    fn insert(&mut self, mode: Predictor) {
        self.0 |= 1 << mode as u8;
    }
}

/// Counts of byte symbols.
pub(crate) type Counts = [u64; 256];

/// Buffers of one thread.
#[derive(Default)]
pub(crate) struct Buffers {
    pub codes: Vec<u32>,
    pub values: Vec<f32>,
    pub classes: Vec<u8>,
    pub plane: Vec<u8>,
    pub shifts: Vec<u8>,
    pub bytes: Vec<u8>,
    pub residuals: Vec<u8>,
}

/// Chooses how to code `source`.
pub(crate) fn analyse(source: &Source, options: &Options) -> Result<Analysis> {
    options.validate()?;
    let quantisable = matches!(source.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32);
    match options.codec {
        Codec::Int8 if quantisable => {
            let layout = options.scale.unwrap_or(ScaleLayout::Row);
            if let Some(scales) = int8_scales(source, layout) {
                return Ok(int8(source, options.stage, layout, scales));
            }
        }
        Codec::Rate { bits } if quantisable => {
            let layout = options.scale.unwrap_or(ScaleLayout::Matrix);
            return Ok(rate::search(source, layout, bits));
        }
        _ => {}
    }
    if source.dtype == Dtype::I8 {
        return Ok(int8(source, options.stage, ScaleLayout::None, Vec::new()));
    }
    Ok(lossless_float(source, options.stage))
}

/// Every tile's index, in parallel.
pub(crate) fn tiles(source: &Source) -> impl IndexedParallelIterator<Item = usize> + use<> {
    (0..source.geometry.tiles()).into_par_iter()
}

fn lossless_float(source: &Source, stage: Stage) -> Analysis {
    let narrow = source.dtype == Dtype::Bf16
        || matches!(source.dtype, Dtype::F16 | Dtype::F32)
            && tiles(source).all(|tile| source.narrows(source.geometry.tile(tile), &mut Vec::new()));
    let kind = if narrow { Kind::Bf16 } else { Kind::of(source.dtype) };
    let mut plan = float_plan(kind, source.dtype, stage);
    if plan.class_bits == 0 {
        return Analysis { plan, scales: Vec::new(), candidates: Vec::new() };
    }
    let mut scales = Vec::new();
    if plan.allows_levels() {
        let leveled = Plan { scale: ScaleLayout::Levels, ..plan.clone() };
        let step = source.geometry.tiles().div_ceil(SAMPLED_TILES);
        let without = marginal(&joint_highs(source, &plan, &[], step));
        let levels = fit_levels(source, &plan, commonest(&without));
        let with = marginal(&joint_highs(source, &leveled, &levels, step));
        if levels_pay(source, [&without, &with], levels.len()) {
            (plan, scales) = (leveled, levels);
        }
    }
    let joint = joint_highs(source, &plan, &scales, 1);
    let highs = marginal(&joint);
    if plan.map.escape.is_some() {
        plan.map = ClassMap::commonest(&highs, plan.class_bits);
    }
    let class = plan.map.lookup(plan.class_bits);
    let mut counts = [0u64; 256];
    for (pair, &count) in joint.iter().enumerate().filter(|&(_, &count)| count > 0) {
        let (first, second) = (class[pair & 255] as usize, class[pair >> 8] as usize);
        if plan.class_bits == 4 {
            counts[first | second << 4] += count;
        } else {
            counts[first] += count;
            counts[second] += count;
        }
    }
    count_padding(source, &plan, &scales, &mut counts);
    plan.freqs = Some(FreqTable::from_counts(&counts));
    Analysis { plan, scales, candidates: Vec::new() }
}

/// Tiles on which it is decided whether levels pay.
const SAMPLED_TILES: usize = 16;

/// Levels are for matrices whose rows and columns differ: they must save more than their own bytes, and more than a
/// trifle. Judged on the counts of high parts in some of the tiles, without and with levels.
fn levels_pay(source: &Source, counts: [&Counts; 2], bytes: usize) -> bool {
    let sampled: u64 = counts[0].iter().sum();
    let [without, with] = counts.map(entropy_bits);
    let weights = (source.geometry.rows * source.geometry.cols) as u128;
    let own = (8 * 65_536 * bytes) as u128 * u128::from(sampled) / weights;
    u128::from(with) + own + u128::from(without) / 500 < u128::from(without)
}

/// Counts of single high parts from those of pairs.
fn marginal(joint: &[u64]) -> Counts {
    let mut highs = [0u64; 256];
    for (pair, &count) in joint.iter().enumerate() {
        highs[pair & 255] += count;
        highs[pair >> 8] += count;
    }
    highs
}

/// The most frequent high part.
fn commonest(counts: &Counts) -> u8 {
    (0..=255).max_by_key(|&high| counts[usize::from(high)]).unwrap_or(0)
}

/// Levels of rows and columns from their mean exponents. Those far from `middle` (zeros, infinities, outliers) count as
/// if they were there: a few of them must not move a row.
fn fit_levels(source: &Source, plan: &Plan, middle: u8) -> Vec<u8> {
    let Some(float) = plan.float_bits() else { return Vec::new() };
    let geometry = source.geometry;
    let sum = |(mut sums, mut buffers): (LevelSums, Buffers), tile| {
        let rect = geometry.tile(tile);
        for band in (0..rect.bands()).map(|index| rect.band(index)) {
            cpu::vectorize(
                Backend::best(),
                #[inline(always)]
                || {
                    source.codes(plan, Scales::None, band, &mut buffers.codes, &mut buffers.values);
                    for (row, codes) in buffers.codes.chunks_exact(band.cols).enumerate() {
                        let high = |&code: &u32| {
                            let high = float.high(code);
                            if high.abs_diff(middle) < 8 { high } else { middle }
                        };
                        sums.add(band.row + row, band.col, codes.iter().map(high));
                    }
                },
            );
        }
        (sums, buffers)
    };
    let zero = || LevelSums::new(geometry.rows, geometry.cols);
    let sums = tiles(source).fold(|| (zero(), Buffers::default()), sum).map(|(sums, _)| sums);
    sums.reduce(zero, LevelSums::merge).levels()
}

fn float_plan(kind: Kind, dtype: Dtype, stage: Stage) -> Plan {
    let (class_bits, coding) = match stage {
        Stage::Rans => (4, Coding::Rans),
        // Four plain bits for a four-bit exponent would gain nothing.
        Stage::Fixed12 if kind == Kind::F8E4M3 => (0, Coding::Plain),
        Stage::Fixed12 => (4, Coding::Plain),
        Stage::Fixed11 => (3, Coding::Plain),
    };
    Plan::new(kind, dtype, class_bits, coding, ScaleLayout::None)
}

/// How often each pair of high parts occurs in every `step`th tile, as `first | second << 8`.
fn joint_highs(source: &Source, plan: &Plan, levels: &[u8], step: usize) -> Vec<u64> {
    let Some(float) = plan.float_bits() else {
        return vec![0; 1 << 16];
    };
    let count = |(mut joint, mut buffers): (Vec<u64>, Buffers), tile| {
        let rect = source.geometry.tile(tile);
        for band in 0..rect.bands() {
            let band = rect.band(band);
            let scales = Scales::of(plan.scale, levels, source.geometry, tile, &band);
            cpu::vectorize(
                Backend::best(),
                #[inline(always)]
                || {
                    let Buffers { codes, values, shifts, bytes, .. } = &mut buffers;
                    source.codes(plan, scales, band, codes, values);
                    levels::shifts(&scales, band.cols, shifts);
                    bytes.clear();
                    bytes.extend(codes.iter().map(|&c| float.high(c)));
                    bytes.iter_mut().zip(shifts.iter()).for_each(|(high, &shift)| *high = high.wrapping_sub(shift));
                },
            );
            let mut pairs = buffers.bytes.chunks_exact(2);
            for pair in &mut pairs {
                joint[usize::from(pair[0]) | usize::from(pair[1]) << 8] += 1;
            }
            if let [last] = *pairs.remainder() {
                joint[usize::from(last) | usize::from(last) << 8] += 1;
            }
        }
        (joint, buffers)
    };
    let start = || (vec![0u64; 1 << 16], Buffers::default());
    let add = |mut a: Vec<u64>, b: Vec<u64>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    };
    tiles(source).step_by(step).fold(start, count).map(|(joint, _)| joint).reduce(|| vec![0; 1 << 16], add)
}

/// Makes sure that symbols which occur only in padding, or only where an odd band ends, have a frequency.
fn count_padding(source: &Source, plan: &Plan, scales: &[u8], counts: &mut Counts) {
    let geometry = source.geometry;
    let even = geometry.cols.is_multiple_of(64);
    if even || plan.class_bits != 4 {
        counts[0] += u64::from(!even);
        return;
    }
    counts[0] += 1;
    for tile in 0..geometry.tiles() {
        let rect = geometry.tile(tile);
        for band in (0..rect.bands()).map(|b| rect.band(b)).filter(|b| b.weights() % 2 == 1) {
            let (row, col) = (band.row + band.rows - 1, band.col + band.cols - 1);
            let last = Rect { row, col, rows: 1, cols: 1 };
            let own = Scales::of(plan.scale, scales, geometry, tile, &last);
            let Buffers { codes, values, classes, plane, shifts, .. } = &mut Buffers::default();
            source.codes(plan, own, last, codes, values);
            levels::shifts(&own, 1, shifts);
            classify(plan, codes, shifts, classes);
            symbols(plan, classes, plane);
            counts[plane[0] as usize] += 1;
        }
    }
}

/// The scales that take the largest magnitudes to ±127; `None` if a weight is not finite.
fn int8_scales(source: &Source, layout: ScaleLayout) -> Option<Vec<u8>> {
    let geometry = source.geometry;
    // For each tile the largest magnitude of each of its rows.
    let maxima = |tile: usize, buffers: &mut Buffers| -> Option<Vec<f32>> {
        let rect = geometry.tile(tile);
        source.values(rect, &mut buffers.codes, &mut buffers.values);
        let max = |row: &[f32]| {
            // On bits, where NaN and infinity are the largest: `f32::max` would drop a NaN.
            let bits = row.iter().fold(0, |m: u32, v| m.max(v.to_bits() & 0x7fff_ffff));
            (bits < 0x7f80_0000).then_some(f32::from_bits(bits))
        };
        buffers.values.chunks(rect.cols).map(max).collect()
    };
    let tiles: Vec<Option<Vec<f32>>> =
        tiles(source).map_init(Buffers::default, |buffers, tile| maxima(tile, buffers)).collect();
    let tiles: Vec<Vec<f32>> = tiles.into_iter().collect::<Option<_>>()?;
    let largest = |rows: &[f32]| rows.iter().copied().fold(0.0, f32::max);
    let maxima: Vec<f32> = match layout {
        ScaleLayout::Row => {
            let across = tiles.chunks(geometry.tile_cols());
            let row = |tiles: &[Vec<f32>], row| tiles.iter().map(|t: &Vec<f32>| t[row]).fold(0.0, f32::max);
            across.flat_map(|tiles| (0..tiles[0].len()).map(|r| row(tiles, r)).collect::<Vec<f32>>()).collect()
        }
        ScaleLayout::Tile => tiles.iter().map(|t| largest(t)).collect(),
        _ => vec![tiles.iter().map(|t| largest(t)).fold(0.0, f32::max)],
    };
    Some(maxima.into_iter().flat_map(|max| quant::int8_scale(max).to_le_bytes()).collect())
}

fn int8(source: &Source, stage: Stage, layout: ScaleLayout, scales: Vec<u8>) -> Analysis {
    let mut plan = match stage {
        Stage::Rans => Plan::new(Kind::Int8, source.dtype, 8, Coding::Rans, layout),
        Stage::Fixed12 => Plan::raw(Kind::Int8, source.dtype, layout),
        Stage::Fixed11 => Plan::new(Kind::Int8, source.dtype, 3, Coding::Plain, layout),
    };
    if plan.class_bits == 0 {
        return Analysis { plan, scales, candidates: Vec::new() };
    }
    let tile = |buffers: &mut Buffers, tile| {
        let counts = tile_counts(source, &plan, &scales, tile, buffers);
        let bits: Vec<u64> = counts.iter().map(entropy_bits).collect();
        let best = (0..5).min_by_key(|&m| (bits[m], m)).unwrap_or(0);
        let mut candidates = Candidates::default();
        for mode in Predictor::ALL {
            // Sampled: within 2% the second pass measures.
            if bits[mode as usize] <= bits[best] + bits[best] / 50 {
                candidates.insert(mode);
            }
        }
        (candidates, Predictor::ALL[best])
    };
    let chosen: Vec<(Candidates, Predictor)> = tiles(source).map_init(Buffers::default, tile).collect();
    let counts = tiles(source)
        .map_init(Buffers::default, |buffers, tile| {
            // The whole tile under every candidate, so that each of them has frequencies for all that it may meet.
            let mut counts = [0u64; 256];
            for mode in Predictor::ALL.into_iter().filter(|&m| m == chosen[tile].1) {
                residuals(source, &plan, &scales, tile, mode, buffers, |residuals| {
                    residuals.iter().for_each(|&r| counts[r as usize] += 1);
                });
            }
            counts
        })
        .reduce(|| [0; 256], add_counts);
    let mut counts = counts;
    if plan.class_bits == 3 {
        let mut highs = [0u64; 256];
        counts.iter().enumerate().for_each(|(byte, &count)| highs[byte >> 4] += count);
        plan.map = ClassMap::commonest(&highs, 3);
        let class = plan.map.lookup(3);
        counts = [0; 256];
        highs.iter().enumerate().for_each(|(high, &count)| counts[class[high] as usize] += count);
    }
    counts[0] += 1; // padding
    plan.freqs = Some(FreqTable::from_counts(&counts));
    Analysis { plan, scales, candidates: chosen.into_iter().map(|(candidates, _)| candidates).collect() }
}

pub(crate) fn add_counts(mut a: Counts, b: Counts) -> Counts {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    a
}

/// Counts of each predictor's differences on every fourth group of 16 rows of a tile.
fn tile_counts(source: &Source, plan: &Plan, scales: &[u8], tile: usize, buffers: &mut Buffers) -> [Counts; 5] {
    let rect = source.geometry.tile(tile);
    let mut counts = [[0u64; 256]; 5];
    for band in 0..rect.bands() {
        let band = rect.band(band);
        let sample = Rect { rows: band.rows.min(16), ..band };
        let own = Scales::of(plan.scale, scales, source.geometry, tile, &sample);
        source.codes(plan, own, sample, &mut buffers.codes, &mut buffers.values);
        buffers.bytes.clear();
        buffers.bytes.extend(buffers.codes.iter().map(|&c| c as u8));
        buffers.residuals.resize(buffers.bytes.len(), 0);
        for mode in Predictor::ALL {
            mode.forward(&buffers.bytes, sample.cols, &mut buffers.residuals);
            let counts = &mut counts[mode as usize];
            buffers.residuals.iter().for_each(|&r| counts[r as usize] += 1);
        }
    }
    counts
}

/// Calls `each` with the differences of every band of a tile under one predictor.
pub(crate) fn residuals(
    source: &Source,
    plan: &Plan,
    scales: &[u8],
    tile: usize,
    mode: Predictor,
    buffers: &mut Buffers,
    mut each: impl FnMut(&[u8]),
) {
    let rect = source.geometry.tile(tile);
    for band in 0..rect.bands() {
        let band = rect.band(band);
        let own = Scales::of(plan.scale, scales, source.geometry, tile, &band);
        source.codes(plan, own, band, &mut buffers.codes, &mut buffers.values);
        buffers.bytes.clear();
        buffers.bytes.extend(buffers.codes.iter().map(|&c| c as u8));
        buffers.residuals.resize(buffers.bytes.len(), 0);
        mode.forward(&buffers.bytes, band.cols, &mut buffers.residuals);
        each(&buffers.residuals);
    }
}

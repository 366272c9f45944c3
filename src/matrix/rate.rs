//! The search for the step that makes a rate-coded matrix as large as asked.
//!
//! Bits fall by one for each doubling of the step. A bisection on a sample finds the step and the cheapest split of the
//! integers into classes and raw bits; passes over the whole matrix, with the real table, then trim what the sample
//! missed. Costs are integers and steps come from multiplications and square roots only, so that every machine finds
//! the same step.

use rayon::prelude::*;

use super::analyse::{Analysis, Buffers, Counts, add_counts, tiles};
use super::source::Source;
use crate::codec::band::{classify, symbols};
use crate::codec::quant::{self, Scales};
use crate::codec::{Coding, FreqTable, Geometry, Kind, Plan, Rect, ScaleLayout};

/// Weights in the sample.
const SAMPLE: usize = 1 << 18;
/// Integers counted one by one; larger ones are rare enough to be taken as escapes by the sample's estimate.
const WINDOW: i32 = 1 << 13;
/// The full passes stop this close to the target, in bits per weight.
const CLOSE: f64 = 0.004;

/// Codes `source` with the step, or steps per row, that come to `bits` bits a weight.
pub(crate) fn search(source: &Source, layout: ScaleLayout, bits: f64) -> Analysis {
    let rms = row_rms(source, layout);
    let sample = sample(source, &rms);
    let overhead = overhead_bits(source.geometry, layout);
    let scale_of = |alpha: f64| scales(&rms, alpha);
    let spread = (sample.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / sample.len().max(1) as f64).sqrt();
    if spread == 0.0 {
        // All weights are zero (or none is finite): any step does.
        let plan = plan(source, layout, Split { class_bits: 8, raw_bits: 0 });
        return finish(source, plan, scale_of(1.0)).0;
    }
    let (mut low, mut high) = (spread * 1e-5, spread * 64.0);
    let mut split = Split { class_bits: 8, raw_bits: 0 };
    for _ in 0..32 {
        let middle = (low * high).sqrt();
        let (cheapest, cost) = Split::cheapest(&sample, middle);
        split = cheapest;
        if cost + overhead > bits {
            low = middle;
        } else {
            high = middle;
        }
    }
    let mut alpha = high;
    let plan = plan(source, layout, split);
    let (mut best, mut got) = finish(source, plan.clone(), scale_of(alpha));
    for _ in 0..4 {
        let off = got + overhead - bits;
        if off.abs() < CLOSE {
            break;
        }
        // 2^off to second order; `off` is small, as the sample came close.
        let x = off.clamp(-0.5, 0.5) * std::f64::consts::LN_2;
        let next_alpha = alpha * (1.0 + x + x * x / 2.0);
        let (next, next_got) = finish(source, plan.clone(), scale_of(next_alpha));
        if (next_got + overhead - bits).abs() >= off.abs() {
            break;
        }
        (alpha, best, got) = (next_alpha, next, next_got);
    }
    best
}

/// How the integers are divided: the class is `q >> raw_bits`.
#[derive(Clone, Copy, Debug)]
struct Split {
    class_bits: u32,
    raw_bits: u32,
}

impl Split {
    /// The split with the lowest cost on the sample at step `step`, and that cost in bits a weight.
    fn cheapest(sample: &[f32], step: f64) -> (Split, f64) {
        let mut counts = vec![0u64; 2 * WINDOW as usize];
        let mut outside = 0u64;
        for &v in sample {
            let q = quant::rate(v, step as f32);
            match counts.get_mut(q.wrapping_add(WINDOW) as usize) {
                Some(count) => *count += 1,
                None => outside += 1,
            }
        }
        let all = [8, 4].into_iter().flat_map(|class_bits| (0..=7).map(move |raw_bits| Split { class_bits, raw_bits }));
        let costs = all.map(|split| (split, split.cost(&counts, outside)));
        costs.fold(
            (Split { class_bits: 8, raw_bits: 0 }, f64::MAX),
            |best, (split, cost)| {
                if cost < best.1 { (split, cost) } else { best }
            },
        )
    }

    /// Bits a weight for integers with these counts.
    fn cost(&self, counts: &[u64], outside: u64) -> f64 {
        let escape = (1usize << self.class_bits) - 1;
        let bias = (1i32 << (self.class_bits - 1)) - 1;
        let mut classes = [0u64; 256];
        classes[escape] = outside;
        for (i, &count) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
            let class = ((i as i32 - WINDOW) >> self.raw_bits).wrapping_add(bias) as u32 as usize;
            classes[class.min(escape)] += count;
        }
        let escapes = classes[escape];
        let total: u64 = classes.iter().sum();
        let bits = if self.class_bits == 8 {
            cost(&classes) as f64 / total as f64
        } else {
            // Pairs of independent classes.
            let pair = |s: usize| classes[s & 15] * classes[s >> 4];
            let pairs: Counts = std::array::from_fn(pair);
            cost(&pairs) as f64 / (2.0 * (total as f64) * (total as f64))
        };
        bits / 65_536.0 + f64::from(self.raw_bits) + 32.0 * escapes as f64 / total as f64
    }
}

/// What symbols with these counts cost under their own table, in 2^-16 bits.
fn cost(counts: &Counts) -> u128 {
    let costs = FreqTable::from_counts(counts).costs();
    counts.iter().zip(costs).map(|(&count, cost)| u128::from(count) * u128::from(cost.unwrap_or(0))).sum()
}

fn plan(source: &Source, layout: ScaleLayout, split: Split) -> Plan {
    let mut plan = Plan::new(Kind::Rate, source.dtype, split.class_bits, Coding::Rans, layout);
    plan.raw_bits = split.raw_bits;
    plan
}

/// Counts the whole matrix under these scales: the complete analysis, and its bits a weight without overhead.
fn finish(source: &Source, mut plan: Plan, scales: Vec<u8>) -> (Analysis, f64) {
    let escape = plan.escape_class();
    let tile = |buffers: &mut Buffers, tile: usize| {
        let rect = source.geometry.tile(tile);
        let (mut counts, mut escapes) = ([0u64; 256], 0u64);
        for band in (0..rect.bands()).map(|b| rect.band(b)) {
            let own = Scales::of(plan.scale, &scales, source.geometry, tile, &band);
            source.codes(&plan, own, band, &mut buffers.codes, &mut buffers.values);
            classify(&plan, &buffers.codes, &[], &mut buffers.classes);
            symbols(&plan, &buffers.classes, &mut buffers.plane);
            buffers.plane.iter().for_each(|&s| counts[s as usize] += 1);
            escapes += buffers.classes[..band.weights()].iter().filter(|&&c| Some(c) == escape).count() as u64;
        }
        (counts, escapes)
    };
    let zero = || ([0u64; 256], 0u64);
    let (counts, escapes) =
        tiles(source).map_init(Buffers::default, tile).reduce(zero, |(a, ea), (b, eb)| (add_counts(a, b), ea + eb));
    let weights = (source.geometry.rows * source.geometry.cols) as f64;
    let bits = cost(&counts) as f64 / 65_536.0 / weights;
    let bits = bits + f64::from(plan.raw_bits) + 32.0 * escapes as f64 / weights;
    plan.freqs = Some(FreqTable::from_counts(&counts));
    (Analysis { plan, scales, candidates: Vec::new() }, bits)
}

/// Bits a weight that go into header, table, records, scales, band tables, states and alignment.
fn overhead_bits(geometry: Geometry, layout: ScaleLayout) -> f64 {
    let scales = if layout == ScaleLayout::Row { geometry.rows } else { 1 };
    let bands: usize = (0..geometry.tiles()).map(|t| geometry.tile(t).bands()).sum();
    // A lane stores 32 bits of state of which about 8 carry symbols. A band's sections end at multiples of 16.
    let bytes = 64 + 512 + 4 * scales + (32 + 16) * geometry.tiles() + (8 + 3 * 32 + 12) * bands;
    8.0 * bytes as f64 / (geometry.rows * geometry.cols) as f64
}

/// Root mean square of each row's finite weights, or one 1 for a step per matrix.
fn row_rms(source: &Source, layout: ScaleLayout) -> Vec<f64> {
    if layout != ScaleLayout::Row {
        return vec![1.0];
    }
    let geometry = source.geometry;
    let row = |buffers: &mut Buffers, row: usize| {
        let rect = Rect { row, col: 0, rows: 1, cols: geometry.cols };
        source.values(rect, &mut buffers.codes, &mut buffers.values);
        let finite = buffers.values.iter().filter(|v| v.is_finite());
        let (sum, n) = finite.fold((0.0, 0u64), |(sum, n), &v| (sum + f64::from(v) * f64::from(v), n + 1));
        (sum / n.max(1) as f64).sqrt()
    };
    (0..geometry.rows).into_par_iter().map_init(Buffers::default, row).collect()
}

/// The `f32` steps at `alpha` steps per unit of RMS. A row of zeros gets step 1.
fn scales(rms: &[f64], alpha: f64) -> Vec<u8> {
    let step = |rms: &f64| {
        let step = (alpha * rms) as f32;
        if step.is_normal() { step } else { 1.0 }
    };
    rms.iter().flat_map(|r| step(r).to_le_bytes()).collect()
}

/// About 2^18 finite weights from all over the matrix, each divided by its row's RMS.
fn sample(source: &Source, rms: &[f64]) -> Vec<f32> {
    let Geometry { rows, cols } = source.geometry;
    // Runs of 64 weights, spread evenly with an odd stride so that no column is preferred.
    let runs = (rows * cols).div_ceil(64);
    let stride = (runs / (SAMPLE / 64)).max(1) | 1;
    let mut buffers = Buffers::default();
    let mut sample = Vec::with_capacity(SAMPLE * 2);
    for first in (0..runs).step_by(stride).map(|run| run * 64) {
        let (row, col) = (first / cols, first % cols);
        let rect = Rect { row, col, rows: 1, cols: 64.min(cols - col) };
        source.values(rect, &mut buffers.codes, &mut buffers.values);
        let scale = rms[if rms.len() == 1 { 0 } else { row }];
        let scale = if scale > 0.0 { scale as f32 } else { 1.0 };
        sample.extend(buffers.values.iter().filter(|v| v.is_finite()).map(|v| v / scale));
    }
    sample
}

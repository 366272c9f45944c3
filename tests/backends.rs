//! Every backend against the scalar decoder, band by band: the same bytes and the same verdict, whatever the input.

mod common;

use candle_taper::codec::{Coding, Dtype, Kind, Scratch, band};
use candle_taper::cpu::dot::{Activation, DotScratch, dot_band};
use candle_taper::cpu::int8::{self, Rows};
use candle_taper::cpu::{self, Backend};
use common::bands::{Case, Table, plans, tables};
use common::golden::Random;
use rayon::prelude::*;

/// Buffers that are used again and again.
#[derive(Default)]
struct Reused {
    scratch: [Scratch; 2],
    out: Vec<u8>,
}

/// A dirty output buffer of the band's size, with rows `stride` bytes apart and nothing behind the last.
fn dirty(case: &Case, stride: usize, out: &mut Vec<u8>) {
    out.clear();
    out.resize(stride * (case.rows - 1) + case.row_bytes(), 0xa5);
    out.shrink_to_fit();
}

fn compare(case: &Case, tables: &[Table], reused: &mut [Reused], random: &mut Random) {
    let band = case.band(tables);
    let stride = case.row_bytes() + [0, 0, 1, 7, 128][random.below(5)];
    let (mut expected, mut scratch) = (Vec::new(), Scratch::default());
    dirty(case, stride, &mut expected);
    let verdict = band::decode(&band, &mut scratch, &mut expected, stride).is_ok();
    assert!(verdict || !case.sections.valid, "valid but refused: {}", case.name());
    for (backend, Reused { scratch: [scratch, _], out }) in common::backends().into_iter().zip(reused) {
        dirty(case, stride, out);
        let got = cpu::decode_band(backend, &band, scratch, out, stride).is_ok();
        assert_eq!(got, verdict, "{}: {}", backend.name(), case.name());
        assert!(*out == expected, "{} writes other bytes: {}", backend.name(), case.name());
    }
}

/// Two bands of one matrix side by side, as whole rows of tiles are decoded.
fn compare_pair(cases: [&Case; 2], tables: &[Table], reused: &mut [Reused]) {
    let bands = cases.map(|case| case.band(tables));
    for (backend, Reused { scratch: [left, right], out }) in common::backends().into_iter().zip(reused) {
        let finished = cpu::symbols(backend, [&bands[0], &bands[1]], [&mut *left, &mut *right]);
        for (i, scratch) in [left, right].into_iter().enumerate() {
            let (case, stride) = (cases[i], cases[i].row_bytes());
            let mut expected = Vec::new();
            dirty(case, stride, &mut expected);
            let verdict = band::decode(&bands[i], &mut Scratch::default(), &mut expected, stride).is_ok();
            dirty(case, stride, out);
            let got = cpu::join(backend, &bands[i], finished[i], scratch, out, stride).is_ok();
            assert_eq!(got, verdict, "{}, {i} of a pair: {}", backend.name(), case.name());
            assert!(*out == expected, "{}, {i} of a pair, writes other bytes: {}", backend.name(), case.name());
        }
    }
}

/// Runs `each` for `count` seeds, with buffers that pass from case to case.
fn run(count: u64, each: impl Fn(&mut Random, &mut [Reused]) + Sync) {
    let start = || common::backends().iter().map(|_| Reused::default()).collect::<Vec<_>>();
    (0..count).into_par_iter().for_each_init(start, |reused, seed| each(&mut Random(seed << 32), reused));
}

#[test]
fn every_backend_equals_scalar_on_any_band() {
    let (plans, tables) = (plans(), tables());
    run(20_000, |random, reused| compare(&Case::new(&plans, &tables, random), &tables, reused, random));
}

/// BF16 has code of its own in every backend: more of it, for which the mix above leaves little room.
#[test]
fn every_backend_equals_scalar_on_any_bf16_band() {
    let (mut plans, tables) = (plans(), tables());
    plans.retain(|plan| plan.kind == Kind::Bf16 && plan.dtype == Dtype::Bf16);
    run(10_000, |random, reused| compare(&Case::new(&plans, &tables, random), &tables, reused, random));
}

#[test]
fn bands_decode_side_by_side_as_they_do_alone() {
    let (mut plans, tables) = (plans(), tables());
    plans.retain(|plan| plan.coding == Coding::Rans);
    run(5_000, |random, reused| {
        let one = Case::new(&plans, &tables, random);
        let mut other = Case::new(std::slice::from_ref(&one.plan), &tables, random);
        // Bands of one matrix share its table.
        (other.table, other.sections.valid) = (one.table, false);
        compare_pair([&one, &other], &tables, reused);
    });
}

/// Products too: the same verdict, and the same bits where the band is valid.
#[test]
fn every_backend_multiplies_as_scalar_does() {
    let (plans, tables) = (plans(), tables());
    run(10_000, |random, _| {
        let case = Case::new(&plans, &tables, random);
        let band = case.band(&tables);
        let x: Vec<f32> = (0..case.cols).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
        let (rows, x) = (Rows::new(&x, case.cols), Activation::new(&x));
        let product = |backend: Backend| {
            let mut scratch = DotScratch::default();
            let mut y = vec![0.25; case.rows];
            let [finished] = cpu::symbols(backend, [&band], [&mut scratch.scratch]);
            let dot = dot_band(backend, &band, finished, &mut scratch, &x, 0, &mut y);
            let mut values = vec![0.0; case.rows * case.cols];
            let [finished] = cpu::symbols(backend, [&band], [&mut scratch.scratch]);
            let decoded = cpu::dot::values(backend, &band, finished, &mut scratch, &mut values, case.cols);
            assert_eq!(dot.is_ok(), decoded.is_ok(), "{}: {}", backend.name(), case.name());
            let mut rounded = vec![0.25; case.rows];
            if case.plan.kind == Kind::Int8 {
                let [finished] = cpu::symbols(backend, [&band], [&mut scratch.scratch]);
                let DotScratch { scratch, padded, .. } = &mut scratch;
                if let Ok(weights) = int8::decode(backend, &band, finished, scratch, padded) {
                    int8::dot(backend, &weights, &band.scales, &rows, 0, 0, &mut rounded);
                }
            }
            // The payload of a NaN depends on the order of an instruction's operands.
            let bits = |values: &[f32]| -> Vec<u32> {
                values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
            };
            dot.is_ok().then(|| [bits(&y), bits(&values), bits(&rounded)])
        };
        let expected = product(Backend::Scalar);
        for backend in common::backends() {
            assert!(product(backend) == expected, "{}: {}", backend.name(), case.name());
        }
    });
}

#[test]
fn an_output_that_is_too_short_is_an_error() {
    let (plans, tables) = (plans(), tables());
    run(500, |random, reused| {
        let case = Case::new(&plans, &tables, random);
        let (band, row) = (case.band(&tables), case.row_bytes());
        for (backend, Reused { scratch: [scratch, _], out }) in common::backends().into_iter().zip(reused) {
            dirty(&case, row, out);
            let short = out.len() - 1;
            assert!(cpu::decode_band(backend, &band, scratch, &mut out[..short], row).is_err());
            assert!(cpu::decode_band(backend, &band, scratch, out, row - 1).is_err());
            assert!(cpu::decode_band(backend, &band, scratch, &mut [], row).is_err());
        }
    });
}

#[test]
fn the_scalar_backend_is_always_there() {
    assert!(common::backends().contains(&Backend::Scalar));
    assert!(Backend::current().unwrap().available());
}

//! Products of 4-bit integers with activations rounded to FP8, against an f64 reference that rounds them another way.

use candle_core::{DType, Device, Module, Tensor};
use candle_taper::nn::KQuantLinear;
use half::{bf16, f16};

use crate::common::int4::{FORMATS, Packed};
use crate::products::activations;
use crate::{captured_and_replayed, gpu, has_fp8, values, whole_gpu};

/// A row in E4M3 with its power of two: the nearest multiple of the spacing there, the even one of two.
fn rounded(row: &[f32]) -> Vec<f64> {
    let most = row.iter().fold(0f64, |most, &v| most.max(f64::from(v).abs()));
    if !row.iter().all(|v| v.is_finite()) {
        return vec![f64::NAN; row.len()];
    }
    if most == 0.0 {
        return vec![0.0; row.len()];
    }
    // 2^8 times a mantissa from 1 to 1.75, else 2^7.
    let exponent = most.log2().floor();
    let scale = 2f64.powf(8.0 - exponent - f64::from(u8::from(most / 2f64.powf(exponent) > 1.75)));
    let round = |v: f64| {
        let spacing = if v.abs() < 2f64.powi(-6) { 2f64.powi(-9) } else { 2f64.powf(v.abs().log2().floor() - 3.0) };
        (v / spacing).round_ties_even() * spacing / scale
    };
    row.iter().map(|&v| round(f64::from(v) * scale)).collect()
}

/// Multiplies twice, and compares with each other and the reference; what rounding the activations costs comes back, as a
/// part of the exact product's norm.
pub fn check(device: &Device, layer: &KQuantLinear, w: &Packed, x: &[f32], dtype: DType) -> f64 {
    let [rows, cols] = w.shape;
    let m = x.len() / cols;
    let what = format!("{rows}x{cols}, {m} rows of {dtype:?}");
    let tensor = Tensor::from_slice(x, (m, cols), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let tensor = tensor.to_device(device).unwrap();
    let run = || layer.forward(&tensor).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (first, again) = (run(), run());
    assert_eq!((first.dims(), first.dtype()), (&[m, rows][..], dtype), "{what}");
    let (first, again) = (values(&first), values(&again));
    let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&first), bits(&again), "{what}: not the same twice");
    let rounding = match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-10),
        _ => 2f64.powi(-22),
    };
    let (mut error, mut norm) = (0.0, 0.0);
    for (x, y) in x.chunks(cols).zip(first.chunks(rows)) {
        let narrow: Vec<f64> = rounded(x);
        for (w, &got) in w.values.chunks(cols).zip(y) {
            let terms = || w.iter().zip(&narrow).map(|(&w, x)| f64::from(w) * x);
            let (sum, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            let exact: f64 = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
            let got = f64::from(got);
            // The tensor cores keep some 14 bits of a sum of 32 products with codes, which are 16 times a scale at most.
            let scale = w.iter().fold(0f32, |most, v| most.max(v.abs()));
            let codes: f64 = narrow.iter().map(|x| x.abs() * f64::from(scale)).sum();
            let allowed = rounding * sum.abs() + 1e-4 * (size + codes) + 1e-30;
            assert!(sum.is_nan() && got.is_nan() || (got - sum).abs() <= allowed, "{what}: {got}, not {sum} of {size}");
            if sum.is_finite() {
                (error, norm) = (error + (sum - exact).powi(2), norm + exact * exact);
            }
        }
    }
    (error / norm.max(1e-300)).sqrt()
}

/// Activations that are exact in each of the dtypes.
pub fn exact(m: usize, cols: usize, seed: u64) -> Vec<f32> {
    activations(m, cols, seed).into_iter().map(|v| bf16::from_f32(f16::from_f32(v).to_f32()).to_f32()).collect()
}

#[test]
fn rounded_activations_are_multiplied_right() {
    let Some(device) = gpu() else { return };
    if !has_fp8(&device) {
        return;
    }
    // Each width, whole blocks and pieces; one unit; columns that are no multiple of 16 units.
    for (rows, cols, m) in [(8, 128, 64), (40, 640, 65), (136, 2048, 200), (264, 1152, 129), (136, 17_920, 64)] {
        for symmetric in [false, true] {
            let w = Packed::new(FORMATS[rows / 8 % 3], rows, cols, 128, symmetric);
            let layer = w.linear(&device).with_fp8(true);
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                let cost = check(&device, &layer, &w, &exact(m, cols, m as u64), dtype);
                assert!(cost < 0.05, "{rows}x{cols}: rounding costs {cost}");
            }
        }
    }
}

#[test]
fn wide_blocks_and_large_grids_are_multiplied_right() {
    let Some(device) = gpu() else { return };
    if !has_fp8(&device) {
        return;
    }
    for (rows, cols, m) in [(16_896, 128, 128), (16_896, 128, 256), (2176, 640, 300), (512, 16_896, 120)] {
        let w = Packed::new(FORMATS[0], rows, cols, 128, false);
        check(&device, &w.linear(&device).with_fp8(true), &w, &exact(m, cols, 3), DType::BF16);
    }
}

#[test]
fn rows_with_specials_or_of_any_size_are_rows_apart() {
    let Some(device) = gpu() else { return };
    if !has_fp8(&device) {
        return;
    }
    let w = Packed::new(FORMATS[0], 72, 384, 128, false);
    let layer = w.linear(&device).with_fp8(true);
    let mut x = exact(80, 384, 9);
    for (i, special) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
        x[i * 384 * 7 + 11] = special;
    }
    for (row, size) in [(30, 0.0), (31, 1e-30), (32, 1e30), (33, 2f32.powi(100)), (34, 1.75), (35, 1.9)] {
        let row = &mut x[row * 384..][..384];
        row.iter_mut().for_each(|v| *v = bf16::from_f32(v.clamp(-1.0, 1.0) * size).to_f32());
    }
    check(&device, &layer, &w, &x, DType::BF16);
    check(&device, &layer, &w, &x, DType::F32);
}

#[test]
fn few_rows_and_other_layers_are_not_rounded() {
    let Some(device) = gpu() else { return };
    let w = Packed::new(FORMATS[0], 72, 384, 128, false);
    let (plain, fp8) = (w.linear(&device), w.linear(&device).with_fp8(true));
    let bits = |layer: &KQuantLinear, m: usize| {
        let x = Tensor::from_vec(exact(m, 384, 2), (m, 384), &device).unwrap().to_dtype(DType::BF16).unwrap();
        values(&layer.forward(&x).unwrap()).into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    for m in [1, 16, 63] {
        assert_eq!(bits(&plain, m), bits(&fp8, m), "{m} rows");
    }
    assert_eq!(bits(&plain, 64) != bits(&fp8, 64), has_fp8(&device), "64 rows");
    assert_eq!(bits(&plain, 64), bits(&w.linear(&device).with_fp8(true).with_fp8(false), 64));
}

#[test]
fn products_with_rounded_activations_are_captured() {
    let Some(device) = whole_gpu() else { return };
    let w = Packed::new(FORMATS[1], 136, 2048, 128, false);
    let layer = w.linear(&device).with_fp8(true);
    let x =
        |seed| Tensor::from_vec(exact(100, 2048, seed), (100, 2048), &device).unwrap().to_dtype(DType::F16).unwrap();
    captured_and_replayed(&device, [&x(4), &x(5)], |x| layer.forward(x).unwrap(), "activations as FP8");
}

//! Matrices of GGUF files on the GPU: rows equal the CPU's, products an f64 reference, in any format and shape; a whole model.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Module, Tensor};
use candle_taper::codec::kquant::{GgmlType, dequantize};
use candle_taper::cuda::{CudaWeight, set_measuring};
use candle_taper::models::{KQuantLlama, gguf};
use candle_taper::nn::{KQuantEmbedding, KQuantLinear};
use candle_taper::ops::Blocks;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::common::gguf_model::write;
use crate::common::int4::{FORMATS, Packed};
use crate::common::kquant::{QUANTIZED, blocks};
use crate::products::activations;
use crate::{captured_and_replayed, cuda, gpu, values, whole_gpu};

/// A matrix of random blocks: the file's bytes, and what they stand for.
pub struct Matrix {
    pub ty: GgmlType,
    pub shape: [usize; 2],
    pub data: Vec<u8>,
    pub values: Vec<f32>,
}

impl Matrix {
    pub fn new(ty: GgmlType, rows: usize, cols: usize, seed: u64) -> Matrix {
        // Blocks of 32 do not need multiples of 256.
        let cols = if ty.block_len() < 256 && cols > 256 { cols - 32 } else { cols };
        Matrix::of(ty, [rows, cols], blocks(ty, rows * cols, seed))
    }

    fn of(ty: GgmlType, shape: [usize; 2], data: Vec<u8>) -> Matrix {
        let mut values = vec![0.0; shape[0] * shape[1]];
        dequantize(ty, &data, &mut values);
        Matrix { ty, shape, data, values }
    }

    fn with<T>(&self, make: impl FnOnce(&Blocks) -> T) -> T {
        make(&Blocks { ty: self.ty, shape: self.shape, data: &self.data, order: &|row| row, done: &|_| () })
    }

    pub fn linear(&self, device: &Device) -> KQuantLinear {
        self.with(|blocks| KQuantLinear::on(blocks, None, device)).unwrap()
    }
}

fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// The same numbers; of NaN any.
fn same(got: &[f32], expected: impl Iterator<Item = f32>, what: &str) {
    for (i, (&got, expected)) in got.iter().zip(expected).enumerate() {
        let equal = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
        assert!(equal, "{what}: {got}, not {expected} (element {i})");
    }
}

/// How a matrix is multiplied is chosen once for each shape, by timing, and remembered; whatever is chosen, products are right.
#[test]
fn ways_to_multiply_are_timed_once() {
    let Some(device) = whole_gpu() else { return };
    let matrix = Matrix::new(GgmlType::Q4_K, 2304, 1024, 9);
    let why = || {
        let (shape, device) = (matrix.shape, cuda(&device));
        let weight = CudaWeight::from_blocks(matrix.ty, shape, &matrix.data, |row| row, device, &|_| ()).unwrap();
        weight.why().to_string()
    };
    let (first, again) = (why(), why());
    println!("{first}\n{again}");
    assert!(first.contains("up to 32 rows: ") && again.contains("(remembered)"));
    let layer = matrix.linear(&device);
    for m in [1, 24, 40, 100] {
        check(&device, &layer, &matrix, &activations(m, 1024, 3), DType::BF16);
    }
    set_measuring(false);
    assert!(why().contains("by rule"));
    set_measuring(true);
}

#[test]
fn rows_equal_the_cpus() {
    let Some(device) = gpu() else { return };
    for ty in GgmlType::ALL {
        for (rows, cols) in [(1, 256), (16, 512), (37, 768), (130, 2304)] {
            let matrix = Matrix::new(ty, rows, cols, 5);
            let what = format!("{ty} {rows}x{}", matrix.shape[1]);
            let dense = matrix.linear(&device).to_dense().unwrap();
            same(&values(dense.weight()), matrix.values.iter().copied(), &what);
            // Rows in an order of the caller's, as Q and K of a GGUF file are.
            let backwards = |row: usize| rows - 1 - row;
            let (data, cols) = (&matrix.data[..], matrix.shape[1]);
            let blocks = Blocks { ty, shape: matrix.shape, data, order: &backwards, done: &|_| () };
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                let embedding = KQuantEmbedding::on(&blocks, dtype, &device).unwrap();
                let ids: Vec<u32> = (0..rows as u32).rev().step_by(3).collect();
                let got = embedding.forward(&Tensor::new(&ids[..], &device).unwrap()).unwrap();
                assert_eq!((got.dims(), got.dtype()), (&[ids.len(), cols][..], dtype), "{what}");
                let row = |id: &u32| matrix.values[backwards(*id as usize) * cols..][..cols].iter();
                same(&values(&got), ids.iter().flat_map(row).map(|&v| rounded(v, dtype)), &what);
            }
        }
    }
}

/// Multiplies twice, compares both with each other and with the reference.
pub fn check(device: &Device, layer: &KQuantLinear, w: &Matrix, x: &[f32], dtype: DType) {
    let [rows, cols] = w.shape;
    let m = x.len() / cols;
    let what = format!("{} {rows}x{cols}, {m} rows of {dtype:?}", w.ty);
    let tensor = Tensor::from_slice(x, (m, cols), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let tensor = tensor.to_device(device).unwrap();
    let run = || values(&layer.forward(&tensor).unwrap_or_else(|error| panic!("{what}: {error}")));
    let first = run();
    assert_eq!(first.len(), m * rows, "{what}");
    // Many rows are multiplied with weights rounded to the activations' dtype.
    let int4 = w.ty == GgmlType::Int4G128;
    let fused = (int4 || QUANTIZED.contains(&w.ty)) && (dtype == DType::F32 || m <= 64);
    // From 17 columns of activations on, weights may be rounded to F16.
    let parts = [DType::BF16, DType::F16, DType::F32].iter().position(|&d| d == dtype).unwrap() + 1;
    let exact = m * parts <= 16 || int4;
    let (rounding, largest) = match dtype {
        DType::BF16 => (2f64.powi(-8), 3.38e38),
        DType::F16 => (2f64.powi(-10), 65_504.0),
        _ => (2f64.powi(-22), 3.4e38),
    };
    let sums: Vec<(f64, f64)> = (0..first.len())
        .into_par_iter()
        .map(|i| {
            let (x, w) = (&x[i / rows * cols..][..cols], &w.values[i % rows * cols..][..cols]);
            let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let finite = |term: f64| if term.is_finite() { term.abs() } else { 0.0 };
            terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + finite(term)))
        })
        .collect();
    // What a row's minima and scales of all codes add up to bounds the rounding of sums, not the weights alone.
    let scale =
        |row: usize| w.values[row * cols..][..cols].iter().filter(|v| v.is_finite()).fold(0f32, |a, v| a.max(v.abs()));
    for (i, (&got, &(sum, size))) in first.iter().zip(&sums).enumerate() {
        let got = f64::from(got);
        let x = x[i / rows * cols..][..cols].iter().filter(|x| x.is_finite()).fold(0f32, |a, x| a + x.abs());
        let spread = f64::from(scale(i % rows)) * f64::from(x);
        if size >= largest / 4.0 || sum.abs() >= largest {
            // Overflows on the way, in an order that is not ours to choose.
        } else if sum.is_nan() || sum.is_infinite() {
            assert!(got == sum || got.is_nan() && sum.is_nan(), "{what}: {got}, not {sum} (element {i})");
        } else {
            let weights = if fused || dtype == DType::F32 { 0.0 } else { rounding * size };
            let allowed = rounding * sum.abs() + weights + if exact { 3e-5 } else { 5e-4 } * spread + 1e-7;
            assert!((got - sum).abs() <= allowed, "{what}: {got}, not {sum} of {size} (element {i})");
        }
    }
    // All of it together: what the issue asks of a product with the dequantised weights.
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut first.iter().zip(&sums).map(|(&got, (sum, _))| f64::from(got) - sum));
    let relative = error / norm(&mut sums.iter().map(|(sum, _)| *sum)).max(1e-30);
    if relative.is_finite() && fused {
        let most = if dtype != DType::F32 {
            rounding
        } else if exact {
            1e-4
        } else {
            1e-3
        };
        assert!(relative <= most, "{what}: a relative error of {relative:.1e}");
    }
    let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert!(bits(&first) == bits(&run()), "{what}: another result in the second run");
}

#[test]
fn products_of_any_format_and_shape_are_right() {
    let Some(device) = gpu() else { return };
    for ty in GgmlType::ALL {
        for (rows, cols) in [(1, 256), (17, 512), (50, 768), (150, 1280), (20, 5120)] {
            let matrix = Matrix::new(ty, rows, cols, 7);
            let layer = matrix.linear(&device);
            for m in [1, 2, 3, 8, 9, 16, 17, 33, 64, 70] {
                let x = activations(m, matrix.shape[1], m as u64);
                for dtype in [DType::BF16, DType::F16, DType::F32] {
                    check(&device, &layer, &matrix, &x, dtype);
                }
            }
        }
    }
}

/// From 65 rows of BF16 activations on, weights are decoded inside products on compute capability 9.0, up to 1024.
#[test]
fn products_of_many_rows_are_right() {
    let Some(device) = gpu() else { return };
    for ty in GgmlType::ALL {
        for (rows, cols) in [(17, 512), (150, 1280)] {
            let matrix = Matrix::new(ty, rows, cols, 7);
            let layer = matrix.linear(&device);
            for m in [65, 128, 129, 200, 256, 300, 513, 1025] {
                check(&device, &layer, &matrix, &activations(m, matrix.shape[1], m as u64), DType::BF16);
            }
        }
    }
}

/// With more tiles for each block than teams that take them, warps of their own add up what the teams have: of whole rows, and
/// of rows in two slabs.
#[test]
fn blocks_of_many_tiles_are_right() {
    let Some(device) = gpu() else { return };
    for (rows, cols) in [(20_000, 256), (5_600, 8192)] {
        for ty in [GgmlType::Q4_K, GgmlType::Q6_K, GgmlType::Q8_0] {
            let matrix = Matrix::new(ty, rows, cols, 13);
            let layer = matrix.linear(&device);
            for m in [3, 8, 13, 16] {
                check(&device, &layer, &matrix, &activations(m, matrix.shape[1], 7), DType::BF16);
            }
        }
    }
}

/// 4-bit integers of AWQ and GPTQ checkpoints: rows and products, from 1 to 70 rows of activations, and many.
#[test]
fn four_bit_integers_are_those_of_the_checkpoint() {
    let Some(device) = gpu() else { return };
    for (i, (rows, cols)) in [(8, 128), (24, 384), (136, 1152), (520, 2048), (64, 5120)].into_iter().enumerate() {
        let packed = Packed::new(FORMATS[i % 3], rows, cols, 128, i % 2 == 1);
        let layer = packed.linear(&device);
        let dense = layer.to_dense().unwrap();
        same(&values(dense.weight()), packed.values.iter().copied(), &format!("int4 {rows}x{cols}"));
        let matrix = Matrix { ty: GgmlType::Int4G128, shape: packed.shape, data: vec![], values: packed.values };
        let few = rows * cols < 1 << 17;
        for m in (1..=70).step_by(if few { 1 } else { 9 }) {
            let x = activations(m, cols, m as u64);
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                check(&device, &layer, &matrix, &x, dtype);
            }
        }
        for m in [128, 129, 200, 300, 1025] {
            check(&device, &layer, &matrix, &activations(m, cols, m as u64), DType::BF16);
        }
    }
}

#[test]
fn what_is_not_finite_comes_out_as_in_the_exact_product() {
    let Some(device) = gpu() else { return };
    for ty in QUANTIZED {
        let mut matrix = Matrix::new(ty, 40, 1024, 9);
        let (cols, bytes) = (matrix.shape[1], ty.block_bytes());
        // Scales of some rows that are infinite or no number: the first f16 of their blocks.
        let at = match ty {
            GgmlType::Q2_K => 80,
            GgmlType::Q3_K => 108,
            GgmlType::Q6_K => 208,
            _ => 0,
        };
        let row = cols / ty.block_len() * bytes;
        for (r, odd) in [(3, f16::INFINITY), (17, f16::NEG_INFINITY), (30, f16::NAN)] {
            matrix.data[r * row + bytes + at..][..2].copy_from_slice(&odd.to_le_bytes());
        }
        let matrix = Matrix::of(ty, matrix.shape, matrix.data);
        let layer = matrix.linear(&device);
        for m in [1, 5, 16, 40] {
            let mut x = activations(m, cols, 3);
            for (i, odd) in [(7, f32::INFINITY), (cols - 1, f32::NEG_INFINITY), (m * cols - 40, f32::NAN)] {
                x[i] = odd;
            }
            let plain = activations(m, cols, 4);
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                check(&device, &layer, &matrix, &x, dtype);
                check(&device, &layer, &matrix, &plain, dtype);
            }
        }
    }
}

#[test]
fn products_are_captured_and_replayed() {
    let Some(device) = whole_gpu() else { return };
    for ty in [GgmlType::Q4_K, GgmlType::Q6_K, GgmlType::Q8_0, GgmlType::Int4G128] {
        let (up, down) = (Matrix::of_size(ty, 1536, 1024), Matrix::of_size(ty, 1024, 1536));
        let (up, down) = (up.linear(&device), down.linear(&device));
        for m in [1, 8, 40] {
            let input = |seed| {
                let x = Tensor::from_vec(activations(m, 1024, seed), (m, 1024), &Device::Cpu).unwrap();
                x.to_dtype(DType::BF16).unwrap().to_device(&device).unwrap()
            };
            let forward = |x: &Tensor| down.forward(&up.forward(x).unwrap()).unwrap();
            let (x, other) = (input(1), input(2));
            captured_and_replayed(&device, [&x, &other], forward, &format!("{ty} m={m}"));
        }
    }
}

impl Matrix {
    fn of_size(ty: GgmlType, rows: usize, cols: usize) -> Matrix {
        Matrix::of(ty, [rows, cols], blocks(ty, rows * cols, 1))
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(device) = gpu() else { return };
    let matrix = Matrix::of_size(GgmlType::Q4_K, 16, 512);
    let refused = |shape, data: &[u8]| {
        let blocks = Blocks { ty: GgmlType::Q4_K, shape, data, order: &|row| row, done: &|_| () };
        KQuantLinear::on(&blocks, None, &device).unwrap_err().to_string()
    };
    assert!(refused([16, 500], &matrix.data).contains("multiple of 256"));
    assert!(refused([17, 512], &matrix.data).contains("17x512"));
    assert!(refused([usize::MAX, 512], &matrix.data).contains("no"));
    assert!(refused([16, 512], &matrix.data[1..]).contains("16x512"));
    let layer = matrix.linear(&device).with_name("up");
    let error = layer.forward(&Tensor::zeros((2, 256), DType::F32, &device).unwrap()).unwrap_err().to_string();
    assert!(error.contains("up") && error.contains("[2, 256]") && error.contains("[16, 512]"), "{error}");
    let error = layer.forward(&Tensor::zeros((2, 512), DType::F32, &Device::Cpu).unwrap()).unwrap_err().to_string();
    assert!(error.contains("up") && error.contains("CPU"), "{error}");
    let on_cpu = matrix.linear(&Device::Cpu);
    let error = on_cpu.forward(&Tensor::zeros((2, 512), DType::F32, &device).unwrap()).unwrap_err().to_string();
    assert!(error.contains("on a GPU"), "{error}");
}

/// Models of one file on the CPU and on the GPU. The CPU rounds activations to 8 bits, so logits differ a little, and texts
/// may part where two tokens are as good: at each token of the CPU's text it is nearly the best on the GPU.
#[test]
fn text_follows_the_cpus() {
    let Some(device) = gpu() else { return };
    for dir in crate::model::models() {
        let place = tempfile::tempdir().unwrap();
        let path = write(&dir, &place.path().join("q8_0.gguf"), GgmlDType::Q8_0, |_| ());
        let file = gguf::open(&path).unwrap();
        let cpu = KQuantLlama::from_gguf(&file, DType::F32).unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let llama = KQuantLlama::from_gguf_on(&file, dtype, &device).unwrap();
            let (mut here, mut there) = (cpu.new_cache(true).unwrap(), llama.new_cache(true).unwrap());
            let mut tokens = vec![1u32, 5, 40, 7];
            let mut equal = 0;
            for _ in 0..100 {
                let input = Tensor::new(&tokens[here.len()..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
                let place = here.len();
                let expected = values(&cpu.forward(&input, place, &mut here).unwrap());
                let got = values(&llama.forward(&input, place, &mut there).unwrap());
                let best = |logits: &[f32]| (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                let (wanted, found) = (best(&expected), best(&got));
                let lowest = got.iter().copied().fold(f32::INFINITY, f32::min);
                let behind = (got[found] - got[wanted]) / (got[found] - lowest);
                let most = if dtype == DType::F32 { 0.02 } else { 0.04 };
                assert!(behind <= most, "{} {dtype:?}: token {} is {behind} behind", dir.display(), tokens.len());
                equal += usize::from(wanted == found);
                tokens.push(wanted as u32);
            }
            println!("{} as Q8_0, {dtype:?}: the GPU's choice is the CPU's for {equal} of 100 tokens", dir.display());
            assert!(equal >= 90, "{} {dtype:?}: {equal} of 100 tokens", dir.display());
        }
    }
}

//! Products against an f64 reference: every layout, odd shapes, many rows, special values; the same bits from run to run.

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_taper::codec::quant;
use candle_taper::format::TileStream;
use candle_taper::matrix::{GpuLayout, Weight};
use candle_taper::nn::{CompressedEmbedding, CompressedLinear};
use candle_taper::{Codec, CompressedMatrix, Dtype, Kind, Options, Predictor, ScaleLayout, compress};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::common::patch::{Patch, record};
use crate::common::{Shape, weights};
use crate::gpu;

/// What a matrix of BF16 numbers can be kept as.
pub const LAYOUTS: [GpuLayout; 5] =
    [GpuLayout::Fixed, GpuLayout::Window, GpuLayout::Pair, GpuLayout::Rans, GpuLayout::Dense];
/// The same, compressed.
pub const COMPRESSED: [GpuLayout; 4] = [GpuLayout::Fixed, GpuLayout::Window, GpuLayout::Pair, GpuLayout::Rans];
/// Those that not every such matrix can have.
pub const PARTICULAR: [GpuLayout; 3] = [GpuLayout::Fixed, GpuLayout::Window, GpuLayout::Pair];

/// A compressed matrix and its weights' values, as products take them: quantised ones are not rounded to BF16.
pub struct Matrix {
    pub weight: Weight,
    pub values: Vec<f32>,
    pub rows: usize,
    pub cols: usize,
}

pub fn matrix(shape: Shape, dtype: Dtype, rows: usize, cols: usize, options: &Options) -> Matrix {
    let data = weights(shape, dtype, rows, cols, 21);
    let weight = Weight::new(compress(&data, dtype, rows, cols, options).unwrap()).unwrap();
    // A quantised matrix of the same values as F32 decodes to what is multiplied.
    let exact = if options.codec == Codec::Lossless { dtype } else { Dtype::F32 };
    let decoded = match exact == dtype {
        true => weight.matrix().unwrap().decode().unwrap(),
        false => {
            let mut wide = vec![0.0; rows * cols];
            quant::to_f32s(dtype, &data, &mut wide);
            let data: Vec<u8> = wide.iter().flat_map(|value| value.to_le_bytes()).collect();
            CompressedMatrix::open(&compress(&data, exact, rows, cols, options).unwrap()).unwrap().decode().unwrap()
        }
    };
    let mut values = vec![0.0; rows * cols];
    quant::to_f32s(exact, &decoded, &mut values);
    Matrix { weight, values, rows, cols }
}

/// Activations whose values are exact in every dtype.
pub fn activations(m: usize, cols: usize, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..m * cols).map(|_| rng.random_range(-127..128) as f32 / 64.0).collect()
}

/// Each result within the rounding of its dtype and of sums in f32; NaN and infinities where the exact product has them.
///
/// cuBLAS may add parts of sums in the result's dtype, so products through it get more room; and weights are decoded for
/// it, so that those that F16 cannot hold are infinite beside F16 activations.
/// `rounding` is how much weights may have been rounded, relative to their size.
fn close(got: &[f32], x: &[f32], w: &Matrix, dtype: DType, fused: bool, rounding: f64, what: &str) {
    let Matrix { values, rows, cols, .. } = w;
    let (relative, largest) = match dtype {
        DType::BF16 => (2f64.powi(-8), 3.38e38),
        DType::F16 => (2f64.powi(-10), 65_504.0),
        _ => (2f64.powi(-22), 3.4e38),
    };
    got.par_iter().enumerate().for_each(|(i, &got)| {
        let (x, w) = (&x[i / rows * cols..][..*cols], &values[i % rows * cols..][..*cols]);
        let weight = |w: f32| if !fused && dtype == DType::F16 && w.abs() >= 65_520.0 { w * f32::INFINITY } else { w };
        let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(weight(w)));
        let finite = |term: f64| if term.is_finite() { term.abs() } else { 0.0 };
        let (sum, size) = terms.fold((0.0f64, 0.0f64), |(sum, size), term| (sum + term, size + finite(term)));
        let got = f64::from(got);
        if size >= largest / 4.0 {
            // Overflows on the way, in an order that is not ours to choose.
        } else if sum.is_nan() || sum.is_infinite() {
            assert!(got.to_bits() == sum.to_bits() || got.is_nan() && sum.is_nan(), "{what}: {got}, not {sum}");
        } else {
            let parts = if fused || dtype == DType::F32 { 0.0 } else { size / 8.0 };
            let allowed = relative * (sum.abs() + parts) + (1e-6 + rounding) * size + 1e-7;
            assert!((got - sum).abs() <= allowed, "{what}: {got}, not {sum} of {size} (element {i})");
        }
    });
}

/// Multiplies twice, compares both with each other and with the reference.
pub fn check(device: &Device, layer: &CompressedLinear, w: &Matrix, x: &[f32], m: usize, dtype: DType, what: &str) {
    let tensor = Tensor::from_slice(x, (m, w.cols), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let tensor = tensor.to_device(device).unwrap();
    let run = || {
        let y = layer.forward(&tensor).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((y.dims(), y.dtype()), (&[m, w.rows][..], dtype), "{what}");
        y.to_device(&Device::Cpu)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
    };
    let first = run();
    let parts = [DType::BF16, DType::F16, DType::F32].iter().position(|&d| d == dtype).unwrap() + 1;
    let packed = matches!(
        layer.in_use().unwrap().0,
        GpuLayout::Fixed | GpuLayout::Window | GpuLayout::Fp8 | GpuLayout::Integers
    );
    let columns = m * parts;
    // Hopper multiplies up to a thousand BF16 rows without cuBLAS.
    let many =
        crate::hopper(device) && dtype == DType::BF16 && m <= 1024 && layer.in_use().unwrap().0 == GpuLayout::Fixed;
    let fused = dtype == DType::F32
        || many
        || packed && m <= 64 && columns <= 128
        || layer.in_use().unwrap().0 == GpuLayout::Pair && columns <= 32
        || layer.in_use().unwrap().0 == GpuLayout::Rans && (m <= 4 || m <= 8 && !w.cols.is_multiple_of(64));
    // What is no BF16 number is rounded where weights are decoded for BF16 or F16 activations, and where rate-coded
    // weights are kept as integers: those far out are then BF16 multiples of the step.
    let plan = w.weight.plan();
    let rounding = match dtype {
        _ if plan.exact_in_bf16() => 0.0,
        DType::F32 if plan.kind == Kind::Rate && packed => 2f64.powi(-9),
        DType::F32 => 0.0,
        _ => 2f64.powi(-9),
    };
    close(&first, x, w, dtype, fused, rounding, what);
    let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert!(bits(&first) == bits(&run()), "{what}: another result in the second run");
}

#[test]
fn products_of_any_shape_are_right() {
    let Some(device) = gpu() else { return };
    let sizes = [
        (1, 1),
        (2, 3),
        (16, 128),
        (17, 129),
        (40, 1000),
        (130, 300),
        (257, 513),
        (600, 600),
        (300, 2500),
        (48, 5000),
        (1, 256),
        (67, 768),
    ];
    for (rows, cols) in sizes {
        for shape in [Shape::Gaussian, Shape::StudentT, Shape::Constant] {
            let w = matrix(shape, Dtype::Bf16, rows, cols, &Options::default());
            for layout in LAYOUTS {
                let layer = CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap();
                assert_eq!(layer.in_use().unwrap().0, layout);
                for m in [1, 2, 7, 8, 9, 16, 17, 21, 22, 32, 33, 43, 64, 65, 70] {
                    for dtype in [DType::BF16, DType::F16, DType::F32] {
                        let x = activations(m, cols, m as u64);
                        check(
                            &device,
                            &layer,
                            &w,
                            &x,
                            m,
                            dtype,
                            &format!("{rows}x{cols} {shape:?} {layout:?} m={m} {dtype:?}"),
                        );
                    }
                }
            }
        }
    }
}

/// BF16 at rest with columns that are multiples of 64, with and without levels, for which there are kernels of their own.
#[test]
fn products_of_bf16_at_rest_are_right() {
    let Some(device) = gpu() else { return };
    // The last columns are no multiple of 64, which is for the reference; those before them fill no whole tiles.
    for (rows, cols) in
        [(1, 256), (67, 768), (600, 2048), (3000, 512), (1088, 768), (67, 64), (600, 960), (1088, 640), (3000, 520)]
    {
        for shape in [Shape::Gaussian, Shape::Scaled, Shape::Specials] {
            let w = matrix(shape, Dtype::Bf16, rows, cols, &Options::default());
            if rows == 3000 && cols == 512 {
                let levels = w.weight.plan().scale == ScaleLayout::Levels;
                assert!(levels == (shape == Shape::Scaled) || shape == Shape::Specials, "{shape:?}");
            }
            let layer = CompressedLinear::on(w.weight.clone(), None, &device, GpuLayout::Rans).unwrap();
            for m in [1, 2, 3, 5, 8, 9, 16, 17] {
                for dtype in [DType::BF16, DType::F16, DType::F32] {
                    let what = format!("{rows}x{cols} {shape:?} m={m} {dtype:?}");
                    let mut x = activations(m, cols, m as u64);
                    check(&device, &layer, &w, &x, m, dtype, &what);
                    for (i, special) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
                        x[(i * 7919 + 13) % (m * cols)] = special;
                    }
                    check(&device, &layer, &w, &x, m, dtype, &format!("{what}, special x"));
                }
            }
        }
    }
}

/// So many bands that each is cut into two parts, or left whole, and not cut into four.
#[test]
fn products_of_large_matrices_at_rest_are_right() {
    let Some(device) = gpu() else { return };
    for (rows, cols, shape) in [(64 * 1500, 256, Shape::Scaled), (64 * 2700, 256, Shape::Gaussian)] {
        let w = matrix(shape, Dtype::Bf16, rows, cols, &Options::default());
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, GpuLayout::Rans).unwrap();
        for m in [1, 2] {
            check(&device, &layer, &w, &activations(m, cols, 1), m, DType::BF16, &format!("{shape:?} m={m}"));
        }
    }
}

#[test]
fn products_of_every_kind_are_right() {
    let Some(device) = gpu() else { return };
    let (rows, cols) = (300, 520);
    let with = |codec, scale| Options { codec, scale, ..Options::default() };
    let cases = [
        (Dtype::F16, with(Codec::Lossless, None)),
        (Dtype::F32, with(Codec::Lossless, None)),
        (Dtype::F8E4M3, with(Codec::Lossless, None)),
        (Dtype::F8E5M2, with(Codec::Lossless, None)),
        (Dtype::I8, with(Codec::Lossless, None)),
        (Dtype::Bf16, with(Codec::Int8, Some(ScaleLayout::Row))),
        (Dtype::Bf16, with(Codec::Int8, Some(ScaleLayout::Tile))),
        (Dtype::Bf16, with(Codec::Int8, Some(ScaleLayout::Matrix))),
        (Dtype::F16, with(Codec::Int8, Some(ScaleLayout::Row))),
        (Dtype::Bf16, with(Codec::Rate { bits: 2.5 }, None)),
        (Dtype::Bf16, with(Codec::Rate { bits: 4.0 }, None)),
        (Dtype::Bf16, with(Codec::Rate { bits: 6.0 }, Some(ScaleLayout::Row))),
        (Dtype::F32, with(Codec::Rate { bits: 3.0 }, Some(ScaleLayout::Row))),
    ];
    for (dtype, options) in cases {
        for shape in [Shape::Scaled, Shape::Smooth] {
            let w = matrix(shape, dtype, rows, cols, &options);
            let mut values = vec![0.0; rows * cols];
            quant::to_f32s(dtype, &w.weight.matrix().unwrap().decode().unwrap(), &mut values);
            let plain = Matrix { weight: w.weight.clone(), values, rows, cols };
            for layout in GpuLayout::ALL {
                let layer = match CompressedLinear::on(w.weight.clone(), None, &device, layout) {
                    Ok(layer) => layer,
                    Err(error) if error.to_string().contains("cannot be kept in the layout") => continue,
                    Err(error) => panic!("{error}"),
                };
                let used = layer.in_use().unwrap().0;
                println!("{dtype:?} {:?} {:?} {shape:?} {layout:?}: {used:?}", options.codec, options.scale);
                // Plain weights are in the tensor's dtype.
                let w = if used == GpuLayout::Dense { &plain } else { &w };
                for m in [1, 8, 40, 70] {
                    let what = format!("{dtype:?} {options:?} {shape:?} {layout:?} m={m}");
                    for dtype in [DType::F32, DType::BF16, DType::F16] {
                        check(&device, &layer, w, &activations(m, cols, 5), m, dtype, &what);
                    }
                }
            }
        }
    }
}

/// Products from streams at rest, whose tiles have every predictor: any differences are weights to it.
/// All 8-bit floats, a few that are not finite among them.
#[test]
fn eight_bit_floats_are_multiplied_as_they_are() {
    let Some(device) = gpu() else { return };
    let (rows, cols) = (150, 1100);
    for (dtype, infinity) in [(Dtype::F8E4M3, 0x7f), (Dtype::F8E5M2, 0x7c)] {
        let byte = |i: usize| if i as u8 & 0x7f < infinity || i % 8192 < 256 { i as u8 } else { 0x80 };
        let data: Vec<u8> = (0..rows * cols).map(byte).collect();
        let mut values = vec![0.0; rows * cols];
        quant::to_f32s(dtype, &data, &mut values);
        let weight = Weight::new(compress(&data, dtype, rows, cols, &Options::default()).unwrap()).unwrap();
        let ids = Tensor::arange(0u32, rows as u32, &Device::Cpu).unwrap();
        let table = CompressedEmbedding::on(weight.clone(), DType::F32, &device, GpuLayout::Fp8).unwrap();
        let decoded = table.forward(&ids.to_device(&device).unwrap()).unwrap().flatten_all().unwrap();
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(decoded.to_vec1::<f32>().unwrap().iter().zip(&values).all(same), "{dtype:?}");
        let w = Matrix { weight, values, rows, cols };
        for layout in [GpuLayout::Auto, GpuLayout::Fp8] {
            let layer = CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap();
            let (in_use, bytes) = layer.in_use().unwrap();
            assert!(in_use == GpuLayout::Fp8 && bytes < rows * cols * 5 / 4, "{in_use:?}: {bytes}");
            // Of 70 rows each takes one column, as cuBLAS may round sums of parts, which are large here.
            let one = |m: usize| (0..m * cols).map(|i| f32::from(i % cols == i / cols * 15)).collect();
            for m in [1, 7, 16, 24, 40, 70] {
                for x in [DType::BF16, DType::F16, DType::F32] {
                    let what = format!("{dtype:?} {layout:?} m={m} {x:?}");
                    let activations = if m < 70 { activations(m, cols, 5) } else { one(m) };
                    check(&device, &layer, &w, &activations, m, x, &what);
                }
            }
        }
    }
}

#[test]
fn products_of_every_predictor_are_right() {
    let Some(device) = gpu() else { return };
    let (rows, cols) = (300, 530);
    let data = weights(Shape::Smooth, Dtype::I8, rows, cols, 11);
    let stream = compress(&data, Dtype::I8, rows, cols, &Options::default()).unwrap();
    for predictor in Predictor::ALL {
        let tiles = 0..TileStream::parse(&stream).unwrap().geometry().tiles();
        let patch = tiles.fold(Patch::new(&stream), |patch, tile| {
            patch.put(Patch::record(tile) + record::PREDICTOR, [predictor as u8])
        });
        let weight = Weight::new(patch.seal()).unwrap();
        let mut values = vec![0.0; rows * cols];
        quant::to_f32s(Dtype::I8, &weight.matrix().unwrap().decode().unwrap(), &mut values);
        let w = Matrix { weight, values, rows, cols };
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, GpuLayout::Rans).unwrap();
        for m in [1, 8, 9] {
            let x = activations(m, cols, 2);
            check(&device, &layer, &w, &x, m, DType::F32, &format!("{} m={m}", predictor.name()));
        }
    }
}

#[test]
fn infinities_and_nans_come_out_as_in_the_exact_product() {
    let Some(device) = gpu() else { return };
    let (rows, cols) = (70, 1100);
    for shape in [Shape::Specials, Shape::Noise, Shape::Gaussian] {
        let w = matrix(shape, Dtype::Bf16, rows, cols, &Options::default());
        for layout in LAYOUTS {
            let layer = match CompressedLinear::on(w.weight.clone(), None, &device, layout) {
                Ok(layer) => layer,
                // Every bit pattern alike does not suit windows of exponents.
                Err(error) if PARTICULAR.contains(&layout) && shape != Shape::Gaussian => {
                    assert!(error.to_string().contains("too many"), "{error}");
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            for m in [1, 9, 33, 70] {
                for dtype in [DType::BF16, DType::F16, DType::F32] {
                    let mut x = activations(m, cols, 8);
                    check(&device, &layer, &w, &x, m, dtype, &format!("{shape:?} {layout:?} m={m} {dtype:?}"));
                    for (i, special) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
                        x[(i * 7919 + 13) % (m * cols)] = special;
                    }
                    check(
                        &device,
                        &layer,
                        &w,
                        &x,
                        m,
                        dtype,
                        &format!("{shape:?} {layout:?} m={m} {dtype:?}, special x"),
                    );
                }
            }
        }
    }
}

#[test]
fn large_matrices_go_through_the_workspace_in_blocks() {
    let Some(device) = gpu() else { return };
    // 192 MB as F32: two blocks.
    let w = matrix(Shape::Scaled, Dtype::Bf16, 12_000, 4096, &Options::default());
    for layout in COMPRESSED {
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap();
        for (m, dtype) in [(3, DType::F32), (80, DType::F32), (80, DType::BF16)] {
            check(&device, &layer, &w, &activations(m, 4096, 3), m, dtype, &format!("{layout:?} {m} {dtype:?}"));
        }
        let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, (5, 4096), &device).unwrap()).unwrap();
        gradient(&device, &layer, &w, &x);
    }
}

/// The gradient of a sum of squares against candle's own.
fn gradient(device: &Device, layer: &CompressedLinear, w: &Matrix, x: &Var) {
    let dense = Tensor::from_slice(&w.values, (w.rows, w.cols), device).unwrap();
    let ours = layer.forward(x).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let theirs = x.matmul(&dense.t().unwrap()).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let (ours, theirs) = (ours.get(x).unwrap(), theirs.get(x).unwrap());
    let largest = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let difference = largest(&(ours - theirs).unwrap()) / largest(theirs);
    assert!(difference < 1e-5, "gradients differ by {difference}");
}

#[test]
fn gradients_equal_candles() {
    let Some(device) = gpu() else { return };
    let w = matrix(Shape::Gaussian, Dtype::Bf16, 130, 270, &Options::default());
    for layout in LAYOUTS {
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap();
        let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, (12, 270), &device).unwrap()).unwrap();
        gradient(&device, &layer, &w, &x);
    }
}

#[test]
fn strided_inputs_biases_and_leading_dimensions_are_taken() {
    let Some(device) = gpu() else { return };
    let w = matrix(Shape::Gaussian, Dtype::Bf16, 64, 96, &Options::default());
    let bias = Tensor::randn(0f32, 1.0, 64, &Device::Cpu).unwrap();
    let on_cpu = CompressedLinear::new(w.weight.clone(), Some(bias.clone()));
    for layout in LAYOUTS {
        let layer = CompressedLinear::on(w.weight.clone(), Some(bias.clone()), &device, layout).unwrap();
        let base = Tensor::randn(0f32, 1.0, (96, 10), &Device::Cpu).unwrap();
        let wide = Tensor::randn(0f32, 1.0, (2, 3, 200), &Device::Cpu).unwrap();
        for x in [base.t().unwrap(), base.t().unwrap().narrow(0, 3, 4).unwrap(), wide.narrow(2, 50, 96).unwrap()] {
            let expected = on_cpu.forward(&x).unwrap();
            // The same view of memory on the GPU.
            let y = layer.forward(&x.to_device(&device).unwrap()).unwrap().to_device(&Device::Cpu).unwrap();
            assert_eq!(y.dims(), expected.dims());
            let difference = (y - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(difference.to_scalar::<f32>().unwrap() < 1e-5);
        }
        let empty = Tensor::zeros((0, 96), DType::F32, &device).unwrap();
        assert_eq!(layer.forward(&empty).unwrap().dims(), [0, 64]);
    }
}

//! Products with compressed matrices: right, and the same to the last bit for every backend, stage and number of threads.

mod common;

use candle_taper::cpu::dot::{LANES, reduce};
use candle_taper::matrix::{Executor, RayonExecutor, Weight};
use candle_taper::{Activations, Backend, Codec, CompressedMatrix, Dtype, Options, ScaleLayout, Stage, compress};
use common::golden::Random;
use common::{Shape, backends, weights};

const STAGES: [Stage; 3] = [Stage::Rans, Stage::Fixed12, Stage::Fixed11];
const DTYPES: [Dtype; 6] = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8];

/// One task after the other.
struct Serial;

impl Executor for Serial {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).rev().for_each(task);
    }
}

fn activation(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    (0..n).map(|_| (random.below(2001) as f32 - 1000.0) / 512.0).collect()
}

/// The weights' values: `dense` has the matrix decoded without rounding to its tensor's dtype.
fn dense(stream: &[u8], dtype: Dtype) -> Vec<f32> {
    let decoded = CompressedMatrix::open(stream).unwrap().decode().unwrap();
    let mut values = vec![0.0; decoded.len() / dtype.size()];
    candle_taper::codec::quant::to_f32s(dtype, &decoded, &mut values);
    values
}

/// The product as the documentation of `cpu::dot` defines it.
fn defined(w: &[f32], x: &[f32], rows: usize) -> Vec<f32> {
    let row = |row: &[f32]| {
        row.chunks(256).zip(x.chunks(256)).fold(0.0f32, |y, (w, x)| {
            let mut lanes = [0.0f32; LANES];
            for (k, (&w, &x)) in w.iter().zip(x).enumerate() {
                lanes[k % LANES] = w.mul_add(x, lanes[k % LANES]);
            }
            y + reduce(&lanes)
        })
    };
    w.chunks(w.len() / rows).map(row).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn matvec_is_the_defined_sum_to_the_last_bit() {
    for (rows, cols) in [(1, 1), (3, 70), (64, 256), (130, 300), (257, 513), (70, 1024)] {
        let x = activation(cols, 1);
        for dtype in DTYPES {
            for shape in [Shape::Gaussian, Shape::Scaled, Shape::Specials, Shape::Noise] {
                let data = weights(shape, dtype, rows, cols, 3);
                for stage in STAGES {
                    let options = Options { stage, ..Options::default() };
                    let stream = compress(&data, dtype, rows, cols, &options).unwrap();
                    let expected = bits(&defined(&dense(&stream, dtype), &x, rows));
                    for backend in backends() {
                        let matrix = CompressedMatrix::open(&stream).unwrap().with_backend(backend);
                        let name = format!("{rows}x{cols} {dtype:?} {shape:?} {stage:?} {}", backend.name());
                        assert!(same(&matrix.matvec(&x, &Serial).unwrap(), &expected), "{name}");
                        assert!(same(&matrix.matvec(&x, &RayonExecutor).unwrap(), &expected), "{name}");
                    }
                }
            }
        }
    }
}

#[test]
fn quantised_weights_are_multiplied_as_they_decode() {
    let rate = |bits| (Codec::Rate { bits }, Stage::Rans);
    let int8 = STAGES.map(|stage| (Codec::Int8, stage));
    for (rows, cols) in [(3, 70), (64, 256), (130, 300), (257, 520), (66, 523)] {
        let x = activation(cols, 1);
        for (shape, scale) in [(Shape::StudentT, ScaleLayout::Row), (Shape::Specials, ScaleLayout::Matrix)] {
            let data = weights(shape, Dtype::F32, rows, cols, 3);
            for (codec, stage) in int8.into_iter().chain([1.5, 3.5, 5.0, 6.5, 7.5, 9.9].map(rate)) {
                let options = Options { codec, stage, scale: Some(scale), ..Options::default() };
                let stream = compress(&data, Dtype::F32, rows, cols, &options).unwrap();
                let w = dense(&stream, Dtype::F32);
                let expected = bits(&defined(&w, &x, rows));
                for backend in backends() {
                    let matrix = CompressedMatrix::open(&stream).unwrap().with_backend(backend);
                    let matrix = matrix.with_activations(Activations::Exact);
                    let name = format!("{rows}x{cols} {codec:?} {stage:?} {shape:?} {}", backend.name());
                    assert!(same(&matrix.matvec(&x, &Serial).unwrap(), &expected), "{name}");
                    let decoded = matrix.decode().unwrap();
                    assert!(decoded == CompressedMatrix::open(&stream).unwrap().decode().unwrap(), "{name}");
                }
            }
        }
    }
}

/// Equal bits, or both NaN: its payload depends on the order of an instruction's operands.
fn same(got: &[f32], expected: &[u32]) -> bool {
    got.iter().zip(expected).all(|(got, &bits)| got.to_bits() == bits || got.is_nan() && f32::from_bits(bits).is_nan())
}

/// Against an `f64` product with the same weights: relative to the sum of magnitudes.
fn close(got: &[f32], w: &[f32], x: &[f32], m: usize, rows: usize, tolerance: f64) {
    let cols = w.len() / rows;
    for (i, &got) in got.iter().enumerate() {
        let (x, w) = (&x[i / rows * cols..][..cols], &w[i % rows * cols..][..cols]);
        let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
        assert!((f64::from(got) - sum).abs() <= tolerance * magnitude.max(1e-30), "{got} {sum} of {m}x{rows}");
    }
}

#[test]
fn batches_and_gradients_are_right_for_every_kind() {
    let (rows, cols) = (300, 520);
    let codecs = [
        (Codec::Lossless, None),
        (Codec::Int8, Some(ScaleLayout::Row)),
        (Codec::Int8, Some(ScaleLayout::Tile)),
        (Codec::Rate { bits: 4.0 }, Some(ScaleLayout::Row)),
    ];
    for (codec, scale) in codecs {
        let data = weights(Shape::Scaled, Dtype::F32, rows, cols, 5);
        let options = Options { codec, scale, ..Options::default() };
        let stream = compress(&data, Dtype::F32, rows, cols, &options).unwrap();
        let w = dense(&stream, Dtype::F32);
        let transposed: Vec<f32> = (0..rows * cols).map(|i| w[i % rows * cols + i / rows]).collect();
        for backend in backends() {
            let matrix = CompressedMatrix::open(&stream).unwrap().with_backend(backend);
            let matrix = matrix.with_activations(Activations::Exact);
            for m in [1, 2, 5, 33] {
                let x = activation(m * cols, 7);
                let y = matrix.matmul(&x, m, &RayonExecutor).unwrap();
                close(&y, &w, &x, m, rows, 1e-5);
                assert_eq!(bits(&y), bits(&matrix.matmul(&x, m, &Serial).unwrap()), "threads change the result");
                let gradient = activation(m * rows, 9);
                let back = matrix.matmul_transposed(&gradient, m, &RayonExecutor).unwrap();
                close(&back, &transposed, &gradient, m, cols, 1e-5);
                assert_eq!(bits(&back), bits(&matrix.matmul_transposed(&gradient, m, &Serial).unwrap()));
            }
        }
    }
}

#[test]
fn wrong_sizes_and_damaged_tiles_are_errors() {
    let data = weights(Shape::Gaussian, Dtype::Bf16, 300, 300, 1);
    let mut stream = compress(&data, Dtype::Bf16, 300, 300, &Options::default()).unwrap();
    let matrix = CompressedMatrix::open(&stream).unwrap();
    let error = matrix.matvec(&[0.0; 299], &RayonExecutor).unwrap_err().to_string();
    assert!(error.contains("299") && error.contains("300x300"), "{error}");
    assert!(matrix.matmul(&[0.0; 601], 2, &RayonExecutor).is_err());
    assert!(matrix.matmul_transposed(&[0.0; 299], 1, &RayonExecutor).is_err());
    let last = stream.len() - 40;
    stream[last] ^= 16;
    let matrix = CompressedMatrix::open(&stream).unwrap();
    for error in [
        matrix.matvec(&[1.0; 300], &RayonExecutor).unwrap_err(),
        matrix.matmul(&[1.0; 600], 2, &RayonExecutor).unwrap_err(),
        matrix.matmul_transposed(&[1.0; 600], 2, &RayonExecutor).unwrap_err(),
    ] {
        assert!(error.to_string().contains("tile 3"), "{error}");
    }
}

#[test]
fn an_owned_weight_is_opened_again_and_again() {
    let data = weights(Shape::Scaled, Dtype::Bf16, 100, 200, 1);
    let stream = compress(&data, Dtype::Bf16, 100, 200, &Options::default()).unwrap();
    let weight = Weight::new(stream).unwrap();
    let clone = weight.clone().with_backend(Backend::Scalar);
    let x = activation(200, 2);
    let first = weight.matrix().unwrap().matvec(&x, &RayonExecutor).unwrap();
    assert_eq!(bits(&first), bits(&clone.matrix().unwrap().matvec(&x, &RayonExecutor).unwrap()));
    assert_eq!(weight.matrix().unwrap().decode().unwrap(), data);
    assert_eq!(weight.geometry().rows, 100);
    assert!(Weight::new(vec![0u8; 100]).is_err());
}

//! Products of INT8 weights with activations rounded to 8 bits: as documented to the last bit on every backend, and as
//! near to the unrounded product as rounding allows.

mod common;

use candle_taper::codec::Predictor;
use candle_taper::codec::quant::Scales;
use candle_taper::cpu::int8::{self, Rows, Weights};
use candle_taper::matrix::{MatrixEncoder, RayonExecutor, Source, matmul_each};
use candle_taper::{Activations, Backend, Codec, CompressedMatrix, Dtype, Options, ScaleLayout, Stage, compress};
use common::golden::Random;
use common::{Shape, backends, values, weights};

const STAGES: [Stage; 3] = [Stage::Rans, Stage::Fixed12, Stage::Fixed11];
const SCALES: [ScaleLayout; 3] = [ScaleLayout::Row, ScaleLayout::Tile, ScaleLayout::Matrix];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Activations with a block of zeros, outliers and small values.
fn activation(n: usize, seed: u64) -> Vec<f32> {
    let mut x = values(Shape::StudentT, 1, n, seed);
    x.iter_mut().skip(40).take(60).for_each(|x| *x = 0.0);
    x.iter_mut().skip(130).take(20).for_each(|x| *x *= 1e-20);
    x.iter_mut().step_by(97).for_each(|x| *x *= 50.0);
    x
}

/// A matrix of `f32`s in INT8, its integers and the scale of each weight.
struct Int8 {
    stream: Vec<u8>,
    integers: Vec<i32>,
    scales: Vec<f32>,
    rows: usize,
    cols: usize,
}

impl Int8 {
    fn new(shape: Shape, rows: usize, cols: usize, stage: Stage, scale: ScaleLayout) -> Int8 {
        let options = Options { codec: Codec::Int8, stage, scale: Some(scale), ..Options::default() };
        let data = weights(shape, Dtype::F32, rows, cols, 3);
        // Not `compress`, which would store the smallest as they are.
        let source = Source::new(&data, Dtype::F32, rows, cols).unwrap();
        let mut stream = Vec::new();
        MatrixEncoder::new(source, &options).unwrap().run(&mut stream).unwrap();
        let matrix = CompressedMatrix::open(&stream).unwrap();
        let stored = common::decode(matrix.stream().scales(), Dtype::F32);
        let across = cols.div_ceil(256);
        let scales: Vec<f32> = (0..rows * cols)
            .map(|i| match scale {
                ScaleLayout::Row => stored[i / cols],
                ScaleLayout::Tile => stored[i / cols / 256 * across + i % cols / 256],
                _ => stored[0],
            })
            .collect();
        let decoded = common::decode(&matrix.decode().unwrap(), Dtype::F32);
        let integers = decoded.iter().zip(&scales).map(|(w, s)| if *s == 0.0 { 0 } else { (w / s).round() as i32 });
        Int8 { integers: integers.collect(), scales, rows, cols, stream }
    }

    fn open(&self, backend: Backend) -> CompressedMatrix<'_> {
        CompressedMatrix::open(&self.stream).unwrap().with_backend(backend)
    }

    /// The product as the documentation of `cpu::int8` defines it.
    fn defined(&self, x: &[f32]) -> Vec<f32> {
        let row = |row: usize| {
            (0..self.cols).step_by(256).fold(0.0f32, |y, tile| {
                let end = self.cols.min(tile + 256);
                let t = (tile..end).step_by(32).fold(0.0f32, |t, block| {
                    let columns = block..end.min(block + 32);
                    let max = x[columns.clone()].iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    let inverse = if max == 0.0 { 0.0 } else { 127.0 / max };
                    let rounded = |k: usize| (x[k] * inverse).round_ties_even() as i32;
                    let sum: i32 = columns.map(|k| self.integers[row * self.cols + k] * rounded(k)).sum();
                    (sum as f32).mul_add(max / 127.0, t)
                });
                t.mul_add(self.scales[row * self.cols + tile], y)
            })
        };
        (0..self.rows).map(row).collect()
    }

    /// The unrounded product, and how far rounding may move it.
    fn true_product(&self, x: &[f32]) -> Vec<(f64, f64)> {
        let row = |row: usize| {
            let weight =
                |k: usize| f64::from(self.integers[row * self.cols + k] as f32 * self.scales[row * self.cols + k]);
            (0..self.cols).step_by(32).fold((0.0, 0.0), |(sum, error), block| {
                let columns = block..self.cols.min(block + 32);
                let max = x[columns.clone()].iter().fold(0.0f64, |max, x| max.max(f64::from(x.abs())));
                let half_step = max / 254.0 * (1.0 + 1e-6);
                let moved: f64 = columns.clone().map(|k| weight(k).abs() * half_step).sum();
                let terms = columns.map(|k| weight(k) * f64::from(x[k]));
                let (part, magnitude) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                (sum + part, error + moved + 1e-6 * magnitude)
            })
        };
        (0..self.rows).map(row).collect()
    }
}

#[test]
fn products_are_as_defined_to_the_last_bit() {
    for (rows, cols) in [(1, 1), (3, 70), (64, 256), (130, 300), (257, 513), (70, 1024)] {
        for (stage, scale) in STAGES.into_iter().flat_map(|stage| SCALES.map(|scale| (stage, scale))) {
            for shape in [Shape::Scaled, Shape::Smooth] {
                let int8 = Int8::new(shape, rows, cols, stage, scale);
                for m in [1, 2, 3, 4, 8] {
                    let x: Vec<f32> = (0..m).flat_map(|row| activation(cols, row)).collect();
                    let expected: Vec<f32> = x.chunks(cols).flat_map(|x| int8.defined(x)).collect();
                    for backend in backends() {
                        let got = int8.open(backend).matmul(&x, m as usize, &RayonExecutor).unwrap();
                        let name = format!("{rows}x{cols} {stage:?} {scale:?} {m} rows, {}", backend.name());
                        assert_eq!(bits(&got), bits(&expected), "{name}");
                    }
                }
            }
        }
    }
}

#[test]
fn predicted_tiles_multiply_too() {
    let int8 = Int8::new(Shape::Smooth, 300, 520, Stage::Rans, ScaleLayout::Row);
    let predictor = int8.open(Backend::Scalar).stream().record(0).unwrap().predictor;
    assert_ne!(predictor, Predictor::None);
    let x = activation(520, 1);
    for backend in backends() {
        assert_eq!(bits(&int8.open(backend).matvec(&x, &RayonExecutor).unwrap()), bits(&int8.defined(&x)));
    }
}

#[test]
fn products_are_as_near_as_rounding_allows() {
    for scale in SCALES {
        let int8 = Int8::new(Shape::Scaled, 200, 1000, Stage::Rans, scale);
        let x = activation(1000, 5);
        let truth = int8.true_product(&x);
        let got = int8.open(Backend::Scalar).matvec(&x, &RayonExecutor).unwrap();
        for (got, (sum, error)) in got.iter().zip(&truth) {
            assert!((f64::from(*got) - sum).abs() <= *error, "{got} {sum} {error}");
        }
        let exact = int8.open(Backend::Scalar).with_activations(Activations::Exact);
        let exact = exact.matvec(&x, &RayonExecutor).unwrap();
        assert_ne!(bits(&exact), bits(&got));
    }
}

/// What the documentation says of normally distributed activations.
#[test]
fn normal_activations_lose_half_a_percent() {
    let int8 = Int8::new(Shape::Gaussian, 256, 4096, Stage::Rans, ScaleLayout::Row);
    let x = values(Shape::Gaussian, 1, 4096, 9);
    let got = int8.open(Backend::Scalar).matvec(&x, &RayonExecutor).unwrap();
    let truth = int8.true_product(&x);
    let noise: f64 = got.iter().zip(&truth).map(|(got, (sum, _))| (f64::from(*got) - sum).powi(2)).sum();
    let power: f64 = truth.iter().map(|(sum, _)| sum * sum).sum();
    let relative = (noise / power).sqrt();
    println!("{:.2}% of the root mean square", 100.0 * relative);
    assert!((0.003..0.006).contains(&relative), "{relative}");
}

/// Nothing is lost in silence: rows that cannot be rounded are multiplied as they are, and no other row notices.
#[test]
fn rows_that_cannot_be_rounded_are_exact() {
    let (rows, cols) = (130, 300);
    let int8 = Int8::new(Shape::Gaussian, rows, cols, Stage::Rans, ScaleLayout::Row);
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-40] {
        let mut x: Vec<f32> = (0..5).flat_map(|row| activation(cols, row)).collect();
        x[cols + 77] = bad;
        x[4 * cols + 299] = bad;
        if bad == 1e-40 {
            x[cols + 64..cols + 96].fill(bad);
            x[4 * cols + 288..].fill(bad);
        }
        for backend in backends() {
            let matrix = int8.open(backend);
            let exact = int8.open(backend).with_activations(Activations::Exact);
            let y = matrix.matmul(&x, 5, &RayonExecutor).unwrap();
            for (row, (y, x)) in y.chunks(rows).zip(x.chunks(cols)).enumerate() {
                let expected =
                    if row == 1 || row == 4 { exact.matvec(x, &RayonExecutor).unwrap() } else { int8.defined(x) };
                assert_eq!(bits(y), bits(&expected), "row {row}");
                assert_eq!(bits(y), bits(&matrix.matvec(x, &RayonExecutor).unwrap()), "row {row}");
                assert!(row != 1 && row != 4 || bad == 1e-40 || y.iter().all(|y| !y.is_finite()));
            }
        }
    }
}

/// Weights without scales are a lossless tensor: their activations are not rounded.
#[test]
fn lossless_integers_are_multiplied_exactly() {
    let data = weights(Shape::Gaussian, Dtype::I8, 70, 130, 1);
    let stream = compress(&data, Dtype::I8, 70, 130, &Options::default()).unwrap();
    let x = activation(130, 1);
    let matrix = CompressedMatrix::open(&stream).unwrap();
    let y = matrix.matvec(&x, &RayonExecutor).unwrap();
    let exact = matrix.with_activations(Activations::Exact).matvec(&x, &RayonExecutor).unwrap();
    assert_eq!(bits(&y), bits(&exact));
}

#[test]
fn groups_mix_rounded_and_exact_matrices() {
    let cols = 300;
    let int8 = Int8::new(Shape::Gaussian, 130, cols, Stage::Rans, ScaleLayout::Row);
    let float = weights(Shape::Gaussian, Dtype::Bf16, 70, cols, 1);
    let float = compress(&float, Dtype::Bf16, 70, cols, &Options::default()).unwrap();
    for m in [1, 4] {
        let x: Vec<f32> = (0..m as u64).flat_map(|row| activation(cols, row)).collect();
        let open = || CompressedMatrix::open(&float).unwrap();
        let group =
            [open(), int8.open(Backend::Scalar), int8.open(Backend::Scalar).with_activations(Activations::Exact)];
        let together = matmul_each(&group, &x, m, &RayonExecutor).unwrap();
        let apart: Vec<f32> = group.iter().flat_map(|matrix| matrix.matmul(&x, m, &RayonExecutor).unwrap()).collect();
        assert_eq!(bits(&together), bits(&apart));
    }
}

/// Integers at their limits, which no encoder writes but a file may hold.
#[test]
fn kernels_agree_on_extreme_integers() {
    let mut random = Random(7);
    for (rows, stride) in [(64, 256), (1, 64), (15, 128), (16, 192), (17, 256), (63, 64)] {
        let bytes = random.bytes(rows * stride);
        let limits = |value: u8| vec![value; rows * stride];
        for bytes in [bytes.clone(), limits(0x80), limits(0x7f), limits(0)] {
            let sign = |i: usize| if i.is_multiple_of(3) { -1.0 } else { 1.0 };
            let x: Vec<f32> =
                (0..7 * stride).map(|i| if i < 3 * stride { sign(i) } else { (i % 29) as f32 - 11.0 }).collect();
            let x = Rows::new(&x, stride);
            let weights = Weights::new(&bytes, rows, stride);
            let run = |backend: Backend| {
                let (mut apart, mut together) = (vec![0.5f32; 7 * rows], vec![0.5f32; 7 * rows]);
                for (row, y) in apart.chunks_mut(rows).enumerate() {
                    int8::dot(backend, &weights, &Scales::One(0.37), &x, row, 0, y);
                }
                int8::matmul(backend, &weights, &Scales::One(0.37), &x, 0, &mut together, &mut Vec::new());
                assert_eq!(bits(&apart), bits(&together), "{rows}x{stride} {}", backend.name());
                bits(&apart)
            };
            for backend in backends() {
                assert_eq!(run(backend), run(Backend::Scalar), "{rows}x{stride} {}", backend.name());
            }
        }
    }
}

#[test]
fn damage_is_an_error() {
    let int8 = Int8::new(Shape::Gaussian, 300, 300, Stage::Rans, ScaleLayout::Row);
    let mut stream = int8.stream.clone();
    let last = stream.len() - 40;
    stream[last] ^= 16;
    for backend in backends() {
        let matrix = CompressedMatrix::open(&stream).unwrap().with_backend(backend);
        for m in [1, 3] {
            let error = matrix.matmul(&vec![1.0; m * 300], m, &RayonExecutor).unwrap_err().to_string();
            assert!(error.contains("tile 3"), "{error}");
        }
    }
}

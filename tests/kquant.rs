//! Products with ggml's block formats: every backend against the scalar one, bit by bit, and against `f64`.

mod common;

use candle_taper::Backend;
use candle_taper::codec::kquant::{GgmlType, dequantize};
use candle_taper::matrix::{Executor, KQuantMatrix, RayonExecutor, kquant_matmul_each};
use common::kquant::{QUANTIZED, blocks};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// All tasks in reverse order on this thread.
struct Serial;

impl Executor for Serial {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).rev().for_each(task);
    }
}

fn activation(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0f32..1.0).powi(3) * 4.0).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn weights(ty: GgmlType, rows: usize, cols: usize, blocks: &[u8]) -> Vec<f32> {
    let mut weights = vec![0.0; rows * cols];
    dequantize(ty, blocks, &mut weights);
    weights
}

/// The largest error relative to the magnitude of what was added up.
fn error(y: &[f32], w: &[f32], x: &[f32], m: usize) -> f64 {
    let (cols, rows) = (x.len() / m, y.len() / m);
    let mut worst: f64 = 0.0;
    for (i, &y) in y.iter().enumerate() {
        let (x, w) = (&x[i / rows * cols..][..cols], &w[i % rows * cols..][..cols]);
        let products = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        let exact: f64 = products.clone().sum();
        let size = products.map(|p| p * p).sum::<f64>().sqrt();
        worst = worst.max((f64::from(y) - exact).abs() / size.max(1e-30));
    }
    worst
}

#[test]
fn rows_come_back_as_they_were() {
    for ty in GgmlType::ALL {
        for (rows, cols) in [(1, 256), (16, 256), (37, 768)] {
            let data = blocks(ty, rows * cols, 1);
            let expected = weights(ty, rows, cols, &data);
            let matrix = KQuantMatrix::new(ty, rows, cols, &data).unwrap();
            let mut row = vec![0.0; cols];
            for (r, expected) in expected.chunks_exact(cols).enumerate() {
                matrix.dequantize_row(r, &mut row).unwrap();
                assert_eq!(bits(&row), bits(expected), "{ty} row {r}");
            }
            let taken = matrix.stored_bytes() as f64 / (rows.next_multiple_of(16) * cols) as f64 * 8.0;
            assert!(taken <= ty.bits_per_weight() * 1.1 + 0.5, "{ty}: {taken} bits a weight");
        }
    }
}

#[test]
fn backends_agree_to_the_last_bit() {
    for ty in QUANTIZED {
        for (rows, cols) in [(1, 256), (16, 512), (33, 256), (64, 1024), (70, 2304)] {
            // Blocks of 32 do not need multiples of 256.
            let cols = if ty.block_len() == 32 { cols - 32 } else { cols };
            let data = blocks(ty, rows * cols, 2);
            let w = weights(ty, rows, cols, &data);
            for m in [1, 2, 3, 5, 6, 7, 13, 100] {
                let x = activation(m * cols, 3);
                let build = || KQuantMatrix::new(ty, rows, cols, &data).unwrap();
                let scalar = build().with_backend(Backend::Scalar).matmul(&x, m, &RayonExecutor).unwrap();
                for backend in common::backends() {
                    let matrix = build().with_backend(backend);
                    let y = matrix.matmul(&x, m, &RayonExecutor).unwrap();
                    assert_eq!(bits(&y), bits(&scalar), "{ty} {rows}x{cols} {m} rows, {}", backend.name());
                    assert_eq!(bits(&y), bits(&matrix.matmul(&x, m, &Serial).unwrap()), "threads change the result");
                }
                // Rows of a batch are what each would be alone.
                let alone = build().matmul(&x[(m - 1) * cols..], 1, &Serial).unwrap();
                assert_eq!(bits(&scalar[(m - 1) * rows..]), bits(&alone));
                // Rounding to 8 bits costs up to half a step of 4/127, so 0.0091 on average, beside a mean activation of 1.5:
                // 0.006 of the size of what is added up, as errors are random. The largest of many is a few times that.
                let error = error(&scalar, &w, &x, m);
                assert!(error < 0.036, "{ty} {rows}x{cols} {m} rows: {error}");
            }
        }
    }
}

/// With activations that 8 bits hold exactly, nothing is lost but the rounding of sums.
#[test]
fn products_of_exact_activations_are_exact() {
    for ty in QUANTIZED {
        let (rows, cols, m) = (48, 1024, 7);
        let data = blocks(ty, rows * cols, 4);
        let w = weights(ty, rows, cols, &data);
        let mut rng = SmallRng::seed_from_u64(5);
        let mut x: Vec<f32> = (0..m * cols).map(|_| f32::from(rng.random_range(-127i8..=127)) / 64.0).collect();
        x.iter_mut().step_by(32).for_each(|x| *x = 127.0 / 64.0);
        for backend in common::backends() {
            let matrix = KQuantMatrix::new(ty, rows, cols, &data).unwrap().with_backend(backend);
            let error = error(&matrix.matmul(&x, m, &RayonExecutor).unwrap(), &w, &x, m);
            assert!(error < 1e-5, "{ty}, {}: {error}", backend.name());
        }
    }
}

#[test]
fn extreme_integers_do_not_overflow() {
    for ty in QUANTIZED {
        // All bits set, but for sensible floats.
        let (rows, cols) = (32, 512);
        for byte in [0xff, 0x80, 0x7f, 0x00] {
            let mut data = blocks(ty, rows * cols, 6);
            common::kquant::fill(ty, &mut data, byte);
            let w = weights(ty, rows, cols, &data);
            // 127 steps of 1/64, which 8 bits hold exactly.
            for sign in [127.0 / 64.0, -127.0 / 64.0] {
                let x = vec![sign; 2 * cols];
                let y: Vec<Vec<f32>> = common::backends()
                    .into_iter()
                    .map(|backend| KQuantMatrix::new(ty, rows, cols, &data).unwrap().with_backend(backend))
                    .map(|matrix| matrix.matmul(&x, 2, &RayonExecutor).unwrap())
                    .collect();
                let exact: f64 = w[..cols].iter().map(|&w| f64::from(w) * f64::from(sign)).sum();
                let size: f64 = w[..cols].iter().map(|&w| f64::from(w).abs() * 2.0).sum();
                for y in y {
                    assert!((f64::from(y[0]) - exact).abs() <= 1e-5 * size, "{ty} {byte:#x}: {} for {exact}", y[0]);
                }
            }
        }
    }
}

#[test]
fn plain_types_are_multiplied_too() {
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::BF16, GgmlType::Q8_K] {
        let (rows, cols) = (50, 512);
        let data = blocks(ty, rows * cols, 7);
        let w = weights(ty, rows, cols, &data);
        let matrix = KQuantMatrix::new(ty, rows, cols, &data).unwrap();
        for m in [1, 9] {
            let x = activation(m * cols, 8);
            let y = matrix.matmul(&x, m, &RayonExecutor).unwrap();
            assert!(error(&y, &w, &x, m) < 1e-5, "{ty}");
            assert_eq!(bits(&y), bits(&matrix.matmul(&x, m, &Serial).unwrap()));
        }
    }
}

#[test]
fn several_products_share_their_activations() {
    let cols = 512;
    let types = [GgmlType::Q4_K, GgmlType::Q8_0, GgmlType::F16, GgmlType::Q6_K];
    let matrices: Vec<KQuantMatrix> = types
        .iter()
        .zip([40, 33, 7, 96])
        .map(|(&ty, rows)| KQuantMatrix::new(ty, rows, cols, &blocks(ty, rows * cols, 13)).unwrap())
        .collect();
    let all: Vec<&KQuantMatrix> = matrices.iter().collect();
    for m in [1, 5] {
        let x = activation(m * cols, 14);
        let apart: Vec<f32> = all.iter().flat_map(|w| w.matmul(&x, m, &RayonExecutor).unwrap()).collect();
        assert_eq!(bits(&kquant_matmul_each(&all, &x, m, &Serial).unwrap()), bits(&apart));
    }
    let other = KQuantMatrix::new(GgmlType::Q4_K, 1, 256, &blocks(GgmlType::Q4_K, 256, 15)).unwrap();
    assert!(kquant_matmul_each(&[all[0], &other], &activation(cols, 16), 1, &Serial).is_err());
}

#[test]
fn activations_that_are_not_finite_are_not_lost() {
    let data = blocks(GgmlType::Q4_K, 16 * 512, 9);
    for backend in common::backends() {
        let matrix = KQuantMatrix::new(GgmlType::Q4_K, 16, 512, &data).unwrap().with_backend(backend);
        let mut x = activation(1024, 10);
        x[600] = f32::NAN;
        let y = matrix.matmul(&x, 2, &RayonExecutor).unwrap();
        assert!(y[..16].iter().all(|y| y.is_finite()) && y[16..].iter().all(|y| y.is_nan()));
    }
}

#[test]
fn rows_can_be_put_in_another_order() {
    let (rows, cols) = (40, 256);
    let data = blocks(GgmlType::Q6_K, rows * cols, 11);
    let plain = KQuantMatrix::new(GgmlType::Q6_K, rows, cols, &data).unwrap();
    let done = std::sync::Mutex::new(0);
    let reversed = KQuantMatrix::pack(GgmlType::Q6_K, rows, cols, &data, |r| rows - 1 - r, &Serial, &|range| {
        *done.lock().unwrap() += range.len();
    });
    assert_eq!(done.into_inner().unwrap(), data.len());
    let x = activation(cols, 12);
    let mut y = reversed.unwrap().matmul(&x, 1, &Serial).unwrap();
    y.reverse();
    assert_eq!(bits(&y), bits(&plain.matmul(&x, 1, &Serial).unwrap()));
}

#[test]
fn wrong_sizes_are_errors() {
    let new = |rows, cols, bytes: usize| KQuantMatrix::new(GgmlType::Q4_K, rows, cols, &vec![0; bytes]);
    let error = |result: candle_taper::Result<KQuantMatrix>| result.unwrap_err().to_string();
    assert!(error(new(3, 128, 216)).contains("3x128, allowed: rows of whole Q4_K blocks: a multiple of 256"));
    assert!(error(new(3, 256, 431)).contains("431 bytes are no 3x256 matrix of Q4_K"));
    let matrix = new(3, 256, 432).unwrap();
    assert!(matrix.matmul(&[0.0; 255], 1, &Serial).unwrap_err().to_string().contains("255 activations"));
    assert!(matrix.dequantize_row(3, &mut [0.0; 256]).is_err());
    assert!(matrix.matmul(&[], 0, &Serial).unwrap().is_empty());
}

/// What each format's product loses by rounding activations to 8 bits, beside the exact product with the same weights:
/// `cargo test --test kquant -- --nocapture errors`.
#[test]
fn errors_of_the_formats() {
    let (rows, cols, m) = (64, 4096, 16);
    println!("format  bits/weight  product's error (8-bit activations)");
    for ty in QUANTIZED {
        let data = blocks(ty, rows * cols, 31);
        let w = weights(ty, rows, cols, &data);
        let mut rng = SmallRng::seed_from_u64(32);
        let normal = rand_distr::StandardNormal;
        let x: Vec<f32> = (0..m * cols).map(|_| rng.sample::<f32, _>(normal)).collect();
        let y = KQuantMatrix::new(ty, rows, cols, &data).unwrap().matmul(&x, m, &RayonExecutor).unwrap();
        let (mut error, mut size) = (0.0, 0.0);
        for (i, &y) in y.iter().enumerate() {
            let (x, w) = (&x[i / rows * cols..][..cols], &w[i % rows * cols..][..cols]);
            let exact: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            error += (f64::from(y) - exact).powi(2);
            size += exact * exact;
        }
        let error = (error / size).sqrt();
        println!("{:6} {:12.4} {:12.3}%", ty.name(), ty.bits_per_weight(), 100.0 * error);
        // Half a step of the largest of 256 normal values (about 2.8) over 127 is a uniform error of 0.0064 of their size;
        // of 32 (about 2.1) 0.0047.
        let expected = if ty.block_len() == 256 { 0.0066 } else { 0.0050 };
        assert!((0.7 * expected..1.2 * expected).contains(&error), "{ty}: {error}, not about {expected}");
    }
}

//! Weights for tests and benchmarks: the distributions that real matrices have, and those that break codecs.
#![allow(dead_code)]

pub mod bands;
pub mod counting;
pub mod gguf;
#[cfg(feature = "candle")]
pub mod gguf_model;
pub mod golden;
#[cfg(feature = "candle")]
pub mod int4;
pub mod kquant;
pub mod llama;
pub mod model;
pub mod patch;

use std::path::{Path, PathBuf};

use candle_taper::{Backend, Dtype};
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use rand_distr::{Distribution, Normal, StudentT};

/// How test weights are distributed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// N(0, 0.02).
    Gaussian,
    /// Student-t, 5 degrees of freedom: heavy tails.
    StudentT,
    /// Gaussian with log-normal row and column scales, as trained matrices have.
    Scaled,
    /// Every bit pattern alike: nothing to gain.
    Noise,
    /// One value everywhere.
    Constant,
    /// Mostly zeros, with NaN, infinities, −0, subnormals and huge values among them.
    Specials,
    /// Rows that repeat the row above with a little noise.
    Smooth,
}

impl Shape {
    pub const ALL: [Shape; 7] = [
        Shape::Gaussian,
        Shape::StudentT,
        Shape::Scaled,
        Shape::Noise,
        Shape::Constant,
        Shape::Specials,
        Shape::Smooth,
    ];
}

/// `rows × cols` values.
pub fn values(shape: Shape, rows: usize, cols: usize, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let normal = Normal::new(0.0f32, 0.02).unwrap();
    let student = StudentT::new(5.0f32).unwrap();
    let mut scale = |sigma: f32, n: usize| -> Vec<f32> {
        let normal = Normal::new(0.0f32, sigma).unwrap();
        (0..n).map(|_| normal.sample(&mut rng).exp()).collect()
    };
    let (by_row, by_col) = match shape {
        Shape::Scaled => (scale(0.38, rows), scale(0.25, cols)),
        _ => (vec![1.0; rows], vec![1.0; cols]),
    };
    let specials = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-40, -1e-39, 3e38, -65504.0, 1.0, 1e-8];
    let mut out = Vec::with_capacity(rows * cols);
    for r in 0..rows {
        for c in 0..cols {
            out.push(match shape {
                Shape::Gaussian => normal.sample(&mut rng),
                Shape::StudentT => student.sample(&mut rng) * 0.0155,
                Shape::Scaled => normal.sample(&mut rng) * by_row[r] * by_col[c],
                Shape::Noise => f32::from_bits(rng.next_u32()),
                Shape::Constant => 0.125,
                Shape::Specials if rng.random_ratio(1, 5) => specials[rng.random_range(0..specials.len())],
                Shape::Specials => 0.0,
                Shape::Smooth if r == 0 => normal.sample(&mut rng),
                Shape::Smooth => out[(r - 1) * cols + c] + normal.sample(&mut rng) * 0.02,
            });
        }
    }
    out
}

/// Values as little-endian weights of `dtype`; for [`Shape::Noise`] bytes are drawn, so that every pattern occurs.
pub fn weights(shape: Shape, dtype: Dtype, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    if shape == Shape::Noise {
        let mut bytes = vec![0; rows * cols * dtype.size()];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        return bytes;
    }
    encode(&values(shape, rows, cols, seed), dtype)
}

/// Values in `dtype`, little-endian.
pub fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|&v| v.to_le_bytes()).collect(),
        // Truncation is good enough for test weights.
        Dtype::F8E5M2 => values.iter().map(|&v| (f16::from_f32(v).to_bits() >> 8) as u8).collect(),
        Dtype::F8E4M3 => values.iter().map(|&v| e4m3(v)).collect(),
        Dtype::I8 => values.iter().map(|&v| (v * 1500.0).clamp(-128.0, 127.0) as i8 as u8).collect(),
    }
}

fn e4m3(v: f32) -> u8 {
    let bits = (v * 16.0).to_bits();
    let exponent = (bits >> 23 & 255) as i32 - 127 + 7;
    let sign = (bits >> 24 & 0x80) as u8;
    sign | if exponent < 0 { 0 } else { (exponent.min(15) as u8) << 3 | (bits >> 20 & 7) as u8 }
}

/// The values of BF16, F16 or F32 bytes.
pub fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// Signal-to-noise ratio in dB.
pub fn snr(signal: &[f32], decoded: &[f32]) -> f64 {
    let power: f64 = signal.iter().map(|&v| f64::from(v).powi(2)).sum();
    let noise: f64 = signal.iter().zip(decoded).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
    10.0 * (power / noise).log10()
}

/// Backends that this machine has; says which of the others go untested.
pub fn backends() -> Vec<Backend> {
    let (have, lack): (Vec<_>, Vec<_>) = Backend::ALL.into_iter().partition(|b| b.available());
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| lack.iter().for_each(|b| println!("skipped: backend {} is not available here", b.name())));
    have
}

/// The directory of real models and texts, which is not a part of this project: `TAPER_DATA`, or `shared/data` in a
/// directory above. Says so if there is none.
pub fn shared_data() -> Option<PathBuf> {
    let above = || Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().skip(1).map(|dir| dir.join("shared/data"));
    let data = std::env::var_os("TAPER_DATA").map(PathBuf::from).or_else(|| above().find(|data| data.is_dir()));
    if data.is_none() {
        println!("skipped: there is no shared/data above {}", env!("CARGO_MANIFEST_DIR"));
    }
    data
}

//! Blocks of ggml's formats.
#![allow(dead_code)]

use candle_taper::codec::kquant::GgmlType;
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

/// The types that have blocks of their own kind.
pub const QUANTIZED: [GgmlType; 10] = [
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q8_0,
    GgmlType::Q2_K,
    GgmlType::Q3_K,
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
];

/// Where a block has its `f16`s.
fn floats(ty: GgmlType) -> &'static [usize] {
    match ty {
        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => &[0],
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
        GgmlType::Q2_K => &[80, 82],
        GgmlType::Q3_K => &[108],
        GgmlType::Q6_K => &[208],
        GgmlType::Int4G128 => &[0],
        _ => &[],
    }
}

/// Blocks of random bytes with sensible floats.
pub fn blocks(ty: GgmlType, weights: usize, seed: u64) -> Vec<u8> {
    blocks_within(ty, weights, seed, 0.05)
}

/// Blocks of random bytes whose floats are between `-most` and `most`.
pub fn blocks_within(ty: GgmlType, weights: usize, seed: u64, most: f32) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut data = vec![0; weights / ty.block_len() * ty.block_bytes()];
    rng.fill_bytes(&mut data);
    for block in data.chunks_exact_mut(ty.block_bytes()) {
        let value: f32 = rng.random_range(-most..most);
        match ty {
            GgmlType::F32 | GgmlType::Q8_K => block[..4].copy_from_slice(&value.to_le_bytes()),
            GgmlType::F16 => block.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            GgmlType::BF16 => block.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            _ => {
                for &at in floats(ty) {
                    let value = f16::from_f32(rng.random_range(-most..most));
                    block[at..at + 2].copy_from_slice(&value.to_le_bytes());
                }
            }
        }
    }
    data
}

/// Sets all bytes of blocks but their floats.
pub fn fill(ty: GgmlType, data: &mut [u8], byte: u8) {
    for block in data.chunks_exact_mut(ty.block_bytes()) {
        for (at, out) in block.iter_mut().enumerate() {
            if !floats(ty).iter().any(|&float| (float..float + 2).contains(&at)) {
                *out = byte;
            }
        }
    }
}

//! ggml's block formats beside candle's own implementation of them.
#![cfg(feature = "candle")]

mod common;

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor};
use candle_taper::codec::kquant::{GgmlType, dequantize};
use candle_taper::matrix::{KQuantMatrix, RayonExecutor};
use common::kquant::{QUANTIZED, blocks};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

fn dtype(ty: GgmlType) -> GgmlDType {
    match ty {
        GgmlType::F32 => GgmlDType::F32,
        GgmlType::F16 => GgmlDType::F16,
        GgmlType::BF16 => GgmlDType::BF16,
        GgmlType::Q4_0 => GgmlDType::Q4_0,
        GgmlType::Q4_1 => GgmlDType::Q4_1,
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q8_0 => GgmlDType::Q8_0,
        GgmlType::Q2_K => GgmlDType::Q2K,
        GgmlType::Q3_K => GgmlDType::Q3K,
        GgmlType::Q4_K => GgmlDType::Q4K,
        GgmlType::Q5_K => GgmlDType::Q5K,
        GgmlType::Q6_K => GgmlDType::Q6K,
        GgmlType::Q8_K => GgmlDType::Q8K,
    }
}

fn qtensor(ty: GgmlType, rows: usize, cols: usize, data: &[u8]) -> QTensor {
    let storage = QStorage::from_data(Cow::Borrowed(data), &Device::Cpu, dtype(ty)).unwrap();
    QTensor::new(storage, (rows, cols)).unwrap()
}

/// Candle's values, and ours, of the same blocks.
fn both(ty: GgmlType, data: &[u8]) -> [Vec<f32>; 2] {
    let n = data.len() / ty.block_bytes() * ty.block_len();
    let theirs = qtensor(ty, 1, n, data).dequantize(&Device::Cpu).unwrap();
    let mut ours = vec![0.0; n];
    dequantize(ty, data, &mut ours);
    [theirs.flatten_all().unwrap().to_vec1().unwrap(), ours]
}

#[test]
fn dequantised_values_are_equal_to_the_last_bit() {
    for ty in GgmlType::ALL {
        // Every bit pattern that blocks can have, floats included.
        let mut data = vec![0; 4096 / ty.block_len().min(256) * ty.block_bytes()];
        SmallRng::seed_from_u64(ty as u64).fill_bytes(&mut data);
        let quantised = Tensor::randn(0f32, 0.02, (16, 256), &Device::Cpu).unwrap();
        let quantised = QTensor::quantize(&quantised, dtype(ty)).unwrap();
        for data in [data, quantised.data().unwrap().into_owned()] {
            let [theirs, ours] = both(ty, &data);
            for (i, (t, o)) in theirs.iter().zip(&ours).enumerate() {
                assert!(t.to_bits() == o.to_bits() || t.is_nan() && o.is_nan(), "{ty} weight {i}: {t} and {o}");
            }
        }
    }
}

/// Products differ only by the rounding of sums, as candle quantises activations in the same way.
#[test]
fn products_are_as_candle_s() {
    for ty in QUANTIZED {
        // Where rows are whole blocks of 256, candle quantises activations for Q8_0 in such blocks, which is coarser.
        let (rows, cols) = if ty.block_len() == 32 { (96, 960) } else { (96, 1024) };
        let data = blocks(ty, rows * cols, 3);
        let theirs = QMatMul::from_qtensor(qtensor(ty, rows, cols, &data)).unwrap();
        let ours = KQuantMatrix::new(ty, rows, cols, &data).unwrap();
        for m in [1, 9] {
            let x = Tensor::randn(0f32, 1.0, (m, cols), &Device::Cpu).unwrap();
            let y: Vec<f32> = theirs.forward(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let x: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
            let z = ours.matmul(&x, m, &RayonExecutor).unwrap();
            let size = (y.iter().map(|y| y * y).sum::<f32>() / y.len() as f32).sqrt();
            let worst = y.iter().zip(&z).map(|(y, z)| (y - z).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-3 * size, "{ty}, {m} rows: {worst} beside {size}");
        }
    }
}

//! ggml's block formats beside candle's own implementation of them.
#![cfg(feature = "candle")]

mod common;

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor, Var};
use candle_taper::codec::kquant::{GgmlType, dequantize};
use candle_taper::matrix::{KQuantMatrix, RayonExecutor};
use candle_taper::nn::KQuantLinear;
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
        GgmlType::Int4G128 => unreachable!("not in a GGUF file"),
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

/// Gradients of `x·Wᵀ` with respect to `x` are `dY·W` with the dequantised weights, whatever rounding the product had.
#[test]
fn gradients_are_those_of_the_dequantised_weights() {
    for ty in GgmlType::ALL {
        for (rows, cols, m) in [(1, 256, 1), (70, 512, 3), (200, 768, 9)] {
            let data = blocks(ty, rows * cols, 21);
            let mut w = vec![0.0; rows * cols];
            dequantize(ty, &data, &mut w);
            let layer = KQuantLinear::new(Arc::new(KQuantMatrix::new(ty, rows, cols, &data).unwrap()), None);
            let x = Var::randn(0f32, 1.0, (m, cols), &Device::Cpu).unwrap();
            let dy = Tensor::randn(0f32, 1.0, (m, rows), &Device::Cpu).unwrap();
            let loss = (layer.forward(&x).unwrap() * &dy).unwrap().sum_all().unwrap();
            let dx = loss.backward().unwrap().get(&x).unwrap().to_vec2::<f32>().unwrap();
            for (dx, dy) in dx.iter().zip(dy.to_vec2::<f32>().unwrap()) {
                for (col, &dx) in dx.iter().enumerate() {
                    let products = dy.iter().enumerate().map(|(r, &dy)| f64::from(dy) * f64::from(w[r * cols + col]));
                    let (exact, size) = (products.clone().sum::<f64>(), products.map(f64::abs).sum::<f64>());
                    let error = (f64::from(dx) - exact).abs();
                    assert!(error <= 1e-6 * size + 1e-30, "{ty} {rows}x{cols}, column {col}: {dx} for {exact}");
                }
            }
        }
    }
}

#[test]
fn a_tensor_that_candle_quantised_becomes_a_layer() {
    for ty in QUANTIZED {
        let weight = Tensor::randn(0f32, 0.1, (48, 512), &Device::Cpu).unwrap();
        let weight = QTensor::quantize(&weight, dtype(ty)).unwrap();
        let bias = Tensor::randn(0f32, 1.0, 48, &Device::Cpu).unwrap();
        let layer = KQuantLinear::from_qtensor(&weight, Some(bias.clone())).unwrap();
        assert_eq!(layer.matrix().map(|matrix| matrix.ty()), Some(ty));
        let x = Tensor::randn(0f32, 1.0, (2, 3, 512), &Device::Cpu).unwrap();
        let dense = weight.dequantize(&Device::Cpu).unwrap();
        let exact = x.broadcast_matmul(&dense.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        let y = layer.forward(&x).unwrap();
        assert_eq!(y.dims(), [2, 3, 48]);
        let rms = |t: &Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let error = rms(&(&y - &exact).unwrap()) / rms(&exact);
        assert!(error < 0.02, "{ty}: {error}");
    }
}

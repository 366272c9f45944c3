//! 4-bit integers of AWQ and GPTQ checkpoints on the CPU: weights, products, and what is refused.
#![cfg(feature = "candle")]

mod common;

use candle_core::{DType, Device, Module, Tensor};
use candle_taper::codec::kquant::Int4Format;
use candle_taper::nn::{Int4Tensors, KQuantLinear};
use common::int4::{FORMATS, Packed};
use half::f16;

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn weights_come_out_as_they_were_packed() {
    for format in FORMATS {
        for (rows, cols, group) in [(8, 128, 128), (24, 512, 128), (40, 768, 256), (16, 640, 640)] {
            for symmetric in [true, false] {
                let packed = Packed::new(format, rows, cols, group, symmetric);
                let dense = packed.linear(&Device::Cpu).to_dense().unwrap();
                assert_eq!(dense.weight().dims(), [rows, cols]);
                assert!(values(dense.weight()) == packed.values, "{format:?} {rows}x{cols} in groups of {group}");
            }
        }
    }
}

#[test]
fn products_are_those_of_the_weights() {
    for format in FORMATS {
        let packed = Packed::new(format, 48, 1024, 128, false);
        let bias = Tensor::arange(0f32, 48.0, &Device::Cpu).unwrap();
        let layer = KQuantLinear::from_int4(format, &packed.tensors(), Some(bias), &Device::Cpu).unwrap();
        for m in [1, 3, 20] {
            let x = Tensor::randn(0f32, 1.0, (m, 1024), &Device::Cpu).unwrap();
            let y = values(&layer.forward(&x).unwrap());
            let x = values(&x);
            for (i, y) in y.into_iter().enumerate() {
                let (x, w) = (&x[i / 48 * 1024..][..1024], &packed.values[i % 48 * 1024..][..1024]);
                let sum: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                let exact = sum + (i % 48) as f64;
                assert!((f64::from(y) - exact).abs() < 1e-4, "{format:?} {m}: {y}, not {exact}");
            }
        }
    }
}

fn error(format: Int4Format, tensors: &Int4Tensors) -> String {
    KQuantLinear::from_int4(format, tensors, None, &Device::Cpu).unwrap_err().to_string()
}

#[test]
fn what_does_not_fit_is_refused() {
    let packed = Packed::new(Int4Format::Gptq, 16, 512, 128, false);
    let tensors = packed.tensors();
    // The wrong format, or another tensor's shape.
    let text = error(Int4Format::Awq, &tensors);
    assert!(text.contains("[64, 16]") && text.contains("Awq"), "{text}");
    let wrong = Tensor::zeros((4, 3), DType::I32, &Device::Cpu).unwrap();
    let text = error(packed.format, &Int4Tensors { qzeros: &wrong, ..tensors });
    assert!(text.contains("qzeros of [4, 3]") && text.contains("[4, 2]"), "{text}");
    let text = error(packed.format, &Int4Tensors { scales: &wrong.flatten_all().unwrap(), ..tensors });
    assert!(text.contains("scales of shape [12]"), "{text}");
    // Dtypes.
    let floats = packed.qweight.to_dtype(DType::F32).unwrap();
    let text = error(packed.format, &Int4Tensors { qweight: &floats, ..tensors });
    assert!(text.contains("qweight") && text.contains("[64, 16]") && text.contains("I32"), "{text}");
    let integers = packed.scales.to_dtype(DType::U8).unwrap();
    assert!(error(packed.format, &Int4Tensors { scales: &integers, ..tensors }).contains("F16 is expected"));
    // Groups of another size.
    let narrow = Packed::new(Int4Format::Awq, 16, 512, 64, false);
    let text = error(narrow.format, &narrow.tensors());
    assert!(text.contains("64 columns") && text.contains("multiple of 128"), "{text}");
    // Act-order.
    let order: Vec<i32> = (0..512).map(|k| (k + 1) % 512 / 128).collect();
    let order = Tensor::from_vec(order, 512, &Device::Cpu).unwrap();
    let text = error(packed.format, &Int4Tensors { g_idx: Some(&order), ..tensors });
    assert!(text.contains("input 127") && text.contains("desc_act"), "{text}");
    let text = error(packed.format, &Int4Tensors { g_idx: Some(&order.narrow(0, 0, 4).unwrap()), ..tensors });
    assert!(text.contains("g_idx of shape [4]"), "{text}");
    // Scales.
    for (odd, said) in [(f16::INFINITY, "inf"), (f16::NAN, "NaN")] {
        let mut scales: Vec<f16> = packed.scales.flatten_all().unwrap().to_vec1().unwrap();
        scales[16 + 5] = odd;
        let scales = Tensor::from_vec(scales, (4, 16), &Device::Cpu).unwrap();
        let text = error(packed.format, &Int4Tensors { scales: &scales, ..tensors });
        assert!(text.contains("group 1 of output 5") && text.contains(said), "{text}");
    }
    let exact = packed.scales.to_dtype(DType::F32).unwrap();
    let layer = KQuantLinear::from_int4(packed.format, &Int4Tensors { scales: &exact, ..tensors }, None, &Device::Cpu);
    assert!(values(layer.unwrap().to_dense().unwrap().weight()) == packed.values);
    let between = (exact + 1e-6).unwrap();
    assert!(error(packed.format, &Int4Tensors { scales: &between, ..tensors }).contains("no F16 value"));
}

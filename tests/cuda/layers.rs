//! Whole matrices decoded to memory, several at once.

use candle_core::{DType, Device, Module, Tensor};
use candle_taper::matrix::GpuLayout;
use candle_taper::ops::CompressedMatmul;
use candle_taper::{Codec, Dtype, Options};
use half::bf16;

use crate::common::Shape;
use crate::gpu;
use crate::products::matrix;

#[test]
fn layers_decoded_at_once_equal_those_decoded_alone() {
    let Some(device) = gpu() else { return };
    let int8 = Options { codec: Codec::Int8, ..Options::default() };
    let cases = [
        (Dtype::Bf16, Options::default(), GpuLayout::Fixed),
        (Dtype::Bf16, Options::default(), GpuLayout::Pair),
        (Dtype::Bf16, Options::default(), GpuLayout::Rans),
        (Dtype::Bf16, int8.clone(), GpuLayout::Integers),
        (Dtype::F32, Options::default(), GpuLayout::Rans),
        (Dtype::F16, int8, GpuLayout::Rans),
        (Dtype::Bf16, Options::default(), GpuLayout::Fixed),
    ];
    let on = |device: &Device, at: usize| {
        let (dtype, options, layout) = &cases[at];
        let w = matrix(Shape::Scaled, *dtype, 900 + 64 * at, 1100 - 40 * at, options);
        CompressedMatmul::on(w.weight, device, *layout).unwrap()
    };
    let ops: Vec<CompressedMatmul> = (0..cases.len()).map(|at| on(&device, at)).collect();
    let bits = |t: &Tensor| -> Vec<u32> {
        let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        t.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for count in 1..=ops.len() {
            let some: Vec<&CompressedMatmul> = ops[..count].iter().collect();
            // Work around it on the device's own stream: its memory is in use before, and read afterwards.
            let before = Tensor::ones((2048, 2048), DType::F32, &device).unwrap();
            drop((&before * 2.0).unwrap());
            let decoded = CompressedMatmul::decode_each(&some, dtype).unwrap();
            for (at, tensor) in decoded.iter().enumerate() {
                let [expected] = &CompressedMatmul::decode_each(&[&on(&Device::Cpu, at)], dtype).unwrap()[..] else {
                    panic!("one weight gives one tensor");
                };
                assert_eq!((tensor.dims(), tensor.dtype()), (expected.dims(), dtype));
                // INT8 weights are rounded to the tensor's dtype first on the CPU.
                let twice =
                    cases[at].1.codec == Codec::Int8 && cases[at].2 == GpuLayout::Integers && dtype != DType::BF16;
                let (a, b) = (bits(tensor), bits(expected));
                let close = |(a, b): (&u32, &u32)| {
                    let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
                    a.to_bits() == b.to_bits() || twice && bf16::from_f32(a) == bf16::from_f32(b)
                };
                assert!(a.iter().zip(&b).all(close), "matrix {at} of {count} as {dtype:?}");
            }
        }
    }
    // Layers go on as before.
    let x = Tensor::ones((1, 1100), DType::BF16, &device).unwrap();
    candle_taper::nn::CompressedLinear::on(ops[0].weight().clone(), None, &device, GpuLayout::Fixed)
        .unwrap()
        .forward(&x)
        .unwrap();
}

//! Whole matrices decoded to memory, several at once.

use candle_core::{DType, Device, Module, Tensor};
use candle_taper::matrix::GpuLayout;
use candle_taper::ops::CompressedMatmul;
use candle_taper::{Codec, Dtype, Options};

use crate::common::Shape;
use crate::gpu;
use crate::products::{Matrix, matrix};

#[test]
fn layers_decoded_at_once_equal_those_decoded_alone() {
    let Some(device) = gpu() else { return };
    let int8 = Options { codec: Codec::Int8, ..Options::default() };
    let cases = [
        (Dtype::Bf16, Options::default(), GpuLayout::Fixed),
        (Dtype::Bf16, Options::default(), GpuLayout::Window),
        (Dtype::Bf16, Options::default(), GpuLayout::Pair),
        (Dtype::Bf16, Options::default(), GpuLayout::Rans),
        (Dtype::Bf16, int8.clone(), GpuLayout::Integers),
        (Dtype::F32, Options::default(), GpuLayout::Rans),
        (Dtype::F16, int8, GpuLayout::Rans),
        (Dtype::Bf16, Options::default(), GpuLayout::Fixed),
    ];
    let matrices: Vec<Matrix> = cases
        .iter()
        .enumerate()
        .map(|(at, (dtype, options, _))| matrix(Shape::Scaled, *dtype, 900 + 64 * at, 1100 - 40 * at, options))
        .collect();
    let on =
        |device: &Device, at: usize| CompressedMatmul::on(matrices[at].weight.clone(), device, cases[at].2).unwrap();
    let ops: Vec<CompressedMatmul> = (0..cases.len()).map(|at| on(&device, at)).collect();
    let bits = |t: &Tensor| -> Vec<u32> {
        let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        t.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    let one = |op: &CompressedMatmul, dtype: DType| CompressedMatmul::decode_each(&[op], dtype).unwrap().remove(0);
    let on_cpu: Vec<CompressedMatmul> = (0..cases.len()).map(|at| on(&Device::Cpu, at)).collect();
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let expected: Vec<Tensor> = (0..cases.len())
            .map(|at| {
                let Matrix { values, rows, cols, .. } = &matrices[at];
                match (cases[at].2, dtype) {
                    // Integers have no dtype of the tensor's: their products with its scales are rounded once, to F16, where
                    // the CPU rounds to the tensor's BF16 first.
                    (GpuLayout::Integers, DType::F16) => {
                        let exact = Tensor::from_slice(values, (*rows, *cols), &Device::Cpu).unwrap();
                        exact.to_dtype(dtype).unwrap()
                    }
                    _ => one(&on_cpu[at], dtype),
                }
            })
            .collect();
        let alone: Vec<Vec<u32>> = ops.iter().map(|op| bits(&one(op, dtype))).collect();
        for count in 1..=ops.len() {
            let some: Vec<&CompressedMatmul> = ops[..count].iter().collect();
            // Work around it on the device's own stream: its memory is in use before, and read afterwards.
            let before = Tensor::ones((2048, 2048), DType::F32, &device).unwrap();
            drop((&before * 2.0).unwrap());
            let decoded = CompressedMatmul::decode_each(&some, dtype).unwrap();
            for (at, tensor) in decoded.iter().enumerate() {
                assert_eq!((tensor.dims(), tensor.dtype()), (expected[at].dims(), dtype));
                let got = bits(tensor);
                assert!(got == alone[at], "matrix {at} of {count} as {dtype:?}: another than alone");
                let wanted = bits(&expected[at]);
                if let Some(i) = (0..got.len()).find(|&i| got[i] != wanted[i]) {
                    let [got, wanted] = [got[i], wanted[i]].map(f32::from_bits);
                    panic!("matrix {at} of {count} as {dtype:?}: {got}, not {wanted} (element {i})");
                }
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

//! What goes wrong is said clearly, and the GPU goes on.

use candle_core::{DType, Device, Module, Tensor};
use candle_taper::matrix::GpuLayout;
use candle_taper::nn::{CompressedEmbedding, CompressedLinear};
use candle_taper::{Codec, Dtype, Options};

use crate::common::Shape;
use crate::products::{COMPRESSED, LAYOUTS, PARTICULAR, matrix};
use crate::{cuda, gpu, whole_gpu};

#[track_caller]
fn refused<T>(result: candle_core::Result<T>, causes: &[&str]) {
    let Err(error) = result else { panic!("not refused: {causes:?}") };
    let text = error.to_string();
    assert!(causes.iter().all(|cause| text.contains(cause)), "{text:?} does not name {causes:?}");
}

#[test]
fn wrong_devices_shapes_and_dtypes_are_named() {
    let Some(device) = gpu() else { return };
    let w = matrix(Shape::Gaussian, Dtype::Bf16, 64, 96, &Options::default());
    let f32s = matrix(Shape::Gaussian, Dtype::F32, 64, 96, &Options::default());
    for layout in PARTICULAR {
        refused(CompressedLinear::on(f32s.weight.clone(), None, &device, layout), &["f32", layout.name()]);
    }
    for layout in COMPRESSED {
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap();
        let zeros = |shape: &[usize], dtype, device: &Device| Tensor::zeros(shape, dtype, device).unwrap();
        refused(layer.forward(&zeros(&[3, 95], DType::F32, &device)), &["[3, 95]", "[64, 96]"]);
        refused(layer.forward(&zeros(&[3, 96], DType::U32, &device)), &["f32, bf16 and f16"]);
        refused(layer.forward(&zeros(&[3, 96], DType::F32, &Device::Cpu)), &["CPU", "GPU"]);
        let other = Device::new_cuda(0).unwrap();
        refused(layer.forward(&zeros(&[3, 96], DType::F32, &other)), &["another device", "cuda:0"]);
        let on_cpu = CompressedLinear::new(w.weight.clone(), None);
        refused(on_cpu.forward(&zeros(&[3, 96], DType::F32, &device)), &["GPU", "CPU"]);
        layer.forward(&zeros(&[3, 96], DType::F32, &device)).unwrap();
    }
}

/// Quantised tables too, whose rows are rounded to the tensor's dtype.
#[test]
fn quantised_embeddings_equal_the_cpus() {
    let Some(device) = gpu() else { return };
    for dtype in [Dtype::Bf16, Dtype::F32] {
        for codec in [Codec::Int8, Codec::Rate { bits: 4.0 }] {
            let w = matrix(Shape::Scaled, dtype, 300, 1100, &Options { codec, ..Options::default() });
            let ids = Tensor::new(&[0u32, 299, 64, 63, 5, 5], &Device::Cpu).unwrap();
            for out in [DType::BF16, DType::F32] {
                let expected = CompressedEmbedding::new(w.weight.clone(), out).forward(&ids).unwrap();
                for layout in [GpuLayout::Integers, GpuLayout::Rans] {
                    let table = CompressedEmbedding::on(w.weight.clone(), out, &device, layout).unwrap();
                    let rows = table.forward(&ids).unwrap().to_device(&Device::Cpu).unwrap();
                    let largest = |t: Tensor| {
                        let t = t.to_dtype(DType::F32).unwrap().abs().unwrap().flatten_all().unwrap();
                        t.max(0).unwrap().to_scalar::<f32>().unwrap()
                    };
                    let difference = largest((rows - &expected).unwrap());
                    // Escapes of rate-coded weights are BF16 multiples of the step.
                    let escapes = layout == GpuLayout::Integers && codec != Codec::Int8;
                    let allowed = if escapes { largest(expected.clone()) / 512.0 } else { 0.0 };
                    assert!(difference <= allowed, "{dtype:?} {codec:?} {out:?} {layout:?}: {difference}");
                }
            }
        }
    }
}

#[test]
fn embeddings_equal_the_cpus_and_refuse_foreign_ids() {
    let Some(device) = gpu() else { return };
    let w = matrix(Shape::Scaled, Dtype::Bf16, 300, 96, &Options::default());
    let ids = Tensor::new(&[[0u32, 299, 64], [63, 5, 5]], &Device::Cpu).unwrap();
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let expected = CompressedEmbedding::new(w.weight.clone(), dtype).forward(&ids).unwrap();
        for layout in LAYOUTS {
            let table = CompressedEmbedding::on(w.weight.clone(), dtype, &device, layout).unwrap();
            for ids in [&ids, &ids.to_device(&device).unwrap()] {
                let rows = table.forward(ids).unwrap();
                assert_eq!((rows.dims(), rows.dtype()), (&[2, 3, 96][..], dtype));
                let bits = |t: &Tensor| {
                    let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
                    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
                };
                assert!(bits(&rows) == bits(&expected), "{dtype:?} {layout:?}");
            }
            refused(table.forward(&Tensor::new(&[300u32], &Device::Cpu).unwrap()), &["300"]);
        }
    }
}

/// The GPU's memory is filled, a matrix refused, and loaded when there is room again.
#[test]
fn a_full_gpu_is_an_error_and_loading_works_afterwards() {
    let Some(device) = whole_gpu() else { return };
    let w = matrix(Shape::Gaussian, Dtype::Bf16, 8192, 4096, &Options::default());
    let context = cuda(&device).cuda_stream().context().clone();
    context.synchronize().unwrap();
    let mut hoard = Vec::new();
    let mut piece = 1usize << 30;
    while piece >= 1 << 20 {
        match cuda(&device).alloc_zeros::<u8>(piece) {
            Ok(memory) => hoard.push(memory),
            Err(_) => piece /= 2,
        }
    }
    for layout in COMPRESSED {
        refused(CompressedLinear::on(w.weight.clone(), None, &device, layout), &["no room"]);
    }
    drop(hoard);
    context.synchronize().unwrap();
    let layer = CompressedLinear::on(w.weight.clone(), None, &device, GpuLayout::Fixed).unwrap();
    let y = layer.forward(&Tensor::ones((1, 4096), DType::BF16, &device).unwrap()).unwrap();
    assert_eq!(y.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap().len(), 8192);
}

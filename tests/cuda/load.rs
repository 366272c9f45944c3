//! Loading: what it takes of the GPU's memory, and what `auto` makes of matrices.

use candle_core::{DType, Module, Tensor};
use candle_taper::cuda::{MemoryUse, set_measuring};
use candle_taper::matrix::GpuLayout;
use candle_taper::nn::CompressedLinear;
use candle_taper::ops::CompressedMatmul;
use candle_taper::{Codec, Dtype, Options};

use crate::common::Shape;
use crate::products::{COMPRESSED, matrix};
use crate::{cuda, gpu, whole_gpu};

/// The memory that loading takes at most: that of the layers, one workspace, and the one matrix that is being made ready.
#[test]
fn loading_takes_the_layers_one_workspace_and_one_matrix() {
    let Some(device) = whole_gpu() else { return };
    let w = matrix(Shape::Scaled, Dtype::Bf16, 4096, 4096, &Options::default());
    let (dense, stream) = (2 * 4096 * 4096, w.weight.stored_bytes());
    for layout in COMPRESSED {
        device.synchronize().unwrap();
        let before = MemoryUse::of(cuda(&device)).unwrap().current;
        MemoryUse::forget_peak(cuda(&device)).unwrap();
        let layers: Vec<CompressedMatmul> =
            (0..8).map(|_| CompressedMatmul::on(w.weight.clone(), &device, layout).unwrap()).collect();
        device.synchronize().unwrap();
        let MemoryUse { current, peak } = MemoryUse::of(cuda(&device)).unwrap();
        let stored: usize = layers.iter().map(|layer| layer.in_use().unwrap().1).sum();
        println!(
            "{layout:?}: 8 layers of {dense} bytes take {stored}; in use {}, at most {} while loading",
            current - before,
            peak - before
        );
        // The workspace was there before, or has twice the bytes of one decoded matrix at most; lists of repairs are cut to
        // what they hold when a matrix is complete.
        let most = stored + stream + 2 * dense + (4 << 20);
        assert!((peak - before) as usize <= most, "{layout:?}: {} above {most}", peak - before);
    }
}

#[test]
fn auto_measures_once_and_says_what() {
    let Some(device) = whole_gpu() else { return };
    let on = |w: &crate::products::Matrix| CompressedMatmul::on(w.weight.clone(), &device, GpuLayout::Auto).unwrap();
    let scaled = matrix(Shape::Scaled, Dtype::Bf16, 2048, 2048, &Options::default());
    let (first, again) = (on(&scaled), on(&scaled));
    println!("{:?}: {}", first.in_use().unwrap(), first.why().unwrap());
    assert!(first.why().unwrap().contains("fixed") && first.why().unwrap().contains("dense"));
    assert!(again.why().unwrap().contains("remembered"), "{:?}", again.why());
    assert_eq!(first.in_use(), again.in_use());
    set_measuring(false);
    let by_rule = on(&scaled);
    assert_eq!(by_rule.in_use().unwrap().0, GpuLayout::Fixed);
    assert!(by_rule.why().unwrap().contains("off"));
    set_measuring(true);
    // What no fused kernel takes, and what is chosen for the shape but does not suit the weights.
    let f32s = matrix(Shape::Scaled, Dtype::F32, 64, 64, &Options::default());
    assert_eq!(on(&f32s).in_use().unwrap().0, GpuLayout::Dense);
    let noise = on(&matrix(Shape::Noise, Dtype::Bf16, 2048, 2048, &Options::default()));
    println!("noise: {:?}: {}", noise.in_use().unwrap(), noise.why().unwrap());
    assert_eq!(noise.in_use().unwrap().0, GpuLayout::Dense);
    let int8 = Options { codec: Codec::Int8, ..Options::default() };
    let quantised = on(&matrix(Shape::Scaled, Dtype::Bf16, 2048, 2048, &int8));
    assert_eq!(quantised.in_use().unwrap().0, GpuLayout::Integers);
    assert!(quantised.why().unwrap().contains("integers"));
}

/// Products of a layer that `auto` placed are those of the layout that it took.
#[test]
fn auto_changes_no_result() {
    let Some(device) = gpu() else { return };
    let w = matrix(Shape::Gaussian, Dtype::Bf16, 1000, 1500, &Options::default());
    let on = |layout| CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap();
    let auto = on(GpuLayout::Auto);
    let same = on(auto.in_use().unwrap().0);
    for m in [1, 20, 100] {
        let x = Tensor::randn(0f32, 1.0, (m, 1500), &device).unwrap().to_dtype(DType::BF16).unwrap();
        let [a, b] = [&auto, &same].map(|layer| {
            let y = layer.forward(&x).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            y.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
        });
        assert!(a == b, "{m} rows");
    }
}

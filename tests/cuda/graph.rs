//! Products in CUDA graphs, on streams of their own, and in other threads.

use candle_core::{DType, Device, Module, Tensor};
use candle_taper::cuda::set_programmatic_launch;
use candle_taper::matrix::GpuLayout;
use candle_taper::nn::CompressedLinear;
use candle_taper::{Dtype, Options};

use crate::common::Shape;
use crate::products::{COMPRESSED, activations, matrix};
use crate::{captured_and_replayed, gpu, hopper, values, whole_gpu};

/// A chain of two layers is captured and replayed on new activations.
#[test]
fn products_are_captured_and_replayed() {
    let Some(device) = whole_gpu() else { return };
    let up = matrix(Shape::Scaled, Dtype::Bf16, 1536, 1024, &Options::default());
    let down = matrix(Shape::StudentT, Dtype::Bf16, 1024, 1536, &Options::default());
    for layout in COMPRESSED {
        // More rows may take cuBLAS.
        let rows = if layout == GpuLayout::Fixed && hopper(&device) { vec![1, 8, 40, 200] } else { vec![1, 8, 40] };
        for m in rows {
            for programmatic in [true, false] {
                set_programmatic_launch(programmatic);
                let on = |w: &crate::products::Matrix| {
                    CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap()
                };
                let (up, down) = (on(&up), on(&down));
                let input = |seed| {
                    let x = Tensor::from_vec(activations(m, 1024, seed), (m, 1024), &Device::Cpu).unwrap();
                    x.to_dtype(DType::BF16).unwrap().to_device(&device).unwrap()
                };
                let forward = |x: &Tensor| down.forward(&up.forward(x).unwrap()).unwrap();
                let (x, other) = (input(1), input(2));
                let what = format!("{layout:?} m={m} {programmatic}");
                captured_and_replayed(&device, [&x, &other], forward, &what);
            }
        }
    }
    set_programmatic_launch(true);
}

/// A layer that was loaded in one thread runs in others: one after another whatever it takes, side by side where it takes
/// no cuBLAS (whose handle, candle's, has one workspace for all streams).
#[test]
fn a_layer_runs_in_other_threads() {
    let Some(device) = gpu() else { return };
    let w = matrix(Shape::Scaled, Dtype::Bf16, 700, 1300, &Options::default());
    for layout in COMPRESSED {
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap();
        let run = |m: usize| {
            let x = Tensor::from_vec(activations(m, 1300, 4), (m, 1300), &Device::Cpu).unwrap();
            values(&layer.forward(&x.to_device(&device).unwrap()).unwrap())
        };
        let expected = [run(2), run(80)];
        for _ in 0..5 {
            std::thread::scope(|scope| scope.spawn(|| assert!([run(2), run(80)] == expected, "{layout:?}")).join())
                .unwrap();
        }
        if layout != GpuLayout::Rans {
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| (0..50).for_each(|_| assert!(run(2) == expected[0])));
                }
            });
        }
    }
}

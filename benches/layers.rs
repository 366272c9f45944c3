//! Linear layers over compressed weights beside candle's own, in one run: `cargo bench --bench layers`.
//!
//! One row of `f32` activations (as when text is generated) and 128 rows (as when a prompt is read), on all cores.
//! Stock layers take activations of their own dtype.
#![allow(missing_docs)]

use std::hint::black_box;

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::Linear;
use candle_taper::nn::CompressedLinear;
use candle_taper::{Codec, Options, Stage};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

fn layers(c: &mut Criterion) {
    for (rows, cols) in [(4096, 4096), (14336, 4096)] {
        let weight = Tensor::randn(0.0f32, 0.02, (rows, cols), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let stages = [Stage::Rans, Stage::Fixed12, Stage::Fixed11].map(|stage| {
            let options = Options { stage, ..Options::default() };
            (stage.name(), CompressedLinear::from_tensor(&weight, None, &options).unwrap())
        });
        let int8 = Options { codec: Codec::Int8, ..Options::default() };
        let int8 = [("int8", CompressedLinear::from_tensor(&weight, None, &int8).unwrap())];
        for m in [1, 128] {
            let x = Tensor::randn(0.0f32, 1.0, (m, cols), &Device::Cpu).unwrap();
            let mut group = c.benchmark_group(format!("{rows}x{cols}, {m} rows"));
            group.sample_size(10);
            for (name, layer) in stages.iter().chain(&int8) {
                group.bench_function(BenchmarkId::new("taper", name), |b| {
                    b.iter(|| layer.forward(black_box(&x)).unwrap());
                });
            }
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                let (stock, x) = (Linear::new(weight.to_dtype(dtype).unwrap(), None), x.to_dtype(dtype).unwrap());
                group.bench_function(BenchmarkId::new("candle", dtype.as_str()), |b| {
                    b.iter(|| stock.forward(black_box(&x)).unwrap());
                });
            }
        }
    }
}

criterion_group!(benches, layers);
criterion_main!(benches);

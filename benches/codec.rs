//! Speed of the codec on one core, and of an INT8 layer on all: `cargo bench`.
//!
//! Decode rates are weights a second. `matrix` decodes 4096×4096 weights to memory; `strip` decodes one row of tiles
//! again and again into a buffer that stays in cache, as the fused layers do.
#![allow(missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;

use candle_taper::codec::Scratch;
use candle_taper::format::TileStream;
use candle_taper::matrix::RayonExecutor;
use candle_taper::{Backend, Checkpoint, Codec, CompressedMatrix, Dtype, Options, Stage, compress, convert, cpu};
use common::model::{tensor, write_shard};
use common::{Shape, weights};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

const STAGES: [Stage; 3] = [Stage::Rans, Stage::Fixed12, Stage::Fixed11];

fn one_thread() -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap()
}

fn decode(c: &mut Criterion) {
    let pool = one_thread();
    for (place, rows, cols) in [("strip", 256, 4096), ("matrix", 4096, 4096)] {
        let data = weights(Shape::Scaled, Dtype::Bf16, rows, cols, 1);
        let mut group = c.benchmark_group(format!("decode/{place}"));
        group.throughput(Throughput::Elements((rows * cols) as u64)).sample_size(20);
        let mut out = vec![0; data.len()];
        let int8 = Options { codec: Codec::Int8, ..Options::default() };
        let rate = Options { codec: Codec::Rate { bits: 3.5 }, ..Options::default() };
        let lossless = STAGES.map(|stage| (stage.name(), Options { stage, ..Options::default() }));
        for (name, options) in lossless.into_iter().chain([("int8", int8), ("rate3.5", rate)]) {
            let stream = compress(&data, Dtype::Bf16, rows, cols, &options).unwrap();
            for backend in Backend::ALL.into_iter().filter(|b| b.available()) {
                let matrix = CompressedMatrix::open(&stream).unwrap().with_backend(backend);
                group.bench_function(BenchmarkId::new(name, backend.name()), |b| {
                    b.iter(|| pool.install(|| matrix.decode_rows_into(0..rows, black_box(&mut out)).unwrap()));
                });
            }
        }
        group.bench_function("memcpy", |b| b.iter(|| out.copy_from_slice(black_box(&data))));
    }
}

/// The entropy decoder alone: rANS words to class planes that stay in cache, one band at a time and two side by side.
fn words(c: &mut Criterion) {
    let data = weights(Shape::Scaled, Dtype::Bf16, 256, 256, 1);
    let stream = compress(&data, Dtype::Bf16, 256, 256, &Options::default()).unwrap();
    let stream = TileStream::parse(&stream).unwrap();
    let (table, tile) = (stream.decode_table(), stream.tile(0).unwrap());
    let [a, b] = [0, 1].map(|index| stream.band(&tile, index, &table));
    let mut group = c.benchmark_group("decode/words");
    for backend in Backend::ALL.into_iter().filter(|b| b.available() && *b != Backend::Scalar) {
        let [mut left, mut right] = [Scratch::default(), Scratch::default()];
        group.throughput(Throughput::Elements(a.weights() as u64));
        group.bench_function(BenchmarkId::new("one", backend.name()), |bench| {
            bench.iter(|| cpu::symbols(backend, [black_box(&a)], [&mut left]));
        });
        group.throughput(Throughput::Elements(2 * a.weights() as u64));
        group.bench_function(BenchmarkId::new("two", backend.name()), |bench| {
            bench.iter(|| cpu::symbols(backend, [black_box(&a), &b], [&mut left, &mut right]));
        });
    }
}

/// Products of a 4096×4096 matrix with one row of activations, on all cores: decoded as they are multiplied.
fn matvec(c: &mut Criterion) {
    let (rows, cols) = (4096, 4096);
    let data = weights(Shape::Scaled, Dtype::Bf16, rows, cols, 1);
    let x: Vec<f32> = (0..cols).map(|k| (k % 17) as f32 - 8.0).collect();
    let mut group = c.benchmark_group("matvec 4096x4096 all cores");
    group.throughput(Throughput::Elements((rows * cols) as u64)).sample_size(20);
    let int8 = Options { codec: Codec::Int8, ..Options::default() };
    let lossless = STAGES.map(|stage| (stage.name(), Options { stage, ..Options::default() }));
    for (name, options) in lossless.into_iter().chain([("int8", int8)]) {
        let stream = compress(&data, Dtype::Bf16, rows, cols, &options).unwrap();
        for backend in Backend::ALL.into_iter().filter(|b| b.available() && *b != Backend::Scalar) {
            let matrix = CompressedMatrix::open(&stream).unwrap().with_backend(backend);
            group.bench_function(BenchmarkId::new(name, backend.name()), |b| {
                b.iter(|| matrix.matvec(black_box(&x), &RayonExecutor).unwrap());
            });
        }
    }
}

fn encode(c: &mut Criterion) {
    let pool = one_thread();
    let (rows, cols) = (2048, 2048);
    let mut group = c.benchmark_group("encode");
    group.sample_size(10);
    for (name, options) in STAGES.map(|stage| (stage.name(), Options { stage, ..Options::default() })) {
        let data = weights(Shape::Scaled, Dtype::Bf16, rows, cols, 1);
        group.throughput(Throughput::Bytes(data.len() as u64));
        group.bench_function(BenchmarkId::new("bf16 one core", name), |b| {
            b.iter(|| pool.install(|| compress(&data, Dtype::Bf16, rows, cols, &options).unwrap()));
        });
    }
    let data = weights(Shape::Scaled, Dtype::Bf16, 2048, 5632, 1);
    for (name, codec) in [("int8", Codec::Int8), ("rate3.5", Codec::Rate { bits: 3.5 })] {
        let options = Options { codec, ..Options::default() };
        group.throughput(Throughput::Bytes(data.len() as u64));
        group.bench_function(BenchmarkId::new("2048x5632 all cores", name), |b| {
            b.iter(|| compress(&data, Dtype::Bf16, 2048, 5632, &options).unwrap());
        });
    }
}

/// Opening a compressed checkpoint of 10,000 tensors: headers parsed and compared with their checksum, no tile touched.
fn open(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Vec<_> = (0..10_000)
        .map(|i| {
            let dims: &[usize] = if i % 2 == 0 { &[64, 64] } else { &[64] };
            tensor(&format!("model.layers.{i}.self_attn.q_proj.weight"), Shape::Gaussian, Dtype::Bf16, dims, i)
        })
        .collect();
    let (plain, packed) = (dir.path().join("plain.safetensors"), dir.path().join("packed.safetensors"));
    write_shard(&plain, &tensors);
    convert::compress(&plain, &packed, &Default::default(), &()).unwrap();
    let mut group = c.benchmark_group("open");
    group.sample_size(20);
    group.bench_function("10,000 tensors", |b| b.iter(|| Checkpoint::open(black_box(&packed)).unwrap()));
    group.bench_function("10,000 plain tensors", |b| b.iter(|| Checkpoint::open(black_box(&plain)).unwrap()));
}

criterion_group!(benches, decode, words, matvec, encode, open);
criterion_main!(benches);

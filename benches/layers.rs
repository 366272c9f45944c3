//! Linear layers over compressed weights beside candle's own, in one run: `cargo bench --bench layers`.
//!
//! One row of `f32` activations (as when text is generated) and 128 rows (as when a prompt is read), on all cores.
//! Stock layers take activations of their own dtype. Each contender has so many copies of its matrix that they do not
//! fit into 96 MB together, and a sample is one pass over them: nothing is found in the cache. Contenders take turns, so
//! that what disturbs one disturbs all. Printed are medians, the rate at which stored bytes are read (for one row, where
//! reading is what bounds), the very first pass, in which the checksum of every tile is compared, and how many times faster
//! than each stock layer.
//!
//! `cargo bench --bench layers -- [--samples N] [TEXT…]` runs the contenders and shapes whose names hold one of the texts.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Instant;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::Linear;
use candle_taper::matrix::{Executor, Weight, compress};
use candle_taper::nn::CompressedLinear;
use candle_taper::ops::PoolExecutor;
use candle_taper::{Codec, Dtype, Options, Stage};

/// Copies of a matrix that together take at least this.
const ROTATED: usize = 96 << 20;

/// A layer in several copies.
struct Contender {
    name: String,
    bytes: usize,
    layers: Vec<Box<dyn Module>>,
    dtype: DType,
    times: Vec<f64>,
    /// The first pass of all, in which checksums are compared.
    first: Option<f64>,
}

impl Contender {
    fn new<M: Module + 'static>(name: &str, bytes: usize, dtype: DType, layer: impl Fn() -> M) -> Contender {
        let copies = ROTATED.div_ceil(bytes).max(1);
        let layers = (0..copies).map(|_| Box::new(layer()) as Box<dyn Module>).collect();
        Contender { name: name.into(), bytes, layers, dtype, times: Vec::new(), first: None }
    }

    /// One pass over the copies, in seconds for each.
    fn sample(&mut self, x: &Tensor) {
        let start = Instant::now();
        for layer in &self.layers {
            black_box(layer.forward(black_box(x)).expect("a product"));
        }
        self.times.push(start.elapsed().as_secs_f64() / self.layers.len() as f64);
    }

    fn median(&self) -> f64 {
        let mut times = self.times.clone();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }
}

/// Ours: every kind and stage.
fn codings() -> Vec<(&'static str, Dtype, Options)> {
    let lossless = |stage| Options { stage, ..Options::default() };
    let int8 = |stage| Options { codec: Codec::Int8, stage, ..Options::default() };
    let rate = |bits| Options { codec: Codec::Rate { bits }, ..Options::default() };
    vec![
        ("bf16 rans", Dtype::Bf16, lossless(Stage::Rans)),
        ("bf16 fixed12", Dtype::Bf16, lossless(Stage::Fixed12)),
        ("bf16 fixed11", Dtype::Bf16, lossless(Stage::Fixed11)),
        ("f16 rans", Dtype::F16, lossless(Stage::Rans)),
        ("f32 rans", Dtype::F32, lossless(Stage::Rans)),
        ("int8 raw", Dtype::Bf16, int8(Stage::Fixed12)),
        ("int8 fixed11", Dtype::Bf16, int8(Stage::Fixed11)),
        ("int8 rans", Dtype::Bf16, int8(Stage::Rans)),
        ("rate 3.5", Dtype::Bf16, rate(3.5)),
        ("rate 6", Dtype::Bf16, rate(6.0)),
    ]
}

/// Little-endian bytes of a tensor.
fn bytes_of(weight: &Tensor, dtype: Dtype) -> Vec<u8> {
    let flat = weight.flatten_all().expect("a matrix");
    let values = flat.to_vec1::<f32>().expect("f32 weights");
    match dtype {
        Dtype::Bf16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// All contenders of one shape whose names are wanted.
fn contenders(rows: usize, cols: usize, wanted: &dyn Fn(&str) -> bool) -> Vec<Contender> {
    let weight = Tensor::randn(0.0f32, 0.02, (rows, cols), &Device::Cpu).expect("a tensor");
    let mut all = Vec::new();
    for (name, dtype, options) in codings().into_iter().filter(|(name, ..)| wanted(name)) {
        let stream = compress(&bytes_of(&weight, dtype), dtype, rows, cols, &options).expect("a stream");
        all.push(Contender::new(name, stream.len(), DType::F32, || {
            CompressedLinear::new(Weight::new(stream.clone()).expect("a weight"), None)
        }));
    }
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let name = format!("candle {}", dtype.as_str());
        if wanted(&name) {
            let weight = weight.to_dtype(DType::BF16).and_then(|w| w.to_dtype(dtype)).expect("a dtype");
            let bytes = rows * cols * dtype.size_in_bytes();
            all.push(Contender::new(&name, bytes, dtype, || Linear::new(weight.copy().expect("a copy"), None)));
        }
    }
    if wanted("candle q8_0") {
        all.push(Contender::new("candle q8_0", rows * cols / 32 * 34, DType::F32, || {
            QMatMul::from_qtensor(QTensor::quantize(&weight, GgmlDType::Q8_0).expect("blocks")).expect("a layer")
        }));
    }
    all
}

/// Bytes a second that all cores together read from memory.
fn read_bandwidth() -> f64 {
    let buffer: Vec<u64> = (0..48 << 20).collect();
    let parts: Vec<&[u64]> = buffer.chunks(1 << 16).collect();
    let mut times = Vec::new();
    for _ in 0..9 {
        let start = Instant::now();
        PoolExecutor.run(parts.len(), &|part| {
            let mut sums = [0u64; 32];
            for chunk in parts[part].as_chunks::<32>().0 {
                sums.iter_mut().zip(chunk).for_each(|(sum, v)| *sum ^= v);
            }
            black_box(sums);
        });
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    8.0 * buffer.len() as f64 / times[times.len() / 2]
}

fn main() {
    // cargo passes --bench.
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench").peekable();
    let (mut samples, mut texts) = (15, Vec::new());
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--samples" => samples = args.next().and_then(|n| n.parse().ok()).unwrap_or(samples),
            _ => texts.push(arg),
        }
    }
    let shapes = [(4096, 4096), (14336, 4096)];
    let shape_named = |text: &str| shapes.iter().any(|(rows, cols)| format!("{rows}x{cols}").contains(text));
    let batch_named = |text: &str| ["1 rows", "128 rows"].contains(&text);
    let (places, names): (Vec<_>, Vec<_>) = texts.iter().partition(|text| shape_named(text) || batch_named(text));
    let wanted = |name: &str| names.is_empty() || names.iter().any(|text| name.contains(*text));
    let here = |place: &str, kind: &dyn Fn(&str) -> bool| {
        let mut own = places.iter().filter(|text| kind(text)).peekable();
        own.peek().is_none() || own.any(|text| place.contains(*text))
    };
    println!("all cores read {:.1} GB/s", read_bandwidth() / 1e9);
    for (rows, cols) in shapes {
        if !here(&format!("{rows}x{cols}"), &shape_named) {
            continue;
        }
        let mut all = contenders(rows, cols, &wanted);
        for m in [1, 128] {
            if here(&format!("{m} rows"), &batch_named) {
                measure(&mut all, m, cols, if m == 1 { samples } else { samples.div_ceil(3) });
                print(&all, &format!("{rows}x{cols}, {m} rows"), m == 1);
            }
        }
    }
}

/// Lets all contenders take turns.
fn measure(all: &mut [Contender], m: usize, cols: usize, samples: usize) {
    let x = Tensor::randn(0.0f32, 1.0, (m, cols), &Device::Cpu).expect("a tensor");
    let inputs: Vec<Tensor> = all.iter().map(|c| x.to_dtype(c.dtype).expect("a dtype")).collect();
    all.iter_mut().for_each(|contender| contender.times.clear());
    for round in 0..=samples {
        for (contender, x) in all.iter_mut().zip(&inputs) {
            contender.sample(x);
            if round == 0 {
                contender.first = contender.first.or(contender.times.pop());
                contender.times.clear();
            }
        }
    }
}

fn print(all: &[Contender], title: &str, bound_by_reading: bool) {
    let stock: Vec<&Contender> = all.iter().filter(|c| c.name.starts_with("candle")).collect();
    println!("\n{title}");
    print!("{:<14} {:>8} {:>8}", "", "ms", if bound_by_reading { "GB/s" } else { "" });
    print!(" {:>8}", if bound_by_reading { "first ms" } else { "" });
    stock.iter().for_each(|peer| print!(" {:>12}", peer.name));
    println!();
    for contender in all {
        let time = contender.median();
        print!("{:<14} {:>8.3} ", contender.name, time * 1e3);
        match bound_by_reading {
            true => {
                let first = contender.first.unwrap_or(time);
                print!("{:>8.1} {:>8.3}", contender.bytes as f64 / time / 1e9, first * 1e3);
            }
            false => print!("{:>8} {:>8}", "", ""),
        }
        stock.iter().for_each(|peer| print!(" {:>11.2}x", peer.median() / time));
        println!();
    }
}

//! Layers of one shape: ours over compressed weights, candle's over plain ones and GGUF blocks.

use std::hint::black_box;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::quantized::{QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::Linear;
use candle_taper::nn::{CompressedLinear, KQuantLinear};
use candle_taper::ops::CompressedMatmul;
use candle_taper::{Dtype, compress};
use half::bf16;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Normal, StudentT};

use super::args::{BenchArgs, BlockCoding, Coding, Shape, Stock, Weights};
use super::decode;
use super::int4;
use super::progress::Steps;
use super::report::{Group, Place, Row};
use super::timing::in_turns;

/// Codings and formats that are timed unless others are asked for.
const CODINGS: [&str; 5] = ["rans", "fixed12", "fixed11", "int8", "int8-fixed12"];
const STOCKS: [&str; 4] = ["bf16", "f16", "f32", "q8_0"];
/// The same on a GPU.
const GPU_CODINGS: [&str; 3] = ["rans", "int8", "rate-4"];
const GPU_STOCKS: [&str; 1] = ["bf16"];
/// The calls of a sample on a GPU: enough to fill it, few enough to be enqueued before they begin.
const GPU_CALLS: u32 = 40;
/// Rounds unless asked for.
pub(super) const ROUNDS: u32 = 20;
/// One sample is the mean of calls that take about this long together, so that threads are awake as they are in a model.
const BURST: Duration = Duration::from_millis(10);
/// The calls of a sample at most.
const MAX_CALLS: u32 = 64;

/// A layer that is timed.
struct Subject {
    name: String,
    stock: bool,
    /// Bytes of its weight.
    bytes: usize,
    /// Bytes of the uncompressed weight that are written and read again: none if it is multiplied as it is decoded.
    aside: usize,
    /// The dtype of its activations.
    dtype: DType,
    /// The same layer several times, so that together they are larger than the caches.
    copies: Rc<Vec<Box<dyn Module>>>,
    next: usize,
    /// On a GPU: no kernel starts before the one that it follows has ended.
    plain: bool,
}

impl Subject {
    /// As many layers from `make` as it takes for their weights to fill `rotate` bytes. `make` also gives the bytes of
    /// the weight.
    fn new<M: Module + 'static>(
        name: String,
        stock: bool,
        dtype: DType,
        rotate: usize,
        make: impl Fn() -> Result<(M, usize)>,
    ) -> Result<Subject> {
        let (first, bytes) = make()?;
        let mut copies: Vec<Box<dyn Module>> = vec![Box::new(first)];
        while copies.len() < rotate.div_ceil(bytes.max(1)) {
            copies.push(Box::new(make()?.0));
        }
        Ok(Subject { name, stock, bytes, aside: 0, dtype, copies: Rc::new(copies), next: 0, plain: false })
    }

    /// The other way to multiply with such a weight: `make` gives a layer that writes all its `weights` and reads them again.
    fn unfused<F: Fn() -> candle_core::Result<Tensor> + 'static>(
        &self,
        rotate: usize,
        weights: usize,
        make: impl Fn() -> Result<F>,
    ) -> Result<Subject> {
        let name = format!("{}, unfused", self.name);
        let made = Subject::new(name, false, self.dtype, rotate, || Ok((Unfused(make()?), self.bytes)))?;
        Ok(Subject { aside: 2 * weights * self.dtype.size_in_bytes(), ..made })
    }

    /// The same layers, launched plainly.
    fn plainly(&self) -> Subject {
        let name = format!("{}, plain launch", self.name);
        Subject { name, copies: self.copies.clone(), plain: true, ..*self }
    }

    /// The seconds that each of `calls` calls takes.
    fn time(&mut self, x: &Tensor, calls: u32, clock: &mut Clock) -> Result<f64> {
        launch_plainly(self.plain);
        let seconds = clock.time(|| {
            for _ in 0..calls {
                self.next = (self.next + 1) % self.copies.len();
                black_box(self.copies[self.next].forward(black_box(x))?);
            }
            Ok(())
        })?;
        Ok(seconds / f64::from(calls))
    }
}

/// A layer whose weight is decoded to memory for each product.
struct Unfused<F>(F);

impl<F: Fn() -> candle_core::Result<Tensor>> Module for Unfused<F> {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Linear::new((self.0)()?, None).forward(x)
    }
}

/// How a GPU's kernels are launched from now on.
fn launch_plainly(plain: bool) {
    #[cfg(feature = "cuda")]
    candle_taper::cuda::set_programmatic_launch(!plain);
    let _ = plain;
}

/// What times are taken with: the GPU's own clock for what it is given to do, else the process's.
pub(super) enum Clock {
    Process,
    #[cfg(feature = "cuda")]
    Gpu(candle_taper::cuda::GpuTimer),
}

impl Clock {
    fn new(device: &Device) -> Result<Clock> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Clock::Gpu(candle_taper::cuda::GpuTimer::new(device)?)),
            _ => Ok(Clock::Process),
        }
    }

    pub(super) fn time(&mut self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        match self {
            Clock::Process => {
                let start = Instant::now();
                work()?;
                Ok(start.elapsed().as_secs_f64())
            }
            #[cfg(feature = "cuda")]
            Clock::Gpu(timer) => timer.time(work),
        }
    }
}

/// Times all layers of the arguments: a group for each shape and number of rows.
pub fn run(args: &BenchArgs, device: &Device, steps: &Steps) -> Result<Vec<Group>> {
    let (codings, stocks) = match args.on_gpu() {
        true => (args.codings(&GPU_CODINGS), args.stocks(&GPU_STOCKS)),
        false => (args.codings(&CODINGS), args.stocks(&STOCKS)),
    };
    let mut clock = Clock::new(device)?;
    ensure!(!codings.is_empty() || !stocks.is_empty(), "there is nothing to time: --codec and --stock are none");
    let rounds = args.repetitions.unwrap_or(ROUNDS);
    let work = args.shape.len() * (codings.len() + stocks.len() + args.rows().len() * rounds as usize);
    steps.expect(work as u64);
    let mut groups = Vec::new();
    for &shape in &args.shape {
        let mut subjects = subjects(args, shape, &codings, &stocks, device, steps)?;
        for &rows in args.rows() {
            let title = format!("{shape}, {rows} row{}", if rows == 1 { "" } else { "s" });
            steps.begin(&title);
            let work = (shape, rows as usize, rounds as usize);
            groups.push(group(title, &mut subjects, work, device, &mut clock, steps)?);
        }
        if args.decode {
            groups.push(decode::run(args, shape, &codings, device, &mut clock, steps)?);
        }
    }
    Ok(groups)
}

/// Times the layers of one shape with some rows of activations.
fn group(
    title: String,
    subjects: &mut [Subject],
    (shape, rows, rounds): (Shape, usize, usize),
    device: &Device,
    clock: &mut Clock,
    steps: &Steps,
) -> Result<Group> {
    let x = Tensor::randn(0.0f32, 1.0, (rows, shape.input), device)?;
    let inputs = subjects.iter().map(|s| Ok(x.to_dtype(s.dtype)?)).collect::<Result<Vec<_>>>()?;
    // The first call of a layer checks checksums or repacks blocks; the last one says how many make a sample.
    let calls = subjects.iter_mut().zip(&inputs).map(|(subject, x)| {
        subject.time(x, subject.copies.len() as u32, clock)?;
        if device.is_cuda() {
            subject.time(x, GPU_CALLS, clock)?;
            return Ok(GPU_CALLS);
        }
        let calls = BURST.as_secs_f64() / subject.time(x, 1, clock)?.max(1e-9);
        Ok((calls.ceil() as u32).clamp(1, MAX_CALLS))
    });
    let calls = calls.collect::<Result<Vec<u32>>>()?;
    let samples = in_turns(subjects.len(), rounds, |subject, _| {
        if subject == 0 {
            steps.step();
        }
        subjects[subject].time(&inputs[subject], calls[subject], clock)
    })?;
    let (weights, rows_of_activations) = ((shape.out * shape.input) as u64, rows);
    let unfused = subjects.iter().any(|subject| subject.aside > 0);
    let row = |subject: &Subject| Row {
        name: subject.name.clone(),
        stock: subject.stock,
        bytes: subject.bytes as u64,
        weights,
        moved: unfused.then(|| {
            let activations = rows_of_activations * (shape.out + shape.input) * subject.dtype.size_in_bytes();
            (subject.bytes + subject.aside + activations) as u64
        }),
        samples: Default::default(),
    };
    let rows = subjects.iter().zip(samples).map(|(subject, samples)| Row { samples, ..row(subject) });
    let plot = Some(Place { panel: shape.to_string(), rows: rows_of_activations });
    Ok(Group { title, tokens: None, samples_a_pass: 1, rows: rows.collect(), plot })
}

/// All layers of one shape. Their weights are the same BF16 numbers.
fn subjects(
    args: &BenchArgs,
    shape: Shape,
    codings: &[Coding],
    stocks: &[Stock],
    device: &Device,
    steps: &Steps,
) -> Result<Vec<Subject>> {
    let Shape { out, input } = shape;
    let rotate = (args.rotate() as usize) << 20;
    let values = values(args.weights, shape)?;
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut subjects = Vec::new();
    let fits = |block: usize, name: &str, asked: bool| -> Result<bool> {
        if input.is_multiple_of(block) {
            return Ok(true);
        }
        let why = format!("{shape}: {name} needs a multiple of {block} inputs");
        ensure!(!asked, "{why}");
        steps.note(&format!("{why}, it is left out"));
        steps.step();
        Ok(false)
    };
    let plain = Tensor::from_vec(values, (out, input), &Device::Cpu)?;
    let quantized = |format| Ok::<_, anyhow::Error>(QTensor::quantize(&plain.to_dtype(DType::F32)?, format)?);
    let dense = plain.to_device(device)?;
    for coding in codings {
        steps.begin(&format!("{shape}: making {}", coding.name));
        if let Some(format) = coding.blocks {
            let block = match format {
                BlockCoding::Ggml(format) => format.block_size(),
                BlockCoding::Int4 { .. } => int4::GROUP,
            };
            fits(block, &coding.name, true)?;
            let make: Box<dyn Fn() -> Result<KQuantLinear>> = match format {
                BlockCoding::Ggml(format) => {
                    let blocks = quantized(format)?;
                    Box::new(move || Ok(KQuantLinear::from_qtensor(&copied(&blocks, device)?, None)?))
                }
                BlockCoding::Int4 { fp8 } => {
                    let packed = int4::Packed::new(&plain.flatten_all()?.to_vec1()?, shape)?;
                    Box::new(move || Ok(packed.layer(device)?.with_fp8(fp8)))
                }
            };
            let layer = || {
                let layer = make()?;
                let bytes = layer.stored_bytes();
                Ok((layer, bytes))
            };
            let fused = Subject::new(coding.name.clone(), false, args.activations(), rotate, layer)?;
            let dtype = fused.dtype;
            let other = args.unfused.then(|| {
                fused.unfused(rotate, out * input, || {
                    let layer = make()?;
                    Ok(move || layer.op().dequantize(dtype))
                })
            });
            subjects.push(fused);
            subjects.extend(other.transpose()?);
            steps.step();
            continue;
        }
        let options = coding.options.clone().context("--codec dense is for models; layers have --stock")?;
        let stream = compress(&bytes, Dtype::Bf16, out, input, &options)?;
        for &layout in &args.layout {
            let layer = || {
                let weight = candle_taper::matrix::Weight::new(stream.clone())?;
                let layer = CompressedLinear::on(weight, None, device, layout)?;
                let bytes = layer.in_use().map_or(stream.len(), |(_, bytes)| bytes);
                Ok((layer, bytes))
            };
            let mut name = coding.name.clone();
            if device.is_cuda() {
                let weight = candle_taper::matrix::Weight::new(stream.clone())?;
                let used = CompressedLinear::on(weight, None, device, layout)?.in_use();
                name += &format!(" as {}", used.map_or(layout, |(layout, _)| layout).name());
            }
            let subject = Subject::new(name, false, args.activations(), rotate, layer)?;
            let dtype = subject.dtype;
            let other = args.unfused.then(|| {
                subject.unfused(rotate, out * input, || {
                    let weight = candle_taper::matrix::Weight::new(stream.clone())?;
                    let op = CompressedMatmul::on(weight, device, layout)?;
                    Ok(move || Ok(CompressedMatmul::decode_each(&[&op], dtype)?.swap_remove(0)))
                })
            });
            match (device.is_cuda(), args.plain_launch) {
                (false, _) => subjects.push(subject),
                (true, true) => subjects.push(subject.plainly()),
                (true, false) => {
                    let plain = subject.plainly();
                    subjects.extend([subject, plain]);
                }
            }
            subjects.extend(other.transpose()?);
        }
        steps.step();
    }
    for &stock in stocks {
        if let Stock::Blocks(format) = stock
            && !fits(format.block_size(), &stock.to_string(), !args.stock.is_empty())?
        {
            continue;
        }
        steps.begin(&format!("{shape}: making candle's {stock}"));
        let name = stock.to_string();
        subjects.push(match stock {
            Stock::None => continue,
            Stock::Float(dtype) => Subject::new(name, true, dtype, rotate, || {
                let weight = dense.to_dtype(dtype)?.copy()?;
                Ok((Linear::new(weight, None), out * input * dtype.size_in_bytes()))
            })?,
            Stock::Blocks(format) => {
                let blocks = quantized(format)?;
                // On a GPU candle takes any dtype, and 16 bits are what it is fastest with.
                let dtype = if device.is_cpu() { DType::F32 } else { args.activations() };
                Subject::new(name, true, dtype, rotate, || {
                    let blocks = copied(&blocks, device)?;
                    let bytes = blocks.storage_size_in_bytes();
                    Ok((QMatMul::from_qtensor(blocks)?, bytes))
                })?
            }
        });
        steps.step();
    }
    Ok(subjects)
}

/// The same blocks once more, on `device`.
fn copied(blocks: &QTensor, device: &Device) -> Result<QTensor> {
    let storage = QStorage::from_data(blocks.data()?, device, blocks.dtype())?;
    Ok(QTensor::new(storage, blocks.shape())?)
}

/// Random weights, the same in every run.
pub(super) fn values(weights: Weights, Shape { out, input }: Shape) -> Result<Vec<bf16>> {
    let mut rng = SmallRng::seed_from_u64(1);
    let normal = Normal::new(0.0f32, 0.02)?;
    let tails = StudentT::new(5.0f32)?;
    let count = out.checked_mul(input).context("the shape is too large")?;
    Ok(match weights {
        Weights::Gaussian => (0..count).map(|_| bf16::from_f32(normal.sample(&mut rng))).collect(),
        // 0.0155 makes them as large as the Gaussian ones.
        Weights::StudentT => (0..count).map(|_| bf16::from_f32(0.0155 * tails.sample(&mut rng))).collect(),
        Weights::Scaled => {
            // Scales as those of Llama's projections.
            let mut scales = |sigma: f32, n: usize| -> Result<Vec<f32>> {
                let normal = Normal::new(0.0, sigma)?;
                Ok((0..n).map(|_| normal.sample(&mut rng).exp()).collect())
            };
            let (by_row, by_col) = (scales(0.38, out)?, scales(0.25, input)?);
            let places = by_row.iter().flat_map(|row| by_col.iter().map(move |col| row * col));
            places.map(|scale| bf16::from_f32(scale * normal.sample(&mut rng))).collect()
        }
    })
}

//! Steps of a generation as a CUDA graph: the same bits as launched kernel by kernel.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_taper::Options;
use candle_taper::matrix::GpuLayout;
use candle_taper::models::{
    Cache, CausalLm, CompressedLlama, DenseLlama, DenseWeights, KQuantLlama, Llama, Weights, config, gguf,
};
use candle_taper::nn::LinearLayer;
use candle_taper::{Checkpoint, Codec};

use crate::common::gguf_model::write;
use crate::common::llama::{Tiny, VOCAB};
use crate::{values, whole_gpu};

/// A model with rows of whole K-quant blocks, and a context beyond the first growth of a cache.
fn tiny(bf16: bool) -> Tiny {
    let mut tiny = Tiny::new();
    let (hidden, wide) = (256, 512);
    for (key, value) in [("hidden_size", hidden), ("intermediate_size", wide), ("num_attention_heads", 4)] {
        tiny.config[key] = value.into();
    }
    for (name, shape) in &mut tiny.tensors {
        for n in shape.iter_mut() {
            *n = [(64, hidden), (96, wide)].into_iter().find(|(from, _)| from == n).map_or(*n, |(_, to)| to);
        }
        if name.contains("k_proj") || name.contains("v_proj") {
            shape[0] = hidden / 2;
        }
    }
    tiny.bf16 = bf16;
    tiny.write();
    tiny
}

fn compressed(dir: &Path, dtype: DType, device: &Device, layout: GpuLayout, codec: Codec) -> CompressedLlama {
    let options = Options { codec, ..Options::default() };
    CompressedLlama::from_pretrained_on(dir, dtype, device, layout, &options).unwrap()
}

fn ids(first: usize, count: usize, batch: usize) -> Tensor {
    let ids = (0..batch).flat_map(|b| (first..first + count).map(move |i| ((i * 37 + b * 11) % VOCAB) as u32));
    Tensor::from_vec(ids.collect(), (batch, count), &Device::Cpu).unwrap()
}

fn step(model: &dyn CausalLm, position: usize, batch: usize, cache: &mut Cache) -> Vec<f32> {
    values(&model.forward(&ids(position, 1, batch), position, cache).unwrap())
}

/// Two caches of a model, the second with graphs, after a prompt.
fn caches(model: &dyn CausalLm, prompt: usize, batch: usize) -> [Cache; 2] {
    [false, true].map(|on| {
        let mut cache = model.new_cache(true).unwrap().with_cuda_graph(on);
        model.forward(&ids(0, prompt, batch), 0, &mut cache).unwrap();
        cache
    })
}

/// Steps from `prompt` to `end` give the same bits both ways, and all but those that come before a capture are replayed.
fn replays_equal_launches(model: &dyn CausalLm, prompt: usize, end: usize, batch: usize, growths: usize, what: &str) {
    let [mut launched, mut replayed] = caches(model, prompt, batch);
    for position in prompt..end {
        let expected = step(model, position, batch, &mut launched);
        assert!(expected.iter().all(|logit| logit.is_finite()), "{what} at {position}");
        assert!(step(model, position, batch, &mut replayed) == expected, "{what} at {position}");
    }
    assert_eq!(launched.replayed(), 0, "{what}");
    let why = replayed.cuda_graph_refused();
    assert_eq!(replayed.replayed(), end - prompt - 1 - growths, "{what}: steps that were replayed; refused: {why:?}");
}

#[test]
fn replays_of_compressed_models_equal_launches() {
    let Some(device) = whole_gpu() else { return };
    let (floats, halves) = (tiny(false), tiny(true));
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for (layout, codec) in [
            (GpuLayout::Fixed, Codec::Lossless),
            (GpuLayout::Window, Codec::Lossless),
            (GpuLayout::Pair, Codec::Lossless),
            (GpuLayout::Rans, Codec::Lossless),
            (GpuLayout::Dense, Codec::Lossless),
            (GpuLayout::Integers, Codec::Int8),
            (GpuLayout::Auto, Codec::Rate { bits: 4.0 }),
        ] {
            let what = format!("{layout:?} {codec:?} {dtype:?}");
            let model = compressed(halves.path(), dtype, &device, layout, codec);
            // The cache grows at 256 and at 512 positions.
            let end = if layout == GpuLayout::Fixed { 530 } else { 270 };
            replays_equal_launches(&model, 5, end, 1, if end > 512 { 2 } else { 1 }, &what);
        }
    }
    let model = compressed(floats.path(), DType::F32, &device, GpuLayout::Auto, Codec::Lossless);
    replays_equal_launches(&model, 2, 300, 3, 1, "batch of 3");
}

#[test]
fn replays_of_other_models_equal_launches() {
    let Some(device) = whole_gpu() else { return };
    let tiny = tiny(false);
    let place = tempfile::tempdir().unwrap();
    for ty in [GgmlDType::Q4K, GgmlDType::Q6K, GgmlDType::Q8_0] {
        let path = write(tiny.path(), &place.path().join("model.gguf"), ty, |_| ());
        let file = gguf::open(&path).unwrap();
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let model = KQuantLlama::from_gguf_on(&file, dtype, &device).unwrap();
            replays_equal_launches(&model, 4, 310, 1, 1, &format!("{ty:?} {dtype:?}"));
        }
    }
    for dtype in [DType::BF16, DType::F32] {
        let model = DenseLlama::from_pretrained(tiny.path(), dtype, &device).unwrap();
        replays_equal_launches(&model, 4, 310, 1, 1, &format!("dense {dtype:?}"));
    }
}

/// Positions that are forgotten and come again, caches in turns, ids on the GPU, and one cache for two models.
#[test]
fn graphs_follow_their_cache() {
    let Some(device) = whole_gpu() else { return };
    let tiny = tiny(true);
    let model = compressed(tiny.path(), DType::BF16, &device, GpuLayout::Fixed, Codec::Lossless);
    let [mut launched, mut first] = caches(&model, 7, 1);
    let [_, mut second] = caches(&model, 7, 1);
    let run = |cache: &mut Cache, from: usize, to: usize| -> Vec<Vec<f32>> {
        (from..to).map(|position| step(&model, position, 1, cache)).collect()
    };
    let expected = run(&mut launched, 7, 60);
    // In turns.
    for position in 7..40 {
        for cache in [&mut first, &mut second] {
            assert!(step(&model, position, 1, cache) == expected[position - 7], "in turns at {position}");
        }
    }
    // Back to the 20th position; ids from the GPU, and of another dtype.
    first.truncate(20);
    for position in 20..60 {
        let ids = ids(position, 1, 1).to_device(&device).unwrap().to_dtype(DType::I64).unwrap();
        let logits = model.forward(&ids, position, &mut first).unwrap();
        assert!(values(&logits) == expected[position - 7], "again at {position}");
    }
    assert_eq!(first.replayed(), 33 - 1 + 40);
    // From the start, a prompt between two replays.
    first.reset();
    model.forward(&ids(0, 7, 1), 0, &mut first).unwrap();
    assert!(run(&mut first, 7, 60) == expected, "after a reset");
    // Logits stay as they are when the next step runs.
    first.truncate(30);
    let logits = model.forward(&ids(30, 1, 1), 30, &mut first).unwrap();
    step(&model, 31, 1, &mut first);
    assert!(values(&logits) == expected[23]);
    // Another model takes over the cache, and the first comes back.
    let other = compressed(tiny.path(), DType::BF16, &device, GpuLayout::Pair, Codec::Lossless);
    for model in [&other, &model, &other] {
        first.truncate(7);
        let [mut launched, _] = caches(model, 7, 1);
        for position in 7..20 {
            let expected = step(model, position, 1, &mut launched);
            assert!(step(model, position, 1, &mut first) == expected, "another model at {position}");
        }
    }
    // What a cache refuses it refuses here too, and goes on.
    let place = first.len();
    let outside = Tensor::new(&[[VOCAB as u32]], &Device::Cpu).unwrap();
    assert!(other.forward(&outside, place, &mut first).unwrap_err().to_string().contains("vocabulary"));
    assert!(other.forward(&ids(0, 1, 1), place + 5, &mut first).unwrap_err().to_string().contains("gap"));
    assert!(other.forward(&ids(0, 1, 2), place, &mut first).unwrap_err().to_string().contains("batch"));
    first.truncate(7);
    let [mut launched, _] = caches(&other, 7, 1);
    assert!(step(&other, 7, 1, &mut first) == step(&other, 7, 1, &mut launched));
    // A new batch from the start.
    first.reset();
    let [mut launched, _] = caches(&other, 3, 2);
    other.forward(&ids(0, 3, 2), 0, &mut first).unwrap();
    for position in 3..9 {
        let expected = step(&other, position, 2, &mut launched);
        assert!(step(&other, position, 2, &mut first) == expected, "a batch of 2 at {position}");
    }
}

/// The end of a context is an error, also for a graph.
#[test]
fn a_full_context_ends_replays() {
    let Some(device) = whole_gpu() else { return };
    let mut tiny = tiny(true);
    tiny.config["max_position_embeddings"] = 40.into();
    tiny.write();
    let model = compressed(tiny.path(), DType::BF16, &device, GpuLayout::Fixed, Codec::Lossless);
    let [_, mut cache] = caches(&model, 4, 1);
    (4..40).for_each(|position| _ = step(&model, position, 1, &mut cache));
    assert!(model.forward(&ids(0, 1, 1), 40, &mut cache).unwrap_err().to_string().contains("context of 40"));
}

/// Model and cache move to other threads, whose streams are others.
#[test]
fn graphs_move_between_threads() {
    let Some(device) = whole_gpu() else { return };
    let tiny = tiny(true);
    let mut model = compressed(tiny.path(), DType::BF16, &device, GpuLayout::Fixed, Codec::Lossless);
    let [mut launched, mut cache] = caches(&model, 4, 1);
    let expected: Vec<_> = (4..64).map(|position| step(&model, position, 1, &mut launched)).collect();
    for round in 0..3 {
        (model, cache) = std::thread::scope(|scope| {
            let run = || {
                let (model, mut cache) = (model, cache);
                for position in 4 + 20 * round..24 + 20 * round {
                    assert!(step(&model, position, 1, &mut cache) == expected[position - 4], "at {position}");
                }
                (model, cache)
            };
            scope.spawn(run).join().unwrap()
        });
    }
    assert_eq!(cache.replayed(), 3 * 19);
}

/// A layer that looks at its result on the CPU, which no graph can do.
struct Looking(candle_nn::Linear);

impl Module for Looking {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.0.forward(x)?;
        y.to_device(&Device::Cpu)?;
        Ok(y)
    }
}

impl LinearLayer for Looking {}

/// Weights of such layers.
struct LookingWeights<'a>(DenseWeights<'a>);

impl Weights for LookingWeights<'_> {
    type Linear = Looking;
    type Embedding = candle_nn::Embedding;

    fn linear(&self, name: &str, out_dim: usize, in_dim: usize) -> candle_taper::Result<Looking> {
        self.0.linear(name, out_dim, in_dim).map(Looking)
    }

    fn embedding(&self, name: &str, vocab: usize, dim: usize) -> candle_taper::Result<candle_nn::Embedding> {
        self.0.embedding(name, vocab, dim)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> candle_taper::Result<Tensor> {
        self.0.tensor(name, shape)
    }

    fn tied_lm_head(&self, embedding: &candle_nn::Embedding) -> candle_taper::Result<Looking> {
        self.0.tied_lm_head(embedding).map(Looking)
    }

    fn tensors(&self) -> Vec<(&str, &[u64])> {
        self.0.tensors()
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    fn dtype(&self) -> DType {
        self.0.dtype()
    }

    fn device(&self) -> &Device {
        self.0.device()
    }
}

#[test]
fn what_cannot_be_captured_is_launched() {
    let Some(device) = whole_gpu() else { return };
    let tiny = tiny(true);
    let checkpoint = Checkpoint::open(tiny.path()).unwrap();
    let weights = LookingWeights(DenseWeights::new(&checkpoint, DType::BF16, &device));
    let model = Llama::load(&weights, &config::read(tiny.path()).unwrap()).unwrap();
    let [mut launched, mut cache] = caches(&model, 4, 1);
    for position in 4..270 {
        let expected = step(&model, position, 1, &mut launched);
        assert!(step(&model, position, 1, &mut cache) == expected, "at {position}");
    }
    assert!(cache.replayed() == 0 && cache.cuda_graph_refused().is_some());
    // Heads without a kernel for attention.
    let mut odd = Tiny::new();
    for (key, value) in [("num_attention_heads", 16), ("num_key_value_heads", 8)] {
        odd.config[key] = value.into();
    }
    odd.write();
    let model = compressed(odd.path(), DType::F32, &device, GpuLayout::Auto, Codec::Lossless);
    let [mut launched, mut cache] = caches(&model, 4, 1);
    for position in 4..20 {
        assert!(step(&model, position, 1, &mut cache) == step(&model, position, 1, &mut launched));
    }
    assert!(cache.replayed() == 0 && cache.cuda_graph_refused().is_some_and(|why| why.contains("heads of 4 values")));
    // The device is as good as before.
    let model = compressed(tiny.path(), DType::BF16, &device, GpuLayout::Fixed, Codec::Lossless);
    replays_equal_launches(&model, 4, 30, 1, 0, "afterwards");
}

/// One stream for all threads: captured where cudarc does not order streams by events, launched where it does.
#[test]
fn streams_of_ones_own_are_captured_if_nothing_tracks_them() {
    let Some(_gpu) = whole_gpu() else { return };
    let tiny = tiny(true);
    for tracking in [true, false] {
        let device = Device::new_cuda_with_stream(0).unwrap();
        if !tracking {
            // SAFETY: this device has one stream.
            #[allow(unsafe_code)]
            unsafe {
                crate::cuda(&device).disable_event_tracking();
            }
        }
        let model = compressed(tiny.path(), DType::BF16, &device, GpuLayout::Fixed, Codec::Lossless);
        let [mut launched, mut cache] = caches(&model, 4, 1);
        for position in 4..40 {
            let expected = step(&model, position, 1, &mut launched);
            assert!(step(&model, position, 1, &mut cache) == expected, "{tracking} at {position}");
        }
        assert_eq!(cache.replayed(), if tracking { 0 } else { 35 });
    }
}

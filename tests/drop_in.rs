//! Unmodified candle models on compressed checkpoints: decoded at load, and just in time.
#![cfg(feature = "candle")]

mod common;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarBuilder;
use candle_taper::models::{JustInTime, config, var_builder};
use candle_taper::{Checkpoint, convert};
use candle_transformers::models::llama::{Cache, Config, Llama};
use candle_transformers::models::with_tracing;
use common::llama::{Tiny, VOCAB};
use common::model::write_model;

const CPU: Device = Device::Cpu;

/// A tiny BF16 model, its directory compressed, and stock candle's configuration of it.
struct Case {
    tiny: Tiny,
    _out: tempfile::TempDir,
    compressed: PathBuf,
    config: Config,
}

fn case(change: impl FnOnce(&mut Tiny)) -> Case {
    let mut tiny = Tiny::new();
    tiny.bf16 = true;
    change(&mut tiny);
    tiny.write();
    let out = tempfile::tempdir().unwrap();
    let compressed = out.path().join("compressed");
    assert!(convert::compress(tiny.path(), &compressed, &Default::default(), &()).unwrap().compressed > 0);
    let mut config = config::read(tiny.path()).unwrap();
    config.tie_word_embeddings = !tiny.tensors.contains_key("lm_head.weight");
    Case { tiny, _out: out, compressed, config }
}

/// What candle itself reads from the plain file.
fn plain(dir: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(dir.join("model.safetensors"), &CPU).unwrap()
}

fn stock(vb: VarBuilder, config: &Config) -> Llama {
    Llama::load(vb, config).unwrap()
}

/// Bits of the logits of a prefill and some tokens after it.
fn logits(llama: &Llama, config: &Config, dtype: DType) -> Result<Vec<u32>> {
    let mut cache = Cache::new(true, dtype, config, &CPU)?;
    let mut bits = Vec::new();
    let mut tokens: Vec<u32> = (0..13).map(|i| i * i * 7 % VOCAB as u32).collect();
    let mut position = 0;
    for step in 0..4 {
        let logits = llama.forward(&Tensor::new(tokens.as_slice(), &CPU)?.unsqueeze(0)?, position, &mut cache)?;
        bits.extend(logits.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits));
        position += tokens.len();
        tokens = vec![step * 5 + 1];
    }
    Ok(bits)
}

#[test]
fn stock_models_compute_the_same_bits_from_compressed_checkpoints() {
    for tied in [false, true] {
        let case = case(|tiny| {
            if tied {
                tiny.tensors.remove("lm_head.weight");
            }
        });
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let expected = VarBuilder::from_tensors(plain(case.tiny.path()), dtype, &CPU);
            let expected = logits(&stock(expected, &case.config), &case.config, dtype).unwrap();
            // A directory that is not compressed will do, and a single file.
            for path in [case.compressed.as_path(), case.tiny.path(), &case.compressed.join("model.safetensors")] {
                let llama = stock(var_builder(path, dtype, &CPU).unwrap(), &case.config);
                assert!(logits(&llama, &case.config, dtype).unwrap() == expected, "{dtype:?} {}", path.display());
            }
        }
    }
}

#[test]
fn every_tensor_of_every_dtype_is_what_candle_reads() {
    let out = tempfile::tempdir().unwrap();
    let model = write_model(&out.path().join("model"), 3, 700);
    let compressed = out.path().join("compressed");
    convert::compress(&model, &compressed, &Default::default(), &()).unwrap();
    let checkpoint = Checkpoint::open(&compressed).unwrap();
    let vb = var_builder(&compressed, DType::F32, &CPU).unwrap();
    for shard in 0..3 {
        let file = model.join(format!("model-{:05}-of-00003.safetensors", shard + 1));
        let file = std::fs::read(file).unwrap();
        let file = safetensors::SafeTensors::deserialize(&file).unwrap();
        for (name, view) in file.tensors() {
            assert!(vb.contains_tensor(&name));
            let info = checkpoint.info(&name).unwrap();
            let own = match info.dtype.as_str() {
                "BF16" => DType::BF16,
                "F16" => DType::F16,
                "F8_E4M3" => DType::F8E4M3,
                "I64" => DType::I64,
                // Values that candle's own loader refuses.
                "I8" => {
                    let expected: Vec<f32> = view.data().iter().map(|&b| f32::from(b as i8)).collect();
                    let got = vb.get_unchecked(&name).unwrap().flatten_all().unwrap();
                    assert_eq!(got.to_vec1::<f32>().unwrap(), expected, "{name}");
                    continue;
                }
                _ => DType::F32,
            };
            let expected = candle_core::safetensors::Load::load(&view, &CPU).unwrap();
            // Converting FP8 to F64 never ends in candle 0.11.1.
            let wide = if own == DType::F8E4M3 { DType::F32 } else { DType::F64 };
            for dtype in [own, DType::F32, wide] {
                let got = vb.get_unchecked_dtype(&name, dtype).unwrap();
                assert_eq!((got.dims(), got.dtype()), (view.shape(), dtype), "{name}");
                let expected = expected.to_dtype(dtype).unwrap();
                let bits = |t: &Tensor| -> Vec<u64> {
                    let t = t.to_dtype(wide).and_then(|t| t.to_dtype(DType::F64)).unwrap().flatten_all().unwrap();
                    t.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
                };
                assert!(bits(&got) == bits(&expected), "{name} as {dtype:?}");
                let hinted = vb.get_with_hints_dtype(view.shape(), &name, Default::default(), dtype).unwrap();
                assert_eq!(hinted.dtype(), dtype);
            }
        }
    }
}

#[test]
fn wrong_shapes_and_missing_tensors_are_named() {
    let case = case(|_| {});
    let vb = var_builder(&case.compressed, DType::F32, &CPU).unwrap().pp("model.layers.0.mlp.up_proj");
    let error = vb.get((95, 64), "weight").unwrap_err().to_string();
    for part in ["model.layers.0.mlp.up_proj.weight", "[95, 64]", "[96, 64]"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(vb.contains_tensor("weight") && !vb.contains_tensor("bias"));
    for error in [vb.get(96, "bias").unwrap_err(), vb.get_unchecked("bias").unwrap_err()] {
        assert!(error.to_string().contains("model.layers.0.mlp.up_proj.bias"), "{error}");
    }
    assert!(var_builder(case.tiny.path().join("nowhere"), DType::F32, &CPU).is_err());
}

/// Flips a bit in the middle of a tensor's tiles, in the file as it is.
fn flip(dir: &Path, name: &str) {
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let (start, end) = metadata.info(name).unwrap().data_offsets;
    let at = 8 + header + (start + end) / 2;
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
}

#[test]
fn damaged_tiles_are_named() {
    let case = case(|_| {});
    let name = "model.layers.1.mlp.down_proj.weight";
    let weights = JustInTime::open(&case.compressed, DType::F32).unwrap();
    let llama = weights.load(|vb| Llama::load(vb, &case.config)).unwrap();
    let run = || weights.run(|| logits(&llama, &case.config, DType::F32));
    let expected = run().unwrap();

    flip(&case.compressed, name);
    let vb = var_builder(&case.compressed, DType::F32, &CPU).unwrap();
    for error in [vb.get((64, 96), name).unwrap_err(), run().unwrap_err()] {
        let error = error.to_string();
        assert!(error.contains(name) && error.contains("checksum mismatch"), "{error}");
    }
    // An error all the same without `run`, and the other tensors are as they were.
    assert!(logits(&llama, &case.config, DType::F32).is_err());
    assert!(vb.get((96, 64), "model.layers.1.mlp.up_proj.weight").is_ok());
    flip(&case.compressed, name);
    assert!(run().unwrap() == expected);
}

#[test]
fn just_in_time_weights_give_the_same_bits_and_come_one_at_a_time() {
    let case = case(|_| {});
    for dtype in [DType::F32, DType::BF16] {
        let expected = VarBuilder::from_tensors(plain(case.tiny.path()), dtype, &CPU);
        let expected = logits(&stock(expected, &case.config), &case.config, dtype).unwrap();
        for dir in [case.compressed.as_path(), case.tiny.path()] {
            let weights = JustInTime::open(dir, dtype).unwrap();
            let llama = weights.load(|vb| Llama::load(vb, &case.config)).unwrap();
            assert_eq!(weights.peak_live_bytes(), 0);
            let got = weights.run(|| logits(&llama, &case.config, dtype)).unwrap();
            assert!(got == expected, "{dtype:?}");
            // Seven in each layer, and the output layer, the largest.
            assert_eq!(weights.linears(), 15);
            let each = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) + VOCAB * 64;
            assert_eq!(weights.total_bytes(), each * dtype.size_in_bytes());
            assert_eq!(weights.peak_live_bytes(), VOCAB * 64 * dtype.size_in_bytes());
            // The spans keep what they need.
            drop(weights);
            assert!(logits(&llama, &case.config, dtype).unwrap() == expected);
        }
    }
}

#[test]
fn a_tied_output_layer_stays_in_memory() {
    let case = case(|tiny| drop(tiny.tensors.remove("lm_head.weight")));
    let expected = VarBuilder::from_tensors(plain(case.tiny.path()), DType::F32, &CPU);
    let expected = logits(&stock(expected, &case.config), &case.config, DType::F32).unwrap();
    let weights = JustInTime::open(&case.compressed, DType::F32).unwrap();
    let llama = weights.load(|vb| Llama::load(vb, &case.config)).unwrap();
    assert_eq!(weights.linears(), 14);
    assert!(weights.run(|| logits(&llama, &case.config, DType::F32)).unwrap() == expected);
    assert_eq!(weights.peak_live_bytes(), 64 * 96 * 4);
}

/// A subscriber that wants every span and event.
struct Everything;

impl tracing::Subscriber for Everything {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::Id {
        tracing::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::Id, _: &tracing::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {}
    fn enter(&self, _: &tracing::Id) {}
    fn exit(&self, _: &tracing::Id) {}
}

#[test]
fn other_subscribers_and_threads_do_not_matter() {
    let case = case(|_| {});
    let weights = JustInTime::open(&case.compressed, DType::F32).unwrap();
    let run = |llama: &Llama| weights.run(|| logits(llama, &case.config, DType::F32)).unwrap();
    let llama = weights.load(|vb| Llama::load(vb, &case.config)).unwrap();
    let expected = run(&llama);
    let other = || tracing::Dispatch::new(Everything);
    assert!(tracing::dispatcher::with_default(&other(), || run(&llama)) == expected);
    // Installed before the model is loaded.
    let loaded = tracing::dispatcher::with_default(&other(), || {
        let llama = weights.load(|vb| Llama::load(vb, &case.config)).unwrap();
        assert!(run(&llama) == expected);
        llama
    });
    assert!(run(&loaded) == expected);
    assert_eq!(weights.linears(), 30, "two models");
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| run(&llama) == expected)).collect();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
    });
}

/// Layers that are not what their spans say: every use is right or an error.
#[test]
fn misuse_is_an_error_and_never_a_wrong_number() {
    let case = case(|_| {});
    let name = "model.layers.0.self_attn.q_proj";
    let weights = JustInTime::open(&case.compressed, DType::F32).unwrap();
    let x = Tensor::ones((3, 64), DType::F32, &CPU).unwrap();
    let expected = {
        let vb = var_builder(&case.compressed, DType::F32, &CPU).unwrap();
        candle_nn::linear_no_bias(64, 64, vb.pp(name)).unwrap().forward(&x).unwrap().to_vec2::<f32>().unwrap()
    };

    // No span at all: nothing to save, and said so.
    let plain = |vb: VarBuilder| candle_nn::linear_no_bias(64, 64, vb.pp(name));
    let error = weights.load(plain).unwrap_err().to_string();
    assert!(error.contains("no linear layer") && error.contains("var_builder"), "{error}");

    // A plain layer beside one with a span.
    let load = |vb: VarBuilder| Ok((plain(vb.clone())?, with_tracing::linear_no_bias(64, 64, vb.pp(name))?));
    let (a, b) = weights.load(load).unwrap();
    assert_eq!(weights.linears(), 1);
    for y in [a.forward(&x).unwrap(), b.forward(&x).unwrap()] {
        assert_eq!(y.to_vec2::<f32>().unwrap(), expected);
    }

    // A span that follows a plain layer's weight takes it for its own.
    let zeros = Tensor::zeros((64, 64), DType::F32, &CPU).unwrap();
    let load = |vb: VarBuilder| Ok((plain(vb)?, with_tracing::Linear::from_weights(zeros, None)));
    let (wronged, _) = weights.load(load).unwrap();
    assert!(wronged.forward(&x).is_err());
    let weight = wronged.weight();
    assert!(weight.to_vec2::<f32>().is_err());
    assert!(weight.relu().is_err());
    assert!(weight.contiguous().unwrap().sum_all().is_err());
    assert!(weight.t().unwrap().contiguous().is_err());
    assert!((weight + weight).is_err());
    assert!((weight * 2.0).is_err());
    assert!(weight.to_dtype(DType::BF16).is_err());
    assert!(weight.index_select(&Tensor::new(&[1u32], &CPU).unwrap(), 0).is_err());
    assert!(Tensor::cat(&[weight, weight], 0).is_err());

    // The transposed weight is a view of the same storage.
    let transposed = |vb: VarBuilder| {
        let weight = vb.get_with_hints((64, 64), &format!("{name}.weight"), candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
        Ok(with_tracing::Linear::from_weights(weight.t()?.contiguous()?.t()?, None))
    };
    let copied = weights.load(transposed).unwrap();
    assert_eq!(copied.forward(&x).unwrap().to_vec2::<f32>().unwrap(), expected);
}

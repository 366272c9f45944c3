//! Llamas from GGUF files beside candle's own quantised Llama, and what is refused.
#![cfg(feature = "candle")]

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::{D, DType, Device, Module, Tensor};
use candle_taper::models::{DenseLlama, DenseWeights, KQuantLlama, Llama, config, gguf};
use candle_taper::nn::LinearLayer;
use candle_taper::{Checkpoint, Error};
use candle_transformers::generation::LogitsProcessor;
use candle_transformers::models::quantized_llama::ModelWeights;
use common::gguf_model::write;
use common::llama::Tiny;
use tempfile::TempDir;

/// K-quants, then the others.
const TYPES: [GgmlDType; 10] = [
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
    GgmlDType::Q8_0,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
];

/// How many of them are K-quants.
const K_QUANTS: usize = 5;

/// Candle's own model of a file.
fn stock(path: &Path) -> ModelWeights {
    let mut file = File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap()
}

fn ours(path: &Path) -> KQuantLlama {
    KQuantLlama::from_gguf(&gguf::open(path).unwrap(), DType::F32).unwrap()
}

/// A model whose rows are made of whole K-quant blocks.
fn wide() -> Tiny {
    sized(256, 512)
}

/// A model of these sizes; the hidden size is a multiple of 64.
fn sized(hidden: usize, intermediate: usize) -> Tiny {
    let mut tiny = Tiny::new();
    for (key, size) in [("hidden_size", hidden), ("intermediate_size", intermediate)] {
        tiny.config[key] = size.into();
    }
    for shape in tiny.tensors.values_mut() {
        shape.iter_mut().for_each(|dim| match *dim {
            32 | 64 => *dim = *dim * hidden / 64,
            96 => *dim = intermediate,
            _ => (),
        });
    }
    tiny.write();
    tiny
}

/// A batch of one.
fn ids(tokens: &[u32]) -> Tensor {
    Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap()
}

/// The most likely tokens that follow `prompt`.
fn greedy(prompt: &[u32], count: usize, mut next: impl FnMut(&[u32], usize) -> Tensor) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    let mut position = 0;
    for _ in 0..count {
        let logits = next(&tokens[position..], position).flatten_all().unwrap();
        position = tokens.len();
        tokens.push(logits.argmax(D::Minus1).unwrap().to_scalar::<u32>().unwrap());
    }
    tokens
}

fn texts(path: &Path, prompt: &[u32], count: usize) -> [Vec<u32>; 2] {
    let mut stock = stock(path);
    let theirs = greedy(prompt, count, |tokens, position| stock.forward(&ids(tokens), position).unwrap());
    let llama = ours(path);
    let mut cache = llama.new_cache(true).unwrap();
    let ours = greedy(prompt, count, |tokens, position| llama.forward(&ids(tokens), position, &mut cache).unwrap());
    [theirs, ours]
}

/// Logits as exact as candle's own, measured against `f32` products with the dequantised weights.
#[test]
fn logits_of_every_type_are_as_exact_as_candle_s() {
    let (wide, narrow) = (wide(), sized(64, 192));
    let dir = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| (i * 29 + 1) % common::llama::VOCAB as u32).collect();
    let input = ids(&tokens);
    let values = |logits: Tensor| logits.squeeze(0).unwrap().to_vec1::<f32>().unwrap();
    for (number, ty) in TYPES.into_iter().enumerate() {
        let tiny = if number < K_QUANTS { &wide } else { &narrow };
        let path = write(tiny.path(), &dir.path().join(format!("{ty:?}.gguf")), ty, |_| ());
        let (llama, exact) = (ours(&path), dequantised(&path));
        let mine = values(llama.forward(&input, 0, &mut llama.new_cache(true).unwrap()).unwrap());
        let exact = values(exact.forward(&input, 0, &mut exact.new_cache(true).unwrap()).unwrap());
        let theirs = values(stock(&path).forward(&input, 0).unwrap());
        let distance = |logits: &[f32]| logits.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        let (mine, theirs) = (distance(&mine) / distance(&[0.0; 97]), distance(&theirs) / distance(&[0.0; 97]));
        println!("{ty:?}: logits differ by {mine:.4}, candle's by {theirs:.4}");
        assert!(mine < 1.5 * theirs + 1e-3, "{ty:?}: logits differ by {mine}, candle's by {theirs}");
    }
}

/// A trained model, widened to rows of 256 with zeros so that K-quants fit: another shape of the same function. Zeros halve
/// the mean of squares, which the weights and epsilons of norms make up for. Heads of zeros see nothing.
fn widened(dir: &Path) -> TempDir {
    let config = config::read(dir).unwrap();
    assert_eq!(config.hidden_size, 128);
    let checkpoint = Checkpoint::open(dir).unwrap();
    let weights = DenseWeights::new(&checkpoint, DType::F32, &Device::Cpu);
    let wide = |dim: usize| if dim == config.vocab_size { dim } else { (2 * dim).next_multiple_of(128).min(512) };
    let mut tensors = std::collections::HashMap::new();
    for (name, shape) in candle_taper::models::Weights::tensors(&weights) {
        let shape: Vec<usize> = shape.iter().map(|&dim| dim as usize).collect();
        let mut weight = candle_taper::models::Weights::tensor(&weights, name, &shape).unwrap();
        for (axis, &dim) in shape.iter().enumerate() {
            weight = weight.pad_with_zeros(axis, 0, wide(dim) - dim).unwrap();
        }
        if shape.len() == 1 {
            weight = (weight / 2f64.sqrt()).unwrap();
        }
        tensors.insert(name.to_string(), weight);
    }
    let out = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(&tensors, out.path().join("model.safetensors")).unwrap();
    let json = serde_json::json!({
        "model_type": "llama", "hidden_size": 256, "intermediate_size": wide(config.intermediate_size),
        "vocab_size": config.vocab_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": 2 * config.num_attention_heads, "num_key_value_heads": 2 * config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps / 2.0, "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings, "tie_word_embeddings": true,
        "bos_token_id": config.bos_token_id,
    });
    std::fs::write(out.path().join("config.json"), json.to_string()).unwrap();
    out
}

/// Perplexity of windows of tokens, from what gives the logits after each token of a window.
fn perplexity(windows: &[Vec<u32>], logits: impl Fn(&[u32]) -> Tensor) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for window in windows {
        let logits = logits(&window[..window.len() - 1]);
        let log = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap().to_vec2::<f32>().unwrap();
        sum -= log.iter().zip(&window[1..]).map(|(row, &next)| f64::from(row[next as usize])).sum::<f64>();
        count += window.len() - 1;
    }
    (sum / f64::from(count as u32)).exp()
}

/// Prints and compares perplexities of every K-quant: ours, candle's, and that of the dequantised weights.
fn compare_perplexities(dir: &Path, windows: &[Vec<u32>]) {
    fn all<L: LinearLayer, E: Module>(llama: &Llama<L, E>, window: &[u32]) -> Tensor {
        llama.forward_all(&ids(window), 0, &mut llama.new_cache(true).unwrap()).unwrap().squeeze(0).unwrap()
    }
    let plain = DenseLlama::from_pretrained(dir, DType::F32, &Device::Cpu).unwrap();
    println!("f32 {:.3}", perplexity(windows, |window| all(&plain, window)));
    let wide = widened(dir);
    let out = tempfile::tempdir().unwrap();
    for ty in &TYPES[..K_QUANTS + 1] {
        let path = write(wide.path(), &out.path().join(format!("{ty:?}.gguf")), *ty, |_| ());
        let (llama, dense) = (ours(&path), dequantised(&path));
        let mine = perplexity(windows, |window| all(&llama, window));
        let exact = perplexity(windows, |window| all(&dense, window));
        let theirs = perplexity(windows, |window| {
            let mut stock = stock(&path);
            let logits = window.iter().enumerate().map(|(at, &id)| stock.forward(&ids(&[id]), at).unwrap());
            Tensor::cat(&logits.collect::<Vec<_>>(), 0).unwrap()
        });
        println!("{ty:?}: {mine:.3}, candle {theirs:.3}, dequantised {exact:.3}");
        assert!((mine / theirs - 1.0).abs() < 0.005, "{ty:?}: {mine} beside {theirs} of candle");
        // What 8-bit activations cost, of which candle's cost as much.
        assert!((mine / exact - 1.0).abs() < 0.015, "{ty:?}: {mine} beside {exact} of the dequantised weights");
    }
}

#[test]
fn perplexities_are_those_of_the_quantised_weights() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tales");
    let llama = DenseLlama::from_pretrained(&dir, DType::F32, &Device::Cpu).unwrap();
    // Tales of its own, drawn at random.
    let windows: Vec<Vec<u32>> = (0..1)
        .map(|seed| {
            let mut sampler = LogitsProcessor::new(seed, Some(1.0), None);
            let mut cache = llama.new_cache(true).unwrap();
            let mut tokens = vec![0];
            while tokens.len() < 100 {
                let logits = llama.forward(&ids(&tokens[cache.len()..]), cache.len(), &mut cache).unwrap();
                tokens.push(sampler.sample(&logits.squeeze(0).unwrap()).unwrap());
            }
            tokens
        })
        .collect();
    compare_perplexities(&dir, &windows);
}

/// The same model with plain `f32` weights: every layer of the file dequantised.
fn dequantised(path: &Path) -> DenseLlama {
    struct Dequantised<'a>(gguf::GgufWeights<'a>);
    impl candle_taper::models::Weights for Dequantised<'_> {
        type Linear = candle_nn::Linear;
        type Embedding = candle_nn::Embedding;
        fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<candle_nn::Linear, Error> {
            Ok(self.0.linear(name, rows, cols)?.to_dense()?)
        }
        fn embedding(&self, name: &str, rows: usize, cols: usize) -> Result<candle_nn::Embedding, Error> {
            let table = self.0.embedding(name, rows, cols)?.as_linear().to_dense()?;
            Ok(candle_nn::Embedding::new(table.weight().clone(), cols))
        }
        fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
            self.0.tensor(name, shape)
        }
        fn tied_lm_head(&self, embedding: &candle_nn::Embedding) -> Result<candle_nn::Linear, Error> {
            Ok(candle_nn::Linear::new(embedding.embeddings().clone(), None))
        }
        fn tensors(&self) -> Vec<(&str, &[u64])> {
            self.0.tensors()
        }
        fn contains(&self, name: &str) -> bool {
            self.0.contains(name)
        }
        fn dtype(&self) -> DType {
            DType::F32
        }
        fn device(&self) -> &Device {
            &Device::Cpu
        }
    }
    let file = gguf::open(path).unwrap();
    Llama::load(&Dequantised(gguf::GgufWeights::new(&file, DType::F32).unwrap()), &gguf::config(&file).unwrap())
        .unwrap()
}

/// A real model, if it is there: the same text as candle's own, and the perplexity of its weights.
#[test]
fn a_real_checkpoint_writes_the_same_text_as_candle_s() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    let dir = data.join("TinyStories-656K");
    if !dir.exists() {
        println!("skipped: {} is not there", dir.display());
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let tokenizer = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let encode = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    let path = write(&dir, &out.path().join("q8_0.gguf"), GgmlDType::Q8_0, |_| ());
    for prompt in ["Once upon a time", "Lily and Tom were in the garden", "The little dog"] {
        let [theirs, ours] = texts(&path, &[&[1][..], &encode(prompt)].concat(), 100);
        assert_eq!(ours, theirs, "{prompt}");
    }
    let text = std::fs::read_to_string(data.join("text/tinystories-197k.txt")).unwrap();
    let text: String = text.chars().take(20_000).collect();
    let tokens = encode(&text);
    // Candle's model gives the logits of one position a call, so that all windows would take minutes.
    let count = if std::env::var_os("TAPER_SLOW_TESTS").is_some() { usize::MAX } else { 1 };
    let windows = tokens.chunks_exact(256).map(|window| [&[1], window].concat());
    let windows: Vec<Vec<u32>> = windows.take(count).collect();
    compare_perplexities(&dir, &windows);
}

#[test]
fn files_that_are_not_a_llama_s_are_refused() {
    let tiny = wide();
    let dir = tempfile::tempdir().unwrap();
    let mut number = 0;
    let mut refused = |cause: &str, change: &dyn Fn(&mut BTreeMap<String, Value>)| {
        number += 1;
        let path = write(tiny.path(), &dir.path().join(format!("{number}.gguf")), GgmlDType::Q8_0, change);
        let error = KQuantLlama::from_gguf(&gguf::open(&path).unwrap(), DType::F32).expect_err(cause).to_string();
        assert!(error.contains(cause) && error.contains(&format!("{number}.gguf")), "{error:?} does not say {cause:?}");
    };
    let string = |text: &str| Value::String(text.into());
    refused("the architecture \"gemma3\" is not supported; supported are llama and qwen2", &|m| {
        m.insert("general.architecture".into(), string("gemma3"));
    });
    refused("no general.architecture", &|m| drop(m.remove("general.architecture")));
    refused("no llama.block_count", &|m| drop(m.remove("llama.block_count")));
    refused("no llama.attention.layer_norm_rms_epsilon", &|m| drop(m.remove("llama.attention.layer_norm_rms_epsilon")));
    refused("llama.rope.dimension_count is 32, only 64", &|m| {
        m.insert("llama.rope.dimension_count".into(), Value::U32(32));
    });
    refused("a mixture of 8 experts", &|m| drop(m.insert("llama.expert_count".into(), Value::U32(8))));
    refused("llama.rope.scaling.type is \"yarn\"", &|m| {
        m.insert("llama.rope.scaling.type".into(), string("yarn"));
    });
    refused("llama.feed_forward_length is an array", &|m| {
        m.insert("llama.feed_forward_length".into(), Value::Array(vec![Value::U32(512), Value::U32(256)]));
    });
    refused("there is no tensor blk.2.attn_norm.weight", &|m| {
        drop(m.insert("llama.block_count".into(), Value::U32(3)))
    });
    refused("has no place in a Llama of 1 layers", &|m| drop(m.insert("llama.block_count".into(), Value::U32(1))));
    refused("tensor blk.0.ffn_gate.weight: its shape is [512, 256], but the metadata asks for [500, 256]", &|m| {
        m.insert("llama.feed_forward_length".into(), Value::U32(500));
    });
    refused("llama.attention.head_count is 0, which does not divide 256", &|m| {
        drop(m.insert("llama.attention.head_count".into(), Value::U32(0)))
    });
}

/// Memory is let go of while a file is loaded; what is read again comes back.
#[test]
fn a_file_can_be_loaded_twice() {
    let tiny = wide();
    let dir = TempDir::new().unwrap();
    let path = write(tiny.path(), &dir.path().join("model.gguf"), GgmlDType::Q4K, |_| ());
    let file = gguf::open(&path).unwrap();
    let before: Vec<Vec<u8>> = file.tensors().map(|tensor| tensor.data().to_vec()).collect();
    let input = Tensor::new(&[[1u32, 5, 9]], &Device::Cpu).unwrap();
    let logits = [(); 2].map(|()| {
        let llama = KQuantLlama::from_gguf(&file, DType::F32).unwrap();
        llama.forward(&input, 0, &mut llama.new_cache(true).unwrap()).unwrap().to_vec2::<f32>().unwrap()
    });
    assert_eq!(logits[0], logits[1]);
    assert!(file.tensors().map(|tensor| tensor.data().to_vec()).eq(before));
}

/// The tokenizer of a directory as metadata: byte-level BPE, as llama.cpp's converter writes it.
fn tokenizer_metadata(dir: &Path, metadata: &mut BTreeMap<String, Value>) {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
    let vocabulary = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocabulary.len()];
    vocabulary.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    let special = |id: usize| json["added_tokens"].as_array().unwrap().iter().any(|token| token["id"] == id);
    let kinds = (0..tokens.len()).map(|id| Value::I32(if special(id) { 3 } else { 1 })).collect();
    let pair = |merge: &serde_json::Value| match merge.as_array() {
        Some(pair) => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        None => merge.as_str().unwrap().to_string(),
    };
    let merges = json["model"]["merges"].as_array().unwrap().iter().map(|merge| Value::String(pair(merge))).collect();
    let entries = [
        ("model", Value::String("gpt2".into())),
        ("tokens", Value::Array(tokens.into_iter().map(Value::String).collect())),
        ("token_type", Value::Array(kinds)),
        ("merges", Value::Array(merges)),
        ("bos_token_id", Value::U32(0)),
        ("eos_token_id", Value::U32(1)),
        ("add_bos_token", Value::Bool(true)),
    ];
    metadata.extend(entries.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)));
}

#[test]
fn the_command_writes_text_from_one_file() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tales");
    let out = tempfile::tempdir().unwrap();
    let run = |args: &[&std::ffi::OsStr]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_taper"));
        command.args(["generate", "-q", "-n", "40", "--temperature", "0", "--prompt", "Once upon a time"]);
        let output = command.args(args).stdin(Stdio::null()).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (_, expected, _) = run(&["--compressed".as_ref(), dir.as_os_str()]);
    for ty in [GgmlDType::F32, GgmlDType::Q8_0] {
        let path = write(&dir, &out.path().join(format!("{ty:?}.gguf")), ty, |m| tokenizer_metadata(&dir, m));
        let (done, text, error) = run(&["--gguf".as_ref(), path.as_os_str()]);
        assert!(done && text.starts_with("Once upon a time") && text.split_whitespace().count() > 20, "{text}{error}");
        if ty == GgmlDType::F32 {
            assert_eq!(text, expected);
        }
    }
    let timed = out.path().join("Q8_0.gguf");
    let timed =
        [timed.as_os_str(), "-p".as_ref(), "8".as_ref(), "-n".as_ref(), "2".as_ref(), "-r".as_ref(), "1".as_ref()];
    let mut command = Command::new(env!("CARGO_BIN_EXE_taper"));
    let output = command.args(["bench", "-q", "--json", "--model"]).args(timed).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let rows = json["groups"][1]["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["stock"] == true).collect::<Vec<_>>(), [false, true], "{json}");
    let bare = write(&dir, &out.path().join("bare.gguf"), GgmlDType::Q8_0, |_| ());
    let (done, _, error) = run(&["--gguf".as_ref(), bare.as_os_str()]);
    assert!(!done && error.contains("bare.gguf: the file has no tokenizer"), "{error}");
    let (done, _, error) = run(&["--gguf".as_ref(), "Cargo.toml".as_ref()]);
    assert!(!done && error.contains("Cargo.toml: magic is"), "{error}");
}

//! The Llama against candle-transformers' own, and against itself.
#![cfg(feature = "candle")]

mod common;

use std::path::Path;

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use candle_taper::convert;
use candle_taper::models::{Cache, CompressedLlama, Config, DenseLlama, Llama, config};
use candle_taper::nn::LinearLayer;
use candle_taper::{Options, Stage};
use candle_transformers::models::llama as stock;
use common::llama::{Tiny, VOCAB};

const CPU: Device = Device::Cpu;

fn load(dir: &Path) -> DenseLlama {
    DenseLlama::from_pretrained(dir, DType::F32, &CPU).unwrap()
}

/// candle-transformers' model of the same directory, with an empty cache.
fn load_stock(dir: &Path, config: &Config) -> (stock::Llama, stock::Cache) {
    let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &CPU).unwrap();
    let tie_word_embeddings = config.tie_word_embeddings || !tensors.contains_key("lm_head.weight");
    let config = Config { tie_word_embeddings, ..config.clone() };
    let cache = stock::Cache::new(true, DType::F32, &config, &CPU).unwrap();
    (stock::Llama::load(VarBuilder::from_tensors(tensors, DType::F32, &CPU), &config).unwrap(), cache)
}

/// `[1, n]` ids that look random.
fn ids(n: u32, seed: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 31 + seed * 17 + i * i * 7) % VOCAB as u32).collect()
}

fn row(ids: &[u32]) -> Tensor {
    Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap()
}

/// The greatest difference, relative to the greatest value.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let largest = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    largest(&(a - b).unwrap()) / largest(b)
}

#[track_caller]
fn assert_close(a: &Tensor, b: &Tensor, tolerance: f32) {
    let difference = difference(a, b);
    assert!(difference <= tolerance, "difference {difference}");
}

/// Prefill of `prompt` tokens and 20 decode steps, ours against stock.
fn equals_stock(tiny: &Tiny, prompt: u32) {
    let llama = load(tiny.path());
    let (theirs, mut their_cache) = load_stock(tiny.path(), llama.config());
    let mut cache = llama.new_cache(true).unwrap();
    let mut next = ids(prompt, 1);
    for step in 0..=20 {
        let position = cache.len();
        let ours = llama.forward(&row(&next), position, &mut cache).unwrap();
        let expected = theirs.forward(&row(&next), position, &mut their_cache).unwrap();
        assert_close(&ours, &expected, 1e-4);
        assert_eq!(cache.len(), prompt as usize + step);
        next = ids(1, step as u32);
    }
}

#[test]
fn logits_equal_stock() {
    equals_stock(&Tiny::new(), 23);
}

/// Keys and values of their own for each head, and one pair for all.
#[test]
fn every_way_of_sharing_keys_equals_stock() {
    for kv_heads in [1, 4] {
        let mut tiny = Tiny::new();
        tiny.config["num_key_value_heads"] = kv_heads.into();
        for (name, shape) in &mut tiny.tensors {
            if name.contains("k_proj") || name.contains("v_proj") {
                shape[0] = 16 * kv_heads;
            }
        }
        tiny.write();
        equals_stock(&tiny, 23);
    }
}

#[test]
fn long_prompts_equal_stock_while_the_cache_grows() {
    let tiny = Tiny::new();
    equals_stock(&tiny, 500);
    equals_stock(&tiny, 250);
}

#[test]
fn scaled_rope_equals_stock() {
    let mut tiny = Tiny::new();
    let logits = |tiny: &Tiny| {
        let llama = load(tiny.path());
        llama.forward(&row(&ids(9, 0)), 0, &mut llama.new_cache(true).unwrap()).unwrap()
    };
    let unscaled = logits(&tiny);
    // The wavelengths of heads of 16 lie on both sides of these limits and between them.
    tiny.config["rope_scaling"] = serde_json::json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256
    });
    tiny.write();
    equals_stock(&tiny, 300);

    // The same as transformers 5 writes it.
    let before = logits(&tiny);
    assert!(difference(&before, &unscaled) > 1e-3, "the scaling changes something");
    let mut parameters = tiny.config["rope_scaling"].take();
    parameters["rope_theta"] = tiny.config["rope_theta"].take();
    let object = tiny.config.as_object_mut().unwrap();
    object.remove("rope_theta");
    object.insert("rope_parameters".into(), parameters);
    tiny.write();
    assert_eq!(difference(&logits(&tiny), &before), 0.0);
}

#[test]
fn one_go_equals_token_by_token_and_chunks() {
    let tiny = Tiny::new();
    let llama = load(tiny.path());
    let tokens = ids(40, 3);
    let whole = llama.forward_all(&row(&tokens), 0, &mut llama.new_cache(true).unwrap()).unwrap();
    for sizes in [vec![1; 40], vec![7, 1, 20, 12]] {
        let mut cache = llama.new_cache(true).unwrap();
        for size in sizes {
            let position = cache.len();
            let part = row(&tokens[position..position + size]);
            let logits = llama.forward_all(&part, position, &mut cache).unwrap();
            assert_close(&logits, &whole.narrow(1, position, size).unwrap(), 1e-5);
        }
    }
    let mut uncached = llama.new_cache(false).unwrap();
    let last = llama.forward(&row(&tokens), 0, &mut uncached).unwrap();
    assert_close(&last, &whole.narrow(1, 39, 1).unwrap().squeeze(1).unwrap(), 1e-5);
    assert_eq!((uncached.len(), uncached.bytes()), (0, 0));
    assert!(llama.forward(&row(&[1]), 1, &mut uncached).is_err());
}

/// A batch of 30 tokens each, 21 of them in one go.
fn in_steps<L: LinearLayer, E: Module>(llama: &Llama<L, E>, tokens: &Tensor, cache: &mut Cache) -> Tensor {
    let first = llama.forward_all(&tokens.narrow(1, 0, 21).unwrap(), 0, cache).unwrap();
    let rest = (21..30).map(|i| llama.forward_all(&tokens.narrow(1, i, 1).unwrap(), i, cache).unwrap());
    Tensor::cat(&std::iter::once(first).chain(rest).collect::<Vec<_>>(), 1).unwrap()
}

fn batches_equal_their_rows<L: LinearLayer, E: Module>(llama: &Llama<L, E>) {
    let rows = [5, 6, 7].map(|seed| row(&ids(30, seed)));
    let mut cache = llama.new_cache(true).unwrap();
    let all = in_steps(llama, &Tensor::cat(&rows, 0).unwrap(), &mut cache);
    for (i, alone) in rows.iter().enumerate() {
        let alone = in_steps(llama, alone, &mut llama.new_cache(true).unwrap());
        assert_close(&all.narrow(0, i, 1).unwrap(), &alone, 1e-5);
    }
    // The same cache again, and for a batch of another size.
    cache.reset();
    assert_eq!(difference(&in_steps(llama, &Tensor::cat(&rows, 0).unwrap(), &mut cache), &all), 0.0);
    cache.reset();
    let fresh = in_steps(llama, &rows[1], &mut llama.new_cache(true).unwrap());
    assert_eq!(difference(&in_steps(llama, &rows[1], &mut cache), &fresh), 0.0);
}

#[test]
fn a_batch_equals_its_rows() {
    let tiny = Tiny::new();
    batches_equal_their_rows(&load(tiny.path()));
    batches_equal_their_rows(&CompressedLlama::from_pretrained(tiny.path(), DType::F32, &Options::default()).unwrap());
}

#[test]
fn caches_can_be_reset_and_rewound() {
    let tiny = Tiny::new();
    let llama = load(tiny.path());
    let tokens = ids(20, 8);
    let fresh = llama.forward(&row(&tokens), 0, &mut llama.new_cache(true).unwrap()).unwrap();
    let mut cache = llama.new_cache(true).unwrap();
    llama.forward(&row(&ids(300, 9)), 0, &mut cache).unwrap();
    let bytes = cache.bytes();
    // Two layers, keys and values, two heads of 16, room for 512 positions.
    assert_eq!(bytes, 2 * 2 * 2 * 16 * 512 * 4);
    cache.reset();
    assert!(cache.is_empty());
    assert_close(&llama.forward(&row(&tokens), 0, &mut cache).unwrap(), &fresh, 1e-6);
    assert_eq!((cache.bytes(), cache.len()), (bytes, 20));

    // Back to position 12 and on with the same tokens.
    llama.forward(&row(&ids(8, 1)), 12, &mut cache).unwrap();
    assert_close(&llama.forward(&row(&tokens[12..]), 12, &mut cache).unwrap(), &fresh, 1e-5);

    // Another batch cannot go on, but can begin.
    let two = Tensor::cat(&[row(&tokens), row(&tokens)], 0).unwrap();
    let error = llama.forward(&two, 20, &mut cache).unwrap_err().to_string();
    assert!(error.contains("batch of 1") && error.contains("reset it first"), "{error}");
    assert_close(&llama.forward(&two, 0, &mut cache).unwrap().narrow(0, 1, 1).unwrap(), &fresh, 1e-5);
}

#[test]
fn a_large_context_costs_nothing_until_it_is_used() {
    let mut tiny = Tiny::new();
    tiny.config["max_position_embeddings"] = 1_000_000_000.into();
    tiny.write();
    let llama = load(tiny.path());
    let mut cache = llama.new_cache(true).unwrap();
    llama.forward(&row(&ids(3, 0)), 0, &mut cache).unwrap();
    assert_eq!(cache.bytes(), 2 * 2 * 2 * 16 * 256 * 4);
}

#[test]
fn a_missing_output_layer_is_tied_and_a_spare_one_is_ignored() {
    let mut tiny = Tiny::new();
    tiny.tensors.remove("lm_head.weight");
    tiny.write();
    equals_stock(&tiny, 5);
    let notes = load(tiny.path()).notes().join("");
    assert!(notes.contains("no lm_head.weight"), "{notes}");
    tiny.config["tie_word_embeddings"] = true.into();
    tiny.write();
    assert!(load(tiny.path()).notes().is_empty());

    let mut spare = Tiny::new();
    spare.config["tie_word_embeddings"] = true.into();
    spare.write();
    equals_stock(&spare, 5);
    let notes = load(spare.path()).notes().join("");
    assert!(notes.contains("lm_head.weight is ignored"), "{notes}");
}

#[test]
fn compressed_checkpoints_give_the_same_logits() {
    let mut tiny = Tiny::new();
    tiny.bf16 = true;
    tiny.write();
    let out = tempfile::tempdir().unwrap();
    let summary = convert::compress(tiny.path(), out.path().join("c"), &Default::default(), &()).unwrap();
    assert!(summary.compressed > 0);
    let [plain, compressed] = [tiny.path(), &out.path().join("c")].map(|dir| {
        let llama = load(dir);
        llama.forward_all(&row(&ids(50, 2)), 0, &mut llama.new_cache(true).unwrap()).unwrap()
    });
    assert_eq!(difference(&compressed, &plain), 0.0);
}

#[test]
fn half_precision_runs() {
    let tiny = Tiny::new();
    let exact = load(tiny.path());
    let exact = exact.forward(&row(&ids(9, 4)), 0, &mut exact.new_cache(true).unwrap()).unwrap();
    for (dtype, tolerance) in [(DType::F16, 0.01), (DType::BF16, 0.06)] {
        let llama = DenseLlama::from_pretrained(tiny.path(), dtype, &CPU).unwrap();
        let logits = llama.forward(&row(&ids(9, 4)), 0, &mut llama.new_cache(true).unwrap()).unwrap();
        assert_close(&logits, &exact, tolerance);
    }
}

/// The most likely next tokens after `prompt`.
fn greedy(count: usize, prompt: &[u32], mut forward: impl FnMut(&Tensor, usize) -> Tensor) -> Vec<u32> {
    let (mut tokens, mut position) = (prompt.to_vec(), 0);
    for _ in 0..count {
        let logits = forward(&row(&tokens[position..]), position).squeeze(0).unwrap();
        position = tokens.len();
        tokens.push(logits.argmax(0).unwrap().to_scalar::<u32>().unwrap());
    }
    tokens
}

/// Perplexity over windows of 256 tokens, each after BOS.
fn perplexity<L: LinearLayer, E: Module>(llama: &Llama<L, E>, tokens: &[u32], cache: &mut Cache) -> (f64, usize) {
    let (mut sum, mut count) = (0.0, 0);
    for window in tokens.chunks_exact(256) {
        let input: Vec<u32> = std::iter::once(1).chain(window[..255].iter().copied()).collect();
        cache.reset();
        let logits = llama.forward_all(&row(&input), 0, cache).unwrap().squeeze(0).unwrap();
        let loss = candle_nn::loss::cross_entropy(&logits, &Tensor::new(window, &CPU).unwrap()).unwrap();
        sum += f64::from(loss.to_scalar::<f32>().unwrap()) * 256.0;
        count += 256;
    }
    ((sum / count as f64).exp(), count)
}

#[test]
fn a_trained_model_is_as_good_as_it_should_be() {
    let Some(data) = common::shared_data() else { return };
    let dir = data.join("TinyStories-656K");
    let copy = tempfile::tempdir().unwrap();
    let compressed = copy.path().join("compressed");
    convert::compress(&dir, &compressed, &Default::default(), &()).unwrap();
    let tokenizer = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let text = std::fs::read_to_string(data.join("text/tinystories-197k.txt")).unwrap();
    let text: String = text.chars().take(20_000).collect();
    let tokens = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    let prompt = tokenizer.encode("Once upon a time", true).unwrap().get_ids().to_vec();
    assert_eq!(prompt[0], 1);
    let (theirs, mut their_cache) = load_stock(&dir, &config::read(&dir).unwrap());
    let expected = greedy(200, &prompt, |ids, position| theirs.forward(ids, position, &mut their_cache).unwrap());
    for dir in [&dir, &compressed] {
        is_as_good(&load(dir), &prompt, &expected, &tokens);
        let llama = CompressedLlama::from_pretrained(dir, DType::F32, &Options::default()).unwrap();
        is_as_good(&llama, &prompt, &expected, &tokens);
    }
}

fn is_as_good<L: LinearLayer, E: Module>(llama: &Llama<L, E>, prompt: &[u32], expected: &[u32], tokens: &[u32]) {
    let mut cache = llama.new_cache(true).unwrap();
    let text = greedy(200, prompt, |ids, position| llama.forward(ids, position, &mut cache).unwrap());
    assert_eq!(text, expected);
    let (perplexity, count) = perplexity(llama, tokens, &mut cache);
    println!("perplexity {perplexity:.4} over {count} tokens");
    assert_eq!((format!("{perplexity:.2}").as_str(), count), ("32.39", 4352));
}

/// The same bits whatever the stage, and whether the matrices were compressed before or are only now.
#[test]
fn compressed_layers_give_the_same_logits_in_every_stage() {
    let mut tiny = Tiny::new();
    tiny.bf16 = true;
    tiny.write();
    let out = tempfile::tempdir().unwrap();
    let ids = row(&[1, 5, 80, 33, 7]);
    let mut all = Vec::new();
    for stage in [Stage::Rans, Stage::Fixed12, Stage::Fixed11] {
        let matrix = Options { stage, ..Options::default() };
        let packed = out.path().join(stage.name());
        let options = convert::ConvertOptions { matrix: matrix.clone(), ..Default::default() };
        convert::compress(tiny.path(), &packed, &options, &()).unwrap();
        for dir in [tiny.path(), &packed] {
            let llama = CompressedLlama::from_pretrained(dir, DType::F32, &matrix).unwrap();
            let mut cache = llama.new_cache(true).unwrap();
            let mut logits = llama.forward_all(&ids, 0, &mut cache).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let next: Vec<f32> =
                llama.forward(&row(&[9]), 5, &mut cache).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            logits.extend(next);
            all.push(logits.iter().map(|v: &f32| v.to_bits()).collect::<Vec<u32>>());
        }
    }
    assert!(all.iter().all(|logits| *logits == all[0]));
    // And what plain layers compute, but for the order of additions.
    let dense = load(tiny.path());
    let mut cache = dense.new_cache(true).unwrap();
    let logits: Vec<f32> = dense.forward_all(&ids, 0, &mut cache).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let largest = logits.iter().fold(0f32, |m, v| m.max(v.abs()));
    assert!(logits.iter().zip(&all[0]).all(|(a, &b)| (a - f32::from_bits(b)).abs() <= 1e-4 * largest));
}

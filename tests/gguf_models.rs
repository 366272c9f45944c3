//! Models from GGUF files as llama.cpp's converter writes them, beside a reference in `f64` that is written from the
//! architectures' formulas: Llama and Mistral with tables and scaling of RoPE, and Qwen2 with its biases.
#![cfg(feature = "candle")]

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_taper::codec::kquant::{GgmlType, dequantize};
use candle_taper::gguf::Gguf;
use candle_taper::models::{KQuantLlama, gguf};
use common::gguf::{Builder, array_value, f32_value, string, string_value, u32_value};
use common::kquant::blocks_within;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const VOCAB: usize = 100;
const HIDDEN: usize = 256;
const WIDE: usize = 512;
const LAYERS: usize = 2;
const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD: usize = HIDDEN / HEADS;

/// A model in the making: what its file says, and what the reference needs to know besides.
struct Model {
    file: Builder,
    /// Pairs that RoPE turns: a value and its neighbour, or a value and that half a head further on.
    neighbours: bool,
    base: f64,
    factors: [f64; HEAD / 2],
}

/// Values of about one over the root of `cols`, from a seed.
fn values(n: usize, size: f32, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-size..size)).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

impl Model {
    /// `ty` is that of the matrices; values and outputs are as in the files that llama.cpp's quantiser calls Q4_K_M.
    fn new(architecture: &str, base: f32, ty: GgmlType) -> Model {
        let strings = |texts: &[&str]| array_value(8, &texts.iter().map(|text| string(text)).collect::<Vec<_>>());
        let mut file = Builder::new()
            .entry("general.architecture", string_value(architecture))
            .entry("general.type", string_value("model"))
            .entry("general.name", string_value("A Test Instruct"))
            .entry("general.size_label", string_value("1M"))
            .entry("general.license", string_value("mit"))
            .entry("general.tags", strings(&["text-generation"]))
            .entry("general.languages", strings(&["en", "de"]))
            .entry("general.quantization_version", u32_value(2))
            .entry("general.file_type", u32_value(15))
            .entry("tokenizer.ggml.model", string_value("no_vocab"));
        let numbers = [
            ("vocab_size", VOCAB),
            ("context_length", 512),
            ("embedding_length", HIDDEN),
            ("block_count", LAYERS),
            ("feed_forward_length", WIDE),
            ("rope.dimension_count", HEAD),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", KV_HEADS),
            ("attention.key_length", HEAD),
            ("attention.value_length", HEAD),
        ];
        for (key, number) in numbers {
            file = file.entry(&format!("{architecture}.{key}"), u32_value(number as u32));
        }
        file = file
            .entry(&format!("{architecture}.rope.freq_base"), f32_value(base))
            .entry(&format!("{architecture}.attention.layer_norm_rms_epsilon"), f32_value(1e-5));
        let mut seed = 0;
        let mut model =
            Model { file, neighbours: architecture == "llama", base: base.into(), factors: [1.0; HEAD / 2] };
        let mut matrix = |name: &str, rows: usize, cols: usize, ty: GgmlType| {
            seed += 1;
            let data = match ty {
                GgmlType::F32 => bytes(&values(rows * cols, (3.0 / cols as f32).sqrt(), seed)),
                _ => blocks_within(ty, rows * cols, seed, 1e-4),
            };
            model.file = model.file.clone().tensor(name, rows, cols, ty, data);
        };
        let better = if ty == GgmlType::Q4_K { GgmlType::Q6_K } else { ty };
        matrix("token_embd.weight", VOCAB, HIDDEN, ty);
        for layer in 0..LAYERS {
            let mut part = |name: &str, rows, cols, ty| matrix(&format!("blk.{layer}.{name}.weight"), rows, cols, ty);
            part("attn_q", HIDDEN, HIDDEN, ty);
            part("attn_k", KV_HEADS * HEAD, HIDDEN, ty);
            part("attn_v", KV_HEADS * HEAD, HIDDEN, better);
            part("attn_output", HIDDEN, HIDDEN, ty);
            part("ffn_gate", WIDE, HIDDEN, ty);
            part("ffn_up", WIDE, HIDDEN, ty);
            part("ffn_down", HIDDEN, WIDE, better);
        }
        for layer in 0..LAYERS {
            model = model.vector(&format!("blk.{layer}.attn_norm.weight"), HIDDEN, 1.5);
            model = model.vector(&format!("blk.{layer}.ffn_norm.weight"), HIDDEN, 1.5);
        }
        model.vector("output_norm.weight", HIDDEN, 1.5)
    }

    fn entry(mut self, key: &str, value: Vec<u8>) -> Model {
        self.file = self.file.entry(key, value);
        self
    }

    /// A tensor of one dimension, of random `f32`s below `size`.
    fn vector(self, name: &str, len: usize, size: f32) -> Model {
        let seed = 1000 + self.file.tensors.len() as u64;
        self.f32s(name, &values(len, size, seed))
    }

    fn f32s(mut self, name: &str, values: &[f32]) -> Model {
        self.file.tensors.push((name.into(), vec![values.len() as u64], 0, bytes(values)));
        self
    }

    fn output(mut self, ty: GgmlType) -> Model {
        let data = match ty {
            GgmlType::F32 => bytes(&values(VOCAB * HIDDEN, 0.1, 77)),
            _ => blocks_within(ty, VOCAB * HIDDEN, 77, 1e-4),
        };
        self.file = self.file.tensor("output.weight", VOCAB, HIDDEN, ty, data);
        self
    }

    fn biases(mut self) -> Model {
        for layer in 0..LAYERS {
            for (name, len) in [("attn_q", HIDDEN), ("attn_k", KV_HEADS * HEAD), ("attn_v", KV_HEADS * HEAD)] {
                self = self.vector(&format!("blk.{layer}.{name}.bias"), len, 1.0);
            }
        }
        self
    }

    /// Logits of the last token by the reference, and ours of the whole prompt at once and token by token.
    fn logits(&self, tokens: &[u32]) -> (Vec<f64>, [Vec<f32>; 2]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, self.file.build()).unwrap();
        let llama = KQuantLlama::from_gguf(&gguf::open(&path).unwrap(), DType::F32).unwrap();
        let run = |parts: &[&[u32]]| {
            let (mut cache, mut last) = (llama.new_cache(true).unwrap(), Vec::new());
            for part in parts {
                let input = Tensor::new(*part, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
                let logits = llama.forward(&input, cache.len(), &mut cache).unwrap();
                last = logits.squeeze(0).unwrap().to_vec1::<f32>().unwrap();
            }
            last
        };
        let ours = [run(&[tokens]), run(&tokens.chunks(1).collect::<Vec<_>>())];
        (self.reference(tokens), ours)
    }

    /// The graph, one token after another, in `f64`.
    fn reference(&self, tokens: &[u32]) -> Vec<f64> {
        let file = Gguf::new(self.file.build()).unwrap();
        let tensors: BTreeMap<String, Vec<f64>> = file
            .tensors()
            .map(|tensor| {
                let mut values = vec![0.0; tensor.rows() * tensor.cols()];
                dequantize(tensor.ty, tensor.data(), &mut values);
                (tensor.name.to_string(), values.into_iter().map(f64::from).collect())
            })
            .collect();
        let product = |name: &str, x: &[f64]| -> Vec<f64> {
            let rows = tensors[&format!("{name}.weight")].chunks_exact(x.len());
            let mut y: Vec<f64> = rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
            if let Some(bias) = tensors.get(&format!("{name}.bias")) {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
            y
        };
        let norm = |name: &str, x: &[f64]| -> Vec<f64> {
            let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-5).sqrt();
            x.iter().zip(&tensors[&format!("{name}.weight")]).map(|(x, w)| x * scale * w).collect()
        };
        let rotate = |x: &mut [f64], position: usize| {
            for head in x.chunks_exact_mut(HEAD) {
                for pair in 0..HEAD / 2 {
                    let angle = position as f64 * self.base.powf(-2.0 * pair as f64 / HEAD as f64) / self.factors[pair];
                    let (a, b) = if self.neighbours { (2 * pair, 2 * pair + 1) } else { (pair, pair + HEAD / 2) };
                    let (sin, cos) = angle.sin_cos();
                    (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
                }
            }
        };
        let mut kept: Vec<Vec<[Vec<f64>; 2]>> = vec![Vec::new(); LAYERS];
        let mut logits = Vec::new();
        for (position, &token) in tokens.iter().enumerate() {
            let mut x = tensors["token_embd.weight"][token as usize * HIDDEN..][..HIDDEN].to_vec();
            for (layer, kept) in kept.iter_mut().enumerate() {
                let part = |name: &str| format!("blk.{layer}.{name}");
                let y = norm(&part("attn_norm"), &x);
                let (mut q, mut k) = (product(&part("attn_q"), &y), product(&part("attn_k"), &y));
                rotate(&mut q, position);
                rotate(&mut k, position);
                kept.push([k, product(&part("attn_v"), &y)]);
                let mut seen = vec![0.0; HIDDEN];
                for (head, (q, seen)) in q.chunks_exact(HEAD).zip(seen.chunks_exact_mut(HEAD)).enumerate() {
                    let own = head / (HEADS / KV_HEADS) * HEAD..(head / (HEADS / KV_HEADS) + 1) * HEAD;
                    let score = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (HEAD as f64).sqrt();
                    let weights: Vec<f64> = kept.iter().map(|[k, _]| score(&k[own.clone()]).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for (weight, [_, v]) in weights.iter().zip(&*kept) {
                        seen.iter_mut().zip(&v[own.clone()]).for_each(|(s, v)| *s += weight / total * v);
                    }
                }
                let y = product(&part("attn_output"), &seen);
                x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
                let y = norm(&part("ffn_norm"), &x);
                let (gate, up) = (product(&part("ffn_gate"), &y), product(&part("ffn_up"), &y));
                let wide: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                x.iter_mut().zip(product(&part("ffn_down"), &wide)).for_each(|(x, y)| *x += y);
            }
            let head = if tensors.contains_key("output.weight") { "output" } else { "token_embd" };
            logits = product(head, &norm("output_norm", &x));
        }
        logits
    }

    /// Fails if ours are further from the reference than `most`, relative to the size of the logits.
    fn check(&self, what: &str, most: f64) {
        let tokens: Vec<u32> = (0..60).map(|i| (i * 37 + 5) % VOCAB as u32).collect();
        let (reference, ours) = self.logits(&tokens);
        let size = (reference.iter().map(|r| r * r).sum::<f64>()).sqrt();
        for (logits, how) in ours.iter().zip(["at once", "token by token"]) {
            let distance = logits.iter().zip(&reference).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum::<f64>().sqrt();
            println!("{what}, {how}: logits differ by {:.1e}", distance / size);
            assert!(distance < most * size, "{what}, {how}: logits differ by {}", distance / size);
        }
    }

    /// Fails unless the reference changes by much more than rounding when `other` is asked, so that a test can fail.
    fn differs(&self, other: &Model) {
        let tokens: Vec<u32> = (0..60).map(|i| (i * 37 + 5) % VOCAB as u32).collect();
        let (a, b) = (self.reference(&tokens), other.reference(&tokens));
        let distance = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        assert!(distance > 0.02 * a.iter().map(|a| a * a).sum::<f64>().sqrt(), "what is tested changes nothing");
    }
}

#[test]
fn a_llama_is_the_reference_s() {
    Model::new("llama", 10_000.0, GgmlType::F32).check("tied", 1e-4);
    Model::new("llama", 10_000.0, GgmlType::F32).output(GgmlType::F32).check("own output layer", 1e-4);
    Model::new("llama", 10_000.0, GgmlType::Q4_K).output(GgmlType::Q6_K).check("Q4_K_M", 0.05);
}

#[test]
fn a_mistral_is_the_reference_s() {
    // What the converter writes for Mistral 7B v0.3: the same graph under the same name, another base.
    let model = Model::new("llama", 1_000_000.0, GgmlType::F32).output(GgmlType::F32);
    model.check("mistral", 1e-4);
    Model::new("llama", 1_000_000.0, GgmlType::Q8_0).output(GgmlType::Q8_0).check("mistral in Q8_0", 0.02);
    model.differs(&Model::new("llama", 10_000.0, GgmlType::F32).output(GgmlType::F32));
}

#[test]
fn a_qwen2_is_the_reference_s() {
    let model = |ty| Model::new("qwen2", 1_000_000.0, ty).biases();
    model(GgmlType::F32).check("qwen2", 1e-4);
    model(GgmlType::Q8_0).check("qwen2 in Q8_0", 0.02);
    let mut wrong = model(GgmlType::F32);
    wrong.neighbours = true;
    model(GgmlType::F32).differs(&wrong);
    model(GgmlType::F32).differs(&Model::new("qwen2", 1_000_000.0, GgmlType::F32));
}

#[test]
fn rope_factors_and_scaling_are_the_reference_s() {
    let plain = || Model::new("llama", 10_000.0, GgmlType::F32);
    // As the converter computes Llama 3's: one for fast pairs, the factor for slow ones, and between.
    let table: Vec<f32> = (0..HEAD / 2).map(|pair| (1.0 + pair as f32 * 0.5).min(8.0)).collect();
    let mut with_table = plain().f32s("rope_freqs.weight", &table);
    with_table.factors.iter_mut().zip(&table).for_each(|(factor, &table)| *factor = table.into());
    with_table.check("rope_freqs.weight", 1e-4);
    with_table.differs(&plain());
    let linear = |model: Model| {
        let model = model.entry("llama.rope.scaling.type", string_value("linear"));
        let mut model = model.entry("llama.rope.scaling.factor", f32_value(4.0));
        model.factors.iter_mut().for_each(|factor| *factor *= 4.0);
        model
    };
    linear(plain()).check("linear scaling", 1e-4);
    linear(plain()).differs(&plain());
    // Old files say it in one key.
    let mut old = plain().entry("llama.rope.scale_linear", f32_value(4.0));
    old.factors = [4.0; HEAD / 2];
    old.check("scale_linear", 1e-4);
    let none = plain().entry("llama.rope.scaling.type", string_value("none"));
    none.entry("llama.rope.scaling.factor", f32_value(4.0)).check("no scaling", 1e-4);
}

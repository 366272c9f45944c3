//! A small Llama that can be trained, and its files.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};
use serde_json::json;

use super::ops::{CausalSoftmax, CrossEntropy, RmsNorm, Rope, SwiGlu};
use super::tales::Rng;

/// Sizes of the model. Heads share keys and values in pairs.
pub const VOCAB: usize = 1024;
/// Width.
pub const HIDDEN: usize = 128;
/// Width inside the feed-forward part.
pub const INTERMEDIATE: usize = 352;
/// Depth.
pub const LAYERS: usize = 5;
/// Heads of queries.
pub const HEADS: usize = 4;
/// Heads of keys and values.
pub const KV_HEADS: usize = 2;
/// Size of a head.
pub const HEAD: usize = HIDDEN / HEADS;
const EPS: f32 = 1e-5;
const THETA: f32 = 10_000.0;

/// Weights under their Hugging Face names.
pub struct Model {
    /// Names and weights.
    pub vars: BTreeMap<String, Var>,
}

fn shapes() -> Vec<(String, Vec<usize>)> {
    let (kv, inner) = (KV_HEADS * HEAD, INTERMEDIATE);
    let parts: [(&str, &[usize]); 9] = [
        ("self_attn.q_proj", &[HIDDEN, HIDDEN]),
        ("self_attn.k_proj", &[kv, HIDDEN]),
        ("self_attn.v_proj", &[kv, HIDDEN]),
        ("self_attn.o_proj", &[HIDDEN, HIDDEN]),
        ("mlp.gate_proj", &[inner, HIDDEN]),
        ("mlp.up_proj", &[inner, HIDDEN]),
        ("mlp.down_proj", &[HIDDEN, inner]),
        ("input_layernorm", &[HIDDEN]),
        ("post_attention_layernorm", &[HIDDEN]),
    ];
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_string(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let named = parts.iter().map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape.to_vec()));
        shapes.extend(named);
    }
    shapes
}

impl Model {
    /// Random weights.
    pub fn new(seed: u64) -> Result<Self> {
        let mut rng = Rng(seed);
        let mut vars = BTreeMap::new();
        for (name, shape) in shapes() {
            let deep = name.contains("o_proj") || name.contains("down_proj");
            let std = if deep { 0.02 / (2.0 * LAYERS as f64).sqrt() } else { 0.02 };
            let mut normal = || {
                let radius = (-2.0 * (1.0 - rng.unit()).ln()).sqrt();
                (std * radius * (std::f64::consts::TAU * rng.unit()).cos()) as f32
            };
            let count = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|_| if shape.len() == 1 { 1.0 } else { normal() }).collect();
            vars.insert(name, Var::from_vec(values, shape, &Device::Cpu)?);
        }
        Ok(Self { vars })
    }

    /// Saved weights.
    pub fn load(dir: &Path) -> Result<Self> {
        let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu)?;
        let vars = tensors.into_iter().map(|(name, t)| Ok((name, Var::from_tensor(&t.to_dtype(DType::F32)?)?)));
        Ok(Self { vars: vars.collect::<Result<_>>()? })
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        self.vars.values().map(|var| var.elem_count()).sum()
    }

    fn weight(&self, name: &str) -> &Tensor {
        self.vars[name].as_tensor()
    }

    /// Mean loss of each token in rows of equal length after those before it.
    pub fn loss(&self, rows: &[&[u32]]) -> Result<Tensor> {
        let (batch, steps) = (rows.len(), rows[0].len() - 1);
        let inputs: Vec<u32> = rows.iter().flat_map(|row| &row[..steps]).copied().collect();
        let targets: Vec<u32> = rows.iter().flat_map(|row| &row[1..]).copied().collect();
        self.logits(&inputs, batch, steps)?.apply_op1(CrossEntropy(targets))
    }

    /// Logits after each of `batch * steps` tokens.
    pub fn logits(&self, inputs: &[u32], batch: usize, steps: usize) -> Result<Tensor> {
        let embedding = self.weight("model.embed_tokens.weight");
        let rope = Rope::new(steps, HEAD, THETA);
        let mut x = embedding.embedding(&Tensor::new(inputs, &Device::Cpu)?)?;
        for number in 0..LAYERS {
            let layer = |part: &str| self.weight(&format!("model.layers.{number}.{part}.weight"));
            let heads = |x: Tensor, count: usize| x.reshape((batch, steps, count, HEAD))?.transpose(1, 2)?.contiguous();
            let normed = x.apply_op2(layer("input_layernorm"), RmsNorm(EPS))?;
            let q = heads(normed.matmul(&layer("self_attn.q_proj").t()?)?, HEADS)?.apply_op1(rope.clone())?;
            let k = heads(normed.matmul(&layer("self_attn.k_proj").t()?)?, KV_HEADS)?.apply_op1(rope.clone())?;
            let v = heads(normed.matmul(&layer("self_attn.v_proj").t()?)?, KV_HEADS)?;
            // The heads that share a key lie one after the other: more rows for the same product.
            let q = q.reshape((batch, KV_HEADS, HEADS / KV_HEADS * steps, HEAD))?;
            let scale = (HEAD as f32).sqrt().recip();
            let scores = q.matmul(&k.t()?)?.apply_op1(CausalSoftmax { steps, scale })?;
            let mixed = scores.matmul(&v)?.reshape((batch, HEADS, steps, HEAD))?.transpose(1, 2)?.contiguous()?;
            let mixed = mixed.reshape((batch * steps, HIDDEN))?;
            x = (x + mixed.matmul(&layer("self_attn.o_proj").t()?)?)?;
            let normed = x.apply_op2(layer("post_attention_layernorm"), RmsNorm(EPS))?;
            let gate = normed.matmul(&layer("mlp.gate_proj").t()?)?;
            let inner = gate.apply_op2(&normed.matmul(&layer("mlp.up_proj").t()?)?, SwiGlu)?;
            x = (x + inner.matmul(&layer("mlp.down_proj").t()?)?)?;
        }
        x.apply_op2(self.weight("model.norm.weight"), RmsNorm(EPS))?.matmul(&embedding.t()?)
    }

    /// Writes the weights as BF16, with the files that go with them.
    pub fn save(&self, dir: &Path, context: usize, bos: u32, eos: u32) -> anyhow::Result<()> {
        let tensors: HashMap<&str, Tensor> = self
            .vars
            .iter()
            .map(|(name, var)| Ok((name.as_str(), var.to_dtype(DType::BF16)?)))
            .collect::<Result<_>>()?;
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(&tensors, Some(metadata), &dir.join("model.safetensors"))?;
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
            "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
            "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": true,
            "bos_token_id": bos, "eos_token_id": eos, "torch_dtype": "bfloat16",
        });
        let generation = json!({
            "bos_token_id": bos, "eos_token_id": eos, "do_sample": true, "temperature": 0.8, "max_length": context,
        });
        let tokenizer = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "clean_up_tokenization_spaces": false, "model_max_length": context,
        });
        for (name, value) in
            [("config.json", config), ("generation_config.json", generation), ("tokenizer_config.json", tokenizer)]
        {
            std::fs::write(dir.join(name), serde_json::to_string_pretty(&value)? + "\n")?;
        }
        Ok(())
    }
}

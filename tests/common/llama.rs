//! A tiny Llama of random weights.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Normal};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Tokens of its vocabulary.
pub const VOCAB: usize = 97;

/// A model directory that disappears with its value. Change it, then call [`Tiny::write`].
pub struct Tiny {
    dir: TempDir,
    /// `config.json`.
    pub config: Value,
    /// Names and shapes of all tensors.
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// BF16 instead of F32.
    pub bf16: bool,
    /// A tensor that gets integers instead of floats.
    pub integers: Option<String>,
    /// A tensor that gets its weights as F64.
    pub wide: Option<String>,
    /// A tensor that gets a NaN.
    pub nan: Option<String>,
}

impl Tiny {
    /// Two layers, four heads that share two for keys and values, written to a temporary directory.
    pub fn new() -> Tiny {
        let config = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCAB,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 600, "tie_word_embeddings": false,
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"
        });
        let layer = |i: usize| {
            let shapes: [(&str, &[usize]); 9] = [
                ("self_attn.q_proj", &[64, 64]),
                ("self_attn.k_proj", &[32, 64]),
                ("self_attn.v_proj", &[32, 64]),
                ("self_attn.o_proj", &[64, 64]),
                ("mlp.gate_proj", &[96, 64]),
                ("mlp.up_proj", &[96, 64]),
                ("mlp.down_proj", &[64, 96]),
                ("input_layernorm", &[64]),
                ("post_attention_layernorm", &[64]),
            ];
            shapes.map(|(name, shape)| (format!("model.layers.{i}.{name}.weight"), shape.to_vec()))
        };
        let mut tensors: BTreeMap<String, Vec<usize>> = (0..2).flat_map(layer).collect();
        tensors.insert("model.embed_tokens.weight".into(), vec![VOCAB, 64]);
        tensors.insert("model.norm.weight".into(), vec![64]);
        tensors.insert("lm_head.weight".into(), vec![VOCAB, 64]);
        let tiny = Tiny {
            dir: tempfile::tempdir().unwrap(),
            config,
            tensors,
            bf16: false,
            integers: None,
            nan: None,
            wide: None,
        };
        tiny.write();
        tiny
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes `config.json` and `model.safetensors`. The same tensors always get the same weights.
    pub fn write(&self) {
        std::fs::write(self.path().join("config.json"), self.config.to_string()).unwrap();
        let mut bytes: Vec<Vec<u8>> = self.tensors.iter().enumerate().map(|(i, (_, s))| self.weights(i, s)).collect();
        for (bytes, name) in bytes.iter_mut().zip(self.tensors.keys()) {
            if self.nan.as_ref() == Some(name) {
                bytes[..4].fill(0xff);
            }
            if self.wide.as_ref() == Some(name) {
                let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                *bytes = values.flat_map(|value| f64::from(value).to_le_bytes()).collect();
            }
        }
        let views = self.tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
            let floats = if self.bf16 { Dtype::BF16 } else { Dtype::F32 };
            if self.integers.as_ref() == Some(name) {
                let zeros = &ZEROS[..shape.iter().product::<usize>() * 8];
                return (name, TensorView::new(Dtype::I64, shape.clone(), zeros).unwrap());
            }
            let dtype = if self.wide.as_ref() == Some(name) { Dtype::F64 } else { floats };
            (name, TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &self.path().join("model.safetensors")).unwrap();
    }

    fn weights(&self, seed: usize, shape: &[usize]) -> Vec<u8> {
        let mut rng = SmallRng::seed_from_u64(seed as u64);
        // Norms are near one, matrices keep the size of what they multiply.
        let normal = if shape.len() == 1 { Normal::new(1.0, 0.2) } else { Normal::new(0.0, 0.125) }.unwrap();
        let weights = normal.sample_iter(&mut rng).take(shape.iter().product());
        if self.bf16 {
            return weights.flat_map(|w: f32| bf16::from_f32(w).to_le_bytes()).collect();
        }
        weights.flat_map(|w: f32| w.to_le_bytes()).collect()
    }
}

/// Integers.
static ZEROS: [u8; 96 * 64 * 8] = [0; 96 * 64 * 8];

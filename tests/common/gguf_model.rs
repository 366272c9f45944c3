//! GGUF files of Llamas, quantised by candle.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_taper::Checkpoint;
use candle_taper::models::{Config, DenseWeights, config};

/// Puts the rows of a head's halves in turns, as llama.cpp's converter does.
fn permuted(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, cols) = weight.dims2().unwrap();
    let apart = weight.reshape((heads, 2, rows / heads / 2, cols)).unwrap();
    apart.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, cols)).unwrap()
}

fn metadata(config: &Config) -> BTreeMap<String, Value> {
    let number = |n: usize| Value::U32(n as u32);
    BTreeMap::from([
        ("general.architecture".to_string(), Value::String("llama".into())),
        ("general.name".to_string(), Value::String("a test".into())),
        ("general.quantization_version".to_string(), Value::U32(2)),
        ("llama.embedding_length".to_string(), number(config.hidden_size)),
        ("llama.block_count".to_string(), number(config.num_hidden_layers)),
        ("llama.feed_forward_length".to_string(), number(config.intermediate_size)),
        ("llama.attention.head_count".to_string(), number(config.num_attention_heads)),
        ("llama.attention.head_count_kv".to_string(), number(config.num_key_value_heads)),
        ("llama.attention.layer_norm_rms_epsilon".to_string(), Value::F32(config.rms_norm_eps as f32)),
        ("llama.rope.freq_base".to_string(), Value::F32(config.rope_theta)),
        ("llama.rope.dimension_count".to_string(), number(config.hidden_size / config.num_attention_heads)),
        ("llama.context_length".to_string(), number(config.max_position_embeddings)),
        ("tokenizer.ggml.bos_token_id".to_string(), Value::U32(1)),
        ("tokenizer.ggml.eos_token_id".to_string(), Value::U32(2)),
    ])
}

/// A GGUF file of a directory's weights with llama.cpp's names, all matrices quantised.
pub fn write(dir: &Path, path: &Path, ty: GgmlDType, change: impl Fn(&mut BTreeMap<String, Value>)) -> PathBuf {
    let config = config::read(dir).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let weights = DenseWeights::new(&checkpoint, DType::F32, &Device::Cpu);
    let mut tensors = Vec::new();
    for (name, shape) in candle_taper::models::Weights::tensors(&weights) {
        let shape: Vec<usize> = shape.iter().map(|&dim| dim as usize).collect();
        let mut weight = candle_taper::models::Weights::tensor(&weights, name, &shape).unwrap();
        if name.ends_with("q_proj.weight") {
            weight = permuted(&weight, config.num_attention_heads);
        } else if name.ends_with("k_proj.weight") {
            weight = permuted(&weight, config.num_key_value_heads);
        }
        let ty = if shape.len() == 1 { GgmlDType::F32 } else { ty };
        let own = [
            ("model.layers.", "blk."),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
        ];
        let name = own.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to));
        tensors.push((name, QTensor::quantize(&weight, ty).unwrap()));
    }
    let mut metadata = metadata(&config);
    change(&mut metadata);
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut BufWriter::new(File::create(path).unwrap()), &metadata, &tensors).unwrap();
    path.to_path_buf()
}

//! Writes a Llama-shaped checkpoint of random weights with row and column scales, for measurements:
//! `cargo run --release --example synthetic -- DIR [--gigabytes G] [--shards N]`, or `-- --llama-1b DIR` for one of the
//! shape of Llama-3.2-1B that runs.

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::PathBuf;

use candle_taper::Dtype;
use clap::Parser;
use common::Shape;
use common::model::{TestTensor, st_dtype, tensor, write_shard};
use half::bf16;
use serde_json::{Value, json};

/// Writes a checkpoint of random BF16 weights in the Hugging Face layout.
#[derive(Parser)]
struct Args {
    /// Where it goes
    dir: PathBuf,
    /// All that Llama-3.2-1B has, 2.47 GB, so that it can be run: 16 layers, the embedding, the norms, the whole
    /// config.json
    #[arg(long, conflicts_with = "gigabytes")]
    llama_1b: bool,
    /// Its size; layers only
    #[arg(long, default_value_t = 2.0)]
    gigabytes: f64,
    /// Number of weight files
    #[arg(long, default_value_t = 4)]
    shards: usize,
}

/// Sizes of Llama-3.2-1B.
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 8192;
const LAYERS: usize = 16;
const VOCAB: usize = 128_256;

fn layer(number: usize, seed: u64, runs: bool) -> Vec<TestTensor> {
    let parts: [(&str, &[usize]); 9] = [
        ("self_attn.q_proj", &[HIDDEN, HIDDEN]),
        ("self_attn.k_proj", &[HIDDEN / 4, HIDDEN]),
        ("self_attn.v_proj", &[HIDDEN / 4, HIDDEN]),
        ("self_attn.o_proj", &[HIDDEN, HIDDEN]),
        ("mlp.gate_proj", &[INTERMEDIATE, HIDDEN]),
        ("mlp.up_proj", &[INTERMEDIATE, HIDDEN]),
        ("mlp.down_proj", &[HIDDEN, INTERMEDIATE]),
        ("input_layernorm", &[HIDDEN]),
        ("post_attention_layernorm", &[HIDDEN]),
    ];
    let named = parts.iter().zip(seed..);
    named
        .map(|((part, dims), seed)| {
            let name = format!("model.layers.{number}.{part}.weight");
            if runs && dims.len() == 1 { ones(&name) } else { tensor(&name, Shape::Scaled, Dtype::Bf16, dims, seed) }
        })
        .collect()
}

/// A norm that changes nothing, so that activations keep their size.
fn ones(name: &str) -> TestTensor {
    let data = bf16::ONE.to_le_bytes().repeat(HIDDEN);
    TestTensor { name: name.into(), dtype: st_dtype(Dtype::Bf16), shape: vec![HIDDEN], data }
}

fn config(layers: usize, runs: bool) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "torch_dtype": "bfloat16",
    });
    if runs {
        let more = json!({
            "attention_bias": false, "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009],
            "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 131_072, "mlp_bias": false,
            "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": true, "vocab_size": VOCAB,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192
            },
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
    }
    config
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    std::fs::create_dir_all(&args.dir)?;
    let bytes_per_layer = 2 * (2 * HIDDEN * HIDDEN + HIDDEN * HIDDEN / 2 + 3 * HIDDEN * INTERMEDIATE);
    let by_size = (args.gigabytes * 1e9 / bytes_per_layer as f64).ceil() as usize;
    let layers = if args.llama_1b { LAYERS } else { by_size };
    let mut map = serde_json::Map::new();
    for shard in 0..args.shards {
        let file = format!("model-{:05}-of-{:05}.safetensors", shard + 1, args.shards);
        let own = layers * shard / args.shards..layers * (shard + 1) / args.shards;
        let mut tensors: Vec<TestTensor> = own.flat_map(|n| layer(n, 100 * n as u64, args.llama_1b)).collect();
        if args.llama_1b && shard == 0 {
            let dims = [VOCAB, HIDDEN];
            tensors.push(tensor("model.embed_tokens.weight", Shape::Scaled, Dtype::Bf16, &dims, 1_000_000));
            tensors.push(ones("model.norm.weight"));
        }
        tensors.iter().for_each(|t| drop(map.insert(t.name.clone(), file.clone().into())));
        write_shard(&args.dir.join(&file), &tensors);
        println!("{file}: {} tensors", tensors.len());
    }
    let index = json!({"metadata": {}, "weight_map": map});
    std::fs::write(args.dir.join("model.safetensors.index.json"), serde_json::to_string_pretty(&index)?)?;
    let config = config(layers, args.llama_1b);
    std::fs::write(args.dir.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    Ok(())
}

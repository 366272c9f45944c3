//! Writes a Llama-shaped checkpoint of random weights with row and column scales, for measurements:
//! `cargo run --release --example synthetic -- DIR [--gigabytes G] [--shards N]`.

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::PathBuf;

use candle_taper::Dtype;
use clap::Parser;
use common::Shape;
use common::model::{TestTensor, tensor, write_shard};

/// Writes a checkpoint of random BF16 weights in the Hugging Face layout.
#[derive(Parser)]
struct Args {
    /// Where it goes
    dir: PathBuf,
    /// Its size
    #[arg(long, default_value_t = 2.0)]
    gigabytes: f64,
    /// Number of weight files
    #[arg(long, default_value_t = 4)]
    shards: usize,
}

/// Hidden and intermediate size of Llama-3.2-1B.
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 8192;

fn layer(number: usize, seed: u64) -> Vec<TestTensor> {
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
            tensor(&format!("model.layers.{number}.{part}.weight"), Shape::Scaled, Dtype::Bf16, dims, seed)
        })
        .collect()
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    std::fs::create_dir_all(&args.dir)?;
    let bytes_per_layer = 2 * (2 * HIDDEN * HIDDEN + HIDDEN * HIDDEN / 2 + 3 * HIDDEN * INTERMEDIATE);
    let layers = (args.gigabytes * 1e9 / bytes_per_layer as f64).ceil() as usize;
    let mut map = serde_json::Map::new();
    for shard in 0..args.shards {
        let file = format!("model-{:05}-of-{:05}.safetensors", shard + 1, args.shards);
        let own = layers * shard / args.shards..layers * (shard + 1) / args.shards;
        let tensors: Vec<TestTensor> = own.flat_map(|number| layer(number, 100 * number as u64)).collect();
        tensors.iter().for_each(|t| drop(map.insert(t.name.clone(), file.clone().into())));
        write_shard(&args.dir.join(&file), &tensors);
        println!("{file}: {} tensors", tensors.len());
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(args.dir.join("model.safetensors.index.json"), serde_json::to_string_pretty(&index)?)?;
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "torch_dtype": "bfloat16",
    });
    std::fs::write(args.dir.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    Ok(())
}

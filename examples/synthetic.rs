//! Writes a Llama-shaped checkpoint of random weights with row and column scales, for measurements:
//! `cargo run --release --example synthetic -- DIR [--gigabytes G] [--shards N]`, or `-- --llama-1b DIR` for one of the
//! shape of Llama-3.2-1B that runs, or `-- --gguf q4_k FILE` for a GGUF file of that shape (Q4_K matrices, and Q6_K for the
//! table that is also the output layer unless the type has 8 bits).

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_taper::Dtype;
use candle_taper::codec::kquant::GgmlType;
use clap::Parser;
use common::Shape;
use common::gguf::{Builder, f32_value, string_value, u32_value};
use common::kquant::blocks_within;
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
    /// Write a GGUF file of Llama-3.2-1B's shape with matrices of this type
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["gigabytes", "llama_1b"])]
    gguf: Option<String>,
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

/// Writes a GGUF file. It has no tokenizer.
fn write_gguf(path: &Path, ty: GgmlType) -> anyhow::Result<()> {
    let table = if ty.bits_per_weight() > 6.6 { ty } else { GgmlType::Q6_K };
    let mut tensors = vec![("token_embd.weight".to_string(), VOCAB, HIDDEN, table)];
    for layer in 0..LAYERS {
        let parts = [
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN / 4, HIDDEN),
            ("attn_v", HIDDEN / 4, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INTERMEDIATE, HIDDEN),
            ("ffn_up", INTERMEDIATE, HIDDEN),
            ("ffn_down", HIDDEN, INTERMEDIATE),
        ];
        tensors.extend(parts.map(|(part, rows, cols)| (format!("blk.{layer}.{part}.weight"), rows, cols, ty)));
        tensors
            .extend(["attn_norm", "ffn_norm"].map(|n| (format!("blk.{layer}.{n}.weight"), 0, HIDDEN, GgmlType::F32)));
    }
    tensors.push(("output_norm.weight".to_string(), 0, HIDDEN, GgmlType::F32));
    let mut builder = Builder::new()
        .entry("general.architecture", string_value("llama"))
        .entry("general.name", string_value("synthetic"))
        .entry("tokenizer.ggml.model", string_value("no_vocab"))
        .entry("llama.attention.layer_norm_rms_epsilon", f32_value(1e-5))
        .entry("llama.rope.freq_base", f32_value(500_000.0));
    let numbers = [
        ("vocab_size", VOCAB),
        ("context_length", 4096),
        ("embedding_length", HIDDEN),
        ("block_count", LAYERS),
        ("feed_forward_length", INTERMEDIATE),
        ("rope.dimension_count", 64),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 8),
    ];
    for (key, number) in numbers {
        builder = builder.entry(&format!("llama.{key}"), u32_value(number as u32));
    }
    for (name, rows, cols, ty) in &tensors {
        let dims = [*cols as u64, *rows as u64];
        builder.tensors.push((name.clone(), dims[..if *rows == 0 { 1 } else { 2 }].to_vec(), *ty as u32, Vec::new()));
    }
    let size = |(_, rows, cols, ty): &(String, usize, usize, GgmlType)| rows.max(&1) * ty.row_bytes(*cols).unwrap_or(0);
    let mut out = BufWriter::new(File::create(path)?);
    out.write_all(&builder.header(tensors.iter().map(size)))?;
    for (seed, (name, rows, cols, ty)) in tensors.iter().enumerate() {
        let mut data = match rows {
            0 => 1f32.to_le_bytes().repeat(*cols),
            _ => blocks_within(*ty, rows * cols, seed as u64, 1e-4),
        };
        data.resize(data.len().next_multiple_of(32), 0);
        out.write_all(&data)?;
        println!("{name}: {ty}");
    }
    Ok(out.flush()?)
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(name) = &args.gguf {
        let ty = GgmlType::ALL.into_iter().find(|ty| ty.name().eq_ignore_ascii_case(name));
        return write_gguf(&args.dir, ty.with_context(|| format!("{name} is no type of GGUF tensors"))?);
    }
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

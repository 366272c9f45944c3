//! Writes a Llama-shaped checkpoint of random weights with row and column scales, for measurements:
//! `cargo run --release --example synthetic -- DIR [--gigabytes G] [--shards N]`, or `-- --llama-1b DIR` and `-- --llama-8b
//! DIR` for one of the shape of Llama-3.2-1B or Llama-3-8B that runs, or `-- --gguf q4_k FILE` (also with `--llama-8b`) for a
//! GGUF file of such a shape (Q4_K matrices, and Q6_K for the output layer unless the type has 8 bits).

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
use rayon::prelude::*;
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
    /// All that Llama-3-8B has, 16.06 GB: 32 layers
    #[arg(long, conflicts_with_all = ["gigabytes", "llama_1b"])]
    llama_8b: bool,
    /// Write a GGUF file of Llama-3.2-1B's shape (or of --llama-8b) with matrices of this type
    #[arg(long, value_name = "TYPE", conflicts_with = "gigabytes")]
    gguf: Option<String>,
    /// Its size; layers only
    #[arg(long, default_value_t = 2.0)]
    gigabytes: f64,
    /// Number of weight files
    #[arg(long, default_value_t = 4)]
    shards: usize,
}

/// Sizes of a model.
struct Sizes {
    hidden: usize,
    intermediate: usize,
    layers: usize,
    vocab: usize,
    head: usize,
    /// The output layer is the embedding.
    tied: bool,
    /// Has an embedding, norms and all that it takes to run.
    runs: bool,
}

const HEADS: usize = 32;
const KV_HEADS: usize = 8;

const LLAMA_1B: Sizes =
    Sizes { hidden: 2048, intermediate: 8192, layers: 16, vocab: 128_256, head: 64, tied: true, runs: true };
const LLAMA_8B: Sizes =
    Sizes { hidden: 4096, intermediate: 14_336, layers: 32, vocab: 128_256, head: 128, tied: false, runs: true };

impl Sizes {
    /// Layers of Llama-3.2-1B, as many as make so many bytes.
    fn layers_of(gigabytes: f64) -> Sizes {
        let bytes: usize = LLAMA_1B.matrices().iter().map(|(_, _, rows, cols)| 2 * rows * cols).sum();
        Sizes { layers: (gigabytes * 1e9 / bytes as f64).ceil() as usize, runs: false, ..LLAMA_1B }
    }

    /// Matrices of a layer: names in a Hugging Face checkpoint and in a GGUF file, rows, columns.
    fn matrices(&self) -> [(&'static str, &'static str, usize, usize); 7] {
        let (hidden, intermediate, kv) = (self.hidden, self.intermediate, KV_HEADS * self.head);
        [
            ("self_attn.q_proj", "attn_q", hidden, hidden),
            ("self_attn.k_proj", "attn_k", kv, hidden),
            ("self_attn.v_proj", "attn_v", kv, hidden),
            ("self_attn.o_proj", "attn_output", hidden, hidden),
            ("mlp.gate_proj", "ffn_gate", intermediate, hidden),
            ("mlp.up_proj", "ffn_up", intermediate, hidden),
            ("mlp.down_proj", "ffn_down", hidden, intermediate),
        ]
    }

    fn layer(&self, number: usize) -> Vec<TestTensor> {
        let matrices = self.matrices();
        let tensors = matrices.par_iter().enumerate().map(|(at, &(part, _, rows, cols))| {
            let name = format!("model.layers.{number}.{part}.weight");
            tensor(&name, Shape::Scaled, Dtype::Bf16, &[rows, cols], (100 * number + at) as u64)
        });
        let mut tensors: Vec<_> = tensors.collect();
        let norms = ["input_layernorm", "post_attention_layernorm"];
        tensors.extend(norms.iter().zip(100 * number + 7..).map(|(part, seed)| {
            let name = format!("model.layers.{number}.{part}.weight");
            if self.runs { self.ones(&name) } else { self.norm(&name, seed as u64) }
        }));
        tensors
    }

    fn norm(&self, name: &str, seed: u64) -> TestTensor {
        tensor(name, Shape::Scaled, Dtype::Bf16, &[self.hidden], seed)
    }

    /// A norm that changes nothing, so that activations keep their size.
    fn ones(&self, name: &str) -> TestTensor {
        let data = bf16::ONE.to_le_bytes().repeat(self.hidden);
        TestTensor { name: name.into(), dtype: st_dtype(Dtype::Bf16), shape: vec![self.hidden], data }
    }

    /// What a model that runs has besides its layers.
    fn ends(&self) -> Vec<TestTensor> {
        let dims = [self.vocab, self.hidden];
        let table = |name: &str, seed| tensor(name, Shape::Scaled, Dtype::Bf16, &dims, seed);
        let mut tensors = vec![table("model.embed_tokens.weight", 1_000_000), self.ones("model.norm.weight")];
        if !self.tied {
            tensors.push(table("lm_head.weight", 1_000_001));
        }
        tensors
    }

    fn config(&self) -> Value {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS, "torch_dtype": "bfloat16",
        });
        if self.runs {
            let mut more = json!({
                "attention_bias": false, "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009],
                "head_dim": self.head, "hidden_act": "silu", "max_position_embeddings": 8192, "mlp_bias": false,
                "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": self.tied,
                "vocab_size": self.vocab,
            });
            if self.tied {
                more["max_position_embeddings"] = 131_072.into();
                more["rope_scaling"] = json!({
                    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192
                });
            }
            for (key, value) in more.as_object().into_iter().flatten() {
                config[key] = value.clone();
            }
        }
        config
    }
}

/// Writes a GGUF file. It has no tokenizer.
fn write_gguf(path: &Path, ty: GgmlType, sizes: &Sizes) -> anyhow::Result<()> {
    let &Sizes { hidden, intermediate, layers, vocab, head, tied, .. } = sizes;
    let output = if ty.bits_per_weight() > 6.6 { ty } else { GgmlType::Q6_K };
    let table = if tied { output } else { ty };
    let mut tensors = vec![("token_embd.weight".to_string(), vocab, hidden, table)];
    for layer in 0..layers {
        let matrices = sizes.matrices();
        tensors.extend(matrices.map(|(_, part, rows, cols)| (format!("blk.{layer}.{part}.weight"), rows, cols, ty)));
        tensors
            .extend(["attn_norm", "ffn_norm"].map(|n| (format!("blk.{layer}.{n}.weight"), 0, hidden, GgmlType::F32)));
    }
    tensors.push(("output_norm.weight".to_string(), 0, hidden, GgmlType::F32));
    if !tied {
        tensors.push(("output.weight".to_string(), vocab, hidden, output));
    }
    let mut builder = Builder::new()
        .entry("general.architecture", string_value("llama"))
        .entry("general.name", string_value("synthetic"))
        .entry("tokenizer.ggml.model", string_value("no_vocab"))
        .entry("llama.attention.layer_norm_rms_epsilon", f32_value(1e-5))
        .entry("llama.rope.freq_base", f32_value(500_000.0));
    let numbers = [
        ("vocab_size", vocab),
        ("context_length", 4096),
        ("embedding_length", hidden),
        ("block_count", layers),
        ("feed_forward_length", intermediate),
        ("rope.dimension_count", head),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
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
    let sizes = match (args.llama_1b || args.gguf.is_some(), args.llama_8b) {
        (_, true) => LLAMA_8B,
        (true, _) => LLAMA_1B,
        _ => Sizes::layers_of(args.gigabytes),
    };
    if let Some(name) = &args.gguf {
        let ty = GgmlType::ALL.into_iter().find(|ty| ty.name().eq_ignore_ascii_case(name));
        return write_gguf(&args.dir, ty.with_context(|| format!("{name} is no type of GGUF tensors"))?, &sizes);
    }
    std::fs::create_dir_all(&args.dir)?;
    let mut map = serde_json::Map::new();
    for shard in 0..args.shards {
        let file = format!("model-{:05}-of-{:05}.safetensors", shard + 1, args.shards);
        let own = sizes.layers * shard / args.shards..sizes.layers * (shard + 1) / args.shards;
        let mut tensors: Vec<TestTensor> = own.into_par_iter().flat_map(|n| sizes.layer(n)).collect();
        if sizes.runs && shard == 0 {
            tensors.extend(sizes.ends());
        }
        tensors.iter().for_each(|t| drop(map.insert(t.name.clone(), file.clone().into())));
        write_shard(&args.dir.join(&file), &tensors);
        println!("{file}: {} tensors", tensors.len());
    }
    let index = json!({"metadata": {}, "weight_map": map});
    std::fs::write(args.dir.join("model.safetensors.index.json"), serde_json::to_string_pretty(&index)?)?;
    std::fs::write(args.dir.join("config.json"), serde_json::to_string_pretty(&sizes.config())?)?;
    Ok(())
}

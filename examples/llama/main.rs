//! candle-examples' llama with its sixteen flags, on weights that stay compressed.
//!
//! `cargo run --release --example llama -- --prompt "Once upon a time" --sample-len 100`; `--help` lists the flags. The model
//! is --compressed DIR (compressed or not), --model-id or --which on the Hugging Face hub (with --features hub), or else
//! the one that comes with the source.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use candle_core::{DType, Device};
use candle_taper::Options;
use candle_taper::matrix::GpuLayout;
use candle_taper::models::{CompressedLlama, hub};
use candle_taper::text::{Generator, ModelTokenizer, Sampler, SamplerOptions};
use clap::Parser;

// The same spans in the same file as taper generate --tracing.
#[path = "../../src/bin/taper/trace.rs"]
mod trace;

/// Writes text with a Llama whose weights stay compressed.
#[derive(Parser)]
struct Args {
    /// Run on the CPU rather than on the GPU
    #[arg(long)]
    cpu: bool,
    /// The temperature used to generate samples
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Nucleus sampling: the probability that the tokens to choose among have together
    #[arg(long)]
    top_p: Option<f64>,
    /// Choose among the K most likely tokens only
    #[arg(long)]
    top_k: Option<usize>,
    /// Seed of the choices
    #[arg(long, default_value_t = 299792458)]
    seed: u64,
    /// Tokens to generate at most
    #[arg(short = 'n', long, default_value_t = 10000)]
    sample_len: usize,
    /// Do not keep keys and values
    #[arg(long)]
    no_kv_cache: bool,
    /// What the text begins with
    #[arg(long)]
    prompt: Option<String>,
    /// Dtype of the activations: f16, bf16 or f32 [default: f32 on a CPU, where it is the fastest, else bf16]
    #[arg(long)]
    dtype: Option<String>,
    /// Write trace-TIME.json for chrome://tracing
    #[arg(long)]
    tracing: bool,
    /// A repository on the hub
    #[arg(long)]
    model_id: Option<String>,
    /// Its branch, tag or commit
    #[arg(long)]
    revision: Option<String>,
    /// A repository on the hub by its short name, such as v32-1b
    #[arg(long, value_parser = hub::known)]
    which: Option<&'static str>,
    /// Refused: attention here is this crate's own
    #[arg(long)]
    use_flash_attn: bool,
    /// Penalty for repeating tokens, 1 for none
    #[arg(long, default_value_t = 1.1)]
    repeat_penalty: f32,
    /// Tokens that count as recent for it
    #[arg(long, default_value_t = 128)]
    repeat_last_n: usize,
    /// A model's directory, compressed or not
    #[arg(long, conflicts_with_all = ["model_id", "which"])]
    compressed: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = if args.cpu { Device::Cpu } else { Device::cuda_if_available(0)? };
    let dtype = match args.dtype.as_deref() {
        Some("f16") => DType::F16,
        Some("bf16") => DType::BF16,
        Some("f32") => DType::F32,
        None if device.is_cpu() => DType::F32,
        None => DType::BF16,
        Some(other) => bail!("--dtype {other}: f16, bf16 or f32"),
    };
    if args.use_flash_attn {
        bail!("--use-flash-attn: attention here is this crate's own, on every device");
    }
    let trace = args.tracing.then(trace::Trace::start).transpose()?;
    let dir = match (args.model_id.as_deref().or(args.which), args.compressed) {
        (Some(id), _) => hub::download(id, args.revision.as_deref(), Arc::new(()))?,
        (None, Some(dir)) => dir,
        (None, None) => Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tales"),
    };
    println!("loading the model weights from {}", dir.display());
    let llama = CompressedLlama::from_pretrained_on(&dir, dtype, &device, GpuLayout::Auto, &Options::default())?;
    let tokenizer = ModelTokenizer::from_pretrained(&dir, llama.config())?;
    let sampler = Sampler::new(&SamplerOptions {
        seed: args.seed,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repeat_penalty: args.repeat_penalty,
        repeat_last_n: args.repeat_last_n,
    })?;
    let mut generator = Generator::new(&llama, sampler, tokenizer.ends())?;
    if args.no_kv_cache {
        generator = generator.without_kv_cache()?;
    }

    println!("starting the inference loop");
    let prompt = args.prompt.as_deref().unwrap_or("My favorite theorem is ");
    let tokens = tokenizer.encode(prompt)?;
    let mut text = tokenizer.stream(&tokens)?;
    print!("{prompt}");
    generator.begin(&tokens)?;
    for _ in 0..args.sample_len {
        let Some(token) = generator.step()? else { break };
        print!("{}", text.push(token)?.unwrap_or_default());
        std::io::stdout().flush()?;
    }
    println!("{}", text.finish()?);
    let stats = generator.stats();
    let rate = stats.generated.saturating_sub(1) as f64 / stats.time.as_secs_f64().max(1e-9);
    println!("\n{} tokens generated ({rate:.2} token/s)", stats.generated);
    trace.map_or(Ok(()), |trace| trace.finish())
}

//! The command line.

use std::path::PathBuf;

use anyhow::bail;
use candle_taper::convert::ConvertOptions;
#[cfg(feature = "candle")]
use candle_taper::matrix::GpuLayout;
#[cfg(feature = "candle")]
use candle_taper::text::SamplerOptions;
use candle_taper::{Codec, Options, ScaleLayout, Stage};
use clap::{Args, Parser, Subcommand, ValueEnum};

#[cfg(feature = "candle")]
use crate::device::DeviceName;
use regex::Regex;

/// Makes large-model weights small, losslessly or after quantisation, in ordinary safetensors files.
///
/// Exit codes: 0 success, 1 failure, 2 wrong usage, 3 damaged or malformed data. The environment variable TAPER_CPU
/// (scalar, avx2, avx512, neon) forces a CPU backend.
#[derive(Debug, Parser)]
#[command(name = "taper", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print errors only.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Threads to use [default: one for each core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compress a .safetensors file or a model directory
    Compress(CompressArgs),
    /// Restore the original files
    Decompress(DecompressArgs),
    /// Show how each tensor is stored and where its bits went
    Inspect(InspectArgs),
    /// Check every checksum, structure and stream of a compressed checkpoint
    Verify(VerifyArgs),
    /// Write text with a Llama, compressed or not
    #[cfg(feature = "candle")]
    Generate(GenerateArgs),
    /// Time layers or whole models beside candle's own
    #[cfg(feature = "candle")]
    Bench(crate::bench::BenchArgs),
}

/// What becomes of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CodecName {
    /// Keep every bit
    Lossless,
    /// 8-bit integers with scales, entropy-coded
    Int8,
    /// Quantised to --bits bits a weight, entropy-coded
    Rate,
}

/// What happens to the skewed part of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StageName {
    /// Entropy-coded: smallest (BF16: about 10.6 bits a weight)
    Rans,
    /// Four plain bits: fastest to decode (BF16: 12 bits; int8: plain bytes, as fast as Q8_0)
    Fixed12,
    /// Three plain bits, the rest listed (BF16: about 11.2 bits)
    Fixed11,
}

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScaleName {
    /// One scale for each row
    Row,
    /// One scale for each 256x256 tile (int8 only)
    Tile,
    /// One scale for the matrix
    Matrix,
}

/// `taper compress`.
#[derive(Debug, Args)]
pub struct CompressArgs {
    /// A .safetensors file, or a directory in the Hugging Face layout
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// Where the compressed file or directory goes
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// What becomes of the weights [default: lossless, or rate if --bits is given]
    #[arg(long, value_enum)]
    pub codec: Option<CodecName>,
    /// Bits per weight for the rate codec, everything counted (1 to 10)
    #[arg(long, value_name = "B")]
    pub bits: Option<f64>,
    /// What happens to the skewed part of the weights
    #[arg(long, value_enum, default_value_t = StageName::Rans)]
    pub stage: StageName,
    /// What shares a scale [default: row for int8, matrix for rate]
    #[arg(long, value_enum)]
    pub scale: Option<ScaleName>,
    /// Compress only tensors whose name matches
    #[arg(long, value_name = "REGEX")]
    pub include: Option<Regex>,
    /// Leave tensors whose name matches as they are
    #[arg(long, value_name = "REGEX")]
    pub exclude: Option<Regex>,
    /// Replace existing output, and start over where an interrupted run had other options
    #[arg(long)]
    pub force: bool,
    /// Do not decode every tile again to compare it with its source
    #[arg(long)]
    pub no_verify: bool,
}

/// `taper decompress`.
#[derive(Debug, Args)]
pub struct DecompressArgs {
    /// A compressed .safetensors file or directory
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// Where the original file or directory goes
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// Replace existing output
    #[arg(long)]
    pub force: bool,
}

/// `taper inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A .safetensors file or directory, compressed or not
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Also write a self-contained page with charts
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Count entropies on all weights, instead of on a few tiles of each tensor
    #[arg(long)]
    pub exact: bool,
    /// Put each matrix into this GPU's memory (cuda or cuda:N) and say which layout it has there, its bits, and why
    #[cfg(feature = "candle")]
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["html", "exact"])]
    pub device: Option<DeviceName>,
    /// What the GPU keeps matrices as: auto (the fastest, timed for each shape; TAPER_MEASURE=0: by rule), smallest, fixed,
    /// window, pair, fp8, integers, rans or dense
    #[cfg(feature = "candle")]
    #[arg(long, value_name = "LAYOUT", default_value = "auto", requires = "device", value_parser = crate::device::layout)]
    pub layout: GpuLayout,
}

/// `taper verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// A compressed .safetensors file or directory
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
}

/// The dtype of activations and decoded weights.
#[cfg(feature = "candle")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeName {
    /// 16-bit floats
    F16,
    /// 16-bit floats with the range of F32
    Bf16,
    /// 32-bit floats: the fastest on a CPU
    F32,
}

/// `taper generate`. Flags that candle's llama example has too mean the same.
#[cfg(feature = "candle")]
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The model's directory, compressed or not [default: the example model, where it is installed]
    #[arg(long, visible_alias = "model", value_name = "DIR")]
    pub compressed: Option<PathBuf>,
    /// A GGUF file, as llama.cpp runs them: weights, tokenizer and chat template in one
    #[arg(long, value_name = "FILE")]
    #[arg(conflicts_with_all = ["compressed", "model_id", "which", "codec", "bits", "stage"])]
    pub gguf: Option<PathBuf>,
    /// A model on the Hugging Face hub, such as meta-llama/Llama-3.2-1B (builds with --features hub)
    #[arg(long, value_name = "ID", conflicts_with = "compressed")]
    pub model_id: Option<String>,
    /// Branch, tag or commit of --model-id or --which [default: main]
    #[arg(long, value_name = "REV")]
    pub revision: Option<String>,
    /// A model on the hub by its short name: v1, v2, v3, v31, v3-instruct, v31-instruct, v32-1b, v32-1b-instruct, v32-3b,
    /// v32-3b-instruct, solar-10.7b, tiny-llama-1.1b-chat, SmoLM2-1.7B, SmoLM2-360M, SmoLM2-135M, each also with -Instruct
    #[arg(long, value_name = "NAME", value_parser = candle_taper::models::hub::known)]
    #[arg(conflicts_with_all = ["compressed", "model_id"])]
    pub which: Option<&'static str>,
    /// How to compress a model that is not yet, in memory [default: lossless, or rate if --bits is given]
    #[arg(long, value_enum)]
    pub codec: Option<CodecName>,
    /// Bits per weight for the rate codec, everything counted (1 to 10)
    #[arg(long, value_name = "B")]
    pub bits: Option<f64>,
    /// What happens to the skewed part of weights that are compressed now [default: rans]
    #[arg(long, value_enum)]
    pub stage: Option<StageName>,
    /// What the text begins with [default: standard input if it is piped]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub file: Option<PathBuf>,
    /// Talk with the model through its chat template. --prompt, --file or a pipe is one message and gets one answer; at a
    /// terminal without them, message follows message until Ctrl-D. Without --chat the prompt is text to go on from
    #[arg(long)]
    pub chat: bool,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// How many tokens to generate at most, in each answer
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10000)]
    pub sample_len: usize,
    /// How freely to choose; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub temperature: f64,
    /// Choose among the most likely tokens that have this probability together
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Choose among this many of the most likely tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Seed of the choices
    #[arg(long, value_name = "N", default_value_t = 299792458)]
    pub seed: u64,
    /// Divide the logits of recent tokens by this; 1 for no penalty
    #[arg(long, value_name = "X", default_value_t = 1.1)]
    pub repeat_penalty: f32,
    /// How many tokens count as recent
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub repeat_last_n: usize,
    /// The dtype of the activations [default: f32, on a GPU bf16]
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Where to run: cpu, cuda or cuda:N [default: the first GPU in builds with --features cuda, else the CPU]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceName>,
    /// What a GPU keeps matrices as: auto (the fastest, timed for each shape; TAPER_MEASURE=0: by rule), smallest, fixed,
    /// window, pair, fp8, integers, rans or dense
    #[arg(long, value_name = "LAYOUT", default_value = "auto", value_parser = crate::device::layout)]
    pub layout: GpuLayout,
    /// Compute all positions again for each token
    #[arg(long)]
    pub no_kv_cache: bool,
    /// On a GPU, launch every kernel by itself instead of a CUDA graph for each token
    #[arg(long)]
    pub no_cuda_graph: bool,
    /// Run on the CPU, as --device cpu
    #[arg(long, conflicts_with = "device")]
    pub cpu: bool,
    /// Write trace-TIME.json for chrome://tracing
    #[arg(long)]
    pub tracing: bool,
    /// Not built in: needs a GPU
    #[arg(long, hide = true)]
    pub use_flash_attn: bool,
}

/// The library's codec for `--codec` and `--bits`.
fn codec(name: Option<CodecName>, bits: Option<f64>) -> anyhow::Result<Codec> {
    let default = if bits.is_some() { CodecName::Rate } else { CodecName::Lossless };
    Ok(match (name.unwrap_or(default), bits) {
        (CodecName::Lossless, None) => Codec::Lossless,
        (CodecName::Int8, None) => Codec::Int8,
        (CodecName::Rate, Some(bits)) => Codec::Rate { bits },
        (CodecName::Rate, None) => bail!("--codec rate needs --bits, for instance --bits 3.5"),
        (_, Some(_)) => bail!("--bits goes with --codec rate"),
    })
}

impl StageName {
    fn stage(self) -> Stage {
        match self {
            StageName::Rans => Stage::Rans,
            StageName::Fixed12 => Stage::Fixed12,
            StageName::Fixed11 => Stage::Fixed11,
        }
    }
}

#[cfg(feature = "candle")]
impl GenerateArgs {
    /// How to compress a model that is not yet, and whether the user chose that.
    pub fn options(&self) -> anyhow::Result<(Options, bool)> {
        let stage = self.stage.unwrap_or(StageName::Rans).stage();
        let options = Options { codec: codec(self.codec, self.bits)?, stage, ..Options::default() };
        options.validate()?;
        Ok((options, self.codec.is_some() || self.bits.is_some() || self.stage.is_some()))
    }

    /// How to choose tokens.
    pub fn sampler(&self) -> SamplerOptions {
        SamplerOptions {
            seed: self.seed,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
        }
    }
}

impl CompressArgs {
    /// The library's options.
    pub fn options(&self) -> anyhow::Result<ConvertOptions> {
        let codec = codec(self.codec, self.bits)?;
        let stage = self.stage.stage();
        let scale = self.scale.map(|scale| match scale {
            ScaleName::Row => ScaleLayout::Row,
            ScaleName::Tile => ScaleLayout::Tile,
            ScaleName::Matrix => ScaleLayout::Matrix,
        });
        let matrix = Options { codec, stage, scale, verify: !self.no_verify, ..Options::default() };
        matrix.validate()?;
        let (include, exclude) = (self.include.clone(), self.exclude.clone());
        Ok(ConvertOptions { matrix, include, exclude, force: self.force })
    }
}

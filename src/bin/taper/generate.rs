//! `taper generate`: text from a Llama.

use std::fs;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{DType, Device, Module, Tensor};
use candle_taper::Options;
use candle_taper::models::{CompressedLlama, Llama, config};
use candle_taper::nn::LinearLayer;
use candle_transformers::generation::{LogitsProcessor, Sampling};
use candle_transformers::utils::apply_repeat_penalty;
use tokenizers::Tokenizer;

use crate::args::{DtypeName, GenerateArgs};
use crate::text_stream::TextStream;
use crate::trace::Trace;

/// What candle's examples begin with.
const DEFAULT_PROMPT: &str = "My favorite theorem is ";
/// What a tale begins with.
const TALE_PROMPT: &str = "Once upon a time";
/// The model that comes with the source.
const TALES: &str = "examples/tales";

/// Runs the command.
pub fn run(args: &GenerateArgs, quiet: bool) -> Result<()> {
    check(args)?;
    let dir = model_dir(args)?;
    let dtype = match args.dtype {
        Some(DtypeName::F16) => DType::F16,
        Some(DtypeName::Bf16) => DType::BF16,
        Some(DtypeName::F32) | None => DType::F32,
    };
    let prompt = prompt(args, &dir)?;
    let trace = args.tracing.then(Trace::start).transpose()?;
    let note = |text: &str| {
        if !quiet {
            eprintln!("{text}");
        }
    };
    note(&format!("loading the model weights from {}", dir.display()));
    let start = Instant::now();
    let llama = CompressedLlama::from_pretrained(&dir, dtype, &Options::default())?;
    for text in llama.notes() {
        note(&format!("note: {text}"));
    }
    note(&format!("loaded in {:.2} s", start.elapsed().as_secs_f64()));
    let tokenizer = tokenizer(&dir)?;
    let ids = encode(&tokenizer, &prompt, &dir, llama.config().bos_token_id)?;
    let stats = Generation { args, dir: &dir, llama: &llama, tokenizer: &tokenizer }.write(&prompt, ids)?;
    note(&stats.to_string());
    if let Some(peak) = peak_memory() {
        note(&format!("peak memory {}", indicatif::HumanBytes(peak)));
    }
    trace.map_or(Ok(()), |trace| trace.finish())
}

/// Refuses what this build cannot do.
fn check(args: &GenerateArgs) -> Result<()> {
    let hub = [("--model-id", &args.model_id), ("--revision", &args.revision), ("--which", &args.which)];
    if let Some((flag, _)) = hub.iter().find(|(_, value)| value.is_some()) {
        bail!("{flag}: downloads are not built in yet; download the model's files and pass --compressed DIR");
    }
    ensure!(!args.use_flash_attn, "--use-flash-attn needs a GPU, and this build runs on the CPU");
    ensure!(args.temperature.is_finite(), "--temperature must be a number");
    ensure!(args.top_k != Some(0), "--top-k must be at least 1");
    ensure!(args.repeat_penalty.is_finite() && args.repeat_penalty > 0.0, "--repeat-penalty must be above 0");
    Ok(())
}

/// The model that was asked for, or the one that comes with the source.
fn model_dir(args: &GenerateArgs) -> Result<PathBuf> {
    if let Some(dir) = &args.compressed {
        return Ok(dir.clone());
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf()));
    let beside = beside.iter().flat_map(|dir| [dir.join(TALES), dir.join("tales")]);
    let mut places = std::iter::once(Path::new(env!("CARGO_MANIFEST_DIR")).join(TALES)).chain(beside);
    places.find(|dir| dir.join("config.json").is_file()).context("pass --compressed DIR: the directory of a Llama")
}

/// The text to go on from.
fn prompt(args: &GenerateArgs, dir: &Path) -> Result<String> {
    if let Some(prompt) = &args.prompt {
        return Ok(prompt.clone());
    }
    let mut text = String::new();
    if let Some(path) = &args.file {
        text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    } else if !std::io::stdin().is_terminal() {
        std::io::stdin().read_to_string(&mut text).context("cannot read the prompt from standard input")?;
    }
    if text.is_empty() {
        text = if dir.ends_with("tales") { TALE_PROMPT } else { DEFAULT_PROMPT }.to_string();
    }
    // A file's or a pipe's last line ends with a line break that is not meant.
    Ok(text.strip_suffix('\n').map(|text| text.strip_suffix('\r').unwrap_or(text)).unwrap_or(&text).to_string())
}

fn tokenizer(dir: &Path) -> Result<Tokenizer> {
    let path = dir.join("tokenizer.json");
    ensure!(path.is_file(), "{} has no tokenizer.json, which text needs", dir.display());
    Tokenizer::from_file(&path).map_err(|error| anyhow!("{}: {error}", path.display()))
}

/// The prompt's tokens. The tokenizer puts BOS before them if it was made to; else it is put there if
/// `tokenizer_config.json` asks for it, or if neither knows anything and the model has one.
fn encode(tokenizer: &Tokenizer, prompt: &str, dir: &Path, bos: Option<u32>) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode(prompt, true).map_err(|error| anyhow!("cannot tokenize the prompt: {error}"))?;
    let mut ids = encoding.get_ids().to_vec();
    let path = dir.join("tokenizer_config.json");
    let asked = match fs::read(&path) {
        Ok(text) => {
            let json: serde_json::Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
            json["add_bos_token"].as_bool()
        }
        Err(_) => None,
    };
    if let Some(bos) = bos.filter(|bos| ids.first() != Some(bos))
        && asked.unwrap_or(tokenizer.get_post_processor().is_none())
    {
        ids.insert(0, bos);
    }
    ensure!(!ids.is_empty(), "the prompt has no tokens, and the model no token that begins a text");
    Ok(ids)
}

/// All that a text comes from.
struct Generation<'a, L, E> {
    args: &'a GenerateArgs,
    dir: &'a Path,
    llama: &'a Llama<L, E>,
    tokenizer: &'a Tokenizer,
}

impl<L: LinearLayer, E: Module> Generation<'_, L, E> {
    /// Writes the prompt and what follows it to standard output, as it is found.
    fn write(&self, prompt: &str, mut tokens: Vec<u32>) -> Result<Stats> {
        let (args, context) = (self.args, self.llama.config().max_position_embeddings);
        let mut stats = Stats { prompt: tokens.len(), ..Stats::default() };
        ensure!(stats.prompt <= context, "the prompt has {} tokens, the model's context is {context}", stats.prompt);
        let ends = config::end_tokens(self.dir, self.llama.config())?;
        let mut sampler = LogitsProcessor::from_sampling(args.seed, sampling(args));
        let mut cache = self.llama.new_cache(!args.no_kv_cache)?;
        let mut stream = TextStream::new(self.tokenizer, &tokens)?;
        let mut out = std::io::stdout().lock();
        write!(out, "{prompt}")?;
        out.flush()?;
        while stats.generated < args.sample_len {
            if tokens.len() > context {
                stats.full = true;
                break;
            }
            let start = Instant::now();
            let input = Tensor::new(&tokens[cache.len()..], &Device::Cpu)?.unsqueeze(0)?;
            let logits = self.llama.forward(&input, cache.len(), &mut cache)?.squeeze(0)?;
            let next = sampler.sample(&self.adjust(&logits, &tokens)?)?;
            let time = if stats.generated == 0 { &mut stats.prompt_time } else { &mut stats.time };
            *time += start.elapsed();
            stats.generated += 1;
            tokens.push(next);
            if ends.contains(&next) {
                break;
            }
            if let Some(text) = stream.push(next)? {
                write!(out, "{text}")?;
                out.flush()?;
            }
        }
        writeln!(out, "{}", stream.finish()?)?;
        Ok(stats)
    }

    /// Checks logits `[vocab]` and makes recent tokens less likely.
    fn adjust(&self, logits: &Tensor, tokens: &[u32]) -> Result<Tensor> {
        if logits.to_vec1::<f32>()?.iter().any(|logit| !logit.is_finite()) {
            let position = tokens.len();
            bail!("the logits at position {position} are not finite: damaged weights, or too large for --dtype f16");
        }
        if self.args.repeat_penalty == 1.0 {
            return Ok(logits.clone());
        }
        let recent = &tokens[tokens.len().saturating_sub(self.args.repeat_last_n)..];
        Ok(apply_repeat_penalty(logits, self.args.repeat_penalty, recent)?)
    }
}

fn sampling(args: &GenerateArgs) -> Sampling {
    let temperature = args.temperature;
    match (args.top_k, args.top_p) {
        _ if temperature < 1e-7 => Sampling::ArgMax,
        (None, None) => Sampling::All { temperature },
        (Some(k), None) => Sampling::TopK { k, temperature },
        (None, Some(p)) => Sampling::TopP { p, temperature },
        (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
    }
}

/// How fast it went. The first token comes from the prompt, so its time is the prompt's.
#[derive(Default)]
struct Stats {
    prompt: usize,
    prompt_time: Duration,
    generated: usize,
    time: Duration,
    full: bool,
}

impl std::fmt::Display for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        if self.full {
            writeln!(f, "note: the model's context is full")?;
        }
        if self.generated == 0 {
            return write!(f, "{} prompt tokens, none generated", self.prompt);
        }
        writeln!(f, "{} prompt tokens ({:.1} token/s)", self.prompt, rate(self.prompt, self.prompt_time))?;
        write!(f, "{} tokens generated", self.generated)?;
        if self.generated > 1 {
            write!(f, " ({:.1} token/s)", rate(self.generated - 1, self.time))?;
        }
        Ok(())
    }
}

/// The most memory that this process ever had, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

//! `taper generate`: text from a Llama.

mod chat;
mod source;

use std::fs;
use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_taper::text::{Generator, ModelTokenizer, Sampler, Stats, Stop};

use crate::args::GenerateArgs;
use crate::trace::Trace;

/// What candle's examples begin with.
const DEFAULT_PROMPT: &str = "My favorite theorem is ";
/// What a tale begins with.
const TALE_PROMPT: &str = "Once upon a time";

/// Runs the command.
pub fn run(args: &GenerateArgs, quiet: bool) -> Result<()> {
    ensure!(!args.use_flash_attn, "--use-flash-attn is not built in: attention is candle's own, on a GPU too");
    let sampler = Sampler::new(&args.sampler())?;
    let dir = source::place(args, quiet)?;
    let trace = args.tracing.then(Trace::start).transpose()?;
    let note = Notes { quiet };
    note.say(format_args!("loading the model weights from {}", dir.display()));
    let start = Instant::now();
    let model = source::load(args, &dir, quiet)?;
    for text in model.notes() {
        note.say(format_args!("note: {text}"));
    }
    note.say(format_args!("loaded in {:.2} s", start.elapsed().as_secs_f64()));
    let tokenizer = source::tokenizer(args, &dir, model.config())?;
    let mut generator = Generator::new(&*model, sampler, tokenizer.ends())?;
    if args.no_kv_cache {
        generator = generator.without_kv_cache()?;
    }
    if args.no_cuda_graph {
        generator = generator.without_cuda_graph();
    }
    if args.chat {
        chat::run(args, &dir, &tokenizer, &mut generator, note)?;
    } else {
        let prompt = prompt(args)?.unwrap_or_else(|| default_prompt(&dir).to_string());
        let tokens = tokenizer.encode(&prompt)?;
        print(&prompt)?;
        write(args, &tokenizer, &mut generator, &tokens)?;
        print("\n")?;
        note.stats(generator.stats());
    }
    if let Some(peak) = peak_memory() {
        note.say(format_args!("peak memory {}", indicatif::HumanBytes(peak)));
    }
    trace.map_or(Ok(()), |trace| trace.finish())
}

/// The text that was given: an argument, a file, or what is piped in. `None` if none was, or an empty pipe.
fn prompt(args: &GenerateArgs) -> Result<Option<String>> {
    if let Some(prompt) = &args.prompt {
        return Ok(Some(prompt.clone()));
    }
    let mut text = String::new();
    if let Some(path) = &args.file {
        text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    } else if !std::io::stdin().is_terminal() {
        std::io::stdin().read_to_string(&mut text).context("cannot read the prompt from standard input")?;
    }
    // A file's or a pipe's last line ends with a line break that is not meant.
    let line = text.strip_suffix('\n').map(|text| text.strip_suffix('\r').unwrap_or(text)).unwrap_or(&text);
    Ok((!text.is_empty()).then(|| line.to_string()))
}

fn default_prompt(dir: &Path) -> &'static str {
    if dir.ends_with("tales") { TALE_PROMPT } else { DEFAULT_PROMPT }
}

/// Writes what follows `tokens` to standard output, as it is found, and returns it.
fn write(
    args: &GenerateArgs,
    tokenizer: &ModelTokenizer,
    generator: &mut Generator<'_>,
    tokens: &[u32],
) -> Result<String> {
    generator.begin(tokens)?;
    let mut stream = tokenizer.stream(tokens)?;
    let mut answer = String::new();
    for _ in 0..args.sample_len {
        let Some(token) = generator.step()? else { break };
        if let Some(text) = stream.push(token)? {
            print(&text)?;
            answer.push_str(&text);
        }
    }
    let rest = stream.finish()?;
    print(&rest)?;
    Ok(answer + &rest)
}

/// Writes to standard output at once.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// What the user is told besides the text, on standard error.
#[derive(Clone, Copy)]
struct Notes {
    quiet: bool,
}

impl Notes {
    fn say(self, text: std::fmt::Arguments<'_>) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    /// How fast it went, the prompt and what follows it apart.
    fn stats(self, stats: &Stats) {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        if stats.stop == Some(Stop::Context) {
            self.say(format_args!("note: the model's context is full"));
        }
        if stats.generated == 0 {
            return self.say(format_args!("{} prompt tokens, none generated", stats.prompt));
        }
        let fresh = rate(stats.prompt - stats.reused, stats.prompt_time);
        match stats.reused {
            0 => self.say(format_args!("{} prompt tokens ({fresh:.1} token/s)", stats.prompt)),
            known => self.say(format_args!("{} prompt tokens, {known} known ({fresh:.1} token/s)", stats.prompt)),
        }
        match stats.generated {
            1 => self.say(format_args!("1 tokens generated")),
            n => self.say(format_args!("{n} tokens generated ({:.1} token/s)", rate(n - 1, stats.time))),
        }
    }
}

/// The most memory that this process ever had, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

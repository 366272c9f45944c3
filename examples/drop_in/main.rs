//! Stock candle on a compressed checkpoint, checked against stock candle on the plain one.
//!
//! `cargo run --release --example drop_in [-- DIR [COMPRESSED]]`: DIR is a Llama's directory, compressed or not; what is
//! missing of the pair is made in a temporary directory. Without arguments the model that comes with the source. Every
//! model here is candle-transformers' own, unchanged. README.md beside this file shows what is printed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_taper::models::{CompressedLlama, Config, JustInTime, config, var_builder};
use candle_taper::text::ModelTokenizer;
use candle_taper::{Checkpoint, Options, checkpoint, convert};
use candle_transformers::models::llama::{Cache, Llama};

const CPU: Device = Device::Cpu;
/// Greedy tokens that are compared.
const TOKENS: usize = 200;

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let dir = args.next().unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tales"));
    let made = tempfile::tempdir()?;
    let (plain, compressed) = pair(dir, args.next(), made.path())?;
    println!("plain       {:>9} bytes  {}", bytes(&plain)?, plain.display());
    println!("compressed  {:>9} bytes  {}", bytes(&compressed)?, compressed.display());

    let mut config = config::read(&plain)?;
    let tokenizer = ModelTokenizer::from_pretrained(&plain, &config)?;
    let prompt = tokenizer.encode("Once upon a time")?;
    let weights = var_builder(&compressed, DType::F32, &CPU)?;
    config.tie_word_embeddings |= !weights.contains_tensor("lm_head.weight");

    let stock = VarBuilder::from_tensors(candle_tensors(&plain)?, DType::F32, &CPU);
    let expected = Run::stock(&Llama::load(stock, &config)?, &config, &prompt)?;
    println!("\nstock candle, plain file: {:.0} token/s\n{}", expected.speed, text(&tokenizer, &expected)?);

    let decoded = Run::stock(&Llama::load(weights, &config)?, &config, &prompt)?;
    expected.compare("decoded at load", &decoded)?;

    let weights = JustInTime::open(&compressed, DType::F32)?;
    let llama = weights.load(|vb| Llama::load(vb, &config))?;
    let just_in_time = weights.run(|| Run::stock(&llama, &config, &prompt))?;
    expected.compare("just in time", &just_in_time)?;
    println!(
        "              never more than {} of {} bytes of linear weights in memory ({} layers)",
        weights.peak_live_bytes(),
        weights.total_bytes(),
        weights.linears()
    );

    let ours = CompressedLlama::from_pretrained(&compressed, DType::F32, &Options::default())?;
    let mut cache = ours.new_cache(true)?;
    let ours = Run::new(&config, &prompt, |ids, position| ours.forward(ids, position, &mut cache))?;
    ensure!(ours.tokens == expected.tokens, "our own Llama: the text is another");
    let difference = expected.difference(&ours);
    ensure!(difference <= 1e-4, "our own Llama: the logits differ by {difference:e}");
    let (n, speed) = (ours.logits.len(), ours.speed);
    println!("our own Llama   : {n} greedy tokens are the same, logits within {difference:.0e}, {speed:.0} token/s");
    Ok(())
}

/// The plain and the compressed directory. The one that was not given is made in `place`.
fn pair(dir: PathBuf, other: Option<PathBuf>, place: &Path) -> Result<(PathBuf, PathBuf)> {
    let compressed = Checkpoint::open(&dir)?.is_compressed();
    if let Some(other) = other {
        let pair = if compressed { (other, dir) } else { (dir, other) };
        ensure!(!Checkpoint::open(&pair.0)?.is_compressed(), "{} is compressed too", pair.0.display());
        return Ok(pair);
    }
    if compressed {
        convert::decompress(&dir, place.join("plain"), false, &())?;
        return Ok((place.join("plain"), dir));
    }
    convert::compress(&dir, place.join("compressed"), &Default::default(), &())?;
    Ok((dir, place.join("compressed")))
}

/// Bytes of a directory's weights.
fn bytes(dir: &Path) -> Result<u64> {
    checkpoint::weight_files(dir)?.iter().map(|file| Ok(std::fs::metadata(file)?.len())).sum()
}

/// The tensors of a plain directory, as candle itself reads them.
fn candle_tensors(dir: &Path) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for file in checkpoint::weight_files(dir)? {
        tensors.extend(candle_core::safetensors::load(file, &CPU)?);
    }
    Ok(tensors)
}

/// A greedy text and all logits on the way.
struct Run {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
    speed: f64,
}

impl Run {
    /// A text of candle-transformers' model.
    fn stock(llama: &Llama, config: &Config, prompt: &[u32]) -> candle_core::Result<Run> {
        let mut cache = Cache::new(true, DType::F32, config, &CPU)?;
        Run::new(config, prompt, |ids, position| llama.forward(ids, position, &mut cache))
    }

    fn new(
        config: &Config,
        prompt: &[u32],
        mut forward: impl FnMut(&Tensor, usize) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Run> {
        let mut run = Run { tokens: prompt.to_vec(), logits: Vec::new(), speed: 0.0 };
        let (start, mut position) = (Instant::now(), 0);
        while run.logits.len() < TOKENS && run.tokens.len() < config.max_position_embeddings {
            let input = Tensor::new(&run.tokens[position..], &CPU)?.unsqueeze(0)?;
            let logits = forward(&input, position)?.squeeze(0)?;
            position = run.tokens.len();
            run.tokens.push(logits.argmax(0)?.to_scalar()?);
            run.logits.push(logits.to_vec1()?);
        }
        run.speed = run.logits.len() as f64 / start.elapsed().as_secs_f64();
        Ok(run)
    }

    /// Fails unless `other` is the same to the last bit.
    fn compare(&self, name: &str, other: &Run) -> Result<()> {
        ensure!(self.tokens == other.tokens, "{name}: the text is another");
        let bits = |run: &Run| -> Vec<u32> { run.logits.iter().flatten().map(|logit| logit.to_bits()).collect() };
        ensure!(bits(self) == bits(other), "{name}: the logits are not the same bits");
        let (n, vocab) = (self.logits.len(), self.logits[0].len());
        println!(
            "{name:<16}: {n} greedy tokens and {n} x {vocab} logits are the same bits, {:.0} token/s",
            other.speed
        );
        Ok(())
    }

    /// The greatest difference of logits, relative to the greatest of them.
    fn difference(&self, other: &Run) -> f32 {
        let (a, b) = (self.logits.iter().flatten(), other.logits.iter().flatten());
        let largest = self.logits.iter().flatten().fold(0f32, |m, logit| m.max(logit.abs()));
        a.zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
    }
}

/// The text up to its end.
fn text(tokenizer: &ModelTokenizer, run: &Run) -> Result<String> {
    let tokens: Vec<u32> = run.tokens.iter().copied().take_while(|token| !tokenizer.ends().contains(token)).collect();
    tokenizer.tokenizer().decode(&tokens, true).map_err(anyhow::Error::from_boxed).context("cannot decode")
}

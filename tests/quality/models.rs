//! Real models, texts for them, and how well they foretell these.

use std::path::{Path, PathBuf};

use anyhow::{Error, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_taper::models::{DenseLlama, Llama};
use candle_taper::nn::LinearLayer;
use candle_transformers::generation::LogitsProcessor;
use tempfile::TempDir;

use super::llama2c;

/// Positions of a window, each of which begins anew after BOS.
pub const WINDOW: usize = 256;
/// A model and a text.
pub struct Model {
    /// What it is called.
    pub name: &'static str,
    /// Tokens that perplexities are stated for: the first 20,000 characters of the text.
    pub tokens: usize,
    /// In the Hugging Face layout, not compressed.
    pub dir: PathBuf,
    /// BOS and 255 tokens each, with the 256 tokens that follow these.
    pub windows: Vec<(Vec<u32>, Vec<u32>)>,
    _converted: Option<TempDir>,
}

/// TinyStories-656K and stories260K, with this many characters of text.
pub fn all(data: &Path, characters: usize) -> Result<Vec<Model>> {
    let text = std::fs::read_to_string(data.join("text/tinystories-197k.txt"))?;
    let text: String = text.chars().take(characters).collect();
    let dir = data.join("TinyStories-656K");
    let tokenizer = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).map_err(Error::msg)?;
    let tokens = tokenizer.encode(text.as_str(), false).map_err(Error::msg)?.get_ids().to_vec();
    let larger = Model { name: "TinyStories-656K", tokens: 4352, dir, windows: windows(&tokens), _converted: None };
    let converted = tempfile::tempdir()?;
    let file = |name: &str| std::fs::read(data.join("stories260K").join(name));
    llama2c::convert(&file("stories260K.bin")?, converted.path())?;
    let tokens = llama2c::Tokenizer::read(&file("stories260K_tok512.bin")?)?.encode(&text);
    let smaller = Model {
        name: "stories260K",
        tokens: 9472,
        dir: converted.path().to_path_buf(),
        windows: windows(&tokens),
        _converted: Some(converted),
    };
    Ok(vec![larger, smaller])
}

/// The model that comes with the source, on texts that it writes itself at temperature 1.
pub fn tales(texts: u64) -> Result<Model> {
    let restored = tempfile::tempdir()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tales");
    candle_taper::convert::decompress(source, restored.path(), true, &())?;
    let llama = DenseLlama::from_pretrained(restored.path(), DType::F32, &Device::Cpu)?;
    let mut cache = llama.new_cache(true)?;
    let write = |seed| {
        let mut sampler = LogitsProcessor::new(seed, Some(1.0), None);
        cache.reset();
        let mut text = vec![0];
        while text.len() <= WINDOW {
            let last = Tensor::new(&[text[text.len() - 1]], &Device::Cpu)?.unsqueeze(0)?;
            text.push(sampler.sample(&llama.forward(&last, text.len() - 1, &mut cache)?.squeeze(0)?)?);
        }
        Ok((text[..WINDOW].to_vec(), text[1..].to_vec()))
    };
    let windows = (0..texts).map(write).collect::<Result<Vec<_>>>()?;
    let (name, tokens, dir) = ("tales", WINDOW * windows.len(), restored.path().to_path_buf());
    Ok(Model { name, tokens, dir, windows, _converted: Some(restored) })
}

fn windows(tokens: &[u32]) -> Vec<(Vec<u32>, Vec<u32>)> {
    // Both models have BOS 1.
    let input = |window: &[u32]| std::iter::once(1).chain(window[..WINDOW - 1].iter().copied()).collect();
    tokens.chunks_exact(WINDOW).map(|window| (input(window), window.to_vec())).collect()
}

impl Model {
    /// The model with plain layers, in `f32`.
    pub fn dense(&self) -> Result<DenseLlama> {
        Ok(DenseLlama::from_pretrained(&self.dir, DType::F32, &Device::Cpu)?)
    }

    /// The windows of the text that perplexities are stated for.
    pub fn stated(&self) -> &[(Vec<u32>, Vec<u32>)] {
        &self.windows[..self.windows.len().min(self.tokens / WINDOW)]
    }
}

/// The logarithms of the probabilities of all tokens, for each position of each window: `[window][position][token]`.
pub struct Forecast(Vec<Vec<Vec<f32>>>);

impl Forecast {
    /// Runs the model over the windows.
    pub fn new<L: LinearLayer, E: Module>(llama: &Llama<L, E>, windows: &[(Vec<u32>, Vec<u32>)]) -> Result<Forecast> {
        let mut cache = llama.new_cache(true)?;
        let of_window = |(input, _): &(Vec<u32>, Vec<u32>)| {
            cache.reset();
            let input = Tensor::new(input.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
            let logits = llama.forward_all(&input, 0, &mut cache)?.squeeze(0)?;
            Ok(logits.to_vec2::<f32>()?.into_iter().map(log_softmax).collect())
        };
        Ok(Forecast(windows.iter().map(of_window).collect::<Result<_>>()?))
    }

    /// The perplexity on the windows that were forecast.
    pub fn perplexity(&self, windows: &[(Vec<u32>, Vec<u32>)]) -> f64 {
        let positions = self.0.iter().zip(windows).flat_map(|(log, (_, next))| log.iter().zip(next));
        let (sum, count) =
            positions.fold((0.0, 0), |(sum, count), (log, &next)| (sum - f64::from(log[next as usize]), count + 1));
        (sum / f64::from(count)).exp()
    }

    /// The Kullback-Leibler divergence of `other` from this, in nats, for each window and position.
    pub fn divergence(&self, other: &Forecast) -> Vec<Vec<f64>> {
        let of_position = |(p, q): (&Vec<f32>, &Vec<f32>)| -> f64 {
            p.iter().zip(q).map(|(&p, &q)| f64::from(p).exp() * (f64::from(p) - f64::from(q))).sum()
        };
        let of_window = |(a, b): (&Vec<Vec<f32>>, &Vec<Vec<f32>>)| a.iter().zip(b).map(of_position).collect();
        self.0.iter().zip(&other.0).map(of_window).collect()
    }

    /// All values as bits.
    pub fn bits(&self) -> impl Iterator<Item = u32> {
        self.0.iter().flatten().flatten().map(|value| value.to_bits())
    }
}

fn log_softmax(logits: Vec<f32>) -> Vec<f32> {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|&v| f64::from(v - largest).exp()).sum();
    logits.into_iter().map(|v| (f64::from(v - largest) - sum.ln()) as f32).collect()
}

//! The choice of the next token.

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use candle_transformers::utils::apply_repeat_penalty;

use crate::{Error, Result};

/// How tokens are chosen. The defaults are those of candle's llama example.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Seed of the choices: the same seed makes the same ones.
    pub seed: u64,
    /// How freely to choose; 0 always takes the most likely token.
    pub temperature: f64,
    /// Choose among this many of the most likely tokens.
    pub top_k: Option<usize>,
    /// Choose among the most likely tokens that have this probability together.
    pub top_p: Option<f64>,
    /// The logits of recent tokens are divided by this (if negative, multiplied); 1 for no penalty.
    pub repeat_penalty: f32,
    /// How many tokens count as recent.
    pub repeat_last_n: usize,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions {
            seed: 299792458,
            temperature: 0.8,
            top_k: None,
            top_p: None,
            repeat_penalty: 1.1,
            repeat_last_n: 128,
        }
    }
}

/// Chooses tokens.
pub struct Sampler {
    processor: LogitsProcessor,
    repeat_penalty: f32,
    repeat_last_n: usize,
}

impl Sampler {
    /// A sampler that begins with its seed.
    ///
    /// # Errors
    /// If a number is not one, `top_k` is 0 or the penalty is not above 0.
    pub fn new(options: &SamplerOptions) -> Result<Sampler> {
        let SamplerOptions { temperature, top_k, top_p, repeat_penalty, .. } = *options;
        let valid = [
            ("temperature must be a number, 0 or above", temperature.is_finite() && temperature >= 0.0),
            ("top-k must be at least 1", top_k != Some(0)),
            ("top-p must be a number", top_p.is_none_or(f64::is_finite)),
            ("repeat-penalty must be above 0", repeat_penalty.is_finite() && repeat_penalty > 0.0),
        ];
        if let Some((text, _)) = valid.iter().find(|(_, valid)| !valid) {
            return Err(Error::Invalid(format!("--{text}")));
        }
        let sampling = match (top_k, top_p) {
            _ if temperature < 1e-7 => Sampling::ArgMax,
            (None, None) => Sampling::All { temperature },
            (Some(k), None) => Sampling::TopK { k, temperature },
            (None, Some(p)) => Sampling::TopP { p, temperature },
            (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        };
        let processor = LogitsProcessor::from_sampling(options.seed, sampling);
        Ok(Sampler { processor, repeat_penalty, repeat_last_n: options.repeat_last_n })
    }

    /// The token after `tokens`, from its logits `[vocab]`.
    ///
    /// # Errors
    /// If a logit is not finite.
    pub fn sample(&mut self, logits: &Tensor, tokens: &[u32]) -> Result<u32> {
        let mut logits = logits.to_device(&Device::Cpu)?;
        if logits.to_vec1::<f32>()?.iter().any(|logit| !logit.is_finite()) {
            return Err(Error::Invalid(format!(
                "the logits at position {} are not finite: the weights hold a NaN or are damaged (try taper verify), or \
                 the activations are too large for f16 (try --dtype f32)",
                tokens.len()
            )));
        }
        if self.repeat_penalty != 1.0 {
            let recent = &tokens[tokens.len().saturating_sub(self.repeat_last_n)..];
            logits = apply_repeat_penalty(&logits, self.repeat_penalty, recent)?;
        }
        Ok(self.processor.sample(&logits)?)
    }
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler").finish_non_exhaustive()
    }
}

//! The saved model in candle's own Llama, which shares no code with the training.

use std::path::Path;

use anyhow::{Error, Result};
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::generation::LogitsProcessor;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use tokenizers::Tokenizer;

use super::vocabulary::{self, EOS};

/// A model in the Hugging Face layout, run in `f32`.
pub struct Stock {
    llama: Llama,
    config: Config,
    tokenizer: Tokenizer,
}

impl Stock {
    /// Opens a directory.
    pub fn open(dir: &Path) -> Result<Self> {
        let config: LlamaConfig = serde_json::from_slice(&std::fs::read(dir.join("config.json"))?)?;
        let config = config.into_config(false);
        let weights = std::fs::read(dir.join("model.safetensors"))?;
        let vb = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?;
        let tokenizer = vocabulary::load(&dir.join("tokenizer.json"))?;
        Ok(Self { llama: Llama::load(vb, &config)?, config, tokenizer })
    }

    fn step(&self, ids: &[u32], at: usize, cache: &mut Cache) -> Result<Tensor> {
        Ok(self.llama.forward(&Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?, at, cache)?.i(0)?)
    }

    /// The prompt and up to `count` tokens more; the likeliest ones without a temperature.
    pub fn generate(&self, prompt: &str, count: usize, temperature: Option<f64>, seed: u64) -> Result<String> {
        let mut ids = self.tokenizer.encode(prompt, true).map_err(Error::msg)?.get_ids().to_vec();
        let mut sampler = LogitsProcessor::new(seed, temperature, None);
        let mut cache = Cache::new(true, DType::F32, &self.config, &Device::Cpu)?;
        let mut done = 0;
        for _ in 0..count.min(self.config.max_position_embeddings.saturating_sub(ids.len())) {
            let logits = self.step(&ids[done..], done, &mut cache)?;
            done = ids.len();
            let next = sampler.sample(&logits)?;
            if next == EOS {
                break;
            }
            ids.push(next);
        }
        self.tokenizer.decode(&ids, true).map_err(Error::msg)
    }

    /// Perplexity over tales, token by token.
    pub fn perplexity(&self, tales: &[Vec<u32>]) -> Result<f64> {
        let (mut total, mut count) = (0f64, 0);
        for tale in tales {
            let mut cache = Cache::new(true, DType::F32, &self.config, &Device::Cpu)?;
            for (at, pair) in tale.windows(2).enumerate() {
                let logits = self.step(&pair[..1], at, &mut cache)?;
                let log = candle_nn::ops::log_softmax(&logits, 0)?;
                total -= f64::from(log.i(pair[1] as usize)?.to_scalar::<f32>()?);
                count += 1;
            }
        }
        Ok((total / f64::from(count)).exp())
    }
}

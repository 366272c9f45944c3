//! The loop that runs a model token by token.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use super::Sampler;
use crate::models::{Cache, CausalLm};
use crate::{Error, Result};

/// Why a text ended before its reader stopped asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model said so.
    EndToken,
    /// The model's context is full.
    Context,
}

/// How fast it went. The first token comes from the prompt, so its time is the prompt's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Of these, those whose keys and values an earlier text had left.
    pub reused: usize,
    /// Time from the prompt to the first token.
    pub prompt_time: Duration,
    /// Tokens that were generated, one that ends the text included.
    pub generated: usize,
    /// Time for all of them but the first.
    pub time: Duration,
    /// Why the text ended.
    pub stop: Option<Stop>,
}

/// Runs a model. Keys and values stay between texts: what a prompt has in common with the text before costs nothing.
pub struct Generator<'a> {
    model: &'a dyn CausalLm,
    cache: Cache,
    sampler: Sampler,
    ends: &'a BTreeSet<u32>,
    /// The tokens whose keys and values the cache holds are the first of these.
    tokens: Vec<u32>,
    stats: Stats,
}

impl<'a> Generator<'a> {
    /// Runs `model` until one of the tokens `ends`, with a KV cache; on a GPU as a CUDA graph, where that is possible
    /// ([`Cache::with_cuda_graph`]).
    ///
    /// # Errors
    /// If the cache cannot be made.
    pub fn new(model: &'a dyn CausalLm, sampler: Sampler, ends: &'a BTreeSet<u32>) -> Result<Generator<'a>> {
        let cache = model.new_cache(true)?.with_cuda_graph(true);
        Ok(Generator { model, cache, sampler, ends, tokens: Vec::new(), stats: Stats::default() })
    }

    /// Computes all positions again for each token.
    ///
    /// # Errors
    /// If the cache cannot be made.
    pub fn without_kv_cache(mut self) -> Result<Generator<'a>> {
        self.cache = self.model.new_cache(false)?;
        Ok(self)
    }

    /// Launches every kernel by itself on a GPU.
    pub fn without_cuda_graph(mut self) -> Generator<'a> {
        self.cache.set_cuda_graph(false);
        self
    }

    /// Begins a text with these tokens.
    ///
    /// # Errors
    /// If there are none, or more than the model's context has room for.
    pub fn begin(&mut self, prompt: &[u32]) -> Result<()> {
        let context = self.context();
        if prompt.is_empty() {
            return Err(Error::Invalid("the prompt has no tokens".into()));
        }
        if prompt.len() > context {
            return Err(Error::Invalid(format!(
                "the prompt has {} tokens, the model's context is {context}: shorten it",
                prompt.len()
            )));
        }
        let held = &self.tokens[..self.cache.len().min(self.tokens.len())];
        let same = held.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        // The last token must run: the text goes on from its logits.
        let reused = same.min(prompt.len() - 1);
        self.cache.truncate(reused);
        self.tokens.clear();
        self.tokens.extend_from_slice(prompt);
        self.stats = Stats { prompt: prompt.len(), reused, ..Stats::default() };
        Ok(())
    }

    /// The next token; `None` at the end of the text or of the model's context.
    ///
    /// # Errors
    /// If the model fails, or its logits are not finite.
    pub fn step(&mut self) -> Result<Option<u32>> {
        if self.stats.stop.is_none() && self.tokens.len() > self.context() {
            self.stats.stop = Some(Stop::Context);
        }
        if self.stats.stop.is_some() {
            return Ok(None);
        }
        let start = Instant::now();
        let position = self.cache.len();
        let input = Tensor::new(&self.tokens[position..], &Device::Cpu)?.unsqueeze(0)?;
        let logits = self.model.forward(&input, position, &mut self.cache)?.squeeze(0)?;
        let next = self.sampler.sample(&logits, &self.tokens)?;
        let time = if self.stats.generated == 0 { &mut self.stats.prompt_time } else { &mut self.stats.time };
        *time += start.elapsed();
        self.stats.generated += 1;
        self.tokens.push(next);
        if self.ends.contains(&next) {
            self.stats.stop = Some(Stop::EndToken);
            return Ok(None);
        }
        Ok(Some(next))
    }

    /// The text's tokens so far, from the prompt on.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How the text since [`Generator::begin`] went.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Positions that the model has.
    pub fn context(&self) -> usize {
        self.model.config().max_position_embeddings
    }
}

impl std::fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("tokens", &self.tokens.len()).field("stats", &self.stats).finish()
    }
}

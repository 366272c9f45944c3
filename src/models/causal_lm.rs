//! What all language models have in common.

use candle_core::{Module, Result, Tensor};

use super::{Cache, Config, Llama};
use crate::nn::LinearLayer;

/// A language model, whatever its layers are made of.
pub trait CausalLm {
    /// The model's sizes.
    fn config(&self) -> &Config;

    /// What was odd about the checkpoint and how it was dealt with.
    fn notes(&self) -> &[String];

    /// An empty cache for this model.
    ///
    /// # Errors
    /// None for a model that could be loaded.
    fn new_cache(&self, use_kv_cache: bool) -> Result<Cache>;

    /// The logits `[batch, vocab]` (F32) that follow `tokens` `[batch, tokens]`, whose first stands at `position`.
    ///
    /// # Errors
    /// As [`Llama::forward`].
    fn forward(&self, tokens: &Tensor, position: usize, cache: &mut Cache) -> Result<Tensor>;
}

impl<L: LinearLayer, E: Module> CausalLm for Llama<L, E> {
    fn config(&self) -> &Config {
        self.config()
    }

    fn notes(&self) -> &[String] {
        self.notes()
    }

    fn new_cache(&self, use_kv_cache: bool) -> Result<Cache> {
        self.new_cache(use_kv_cache)
    }

    fn forward(&self, tokens: &Tensor, position: usize, cache: &mut Cache) -> Result<Tensor> {
        self.forward(tokens, position, cache)
    }
}

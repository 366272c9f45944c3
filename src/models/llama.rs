//! Llama, generic over its linear layers and its embedding.
//!
//! ```no_run
//! use candle_core::{DType, Device, Tensor};
//! use candle_taper::models::DenseLlama;
//!
//! let llama = DenseLlama::from_pretrained("Llama-3.2-1B-taper", DType::F32, &Device::Cpu)?;
//! let mut cache = llama.new_cache(true)?;
//! let prompt = Tensor::new(&[[128000u32, 791, 6864]], &Device::Cpu)?;
//! let logits = llama.forward(&prompt, 0, &mut cache)?; // [1, vocab]: what follows the prompt
//! # Ok::<(), candle_taper::Error>(())
//! ```

use std::path::Path;
#[cfg(feature = "cuda")]
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Module, Result, Tensor, bail};

use super::attention::Attention;
use super::{Cache, Config, DenseWeights, Weights};
use crate::nn::LinearLayer;
use crate::ops::{Norm, gated};
use crate::{Checkpoint, Error};

/// A Llama of plain candle layers.
pub type DenseLlama = Llama<candle_nn::Linear, candle_nn::Embedding>;

/// The name of the output layer's weight.
const LM_HEAD: &str = "lm_head.weight";

/// The parameters of a layer; each has a weight and nothing else.
const LAYER_PARTS: [&str; 9] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
];

/// A Llama whose linear layers are `L` and whose embedding is `E`.
#[derive(Debug)]
pub struct Llama<L, E> {
    embedding: E,
    blocks: Vec<Block<L>>,
    norm: Norm,
    lm_head: L,
    config: Config,
    rope_factors: Option<Vec<f32>>,
    dtype: DType,
    device: Device,
    notes: Vec<String>,
    /// Of all models of the process, this one.
    #[cfg(feature = "cuda")]
    id: usize,
}

/// Models that were loaded so far.
#[cfg(feature = "cuda")]
static LOADED: AtomicUsize = AtomicUsize::new(0);

/// One layer.
#[derive(Debug)]
struct Block<L> {
    norm_1: Norm,
    attention: Attention<L>,
    norm_2: Norm,
    gate: L,
    up: L,
    down: L,
}

impl<L: LinearLayer> Block<L> {
    fn load<W: Weights<Linear = L>>(weights: &W, prefix: &str, config: &Config) -> crate::Result<Self> {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let linear = |name: &str, out, input| weights.linear(&format!("{prefix}.mlp.{name}_proj.weight"), out, input);
        Ok(Block {
            norm_1: norm(weights, &format!("{prefix}.input_layernorm.weight"), config)?,
            attention: Attention::load(weights, &format!("{prefix}.self_attn"), config)?,
            norm_2: norm(weights, &format!("{prefix}.post_attention_layernorm.weight"), config)?,
            gate: linear("gate", wide, hidden)?,
            up: linear("up", wide, hidden)?,
            down: linear("down", hidden, wide)?,
        })
    }

    /// Activations and their norm (this layer's first) become those after the layer, and their norm, `next`.
    fn forward(
        &self,
        (x, normed): (&Tensor, &Tensor),
        next: &Norm,
        layer: usize,
        position: usize,
        cache: &mut Cache,
    ) -> Result<(Tensor, Tensor)> {
        let (x, normed) = {
            let _span = tracing::trace_span!("attn").entered();
            self.norm_2.add(x, &self.attention.forward(normed, layer, position, cache)?)?
        };
        let _span = tracing::trace_span!("mlp").entered();
        let [gate, up] = L::forward_each([&self.gate, &self.up], &normed)?;
        next.add(&x, &self.down.forward(&gated(&gate, &up)?)?)
    }
}

fn norm<W: Weights>(weights: &W, name: &str, config: &Config) -> crate::Result<Norm> {
    Ok(Norm::new(weights.tensor(name, &[config.hidden_size])?, config.rms_norm_eps))
}

impl<L: LinearLayer, E: Module> Llama<L, E> {
    /// Loads the model that `config` describes.
    ///
    /// If `config` has an output layer of its own but there is no `lm_head.weight`, the embedding's table is used, and
    /// [`Llama::notes`] says so.
    ///
    /// # Errors
    /// If the sizes in `config` do not fit together; if a tensor is missing, has another shape (the error names the
    /// tensor and both shapes) or is not made of floats; or if there is one that this model would ignore, such as a
    /// bias or a layer beyond `num_hidden_layers`.
    pub fn load<W: Weights<Linear = L, Embedding = E>>(weights: &W, config: &Config) -> crate::Result<Self> {
        check(config)?;
        let mut notes = weights.notes();
        let own_head = weights.contains(LM_HEAD);
        if !own_head && !config.tie_word_embeddings {
            notes.push(format!(
                "there is no {LM_HEAD}, although config.json does not say tie_word_embeddings: true; the embedding's table is used"
            ));
        }
        if own_head && config.tie_word_embeddings {
            notes.push(format!("config.json says tie_word_embeddings: true; {LM_HEAD} is ignored"));
        }
        refuse_foreign(weights, config)?;
        for note in &notes {
            tracing::warn!("{note}");
        }
        let embedding = weights.embedding("model.embed_tokens.weight", config.vocab_size, config.hidden_size)?;
        let lm_head = if own_head && !config.tie_word_embeddings {
            weights.linear(LM_HEAD, config.vocab_size, config.hidden_size)?
        } else {
            weights.tied_lm_head(&embedding)?
        };
        let blocks = (0..config.num_hidden_layers).map(|i| Block::load(weights, &format!("model.layers.{i}"), config));
        Ok(Llama {
            blocks: blocks.collect::<crate::Result<_>>()?,
            norm: norm(weights, "model.norm.weight", config)?,
            embedding,
            lm_head,
            config: config.clone(),
            rope_factors: weights.rope_factors().map(<[f32]>::to_vec),
            dtype: weights.dtype(),
            device: weights.device().clone(),
            notes,
            #[cfg(feature = "cuda")]
            id: LOADED.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// An empty cache for this model, see [`Cache::new`].
    ///
    /// # Errors
    /// None for a model that could be loaded.
    pub fn new_cache(&self, use_kv_cache: bool) -> Result<Cache> {
        let cache = Cache::new(use_kv_cache, self.dtype, &self.config, &self.device)?;
        match &self.rope_factors {
            Some(factors) => cache.with_rope_factors(factors),
            None => Ok(cache),
        }
    }

    /// The model's sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the model runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What was odd about the checkpoint and how it was dealt with.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The logits `[batch, vocab]` (F32) that follow `tokens`: ids `[batch, tokens]` whose first stands at `position`.
    ///
    /// # Errors
    /// If the ids are not a matrix, or one is outside the vocabulary (noticed before anything runs if the ids lie in
    /// memory of the CPU); if `position` is beyond what the cache holds, the context is full, or the batch is another
    /// one than in the cache.
    pub fn forward(&self, tokens: &Tensor, position: usize, cache: &mut Cache) -> Result<Tensor> {
        match self.replay(tokens, position, cache)? {
            Some(logits) => Ok(logits),
            None => self.launch(tokens, position, cache),
        }
    }

    /// As [`Llama::forward`], kernel by kernel.
    pub(super) fn launch(&self, tokens: &Tensor, position: usize, cache: &mut Cache) -> Result<Tensor> {
        let x = self.hidden(tokens, position, cache)?;
        let last = x.narrow(1, x.dim(1)? - 1, 1)?.squeeze(1)?.contiguous()?;
        self.logits(&last)?.to_dtype(DType::F32)
    }

    /// The logits `[batch, tokens, vocab]` (F32) that follow each of `tokens`.
    ///
    /// # Errors
    /// As [`Llama::forward`].
    pub fn forward_all(&self, tokens: &Tensor, position: usize, cache: &mut Cache) -> Result<Tensor> {
        self.logits(&self.hidden(tokens, position, cache)?)?.to_dtype(DType::F32)
    }

    /// In the dtype of the activations.
    pub(super) fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let _span = tracing::trace_span!("lm_head").entered();
        self.lm_head.forward(x)
    }

    /// Which of all models of the process this is.
    #[cfg(feature = "cuda")]
    pub(super) fn id(&self) -> usize {
        self.id
    }

    /// Normed activations `[batch, tokens, hidden]` of the last layer.
    fn hidden(&self, tokens: &Tensor, position: usize, cache: &mut Cache) -> Result<Tensor> {
        let (_, count) = tokens.dims2()?;
        if tokens.device().is_cpu() {
            self.known(tokens)?;
        }
        cache.begin(position, count)?;
        let normed = self.layers(&tokens.to_device(&self.device)?, position, cache)?;
        cache.commit(position + count);
        Ok(normed)
    }

    /// Token ids on the CPU, if the model knows them all.
    pub(super) fn known(&self, tokens: &Tensor) -> Result<Vec<u32>> {
        let ids = tokens.to_dtype(DType::U32)?.flatten_all()?.to_vec1::<u32>()?;
        match ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            Some(id) => bail!("token id {id} is outside the model's vocabulary of {}", self.config.vocab_size),
            None => Ok(ids),
        }
    }

    /// What [`Llama::hidden`] does with ids that are on the model's device, in a cache that is ready for them.
    pub(super) fn layers(&self, tokens: &Tensor, position: usize, cache: &mut Cache) -> Result<Tensor> {
        let mut x = self.embedding.forward(tokens)?;
        let norms = self.blocks.iter().skip(1).map(|block| &block.norm_1).chain([&self.norm]);
        let mut normed = self.blocks.first().map_or(&self.norm, |block| &block.norm_1).forward(&x)?;
        for (layer, (block, next)) in self.blocks.iter().zip(norms).enumerate() {
            let _span = tracing::trace_span!("block").entered();
            (x, normed) = block.forward((&x, &normed), next, layer, position, cache)?;
        }
        Ok(normed)
    }
}

impl DenseLlama {
    /// Loads a directory in the Hugging Face layout, compressed or not, into plain candle layers: every weight is
    /// decoded to `dtype` (F32 is the fastest on a CPU). `dir` may also name a model on the Hugging Face hub, see
    /// [`hub::resolve`](super::hub::resolve).
    ///
    /// # Errors
    /// If `config.json` is missing, does not describe a Llama or asks for something that this model lacks; and as
    /// [`Checkpoint::open`] and [`Llama::load`].
    pub fn from_pretrained(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> crate::Result<Self> {
        let dir = super::hub::resolve(dir.as_ref())?;
        let config = super::config::read(&dir)?;
        let checkpoint = Checkpoint::open(&dir)?;
        Self::load(&DenseWeights::new(&checkpoint, dtype, device), &config)
    }
}

/// Refuses sizes that would divide by zero or split unevenly later.
fn check(config: &Config) -> crate::Result<()> {
    let Config { hidden_size, num_attention_heads: heads, num_key_value_heads: kv_heads, .. } = *config;
    let sizes = [
        ("hidden_size", hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("max_position_embeddings", config.max_position_embeddings),
    ];
    if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
        return Err(Error::Invalid(format!("the model's config says {name}: 0")));
    }
    if !hidden_size.is_multiple_of(heads) || !(hidden_size / heads).is_multiple_of(2) {
        return Err(Error::Invalid(format!(
            "hidden_size {hidden_size} does not divide into {heads} attention heads of even size"
        )));
    }
    if !heads.is_multiple_of(kv_heads) {
        return Err(Error::Invalid(format!("{kv_heads} key and value heads cannot be shared by {heads} heads")));
    }
    Ok(())
}

/// Refuses tensors that no layer would use: the model would not be the one that was trained.
fn refuse_foreign<W: Weights>(weights: &W, config: &Config) -> crate::Result<()> {
    let foreign = |name: &str| {
        // Frequencies that early checkpoints hold and every loader computes.
        if name.ends_with("rotary_emb.inv_freq") {
            return false;
        }
        match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
            Some((layer, part)) => {
                let known = layer.parse().is_ok_and(|i: usize| i < config.num_hidden_layers && i.to_string() == layer);
                !known || !LAYER_PARTS.iter().any(|known| part.strip_suffix(".weight") == Some(known))
            }
            None => !["model.embed_tokens.weight", "model.norm.weight", LM_HEAD].contains(&name),
        }
    };
    match weights.tensors().into_iter().find(|(name, _)| foreign(name)) {
        Some((name, shape)) => Err(Error::Unsupported(format!(
            "tensor {name} of shape {shape:?} has no place in a Llama of {} layers without biases; is config.json the \
             right one?",
            config.num_hidden_layers
        ))),
        None => Ok(()),
    }
}

//! Keys and values of the positions that a model has seen, and its rotary embeddings.

use std::f32::consts::PI;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::replay::Replay;
use super::{Config, Llama3RopeType};
use crate::ops::{Held, attend_one, rope};

/// Positions that a cache has room for at first.
const FIRST_CAPACITY: usize = 256;

/// Keys and values of all layers.
///
/// They lie in buffers of shape `[batch, kv_heads, capacity, head_dim]` that start at 256 positions and double up to the
/// model's context, so a token is written in place and a long context costs memory only when it is used.
///
/// Position `n` may follow whenever at least `n` positions are held: later ones are forgotten. A call that fails leaves
/// the positions before it as they were.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<Option<(Tensor, Tensor)>>,
    len: usize,
    context: usize,
    use_kv_cache: bool,
    inv_freq: Vec<f32>,
    rotations: Option<(Tensor, Tensor)>,
    dtype: DType,
    device: Device,
    /// Counts how often buffers were replaced.
    pub(super) generation: usize,
    /// The step of a generation as a CUDA graph, where there is one.
    pub(super) replay: Replay,
    /// Where a graph that is being captured finds the position.
    pub(super) at: Option<Tensor>,
    /// Kernels for attention stay loaded while the cache is there.
    #[cfg(feature = "cuda")]
    _kernels: Option<crate::cuda::LoadedKernels>,
}

impl Cache {
    /// An empty cache for a model whose activations are `dtype` on `device`. Without `use_kv_cache` nothing is kept, so
    /// that every call must start at position 0 with all tokens.
    ///
    /// # Errors
    /// If the heads of `config` have no whole size.
    pub fn new(use_kv_cache: bool, dtype: DType, config: &Config, device: &Device) -> Result<Self> {
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        if heads == 0 || !hidden.is_multiple_of(heads) || !(hidden / heads).is_multiple_of(2) || hidden == 0 {
            bail!("a hidden size of {hidden} does not divide into {heads} heads of even size");
        }
        Ok(Cache {
            layers: vec![None; config.num_hidden_layers],
            len: 0,
            context: config.max_position_embeddings,
            use_kv_cache,
            inv_freq: inverse_frequencies(config),
            rotations: None,
            dtype,
            device: device.clone(),
            generation: 0,
            replay: Replay::default(),
            at: None,
            #[cfg(feature = "cuda")]
            _kernels: match device {
                Device::Cuda(device) => crate::cuda::LoadedKernels::of(device).ok(),
                _ => None,
            },
        })
    }

    /// Divides the frequency of each pair of a head by one of `factors`.
    ///
    /// # Errors
    /// If there are not as many as pairs.
    pub fn with_rope_factors(mut self, factors: &[f32]) -> Result<Self> {
        if factors.len() != self.inv_freq.len() {
            bail!("{} RoPE factors for heads of {} pairs", factors.len(), self.inv_freq.len());
        }
        self.inv_freq.iter_mut().zip(factors).for_each(|(freq, factor)| *freq /= factor);
        Ok(self)
    }

    /// Lets steps of a generation, calls with one token for each sequence, run as a CUDA graph where that is possible: on a
    /// GPU, in a model of this crate whose layers can be captured. It is off at first. The second step is captured and
    /// replayed from then on, until the buffers grow or the cache is used with another model, thread or batch; then a step
    /// is launched kernel by kernel, and the next one captured again. The logits are the same to the last bit. What cannot be
    /// captured is launched as before.
    ///
    /// While a step is captured, which takes about a millisecond, no other thread of the process may wait for the whole GPU (as
    /// `Device::new_cuda_with_stream` does), or enqueue work on the same stream.
    pub fn with_cuda_graph(mut self, on: bool) -> Self {
        self.set_cuda_graph(on);
        self
    }

    /// As [`Cache::with_cuda_graph`]. A graph that was captured is let go.
    pub fn set_cuda_graph(&mut self, on: bool) {
        self.replay = Replay::new(on);
    }

    /// Steps that ran as a CUDA graph since [`Cache::set_cuda_graph`].
    pub fn replayed(&self) -> usize {
        self.replay.count()
    }

    /// Why steps of the model are launched kernel by kernel, if one could not be captured.
    pub fn cuda_graph_refused(&self) -> Option<&str> {
        self.replay.refused()
    }

    /// Forgets all positions; buffers stay for the next use.
    pub fn reset(&mut self) {
        self.len = 0;
    }

    /// Forgets the positions from `len` on, if there are any.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True if keys and values are kept between calls.
    pub fn uses_kv_cache(&self) -> bool {
        self.use_kv_cache
    }

    /// Bytes of the buffers of keys and values.
    pub fn bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.layers.iter().flatten().map(|(keys, values)| bytes(keys) + bytes(values)).sum()
    }

    /// Checks that `tokens` new ones may stand at `position` and prepares their rotary embeddings.
    pub(super) fn begin(&mut self, position: usize, tokens: usize) -> Result<()> {
        let context = self.context;
        if tokens == 0 {
            bail!("there is no token to run the model on");
        }
        if position.checked_add(tokens).is_none_or(|end| end > context) {
            bail!("{tokens} tokens at position {position} do not fit into the model's context of {context}");
        }
        if !self.use_kv_cache && position > 0 {
            bail!("without a KV cache all tokens are needed again: position {position} must be 0");
        }
        if position > self.len {
            bail!("position {position} leaves a gap: the cache holds {} positions", self.len);
        }
        // What stands behind is overwritten, and is gone even if this call fails.
        self.len = position;
        let end = position + tokens;
        if self.rotations.as_ref().is_none_or(|(cos, _)| cos.dims()[0] < end) {
            let rows = grown(end, context);
            let angles = (0..rows).flat_map(|row| self.inv_freq.iter().map(move |freq| row as f32 * freq));
            let angles = Tensor::from_vec(angles.collect(), (rows, self.inv_freq.len()), &Device::Cpu)?;
            let ready = |table: Tensor| table.to_dtype(self.dtype)?.to_device(&self.device);
            self.rotations = Some((ready(angles.cos()?)?, ready(angles.sin()?)?));
            self.generation += 1;
        }
        Ok(())
    }

    /// Rotates queries or keys `[batch, heads, tokens, head_dim]` that start at `position`.
    pub(super) fn rotate(&self, x: &Tensor, position: usize) -> Result<Tensor> {
        let Some((cos, sin)) = &self.rotations else { bail!("the cache was not prepared for this call") };
        let tokens = x.dim(2)?;
        rope(x, &cos.narrow(0, position, tokens)?, &sin.narrow(0, position, tokens)?)
    }

    /// Writes a layer's keys and values `[batch, kv_heads, tokens, head_dim]` at `position` and returns all of them up to
    /// there, as views of the buffers.
    pub(super) fn append(
        &mut self,
        layer: usize,
        position: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        if !self.use_kv_cache {
            return Ok((keys.contiguous()?, values.contiguous()?));
        }
        let shape @ (_, _, tokens, _) = keys.dims4()?;
        let (all_keys, all_values) = self.room(layer, position, shape, keys)?;
        all_keys.slice_set(&keys.contiguous()?, 2, position)?;
        all_values.slice_set(&values.contiguous()?, 2, position)?;
        let end = position + tokens;
        Ok((all_keys.narrow(2, 0, end)?, all_values.narrow(2, 0, end)?))
    }

    /// Attention of one token, where there is a kernel that also rotates it and writes it to the cache; see
    /// [`crate::ops::attend_one`].
    pub(super) fn attend_one(
        &mut self,
        layer: usize,
        position: usize,
        [q, k, v]: [&Tensor; 3],
        kv_heads: usize,
    ) -> Result<Option<Tensor>> {
        let (batch, tokens, width) = k.dims3()?;
        if tokens != 1 || !self.use_kv_cache || !k.device().is_cuda() {
            return Ok(None);
        }
        let (keys, values) = self.room(layer, position, (batch, kv_heads, 1, width / kv_heads), k)?;
        let Some((cos, sin)) = &self.rotations else { bail!("the cache was not prepared for this call") };
        let held = Held { keys: &keys, values: &values, cos, sin, at: self.at.as_ref() };
        match attend_one(q, k, v, held, position)? {
            None if self.at.is_some() => bail!("attention of heads of {} values cannot be captured", width / kv_heads),
            attended => Ok(attended),
        }
    }

    /// True if a token at `position` needs no new buffers.
    #[cfg(feature = "cuda")]
    pub(super) fn has_room(&self, position: usize) -> bool {
        let room = |buffer: &Tensor| buffer.dims().get(2).is_some_and(|&capacity| position < capacity);
        self.layers.iter().all(|layer| layer.as_ref().is_some_and(|(keys, _)| room(keys)))
    }

    /// A layer's buffers, with room for keys and values of shape `[batch, kv_heads, tokens, head_dim]` at `position`, of the
    /// dtype and on the device of `like`.
    fn room(
        &mut self,
        layer: usize,
        position: usize,
        (batch, heads, tokens, head_dim): (usize, usize, usize, usize),
        like: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let end = position + tokens;
        let count = self.layers.len();
        let Some(slot) = self.layers.get_mut(layer) else {
            bail!("the cache was made for a model of {count} layers, this is layer {layer}");
        };
        let held = slot.as_ref().map(|(buffer, _)| buffer.dims4()).transpose()?;
        if held.is_none_or(|(b, h, capacity, d)| (b, h, d) != (batch, heads, head_dim) || capacity < end) {
            let (b, h, _, d) = held.unwrap_or_default();
            if position > 0 && (b, h, d) != (batch, heads, head_dim) {
                bail!(
                    "the cache holds a batch of {b} with {h} heads of {d}, which cannot go on as a batch of {batch} with \
                     {heads} heads of {head_dim}; reset it first"
                );
            }
            if self.at.is_some() {
                bail!("a cache that grows cannot be captured");
            }
            let shape = (batch, heads, grown(end, self.context), head_dim);
            let grow = |old: Option<&Tensor>| -> Result<Tensor> {
                let buffer = Tensor::zeros(shape, like.dtype(), like.device())?;
                if let Some(old) = old.filter(|_| position > 0) {
                    buffer.slice_set(&old.narrow(2, 0, position)?.contiguous()?, 2, 0)?;
                }
                Ok(buffer)
            };
            let old = slot.as_ref();
            *slot = Some((grow(old.map(|kv| &kv.0))?, grow(old.map(|kv| &kv.1))?));
            self.generation += 1;
        }
        let Some((keys, values)) = slot else { bail!("the cache lost layer {layer}") };
        Ok((keys.clone(), values.clone()))
    }

    /// The positions up to `end` now hold what all layers wrote.
    pub(super) fn commit(&mut self, end: usize) {
        if self.use_kv_cache {
            self.len = end;
        }
    }
}

/// The capacity that `end` positions get: powers of two up to the context.
fn grown(end: usize, context: usize) -> usize {
    end.next_power_of_two().max(FIRST_CAPACITY).min(context)
}

/// Radians that each pair of a head turns by from one position to the next, scaled as Llama 3 does.
fn inverse_frequencies(config: &Config) -> Vec<f32> {
    let head_dim = config.hidden_size / config.num_attention_heads;
    let plain = (0..head_dim).step_by(2).map(|i| 1.0 / config.rope_theta.powf(i as f32 / head_dim as f32));
    let Some(scaling) = config.rope_scaling.as_ref().filter(|s| matches!(s.rope_type, Llama3RopeType::Llama3)) else {
        return plain.collect();
    };
    let original = scaling.original_max_position_embeddings as f32;
    let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
    let scaled = |freq: f32| {
        let wavelength = 2.0 * PI / freq;
        if wavelength < original / high {
            freq
        } else if wavelength > original / low {
            freq / scaling.factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * freq / scaling.factor + smooth * freq
        }
    };
    plain.map(scaled).collect()
}

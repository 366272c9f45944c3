//! The step of a generation, one token for each sequence, as a CUDA graph.
//!
//! A step of a small model takes hundreds of launches, and the GPU runs them faster than a CPU makes them. A graph is one
//! launch. Its kernels have fixed arguments, so what changes from step to step lies in the GPU's memory: the ids, and the
//! position, from which attention knows its angles, what it reads of the cache and what it writes.
//!
//! A graph belongs to a [`Cache`], whose buffers its kernels know. The first step with some buffers is launched kernel by
//! kernel: memory that products share grows to what they need. The second one is captured, all further ones are replayed.

#[cfg(feature = "cuda")]
use std::thread::{self, ThreadId};

#[cfg(feature = "cuda")]
use candle_core::{DType, Device};
use candle_core::{Module, Result, Tensor};

use super::{Cache, Llama};
#[cfg(feature = "cuda")]
use crate::cuda::{Graph, StepInputs};
use crate::nn::LinearLayer;

/// What a cache knows of its graph.
#[derive(Debug, Default)]
pub(super) struct Replay {
    #[cfg(feature = "cuda")]
    on: bool,
    count: usize,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    /// No step has run.
    #[default]
    Empty,
    /// A step has run so.
    #[cfg(feature = "cuda")]
    Launched(Key),
    /// Steps are replayed.
    #[cfg(feature = "cuda")]
    Captured { key: Key, graph: Box<Graph>, inputs: StepInputs },
    /// Steps of this model cannot be captured, and why.
    #[cfg(feature = "cuda")]
    Refused(usize, String),
}

/// What a graph depends on.
#[cfg(feature = "cuda")]
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    model: usize,
    batch: usize,
    /// The cache's buffers.
    generation: usize,
    /// candle's device has a stream for each thread, and products have memory for each stream.
    thread: ThreadId,
    programmatic: bool,
}

impl Replay {
    pub(super) fn new(on: bool) -> Replay {
        #[cfg(not(feature = "cuda"))]
        let _ = on;
        Replay {
            #[cfg(feature = "cuda")]
            on,
            ..Replay::default()
        }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn refused(&self) -> Option<&str> {
        match &self.state {
            #[cfg(feature = "cuda")]
            State::Refused(_, why) => Some(why),
            _ => None,
        }
    }
}

impl<L: LinearLayer, E: Module> Llama<L, E> {
    /// [`Llama::forward`] of one token for each sequence as a graph, or the launches before there is one; `None`, with nothing
    /// done, where there can be none.
    #[cfg(not(feature = "cuda"))]
    pub(super) fn replay(&self, _: &Tensor, _: usize, _: &mut Cache) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// [`Llama::forward`] of one token for each sequence as a graph, or the launches before there is one; `None`, with nothing
    /// done, where there can be none.
    #[cfg(feature = "cuda")]
    pub(super) fn replay(&self, tokens: &Tensor, position: usize, cache: &mut Cache) -> Result<Option<Tensor>> {
        let Device::Cuda(device) = self.device() else { return Ok(None) };
        let Ok((batch, 1)) = tokens.dims2() else { return Ok(None) };
        if !cache.replay.on || !cache.uses_kv_cache() || batch == 0 || !Graph::can_capture(device) {
            return Ok(None);
        }
        if matches!(&cache.replay.state, &State::Refused(model, _) if model == self.id()) {
            return Ok(None);
        }
        let key = |cache: &Cache| Key {
            model: self.id(),
            batch,
            generation: cache.generation,
            thread: thread::current().id(),
            programmatic: crate::cuda::programmatic_launch(),
        };
        let ready = match &cache.replay.state {
            State::Launched(known) | State::Captured { key: known, .. } => *known == key(cache),
            State::Empty | State::Refused(..) => false,
        };
        if !ready || !cache.has_room(position) || position > cache.len() {
            // What candle's kernels take is uploaded once, and found again by the capture.
            let _uploads = device.enable_cuda_graph_htod_cache();
            let logits = self.launch(tokens, position, cache)?;
            cache.replay.state = State::Launched(key(cache));
            return Ok(Some(logits));
        }
        let known = if tokens.device().is_cpu() { Some(self.known(tokens)?) } else { None };
        cache.begin(position, 1)?;
        if let State::Launched(_) = cache.replay.state {
            cache.replay.state = match self.capture(batch, position, cache) {
                Ok((graph, inputs)) => State::Captured { key: key(cache), graph: Box::new(graph), inputs },
                Err(error) => {
                    tracing::warn!("steps are launched kernel by kernel, as they cannot be captured: {error}");
                    State::Refused(self.id(), error.to_string())
                }
            };
        }
        let State::Captured { graph, inputs, .. } = &mut cache.replay.state else { return Ok(None) };
        match known {
            Some(ids) => inputs.write(&ids, position)?,
            None => inputs.write_from(&tokens.to_dtype(DType::U32)?.flatten_all()?, position)?,
        }
        graph.launch()?;
        let logits = graph.output()?;
        cache.replay.count += 1;
        cache.commit(position + 1);
        Ok(Some(logits))
    }

    /// A graph of a step, and where it finds what changes. `position` is one that the cache has room for.
    #[cfg(feature = "cuda")]
    fn capture(&self, batch: usize, position: usize, cache: &mut Cache) -> Result<(Graph, StepInputs)> {
        let Device::Cuda(device) = self.device() else { candle_core::bail!("a CUDA graph on another device") };
        let inputs = StepInputs::new(self.device(), batch)?;
        cache.at = Some(inputs.position()?);
        let graph = Graph::capture(device, || self.logits(&self.layers(&inputs.ids()?, position, cache)?.squeeze(1)?));
        cache.at = None;
        Ok((graph?, inputs))
    }
}

//! Weights that an unmodified candle model holds only while it multiplies with them.
//!
//! The linear layers of candle-transformers (`models::with_tracing::Linear`) enter a tracing span named `linear` around
//! each product. While a model loads, [`JustInTime`] is the subscriber that these spans belong to for good: entering one
//! decodes its weight into the tensor that the layer holds, leaving it takes the weight out again. The model computes
//! the same bits as with all weights in memory, and at any time only the weights in use are decoded.
//!
//! ```no_run
//! use candle_core::{DType, Device, Tensor};
//! use candle_taper::models::{JustInTime, config};
//! use candle_transformers::models::llama::{Cache, Llama};
//!
//! let config = config::read("Llama-3.2-1B-taper")?;
//! let weights = JustInTime::open("Llama-3.2-1B-taper", DType::F32)?;
//! let llama = weights.load(|vb| Llama::load(vb, &config))?; // candle-transformers' own
//! let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu)?;
//! let prompt = Tensor::new(&[[128000u32, 791, 6864]], &Device::Cpu)?;
//! let logits = weights.run(|| llama.forward(&prompt, 0, &mut cache))?;
//! println!("never more than {} bytes of linear weights at once", weights.peak_live_bytes());
//! # anyhow::Ok(())
//! ```
//!
//! # Limits
//!
//! - Every product decodes its whole weight, which takes longer than [`CompressedLinear`](crate::nn::CompressedLinear)
//!   does. Prefer a model of those where there is one, such as [`CompressedLlama`](super::CompressedLlama).
//! - A weight comes and goes only if its layer asks for it as candle's linear layers do and makes its span right after.
//!   All other tensors (embeddings, an output layer tied to one, norms, layers without a span) stay in memory.
//! - While [`JustInTime::load`] runs, spans and events of its thread reach no other subscriber. Afterwards it does not
//!   matter which subscriber is installed, or whether one is.
//! - While such a model lives, the process's tracing level is `TRACE`, so that spans elsewhere are made for subscribers
//!   that want them; threads that run the model at once share its decoded weights.
//! - A build that turns spans off (tracing's `max_level_off` and the like) cannot use this: `load` says so.
//! - On the CPU, and without gradients for what lies before a linear layer.
//!
//! Outside its span a weight's tensor holds a dtype that no operation of candle's accepts. A model that uses it there gets
//! an error, never wrong numbers.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Tensor, bail};
use candle_nn::VarBuilder;
use candle_nn::init::Init;
use candle_nn::var_builder::SimpleBackend;
use tracing::span::{Attributes, Id, Record};
use tracing::{Dispatch, Event, Metadata, Subscriber};

use super::var_builder::{CheckpointBackend, open};
use super::weights::decode_tensor;
use crate::{Checkpoint, Error};

/// The span of candle-transformers' linear layers.
const LINEAR: &str = "linear";

/// Just-in-time weights of a checkpoint; see the [module](self).
#[derive(Clone, Debug)]
pub struct JustInTime {
    shared: Arc<Shared>,
    dtype: DType,
}

impl JustInTime {
    /// Weights of a `.safetensors` file or a directory in the Hugging Face layout, compressed or not, as tensors of `dtype`.
    ///
    /// # Errors
    /// As [`var_builder`](super::var_builder()).
    pub fn open(path: impl AsRef<Path>, dtype: DType) -> crate::Result<JustInTime> {
        Ok(JustInTime { shared: Arc::new(Shared::new(Arc::new(open(path.as_ref())?))), dtype })
    }

    /// Loads a model with `load`, which must ask for its weights in the thread that it is called in. Each is decoded once
    /// to do so.
    ///
    /// # Errors
    /// As `load`; and if no layer of the model announces itself by a span, so that all weights would stay in memory.
    pub fn load<M>(&self, load: impl FnOnce(VarBuilder) -> Result<M>) -> Result<M> {
        let before = self.linears();
        // While a process has one subscriber only, tracing decides with the subscriber of the thread that meets a span
        // first whether anybody wants it. With a second one it asks all.
        let [dispatch, _second] = [(); 2].map(|()| Dispatch::new(Spans(self.shared.clone())));
        let backend =
            Backend { plain: CheckpointBackend::new(self.shared.checkpoint.clone()), shared: self.shared.clone() };
        let vb = VarBuilder::from_backend(Box::new(backend), self.dtype, Device::Cpu);
        let model = tracing::dispatcher::with_default(&dispatch, || load(vb));
        *lock(&self.shared.offered) = None;
        let model = model?;
        if self.linears() == before {
            bail!(
                "no linear layer of this model has a tracing span, or this build turns spans off: nothing would be saved. \
                 Load it with candle_taper::models::var_builder"
            );
        }
        Ok(model)
    }

    /// Runs the model. Without this a weight that cannot be decoded is an error too, but one of candle's that does not
    /// say why.
    ///
    /// # Errors
    /// As `forward`; if a weight is damaged, the error names its tensor.
    pub fn run<T>(&self, forward: impl FnOnce() -> Result<T>) -> Result<T> {
        *lock(&self.shared.error) = None;
        let result = forward();
        match lock(&self.shared.error).take() {
            Some(error) => Err(error.into()),
            None => result,
        }
    }

    /// Linear layers whose weights come and go.
    pub fn linears(&self) -> usize {
        lock(&self.shared.slots).len()
    }

    /// Bytes that the weights of these layers would take together.
    pub fn total_bytes(&self) -> usize {
        lock(&self.shared.slots).iter().map(|slot| lock(slot).bytes()).sum()
    }

    /// The most bytes of them that were decoded at the same time since the model was loaded.
    pub fn peak_live_bytes(&self) -> usize {
        self.shared.peak.load(Relaxed)
    }
}

/// What the handle, the loading model and its spans share.
#[derive(Debug)]
struct Shared {
    checkpoint: Arc<Checkpoint>,
    /// A weight that was asked for as linear layers do, until its span or another tensor follows.
    offered: Mutex<Option<Offer>>,
    /// The weight of each span, whose id is its place here, from 1.
    slots: Mutex<Vec<Arc<Mutex<Slot>>>>,
    /// Why a weight could not be decoded.
    error: Mutex<Option<Error>>,
    live: AtomicUsize,
    peak: AtomicUsize,
}

#[derive(Debug)]
struct Offer {
    thread: ThreadId,
    name: String,
    weight: Tensor,
}

/// A weight that comes and goes.
#[derive(Debug)]
struct Slot {
    name: String,
    /// Shares its storage with the layer's own.
    weight: Tensor,
    /// How often the span is entered now. Threads that run the layer at once share one decoded weight.
    users: usize,
    filled: bool,
}

impl Slot {
    fn bytes(&self) -> usize {
        self.weight.elem_count() * self.weight.dtype().size_in_bytes()
    }
}

/// A poisoned lock means that a forward pass panicked. What it guards is whole between statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(checkpoint: Arc<Checkpoint>) -> Shared {
        Shared {
            checkpoint,
            offered: Mutex::default(),
            slots: Mutex::default(),
            error: Mutex::default(),
            live: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        }
    }

    fn slot(&self, span: &Id) -> Option<Arc<Mutex<Slot>>> {
        lock(&self.slots).get(span.into_u64() as usize - 1).cloned()
    }

    fn fill(&self, slot: &mut Slot) -> crate::Result<()> {
        let decoded = decode_tensor(&self.checkpoint, &slot.name, slot.weight.dtype(), &Device::Cpu)?;
        exchange(&slot.weight, take(&decoded)?)?;
        slot.filled = true;
        let live = self.live.fetch_add(slot.bytes(), Relaxed) + slot.bytes();
        self.peak.fetch_max(live, Relaxed);
        Ok(())
    }
}

/// Puts a storage behind a tensor, all views of it included, and returns the one that was there.
fn exchange(tensor: &Tensor, storage: CpuStorage) -> Result<CpuStorage> {
    struct Exchange(Mutex<CpuStorage>);

    impl InplaceOp1 for Exchange {
        fn name(&self) -> &'static str {
            "just-in-time-weight"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
            std::mem::swap(storage, &mut lock(&self.0));
            Ok(())
        }
    }

    let op = Exchange(Mutex::new(storage));
    tensor.inplace_op1(&op)?;
    Ok(op.0.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Takes a tensor's storage out. What stays is of a dtype that tensors of floats never have: candle's operations compare
/// the dtypes of storages before they touch them, and none works on this one.
fn take(tensor: &Tensor) -> Result<CpuStorage> {
    exchange(tensor, CpuStorage::F8E8M0(Vec::new()))
}

/// Hands out decoded tensors, and remembers the one that a linear layer may be made of.
struct Backend {
    plain: CheckpointBackend,
    shared: Arc<Shared>,
}

impl Backend {
    /// A layer asks for its bias between its weight and its span; anything else means that the span is not the weight's.
    fn forget_offer(&self, name: &str) {
        let mut offered = lock(&self.shared.offered);
        let prefix = |name: &str, last: &str| name.strip_suffix(last).map(str::to_string);
        let sibling = offered.as_ref().and_then(|offer| prefix(&offer.name, "weight"));
        if sibling.is_none() || sibling != prefix(name, "bias") {
            *offered = None;
        }
    }
}

impl SimpleBackend for Backend {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        self.forget_offer(name);
        let tensor = self.plain.get(shape, name, init, dtype, device)?;
        // Only linear layers are initialised so: an embedding's table may share this name, rank and place.
        if matches!(init, Init::Kaiming { .. }) && tensor.rank() == 2 && tensor.device().is_cpu() {
            let offer = Offer { thread: thread::current().id(), name: name.to_string(), weight: tensor.clone() };
            *lock(&self.shared.offered) = Some(offer);
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.forget_offer(name);
        self.plain.get_unchecked(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.plain.contains_tensor(name)
    }
}

/// The subscriber that the spans of linear layers belong to.
struct Spans(Arc<Shared>);

impl Subscriber for Spans {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.name() == LINEAR
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        let offer = lock(&self.0.offered).take();
        // The storage that is taken out here is freed: from now on the weight is decoded when it is needed.
        let slot = offer
            .filter(|offer| offer.thread == thread::current().id() && take(&offer.weight).is_ok())
            .map(|Offer { name, weight, .. }| Slot { name, weight, users: 0, filled: false });
        let mut slots = lock(&self.0.slots);
        match slot {
            Some(slot) => slots.push(Arc::new(Mutex::new(slot))),
            // The span of a layer whose weight stays.
            None => return Id::from_u64(u64::MAX),
        }
        Id::from_u64(slots.len() as u64)
    }

    fn enter(&self, span: &Id) {
        let Some(slot) = self.0.slot(span) else { return };
        let mut slot = lock(&slot);
        if slot.users == 0
            && let Err(error) = self.0.fill(&mut slot)
        {
            lock(&self.0.error).get_or_insert(error);
        }
        slot.users += 1;
    }

    fn exit(&self, span: &Id) {
        let Some(slot) = self.0.slot(span) else { return };
        let mut slot = lock(&slot);
        slot.users = slot.users.saturating_sub(1);
        if slot.users == 0 && slot.filled && take(&slot.weight).is_ok() {
            slot.filled = false;
            self.0.live.fetch_sub(slot.bytes(), Relaxed);
        }
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}
}

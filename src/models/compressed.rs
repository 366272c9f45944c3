//! A Llama whose weights stay compressed while it runs.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::weights::{decode_tensor, dense_tensor, expect_floats};
use super::{Llama, Weights};
use crate::checkpoint::TensorInfo;
use crate::codec::Dtype;
use crate::convert::{Progress, check_cancelled};
use crate::matrix::{GpuLayout, Weight};
use crate::nn::{CompressedEmbedding, CompressedLinear};
use crate::{Checkpoint, Options, Result};

/// A Llama of compressed layers.
pub type CompressedLlama = Llama<CompressedLinear, CompressedEmbedding>;

/// Layers that keep a checkpoint's compressed matrices in its memory map; what is not compressed there is compressed when
/// it is asked for. On the CPU, unless [`CompressedWeights::with_device`] says otherwise.
#[derive(Clone)]
pub struct CompressedWeights {
    checkpoint: Arc<Checkpoint>,
    dtype: DType,
    options: Options,
    progress: Arc<dyn Progress + Send + Sync>,
    device: Device,
    layout: GpuLayout,
}

impl CompressedWeights {
    /// The tensors of `checkpoint`, for activations of `dtype`; plain matrices are compressed as `options` say.
    pub fn new(checkpoint: Arc<Checkpoint>, dtype: DType, options: Options) -> CompressedWeights {
        let (progress, device, layout) = (Arc::new(()), Device::Cpu, GpuLayout::Auto);
        CompressedWeights { checkpoint, dtype, options, progress, device, layout }
    }

    /// Reports each matrix that is compressed now.
    pub fn with_progress(self, progress: Arc<dyn Progress + Send + Sync>) -> CompressedWeights {
        CompressedWeights { progress, ..self }
    }

    /// Layers on `device`. On a GPU each matrix is uploaded compressed and kept as `layout` says.
    pub fn with_device(self, device: &Device, layout: GpuLayout) -> CompressedWeights {
        CompressedWeights { device: device.clone(), layout, ..self }
    }

    /// A matrix of this shape.
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let info = expect_floats(&self.checkpoint, name, shape)?;
        check_cancelled(&*self.progress)?;
        if info.compressed {
            return self.checkpoint.weight(name, &self.options);
        }
        self.progress.tensor(name);
        let weight = if Dtype::from_name(&info.dtype).is_some() {
            self.checkpoint.weight(name, &self.options)?
        } else {
            let rounded = decode_tensor(&self.checkpoint, name, DType::F32, &Device::Cpu)?;
            CompressedLinear::from_tensor(&rounded, None, &self.options)?.weight().clone()
        };
        self.progress.advance(info.stored_bytes);
        Ok(weight)
    }
}

impl fmt::Debug for CompressedWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressedWeights").field("dtype", &self.dtype).field("options", &self.options).finish()
    }
}

impl Weights for CompressedWeights {
    type Linear = CompressedLinear;
    type Embedding = CompressedEmbedding;

    fn linear(&self, name: &str, out_dim: usize, in_dim: usize) -> Result<CompressedLinear> {
        let weight = self.weight(name, &[out_dim, in_dim])?;
        Ok(CompressedLinear::on(weight, None, &self.device, self.layout)?)
    }

    fn embedding(&self, name: &str, vocab: usize, dim: usize) -> Result<CompressedEmbedding> {
        let weight = self.weight(name, &[vocab, dim])?;
        Ok(CompressedEmbedding::on(weight, self.dtype, &self.device, self.layout)?)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        dense_tensor(&self.checkpoint, name, shape, self.dtype, &self.device)
    }

    fn tied_lm_head(&self, embedding: &CompressedEmbedding) -> Result<CompressedLinear> {
        Ok(embedding.as_linear())
    }

    fn tensors(&self) -> Vec<(&str, &[u64])> {
        self.checkpoint.tensors().iter().map(|info| (info.name.as_str(), info.shape.as_slice())).collect()
    }

    fn contains(&self, name: &str) -> bool {
        self.checkpoint.info(name).is_ok()
    }

    fn notes(&self) -> Vec<String> {
        let wide = |info: &&TensorInfo| info.shape.len() == 2 && info.dtype == "F64";
        let names: Vec<&str> = self.checkpoint.tensors().iter().filter(wide).map(|info| info.name.as_str()).collect();
        match names.first() {
            None => Vec::new(),
            Some(first) => vec![format!("{} tensors of F64 are rounded to F32 ({first}, …)", names.len())],
        }
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

impl CompressedLlama {
    /// Loads a directory in the Hugging Face layout, compressed or not, into layers that stay compressed. Compressed
    /// matrices are mapped; plain ones are compressed now as `options` say, one at a time. `dir` may also name a model on
    /// the Hugging Face hub, see [`hub::resolve`](super::hub::resolve).
    ///
    /// # Errors
    /// If `config.json` is missing, does not describe a Llama or asks for something that this model lacks; and as
    /// [`Checkpoint::open`] and [`Llama::load`].
    pub fn from_pretrained(dir: impl AsRef<Path>, dtype: DType, options: &Options) -> Result<Self> {
        Self::from_pretrained_on(dir, dtype, &Device::Cpu, GpuLayout::Auto, options)
    }

    /// As [`CompressedLlama::from_pretrained`], on `device`, where a GPU keeps matrices as `layout` says.
    ///
    /// # Errors
    /// As there; and if the device has no room, no kernels or cannot hold a matrix in that layout.
    pub fn from_pretrained_on(
        dir: impl AsRef<Path>,
        dtype: DType,
        device: &Device,
        layout: GpuLayout,
        options: &Options,
    ) -> Result<Self> {
        let dir = super::hub::resolve(dir.as_ref())?;
        let config = super::config::read(&dir)?;
        let checkpoint = Arc::new(Checkpoint::open(&dir)?);
        Self::load(&CompressedWeights::new(checkpoint, dtype, options.clone()).with_device(device, layout), &config)
    }
}

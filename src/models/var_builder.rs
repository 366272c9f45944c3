//! Any candle model on a checkpoint: a [`VarBuilder`] that decodes each tensor when the model asks for it.
//!
//! ```no_run
//! use candle_core::{DType, Device};
//! use candle_taper::models::{config, var_builder};
//! use candle_transformers::models::llama::Llama;
//!
//! let config = config::read("Llama-3.2-1B-taper")?;
//! let weights = var_builder("Llama-3.2-1B-taper", DType::F32, &Device::Cpu)?;
//! let llama = Llama::load(weights, &config)?; // candle-transformers' own
//! # anyhow::Ok(())
//! ```
//!
//! The model gets ordinary tensors, the same bits as from the uncompressed files: the disk and the page cache hold less,
//! the model's memory does not. [`JustInTime`](super::JustInTime) saves that as well.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::init::Init;
use candle_nn::var_builder::SimpleBackend;

use super::{config, weights};
use crate::Checkpoint;

/// A [`VarBuilder`] over a `.safetensors` file or a directory in the Hugging Face layout, compressed or not. Tensors are
/// asked for by their names in the original files, and are converted to `dtype` (or to what a call names) on `device`.
///
/// # Errors
/// As [`Checkpoint::open`]; and if `config.json` says that something else than this crate quantised the weights.
pub fn var_builder(path: impl AsRef<Path>, dtype: DType, device: &Device) -> crate::Result<VarBuilder<'static>> {
    let backend = CheckpointBackend::new(Arc::new(open(path.as_ref())?));
    Ok(VarBuilder::from_backend(Box::new(backend), dtype, device.clone()))
}

/// Opens a checkpoint whose tensors are weights as they stand.
pub(super) fn open(path: &Path) -> crate::Result<Checkpoint> {
    config::refuse_foreign_quantisation(path)?;
    Checkpoint::open(path)
}

/// What stands behind [`var_builder`]. A call needs the memory of the tensor that it returns and of one strip of it.
#[derive(Clone, Debug)]
pub struct CheckpointBackend {
    checkpoint: Arc<Checkpoint>,
}

impl CheckpointBackend {
    /// Reads from a checkpoint.
    pub fn new(checkpoint: Arc<Checkpoint>) -> CheckpointBackend {
        CheckpointBackend { checkpoint }
    }
}

impl SimpleBackend for CheckpointBackend {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let Ok(info) = self.checkpoint.info(name) else {
            return Err(Error::CannotFindTensor { path: name.to_string() }.bt());
        };
        if !info.shape.iter().copied().eq(shape.dims().iter().map(|&dim| dim as u64)) {
            let got = Shape::from(info.shape.iter().map(|&dim| dim as usize).collect::<Vec<_>>());
            let msg = format!("shape mismatch for {name}");
            return Err(Error::UnexpectedShape { msg, expected: shape, got }.bt());
        }
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        if !self.contains_tensor(name) {
            return Err(Error::CannotFindTensor { path: name.to_string() }.bt());
        }
        Ok(weights::decode_tensor(&self.checkpoint, name, dtype, device)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.checkpoint.info(name).is_ok()
    }
}

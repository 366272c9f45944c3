//! A Llama from a GGUF file, its weights quantised as they are there.
//!
//! ```no_run
//! use candle_core::{DType, Device, Tensor};
//! use candle_taper::models::{KQuantLlama, gguf};
//!
//! let file = gguf::open("Llama-3.2-1B-Instruct-Q4_K_M.gguf")?;
//! let tokenizer = gguf::tokenizer(&file)?;
//! let llama = KQuantLlama::from_gguf(&file, DType::F32)?;
//! let mut cache = llama.new_cache(true)?;
//! let prompt = Tensor::new(&[[128000u32, 791, 6864]], &Device::Cpu)?;
//! let logits = llama.forward(&prompt, 0, &mut cache)?; // [1, vocab]: what follows the prompt
//! # Ok::<(), candle_taper::Error>(())
//! ```
//!
//! Files of the architectures `llama` (Llama, Mistral and others of the same graph) and `qwen2` are read, as llama.cpp and
//! candle write them. [`KQuantLlama::from_gguf_on`] runs them on a GPU. Weights are laid out for products while the file's pages are let go of, so that memory holds them
//! once.

mod config;
mod tokenizer;
mod weights;

use std::path::Path;

use candle_core::{DType, Device};

pub use config::{Architecture, config};
pub use tokenizer::tokenizer;
pub use weights::GgufWeights;

use super::Llama;
use crate::format::Map;
use crate::gguf::Gguf;
use crate::nn::{KQuantEmbedding, KQuantLinear};
use crate::{Error, Result};

/// A Llama of quantised layers.
pub type KQuantLlama = Llama<KQuantLinear, KQuantEmbedding>;

/// A mapped GGUF file.
pub type File = Gguf<Map>;

/// Maps and validates the file at `path`; see [`Gguf::open`].
///
/// # Errors
/// As [`Gguf::open`].
pub fn open(path: impl AsRef<Path>) -> Result<File> {
    Gguf::open(path)
}

impl KQuantLlama {
    /// Lays out the weights of `file` for activations of `dtype`, on the CPU.
    ///
    /// # Errors
    /// If the file is of an architecture that is not supported (the error names it, and those that are), its metadata
    /// lacks or contradicts something; and as [`Llama::load`]. The error names the file.
    pub fn from_gguf(file: &File, dtype: DType) -> Result<KQuantLlama> {
        KQuantLlama::from_gguf_on(file, dtype, &Device::Cpu)
    }

    /// As [`KQuantLlama::from_gguf`], on `device`.
    ///
    /// # Errors
    /// Also if the device is neither the CPU nor a GPU that this build has kernels for, or its memory is too small.
    pub fn from_gguf_on(file: &File, dtype: DType, device: &Device) -> Result<KQuantLlama> {
        let load = || {
            let config = config(file)?;
            Llama::load(&GgufWeights::new(file, dtype)?.with_device(device), &config)
        };
        load().map_err(|error: Error| error.in_file(file.map().path()))
    }
}

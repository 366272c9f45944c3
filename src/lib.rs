//! **candle-taper** makes large-model weights small, and keeps them small while they are used.
//!
//! A weight matrix is cut into 256×256 tiles. In each, the part of a weight that is skewed (a float's exponent, the high
//! bits of an integer) is entropy-coded with rANS, and the part that is noise is stored as it is: 10.6 instead of 16
//! bits for a BF16 weight, every bit kept; or fewer after quantisation to INT8 or to any chosen rate. The result is an
//! ordinary safetensors checkpoint in the Hugging Face layout, with checksums over every byte.
//!
//! # A matrix in memory
//!
//! ```
//! use candle_taper::{CompressedMatrix, Dtype, Options, compress};
//!
//! let weights: Vec<u8> = (0..512 * 512u32).flat_map(|i| (0x3c00 + (i * 7 % 509) as u16).to_le_bytes()).collect();
//! let bytes = compress(&weights, Dtype::Bf16, 512, 512, &Options::default())?;
//! assert!(bytes.len() < weights.len());
//!
//! let matrix = CompressedMatrix::open(&bytes)?;
//! assert_eq!(matrix.decode()?, weights);
//! assert_eq!(matrix.decode_rows(7..8)?, weights[7 * 1024..8 * 1024]);
//! # Ok::<(), candle_taper::Error>(())
//! ```
//!
//! # A checkpoint on disk
//!
//! ```no_run
//! use candle_taper::{Checkpoint, convert};
//!
//! convert::compress("Llama-3.2-1B", "Llama-3.2-1B-taper", &Default::default(), &())?;
//! let checkpoint = Checkpoint::open("Llama-3.2-1B-taper")?; // mapped, no tile touched
//! let weights = checkpoint.read("model.layers.0.self_attn.q_proj.weight")?; // its own dtype, little-endian
//! # Ok::<(), candle_taper::Error>(())
//! ```
//!
//! # The modules, lowest first
//!
//! Dependencies point one way, from the bottom of this list to its top.
//!
//! | module | what it does |
//! |---|---|
//! | [`codec`] | weights to bytes and back, as pure functions: classes, bit planes, rANS, predictors, quantisation |
//! | [`format`](mod@format) | the tile stream and the safetensors files that hold it, every claim checked |
//! | [`gguf`] | GGUF files, every claim checked |
//! | [`cpu`] | decoding with AVX2, AVX-512 and NEON; the only `unsafe` besides the memory map |
//! | [`matrix`] | one matrix in memory: analyse, encode, verify, decode |
//! | [`checkpoint`] | a checkpoint on disk, read by tensor, tile or row |
//! | `cuda` | with feature `cuda`: matrices in a GPU's memory, decoded and multiplied there |
//! | `ops`, `nn` | with feature `candle`: products with compressed weights as candle operations, and layers of them |
//! | [`convert`] | whole checkpoints: compress, decompress, verify |
//! | [`inspect`] | where the bits went |
//! | [`models`] | a Llama for candle, generic over where its layers come from; weights for other candle models (feature `candle`) |
//! | [`text`] | tokenizer, chat templates, sampling and the loop around a model (feature `candle`) |
//!
//! Every error is an [`Error`]; no input, however damaged, makes this crate panic or read out of bounds.
#![deny(missing_docs)]

// Sizes of files and matrices are computed in `usize`.
#[cfg(not(target_pointer_width = "64"))]
compile_error!("candle-taper needs a 64-bit target");

pub mod checkpoint;
pub mod codec;
pub mod convert;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
pub mod format;
pub mod gguf;
pub mod inspect;
pub mod matrix;
#[cfg(feature = "candle")]
pub mod models;
#[cfg(feature = "candle")]
pub mod nn;
#[cfg(feature = "candle")]
pub mod ops;
#[cfg(feature = "candle")]
pub mod text;

pub use checkpoint::Checkpoint;
pub use codec::plan::Stage;
pub use codec::{Dtype, Kind, Predictor, ScaleLayout};
pub use cpu::Backend;
pub use error::{Error, Result};
pub use matrix::{Activations, Codec, CompressedMatrix, Options, compress};

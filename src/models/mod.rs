//! Models that run on checkpoints, compressed or not.
//!
//! A model asks a [`Weights`] for its layers, so one implementation of a model serves plain tensors ([`DenseWeights`])
//! and compressed ones ([`CompressedWeights`]).
//!
//! [`gguf`] reads files of llama.cpp's world into layers that keep their quantised weights.
//!
//! Models of other crates read checkpoints through [`var_builder()`], decoded at load, or through [`JustInTime`], decoded
//! while they multiply.

mod attention;
pub mod cache;
mod causal_lm;
mod compressed;
pub mod config;
pub mod gguf;
pub mod hub;
pub mod just_in_time;
pub mod llama;
mod replay;
pub mod var_builder;
pub mod weights;

pub use cache::Cache;
pub use candle_transformers::models::llama::{Config, Llama3RopeConfig, Llama3RopeType, LlamaConfig, LlamaEosToks};
pub use causal_lm::CausalLm;
pub use compressed::{CompressedLlama, CompressedWeights};
pub use gguf::KQuantLlama;
pub use just_in_time::JustInTime;
pub use llama::{DenseLlama, Llama};
pub use var_builder::{CheckpointBackend, var_builder};
pub use weights::{DenseWeights, Weights};

//! Models that run on checkpoints, compressed or not.
//!
//! A model asks a [`Weights`] for its layers, so one implementation of a model serves plain tensors ([`DenseWeights`])
//! and compressed ones ([`CompressedWeights`]).

mod attention;
pub mod cache;
mod compressed;
pub mod config;
pub mod llama;
pub mod weights;

pub use cache::Cache;
pub use candle_transformers::models::llama::{Config, Llama3RopeConfig, Llama3RopeType, LlamaConfig, LlamaEosToks};
pub use compressed::{CompressedLlama, CompressedWeights};
pub use llama::{DenseLlama, Llama};
pub use weights::{DenseWeights, Weights};

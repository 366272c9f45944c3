//! What a program needs besides a model to write text: a tokenizer with the rules that lie beside it, chat templates, a
//! sampler, and the loop that runs a model token by token.
//!
//! ```no_run
//! use candle_core::DType;
//! use candle_taper::Options;
//! use candle_taper::models::CompressedLlama;
//! use candle_taper::text::{Generator, ModelTokenizer, Sampler, SamplerOptions};
//!
//! let dir = "Llama-3.2-1B-taper";
//! let llama = CompressedLlama::from_pretrained(dir, DType::F32, &Options::default())?;
//! let tokenizer = ModelTokenizer::from_pretrained(dir, llama.config())?;
//! let prompt = tokenizer.encode("The capital of France is")?;
//! let mut text = tokenizer.stream(&prompt)?;
//! let mut generator = Generator::new(&llama, Sampler::new(&SamplerOptions::default())?, tokenizer.ends())?;
//! generator.begin(&prompt)?;
//! for _ in 0..50 {
//!     let Some(token) = generator.step()? else { break };
//!     print!("{}", text.push(token)?.unwrap_or_default());
//! }
//! # Ok::<(), candle_taper::Error>(())
//! ```

mod chat;
mod generator;
mod sampler;
mod stream;
mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use generator::{Generator, Stats, Stop};
pub use sampler::{Sampler, SamplerOptions};
pub use stream::TextStream;
pub use tokenizer::ModelTokenizer;

//! candle-taper
#![deny(missing_docs)]
pub mod checkpoint;
pub mod codec;
pub mod convert;
pub mod cpu;
mod error;
pub mod format;
pub mod inspect;
pub mod matrix;
pub use checkpoint::Checkpoint;
pub use codec::{Dtype, Kind, Predictor, ScaleLayout, plan::Stage};
pub use cpu::Backend;
pub use error::{Error, Result};
pub use matrix::{Codec, CompressedMatrix, Options, compress};

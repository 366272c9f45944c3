//! One matrix in memory: compress it, and read all or part of it back.
//!
//! ```
//! use candle_taper::{CompressedMatrix, Dtype, Options};
//!
//! let weights: Vec<u8> = (0..512 * 512u32).flat_map(|i| (0x3c00 + (i * 7 % 509) as u16).to_le_bytes()).collect();
//! let bytes = candle_taper::compress(&weights, Dtype::Bf16, 512, 512, &Options::default())?;
//! assert!(bytes.len() < weights.len());
//!
//! let matrix = CompressedMatrix::open(&bytes)?;
//! assert_eq!(matrix.decode()?, weights);
//! assert_eq!(matrix.decode_rows(7..8)?, weights[7 * 1024..8 * 1024]);
//! # Ok::<(), candle_taper::Error>(())
//! ```

mod analyse;
mod decode;
mod encode;
mod gpu_layout;
mod kquant;
mod options;
mod product;
mod rate;
mod source;
mod weight;

pub use decode::CompressedMatrix;
pub use encode::{EncodeReport, MatrixEncoder, Sink, compress};
pub use gpu_layout::GpuLayout;
#[cfg(feature = "cuda")]
pub(crate) use kquant::row_bytes as kquant_row_bytes;
pub use kquant::{KQuantMatrix, kquant_matmul_each};
pub use options::{Activations, Codec, Options};
#[cfg(feature = "candle")]
pub(crate) use product::run_parts;
pub use product::{Executor, RayonExecutor, matmul_each};
pub use source::Source;
pub use weight::Weight;

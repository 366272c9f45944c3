//! Operations on candle tensors: a struct that holds the weights and implements `CustomOp1`, whose tensor argument is the
//! activation, and a documented function that applies it.

mod attention;
mod compressed_linear;
mod kquant_linear;
mod place;

pub(crate) use attention::{causal_attention, gated, rope};
pub use compressed_linear::{CompressedMatmul, PoolExecutor, compressed_linear, compressed_linears};
pub use kquant_linear::{Blocks, KQuantMatmul, kquant_linear, kquant_linears};

impl From<crate::Error> for candle_core::Error {
    fn from(error: crate::Error) -> Self {
        candle_core::Error::wrap(error)
    }
}

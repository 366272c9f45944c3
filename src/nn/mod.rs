//! Layers for candle that keep their weights compressed while they are used.

mod embedding;
mod int4;
mod kquant;
mod linear;

pub use embedding::CompressedEmbedding;
pub use int4::Int4Tensors;
pub use kquant::{KQuantEmbedding, KQuantLinear};
pub use linear::{CompressedLinear, LinearLayer};

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::codec::Dtype;
use crate::matrix::{Options, Weight};

/// Little-endian bytes of a tensor of at least two dimensions, with its dtype and the rows and columns that it is coded
/// as: all dimensions but the last are rows.
fn tensor_bytes(tensor: &Tensor) -> Result<(Vec<u8>, Dtype, usize, usize)> {
    let Some((&cols, leading)) = tensor.dims().split_last().filter(|(_, leading)| !leading.is_empty()) else {
        bail!("a compressed weight needs two dimensions, got {:?}", tensor.dims())
    };
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    let (bytes, dtype) = match tensor.dtype() {
        DType::BF16 => (flat.to_vec1::<half::bf16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(), Dtype::Bf16),
        DType::F16 => (flat.to_vec1::<half::f16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(), Dtype::F16),
        DType::F32 => (flat.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect(), Dtype::F32),
        other => bail!("a weight of {other:?} cannot be compressed: allowed are bf16, f16 and f32"),
    };
    Ok((bytes, dtype, leading.iter().product(), cols))
}

/// Compresses a tensor of shape `[out, in]`.
fn compress_tensor(tensor: &Tensor, options: &Options) -> Result<Weight> {
    let (bytes, dtype, rows, cols) = tensor_bytes(tensor)?;
    let weight = Weight::new(crate::matrix::compress(&bytes, dtype, rows, cols, options)?)?;
    Ok(weight.with_activations(options.activations))
}

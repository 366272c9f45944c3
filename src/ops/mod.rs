//! Operations on candle tensors: a struct that holds the weights and implements `CustomOp1`, whose tensor argument is the
//! activation, and a documented function that applies it.

mod attention;
mod compressed_linear;
mod decode_layers;
mod kquant_linear;
mod place;
mod pointwise;

pub(crate) use attention::{Held, attend_one, causal_attention, rope};
pub use compressed_linear::{CompressedMatmul, PoolExecutor, compressed_linear, compressed_linears};
pub use kquant_linear::{Blocks, KQuantMatmul, kquant_linear, kquant_linears};
pub(crate) use pointwise::{Norm, gated};

use candle_core::{DType, Device, Result, Tensor};

use crate::codec::Dtype;

impl From<crate::Error> for candle_core::Error {
    fn from(error: crate::Error) -> Self {
        candle_core::Error::wrap(error)
    }
}

/// What `work` makes of tensors in a GPU's memory, which nothing differentiates: a tensor of that shape.
///
/// # Errors
/// `work`'s, or if a tensor is not on a GPU.
#[cfg(feature = "cuda")]
fn on_gpu<const N: usize>(
    tensors: [&Tensor; N],
    shape: impl Into<candle_core::Shape>,
    work: impl FnOnce([crate::cuda::Part; N]) -> crate::Result<candle_core::CudaStorage>,
) -> Result<Tensor> {
    use candle_core::Storage::Cuda;
    let held = tensors.map(Tensor::storage_and_layout);
    if held.iter().any(|(storage, _)| !matches!(**storage, Cuda(_))) {
        candle_core::bail!("tensors on the CPU for a kernel of a GPU")
    }
    let parts = held.each_ref().map(|(storage, layout)| match &**storage {
        Cuda(storage) => (storage, *layout),
        _ => unreachable!("checked above"),
    });
    let made = Cuda(work(parts)?);
    Ok(kept(Tensor::from_storage(made, shape, candle_core::op::BackpropOp::none(), false)))
}

/// Products of one activation with matrices on its GPU, in one launch: what each product gives by itself, to the last bit.
/// `None`, with nothing done, where there is no kernel for it.
#[cfg(feature = "cuda")]
fn joined(x: &Tensor, weights: Option<Vec<&crate::cuda::CudaWeight>>) -> Result<Option<Vec<Tensor>>> {
    let Some(weights) = weights.filter(|weights| weights.len() > 1 && !x.track_op()) else {
        return Ok(None);
    };
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let candle_core::Storage::Cuda(storage) = &*storage else { return Ok(None) };
    let Some(products) = crate::cuda::CudaWeight::matmul_each(&weights, storage, layout)? else { return Ok(None) };
    let product = |(made, shape)| {
        let made = candle_core::Storage::Cuda(made);
        kept(Tensor::from_storage(made, shape, candle_core::op::BackpropOp::none(), false))
    };
    Ok(Some(products.into_iter().map(product).collect()))
}

/// A tensor in memory that this crate allocated: a CUDA graph that is being captured keeps it.
fn kept(tensor: Tensor) -> Tensor {
    #[cfg(feature = "cuda")]
    crate::cuda::keep(&tensor);
    tensor
}

/// A weight's or some rows' bytes as a tensor in their own dtype; FP8 and I8 become f32.
pub(crate) fn bytes_to_tensor(bytes: &[u8], dtype: Dtype, shape: (usize, usize)) -> Result<Tensor> {
    let candle = match dtype {
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::I8 => {
            let mut values = vec![0.0; shape.0 * shape.1];
            crate::codec::quant::to_f32s(dtype, bytes, &mut values);
            return Tensor::from_vec(values, shape, &Device::Cpu);
        }
    };
    Tensor::from_raw_buffer(bytes, candle, &[shape.0, shape.1], &Device::Cpu)
}

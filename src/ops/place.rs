//! Where a compressed weight is multiplied.

use candle_core::{Device, Result, Tensor};

use crate::matrix::{GpuLayout, Weight};
use crate::{Error, Result as TaperResult};

/// A weight's place, and what is there.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// In the CPU's memory: the weight's own bytes.
    Cpu,
    /// In a GPU's memory, compressed.
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<crate::cuda::CudaWeight>),
    /// In a GPU's memory as plain weights, for candle's own product.
    #[cfg(feature = "cuda")]
    Dense(Tensor, std::sync::Arc<str>),
}

impl Place {
    /// Puts a weight where it is to be multiplied.
    pub(super) fn new(weight: &Weight, device: &Device, layout: GpuLayout) -> TaperResult<Place> {
        match device {
            Device::Cpu => Ok(Place::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => {
                let name = |error: Error| match weight.name() {
                    Some(tensor) if !error.to_string().contains(tensor) => error.in_tensor(tensor),
                    _ => error,
                };
                let at_rest = if layout == GpuLayout::Dense { GpuLayout::Rans } else { layout };
                let placed = crate::cuda::CudaWeight::new(weight, cuda, at_rest).map_err(name)?;
                // No fused kernel takes the stream as it is at rest.
                let slow = layout == GpuLayout::Auto && placed.layout() == GpuLayout::Rans;
                if slow || layout == GpuLayout::Dense {
                    let why = if slow { placed.why() } else { "as asked for" };
                    return Ok(Place::Dense(dense(&placed, device).map_err(name)?, why.into()));
                }
                Ok(Place::Cuda(std::sync::Arc::new(placed)))
            }
            other => {
                let _ = (weight, layout);
                Err(Error::Unsupported(format!("compressed layers run on the CPU and with CUDA, not on {other:?}")))
            }
        }
    }

    /// The plain weights, if that is what is there.
    pub(super) fn dense(&self) -> Option<&Tensor> {
        match self {
            #[cfg(feature = "cuda")]
            Place::Dense(dense, _) => Some(dense),
            _ => None,
        }
    }

    /// The GPU that it is on.
    #[cfg(feature = "cuda")]
    pub(super) fn gpu(&self) -> Option<Device> {
        match self {
            Place::Cpu => None,
            Place::Cuda(weight) => Some(Device::Cuda(weight.device().clone())),
            Place::Dense(dense, _) => Some(dense.device().clone()),
        }
    }

    /// What it takes there, and in which layout; `None` on the CPU.
    pub(super) fn in_use(&self) -> Option<(GpuLayout, usize)> {
        match self {
            Place::Cpu => None,
            #[cfg(feature = "cuda")]
            Place::Cuda(weight) => Some((weight.layout(), weight.stored_bytes())),
            #[cfg(feature = "cuda")]
            Place::Dense(dense, _) => Some((GpuLayout::Dense, dense.elem_count() * dense.dtype().size_in_bytes())),
        }
    }
}

impl Place {
    /// Why it is there in that layout; `None` on the CPU.
    pub(super) fn why(&self) -> Option<&str> {
        match self {
            Place::Cpu => None,
            #[cfg(feature = "cuda")]
            Place::Cuda(weight) => Some(weight.why()),
            #[cfg(feature = "cuda")]
            Place::Dense(_, why) => Some(why),
        }
    }
}

/// Plain weights on the GPU, decoded there: in the matrix's own dtype, one-byte kinds in BF16.
#[cfg(feature = "cuda")]
fn dense(decoded: &crate::cuda::CudaWeight, device: &Device) -> TaperResult<Tensor> {
    use candle_core::op::BackpropOp;
    use candle_core::{DType, Storage};

    use crate::codec::Dtype;
    let dtype = match decoded.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::Bf16 | Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::I8 => DType::BF16,
    };
    let geometry = decoded.geometry();
    let storage = Storage::Cuda(decoded.decode_rows(0..geometry.rows, dtype)?);
    // The stream is freed when this work is done.
    device.synchronize()?;
    Ok(Tensor::from_storage(storage, (geometry.rows, geometry.cols), BackpropOp::none(), false))
}

/// `x · wᵀ` with plain weights and any leading dimensions.
pub(super) fn dense_product(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (outer, inner) = w.dims2()?;
    let Some((_, leading)) = x.dims().split_last().filter(|(last, _)| **last == inner) else {
        candle_core::bail!(
            "compressed linear: an input of shape {:?} does not fit a weight of shape [{outer}, {inner}]",
            x.dims()
        )
    };
    let w = if w.dtype() == x.dtype() { w.clone() } else { w.to_dtype(x.dtype())? };
    let m = leading.iter().product::<usize>();
    x.reshape((m, inner))?.matmul(&w.t()?)?.reshape([leading, &[outer]].concat())
}

//! Compressed matrices on NVIDIA GPUs (feature `cuda`, compute capability 8.0 and up).
//!
//! # Read me first
//!
//! 1. **Only compressed bytes travel.** A [`CudaWeight`] uploads the tile stream through pinned buffers, compares every
//!    tile's checksum on the way, and has the GPU decode every tile once, so that damage is an error when a model loads
//!    and nothing needs to be asked later.
//! 2. **At rest and in use are two things.** A [`Layout`] says what stays in the GPU's memory: the stream itself, a layout
//!    that a fused kernel multiplies with, or plain weights. The stream is turned into it on the GPU, in blocks of rows.
//! 3. **Few rows of activations take a fused kernel, many take cuBLAS**: blocks of rows are decoded into a workspace of
//!    bounded size, one per GPU, and multiplied with candle's own cuBLAS handle. On Hopper BF16 rows up to a thousand take
//!    a fused kernel of their own.
//! 4. **Matrices of GGUF files** stay at the file's bits: blocks are uploaded as they are and laid out on the GPU
//!    ([`CudaWeight::from_blocks`]). Their products are the same kernels over other units.
//! 5. **A product allocates its result and nothing else**, uploads nothing and never waits, so that it can be captured in a
//!    CUDA graph.
//!
//! Kernels are compiled by `build.rs` and loaded into candle's own context, once for each GPU. All `unsafe` of this
//! layer is in its files, behind safe doors: they check sizes before anything is launched.
//!
//! `Device::new_cuda` gives each thread a stream of its own, which nothing orders. A model may move to another thread
//! when the first has no work in flight; `Device::new_cuda_with_stream` has one stream for all threads. Before a graph is
//! captured on such a stream, `CudaDevice::disable_event_tracking` must have been called, before anything was loaded.

mod attention;
mod bandwidth;
mod choices;
mod choose;
mod decode;
mod family;
mod form;
mod fp8;
mod gemm;
mod graph;
mod hybrid;
mod joined;
mod kernels;
mod kquant;
mod launch;
mod launch_shape;
mod layers;
mod memory;
mod memory_use;
mod multiply;
mod packed;
mod packing;
mod pair;
mod pair_code;
mod pair_packing;
mod plan;
mod pointwise;
mod prefer;
mod prefill;
mod product;
mod rans;
mod scratch;
mod shares;
mod step_inputs;
mod stream;
mod upload;
mod weight;

pub(crate) use attention::{OneToken, attends_to};
pub use bandwidth::GpuTimer;
pub use choose::set_measuring;
pub use decode::DeviceStream;
pub(crate) use graph::{Graph, keep};
pub use kernels::LoadedKernels;
pub(crate) use kernels::takes;
pub(crate) use launch::programmatic_launch;
pub use launch::set_programmatic_launch;
pub use layers::decode_layers;
pub(crate) use memory::Part;
pub use memory_use::MemoryUse;
pub(crate) use pointwise::{add_norm, gated};
pub(crate) use step_inputs::StepInputs;
pub use weight::CudaWeight;

use candle_core::DType;

use crate::codec::Dtype;

/// What a decoded weight is to a kernel.
fn dtype_of(dtype: DType) -> crate::Result<Dtype> {
    match dtype {
        DType::BF16 => Ok(Dtype::Bf16),
        DType::F16 => Ok(Dtype::F16),
        DType::F32 => Ok(Dtype::F32),
        other => Err(crate::Error::Unsupported(format!("activations of {other:?}: allowed are f32, bf16 and f16"))),
    }
}

//! The gated activation, and a residual's sum with its norm: `kernels/pointwise.cu`.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::CudaStorage;
use candle_core::cuda_backend::{CudaStorageSlice, cudarc};
use cudarc::driver::{CudaFunction, CudaModule, LaunchConfig, PushKernelArg};
use half::{bf16, f16};

use super::kernels::{Kernels, driver, function};
use super::memory::{Element, Part, alloc, view};
use super::packed::kind_of;
use crate::{Error, Result};

/// The kernels for BF16, F16 and F32, in the order of `kind_of`.
pub(super) struct PointwiseKernels {
    gated: [CudaFunction; 3],
    add_norm: [CudaFunction; 3],
}

impl PointwiseKernels {
    pub fn load(module: &Arc<CudaModule>) -> Result<PointwiseKernels> {
        let of = |name: &str, dtype: &str| Ok::<_, Error>(function(module, &format!("{name}_{dtype}"), 0)?.0);
        let all = |name: &str| Ok::<_, Error>([of(name, "bf16")?, of(name, "f16")?, of(name, "f32")?]);
        Ok(PointwiseKernels { gated: all("gated")?, add_norm: all("add_norm")? })
    }
}

/// Enqueues `silu(gate) · up` of two contiguous tensors of one shape and dtype.
///
/// # Errors
/// If they do not fit together, or the launch fails.
pub(crate) fn gated(gate: Part, up: Part) -> Result<CudaStorage> {
    match &gate.0.slice {
        CudaStorageSlice::BF16(_) => gated_as::<bf16>(gate, up),
        CudaStorageSlice::F16(_) => gated_as::<f16>(gate, up),
        CudaStorageSlice::F32(_) => gated_as::<f32>(gate, up),
        _ => Err(Error::Unsupported("a gate in another dtype than f32, bf16 and f16".into())),
    }
}

fn gated_as<T: Element>(gate: Part, up: Part) -> Result<CudaStorage> {
    let device = &gate.0.device;
    let (a, b) = (view::<T>(device, gate)?, view::<T>(device, up)?);
    if a.len() != b.len() {
        return Err(Error::Invalid(format!("a gate of {} values for {}", a.len(), b.len())));
    }
    let mut y = alloc::<T>(device, a.len(), "activations")?;
    if !a.is_empty() {
        let kernels = Kernels::of(device)?;
        let (blocks, count) = (a.len().div_ceil(256).min(1 << 16) as u32, a.len() as u64);
        let stream = device.cuda_stream();
        let mut launch = stream.launch_builder(&kernels.pointwise.gated[kind_of(T::DTYPE) as usize]);
        launch.arg(&a).arg(&b).arg(&mut y).arg(&count);
        let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: all three have `count` values of this dtype.
        driver(unsafe { launch.launch(config) })?;
    }
    Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
}

/// Enqueues `x + y` and its RMS norm times `weight`: one after the other in one tensor. `x` and `y` are contiguous with rows
/// as long as `weight`.
///
/// # Errors
/// If they do not fit together, or the launch fails.
pub(crate) fn add_norm(x: Part, y: Part, weight: Part, epsilon: f32) -> Result<CudaStorage> {
    match &x.0.slice {
        CudaStorageSlice::BF16(_) => add_norm_as::<bf16>(x, y, weight, epsilon),
        CudaStorageSlice::F16(_) => add_norm_as::<f16>(x, y, weight, epsilon),
        CudaStorageSlice::F32(_) => add_norm_as::<f32>(x, y, weight, epsilon),
        _ => Err(Error::Unsupported("a norm in another dtype than f32, bf16 and f16".into())),
    }
}

fn add_norm_as<T: Element>(x: Part, y: Part, weight: Part, epsilon: f32) -> Result<CudaStorage> {
    let device = &x.0.device;
    let (x, y, weight) = (view::<T>(device, x)?, view::<T>(device, y)?, view::<T>(device, weight)?);
    let size = weight.len();
    let rows = x.len() / size.max(1);
    if rows * size != x.len() || y.len() != x.len() || i32::try_from(rows.max(size)).is_err() {
        return Err(Error::Invalid(format!("a norm of {size} for {} and {} values", x.len(), y.len())));
    }
    let mut out = alloc::<T>(device, 2 * x.len(), "activations")?;
    if !x.is_empty() {
        let kernels = Kernels::of(device)?;
        let (size, threads) = (size as u32, (size.div_ceil(4).next_multiple_of(32)).min(1024) as u32);
        let stream = device.cuda_stream();
        let mut launch = stream.launch_builder(&kernels.pointwise.add_norm[kind_of(T::DTYPE) as usize]);
        launch.arg(&x).arg(&y).arg(&weight).arg(&mut out).arg(&size).arg(&epsilon);
        let config = LaunchConfig { grid_dim: (rows as u32, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: `x` and `y` have `rows` rows of `size` values, `out` twice as many; a block of whole warps for each row.
        driver(unsafe { launch.launch(config) })?;
    }
    Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
}

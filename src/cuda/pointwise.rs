//! The gated activation, and a residual's sum with its norm: `kernels/pointwise.cu`.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::CudaStorage;
use candle_core::cuda_backend::{CudaStorageSlice, cudarc};
use cudarc::driver::{CudaFunction, CudaModule, DevicePtr, DevicePtrMut};
use half::{bf16, f16};

use super::kernels::{Kernels, function};
use super::launch::{Grid, launch_with, programmatic};
use super::memory::{Element, Part, alloc, view};
use super::packed::kind_of;
use crate::{Error, Result};

/// The kernels for BF16, F16 and F32, in the order of `kind_of`.
pub(super) struct PointwiseKernels {
    gated: [CudaFunction; 3],
    add_norm: [CudaFunction; 3],
    /// The same for rows and places that are no multiples of [`VALUES`].
    add_norm_any: [CudaFunction; 3],
}

/// Values that a thread of `add_norm` takes at once.
const VALUES: usize = 8;

impl PointwiseKernels {
    pub fn load(module: &Arc<CudaModule>) -> Result<PointwiseKernels> {
        let of = |name: &str, dtype: &str| Ok::<_, Error>(function(module, &format!("{name}_{dtype}"), 0)?.0);
        let all = |name: &str| Ok::<_, Error>([of(name, "bf16")?, of(name, "f16")?, of(name, "f32")?]);
        Ok(PointwiseKernels { gated: all("gated")?, add_norm: all("add_norm")?, add_norm_any: all("add_norm_any")? })
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
        let grid = Grid { blocks: [a.len().div_ceil(256).min(1 << 16) as u32, 1, 1], threads: 256, shared: 0 };
        let (stream, count) = (device.cuda_stream(), a.len() as u64);
        let function = &kernels.pointwise.gated[kind_of(T::DTYPE) as usize];
        let ((a, _a), (b, _b), (y, _y)) = (a.device_ptr(&stream), b.device_ptr(&stream), y.device_ptr_mut(&stream));
        let arguments = [&raw const a, &raw const b, &raw const y, &raw const count].map(<*const u64>::cast);
        // SAFETY: all three have `count` values of this dtype.
        unsafe { launch_with(&stream, function, grid, &arguments, programmatic(&kernels))? };
    }
    Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
}

/// Enqueues `x + y` and its RMS norm times `weight`: one after the other in one tensor; without `y` the norm of `x` alone.
/// `x` and `y` are contiguous with rows as long as `weight`.
///
/// # Errors
/// If they do not fit together, or the launch fails.
pub(crate) fn add_norm(x: Part, y: Option<Part>, weight: Part, epsilon: f32) -> Result<CudaStorage> {
    match &x.0.slice {
        CudaStorageSlice::BF16(_) => add_norm_as::<bf16>(x, y, weight, epsilon),
        CudaStorageSlice::F16(_) => add_norm_as::<f16>(x, y, weight, epsilon),
        CudaStorageSlice::F32(_) => add_norm_as::<f32>(x, y, weight, epsilon),
        _ => Err(Error::Unsupported("a norm in another dtype than f32, bf16 and f16".into())),
    }
}

fn add_norm_as<T: Element>(x: Part, y: Option<Part>, weight: Part, epsilon: f32) -> Result<CudaStorage> {
    let device = &x.0.device;
    let (x, weight) = (view::<T>(device, x)?, view::<T>(device, weight)?);
    let y = y.map(|y| view::<T>(device, y)).transpose()?;
    let (size, added) = (weight.len(), y.as_ref().map_or(x.len(), |y| y.len()));
    let rows = x.len() / size.max(1);
    if rows * size != x.len() || added != x.len() || i32::try_from(rows.max(size)).is_err() {
        return Err(Error::Invalid(format!("a norm of {size} for {} and {added} values", x.len())));
    }
    let mut out = alloc::<T>(device, if y.is_some() { 2 * x.len() } else { x.len() }, "activations")?;
    if !x.is_empty() {
        let kernels = Kernels::of(device)?;
        let stream = device.cuda_stream();
        let ((x, _x), (weight, _weight)) = (x.device_ptr(&stream), weight.device_ptr(&stream));
        let y = y.as_ref().map(|y| y.device_ptr(&stream));
        let (y, (out, _out)) = (y.as_ref().map_or(0, |(y, _)| *y), out.device_ptr_mut(&stream));
        let eights = size.is_multiple_of(VALUES) && [x, y, weight, out].iter().all(|at| at.is_multiple_of(16));
        let (functions, values) = match eights {
            true => (&kernels.pointwise.add_norm, VALUES),
            false => (&kernels.pointwise.add_norm_any, VALUES / 2),
        };
        let threads = size.div_ceil(values).next_multiple_of(32).min(1024) as u32;
        let (grid, size) = (Grid { blocks: [rows as u32, 1, 1], threads, shared: 0 }, size as u32);
        let pointers = [&raw const x, &raw const y, &raw const weight, &raw const out];
        let [x, y, weight, out] = pointers.map(<*const u64>::cast);
        let arguments = [x, y, weight, out, (&raw const size).cast(), (&raw const epsilon).cast()];
        let function = &functions[kind_of(T::DTYPE) as usize];
        // SAFETY: `x` and `y` have `rows` rows of `size` values, `out` as many or twice as many; a block of whole warps for
        // each row; all lie at multiples of 16 bytes where a kernel takes them so.
        unsafe { launch_with(&stream, function, grid, &arguments, programmatic(&kernels))? };
    }
    Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
}

//! Several matrices decoded to memory at once, each on a stream of its own.
#![allow(unsafe_code)]

use std::sync::{Arc, PoisonError};

use candle_core::cuda_backend::cudarc;
use candle_core::{CudaStorage, DType};
use cudarc::driver::result::stream as raw;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaViewMut, sys};
use half::{bf16, f16};

use super::dtype_of;
use super::kernels::driver;
use super::memory::{Element, bytes_mut};
use super::weight::CudaWeight;
use crate::codec::Dtype;
use crate::{Error, Result};

/// Matrices that are decoded at once.
const AT_ONCE: usize = 5;

/// Streams beside those of candle's devices. cudarc does not count them: while it counts any, it records events for all that
/// is enqueued, and they are ordered here.
pub(super) struct SideStreams {
    context: Arc<CudaContext>,
    streams: [sys::CUstream; AT_ONCE],
}

// SAFETY: handles, which any thread may use.
unsafe impl Send for SideStreams {}

impl SideStreams {
    fn new(context: &Arc<CudaContext>) -> Result<SideStreams> {
        driver(context.bind_to_thread())?;
        let mut side = SideStreams { context: context.clone(), streams: [std::ptr::null_mut(); AT_ONCE] };
        for stream in &mut side.streams {
            *stream = driver(raw::create(raw::StreamKind::NonBlocking))?;
        }
        Ok(side)
    }

    fn stream(&self, index: usize) -> Arc<CudaStream> {
        // SAFETY: a stream of this context that lives as long as `self`; whoever uses it orders its work by events.
        unsafe { self.context.wrap_borrowed_stream(self.streams[index % AT_ONCE]) }
    }
}

impl Drop for SideStreams {
    fn drop(&mut self) {
        // When the context is gone, so are they.
        if self.context.bind_to_thread().is_err() {
            return;
        }
        for &stream in self.streams.iter().filter(|stream| !stream.is_null()) {
            // SAFETY: it was created here, and nobody uses it any more; work in flight is finished first.
            _ = unsafe { raw::destroy(stream) };
        }
    }
}

/// Whole matrices, row-major, rounded to `dtype` (BF16, F16 or F32): up to five are decoded at once, which fills the GPU where
/// one alone does not. What is enqueued afterwards on the device's stream finds them decoded.
///
/// # Errors
/// If they lie on different devices, or the memory is too small.
pub fn decode_layers(weights: &[&CudaWeight], dtype: DType) -> Result<Vec<CudaStorage>> {
    match dtype_of(dtype)? {
        Dtype::Bf16 => decode_as::<bf16>(weights, dtype),
        Dtype::F16 => decode_as::<f16>(weights, dtype),
        _ => decode_as::<f32>(weights, dtype),
    }
}

fn decode_as<T: Element>(weights: &[&CudaWeight], dtype: DType) -> Result<Vec<CudaStorage>> {
    let Some(first) = weights.first() else { return Ok(Vec::new()) };
    let device = first.device();
    if weights.iter().any(|weight| weight.device().id() != device.id()) {
        return Err(Error::Invalid("layers on different devices cannot be decoded at once".into()));
    }
    let main = device.cuda_stream();
    let mut decoded = Vec::with_capacity(weights.len());
    for weight in weights {
        let geometry = weight.geometry();
        decoded.push(weight.alloc::<T>(geometry.rows * geometry.cols, "decoded weights")?);
    }
    let mut slot = first.kernels().side.lock().unwrap_or_else(PoisonError::into_inner);
    if slot.is_none() {
        *slot = Some(SideStreams::new(main.context())?);
    }
    let Some(side) = &*slot else { return Err(Error::Invalid("no streams".into())) };
    let streams: Vec<_> = (0..AT_ONCE.min(weights.len())).map(|index| side.stream(index)).collect();
    // Memory that was freed may be in use until here.
    let ready = driver(main.record_event(None))?;
    for stream in &streams {
        driver(stream.wait(&ready))?;
    }
    let enqueued = enqueue(weights, &streams, &mut decoded);
    // Whatever was enqueued must end before the memory is used, or freed because of an error.
    for stream in &streams {
        driver(main.join(stream))?;
    }
    let left = enqueued?;
    let storages =
        weights.iter().zip(decoded).enumerate().map(|(index, (weight, memory))| match left.contains(&index) {
            true => weight.decode_rows(0..weight.geometry().rows, dtype),
            false => Ok(CudaStorage::wrap_cuda_slice(memory, device.clone())),
        });
    storages.collect()
}

/// Enqueues what can be decoded in one step; the numbers of what cannot.
fn enqueue<T: Element>(
    weights: &[&CudaWeight],
    streams: &[Arc<CudaStream>],
    decoded: &mut [CudaSlice<T>],
) -> Result<Vec<usize>> {
    let mut left = Vec::new();
    for (index, (weight, memory)) in weights.iter().zip(decoded).enumerate() {
        let mut out: CudaViewMut<u8> = bytes_mut(memory)?;
        if !weight.decode_on(&streams[index % streams.len()], T::DTYPE, &mut out)? {
            left.push(index);
        }
    }
    Ok(left)
}

//! Host memory to the GPU through two pinned buffers: one is filled while the other travels.
#![allow(unsafe_code)]

use std::sync::PoisonError;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaContext, CudaSlice, PinnedHostSlice};

use super::kernels::{Kernels, driver, out_of_memory};
use crate::Result;

/// Bytes of each buffer.
const CHUNK: usize = 8 << 20;

/// The buffers.
pub(super) struct Staging([PinnedHostSlice<u8>; 2]);

impl Staging {
    fn new(context: &std::sync::Arc<CudaContext>) -> Result<Staging> {
        // SAFETY: bytes are written before they are read; any pattern is a byte.
        let buffer = || driver(unsafe { context.alloc_pinned_with_flags::<u8>(CHUNK, 0) });
        Ok(Staging([buffer()?, buffer()?]))
    }
}

/// A copy of `bytes` on the GPU, padded with zeros to a multiple of 16.
pub(super) fn upload(device: &CudaDevice, kernels: &Kernels, bytes: &[u8]) -> Result<CudaSlice<u8>> {
    let stream = device.cuda_stream();
    let room = bytes.len().next_multiple_of(16);
    let mut target = device.alloc_zeros::<u8>(room).map_err(|e| out_of_memory(e, room, "a compressed matrix"))?;
    let mut slot = kernels.staging.lock().unwrap_or_else(PoisonError::into_inner);
    if slot.is_none() {
        *slot = Some(Staging::new(stream.context())?);
    }
    let Some(Staging(buffers)) = &mut *slot else { return Ok(target) };
    for (index, chunk) in bytes.chunks(CHUNK).enumerate() {
        let buffer = &mut buffers[index % 2];
        // Waits until the buffer's last journey is over.
        driver(buffer.as_mut_slice())?[..chunk.len()].copy_from_slice(chunk);
        let mut part = target.slice_mut(index * CHUNK..index * CHUNK + chunk.len());
        // The buffer is longer than the last chunk: copies are as long as their target allows.
        copy(device, buffer, chunk.len(), &mut part)?;
    }
    Ok(target)
}

/// Enqueues the copy of the first `length` bytes of a pinned buffer.
fn copy(
    device: &CudaDevice,
    buffer: &PinnedHostSlice<u8>,
    length: usize,
    target: &mut cudarc::driver::CudaViewMut<u8>,
) -> Result<()> {
    use cudarc::driver::{DevicePtrMut, HostSlice};
    let stream = device.cuda_stream();
    // SAFETY: both sides hold `length` bytes, and the guards record the events that later uses wait for.
    unsafe {
        let (from, _sent) = buffer.stream_synced_slice(&stream);
        let (to, _written) = target.device_ptr_mut(&stream);
        driver(cudarc::driver::result::memcpy_htod_async(to, &from[..length], stream.cu_stream()))
    }
}

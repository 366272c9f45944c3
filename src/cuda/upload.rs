//! Host memory to the GPU through two pinned buffers: one is filled while the other travels.
#![allow(unsafe_code)]

use std::sync::{Arc, PoisonError};

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, CudaViewMut, PinnedHostSlice, sys};

use super::kernels::{Kernels, driver, out_of_memory};
use crate::Result;

/// Bytes of each buffer.
const CHUNK: usize = 8 << 20;

/// Pinned memory, and the event that its last journey ends with.
///
/// cudarc's own event of a pinned slice does not serve: it is recorded only while a context has streams of its own making,
/// and candle's devices use the one that each thread has.
struct Buffer {
    memory: PinnedHostSlice<u8>,
    sent: CudaEvent,
}

impl Buffer {
    fn new(context: &Arc<CudaContext>) -> Result<Buffer> {
        let sent = driver(context.new_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC)))?;
        // SAFETY: bytes are written before they are read; any pattern is a byte.
        let memory = driver(unsafe { context.alloc_pinned_with_flags::<u8>(CHUNK, 0) })?;
        Ok(Buffer { memory, sent })
    }

    /// Fills the buffer, as soon as its last journey is over, and enqueues the next one.
    fn send(&mut self, stream: &CudaStream, chunk: &[u8], target: &mut CudaViewMut<u8>) -> Result<()> {
        use cudarc::driver::DevicePtrMut;
        driver(self.sent.synchronize())?;
        let bytes = &mut driver(self.memory.as_mut_slice())?[..chunk.len()];
        bytes.copy_from_slice(chunk);
        let (to, _written) = target.device_ptr_mut(stream);
        // SAFETY: the target holds as many bytes; the buffer lives, and is left alone, until the event says that they are there.
        let enqueued = driver(unsafe { cudarc::driver::result::memcpy_htod_async(to, bytes, stream.cu_stream()) });
        driver(self.sent.record(stream))?;
        enqueued
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        _ = self.sent.synchronize();
    }
}

/// The buffers.
pub(super) struct Staging([Buffer; 2]);

impl Staging {
    fn new(context: &Arc<CudaContext>) -> Result<Staging> {
        Ok(Staging([Buffer::new(context)?, Buffer::new(context)?]))
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
        let mut part = target.slice_mut(index * CHUNK..index * CHUNK + chunk.len());
        buffers[index % 2].send(&stream, chunk, &mut part)?;
    }
    Ok(target)
}

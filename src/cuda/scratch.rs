//! Memory that the products of one GPU share: what they decode into, and what blocks of one product hand to each other.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::CudaSlice;

use super::kernels::out_of_memory;
use crate::{Error, Result};

/// Bytes that decoded rows may take: larger matrices are decoded in blocks of rows.
pub(super) const WORKSPACE: usize = 128 << 20;

/// The memory, apart for each stream: what is enqueued on one stream runs in order, so it can be used again at once. It
/// grows to what has been needed, and nothing is freed before the last weight is: a captured graph may hold its address.
pub(super) struct Scratch {
    states: Mutex<HashMap<StreamKey, Arc<Mutex<State>>>>,
    processors: usize,
}

/// A stream: its handle, and the thread where the handle means each thread's own.
type StreamKey = (usize, Option<ThreadId>);

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scratch")
    }
}

#[derive(Default)]
struct State {
    workspaces: Vec<CudaSlice<u8>>,
    partials: Vec<CudaSlice<f32>>,
    arrived: Vec<CudaSlice<u32>>,
}

impl Scratch {
    pub fn new(processors: usize) -> Scratch {
        Scratch { states: Mutex::default(), processors }
    }

    /// What belongs to the device's stream, as the calling thread sees it.
    fn state(&self, device: &CudaDevice) -> Arc<Mutex<State>> {
        /// The handle that means each thread's own stream.
        const PER_THREAD: usize = 2;
        let handle = device.cuda_stream().cu_stream() as usize;
        let thread = (handle == PER_THREAD).then(|| std::thread::current().id());
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.entry((handle, thread)).or_default().clone()
    }

    /// Calls `work`, which enqueues what decodes into `bytes` of memory and reads them again.
    pub fn workspace<T>(
        &self,
        device: &CudaDevice,
        bytes: usize,
        work: impl FnOnce(&mut CudaSlice<u8>) -> Result<T>,
    ) -> Result<T> {
        let state = self.state(device);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        work(last(&mut state.workspaces, device, bytes, "a workspace")?)
    }

    /// Calls `work`, which enqueues a product that needs `partial` floats, and words that are zero before and after it: at
    /// least `words`, and two for each multiprocessor and two more.
    pub fn product<T>(
        &self,
        device: &CudaDevice,
        partial: usize,
        words: usize,
        work: impl FnOnce(&mut CudaSlice<f32>, &mut CudaSlice<u32>) -> Result<T>,
    ) -> Result<T> {
        let state = self.state(device);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { partials, arrived, .. } = &mut *state;
        let arrived = self.zeros(arrived, device, words)?;
        work(last(partials, device, partial, "partial sums")?, arrived)
    }

    /// Both at once: `bytes` of a workspace, and what [`Scratch::product`] has.
    pub fn both<T>(
        &self,
        device: &CudaDevice,
        bytes: usize,
        partial: usize,
        work: impl FnOnce(&mut CudaSlice<u8>, &mut CudaSlice<f32>, &mut CudaSlice<u32>) -> Result<T>,
    ) -> Result<T> {
        let state = self.state(device);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { workspaces, partials, arrived } = &mut *state;
        let arrived = self.zeros(arrived, device, 0)?;
        let partial = last(partials, device, partial, "partial sums")?;
        work(last(workspaces, device, bytes, "a workspace")?, partial, arrived)
    }

    /// At least `words` that are zero, and two for each multiprocessor and two more.
    fn zeros<'b>(
        &self,
        arrived: &'b mut Vec<CudaSlice<u32>>,
        device: &CudaDevice,
        words: usize,
    ) -> Result<&'b mut CudaSlice<u32>> {
        if arrived.last().is_none_or(|held| held.len() < words) {
            may_grow()?;
            arrived.push(device.alloc_zeros::<u32>(words.next_power_of_two().max(2 * self.processors + 2))?);
        }
        arrived.last_mut().ok_or_else(|| Error::Invalid("no scratch memory".into()))
    }
}

/// Memory of a graph that is being captured would not be there for others.
fn may_grow() -> Result<()> {
    if super::graph::capturing() {
        return Err(Error::Unsupported("a CUDA graph of work that has not run before".into()));
    }
    Ok(())
}

/// The latest of the buffers, or a new one that is large enough.
fn last<'b, T: cudarc::driver::DeviceRepr>(
    buffers: &'b mut Vec<CudaSlice<T>>,
    device: &CudaDevice,
    length: usize,
    what: &str,
) -> Result<&'b mut CudaSlice<T>> {
    let held = buffers.last().map_or(0, |buffer| buffer.len());
    if buffers.is_empty() || held < length {
        may_grow()?;
        // At least twice the last one, so that those that are kept are no more than the one in use.
        let length = length.max(2 * held).max(64);
        // SAFETY: whoever uses it writes what is read afterwards.
        let buffer = unsafe { device.alloc::<T>(length) };
        buffers.push(buffer.map_err(|e| out_of_memory(e, length * size_of::<T>(), what))?);
    }
    buffers.last_mut().ok_or_else(|| Error::Invalid("no scratch memory".into()))
}

//! What a function enqueues, captured as a CUDA graph and launched again.
//!
//! Kernels of a graph read and write memory at fixed addresses. What operations of this crate allocate while a graph is
//! captured comes from a stream beside the captured one and is kept with the graph, so that the graph holds kernels and
//! nothing else: a node that allocates would stand between two kernels of which the second may start early. Operations of
//! candle allocate on the captured stream, which makes nodes of it: right, but slower.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use candle_core::cuda_backend::{CudaStorageSlice, cudarc};
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor};
use cudarc::driver::result::stream as raw;
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaSlice, CudaStream, DeviceRepr, DriverError, sys};
use half::{bf16, f16};

use super::kernels::driver;
use super::memory::{Element, Part, alloc, view};
use crate::{Error, Result};

thread_local! {
    /// The graph that this thread captures.
    static CAPTURED: RefCell<Option<Captured>> = const { RefCell::new(None) };
}

/// What a graph that is being captured keeps.
struct Captured {
    device: CudaDevice,
    /// Where its memory comes from.
    memory: Arc<CudaStream>,
    /// Buffers that were asked for, and those that are kept.
    allocated: usize,
    kept: Vec<Tensor>,
}

/// Memory for the graph of this device that this thread captures, if it does; it is written before it is read.
pub(super) fn alloc_kept<T: DeviceRepr>(device: &CudaDevice, length: usize) -> Option<Result<CudaSlice<T>>> {
    let memory = CAPTURED.with_borrow_mut(|captured| {
        let captured = captured.as_mut().filter(|captured| captured.device.id() == device.id())?;
        captured.allocated += 1;
        Some(captured.memory.clone())
    })?;
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: it swaps the thread's mode with that behind the pointer; so does the second call, which restores it.
    let swapped = driver(unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result());
    // SAFETY: the caller writes it before anyone reads it.
    let slice = driver(unsafe { memory.alloc::<T>(length) });
    if swapped.is_ok() {
        // SAFETY: as above.
        _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    }
    Some(swapped.and(slice))
}

/// True while this thread captures a graph: memory that all products share cannot grow then.
pub(super) fn capturing() -> bool {
    CAPTURED.with_borrow(Option::is_some)
}

/// Keeps a tensor in memory of ours for as long as the graph that is being captured, if one is.
pub(crate) fn keep(tensor: &Tensor) {
    CAPTURED.with_borrow_mut(|captured| {
        if let Some(captured) = captured {
            captured.kept.push(tensor.clone());
        }
    });
}

/// A graph, and the memory that its kernels use besides that of its inputs.
pub(crate) struct Graph {
    graph: CudaGraph,
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// Recorded behind each launch.
    done: CudaEvent,
    output: Tensor,
    _kept: Vec<Tensor>,
    _memory: MemoryStream,
}

// SAFETY: handles that any thread may use, one at a time: a graph is launched through `&mut`.
unsafe impl Send for Graph {}
// SAFETY: nothing can be done with a shared reference but reading the output's shape.
unsafe impl Sync for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("output", &self.output.shape()).finish_non_exhaustive()
    }
}

impl Graph {
    /// Whether work on this device can be captured: not while cudarc orders several streams by events, see the module
    /// [`cuda`](super).
    pub fn can_capture(device: &CudaDevice) -> bool {
        let stream = device.cuda_stream();
        !stream.cu_stream().is_null() && !stream.context().is_managing_stream_synchronization()
    }

    /// Captures what `work` enqueues in this thread on the device's stream, without running it. It must have run before:
    /// memory that products share must be large enough, kernels loaded, and what candle's kernels take uploaded. `work`'s
    /// result stays where it is and is written again by every launch.
    ///
    /// # Errors
    /// `work`'s; or if it does what cannot be captured, such as waiting for the GPU. Nothing is changed then, and the device
    /// stays usable.
    pub fn capture(device: &CudaDevice, work: impl FnOnce() -> candle_core::Result<Tensor>) -> Result<Graph> {
        let stream = device.cuda_stream();
        if !Graph::can_capture(device) || capturing() {
            return Err(Error::Unsupported("a CUDA graph of work that is on several streams".into()));
        }
        let done = driver(stream.context().new_event(None))?;
        let memory = MemoryStream::new(stream.context())?;
        let _uploaded = device.enable_cuda_graph_htod_cache();
        let capture = Capture::begin(device, &stream, &memory)?;
        let made = work().map_err(Error::from).and_then(|made| kept(device, made));
        // Tensors of candle's operations are gone by now: their memory is the graph's.
        let (graph, captured) = capture.end(&stream)?;
        let output = made?;
        if captured.allocated != captured.kept.len() {
            return Err(Error::Invalid("a CUDA graph whose memory does not belong to it".into()));
        }
        // What was allocated is there when the graph is launched.
        driver(memory.stream().synchronize())?;
        Ok(Graph { graph, device: device.clone(), stream, done, output, _kept: captured.kept, _memory: memory })
    }

    /// Enqueues the graph, in the thread that captured it.
    ///
    /// # Errors
    /// If the launch fails.
    pub fn launch(&mut self) -> Result<()> {
        driver(self.graph.launch())?;
        driver(self.done.record(&self.stream))
    }

    /// What the last launch gives, as F32.
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn output(&self) -> Result<Tensor> {
        match self.output.dtype() {
            // The next launch overwrites the graph's own. candle would copy it on the stream that it was allocated on.
            DType::F32 => copy(&self.device, &self.output),
            _ => Ok(self.output.to_dtype(DType::F32)?),
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // Its memory is freed on another stream.
        _ = self.done.synchronize();
    }
}

/// A capture that ends in any case.
struct Capture<'a>(Option<&'a Arc<CudaStream>>);

impl<'a> Capture<'a> {
    fn begin(device: &CudaDevice, stream: &'a Arc<CudaStream>, memory: &MemoryStream) -> Result<Capture<'a>> {
        driver(stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))?;
        let captured = Captured { device: device.clone(), memory: memory.stream(), allocated: 0, kept: Vec::new() };
        CAPTURED.set(Some(captured));
        Ok(Capture(Some(stream)))
    }

    fn end(mut self, stream: &Arc<CudaStream>) -> Result<(CudaGraph, Captured)> {
        self.0 = None;
        let captured = CAPTURED.take();
        driver(end(stream))?.zip(captured).ok_or_else(|| Error::Invalid("a capture without a CUDA graph".into()))
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if let Some(stream) = self.0 {
            CAPTURED.set(None);
            _ = end(stream);
        }
    }
}

/// Ends a capture. What failed inside has been told: cudarc would tell it again, and not end.
fn end(stream: &Arc<CudaStream>) -> std::result::Result<Option<CudaGraph>, DriverError> {
    _ = stream.context().check_err();
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    _ = stream.context().check_err();
    graph
}

/// A tensor in memory that the graph keeps: itself, or a copy of one that candle allocated.
fn kept(device: &CudaDevice, tensor: Tensor) -> Result<Tensor> {
    let ours = CAPTURED.with_borrow(|captured| {
        let place = |tensor: &Tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0);
        captured.as_ref().is_some_and(|captured| captured.kept.iter().any(|kept| place(kept) == place(&tensor)))
    });
    if ours {
        return Ok(tensor);
    }
    let copy = copy(device, &tensor)?;
    keep(&copy);
    Ok(copy)
}

/// Enqueues a copy of a contiguous tensor.
fn copy(device: &CudaDevice, tensor: &Tensor) -> Result<Tensor> {
    fn copied<T: Element>(device: &CudaDevice, part: Part) -> Result<CudaStorage> {
        let from = view::<T>(device, part)?;
        let mut to = alloc::<T>(device, from.len(), "a graph's result")?;
        device.memcpy_dtod(&from, &mut to)?;
        Ok(CudaStorage::wrap_cuda_slice(to, device.clone()))
    }
    let (storage, layout) = tensor.storage_and_layout();
    let copy = match &*storage {
        Storage::Cuda(storage) => match &storage.slice {
            CudaStorageSlice::BF16(_) => copied::<bf16>(device, (storage, layout))?,
            CudaStorageSlice::F16(_) => copied::<f16>(device, (storage, layout))?,
            CudaStorageSlice::F32(_) => copied::<f32>(device, (storage, layout))?,
            _ => return Err(Error::Unsupported("a CUDA graph whose result is neither f32, bf16 nor f16".into())),
        },
        _ => return Err(Error::Unsupported("a CUDA graph whose result is not on its GPU".into())),
    };
    Ok(Tensor::from_storage(Storage::Cuda(copy), layout.shape(), candle_core::op::BackpropOp::none(), false))
}

/// A stream that memory is allocated and freed on. cudarc does not count it: see [`super::layers`].
struct MemoryStream {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
}

impl MemoryStream {
    fn new(context: &Arc<CudaContext>) -> Result<MemoryStream> {
        driver(context.bind_to_thread())?;
        let stream = driver(raw::create(raw::StreamKind::NonBlocking))?;
        Ok(MemoryStream { context: context.clone(), stream })
    }

    fn stream(&self) -> Arc<CudaStream> {
        // SAFETY: a stream of this context that lives as long as `self`, which is dropped after all that is allocated on it.
        unsafe { self.context.wrap_borrowed_stream(self.stream) }
    }
}

impl Drop for MemoryStream {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: it was created here, and nobody uses it any more.
            _ = unsafe { raw::destroy(self.stream) };
        }
    }
}

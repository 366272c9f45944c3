//! Compressed matrices on a GPU: one program, which runs on a host without cargo too. `cuda [FILTER]` in the directory
//! that holds `examples/tales`. Without a GPU every test says that it was skipped.

#[path = "../common/mod.rs"]
mod common;
mod corrupt;
mod decode;
mod errors;
mod fp8;
mod generation;
mod graph;
mod joined;
mod kquant;
mod layers;
mod load;
mod model;
mod portable;
mod prefill;
mod products;
mod replay;
mod small;

use std::ops::Deref;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{CudaDevice, DType, Device, Tensor};

/// Held for reading by every test, for writing by those that fill the GPU's memory.
static MEMORY: RwLock<()> = RwLock::new(());

/// A GPU, for as long as a test runs.
struct Gpu<G> {
    device: Device,
    _guard: G,
}

impl<G> Deref for Gpu<G> {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

/// The first GPU, or a line that says why not.
fn gpu() -> Option<Gpu<RwLockReadGuard<'static, ()>>> {
    let guard = MEMORY.read().unwrap_or_else(PoisonError::into_inner);
    Some(Gpu { device: open()?, _guard: guard })
}

/// The first GPU, for one test alone.
fn whole_gpu() -> Option<Gpu<RwLockWriteGuard<'static, ()>>> {
    let guard = MEMORY.write().unwrap_or_else(PoisonError::into_inner);
    Some(Gpu { device: open()?, _guard: guard })
}

fn open() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: no GPU here ({error})");
            None
        }
    }
}

/// What candle calls a GPU, without the enum around it.
fn cuda(device: &Device) -> &CudaDevice {
    device.as_cuda_device().expect("a GPU")
}

/// Whether the GPU multiplies many rows of BF16 with kernels of our own.
fn hopper(device: &Device) -> bool {
    candle_taper::cuda::LoadedKernels::of(cuda(device)).unwrap().compute_capability() == (9, 0)
}

/// Whether there are products with activations rounded to FP8.
fn has_fp8(device: &Device) -> bool {
    candle_taper::cuda::LoadedKernels::of(cuda(device)).unwrap().fp8()
}

/// A tensor's values as F32.
fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// Captures `forward` of `x` in a graph and replays it, then on the values of `other` in `x`'s memory. To be called alone
/// ([`whole_gpu`]): no thread of a process may wait for the whole GPU while another captures.
fn captured_and_replayed(device: &Device, [x, other]: [&Tensor; 2], forward: impl Fn(&Tensor) -> Tensor, what: &str) {
    let [first, second] = [x, other].map(|x| values(&forward(x)));
    assert_ne!(first, second);
    let stream = cuda(device).cuda_stream();
    device.synchronize().unwrap();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let y = forward(x);
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().expect("a graph");
    for round in 0..3 {
        graph.launch().unwrap();
        let expected = if round == 0 { &first } else { &second };
        assert!(values(&y) == *expected, "{what}: round {round}");
        // The next round multiplies other activations, in the memory of the first.
        x.slice_set(other, 0, 0).unwrap();
    }
    drop(graph);
    // Its memory belongs to the graph.
    std::mem::forget(y);
}

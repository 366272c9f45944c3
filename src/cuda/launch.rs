//! How kernels are launched, programmatically where the GPU can.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaFunction, DeviceRepr, LaunchConfig, sys};

use super::kernels::{Kernels, driver};
use super::launch_shape::LaunchShape;
use crate::Result;

/// Whether kernels may start before the one that they follow has ended; see [`set_programmatic_launch`].
static PROGRAMMATIC: AtomicBool = AtomicBool::new(true);

/// Lets products start, and fetch their weights, while the kernel before them still runs (programmatic dependent launch, from
/// compute capability 9.0 on). It is on; benchmarks turn it off to show what it gains.
pub fn set_programmatic_launch(on: bool) {
    PROGRAMMATIC.store(on, Ordering::Relaxed);
}

/// What [`set_programmatic_launch`] was told last.
pub(crate) fn programmatic_launch() -> bool {
    PROGRAMMATIC.load(Ordering::Relaxed)
}

/// Whether kernels are launched so on this GPU.
pub(super) fn programmatic(kernels: &Kernels) -> bool {
    kernels.programmatic && programmatic_launch()
}

/// The grid of a launch: blocks in each direction, threads of each, and their dynamic shared memory in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

impl Grid {
    /// For launches without attributes.
    pub fn config(self) -> LaunchConfig {
        LaunchConfig { grid_dim: self.blocks.into(), block_dim: (self.threads, 1, 1), shared_mem_bytes: self.shared }
    }
}

/// Enqueues a product.
///
/// # Safety
/// The argument's memory must have the sizes that `kernels/product.cuh` asks for, for as long as the stream uses it.
pub(super) unsafe fn launch<A: DeviceRepr>(
    stream: &cudarc::driver::CudaStream,
    function: &CudaFunction,
    shape: &LaunchShape,
    argument: &A,
    programmatic: bool,
) -> Result<()> {
    let grid = Grid { blocks: [shape.groups.blocks as u32, 1, 1], threads: shape.threads, shared: shape.shared as u32 };
    // SAFETY: the caller's.
    unsafe { launch_with(stream, function, grid, &[(&raw const *argument).cast()], programmatic) }
}

/// Enqueues a kernel, which may start before the one before it has ended if `programmatic`.
///
/// # Safety
/// `arguments` must point to what the kernel declares, and the memory that it names have the sizes that the kernel asks for,
/// for as long as the stream uses it.
pub(super) unsafe fn launch_with(
    stream: &cudarc::driver::CudaStream,
    function: &CudaFunction,
    grid: Grid,
    arguments: &[*const c_void],
    programmatic: bool,
) -> Result<()> {
    driver(stream.context().bind_to_thread())?;
    // SAFETY: a union of plain numbers, for which zeros are a value.
    let mut value: sys::CUlaunchAttributeValue = unsafe { std::mem::zeroed() };
    value.programmaticStreamSerializationAllowed = 1;
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value,
    };
    let config = sys::CUlaunchConfig {
        gridDimX: grid.blocks[0],
        gridDimY: grid.blocks[1],
        gridDimZ: grid.blocks[2],
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared,
        hStream: stream.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: u32::from(programmatic),
    };
    // SAFETY: the caller's; the driver reads and copies the arguments before it returns.
    driver(unsafe {
        let arguments = arguments.as_ptr().cast_mut().cast();
        sys::cuLaunchKernelEx(&config, function.cu_function(), arguments, std::ptr::null_mut()).result()
    })
}

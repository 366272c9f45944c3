//! Times on a GPU, for benchmarks: how fast its memory can be read, and how long enqueued work takes.
#![allow(unsafe_code)]

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaSlice, LaunchConfig, PushKernelArg, sys};

use super::kernels::{Kernels, driver};
use crate::Result;

/// Bytes that are read or cleared at a time: much more than a cache holds.
const BYTES: usize = 1 << 30;

/// A stopwatch for work on a GPU's stream.
pub struct GpuTimer {
    device: CudaDevice,
    memory: CudaSlice<u8>,
}

impl std::fmt::Debug for GpuTimer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GpuTimer")
    }
}

impl GpuTimer {
    /// Takes a gigabyte of the GPU's memory.
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn new(device: &CudaDevice) -> Result<GpuTimer> {
        Ok(GpuTimer { device: device.clone(), memory: device.alloc_zeros::<u8>(BYTES)? })
    }

    /// Seconds that the work which `enqueue` enqueues takes on the GPU. Memory is cleared first, twice, so that nothing of
    /// the work is in a cache and all of it is enqueued before it begins.
    ///
    /// # Errors
    /// Those of `enqueue` and of the driver.
    pub fn time<E: From<crate::Error>>(
        &mut self,
        enqueue: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<f64, E> {
        let stream = self.device.cuda_stream();
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        driver(stream.synchronize())?;
        for _ in 0..2 {
            driver(stream.memset_zeros(&mut self.memory))?;
        }
        let start = driver(stream.record_event(flags))?;
        enqueue()?;
        let end = driver(stream.record_event(flags))?;
        driver(end.synchronize())?;
        Ok(f64::from(driver(start.elapsed_ms(&end))?) / 1e3)
    }

    /// Bytes a second that the GPU's memory gives at most: the best of ten readings of a gigabyte.
    ///
    /// # Errors
    /// If the GPU is too old or a launch fails.
    pub fn read_bandwidth(&mut self) -> Result<f64> {
        let kernels = Kernels::of(&self.device)?;
        let sum = self.device.alloc_zeros::<u32>(1)?;
        let stream = self.device.cuda_stream();
        let config = LaunchConfig {
            grid_dim: (4 * kernels.processors as u32, 1, 1),
            block_dim: (512, 1, 1),
            shared_mem_bytes: 0,
        };
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let count = (BYTES / 16) as u64;
        let mut best = 0.0f64;
        for _ in 0..10 {
            let start = driver(stream.record_event(flags))?;
            let mut launch = stream.launch_builder(&kernels.read);
            launch.arg(&self.memory).arg(&count).arg(&sum);
            // SAFETY: the kernel reads `count` times 16 bytes, which the memory has.
            driver(unsafe { launch.launch(config) })?;
            let end = driver(stream.record_event(flags))?;
            driver(end.synchronize())?;
            best = best.max(BYTES as f64 / (f64::from(driver(start.elapsed_ms(&end))?) / 1e3));
        }
        Ok(best)
    }
}

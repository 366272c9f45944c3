//! Compressed matrices on a GPU: one program, which runs on a host without cargo too. `cuda [FILTER]` in the directory
//! that holds `examples/tales`. Without a GPU every test says that it was skipped.

#[path = "../common/mod.rs"]
mod common;
mod corrupt;
mod decode;
mod errors;
mod graph;
mod kquant;
mod layers;
mod load;
mod model;
mod products;

use std::ops::Deref;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_core::{CudaDevice, Device};

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

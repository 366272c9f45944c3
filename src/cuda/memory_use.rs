//! How much of a GPU's memory is in use, and was at most.
#![allow(unsafe_code)]

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::sys::{self, CUmemPool_attribute as Attribute};

use super::kernels::driver;
use crate::Result;

/// Bytes that tensors and weights of this process take in a GPU's memory: what was allocated on its streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Now.
    pub current: u64,
    /// At most, since the process began or [`MemoryUse::forget_peak`] was called.
    pub peak: u64,
}

impl MemoryUse {
    /// That of a device.
    ///
    /// # Errors
    /// If the driver does not tell.
    pub fn of(device: &CudaDevice) -> Result<MemoryUse> {
        let pool = pool(device)?;
        let get = |attribute| -> Result<u64> {
            let mut value = 0u64;
            // SAFETY: both attributes are 64-bit numbers, for which `value` has room.
            driver(unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()).result() })?;
            Ok(value)
        };
        let current = get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(MemoryUse { current, peak: get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)? })
    }

    /// From now on the peak is what is in use now.
    ///
    /// # Errors
    /// As [`MemoryUse::of`].
    pub fn forget_peak(device: &CudaDevice) -> Result<()> {
        let (pool, mut zero) = (pool(device)?, 0u64);
        let attribute = Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: a 64-bit number, and zero is the value that it may be set to.
        driver(unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut zero).cast()).result() })
    }
}

/// The pool that allocations on streams come from.
fn pool(device: &CudaDevice) -> Result<sys::CUmemoryPool> {
    let context = device.cuda_stream().context().clone();
    driver(context.bind_to_thread())?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: a handle is written to `pool`; the device exists.
    driver(unsafe { sys::cuDeviceGetMemPool(&raw mut pool, context.cu_device()).result() })?;
    Ok(pool)
}

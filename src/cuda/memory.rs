//! Typed memory of a GPU as the bytes that kernels take.
#![allow(unsafe_code)]

use std::ops::Range;

use candle_core::cuda_backend::{CudaDType, cudarc};
use candle_core::{CudaDevice, CudaStorage, Layout};
use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DeviceRepr};
use half::{bf16, f16};

use super::graph;
use super::kernels::out_of_memory;
use crate::codec::{Dtype, TILE};
use crate::{Error, Result};

/// One of the element types of activations.
pub(super) trait Element: CudaDType + DeviceRepr {
    const DTYPE: Dtype;
}
impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}
impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

/// The elements of a contiguous layout.
pub(super) fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::Invalid("the input is not contiguous".into()));
    };
    Ok(start..end)
}

/// A tensor's memory and layout.
pub(crate) type Part<'a> = (&'a CudaStorage, &'a Layout);

/// A contiguous tensor's values, if they have that dtype and lie on the device.
pub(super) fn view<'a, T: Element>(device: &CudaDevice, (storage, layout): Part<'a>) -> Result<CudaView<'a, T>> {
    if storage.device.id() != device.id() {
        return Err(Error::Invalid("tensors on different devices".into()));
    }
    Ok(storage.as_cuda_slice::<T>()?.slice(contiguous(layout)?))
}

/// The one U32 of a tensor, if it lies on the device.
pub(super) fn place<'a>(device: &CudaDevice, (storage, layout): Part<'a>) -> Result<CudaView<'a, u32>> {
    let range = contiguous(layout)?;
    if storage.device.id() != device.id() || range.len() != 1 {
        return Err(Error::Invalid("a position that is no single number on the device".into()));
    }
    Ok(storage.as_cuda_slice::<u32>()?.slice(range))
}

/// Memory that is written before it is read. It is a graph's own while one is captured.
pub(super) fn alloc<T: DeviceRepr>(device: &CudaDevice, length: usize, what: &str) -> Result<CudaSlice<T>> {
    if let Some(kept) = graph::alloc_kept(device, length) {
        return kept;
    }
    // SAFETY: whoever asks for it writes all of it before anyone reads.
    let memory = unsafe { device.alloc::<T>(length) };
    memory.map_err(|e| out_of_memory(e, length * size_of::<T>(), what))
}

/// The bytes of typed memory.
pub(super) fn bytes<'a, T>(view: &'a CudaView<'_, T>) -> Result<CudaView<'a, u8>> {
    // SAFETY: any memory is bytes, and the length is that of the view.
    let bytes = unsafe { view.transmute::<u8>(view.len() * size_of::<T>()) };
    bytes.ok_or_else(|| Error::Invalid("a view that is no bytes".into()))
}

/// The bytes of typed memory, to be written.
pub(super) fn bytes_mut<T>(memory: &mut CudaSlice<T>) -> Result<CudaViewMut<'_, u8>> {
    let length = memory.len() * size_of::<T>();
    // SAFETY: as above; whoever writes them writes values of `T`, of which every pattern is one.
    let bytes = unsafe { memory.transmute_mut::<u8>(length) };
    bytes.ok_or_else(|| Error::Invalid("a view that is no bytes".into()))
}

/// Rows that fit into a workspace of `bytes`: whole tiles of the stream, or whole bands where a tile does not fit.
pub(super) fn rows_within(bytes: usize, row: usize) -> usize {
    let whole = |rows: usize| bytes / row / rows * rows;
    match whole(TILE) {
        0 => whole(64).max(64),
        rows => rows,
    }
}

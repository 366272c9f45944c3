//! Fused products: weights are decoded in registers and multiplied on tensor cores, for up to 64 columns of activations.
#![allow(unsafe_code)]

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

use super::launch::{LaunchShape, launch, programmatic};
use super::packed::{Packed, kind_of};
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// The argument of a product: the struct of that name in `kernels/product.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Product {
    weights: u64,
    overflow: u64,
    row_scale: u64,
    x: u64,
    bias: u64,
    y: u64,
    partial: u64,
    arrived: u64,
    rows: i32,
    cols: i32,
    batch: i32,
    x_stride: i32,
    y_stride: i32,
    x_type: i32,
    y_type: i32,
    groups: i32,
    slabs: i32,
    slots: i32,
    in_flight: i32,
    keep: i32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Product {}
const _: () = assert!(size_of::<Product>() == 112);

impl Packed {
    /// Enqueues `y = x · Wᵀ` for `batch` rows of `x` in `dtype`, with fused kernels: false, with nothing done, if there are
    /// too many rows for them.
    pub fn product(&self, x: &CudaView<u8>, y: &mut CudaViewMut<u8>, batch: usize, dtype: Dtype) -> Result<bool> {
        let kind = kind_of(dtype);
        let parts = kind as usize + 1; // columns that a row of activations takes
        let (Geometry { rows, cols }, size) = (self.geometry, dtype.size());
        if batch * cols * size > x.len() || batch * rows * size > y.len() {
            return Err(Error::Invalid("a product that does not fit into its memory".into()));
        }
        // F16 and F32 activations take two and three columns each; what exceeds 64 is launched in parts. F32 products on
        // tensor cores beat cuBLAS's even so, and decoded F32 weights would take twice the memory.
        let launches = (batch * parts).div_ceil(64);
        let most = if dtype == Dtype::F32 { 64 } else { 2 };
        if batch == 0 || dtype != Dtype::F32 && batch > 64 || launches > most {
            return Ok(false);
        }
        let each = batch.div_ceil(launches);
        let kernels = self.kernels.packed(self.family)?;
        let programmatic = programmatic(&self.kernels);
        let shape = LaunchShape::of(self.family, self.geometry, &self.kernels, each, parts, programmatic);
        let Some(shape) = shape else { return Ok(false) };
        let stream = self.device.cuda_stream();
        self.kernels.scratch.product(&self.device, shape.partial, |partial, arrived| {
            let (weights, _weights) = self.weights.device_ptr(&stream);
            let (overflow, _overflow) = self.overflow.device_ptr(&stream);
            let scale = self.row_scale.as_ref().map(|scale| scale.device_ptr(&stream));
            let row_scale = scale.as_ref().filter(|_| shape.scaled).map_or(0, |(pointer, _)| *pointer);
            let (x, _x) = x.device_ptr(&stream);
            let (y, _y) = y.device_ptr_mut(&stream);
            let (partial, _partial) = partial.device_ptr_mut(&stream);
            let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
            for first in (0..batch).step_by(each) {
                let count = each.min(batch - first);
                let argument = Product {
                    weights,
                    overflow,
                    row_scale,
                    x: x + (first * cols * size) as u64,
                    bias: 0,
                    y: y + (first * rows * size) as u64,
                    partial,
                    arrived,
                    rows: rows as i32,
                    cols: cols as i32,
                    batch: count as i32,
                    x_stride: cols as i32,
                    y_stride: rows as i32,
                    x_type: kind,
                    y_type: kind,
                    groups: shape.groups as i32,
                    slabs: shape.slabs as i32,
                    slots: shape.slots as i32,
                    in_flight: shape.in_flight as i32,
                    keep: shape.keep as i32,
                };
                // SAFETY: memory of the sizes that the kernel expects, checked above and by `shape`.
                unsafe { launch(&stream, &kernels.products[shape.kernel].0, &shape, &argument, programmatic)? };
            }
            Ok(true)
        })
    }
}

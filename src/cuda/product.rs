//! Fused products: weights are decoded in registers and multiplied on tensor cores, for few rows of activations.
#![allow(unsafe_code)]

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaFunction, CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

use super::kernels::Kernels;
use super::launch::{launch, programmatic};
use super::launch_shape::LaunchShape;
use super::packed::{Packed, kind_of};
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// The argument of a product: the struct of that name in `kernels/ring.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Product {
    pub weights: u64,
    pub overflow: u64,
    pub row_scale: u64,
    pub x: u64,
    pub bias: u64,
    pub y: u64,
    pub partial: u64,
    pub arrived: u64,
    pub rows: i32,
    pub cols: i32,
    pub batch: i32,
    pub x_stride: i32,
    pub y_stride: i32,
    pub x_type: i32,
    pub y_type: i32,
    pub groups: i32,
    pub slabs: i32,
    pub slots: i32,
    pub in_flight: i32,
    pub keep: i32,
    pub first_block: i32,
    pub longer_groups: i32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Product {}
const _: () = assert!(size_of::<Product>() == 120);

/// Matrices of one launch at most.
pub(super) const MATRICES: usize = 3;

impl Product {
    /// In the place of a matrix that a launch does not have: its first block is past the grid.
    pub fn none() -> Product {
        Product { first_block: i32::MAX, ..Product::default() }
    }

    /// What does not depend on where the memory lies: `batch` rows of dtype `kind`, launched as `shape` says.
    pub fn of(shape: &LaunchShape, geometry: Geometry, batch: usize, kind: i32) -> Product {
        let Geometry { rows, cols } = geometry;
        Product {
            rows: rows as i32,
            cols: cols as i32,
            batch: batch as i32,
            x_stride: cols as i32,
            y_stride: rows as i32,
            x_type: kind,
            y_type: kind,
            groups: shape.groups.each as i32,
            longer_groups: shape.groups.longer as i32,
            slabs: shape.slabs as i32,
            slots: shape.slots as i32,
            in_flight: shape.in_flight as i32,
            keep: shape.keep as i32,
            ..Product::default()
        }
    }
}

/// Columns of activations that a row takes on tensor cores, and the kernels' number of its dtype: F16 and F32 activations
/// are split exactly into BF16 ones.
pub(super) fn columns_of(dtype: Dtype) -> (usize, i32) {
    let kind = kind_of(dtype);
    (kind as usize + 1, kind)
}

/// Rows of activations for each launch of kernels that take `columns` columns; `None` if that would be too many launches.
/// F32 products on tensor cores beat cuBLAS's even with many.
pub(super) fn rows_each(batch: usize, dtype: Dtype, columns: usize, most: usize) -> Option<usize> {
    let launches = (batch * columns_of(dtype).0).div_ceil(columns);
    (launches > 0 && launches <= most).then(|| batch.div_ceil(launches))
}

/// A matrix as the kernels of products take it.
pub(super) struct Factor<'a> {
    pub kernels: &'a Kernels,
    pub device: &'a CudaDevice,
    pub geometry: Geometry,
    pub weights: &'a CudaSlice<u8>,
    /// The list of repairs, or the table of a code.
    pub overflow: &'a CudaSlice<u32>,
    pub row_scale: Option<&'a CudaSlice<f32>>,
}

impl Factor<'_> {
    /// Enqueues `y = x · Wᵀ` for `batch` rows of `x`, `each` of them a launch. `shape` says how so many rows of so many
    /// columns are launched, with which kernel: false, with nothing done, if they cannot be. `argument` is what the kernel
    /// takes.
    ///
    /// # Safety
    /// The kernel must ask for no more memory than `shape` says, and the matrix be what it takes.
    pub unsafe fn product<'k, A: DeviceRepr>(
        &self,
        (x, y): (&CudaView<u8>, &mut CudaViewMut<u8>),
        (batch, each): (usize, usize),
        dtype: Dtype,
        shape: impl FnOnce(usize, usize, bool) -> Option<(LaunchShape, &'k CudaFunction)>,
        argument: impl Fn(Product) -> A,
    ) -> Result<bool> {
        let ((parts, kind), size) = (columns_of(dtype), dtype.size());
        let Geometry { rows, cols } = self.geometry;
        if batch * cols * size > x.len() || batch * rows * size > y.len() {
            return Err(Error::Invalid("a product that does not fit into its memory".into()));
        }
        let programmatic = programmatic(self.kernels);
        let Some((shape, function)) = shape(each, parts, programmatic) else { return Ok(false) };
        let stream = self.device.cuda_stream();
        self.kernels.scratch.product(self.device, shape.partial, shape.arrived, |partial, arrived| {
            let (weights, _weights) = self.weights.device_ptr(&stream);
            let (overflow, _overflow) = self.overflow.device_ptr(&stream);
            let scale = self.row_scale.map(|scale| scale.device_ptr(&stream));
            let row_scale = scale.as_ref().filter(|_| shape.scaled).map_or(0, |(pointer, _)| *pointer);
            let (x, _x) = x.device_ptr(&stream);
            let (y, _y) = y.device_ptr_mut(&stream);
            let (partial, _partial) = partial.device_ptr_mut(&stream);
            let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
            for first in (0..batch).step_by(each) {
                let count = each.min(batch - first);
                let product = Product {
                    weights,
                    overflow,
                    row_scale,
                    x: x + (first * cols * size) as u64,
                    y: y + (first * rows * size) as u64,
                    partial,
                    arrived,
                    ..Product::of(&shape, self.geometry, count, kind)
                };
                // SAFETY: memory of the sizes that the kernel expects, checked above and by `shape`.
                unsafe { launch(&stream, function, &shape, &argument(product), programmatic)? };
            }
            Ok(true)
        })
    }
}

impl Packed {
    /// What [`super::packed::Fused::product`] says.
    pub(super) fn multiply(
        &self,
        x: &CudaView<u8>,
        y: &mut CudaViewMut<u8>,
        batch: usize,
        dtype: Dtype,
    ) -> Result<bool> {
        // Decoded F32 weights would take twice the memory of others.
        let most = if dtype == Dtype::F32 { 64 } else { 2 };
        let Some(each) = rows_each(batch, dtype, 64, most).filter(|_| dtype == Dtype::F32 || batch <= 64) else {
            return Ok(false);
        };
        let Packed { kernels, device, family, geometry, weights, overflow, row_scale, .. } = self;
        let (functions, row_scale) = (kernels.packed(*family)?, row_scale.as_ref());
        let factor = Factor { kernels, device, geometry: *geometry, weights, overflow, row_scale };
        let shape = |batch, parts, programmatic| {
            let shape = LaunchShape::of(*family, *geometry, kernels, batch, parts, programmatic)?;
            Some((shape, functions.product(shape.kernel)?))
        };
        // Kernels that take several matrices are told that there are no more; others read the first.
        let alone = |product| [product, Product::none(), Product::none()];
        // SAFETY: the matrix was packed for these kernels, and `LaunchShape` computes what they ask for.
        unsafe { factor.product((x, y), (batch, each), dtype, shape, alone) }
    }
}

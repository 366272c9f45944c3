//! A matrix in one of the layouts that fused kernels multiply with, and its rows. It is made in `packing.rs` and multiplied
//! in `product.rs`.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, LaunchConfig, PushKernelArg};

use super::family::{Family, TILE_ROWS, stages};
use super::kernels::{Kernels, driver};
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// A matrix in one of the layouts.
pub(super) struct Packed {
    pub(super) kernels: Arc<Kernels>,
    pub(super) device: CudaDevice,
    pub(super) family: Family,
    pub(super) geometry: Geometry,
    pub(super) weights: CudaSlice<u8>,
    pub(super) overflow: CudaSlice<u32>,
    /// A factor for each row; of block formats for the warpgroup kernels alone, whose weights are divided by it.
    pub(super) row_scale: Option<CudaSlice<f32>>,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({:?} {}x{})", self.family, self.geometry.rows, self.geometry.cols)
    }
}

/// A dtype as `kernels/activations.cuh` numbers it.
pub(super) fn kind_of(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::Bf16 => 0,
        Dtype::F16 => 1,
        _ => 2,
    }
}

impl Packed {
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    pub fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    pub fn family(&self) -> Family {
        self.family
    }

    pub fn stored_bytes(&self) -> usize {
        self.weights.len() + 4 * self.overflow.len() + self.row_scale.as_ref().map_or(0, |scale| 4 * scale.len())
    }

    /// The dtypes that [`Packed::decode_rows`] writes.
    pub fn decodes_to(&self, dtype: Dtype) -> bool {
        dtype == Dtype::Bf16 || self.family.scaled() && dtype == Dtype::F16 || self.family.blocks()
    }

    /// Enqueues the decoding of rows, which start at a multiple of 16.
    pub fn decode_rows(&self, rows: Range<usize>, dtype: Dtype, out: &mut CudaViewMut<u8>) -> Result<()> {
        let Geometry { rows: height, cols } = self.geometry;
        let whole = rows.end == height || rows.end.is_multiple_of(TILE_ROWS);
        let fits = rows.end <= height && rows.len() * cols * dtype.size() <= out.len();
        if !whole || !rows.start.is_multiple_of(TILE_ROWS) || !fits || !self.decodes_to(dtype) {
            return Err(Error::Invalid(format!("rows {rows:?} of a packed matrix into {} bytes", out.len())));
        }
        let blocks = rows.len().div_ceil(TILE_ROWS) * stages(cols);
        if blocks == 0 {
            return Ok(());
        }
        let stream = self.device.cuda_stream();
        let (height, cols, tile) = (height as i32, cols as i32, (rows.start / TILE_ROWS) as i32);
        let (nothing, kind) = (0u64, kind_of(dtype));
        let mut launch = stream.launch_builder(&self.kernels.packed(self.family)?.decode);
        launch.arg(&self.weights);
        if !self.family.blocks() {
            launch.arg(&self.overflow);
            match &self.row_scale {
                Some(scale) => _ = launch.arg(scale),
                None if self.family.scaled() => _ = launch.arg(&nothing),
                None => {}
            }
        }
        launch.arg(out);
        if self.family.scaled() {
            launch.arg(&kind);
        }
        launch.arg(&height).arg(&cols).arg(&cols).arg(&tile);
        let config = LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the grid covers these rows, which `out` has room for; those past the matrix's end are not written.
        driver(unsafe { launch.launch(config) })?;
        Ok(())
    }

    /// What [`Packed::decode_ids`] writes, of a layout that is asked for `dtype`.
    pub fn ids_dtype(&self, dtype: Dtype) -> Dtype {
        match self.family {
            Family::Blocks(_) => dtype,
            Family::Fixed => Dtype::Bf16,
            _ => Dtype::F32,
        }
    }

    /// Enqueues the decoding of the rows that `ids` name to [`Packed::ids_dtype`]. An id outside the matrix gives zeros.
    pub fn decode_ids(&self, ids: &CudaView<u32>, out: &mut CudaViewMut<u8>, dtype: Dtype) -> Result<()> {
        let Geometry { rows, cols } = self.geometry;
        let (dtype, kind) = (self.ids_dtype(dtype), kind_of(dtype));
        if ids.len() * cols * dtype.size() > out.len() {
            return Err(Error::Invalid(format!("{} rows of a packed matrix into {} bytes", ids.len(), out.len())));
        }
        if ids.is_empty() {
            return Ok(());
        }
        let stream = self.device.cuda_stream();
        let grid = (ids.len() as u32, stages(cols) as u32, 1);
        let (rows, cols, nothing) = (rows as i32, cols as i32, 0u64);
        let mut launch = stream.launch_builder(&self.kernels.packed(self.family)?.ids);
        launch.arg(&self.weights);
        if !self.family.blocks() {
            launch.arg(&self.overflow);
            match &self.row_scale {
                Some(scale) => _ = launch.arg(scale),
                None if self.family.scaled() => _ = launch.arg(&nothing),
                None => {}
            }
        }
        launch.arg(ids).arg(out);
        if self.family.blocks() {
            launch.arg(&kind);
        }
        launch.arg(&rows).arg(&cols).arg(&cols);
        // SAFETY: a block for each id and stage; `out` has a row for each id.
        driver(unsafe { launch.launch(LaunchConfig { grid_dim: grid, block_dim: (256, 1, 1), shared_mem_bytes: 0 }) })?;
        Ok(())
    }
}

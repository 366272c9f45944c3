//! A matrix in one of the layouts that fused kernels multiply with, and its rows. It is made in `packing.rs` and multiplied
//! in `product.rs`.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, LaunchArgs, LaunchConfig, PushKernelArg};

use super::family::{Family, TILE_ROWS, stages};
use super::kernels::{Kernels, driver};
use super::shares::Share;
use crate::codec::{Dtype, Geometry};
use crate::matrix::GpuLayout;
use crate::{Error, Result};

/// A matrix in one of the layouts.
pub(super) struct Packed {
    pub(super) kernels: Arc<Kernels>,
    pub(super) device: CudaDevice,
    pub(super) family: Family,
    pub(super) geometry: Geometry,
    pub(super) weights: CudaSlice<u8>,
    /// The list of repairs; of block formats a word that is not zero if a scale is not finite.
    pub(super) overflow: CudaSlice<u32>,
    /// A factor for each row.
    pub(super) row_scale: Option<CudaSlice<f32>>,
    /// How up to so many rows of activations are multiplied where there are several ways; by a rule if it says nothing.
    pub(super) preferred: Vec<(usize, Share)>,
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

/// A matrix in a layout that fused kernels multiply with.
pub(super) trait Fused: fmt::Debug + Send + Sync {
    fn geometry(&self) -> Geometry;
    fn device(&self) -> &CudaDevice;
    fn kernels(&self) -> &Arc<Kernels>;
    fn layout(&self) -> GpuLayout;
    fn stored_bytes(&self) -> usize;

    /// Itself, if it has kernels that multiply several matrices at once.
    fn packed(&self) -> Option<&Packed> {
        None
    }

    /// The dtypes that [`Fused::decode_rows`] writes: BF16 and perhaps another.
    fn decodes_to(&self, dtype: Dtype) -> bool;

    /// Enqueues the decoding of rows, which start at a multiple of 16, on a stream.
    fn decode_rows(
        &self,
        stream: &Arc<CudaStream>,
        rows: Range<usize>,
        dtype: Dtype,
        out: &mut CudaViewMut<u8>,
    ) -> Result<()>;

    /// What [`Fused::decode_ids`] writes, of a layout that is asked for `dtype`.
    fn ids_dtype(&self, dtype: Dtype) -> Dtype;

    /// Enqueues the decoding of the rows that `ids` name to [`Fused::ids_dtype`]. An id outside the matrix gives zeros.
    fn decode_ids(&self, ids: &CudaView<u32>, out: &mut CudaViewMut<u8>, dtype: Dtype) -> Result<()>;

    /// Enqueues `y = x · Wᵀ` for `batch` rows of `x` in `dtype`: false, with nothing done, if there are too many rows for
    /// the layout's kernels.
    fn product(&self, x: &CudaView<u8>, y: &mut CudaViewMut<u8>, batch: usize, dtype: Dtype) -> Result<bool>;
}

/// Whether decoding may start and end with some rows, and they fit into `room` bytes.
pub(super) fn whole_tiles(
    rows: &Range<usize>,
    Geometry { rows: height, cols }: Geometry,
    dtype: Dtype,
    room: usize,
) -> Result<()> {
    let whole = rows.end == height || rows.end.is_multiple_of(TILE_ROWS);
    let fits = rows.start <= rows.end && rows.end <= height && rows.len() * cols * dtype.size() <= room;
    if whole && rows.start.is_multiple_of(TILE_ROWS) && fits {
        return Ok(());
    }
    Err(Error::Invalid(format!("rows {rows:?} of a packed matrix into {room} bytes")))
}

impl Packed {
    /// The matrix, as the first arguments of the kernels that decode it. `nothing` is a null pointer.
    fn source<'a>(&'a self, launch: &mut LaunchArgs<'a>, nothing: &'a u64) {
        launch.arg(&self.weights);
        if self.family.blocks() {
            return;
        }
        launch.arg(&self.overflow);
        match &self.row_scale {
            Some(scale) => _ = launch.arg(scale),
            None if self.family.scaled() => _ = launch.arg(nothing),
            None => {}
        }
    }
}

impl Fused for Packed {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn device(&self) -> &CudaDevice {
        &self.device
    }

    fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    fn packed(&self) -> Option<&Packed> {
        Some(self)
    }

    fn layout(&self) -> GpuLayout {
        match self.family {
            Family::Fixed => GpuLayout::Fixed,
            Family::Window => GpuLayout::Window,
            Family::E4m3 | Family::E5m2 => GpuLayout::Fp8,
            _ => GpuLayout::Integers,
        }
    }

    fn stored_bytes(&self) -> usize {
        self.weights.len() + 4 * self.overflow.len() + self.row_scale.as_ref().map_or(0, |scale| 4 * scale.len())
    }

    fn decodes_to(&self, dtype: Dtype) -> bool {
        dtype == Dtype::Bf16 || self.family.scaled() && dtype == Dtype::F16 || self.family.blocks()
    }

    fn decode_rows(
        &self,
        stream: &Arc<CudaStream>,
        rows: Range<usize>,
        dtype: Dtype,
        out: &mut CudaViewMut<u8>,
    ) -> Result<()> {
        let Geometry { rows: height, cols } = self.geometry;
        whole_tiles(&rows, self.geometry, dtype, out.len())?;
        if !self.decodes_to(dtype) {
            return Err(Error::Invalid(format!("a packed matrix as {}", dtype.name())));
        }
        let (tiles, stages) = (rows.len().div_ceil(TILE_ROWS), stages(cols));
        let (height, cols, kind, nothing) = (height as i32, cols as i32, kind_of(dtype), 0u64);
        let kernel = &self.kernels.packed(self.family)?.decode;
        // A block for each stage of a tile. The grid's second dimension ends at 65,535; block formats have it in the first.
        let most = if self.family.blocks() { tiles.max(1) } else { 65_535 };
        for first in (0..tiles).step_by(most) {
            let count = most.min(tiles - first);
            let grid_dim = match self.family.blocks() {
                true => ((count * stages) as u32, 1, 1),
                false => (stages as u32, count as u32, 1),
            };
            let tile = (rows.start / TILE_ROWS + first) as i32;
            let mut part = out.slice_mut(first * TILE_ROWS * self.geometry.cols * dtype.size()..);
            let mut launch = stream.launch_builder(kernel);
            self.source(&mut launch, &nothing);
            launch.arg(&mut part);
            if self.family.scaled() {
                launch.arg(&kind);
            }
            launch.arg(&height).arg(&cols).arg(&cols).arg(&tile);
            let config = LaunchConfig { grid_dim, block_dim: (256, 1, 1), shared_mem_bytes: 0 };
            // SAFETY: the grid covers these rows, which `out` has room for; those past the matrix's end are not written.
            driver(unsafe { launch.launch(config) })?;
        }
        Ok(())
    }

    fn ids_dtype(&self, dtype: Dtype) -> Dtype {
        match self.family {
            Family::Blocks(_) => dtype,
            family if family.floats() => Dtype::Bf16,
            _ => Dtype::F32,
        }
    }

    fn decode_ids(&self, ids: &CudaView<u32>, out: &mut CudaViewMut<u8>, dtype: Dtype) -> Result<()> {
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
        self.source(&mut launch, &nothing);
        launch.arg(ids).arg(out);
        if self.family.blocks() {
            launch.arg(&kind);
        }
        launch.arg(&rows).arg(&cols).arg(&cols);
        // SAFETY: a block for each id and stage; `out` has a row for each id.
        driver(unsafe { launch.launch(LaunchConfig { grid_dim: grid, block_dim: (256, 1, 1), shared_mem_bytes: 0 }) })?;
        Ok(())
    }

    fn product(&self, x: &CudaView<u8>, y: &mut CudaViewMut<u8>, batch: usize, dtype: Dtype) -> Result<bool> {
        Ok(self.stream(x, y, batch, dtype)?
            || self.prefill(x, y, batch, dtype)?
            || self.multiply(x, y, batch, dtype)?)
    }
}

//! BF16 matrices at rest, decoded and multiplied at speed: `kernels/rans.cu`. Every other stream, and columns that fill no whole
//! tiles, are left to the reference kernels.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{
    CudaFunction, CudaModule, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg,
};

use super::decode::DeviceStream;
use super::hybrid::Activations;
use super::kernels::{driver, function};
use super::launch::{Grid, launch_with, programmatic};
use super::plan::Plan;
use super::product::columns_of;
use super::scratch::WORKSPACE;
use crate::Result;
use crate::codec::{self, Coding, Dtype, Geometry, Kind, ScaleLayout, TILE};

/// Warps of a block at most, and at least: they share a table that takes a while to fill.
const WARPS: usize = 28;
const FEWEST: usize = 4;
/// Shared memory: tables of a block, a warp's ring, a warp's activations for each column. Mirror `kernels/rans_band.cuh`.
const TABLES: usize = 1040 + (8192 - 16) + 8192 + 4 * 4096;
const RING: usize = 5 * 512;
const COLUMN: usize = 512;
/// Rows of a band.
const BAND: usize = 64;
/// Columns of activations of a launch.
const COLUMNS: usize = 8;
/// Rows of activations. More are faster with decoded weights: eight take twice and a half what one takes.
const ROWS: usize = 4;

/// What the bands of a matrix are, for which there are kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bands {
    Plain,
    Levels,
}

impl Bands {
    /// What these kernels take a matrix for, if they take it.
    pub fn of(plan: &codec::Plan, geometry: Geometry) -> Option<Bands> {
        let usual = (plan.kind, plan.dtype, plan.coding) == (Kind::Bf16, Dtype::Bf16, Coding::Rans)
            && (plan.class_bits, plan.raw_bits) == (4, 8)
            && geometry.cols.is_multiple_of(TILE);
        match plan.scale {
            ScaleLayout::None if usual => Some(Bands::Plain),
            ScaleLayout::Levels if usual => Some(Bands::Levels),
            _ => None,
        }
    }
}

/// The kernels, each without and with levels, and the shared memory that a block of it may have.
pub(super) struct RansKernels {
    decode: [(CudaFunction, usize); 2],
    single: [(CudaFunction, usize); 2],
    eight: [(CudaFunction, usize); 2],
}

impl RansKernels {
    pub fn load(module: &Arc<CudaModule>, shared: i32) -> Result<RansKernels> {
        let both = |name: &str| -> Result<[(CudaFunction, usize); 2]> {
            Ok([function(module, name, shared)?, function(module, &format!("{name}_levels"), shared)?])
        };
        Ok(RansKernels {
            decode: both("rans_decode")?,
            single: both("rans_product_1")?,
            eight: both("rans_product_8")?,
        })
    }
}

/// A grid for so many bands, whose warps take `each` bytes of shared memory: as few bands one after another as there can be.
fn grid(bands: usize, processors: usize, room: usize, each: usize) -> Option<Grid> {
    let most = (room.checked_sub(TABLES)? / each).min(WARPS);
    let blocks = processors.min(bands);
    if most < FEWEST || blocks == 0 {
        return None;
    }
    let turns = bands.div_ceil(blocks * most);
    let warps = bands.div_ceil(blocks * turns).max(FEWEST);
    Some(Grid { blocks: [blocks as u32, 1, 1], threads: 32 * warps as u32, shared: (TABLES + warps * each) as u32 })
}

impl DeviceStream {
    /// Whether rows are decoded to that dtype at speed; if not, then perhaps by way of BF16.
    pub(super) fn decodes_to(&self, dtype: Dtype) -> bool {
        self.bands().is_none() || dtype == Dtype::Bf16
    }

    /// Enqueues the decoding of rows to BF16, `stride` bytes apart: false, with nothing done, if these kernels do not take them.
    /// `out` must have room for them.
    pub(super) fn decode_bands(
        &self,
        stream: &Arc<CudaStream>,
        rows: Range<usize>,
        plan: &Plan,
        stride: usize,
        out: &mut CudaViewMut<u8>,
    ) -> Result<bool> {
        let Some(of) = self.bands() else { return Ok(false) };
        let (kernels, cols) = (self.kernels(), self.geometry().cols);
        let (kernel, room) = &kernels.rans.decode[of as usize];
        let bands = (rows.end.div_ceil(BAND) - rows.start / BAND) * (cols / TILE);
        let aligned = out.device_ptr(stream).0.is_multiple_of(4);
        let Some(grid) = grid(bands, kernels.processors, *room, RING).filter(|_| aligned) else { return Ok(false) };
        let (first, count, stride) = (rows.start as u32, rows.len() as u32, stride as u64);
        let config = LaunchConfig {
            grid_dim: grid.blocks.into(),
            block_dim: (grid.threads, 1, 1),
            shared_mem_bytes: grid.shared,
        };
        let mut launch = stream.launch_builder(kernel);
        launch.arg(self.bytes()).arg(plan).arg(&first).arg(&count).arg(out).arg(&stride).arg(self.status());
        // SAFETY: arguments as the kernel declares them; it reads within `plan.total` bytes, and writes `count` rows of
        // `stride` bytes, which `out` has. The status word is written by atomic operations only.
        driver(unsafe { launch.launch(config) })?;
        Ok(true)
    }

    /// Enqueues `y = x · Wᵀ`, as [`DeviceStream::product`], which has checked the sizes: false, with nothing done, if there are
    /// too many rows.
    pub(super) fn product_bands(
        &self,
        x: &CudaView<u8>,
        y: &mut CudaViewMut<u8>,
        batch: usize,
        dtype: Dtype,
    ) -> Result<bool> {
        let Some(of) = self.bands() else { return Ok(false) };
        let (kernels, Geometry { rows, cols }, size) = (self.kernels(), self.geometry(), dtype.size());
        let (parts, _) = columns_of(dtype);
        let each = batch.min(COLUMNS / parts);
        let (across, down) = (cols / TILE, rows.div_ceil(BAND));
        let partial = across * each * rows;
        if batch == 0 || batch > ROWS || 4 * partial > WORKSPACE {
            return Ok(false);
        }
        let single = each * parts == 1;
        let ((kernel, room), columns) = match single {
            true => (&kernels.rans.single[of as usize], 0),
            false => (&kernels.rans.eight[of as usize], each * parts),
        };
        let Some(grid) = grid(across * down, kernels.processors, *room, RING + COLUMN * columns) else {
            return Ok(false);
        };
        let (stream, plan, programmatic) = (self.device().cuda_stream(), self.plan(), programmatic(kernels));
        kernels.scratch.product(self.device(), partial, down, |partial, arrived| {
            let (bytes, _bytes) = self.bytes().device_ptr(&stream);
            let (status, _status) = self.status().device_ptr(&stream);
            let (x, _x) = x.device_ptr(&stream);
            let (y, _y) = y.device_ptr_mut(&stream);
            let (partial, _partial) = partial.device_ptr_mut(&stream);
            let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
            for first in (0..batch).step_by(each) {
                let activations = Activations {
                    x: x + (first * cols * size) as u64,
                    y: y + (first * rows * size) as u64,
                    partial,
                    arrived,
                    batch: each.min(batch - first) as u32,
                    dtype: dtype as u32,
                };
                let arguments: [*const std::ffi::c_void; 4] = [
                    (&raw const bytes).cast(),
                    (&raw const plan).cast(),
                    (&raw const activations).cast(),
                    (&raw const status).cast(),
                ];
                // SAFETY: arguments as the kernel declares them, memory of the sizes that it asks for, checked by the caller and
                // above; a word of `arrived` for each row of bands. The status word is written by atomic operations only.
                unsafe { launch_with(&stream, kernel, grid, &arguments, programmatic)? };
            }
            Ok(true)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_take_bands_in_as_few_turns_as_there_can_be() {
        let shape = |bands| grid(bands, 132, 232_448, RING).map(|grid| (grid.blocks[0], grid.threads / 32));
        assert_eq!(shape(0), None);
        assert_eq!(shape(1), Some((1, 4)));
        assert_eq!(shape(1024), Some((132, 8)));
        assert_eq!(shape(3584), Some((132, 28)));
        assert_eq!(shape(4000), Some((132, 16)));
        // Little shared memory: fewer warps; too little: none.
        let room = TABLES + 5 * (RING + 8 * COLUMN);
        let few = grid(3584, 132, room, RING + 8 * COLUMN).unwrap();
        assert!(few.threads == 32 * 5 && few.shared as usize == room, "{few:?}");
        assert!(grid(3584, 132, TABLES + 3 * RING, RING).is_none());
    }
}

//! Products of 4-bit integers in groups of 128 with activations rounded to FP8 (e4m3), on compute capability 9.0
//! (`kernels/fp8.cuh`).
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaFunction, CudaModule, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

use super::family::{Family, UNIT_COLS};
use super::kernels::function;
use super::launch::{Grid, launch_with, programmatic};
use super::packed::{Packed, kind_of};
use super::prefill::{BLOCK_ROWS, Prefill, THREADS};
use super::scratch::WORKSPACE;
use crate::codec::kquant::GgmlType;
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// From so many rows of activations on.
const FEWEST_ROWS: usize = 64;
/// Units whose sums of activations lie together.
const SUMS: usize = 16;

/// A kernel's rows of activations in a block, and what a unit of 128 columns of the matrix takes it, in microseconds on an
/// H200; and what it takes to add up the pieces of blocks.
struct Width {
    columns: usize,
    unit: f64,
    meeting: f64,
}

const WIDTHS: [Width; 3] = [
    Width { columns: 64, unit: 0.41, meeting: 15.0 },
    Width { columns: 128, unit: 0.59, meeting: 16.0 },
    Width { columns: 256, unit: 1.16, meeting: 18.0 },
];

/// The kernels; no other compute capability than 9.0 has them.
#[derive(Debug)]
pub(super) struct Fp8Kernels {
    arrange: CudaFunction,
    /// One for each of [`WIDTHS`], and the shared memory that it may ask for.
    products: [(CudaFunction, usize); 3],
}

impl Fp8Kernels {
    pub fn load(module: &Arc<CudaModule>, shared: i32) -> Result<Fp8Kernels> {
        let [a, b, c] = WIDTHS.map(|width| function(module, &format!("fp8_product_{}", width.columns), shared));
        Ok(Fp8Kernels { arrange: function(module, "fp8_arrange", 0)?.0, products: [a?, b?, c?] })
    }
}

/// The argument: the struct `Fp8Arrange` in `kernels/fp8.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arrange {
    x: u64,
    out: u64,
    x_type: i32,
    x_stride: i32,
    batch: i32,
    cols: i32,
    width: i32,
    padded: i32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Arrange {}
const _: () = assert!(size_of::<Arrange>() == 40);

/// How a product is shared out: which of [`WIDTHS`], blocks of the grid, blocks of the product that are cut into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    kernel: usize,
    grid: usize,
    cut: usize,
}

impl Plan {
    /// The one that should take the least time.
    fn of(Geometry { rows, cols }: Geometry, batch: usize, processors: usize) -> Option<Plan> {
        let units = cols.div_ceil(UNIT_COLS);
        let plans = WIDTHS.iter().enumerate().flat_map(|(kernel, width)| {
            let blocks = rows.div_ceil(BLOCK_ROWS) * batch.div_ceil(width.columns);
            let (whole, pieces) = (processors.min(blocks), processors.min(blocks * units));
            let rounds = (blocks.div_ceil(whole.max(1)) * units) as f64;
            let cut = if blocks.is_multiple_of(pieces.max(1)) { 0 } else { blocks.min(blocks % pieces + pieces) };
            let each = (blocks * units) as f64 / pieces.max(1) as f64;
            [
                (width.unit * rounds, Plan { kernel, grid: whole, cut: 0 }),
                (width.unit * each + width.meeting, Plan { kernel, grid: pieces, cut }),
            ]
        });
        plans.filter(|(_, plan)| plan.grid > 0).min_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, plan)| plan)
    }
}

/// Rows of activations, with those that fill up the last block.
fn padded(batch: usize, kernel: usize) -> usize {
    batch.next_multiple_of(WIDTHS[kernel].columns)
}

/// Bytes of arranged activations: e4m3, sums of units, a factor for each row (`Fp8Arranged` in `kernels/fp8.cuh`).
fn arranged_bytes(padded: usize, cols: usize) -> usize {
    let units = cols.div_ceil(UNIT_COLS);
    padded * (units * UNIT_COLS + units.next_multiple_of(SUMS) * 4 + 4)
}

impl Packed {
    /// Enqueues `y = x · Wᵀ` for `batch` rows of `x` in `dtype`, rounded to e4m3: false, with nothing done, if the matrix is
    /// not of such integers, there are too few rows, or the GPU has no kernels for it.
    pub(super) fn product_fp8(
        &self,
        x: &CudaView<u8>,
        y: &mut CudaViewMut<u8>,
        batch: usize,
        dtype: Dtype,
    ) -> Result<bool> {
        let Geometry { rows, cols } = self.geometry;
        if batch * cols * dtype.size() > x.len() || batch * rows * dtype.size() > y.len() {
            return Err(Error::Invalid("a product that does not fit into its memory".into()));
        }
        let Some(kernels) = &self.kernels.fp8 else { return Ok(false) };
        let Some(plan) = Plan::of(self.geometry, batch, self.kernels.processors) else { return Ok(false) };
        let padded = padded(batch, plan.kernel);
        let (columns, bytes) = (WIDTHS[plan.kernel].columns, arranged_bytes(padded, cols));
        let ours = self.family == Family::Blocks(GgmlType::Int4G128) && batch >= FEWEST_ROWS;
        if !ours || bytes > WORKSPACE || i32::try_from(batch).is_err() {
            return Ok(false);
        }
        let (stream, programmatic) = (self.device.cuda_stream(), programmatic(&self.kernels));
        let partial = if plan.cut > 0 { plan.grid * BLOCK_ROWS * columns } else { 0 };
        self.kernels.scratch.both(&self.device, bytes, partial, |arranged, partial, arrived| {
            let (weights, _weights) = self.weights.device_ptr(&stream);
            let (overflow, _overflow) = self.overflow.device_ptr(&stream);
            let (x, _x) = x.device_ptr(&stream);
            let (y, _y) = y.device_ptr_mut(&stream);
            let (arranged, _arranged) = arranged.device_ptr_mut(&stream);
            let (partial, _partial) = partial.device_ptr_mut(&stream);
            let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
            let kind = kind_of(dtype);
            let grid = Grid { blocks: [padded as u32, 1, 1], threads: 256, shared: 0 };
            let [batch, rows, cols, width, padded, cut] =
                [batch, rows, cols, columns, padded, plan.cut].map(|size| size as i32);
            let arrange = Arrange { x, out: arranged, x_type: kind, x_stride: cols, batch, cols, width, padded };
            // SAFETY: `x` holds `batch` rows, the workspace `padded` arranged ones; a block for each.
            unsafe { launch_with(&stream, &kernels.arrange, grid, &[(&raw const arrange).cast()], programmatic)? };
            let product = Prefill {
                weights,
                overflow,
                x: arranged,
                y,
                partial,
                arrived,
                rows,
                cols,
                batch,
                y_stride: rows,
                cut,
                by128: 128,
                by8: 8,
                y_type: kind,
            };
            let (function, shared) = &kernels.products[plan.kernel];
            let grid = Grid { blocks: [plan.grid as u32, 1, 1], threads: THREADS, shared: *shared as u32 };
            // SAFETY: memory of the sizes that the kernel expects, as checked above and planned; no more blocks than
            // multiprocessors, as they wait for each other.
            unsafe { launch_with(&stream, function, grid, &[(&raw const product).cast()], programmatic)? };
            Ok(true)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_leave_whole_rounds() {
        for (rows, cols) in [(1, 128), (130, 2048), (4096, 4096), (14336, 4096), (28672, 4096), (4096, 14336)] {
            for batch in [64, 65, 128, 200, 512, 1024] {
                for processors in [1, 2, 14, 114, 132] {
                    let Plan { kernel, grid, cut } = Plan::of(Geometry { rows, cols }, batch, processors).unwrap();
                    let blocks = rows.div_ceil(BLOCK_ROWS) * (padded(batch, kernel) / WIDTHS[kernel].columns);
                    assert!(grid > 0 && grid <= processors && cut <= blocks && cut < 2 * grid);
                    assert!(cut == 0 || (blocks - cut).is_multiple_of(grid));
                }
            }
        }
    }

    #[test]
    fn few_rows_take_narrow_blocks_and_long_rows_are_cut() {
        let plan = |rows, cols, batch| Plan::of(Geometry { rows, cols }, batch, 132).unwrap();
        assert_eq!(plan(14336, 4096, 64), Plan { kernel: 0, grid: 112, cut: 0 });
        assert_eq!(plan(4096, 4096, 512), Plan { kernel: 1, grid: 128, cut: 0 });
        assert_eq!(plan(4096, 14336, 64), Plan { kernel: 0, grid: 132, cut: 32 });
        assert_eq!(plan(28672, 4096, 512), Plan { kernel: 2, grid: 132, cut: 184 });
        // tests/cuda/fp8.rs takes each of the kernels, and cut blocks.
        let cases = [(40, 640, 64), (16_896, 128, 128), (16_896, 128, 256), (130, 17_920, 70)];
        let plans = cases.map(|(rows, cols, batch)| plan(rows, cols, batch));
        assert_eq!(plans.map(|plan| (plan.kernel, plan.cut > 0)), [(0, false), (1, false), (2, false), (0, true)]);
    }
}

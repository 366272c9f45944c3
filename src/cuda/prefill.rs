//! Products with many rows of activations on compute capability 9.0: weights are decoded into the registers of running
//! matrix products (`kernels/prefill.cuh`), nothing is decoded to memory.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaFunction, CudaModule, CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

use super::family::{Family, UNIT_COLS};
use super::kernels::function;
use super::launch::{Grid, launch_with, programmatic};
use super::packed::{Packed, kind_of};
use super::scratch::WORKSPACE;
use super::shares::{Plan, Width};
use super::stream;
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// Threads of a block.
pub(super) const THREADS: u32 = 384;
/// Rows of the matrix in a block.
pub(super) const ROWS: usize = 128;
/// Beyond so many rows of activations it is faster to decode once and leave the product to cuBLAS.
const MOST_ROWS: usize = 1024;

/// One for each kernel of a layout.
const WIDTHS: [Width; 3] = [
    Width::of(128, ROWS, 0.97, [5.0, 3.5]),
    Width::of(192, ROWS, 1.12, [6.0, 4.0]),
    Width::of(256, ROWS, 1.35, [10.0, 4.5]),
];

/// The argument: the struct of this name in `kernels/prefill_parts.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Prefill {
    weights: u64,
    overflow: u64,
    x: u64,
    y: u64,
    partial: u64,
    arrived: u64,
    rows: i32,
    cols: i32,
    batch: i32,
    y_stride: i32,
    cut: i32,
    by128: i32,
    by8: i32,
    /// As `kernels/activations.cuh` numbers it: BF16 but for FP8 products.
    y_type: i32,
    x_stride: i32,
    unused: i32,
    /// Room for `x` in the order in which `kernels/prefill.cuh` multiplies it.
    arranged: u64,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Prefill {}
const _: () = assert!(size_of::<Prefill>() == 96);

/// A product of `kernels/{stream,prefill,fp8,fp8_mma}.cuh`: how it is shared out, and the kernel.
#[derive(Clone, Copy)]
pub(super) struct Planned<'a> {
    pub plan: Plan,
    pub function: &'a CudaFunction,
    pub threads: u32,
    pub shared: usize,
}

/// Whether a layout has the kernels.
fn has(family: Family) -> bool {
    matches!(family, Family::Fixed | Family::Blocks(_))
}

/// A layout's kernels, one for each of [`WIDTHS`], and the shared memory that each may ask for.
pub(super) fn load(module: &Arc<CudaModule>, family: Family, shared: i32) -> Result<Vec<(CudaFunction, usize)>> {
    let name = |width: &Width| format!("{}_prefill_{}", family.prefix(), width.columns);
    WIDTHS.iter().filter(|_| has(family)).map(|width| function(module, &name(width), shared)).collect()
}

impl Packed {
    /// Enqueues `y = x · Wᵀ` for `batch` rows of `x` in `dtype`: false, with nothing done, if other kernels are faster.
    pub(super) fn prefill(
        &self,
        x: &CudaView<u8>,
        y: &mut CudaViewMut<u8>,
        batch: usize,
        dtype: Dtype,
    ) -> Result<bool> {
        let Geometry { rows, cols } = self.geometry;
        let faster = (stream::MOST_ROWS + 1..=MOST_ROWS).contains(&batch);
        if !self.kernels.warpgroups || !has(self.family) || dtype != Dtype::Bf16 || !faster {
            return Ok(false);
        }
        if batch * cols * 2 > x.len() || batch * rows * 2 > y.len() {
            return Err(Error::Invalid("a product that does not fit into its memory".into()));
        }
        let Some(plan) = Plan::of(&WIDTHS, self.geometry, batch, self.kernels.processors) else { return Ok(false) };
        let Some((function, shared)) = self.kernels.packed(self.family)?.prefill.get(plan.kernel) else {
            return Ok(false);
        };
        // Whole units of columns.
        let bytes = plan.padded * cols.next_multiple_of(UNIT_COLS) * 2;
        if bytes > WORKSPACE {
            return Ok(false);
        }
        let stream = self.device.cuda_stream();
        // A block may have pieces of two.
        self.kernels.scratch.both(&self.device, bytes, 2 * plan.partial(), |arranged, partial, arrived| {
            let (x, _x) = x.device_ptr(&stream);
            let (arranged, _arranged) = arranged.device_ptr_mut(&stream);
            let planned = Planned { plan, function, threads: THREADS, shared: *shared };
            // SAFETY: `x` and `y` hold `batch` rows, as checked above, `arranged` the plan's; the rest is as planned.
            unsafe { self.launch(planned, &self.weights, (x, arranged, y), (partial, arrived), (batch, dtype)) }
        })?;
        Ok(true)
    }

    /// Enqueues a product of `batch` rows. `x` and `arranged` are addresses, as the kernel wants them.
    ///
    /// # Safety
    /// `x`, `arranged` and `y` have the sizes that the kernel asks for `batch` rows of `dtype`; `weights` are this matrix's,
    /// `partial` and `arrived` as the plan has them, and the plan is of the kernel, with no more blocks than multiprocessors,
    /// as they wait for each other.
    pub(super) unsafe fn launch(
        &self,
        Planned { plan, function, threads, shared }: Planned,
        weights: &CudaSlice<u8>,
        (x, arranged, y): (u64, u64, &mut CudaViewMut<u8>),
        (partial, arrived): (&mut CudaSlice<f32>, &mut CudaSlice<u32>),
        (batch, dtype): (usize, Dtype),
    ) -> Result<()> {
        let Geometry { rows, cols } = self.geometry;
        let stream = self.device.cuda_stream();
        let (weights, _weights) = weights.device_ptr(&stream);
        let (overflow, _overflow) = self.overflow.device_ptr(&stream);
        let (y, _y) = y.device_ptr_mut(&stream);
        let (partial, _partial) = partial.device_ptr_mut(&stream);
        let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
        let [rows, cols, batch, cut] = [rows, cols, batch, plan.cut].map(|size| size as i32);
        let product = Prefill {
            weights,
            overflow,
            x,
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
            y_type: kind_of(dtype),
            x_stride: cols,
            unused: 0,
            arranged,
        };
        let grid = Grid { blocks: [plan.grid as u32, 1, 1], threads, shared: shared as u32 };
        let arguments = [(&raw const product).cast()];
        // SAFETY: as the caller says.
        unsafe { launch_with(&stream, function, grid, &arguments, programmatic(&self.kernels)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_take_narrow_blocks_and_narrow_matrices_are_cut() {
        let plan = |rows, cols, batch| Plan::of(&WIDTHS, Geometry { rows, cols }, batch, 132).unwrap();
        assert_eq!(
            plan(14336, 4096, 100),
            Plan { kernel: 0, columns: 128, rows: ROWS, padded: 128, grid: 112, cut: 0 }
        );
        assert_eq!(plan(8192, 2048, 512), Plan { kernel: 2, columns: 256, rows: ROWS, padded: 512, grid: 128, cut: 0 });
        assert_eq!(
            plan(4096, 14336, 512),
            Plan { kernel: 2, columns: 256, rows: ROWS, padded: 512, grid: 128, cut: 64 }
        );
        let any = plan(6144, 4096, 512);
        assert_eq!((any.kernel, any.grid, any.cut), (2, 132, 96));
        // The cases of tests/cuda/small.rs take each of the kernels, and cut blocks.
        let cases = [(40, 300, 70), (40, 1300, 70), (2112, 128, 600), (2176, 128, 1000), (2944, 128, 1000)];
        let plans = cases.map(|(rows, cols, batch)| plan(rows, cols, batch));
        let taken = plans.map(|plan| (plan.kernel, plan.cut > 0));
        assert_eq!(taken, [(0, false), (0, true), (0, false), (1, false), (2, false)]);
    }
}

//! Products with many rows of activations on compute capability 9.0: weights are decoded into the registers of running
//! matrix products (`kernels/prefill.cuh`), nothing is decoded to memory.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{
    CudaFunction, CudaModule, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
};

use super::family::{Family, UNIT_COLS};
use super::kernels::function;
use super::launch::{Grid, launch_with, programmatic};
use super::packed::{Packed, kind_of};
use super::scratch::WORKSPACE;
use super::shares::{Plan, Width};
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// Threads of a block.
const THREADS: u32 = 384;
/// Rows of the matrix in a block.
pub(super) const ROWS: usize = 128;
/// Beyond so many rows of activations it is faster to decode once and leave the product to cuBLAS.
const MOST_ROWS: usize = 1024;
/// Up to so many rows there are kernels of their own.
const FEW_ROWS: usize = 64;

/// One for each kernel.
const WIDTHS: [Width; 3] = [width(128, 39.0), width(192, 42.5), width(256, 52.0)];

/// `cost` is the time for 32 units; pieces take as long to add up as 8.3 units.
const fn width(columns: usize, cost: f64) -> Width {
    Width { columns, rows: ROWS, unit: cost / 32.0, meeting: 8.3 * cost / 32.0, evenly: None }
}

/// The kernels; no other compute capability than 9.0 has them.
#[derive(Debug)]
pub(super) struct PrefillKernels {
    arrange: CudaFunction,
    /// One for each of [`WIDTHS`], and the shared memory that it may ask for.
    products: [(CudaFunction, usize); 3],
}

impl PrefillKernels {
    pub fn load(module: &Arc<CudaModule>, shared: i32) -> Result<PrefillKernels> {
        let [a, b, c] = WIDTHS.map(|width| function(module, &format!("fixed_prefill_{}", width.columns), shared));
        Ok(PrefillKernels { arrange: function(module, "prefill_arrange", 0)?.0, products: [a?, b?, c?] })
    }
}

/// The arguments: the structs of these names in `kernels/prefill_parts.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arrange {
    x: u64,
    out: u64,
    x_stride: i32,
    batch: i32,
    cols: i32,
    width: i32,
    padded: i32,
    unused: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Prefill {
    pub weights: u64,
    pub overflow: u64,
    pub x: u64,
    pub y: u64,
    pub partial: u64,
    pub arrived: u64,
    pub rows: i32,
    pub cols: i32,
    pub batch: i32,
    pub y_stride: i32,
    pub cut: i32,
    pub by128: i32,
    pub by8: i32,
    /// As `kernels/activations.cuh` numbers it: BF16 for `fixed`.
    pub y_type: i32,
    /// Of `kernels/stream.cuh`, whose activations are not arranged.
    pub x_stride: i32,
    pub unused: i32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Arrange {}
const _: () = assert!(size_of::<Arrange>() == 40);
// SAFETY: as above.
unsafe impl DeviceRepr for Prefill {}
const _: () = assert!(size_of::<Prefill>() == 88);

impl Packed {
    /// The kernels, if they are the fastest way to multiply with so many rows of activations.
    pub(super) fn prefills(&self, batch: usize, dtype: Dtype) -> Option<&PrefillKernels> {
        let faster = (FEW_ROWS + 1..=MOST_ROWS).contains(&batch);
        let fits = arranged_bytes(batch.next_multiple_of(WIDTHS[2].columns), self.geometry.cols) <= WORKSPACE;
        let taken = faster && fits && dtype == Dtype::Bf16 && self.family == Family::Fixed;
        self.kernels.prefill.as_ref().filter(|_| taken)
    }

    /// Enqueues `y = x · Wᵀ` for `batch` rows of BF16: false, with nothing done, if that cannot be.
    pub(super) fn prefill(
        &self,
        kernels: &PrefillKernels,
        x: &CudaView<u8>,
        y: &mut CudaViewMut<u8>,
        batch: usize,
    ) -> Result<bool> {
        let Geometry { rows, cols } = self.geometry;
        if batch * cols * 2 > x.len() || batch * rows * 2 > y.len() {
            return Err(Error::Invalid("a product that does not fit into its memory".into()));
        }
        let Some(plan) = Plan::of(&WIDTHS, self.geometry, batch, self.kernels.processors) else { return Ok(false) };
        let bytes = arranged_bytes(plan.padded, cols);
        let [m, columns, width, padded] = [batch, cols, plan.columns, plan.padded].map(|size| size as i32);
        let arrange = |launch: Arranging| {
            let Arranging { stream, x, out, programmatic } = launch;
            let arrange = Arrange { x, out, x_stride: columns, batch: m, cols: columns, width, padded, unused: 0 };
            // A thread for each vector of 32 columns.
            let grid = Grid { blocks: [(bytes / 64).div_ceil(256) as u32, 1, 1], threads: 256, shared: 0 };
            // SAFETY: `x` holds `batch` rows, the workspace `padded` rows of whole units.
            unsafe { launch_with(stream, &kernels.arrange, grid, &[(&raw const arrange).cast()], programmatic) }
        };
        let product = &kernels.products[plan.kernel];
        // SAFETY: `x` and `y` hold the rows, as checked above; the kernel and `bytes` are the plan's.
        unsafe { self.multiply_arranged(plan, product, bytes, (x, y), (batch, Dtype::Bf16), arrange)? };
        Ok(true)
    }

    /// Enqueues `arrange`, which writes `bytes` of arranged activations, and the product of `batch` rows with them.
    ///
    /// # Safety
    /// `x` and `y` hold `batch` rows of `dtype`; `product` is a kernel, with its shared memory, that takes the matrix, the
    /// plan and what `arrange` writes.
    pub(super) unsafe fn multiply_arranged(
        &self,
        plan: Plan,
        (function, shared): &(CudaFunction, usize),
        bytes: usize,
        (x, y): (&CudaView<u8>, &mut CudaViewMut<u8>),
        (batch, dtype): (usize, Dtype),
        arrange: impl FnOnce(Arranging) -> Result<()>,
    ) -> Result<()> {
        let Geometry { rows, cols } = self.geometry;
        let (stream, programmatic) = (self.device.cuda_stream(), programmatic(&self.kernels));
        self.kernels.scratch.both(&self.device, bytes, plan.partial(), |arranged, partial, arrived| {
            let (weights, _weights) = self.weights.device_ptr(&stream);
            let (overflow, _overflow) = self.overflow.device_ptr(&stream);
            let (x, _x) = x.device_ptr(&stream);
            let (y, _y) = y.device_ptr_mut(&stream);
            let (arranged, _arranged) = arranged.device_ptr_mut(&stream);
            let (partial, _partial) = partial.device_ptr_mut(&stream);
            let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
            arrange(Arranging { stream: &stream, x, out: arranged, programmatic })?;
            let product = Prefill {
                weights,
                overflow,
                x: arranged,
                y,
                partial,
                arrived,
                rows: rows as i32,
                cols: cols as i32,
                batch: batch as i32,
                y_stride: rows as i32,
                cut: plan.cut as i32,
                by128: 128,
                by8: 8,
                y_type: kind_of(dtype),
                ..Prefill::default()
            };
            let grid = Grid { blocks: [plan.grid as u32, 1, 1], threads: THREADS, shared: *shared as u32 };
            // SAFETY: memory of the sizes that the kernel expects, as the caller says and as planned; no more blocks than
            // multiprocessors, as they wait for each other.
            unsafe { launch_with(&stream, function, grid, &[(&raw const product).cast()], programmatic) }
        })
    }
}

/// What the kernel that arranges activations is launched with.
pub(super) struct Arranging<'a> {
    pub stream: &'a Arc<CudaStream>,
    /// Where activations are, and where they go.
    pub x: u64,
    pub out: u64,
    pub programmatic: bool,
}

/// Bytes of arranged activations: whole units of columns.
fn arranged_bytes(rows: usize, cols: usize) -> usize {
    rows * cols.next_multiple_of(UNIT_COLS) * 2
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
            Plan { kernel: 2, columns: 256, rows: ROWS, padded: 512, grid: 132, cut: 64 }
        );
        // The cases of tests/cuda/small.rs take each of the kernels, and cut blocks.
        let cases = [(40, 520, 70), (40, 1300, 70), (2112, 128, 600), (2176, 128, 1000), (2944, 128, 1000)];
        let plans = cases.map(|(rows, cols, batch)| plan(rows, cols, batch));
        let taken = plans.map(|plan| (plan.kernel, plan.cut > 0));
        assert_eq!(taken, [(0, false), (0, true), (0, false), (1, false), (2, false)]);
    }
}

//! Products with many rows of activations on compute capability 9.0, where nothing is decoded to memory. Up to some rows weights
//! are decoded into shared memory by some warps and multiplied there by others (`kernels/prefill.cuh`); beyond, `fixed` has
//! kernels that decode into the registers of running products (`kernels/prefill_wide.cuh`).
#![allow(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaFunction, CudaModule, CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

use super::family::{Family, UNIT_COLS};
use super::kernels::function;
use super::launch::{Grid, launch_with, programmatic};
use super::packed::{Packed, kind_of};
use super::scratch::WORKSPACE;
use super::shares::{Plan, Width};
use super::tensor_map::TensorMap;
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// One for each kernel of `fixed` for up to [`FEW_ROWS`] rows: blocks of neighbouring rows of the matrix share activations, or a
/// block's columns are cut into parts.
const FIXED: [Width; 9] = [
    width(32, 2, 1, 0.87, 4.0),
    width(64, 2, 1, 0.95, 4.0),
    width(128, 2, 1, 1.09, 6.0),
    width(32, 2, 2, 0.87, 0.5),
    width(32, 3, 3, 0.87, 0.5),
    width(64, 2, 2, 0.95, 0.5),
    width(64, 3, 3, 0.95, 0.5),
    width(128, 2, 2, 1.09, 0.9),
    width(128, 3, 3, 1.09, 0.9),
];
/// Likewise of block formats.
const BLOCKS: [Width; 2] = [width(64, 2, 1, 1.15, 4.0), width(128, 2, 1, 1.4, 6.0)];
/// Of `fixed` for more; pieces take as long to add up as 8.3 units.
const WIDE: [Width; 2] =
    [width(192, 1, 1, 42.5 / 32.0, 8.3 * 42.5 / 32.0), width(256, 1, 1, 52.0 / 32.0, 8.3 * 52.0 / 32.0)];
const FEW_ROWS: usize = 192;
/// Beyond so many it is faster to decode once and leave the product to cuBLAS.
const MOST_ROWS: usize = 1024;
const WIDE_THREADS: u32 = 384;

const fn width(columns: usize, cluster: usize, parts: usize, unit: f64, meeting: f64) -> Width {
    Width { columns, cluster, parts, unit, meeting }
}

/// The widths of a layout's kernels, and for how many rows they are the fastest.
fn widths(family: Family) -> Option<(&'static [Width], RangeInclusive<usize>)> {
    match family {
        Family::Fixed => Some((&FIXED, 17..=FEW_ROWS)),
        Family::Blocks(_) => Some((&BLOCKS, 65..=128)),
        _ => None,
    }
}

/// Threads of a block: eight warps that multiply, and those that decode and fetch.
fn threads(columns: usize) -> u32 {
    if columns < 128 { 800 } else { 544 }
}

/// A layout's kernels, and the shared memory that each may ask for: none but on compute capability 9.0.
pub(super) fn load(
    module: &Arc<CudaModule>,
    family: Family,
    prefix: &str,
    shared: i32,
) -> Result<Vec<(CudaFunction, usize)>> {
    let product = |&Width { columns, parts, .. }: &Width| match parts {
        1 => function(module, &format!("{prefix}_prefill_{columns}"), shared),
        _ => function(module, &format!("{prefix}_prefill_{columns}_in_{parts}"), shared),
    };
    widths(family).into_iter().flat_map(|(widths, _)| widths).map(product).collect()
}

/// The kernels that are not a layout's own; no other compute capability than 9.0 has them.
#[derive(Debug)]
pub(super) struct PrefillKernels {
    pad: CudaFunction,
    arrange: CudaFunction,
    /// One for each of [`WIDE`], and the shared memory that it may ask for.
    wide: [(CudaFunction, usize); 2],
}

impl PrefillKernels {
    pub fn load(narrow: &Arc<CudaModule>, wide: &Arc<CudaModule>, shared: i32) -> Result<PrefillKernels> {
        let [a, b] = WIDE.map(|width| function(wide, &format!("fixed_prefill_{}", width.columns), shared));
        let (pad, arrange) = (function(narrow, "prefill_pad", 0)?.0, function(wide, "prefill_arrange", 0)?.0);
        Ok(PrefillKernels { pad, arrange, wide: [a?, b?] })
    }
}

/// The argument of the kernel that pads rows: the struct of this name in `kernels/prefill_pad.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Pad {
    x: u64,
    out: u64,
    x_stride: i32,
    out_stride: i32,
    cols: i32,
    unused: i32,
}

/// The argument of the kernel that arranges activations: the struct of this name in `kernels/prefill_wide_parts.cuh`.
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

/// The argument of products: the struct of this name in `kernels/prefill_parts.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Prefill {
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
    /// As `kernels/activations.cuh` numbers it.
    y_type: i32,
    box_rows: i32,
    unused: i32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Pad {}
const _: () = assert!(size_of::<Pad>() == 32);
// SAFETY: as above.
unsafe impl DeviceRepr for Arrange {}
const _: () = assert!(size_of::<Arrange>() == 40);
// SAFETY: as above.
unsafe impl DeviceRepr for Prefill {}
const _: () = assert!(size_of::<Prefill>() == 88);

/// What a product is besides its matrix.
pub(super) struct Arguments {
    /// Activations, where the kernel takes an address, and results.
    pub x: u64,
    pub y: u64,
    pub batch: usize,
    /// Of the results.
    pub dtype: Dtype,
    pub plan: Plan,
    /// Rows of activations that a block fetches at once, where it takes a map of them.
    pub box_rows: usize,
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
        let Some(kernels) = self.kernels.prefill.as_ref().filter(|_| dtype == Dtype::Bf16) else { return Ok(false) };
        let Some((widths, range)) = widths(self.family) else { return Ok(false) };
        let wide = self.family == Family::Fixed && (FEW_ROWS + 1..=MOST_ROWS).contains(&batch);
        if !wide && !range.contains(&batch) {
            return Ok(false);
        }
        if batch * cols * 2 > x.len() || batch * rows * 2 > y.len() {
            return Err(Error::Invalid("a product that does not fit into its memory".into()));
        }
        if wide {
            return self.prefill_wide(kernels, x, y, batch);
        }
        let products = &self.kernels.packed(self.family)?.prefill;
        let bytes = batch * stride(cols) * 2;
        if bytes > WORKSPACE {
            return Ok(false);
        }
        let Some(plan) = Plan::of(widths, self.geometry, batch, self.kernels.processors) else { return Ok(false) };
        let Width { columns, cluster, parts, .. } = widths[plan.kernel];
        // Blocks that share activations fetch as many rows of them each, no more than there are.
        let box_rows = batch.min(columns).div_ceil(cluster / parts).next_multiple_of(8);
        let (stream, programmatic) = (self.device.cuda_stream(), programmatic(&self.kernels));
        let (x, _x) = x.device_ptr(&stream);
        let (y, _y) = y.device_ptr_mut(&stream);
        let (as_it_is, stride) = (TensorMap::takes(x, cols), stride(cols));
        let bytes = if as_it_is { 0 } else { bytes };
        self.kernels.scratch.both(&self.device, bytes, plan.partial(), |padded, partial, arrived| {
            let (out, _out) = padded.device_ptr_mut(&stream);
            if !as_it_is {
                let [x_stride, out_stride] = [cols, stride].map(|size| size as i32);
                let pad = Pad { x, out, x_stride, out_stride, cols: x_stride, unused: 0 };
                let grid = Grid { blocks: [batch as u32, 1, 1], threads: 256, shared: 0 };
                // SAFETY: `x` holds `batch` rows and so does the workspace, padded; a block for each.
                unsafe { launch_with(&stream, &kernels.pad, grid, &[(&raw const pad).cast()], programmatic)? };
            }
            let (from, stride) = if as_it_is { (x, cols) } else { (out, stride) };
            let map = TensorMap::of(from, [batch, cols], stride, box_rows, Dtype::Bf16)?;
            let (function, shared) = &products[plan.kernel];
            let grid = Grid { blocks: [plan.grid as u32, 1, 1], threads: threads(columns), shared: *shared as u32 };
            let arguments = Arguments { x: 0, y, batch, dtype: Dtype::Bf16, plan, box_rows };
            self.with_prefill(&arguments, (partial, arrived), |product| {
                let arguments = [(&raw const map).cast(), (&raw const *product).cast()];
                // SAFETY: the map is of `batch` rows and `y` holds as many; the kernel is the plan's, and there are no more
                // blocks than multiprocessors, as they wait for each other.
                unsafe { launch_with(&stream, function, grid, &arguments, programmatic) }
            })
        })?;
        Ok(true)
    }

    /// The same with the kernels for more rows, for which activations are arranged.
    fn prefill_wide(
        &self,
        kernels: &PrefillKernels,
        x: &CudaView<u8>,
        y: &mut CudaViewMut<u8>,
        batch: usize,
    ) -> Result<bool> {
        let cols = self.geometry.cols;
        let Some(plan) = Plan::of(&WIDE, self.geometry, batch, self.kernels.processors) else { return Ok(false) };
        let bytes = plan.padded * cols.next_multiple_of(UNIT_COLS) * 2;
        if bytes > WORKSPACE {
            return Ok(false);
        }
        let (stream, programmatic) = (self.device.cuda_stream(), programmatic(&self.kernels));
        let (x, _x) = x.device_ptr(&stream);
        let (y, _y) = y.device_ptr_mut(&stream);
        self.kernels.scratch.both(&self.device, bytes, plan.partial(), |arranged, partial, arrived| {
            let (out, _out) = arranged.device_ptr_mut(&stream);
            let [m, columns, width, padded] = [batch, cols, plan.columns, plan.padded].map(|size| size as i32);
            let arrange = Arrange { x, out, x_stride: columns, batch: m, cols: columns, width, padded, unused: 0 };
            // A thread for each vector of 32 columns.
            let grid = Grid { blocks: [(bytes / 64).div_ceil(256) as u32, 1, 1], threads: 256, shared: 0 };
            // SAFETY: `x` holds `batch` rows, the workspace `padded` rows of whole units.
            unsafe { launch_with(&stream, &kernels.arrange, grid, &[(&raw const arrange).cast()], programmatic)? };
            let (function, shared) = &kernels.wide[plan.kernel];
            let grid = Grid { blocks: [plan.grid as u32, 1, 1], threads: WIDE_THREADS, shared: *shared as u32 };
            let arguments = Arguments { x: out, y, batch, dtype: Dtype::Bf16, plan, box_rows: 0 };
            self.with_prefill(&arguments, (partial, arrived), |product| {
                // SAFETY: `y` holds the rows, the workspace what the kernel reads, and there are no more blocks than
                // multiprocessors, as they wait for each other.
                unsafe { launch_with(&stream, function, grid, &[(&raw const *product).cast()], programmatic) }
            })
        })?;
        Ok(true)
    }

    /// Calls `launch` with the argument of a product.
    pub(super) fn with_prefill(
        &self,
        &Arguments { x, y, batch, dtype, plan, box_rows }: &Arguments,
        (partial, arrived): (&mut CudaSlice<f32>, &mut CudaSlice<u32>),
        launch: impl FnOnce(&Prefill) -> Result<()>,
    ) -> Result<()> {
        let stream = self.device.cuda_stream();
        let (weights, _weights) = self.weights.device_ptr(&stream);
        let (overflow, _overflow) = self.overflow.device_ptr(&stream);
        let (partial, _partial) = partial.device_ptr_mut(&stream);
        let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
        let Geometry { rows, cols } = self.geometry;
        let [rows, cols, batch, cut, box_rows] = [rows, cols, batch, plan.cut, box_rows].map(|size| size as i32);
        launch(&Prefill {
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
            box_rows,
            unused: 0,
        })
    }
}

/// Elements from one padded row of activations to the next.
fn stride(cols: usize) -> usize {
    cols.next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_take_narrow_blocks_and_small_matrices_are_cut() {
        let plan = |widths: &[Width], rows, cols, batch| {
            let plan = Plan::of(widths, Geometry { rows, cols }, batch, 132).unwrap();
            (plan.columns, widths[plan.kernel].parts, plan.grid, plan.cut)
        };
        assert_eq!(plan(&FIXED, 14336, 4096, 100), (128, 1, 112, 0));
        assert_eq!(plan(&FIXED, 28672, 4096, 64), (64, 1, 132, 112));
        assert_eq!(plan(&FIXED, 8192, 2048, 64), (64, 2, 128, 64));
        assert_eq!(plan(&FIXED, 4096, 4096, 32), (32, 3, 96, 32));
        assert_eq!(plan(&WIDE, 8192, 2048, 512), (256, 1, 128, 0));
        assert_eq!(plan(&WIDE, 4096, 14336, 512), (256, 1, 132, 64));
        assert_eq!(plan(&BLOCKS, 14336, 4096, 128), (128, 1, 132, 56));
        // The cases of tests/cuda/small.rs take each of the kernels, and cut blocks.
        let cases = [
            ((16, 200, 20), (32, 2, 2, 1)),
            ((40, 520, 20), (32, 3, 3, 1)),
            ((300, 2600, 20), (32, 1, 84, 2)),
            ((9000, 128, 40), (64, 1, 72, 0)),
            ((6000, 640, 64), (64, 2, 94, 47)),
            ((3000, 640, 64), (64, 3, 72, 24)),
            ((17_000, 300, 70), (128, 1, 132, 0)),
            ((6000, 640, 128), (128, 2, 94, 47)),
            ((3000, 640, 128), (128, 3, 72, 24)),
        ];
        for ((rows, cols, batch), expected) in cases {
            assert_eq!(plan(&FIXED, rows, cols, batch), expected, "{rows}x{cols} {batch}");
        }
        assert_eq!(plan(&BLOCKS, 40, 768, 70).0, 64);
        assert_eq!(plan(&BLOCKS, 17_000, 256, 128).0, 128);
        assert_eq!(plan(&WIDE, 2176, 128, 1000), (192, 1, 102, 0));
        assert_eq!(plan(&WIDE, 2944, 128, 1000), (256, 1, 92, 0));
        assert_eq!(plan(&WIDE, 40, 1300, 200), (192, 1, 22, 2));
    }
}

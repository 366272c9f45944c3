//! Products of 4-bit integers in groups of 128 with activations rounded to FP8 (e4m3): by whole warpgroups on compute
//! capability 9.0 (`kernels/fp8.cuh`), by warps on 8.9 and from 10.0 on (`kernels/fp8_mma.cuh`).
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaFunction, CudaModule, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

use super::family::{Family, UNIT_COLS};
use super::kernels::function;
use super::launch::{Grid, launch_with, programmatic};
use super::packed::{Packed, kind_of};
use super::prefill::{Planned, ROWS, THREADS};
use super::scratch::WORKSPACE;
use super::shares::{Plan, Width};
use crate::codec::kquant::GgmlType;
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// From so many rows of activations on.
const FEWEST_ROWS: usize = 64;
/// Units whose sums of activations lie together.
const SUMS: usize = 16;

/// One for each kernel of whole warpgroups.
const WIDTHS: [Width; 3] = [
    Width { columns: 64, rows: ROWS, unit: 0.43, meeting: 6.0, evenly: None },
    Width { columns: 128, rows: ROWS, unit: 0.58, meeting: 6.5, evenly: None },
    Width { columns: 256, rows: ROWS, unit: 1.06, meeting: 12.0, evenly: None },
];
/// One for each kernel of warps. The times are those of an RTX 4090 by the budget in `kernels/fp8_mma.cuh`; no GPU of
/// compute capability 8.9 was at hand to measure them.
const MMA_WIDTHS: [Width; 2] = [
    Width { columns: 64, rows: ROWS, unit: 1.1, meeting: 5.0, evenly: None },
    Width { columns: 128, rows: ROWS, unit: 1.6, meeting: 7.0, evenly: None },
];
/// Threads of their blocks.
const MMA_THREADS: u32 = 256;

/// The kernels of a GPU.
#[derive(Debug)]
pub(super) struct Fp8Kernels {
    arrange: CudaFunction,
    widths: &'static [Width],
    /// One for each of `widths`, and the shared memory that it may ask for.
    products: Vec<(CudaFunction, usize)>,
    threads: u32,
}

impl Fp8Kernels {
    /// Those of `kernels/fp8.cu`.
    pub fn load(module: &Arc<CudaModule>, shared: i32) -> Result<Fp8Kernels> {
        Fp8Kernels::named(module, "fp8_product", &WIDTHS, (THREADS, shared))
    }

    /// Those of `kernels/fp8_mma.cu`.
    pub fn load_mma(module: &Arc<CudaModule>, shared: i32) -> Result<Fp8Kernels> {
        Fp8Kernels::named(module, "fp8_mma_product", &MMA_WIDTHS, (MMA_THREADS, shared))
    }

    fn named(
        module: &Arc<CudaModule>,
        name: &str,
        widths: &'static [Width],
        (threads, shared): (u32, i32),
    ) -> Result<Fp8Kernels> {
        let product = |width: &Width| function(module, &format!("{name}_{}", width.columns), shared);
        let products = widths.iter().map(product).collect::<Result<_>>()?;
        Ok(Fp8Kernels { arrange: function(module, "fp8_arrange", 0)?.0, widths, products, threads })
    }
}

/// The argument: the struct `Fp8Arrange` in `kernels/fp8_parts.cuh`.
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

/// Threads that arrange a row of activations, each of which takes eight values at a time: `fp8_arrangers` in
/// `kernels/fp8_parts.cuh`.
fn arrangers(cols: i32) -> u32 {
    let eights = cols.unsigned_abs() / 8;
    eights.div_ceil(32 * eights.div_ceil(1024).max(1)) * 32
}

/// Bytes of arranged activations: e4m3, sums of units, a factor for each row (`Fp8Arranged` in `kernels/fp8_parts.cuh`).
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
        let ours = self.family == Family::Blocks(GgmlType::Int4G128) && batch >= FEWEST_ROWS;
        let kernels = if ours { self.kernels.fp8()? } else { None };
        let Some(kernels) = kernels else { return Ok(false) };
        let Some(plan) = Plan::of(kernels.widths, self.geometry, batch, self.kernels.processors) else {
            return Ok(false);
        };
        let bytes = arranged_bytes(plan.padded, cols);
        if bytes > WORKSPACE || i32::try_from(batch).is_err() {
            return Ok(false);
        }
        let Some((function, shared)) = kernels.products.get(plan.kernel) else { return Ok(false) };
        let stream = self.device.cuda_stream();
        self.kernels.scratch.both(&self.device, bytes, plan.partial(), |arranged, partial, arrived| {
            let (x, _x) = x.device_ptr(&stream);
            let (arranged, _arranged) = arranged.device_ptr_mut(&stream);
            let [m, cols, width, padded] = [batch, cols, plan.columns, plan.padded].map(|size| size as i32);
            let x_type = kind_of(dtype);
            let arrange = Arrange { x, out: arranged, x_type, x_stride: cols, batch: m, cols, width, padded };
            let grid = Grid { blocks: [plan.padded as u32, 1, 1], threads: arrangers(cols), shared: 0 };
            let arguments = [(&raw const arrange).cast()];
            // Few blocks would gather on the multiprocessors that the kernel before leaves first: they wait for its end.
            let early = plan.padded > 2 * self.kernels.processors && programmatic(&self.kernels);
            // SAFETY: `x` holds `batch` rows, as checked above, the workspace `padded` arranged ones; a block for each.
            unsafe { launch_with(&stream, &kernels.arrange, grid, &arguments, early)? };
            let planned = Planned { plan, function, threads: kernels.threads, shared: *shared };
            // SAFETY: `y` holds `batch` rows; the rest is as planned.
            unsafe { self.launch(planned, &self.weights, (arranged, 0, y), (partial, arrived), (batch, dtype)) }
        })?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_take_narrow_blocks_and_long_rows_are_cut() {
        let plan = |rows, cols, batch| {
            let Plan { kernel, grid, cut, .. } = Plan::of(&WIDTHS, Geometry { rows, cols }, batch, 132).unwrap();
            (kernel, grid, cut)
        };
        assert_eq!(plan(14336, 4096, 64), (0, 112, 0));
        assert_eq!(plan(4096, 4096, 512), (1, 128, 0));
        assert_eq!(plan(4096, 14336, 64), (0, 132, 32));
        assert_eq!(plan(28672, 4096, 512), (2, 132, 184));
        assert_eq!([128, 2048, 4096, 14336].map(arrangers), [32, 256, 512, 896]);
        // tests/cuda/fp8.rs takes each of the kernels, and cut blocks.
        let cases = [(40, 640, 64), (16_896, 128, 128), (16_896, 128, 256), (136, 17_920, 64), (512, 16_896, 120)];
        let plans = cases.map(|(rows, cols, batch)| plan(rows, cols, batch));
        let taken = plans.map(|(kernel, _, cut)| (kernel, cut > 0));
        assert_eq!(taken, [(0, false), (1, false), (2, false), (0, true), (1, true)]);
        // The kernels of warps too.
        let cases = [(40, 640, 64), (16_896, 128, 128), (136, 17_920, 64), (512, 16_896, 120)];
        let plans =
            cases.map(|(rows, cols, batch)| Plan::of(&MMA_WIDTHS, Geometry { rows, cols }, batch, 132).unwrap());
        assert_eq!(plans.map(|plan| (plan.kernel, plan.cut > 0)), [(0, false), (1, false), (0, true), (1, true)]);
    }
}

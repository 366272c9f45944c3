//! Products with some rows of activations in BF16 on compute capability 9.0: weights stream through the registers of running
//! matrix products (`kernels/stream.cuh`), activations are read as they are.
#![allow(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaFunction, CudaModule, CudaSlice, CudaView, CudaViewMut, DevicePtr};

use super::family::Family;
use super::kernels::function;
use super::packed::Packed;
use super::prefill::Planned;
use super::shares::{Plan, Share, Width};
use crate::codec::kquant::GgmlType;
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// More rows of activations have other kernels: [`super::prefill`].
pub(super) const MOST_ROWS: usize = 64;

/// One for each kernel of `fixed`.
const FIXED: [Width; 2] = [Width::of(32, 256, 1.44, [7.0, 4.5]), Width::of(64, 256, 1.65, [9.0, 6.0])];
/// Of block formats.
const BLOCKS: [Width; 2] = [Width::of(32, 256, 1.41, [6.0, 4.5]), Width::of(64, 256, 1.61, [8.5, 5.5])];
/// Of 4-bit integers in groups of 128.
const INTEGERS: [Width; 2] = [Width::of(32, 256, 0.9, [5.5, 4.3]), Width::of(64, 192, 0.97, [8.0, 5.3])];

/// The widths of a layout's kernels, and for how many rows of activations they are the fastest.
pub(super) fn widths(family: Family) -> Option<(&'static [Width], RangeInclusive<usize>)> {
    match family {
        Family::Fixed => Some((&FIXED, 17..=MOST_ROWS)),
        Family::Blocks(GgmlType::Int4G128) => Some((&INTEGERS, 17..=MOST_ROWS)),
        Family::Blocks(_) => Some((&BLOCKS, 17..=MOST_ROWS)),
        _ => None,
    }
}

/// Threads of a block: four warps for each 64 rows, and those that bring activations.
fn threads(rows: usize) -> u32 {
    if rows == 256 { 640 } else { 512 }
}

/// A layout's kernels, and the shared memory that each may ask for.
pub(super) fn load(module: &Arc<CudaModule>, family: Family, shared: i32) -> Result<Vec<(CudaFunction, usize)>> {
    let (widths, _) = widths(family).unwrap_or((&[], 0..=0));
    let name = |width: &Width| format!("{}_stream_{}", family.prefix(), width.columns);
    widths.iter().map(|width| function(module, &name(width), shared)).collect()
}

impl Packed {
    /// Enqueues `y = x · Wᵀ` for `batch` rows of `x` in `dtype`: false, with nothing done, if other kernels are faster.
    pub(super) fn stream(&self, x: &CudaView<u8>, y: &mut CudaViewMut<u8>, batch: usize, dtype: Dtype) -> Result<bool> {
        let preferred = self.preferred.iter().find(|(most, _)| batch <= *most).map(|(_, share)| *share);
        self.stream_as(&self.weights, (x, y), (batch, dtype), preferred)
    }

    /// The same with a copy of the weights, shared out as `share` says where that is possible.
    pub(super) fn stream_as(
        &self,
        weights: &CudaSlice<u8>,
        (x, y): (&CudaView<u8>, &mut CudaViewMut<u8>),
        (batch, dtype): (usize, Dtype),
        share: Option<Share>,
    ) -> Result<bool> {
        let (geometry, processors) = (self.geometry, self.kernels.processors);
        let Geometry { rows, cols } = geometry;
        let Some((widths, range)) = widths(self.family) else { return Ok(false) };
        if !self.kernels.warpgroups || dtype != Dtype::Bf16 || !range.contains(&batch) {
            return Ok(false);
        }
        if batch * cols * 2 > x.len() || batch * rows * 2 > y.len() || weights.len() != self.weights.len() {
            return Err(Error::Invalid("a product that does not fit into its memory".into()));
        }
        let shared = share.and_then(|share| Plan::shared(widths, share, geometry, batch, processors));
        let Some(plan) = shared.or_else(|| Plan::of(widths, geometry, batch, processors)) else { return Ok(false) };
        let Some((function, shared)) = self.kernels.packed(self.family)?.stream.get(plan.kernel) else {
            return Ok(false);
        };
        let stream = self.device.cuda_stream();
        // A block may have pieces of two.
        self.kernels.scratch.product(&self.device, 2 * plan.partial(), 0, |partial, arrived| {
            let (x, _x) = x.device_ptr(&stream);
            let planned = Planned { plan, function, threads: threads(plan.rows), shared: *shared };
            // SAFETY: `x` and `y` hold `batch` rows, as checked above; the rest is as planned.
            unsafe { self.launch(planned, weights, (x, 0, y), (partial, arrived), (batch, dtype)) }
        })?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_or_cut_into_pieces() {
        let plan = |widths: &[Width], rows, cols, batch| {
            let plan = Plan::of(widths, Geometry { rows, cols }, batch, 132).unwrap();
            (plan.columns, plan.grid, plan.cut)
        };
        assert_eq!(plan(&FIXED, 28672, 4096, 64), (64, 112, 0));
        assert_eq!(plan(&FIXED, 14336, 4096, 20), (32, 132, 56));
        assert_eq!(plan(&FIXED, 8192, 2048, 64), (64, 128, 32));
        assert_eq!(plan(&BLOCKS, 14336, 4096, 64), (64, 132, 56));
        // Those of tests/cuda/small.rs.
        assert_eq!(plan(&FIXED, 16, 200, 20), (32, 1, 0));
        assert_eq!(plan(&FIXED, 40, 1300, 40), (32, 12, 2));
        assert_eq!(plan(&FIXED, 17_000, 128, 40), (64, 67, 0));
        assert_eq!(plan(&BLOCKS, 600, 1280, 20), (32, 15, 3));
        assert_eq!(plan(&BLOCKS, 17_000, 256, 40), (64, 67, 0));
    }
}

//! Matrices of ggml's block formats: blocks travel as a file has them, and are laid out anew on the GPU.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{LaunchConfig, PushKernelArg};

use super::family::{Family, Pack, TILE_ROWS, stages, tile_bytes};
use super::kernels::{Kernels, driver, no_room, out_of_memory};
use super::packed::Packed;
use super::upload::upload;
use super::weight::{CudaWeight, Kept};
use crate::codec::kquant::GgmlType;
use crate::codec::{Dtype, Geometry};
use crate::matrix::kquant_row_bytes;
use crate::{Error, Result};

/// Bytes of blocks that are laid out at a time.
const CHUNK: usize = 32 << 20;

impl CudaWeight {
    /// Whether fused kernels take a block format. F32, F16, BF16 and Q8_K are to be multiplied as plain weights.
    pub fn takes(ty: GgmlType) -> bool {
        Family::BLOCKS.contains(&ty)
    }

    /// Uploads `rows × cols` weights given as blocks, row by row, and lays them out for products. Row `r` of the matrix is
    /// the blocks' row `order(r)`; whenever a part of `blocks` is no longer needed, `done` gets its range.
    ///
    /// # Errors
    /// If the format has no kernels, rows are not made of whole blocks, or `blocks` has another size; if the GPU is too old
    /// or its memory too small.
    pub fn from_blocks(
        ty: GgmlType,
        [rows, cols]: [usize; 2],
        blocks: &[u8],
        order: impl Fn(usize) -> usize,
        device: &CudaDevice,
        done: &dyn Fn(Range<usize>),
    ) -> Result<CudaWeight> {
        let row_bytes = kquant_row_bytes(ty, rows, cols, blocks.len())?;
        if !CudaWeight::takes(ty) {
            return Err(Error::Unsupported(format!("there are no kernels for weights of {ty}")));
        }
        if i32::try_from(rows.max(cols)).is_err() {
            return Err(Error::Unsupported(format!("a {rows}x{cols} matrix on a GPU: 2^31 is the limit")));
        }
        let pack = || {
            let kernels = Kernels::of(device)?;
            let mut packed = Packed::from_blocks(kernels, device, Family::Blocks(ty), Geometry { rows, cols })?;
            // Whole tiles, and at least one.
            let step = (CHUNK / row_bytes / TILE_ROWS).max(1) * TILE_ROWS;
            let mut chunk = Vec::with_capacity(step.min(rows) * row_bytes);
            for start in (0..rows).step_by(step) {
                let count = step.min(rows - start);
                chunk.clear();
                for row in start..start + count {
                    let at = order(row) * row_bytes;
                    let row = blocks.get(at..at + row_bytes);
                    chunk.extend_from_slice(row.ok_or_else(|| Error::Invalid("an order beyond the rows".into()))?);
                }
                packed.lay_out(&chunk, start, count)?;
                done(start * row_bytes..(start + count) * row_bytes);
            }
            // Products may fetch weights before the kernel that they follow has ended, so weights must be complete by then.
            driver(device.cuda_stream().synchronize())?;
            let why = packed.choose_shares()?;
            Ok(CudaWeight::of(Kept::Fused(Box::new(packed)), Dtype::F32, &format!("as the file has them; {why}")))
        };
        pack().map_err(|e| no_room(e, &format!("a {rows}x{cols} matrix of {ty}")))
    }
}

impl Packed {
    /// Memory for a matrix of blocks.
    fn from_blocks(kernels: Arc<Kernels>, device: &CudaDevice, family: Family, geometry: Geometry) -> Result<Packed> {
        let Geometry { rows, cols } = geometry;
        let bytes = rows.div_ceil(TILE_ROWS) * tile_bytes(family, cols);
        let weights = device.alloc_zeros::<u8>(bytes).map_err(|e| out_of_memory(e, bytes, "a matrix"))?;
        let overflow = device.alloc_zeros::<u32>(1)?;
        Ok(Packed {
            kernels,
            device: device.clone(),
            family,
            geometry,
            weights,
            overflow,
            row_scale: None,
            preferred: Vec::new(),
        })
    }

    /// Enqueues the upload and the laying out of `count` rows of blocks from row `start`, a multiple of 16, on.
    fn lay_out(&self, blocks: &[u8], start: usize, count: usize) -> Result<()> {
        let Pack::Blocks { repack } = &self.kernels.packed(self.family)?.pack else {
            return Err(Error::Invalid(format!("{:?} is not made from blocks", self.family)));
        };
        let (cols, tiles) = (self.geometry.cols, count.div_ceil(TILE_ROWS));
        let raw = upload(&self.device, &self.kernels, blocks)?;
        let each = tile_bytes(self.family, cols);
        let first = start / TILE_ROWS * each;
        let target = self.weights.slice(first..first + tiles * each);
        let (rows, columns) = (count as i32, cols as i32);
        let stream = self.device.cuda_stream();
        let mut launch = stream.launch_builder(repack);
        launch.arg(&raw).arg(&rows).arg(&columns).arg(&target).arg(&self.overflow);
        let blocks = (tiles * stages(cols)) as u32;
        let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: `raw` holds `count` rows of whole blocks, as `from_blocks` checked, and `target` the bytes of their tiles,
        // which nobody else knows of yet; `overflow` has a word.
        driver(unsafe { launch.launch(config) })?;
        Ok(())
    }
}

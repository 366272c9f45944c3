//! Packing: rows of a stream are decoded into the workspace, block by block, and put into units there.
#![allow(unsafe_code)]

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaSlice, LaunchConfig, PushKernelArg};

use super::decode::DeviceStream;
use super::family::{Family, Pack, TILE_ROWS, stages, tile_bytes};
use super::kernels::{driver, out_of_memory};
use super::packed::Packed;
use crate::codec::{Dtype, Geometry, Plan, ScaleLayout, TILE};
use crate::{Error, Result};

/// Scales of a quantised matrix.
pub(super) enum Scales {
    None,
    Rows(Vec<f32>),
    Tiles(Vec<f32>),
}

impl Scales {
    /// Those of a stream: one for the whole matrix is one for each row.
    pub fn of(plan: &Plan, geometry: Geometry, bytes: &[u8]) -> Scales {
        let scales = || bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b));
        match plan.scale {
            ScaleLayout::None | ScaleLayout::Levels => Scales::None,
            ScaleLayout::Matrix => Scales::Rows(vec![scales().next().unwrap_or(0.0); geometry.rows]),
            ScaleLayout::Row => Scales::Rows(scales().take(geometry.rows).collect()),
            ScaleLayout::Tile => Scales::Tiles(scales().take(geometry.tiles()).collect()),
        }
    }

    pub fn factors(&self) -> FactorsOf<'_> {
        match self {
            Scales::None => FactorsOf::Nothing,
            Scales::Rows(scales) => FactorsOf::Rows(scales),
            Scales::Tiles(scales) => FactorsOf::Tiles(scales),
        }
    }
}

/// Scales of a quantised matrix, as its stream has them.
#[derive(Clone, Copy, Debug)]
pub(super) enum FactorsOf<'a> {
    /// None: weights are what the stream has.
    Nothing,
    /// One for each row.
    Rows(&'a [f32]),
    /// One for each tile, row by row of the grid.
    Tiles(&'a [f32]),
}

/// What the passes that pack a matrix share.
struct Passes {
    /// Entries of the overflow list.
    capacity: u32,
    tile_scales: Option<CudaSlice<f32>>,
    /// 16 bytes for each stage of a block of rows.
    plan: CudaSlice<u8>,
    totals: CudaSlice<u32>,
}

impl Packed {
    /// Decodes a stream and packs it: weights that are exact in BF16, or quantised ones with their `scales`. `None` if the
    /// layout does not suit its weights: too many would have to be repaired one by one.
    pub fn new(stream: &DeviceStream, family: Family, scales: FactorsOf) -> Result<Option<Packed>> {
        let Geometry { rows, cols } = stream.geometry();
        let mut capacity = rows * cols / 256 + 1024;
        loop {
            let (packed, totals) = Packed::pack(stream, family, scales, capacity)?;
            let [used, repairs, overflowing, _, stages] = totals.map(|total| total as usize);
            if overflowing > stages / 64 + 1 || repairs > rows * cols / 400 + 1024 {
                return Ok(None);
            }
            if used <= capacity {
                return packed.shrink(used).map(Some);
            }
            capacity = used;
        }
    }

    /// Packs with an overflow list of `capacity` entries: the matrix, and what `repair_scan` counted.
    fn pack(stream: &DeviceStream, family: Family, scales: FactorsOf, capacity: usize) -> Result<(Packed, [u32; 5])> {
        let (kernels, device, geometry) = (stream.kernels().clone(), stream.device().clone(), stream.geometry());
        let Geometry { rows, cols } = geometry;
        let (Ok(_), Ok(_)) = (i32::try_from(rows), i32::try_from(cols)) else {
            return Err(Error::Unsupported(format!("a {rows}x{cols} matrix on a GPU: 2^31 is the limit")));
        };
        let bytes = rows.div_ceil(TILE_ROWS) * tile_bytes(family, cols);
        // SAFETY: every byte that kernels read is written by the packing kernel: all units, and the trailers.
        let weights = unsafe { device.alloc::<u8>(bytes) }.map_err(|e| out_of_memory(e, bytes, "a matrix"))?;
        // SAFETY: entries are written before the counts that make them read.
        let overflow = unsafe { device.alloc::<u32>(capacity.max(1)) };
        let overflow = overflow.map_err(|e| out_of_memory(e, 4 * capacity, "a list of repairs"))?;
        let (row_scale, tile_scales) = match scales {
            FactorsOf::Nothing => (None, None),
            FactorsOf::Rows(scales) => (Some(device.clone_htod(scales)?), None),
            FactorsOf::Tiles(scales) => (None, Some(device.clone_htod(scales)?)),
        };
        let packed = Packed { kernels, device, family, geometry, weights, overflow, row_scale, preferred: Vec::new() };
        let block = stream.block_rows(Dtype::Bf16);
        let mut passes = Passes {
            capacity: capacity as u32,
            tile_scales,
            plan: packed.device.alloc_zeros::<u8>(16 * stages(cols) * block.div_ceil(TILE_ROWS))?,
            totals: packed.device.alloc_zeros::<u32>(8)?,
        };
        packed.kernels.scratch.workspace(&packed.device, block * cols * 2, |dense| {
            for start in (0..rows).step_by(block) {
                let count = block.min(rows - start);
                match scales {
                    FactorsOf::Nothing => {
                        stream.decode_rows(start..start + count, Dtype::Bf16, &mut dense.as_view_mut())?;
                    }
                    _ => stream.decode_integers(start..start + count, &mut dense.as_view_mut())?,
                }
                packed.pack_block(start, count, dense, &mut passes)?;
            }
            Ok(())
        })?;
        let totals = driver(packed.device.cuda_stream().clone_dtoh(&passes.totals))?;
        stream.check()?;
        Ok((packed, std::array::from_fn(|i| totals.get(i).copied().unwrap_or(u32::MAX))))
    }

    /// Packs `count` decoded rows from `start` on.
    fn pack_block(&self, start: usize, count: usize, dense: &CudaSlice<u8>, passes: &mut Passes) -> Result<()> {
        let Passes { capacity, tile_scales, plan, totals } = passes;
        let stream = self.device.cuda_stream();
        let Pack::Rows { plan: plan_kernel, pack } = &self.kernels.packed(self.family)?.pack else {
            return Err(Error::Invalid(format!("{:?} is not made from decoded rows", self.family)));
        };
        let cols = self.geometry.cols;
        let blocks = count.div_ceil(TILE_ROWS) * stages(cols);
        let config = |blocks: usize, threads: u32| LaunchConfig {
            grid_dim: (blocks as u32, 1, 1),
            block_dim: (threads, 1, 1),
            shared_mem_bytes: 0,
        };
        let (rows, columns, stages) = (count as i32, cols as i32, blocks as i32);
        let mut launch = stream.launch_builder(plan_kernel);
        launch.arg(dense).arg(&rows).arg(&columns).arg(&columns).arg(&mut *plan);
        // SAFETY: `dense` holds `count` rows, `plan` 16 bytes for each block.
        driver(unsafe { launch.launch(config(blocks, 256)) })?;
        let mut launch = stream.launch_builder(&self.kernels.repair_scan);
        launch.arg(&mut *plan).arg(&stages).arg(&mut *totals);
        // SAFETY: as above; `totals` has 8 words.
        driver(unsafe { launch.launch(config(1, 1024)) })?;
        let first = start / TILE_ROWS * tile_bytes(self.family, cols);
        let target = self.weights.slice(first..first + count.div_ceil(TILE_ROWS) * tile_bytes(self.family, cols));
        let (scale_stride, row0, nothing) = (cols.div_ceil(TILE) as i32, start as i32, 0u64);
        let mut launch = stream.launch_builder(pack);
        launch.arg(dense).arg(&rows).arg(&columns).arg(&columns);
        match tile_scales {
            Some(scales) => _ = launch.arg(scales).arg(&scale_stride).arg(&row0),
            None if self.family.scaled() => _ = launch.arg(&nothing).arg(&scale_stride).arg(&row0),
            None => {}
        }
        launch.arg(&*plan).arg(&target).arg(&self.overflow).arg(&*capacity);
        // SAFETY: `target` has the bytes of these tiles, the list `capacity` entries; nobody else knows of either yet.
        driver(unsafe { launch.launch(config(blocks, 256)) })?;
        Ok(())
    }

    /// Keeps `used` entries of the overflow list.
    fn shrink(mut self, used: usize) -> Result<Packed> {
        let mut overflow = self.device.alloc_zeros::<u32>(used.max(1))?;
        if used > 0 {
            self.device.memcpy_dtod(&self.overflow.slice(..used), &mut overflow)?;
        }
        self.overflow = overflow;
        // Products may fetch weights before the kernel that they follow has ended, so weights must be complete by then.
        driver(self.device.cuda_stream().synchronize())?;
        Ok(self)
    }
}

//! Layout `pair`: exponents of BF16 weights in an entropy code, two weights a code word (`kernels/pair.cuh`). It is made in
//! `pair_packing.rs`.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DeviceRepr, LaunchConfig,
    PushKernelArg,
};

use super::family::{TILE_ROWS, stages};
use super::kernels::{Kernels, driver, function};
use super::launch_shape::{LaunchShape, PAIR_TABLE};
use super::packed::{Fused, whole_tiles};
use super::product::{Factor, Product, rows_each};
use crate::codec::{Dtype, Geometry};
use crate::matrix::GpuLayout;
use crate::{Error, Result};

/// Columns of activations that a launch takes.
const COLUMNS: usize = 16;

/// The kernels of the layout.
pub(super) struct PairKernels {
    pub levels: CudaFunction,
    pub count: CudaFunction,
    pub size: CudaFunction,
    pub scan: CudaFunction,
    pub pack: CudaFunction,
    /// With the shared memory that each may ask for, as all that follow.
    decode: (CudaFunction, usize),
    ids: (CudaFunction, usize),
    products: [(CudaFunction, usize); 2],
}

impl PairKernels {
    pub fn load(module: &Arc<CudaModule>, shared: i32) -> Result<PairKernels> {
        let plain = |name| Ok::<_, Error>(function(module, name, 0)?.0);
        Ok(PairKernels {
            levels: plain("pair_levels")?,
            count: plain("pair_count")?,
            size: plain("pair_size")?,
            scan: plain("pair_scan")?,
            pack: plain("pair_pack")?,
            decode: function(module, "pair_decode", shared)?,
            ids: function(module, "pair_ids", shared)?,
            products: [function(module, "pair_product_8", shared)?, function(module, "pair_product_16", shared)?],
        })
    }

    /// Whether blocks have the shared memory for a matrix whose largest stage takes `slot` bytes, of which at most
    /// `decode_slot` are no signs and mantissas.
    pub fn fit(&self, geometry: Geometry, slot: usize, decode_slot: usize, processors: usize) -> bool {
        let room = |kernel: &(CudaFunction, usize)| kernel.1;
        let row = LaunchShape::of_pair(geometry, slot, (processors, room(&self.products[0])), 1, 1, false);
        row.is_some() && PAIR_TABLE + slot <= room(&self.ids) && PAIR_TABLE + 2 * decode_slot <= room(&self.decode)
    }
}

/// The argument of a product: the struct of that name in `kernels/pair_product.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct PairProduct {
    product: Product,
    offsets: u64,
    slot_bytes: i32,
    pad: i32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for PairProduct {}
const _: () = assert!(size_of::<PairProduct>() == 136);

/// A matrix in the layout.
pub(super) struct Pair {
    pub(super) kernels: Arc<Kernels>,
    pub(super) device: CudaDevice,
    pub(super) geometry: Geometry,
    /// Stages of different sizes, and where each starts, in pieces of 16 bytes.
    pub(super) weights: CudaSlice<u8>,
    pub(super) offsets: CudaSlice<u32>,
    /// What the codes decode to.
    pub(super) table: CudaSlice<u32>,
    /// Shared memory for the largest stage, and for what decoders keep of one.
    pub(super) slot: usize,
    pub(super) decode_slot: usize,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pair({}x{})", self.geometry.rows, self.geometry.cols)
    }
}

/// A launch whose blocks have room for the table and `bytes` more.
fn config(grid_dim: (u32, u32, u32), bytes: usize) -> LaunchConfig {
    LaunchConfig { grid_dim, block_dim: (256, 1, 1), shared_mem_bytes: (PAIR_TABLE + bytes) as u32 }
}

impl Fused for Pair {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn device(&self) -> &CudaDevice {
        &self.device
    }

    fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    fn layout(&self) -> GpuLayout {
        GpuLayout::Pair
    }

    fn stored_bytes(&self) -> usize {
        self.weights.len() + 4 * (self.offsets.len() + self.table.len())
    }

    fn decodes_to(&self, dtype: Dtype) -> bool {
        dtype == Dtype::Bf16
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
        if dtype != Dtype::Bf16 {
            return Err(Error::Invalid(format!("a matrix in pairs as {}", dtype.name())));
        }
        let count = rows.len().div_ceil(TILE_ROWS) * stages(cols);
        if count == 0 {
            return Ok(());
        }
        let (height, cols, tile) = (height as i32, cols as i32, (rows.start / TILE_ROWS) as i32);
        // As many blocks as run at once.
        let blocks = count.min(3 * self.kernels.processors) as u32;
        let config = config((blocks, 1, 1), 2 * self.decode_slot);
        let (count, slot) = (count as i32, self.decode_slot as i32);
        let mut launch = stream.launch_builder(&self.kernels.pair.decode.0);
        launch.arg(&self.weights).arg(&self.offsets).arg(&self.table).arg(out);
        launch.arg(&height).arg(&cols).arg(&cols).arg(&tile).arg(&count).arg(&slot);
        // SAFETY: `count` stages are those of the rows, which `out` has room for; those past the matrix's end are not written.
        driver(unsafe { launch.launch(config) })?;
        Ok(())
    }

    fn ids_dtype(&self, _: Dtype) -> Dtype {
        Dtype::Bf16
    }

    fn decode_ids(&self, ids: &CudaView<u32>, out: &mut CudaViewMut<u8>, _: Dtype) -> Result<()> {
        let Geometry { rows, cols } = self.geometry;
        if ids.len() * cols * 2 > out.len() {
            return Err(Error::Invalid(format!("{} rows of a matrix in pairs into {} bytes", ids.len(), out.len())));
        }
        if ids.is_empty() {
            return Ok(());
        }
        let stream = self.device.cuda_stream();
        let config = config((ids.len() as u32, stages(cols) as u32, 1), self.slot);
        let (rows, cols) = (rows as i32, cols as i32);
        let mut launch = stream.launch_builder(&self.kernels.pair.ids.0);
        launch.arg(&self.weights).arg(&self.offsets).arg(&self.table).arg(ids).arg(out);
        launch.arg(&rows).arg(&cols).arg(&cols);
        // SAFETY: a block for each id and stage; `out` has a row for each id.
        driver(unsafe { launch.launch(config) })?;
        Ok(())
    }

    fn product(&self, x: &CudaView<u8>, y: &mut CudaViewMut<u8>, batch: usize, dtype: Dtype) -> Result<bool> {
        // Each launch reads all weights: that many take as long as decoding them and cuBLAS.
        let most = if dtype == Dtype::F32 { 8 } else { 2 };
        let Some(each) = rows_each(batch, dtype, COLUMNS, most) else { return Ok(false) };
        let Pair { kernels, device, geometry, weights, offsets, table, slot, .. } = self;
        let factor = Factor { kernels, device, geometry: *geometry, weights, overflow: table, row_scale: None };
        let shape = |batch, parts, programmatic| {
            let products = &kernels.pair.products;
            let room = (kernels.processors, products[0].1.min(products[1].1));
            let shape = LaunchShape::of_pair(*geometry, *slot, room, batch, parts, programmatic)?;
            Some((shape, &products.get(shape.kernel)?.0))
        };
        let stream = device.cuda_stream();
        let (offsets, _offsets) = offsets.device_ptr(&stream);
        let argument = |product| PairProduct { product, offsets, slot_bytes: *slot as i32, pad: 0 };
        // SAFETY: the matrix was packed for these kernels, and `LaunchShape` computes what they ask for.
        unsafe { factor.product((x, y), (batch, each), dtype, shape, argument) }
    }
}

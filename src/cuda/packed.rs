//! Layouts that fused kernels multiply with: units of 16×128 weights in the order of tensor-core fragments
//! (`kernels/unit.cuh`), made on the GPU from decoded rows.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
    PushKernelArg, sys,
};

use super::decode::DeviceStream;
use super::kernels::{Kernels, driver, function, out_of_memory};
use crate::codec::{Dtype, Geometry, TILE};
use crate::{Error, Result};

/// Rows and columns of a unit.
const TILE_ROWS: usize = 16;
const UNIT_COLS: usize = 128;

/// One of the layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    /// BF16 weights, 12 bits each: `kernels/fixed.cuh`.
    Fixed,
    /// Integers from −127 to 127 with scales: `kernels/integers.cuh`.
    Int8,
    /// Integers from −16 to 15 with scales.
    Int5,
    /// Integers from −8 to 7 with scales.
    Int4,
}

impl Family {
    pub const ALL: [Family; 4] = [Family::Fixed, Family::Int8, Family::Int5, Family::Int4];

    /// What its kernels' names begin with.
    fn prefix(self) -> &'static str {
        match self {
            Family::Fixed => "fixed",
            Family::Int8 => "int8",
            Family::Int5 => "int5",
            Family::Int4 => "int4",
        }
    }

    /// Bytes of a unit, and of the trailer of a stage of eight.
    fn bytes(self) -> (usize, usize) {
        match self {
            Family::Fixed => (3072, 96),
            Family::Int8 => (2048, 128),
            Family::Int5 => (1280, 128),
            Family::Int4 => (1024, 128),
        }
    }

    fn scaled(self) -> bool {
        self != Family::Fixed
    }

    fn stage_bytes(self) -> usize {
        let (unit, trailer) = self.bytes();
        Family::UNITS * unit + trailer
    }

    /// The most stages that a block keeps on their way: some 48 KB.
    fn in_flight(self) -> usize {
        (49_152 + self.stage_bytes() / 2) / self.stage_bytes()
    }

    /// Units of a stage.
    const UNITS: usize = 8;
}

/// The kernels of one layout.
#[derive(Debug)]
pub(super) struct PackedKernels {
    plan: CudaFunction,
    pack: CudaFunction,
    decode: CudaFunction,
    ids: CudaFunction,
    /// For up to 8, 16, 32 and 64 columns of activations, with the shared memory that each may ask for.
    products: [(CudaFunction, usize); 4],
}

impl PackedKernels {
    pub fn load(family: Family, module: &Arc<CudaModule>, shared: i32) -> Result<PackedKernels> {
        let prefix = family.prefix();
        let product = |columns: usize| function(module, &format!("{prefix}_product_{columns}"), shared);
        Ok(PackedKernels {
            plan: function(module, &format!("{prefix}_plan"), 0)?.0,
            pack: function(module, &format!("{prefix}_pack"), 0)?.0,
            decode: function(module, &format!("{prefix}_decode"), 0)?.0,
            ids: function(module, &format!("{prefix}_ids"), 0)?.0,
            products: [product(8)?, product(16)?, product(32)?, product(64)?],
        })
    }
}

/// Whether kernels may start before the one that they follow has ended; see [`set_programmatic_launch`].
static PROGRAMMATIC: AtomicBool = AtomicBool::new(true);

/// Lets products start, and fetch their weights, while the kernel before them still runs (programmatic dependent launch, from
/// compute capability 9.0 on). It is on; benchmarks turn it off to show what it gains.
pub fn set_programmatic_launch(on: bool) {
    PROGRAMMATIC.store(on, Ordering::Relaxed);
}

/// The argument of a product: the struct of that name in `kernels/product.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Product {
    weights: u64,
    overflow: u64,
    row_scale: u64,
    x: u64,
    bias: u64,
    y: u64,
    partial: u64,
    arrived: u64,
    rows: i32,
    cols: i32,
    batch: i32,
    x_stride: i32,
    y_stride: i32,
    x_type: i32,
    y_type: i32,
    groups: i32,
    slabs: i32,
    slots: i32,
    in_flight: i32,
    keep: i32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Product {}
const _: () = assert!(size_of::<Product>() == 112);

/// How a product is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    kernel: usize,
    groups: usize,
    slabs: usize,
    threads: u32,
    shared: usize,
    /// Stages in the ring, and on their way at most.
    slots: usize,
    in_flight: usize,
    /// Partial results that a block keeps before it adds them.
    keep: usize,
    /// Floats that blocks hand to each other.
    partial: usize,
}

/// A matrix in one of the layouts.
pub(super) struct Packed {
    kernels: Arc<Kernels>,
    device: CudaDevice,
    family: Family,
    geometry: Geometry,
    weights: CudaSlice<u8>,
    overflow: CudaSlice<u32>,
    /// A factor for each row.
    row_scale: Option<CudaSlice<f32>>,
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

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({:?} {}x{})", self.family, self.geometry.rows, self.geometry.cols)
    }
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
        let packed = Packed { kernels, device, family, geometry, weights, overflow, row_scale };
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
        let kernels = self.kernels.packed(self.family)?;
        let cols = self.geometry.cols;
        let blocks = count.div_ceil(TILE_ROWS) * stages(cols);
        let config = |blocks: usize, threads: u32| LaunchConfig {
            grid_dim: (blocks as u32, 1, 1),
            block_dim: (threads, 1, 1),
            shared_mem_bytes: 0,
        };
        let (rows, columns, stages) = (count as i32, cols as i32, blocks as i32);
        let mut launch = stream.launch_builder(&kernels.plan);
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
        let mut launch = stream.launch_builder(&kernels.pack);
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

    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    pub fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    pub fn family(&self) -> Family {
        self.family
    }

    pub fn stored_bytes(&self) -> usize {
        self.weights.len() + 4 * self.overflow.len() + self.row_scale.as_ref().map_or(0, |scale| 4 * scale.len())
    }

    /// The dtypes that [`Packed::decode_rows`] writes.
    pub fn decodes_to(&self, dtype: Dtype) -> bool {
        dtype == Dtype::Bf16 || self.family.scaled() && dtype == Dtype::F16
    }

    /// Enqueues the decoding of rows, which start at a multiple of 16.
    pub fn decode_rows(&self, rows: Range<usize>, dtype: Dtype, out: &mut CudaViewMut<u8>) -> Result<()> {
        let Geometry { rows: height, cols } = self.geometry;
        let whole = rows.end == height || rows.end.is_multiple_of(TILE_ROWS);
        let fits = rows.end <= height && rows.len() * cols * 2 <= out.len();
        if !whole || !rows.start.is_multiple_of(TILE_ROWS) || !fits || !self.decodes_to(dtype) {
            return Err(Error::Invalid(format!("rows {rows:?} of a packed matrix into {} bytes", out.len())));
        }
        let blocks = rows.len().div_ceil(TILE_ROWS) * stages(cols);
        if blocks == 0 {
            return Ok(());
        }
        let stream = self.device.cuda_stream();
        let (height, cols, tile) = (height as i32, cols as i32, (rows.start / TILE_ROWS) as i32);
        let (nothing, kind) = (0u64, i32::from(dtype == Dtype::F16));
        let mut launch = stream.launch_builder(&self.kernels.packed(self.family)?.decode);
        launch.arg(&self.weights).arg(&self.overflow);
        match &self.row_scale {
            Some(scale) => _ = launch.arg(scale),
            None if self.family.scaled() => _ = launch.arg(&nothing),
            None => {}
        }
        launch.arg(out);
        if self.family.scaled() {
            launch.arg(&kind);
        }
        launch.arg(&height).arg(&cols).arg(&cols).arg(&tile);
        let config = LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the grid covers these rows, which `out` has room for; those past the matrix's end are not written.
        driver(unsafe { launch.launch(config) })?;
        Ok(())
    }

    /// What [`Packed::decode_ids`] writes.
    pub fn ids_dtype(&self) -> Dtype {
        if self.family.scaled() { Dtype::F32 } else { Dtype::Bf16 }
    }

    /// Enqueues the decoding of the rows that `ids` name. An id outside the matrix gives zeros.
    pub fn decode_ids(&self, ids: &CudaView<u32>, out: &mut CudaViewMut<u8>) -> Result<()> {
        let Geometry { rows, cols } = self.geometry;
        if ids.len() * cols * self.ids_dtype().size() > out.len() {
            return Err(Error::Invalid(format!("{} rows of a packed matrix into {} bytes", ids.len(), out.len())));
        }
        if ids.is_empty() {
            return Ok(());
        }
        let stream = self.device.cuda_stream();
        let grid = (ids.len() as u32, stages(cols) as u32, 1);
        let (rows, cols, nothing) = (rows as i32, cols as i32, 0u64);
        let mut launch = stream.launch_builder(&self.kernels.packed(self.family)?.ids);
        launch.arg(&self.weights).arg(&self.overflow);
        match &self.row_scale {
            Some(scale) => _ = launch.arg(scale),
            None if self.family.scaled() => _ = launch.arg(&nothing),
            None => {}
        }
        launch.arg(ids).arg(out).arg(&rows).arg(&cols).arg(&cols);
        // SAFETY: a block for each id and stage; `out` has a row for each id.
        driver(unsafe { launch.launch(LaunchConfig { grid_dim: grid, block_dim: (256, 1, 1), shared_mem_bytes: 0 }) })?;
        Ok(())
    }

    /// Enqueues `y = x · Wᵀ` for `batch` rows of `x` in `dtype`, with fused kernels: false, with nothing done, if there are
    /// too many rows for them.
    pub fn product(&self, x: &CudaView<u8>, y: &mut CudaViewMut<u8>, batch: usize, dtype: Dtype) -> Result<bool> {
        let (parts, kind) = match dtype {
            Dtype::Bf16 => (1, 0),
            Dtype::F16 => (2, 1),
            _ => (3, 2),
        };
        let (Geometry { rows, cols }, size) = (self.geometry, dtype.size());
        if batch * cols * size > x.len() || batch * rows * size > y.len() {
            return Err(Error::Invalid("a product that does not fit into its memory".into()));
        }
        // F16 and F32 activations take two and three columns each; what exceeds 64 is launched in parts. F32 products on
        // tensor cores beat cuBLAS's even so, and decoded F32 weights would take twice the memory.
        let launches = (batch * parts).div_ceil(64);
        let most = if dtype == Dtype::F32 { 64 } else { 2 };
        if batch == 0 || dtype != Dtype::F32 && batch > 64 || launches > most {
            return Ok(false);
        }
        let each = batch.div_ceil(launches);
        let kernels = self.kernels.packed(self.family)?;
        let programmatic = self.kernels.programmatic && PROGRAMMATIC.load(Ordering::Relaxed);
        let Some(shape) = self.shape(kernels, each, parts, programmatic) else { return Ok(false) };
        let stream = self.device.cuda_stream();
        self.kernels.scratch.product(&self.device, shape.partial, |partial, arrived| {
            let (weights, _weights) = self.weights.device_ptr(&stream);
            let (overflow, _overflow) = self.overflow.device_ptr(&stream);
            let scale = self.row_scale.as_ref().map(|scale| scale.device_ptr(&stream));
            let row_scale = scale.as_ref().map_or(0, |(pointer, _)| *pointer);
            let (x, _x) = x.device_ptr(&stream);
            let (y, _y) = y.device_ptr_mut(&stream);
            let (partial, _partial) = partial.device_ptr_mut(&stream);
            let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
            for first in (0..batch).step_by(each) {
                let count = each.min(batch - first);
                let argument = Product {
                    weights,
                    overflow,
                    row_scale,
                    x: x + (first * cols * size) as u64,
                    bias: 0,
                    y: y + (first * rows * size) as u64,
                    partial,
                    arrived,
                    rows: rows as i32,
                    cols: cols as i32,
                    batch: count as i32,
                    x_stride: cols as i32,
                    y_stride: rows as i32,
                    x_type: kind,
                    y_type: kind,
                    groups: shape.groups as i32,
                    slabs: shape.slabs as i32,
                    slots: shape.slots as i32,
                    in_flight: shape.in_flight as i32,
                    keep: shape.keep as i32,
                };
                // SAFETY: memory of the sizes that the kernel expects, checked above and by `shape`.
                unsafe { launch(&stream, &kernels.products[shape.kernel].0, &shape, &argument, programmatic)? };
            }
            Ok(true)
        })
    }

    /// Grid and shared memory for `batch` activations of `parts` columns each, as `kernels/product.cuh` and
    /// `kernels/wide.cuh` ask for; `None` if no kernel can take them.
    fn shape(&self, kernels: &PackedKernels, batch: usize, parts: usize, programmatic: bool) -> Option<Shape> {
        let columns = batch * parts;
        let kernel = [8, 16, 32, 64].iter().position(|&most| columns <= most)?;
        let (unit, trailer) = self.family.bytes();
        let (stages, tiles) = (stages(self.geometry.cols), self.geometry.rows.div_ceil(TILE_ROWS));
        let (room, processors) = (kernels.products[kernel].1, self.kernels.processors);
        let slot = (Family::UNITS * (unit + trailer)).next_multiple_of(128);
        let shape = if kernel < 2 {
            let keep = if columns <= 4 { 8 } else { 32 / columns };
            let besides = |slabs: usize| {
                let width = stages.div_ceil(slabs) * Family::UNITS * UNIT_COLS;
                256 + keep * columns * 512 + columns * (2 * width + 64)
            };
            let mut slabs = (1..=stages).find(|&slabs| 3 * slot + besides(slabs) <= room)?;
            while tiles * slabs * 2 <= processors && slabs < stages {
                slabs += 1;
            }
            let wanted = if programmatic { 3 } else { 2 } * self.family.in_flight();
            let slots = ((room - besides(slabs)) / slot).min(wanted).clamp(3, 16);
            Shape {
                kernel,
                groups: tiles.min((processors / slabs).max(1)),
                slabs,
                threads: 288,
                shared: slots * slot + besides(slabs),
                slots,
                in_flight: self.family.in_flight().min(slots),
                keep,
                partial: if slabs > 1 { slabs * batch * tiles * TILE_ROWS } else { 0 },
            }
        } else {
            let besides = 256 + 2 * 8 * columns * 80;
            let slots = 73_728usize.div_ceil(self.family.stage_bytes()).min(8).min(room.checked_sub(besides)? / slot);
            if stages > processors || slots == 0 {
                return None;
            }
            Shape {
                kernel,
                groups: tiles.min(processors / stages),
                slabs: stages,
                threads: 256,
                shared: slots * slot + besides,
                slots,
                in_flight: slots,
                keep: 0,
                partial: if stages > 1 { stages * batch * tiles * TILE_ROWS } else { 0 },
            }
        };
        (4 * shape.partial <= super::scratch::WORKSPACE && shape.groups > 0).then_some(shape)
    }
}

/// Stages of a tile of `cols` columns.
fn stages(cols: usize) -> usize {
    cols.div_ceil(UNIT_COLS).div_ceil(Family::UNITS)
}

fn tile_bytes(family: Family, cols: usize) -> usize {
    let (unit, trailer) = family.bytes();
    cols.div_ceil(UNIT_COLS) * unit + stages(cols) * trailer
}

/// Rows that fit into a workspace of `bytes`: whole tiles of the stream, or whole bands where a tile does not fit.
pub(super) fn rows_within(bytes: usize, row: usize) -> usize {
    let whole = |rows: usize| bytes / row / rows * rows;
    match whole(TILE) {
        0 => whole(64).max(64),
        rows => rows,
    }
}

/// Enqueues a product.
///
/// # Safety
/// The argument's memory must have the sizes that `kernels/product.cuh` asks for, for as long as the stream uses it.
unsafe fn launch(
    stream: &cudarc::driver::CudaStream,
    function: &CudaFunction,
    shape: &Shape,
    argument: &Product,
    programmatic: bool,
) -> Result<()> {
    driver(stream.context().bind_to_thread())?;
    // SAFETY: a union of plain numbers, for which zeros are a value.
    let mut value: sys::CUlaunchAttributeValue = unsafe { std::mem::zeroed() };
    value.programmaticStreamSerializationAllowed = 1;
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value,
    };
    let config = sys::CUlaunchConfig {
        gridDimX: (shape.groups * shape.slabs) as u32,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: shape.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shape.shared as u32,
        hStream: stream.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: u32::from(programmatic),
    };
    let mut arguments = [(argument as *const Product).cast_mut().cast()];
    // SAFETY: the caller's; the driver copies the argument before it returns.
    driver(unsafe {
        sys::cuLaunchKernelEx(&config, function.cu_function(), arguments.as_mut_ptr(), std::ptr::null_mut()).result()
    })
}

//! BF16 matrices at rest, decoded and multiplied at speed: `kernels/rans.cu`. Every other stream, and columns that are no
//! multiple of 64, are left to the reference kernels.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
    PushKernelArg,
};

use super::decode::DeviceStream;
use super::hybrid::Activations;
use super::kernels::{Kernels, driver, function};
use super::launch::{Grid, launch_with, programmatic};
use super::memory::alloc;
use super::plan::Plan;
use super::product::columns_of;
use super::scratch::WORKSPACE;
use crate::codec::{self, Coding, Dtype, Geometry, Kind, ScaleLayout, TILE};
use crate::{Error, Result};

/// Warps of a block at most, and at least: they share a table.
const WARPS: usize = 32;
const FEWEST: usize = 4;
/// Shared memory: tables of a block, a warp's rings, and of a warp for each column of activations. Mirror `kernels/rans_band.cuh`.
const TABLES: usize = 4 * 4096 + 4 * 32 * 256;
/// Bytes of them in the index, where a pair of exponents is there once and not for every lane.
const TABLE: usize = 4 * 4096 + 4 * 256;
const RING: usize = 10 * 512;
const COLUMN: usize = 512;
/// Rows of a band.
const BAND: usize = 64;
/// Columns of a step of symbols.
const STEP: usize = 64;
/// Columns of activations of a launch.
const COLUMNS: usize = 8;
/// Rows of activations. More are faster with decoded weights: two take half as long again as one, four twice and a half.
const ROWS: usize = 2;

/// What the bands of a matrix are, for which there are kernels. Narrow: the last ones have less than 256 columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bands {
    Plain,
    Levels,
    Narrow,
    NarrowLevels,
}

impl Bands {
    /// What these kernels take a matrix for, if they take it.
    pub fn of(plan: &codec::Plan, geometry: Geometry, scales: &[u8]) -> Option<Bands> {
        let usual = (plan.kind, plan.dtype, plan.coding) == (Kind::Bf16, Dtype::Bf16, Coding::Rans)
            && (plan.class_bits, plan.raw_bits) == (4, 8)
            && geometry.cols.is_multiple_of(STEP);
        let narrow = !geometry.cols.is_multiple_of(TILE);
        match plan.scale {
            ScaleLayout::None if usual => Some(if narrow { Bands::Narrow } else { Bands::Plain }),
            ScaleLayout::Levels if usual && !saturate(geometry, scales) => {
                Some(if narrow { Bands::NarrowLevels } else { Bands::Levels })
            }
            _ => None,
        }
    }
}

/// Whether levels of a row and a column may add up to more than 255. Encoders write none above 127.
fn saturate(geometry: Geometry, levels: &[u8]) -> bool {
    let Some((rows, cols)) = levels.split_at_checked(geometry.rows) else { return true };
    let most = |levels: &[u8]| levels.iter().copied().max().unwrap_or(0);
    most(rows).checked_add(most(cols)).is_none()
}

/// Where the bands of a matrix lie, and where warps may start within them: the struct of that name, less the `Rans`, in
/// `kernels/rans_band.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Index {
    places: u64,
    later: u64,
    table: u64,
    parts: u32,
    rows: u32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Index {}
const _: () = assert!(size_of::<Index>() == 32);

/// Bytes of the place of a band, and of what has gone by before a part that is not a band's first.
const PLACE: usize = 16;
const PART: usize = 4 * 32 + 8;

/// The parts of a band: as few as give a multiprocessor so many warps that they hide each other's latency.
fn parts(bands: usize, processors: usize) -> usize {
    const ENOUGH: usize = 16;
    [1, 2].into_iter().find(|parts| bands * parts >= ENOUGH * processors).unwrap_or(4)
}

/// What the kernels know of a matrix before they decode it. It is made when the matrix is uploaded.
pub(super) struct BandIndex {
    of: Bands,
    memory: CudaSlice<u8>,
    bands: usize,
    parts: usize,
}

impl BandIndex {
    /// Makes it with a kernel, which decodes the matrix once.
    pub fn new(
        device: &CudaDevice,
        kernels: &Kernels,
        of: Bands,
        geometry: Geometry,
        bytes: &CudaSlice<u8>,
        plan: &Plan,
        status: &CudaSlice<u32>,
    ) -> Result<BandIndex> {
        let bands = geometry.rows.div_ceil(BAND) * geometry.cols.div_ceil(TILE);
        let parts = parts(bands, kernels.processors);
        let length = TABLE + bands * (PLACE + (parts - 1) * PART);
        let mut made = BandIndex { of, memory: alloc(device, length, "an index of its bands")?, bands, parts };
        let (kernel, room) = &kernels.rans.index;
        let too_small = || Error::Unsupported("the GPU's multiprocessors have too little shared memory".into());
        let grid = grid(bands, kernels.processors, *room, (TABLES, RING)).ok_or_else(too_small)?;
        let stream = device.cuda_stream();
        let (at, _memory) = made.memory.device_ptr_mut(&stream);
        let index = Index::at(at, bands, parts);
        let mut launch = stream.launch_builder(kernel);
        launch.arg(bytes).arg(plan).arg(&index).arg(status);
        // SAFETY: arguments as the kernel declares them; it reads within `plan.total` bytes, and writes a table, and what it
        // knows of each band and part, for which there is room. The status word is written by atomic operations only.
        driver(unsafe { launch.launch(grid.config()) })?;
        drop(_memory);
        Ok(made)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Rows of a part.
    fn rows(&self) -> usize {
        BAND / self.parts
    }
}

impl Index {
    fn at(memory: u64, bands: usize, parts: usize) -> Index {
        let places = memory + TABLE as u64;
        let later = places + (bands * PLACE) as u64;
        Index { places, later, table: memory, parts: parts as u32, rows: (BAND / parts) as u32 }
    }
}

/// The kernels, each for every kind of [`Bands`] but the first, and the shared memory that a block of it may have.
pub(super) struct RansKernels {
    index: (CudaFunction, usize),
    decode: [(CudaFunction, usize); 4],
    single: [(CudaFunction, usize); 4],
    eight: [(CudaFunction, usize); 4],
}

impl RansKernels {
    pub fn load(module: &Arc<CudaModule>, shared: i32) -> Result<RansKernels> {
        let all = |name: &str| -> Result<[(CudaFunction, usize); 4]> {
            let of = |suffix: &str| function(module, &format!("{name}{suffix}"), shared);
            Ok([of("")?, of("_levels")?, of("_narrow")?, of("_narrow_levels")?])
        };
        Ok(RansKernels {
            index: function(module, "rans_index", shared)?,
            decode: all("rans_decode")?,
            single: all("rans_product_1")?,
            eight: all("rans_product_8")?,
        })
    }
}

/// A grid for so many parts: as few of them one after another as there can be. Shared memory: `tables` bytes of a block,
/// `each` of a warp.
pub(super) fn grid(parts: usize, processors: usize, room: usize, (tables, each): (usize, usize)) -> Option<Grid> {
    let most = (room.checked_sub(tables)? / each).min(WARPS);
    let blocks = processors.min(parts);
    if most < FEWEST || blocks == 0 {
        return None;
    }
    let turns = parts.div_ceil(blocks * most);
    let warps = parts.div_ceil(blocks * turns).max(FEWEST);
    Some(Grid { blocks: [blocks as u32, 1, 1], threads: 32 * warps as u32, shared: (tables + warps * each) as u32 })
}

impl DeviceStream {
    /// Whether rows are decoded to that dtype at speed; if not, then perhaps by way of BF16.
    pub(super) fn decodes_to(&self, dtype: Dtype) -> bool {
        self.bands().is_none() || dtype == Dtype::Bf16
    }

    /// Enqueues the decoding of rows to BF16, `stride` bytes apart: false, with nothing done, if these kernels do not take them.
    /// `out` must have room for them.
    pub(super) fn decode_bands(
        &self,
        stream: &Arc<CudaStream>,
        rows: Range<usize>,
        plan: &Plan,
        stride: usize,
        out: &mut CudaViewMut<u8>,
    ) -> Result<bool> {
        let Some(bands) = self.bands() else { return Ok(false) };
        let (kernels, cols) = (self.kernels(), self.geometry().cols);
        let (kernel, room) = &kernels.rans.decode[bands.of as usize];
        let parts = (rows.end.div_ceil(bands.rows()) - rows.start / bands.rows()) * cols.div_ceil(TILE);
        let aligned = out.device_ptr(stream).0.is_multiple_of(4);
        let Some(grid) = grid(parts, kernels.processors, *room, (TABLES, RING)).filter(|_| aligned) else {
            return Ok(false);
        };
        let (first, count, stride) = (rows.start as u32, rows.len() as u32, stride as u64);
        let (at, _memory) = bands.memory.device_ptr(stream);
        let index = Index::at(at, bands.bands, bands.parts);
        let mut launch = stream.launch_builder(kernel);
        launch.arg(self.bytes()).arg(plan).arg(&index).arg(&first).arg(&count).arg(out).arg(&stride).arg(self.status());
        // SAFETY: arguments as the kernel declares them; it reads within `plan.total` bytes, and writes `count` rows of
        // `stride` bytes, which `out` has. The status word is written by atomic operations only.
        driver(unsafe { launch.launch(grid.config()) })?;
        Ok(true)
    }

    /// Enqueues `y = x · Wᵀ`, as [`DeviceStream::product`], which has checked the sizes: false, with nothing done, if there are
    /// too many rows.
    pub(super) fn product_bands(
        &self,
        x: &CudaView<u8>,
        y: &mut CudaViewMut<u8>,
        batch: usize,
        dtype: Dtype,
    ) -> Result<bool> {
        let Some(bands) = self.bands() else { return Ok(false) };
        let of = bands.of;
        let (kernels, Geometry { rows, cols }, size) = (self.kernels(), self.geometry(), dtype.size());
        let (parts, _) = columns_of(dtype);
        let each = batch.min(COLUMNS / parts);
        let (across, down) = (cols.div_ceil(TILE), rows.div_ceil(bands.rows()));
        let partial = across * each * rows;
        if batch == 0 || batch > ROWS || 4 * partial > WORKSPACE {
            return Ok(false);
        }
        let stream = self.device().cuda_stream();
        // One column of activations is read in pairs.
        let single = each * parts == 1 && x.device_ptr(&stream).0.is_multiple_of(4);
        let (kernel, room) = if single { &kernels.rans.single[of as usize] } else { &kernels.rans.eight[of as usize] };
        let Some(grid) = grid(across * down, kernels.processors, *room, (TABLES, RING + COLUMN * each * parts)) else {
            return Ok(false);
        };
        let (plan, programmatic) = (self.plan(), programmatic(kernels));
        kernels.scratch.product(self.device(), partial, down, |partial, arrived| {
            let (bytes, _bytes) = self.bytes().device_ptr(&stream);
            let (status, _status) = self.status().device_ptr(&stream);
            let (at, _memory) = bands.memory.device_ptr(&stream);
            let index = Index::at(at, bands.bands, bands.parts);
            let (x, _x) = x.device_ptr(&stream);
            let (y, _y) = y.device_ptr_mut(&stream);
            let (partial, _partial) = partial.device_ptr_mut(&stream);
            let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
            for first in (0..batch).step_by(each) {
                let activations = Activations {
                    x: x + (first * cols * size) as u64,
                    y: y + (first * rows * size) as u64,
                    partial,
                    arrived,
                    batch: each.min(batch - first) as u32,
                    dtype: dtype as u32,
                };
                let arguments: [*const std::ffi::c_void; 5] = [
                    (&raw const bytes).cast(),
                    (&raw const plan).cast(),
                    (&raw const index).cast(),
                    (&raw const activations).cast(),
                    (&raw const status).cast(),
                ];
                // SAFETY: arguments as the kernel declares them, memory of the sizes that it asks for, checked by the caller and
                // above; a word of `arrived` for each row of parts. The kernel may read the index before it waits: the matrix
                // has been decoded and checked since that was made. The status word is written by atomic operations only.
                unsafe { launch_with(&stream, kernel, grid, &arguments, programmatic)? };
            }
            Ok(true)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_take_parts_in_as_few_turns_as_there_can_be() {
        let shape = |parts| grid(parts, 132, 232_448, (TABLES, RING)).map(|grid| (grid.blocks[0], grid.threads / 32));
        assert_eq!(shape(0), None);
        assert_eq!(shape(1), Some((1, 4)));
        assert_eq!(shape(1024), Some((132, 8)));
        assert_eq!(shape(3584), Some((132, 28)));
        assert_eq!(shape(4096), Some((132, 32)));
        assert_eq!(shape(4300), Some((132, 17)));
        // Little shared memory: fewer warps; too little: none.
        let room = TABLES + 5 * (RING + 8 * COLUMN);
        let few = grid(3584, 132, room, (TABLES, RING + 8 * COLUMN)).unwrap();
        assert!(few.threads == 32 * 5 && few.shared as usize == room, "{few:?}");
        assert!(grid(3584, 132, TABLES + 3 * RING, (TABLES, RING)).is_none());
    }

    #[test]
    fn few_bands_are_cut_into_parts() {
        assert_eq!([3584, 1536, 1024, 1].map(|bands| parts(bands, 132)), [1, 2, 4, 4]);
    }

    #[test]
    fn levels_that_saturate_are_left_to_the_reference() {
        let geometry = Geometry { rows: 2, cols: 3 };
        assert!(!saturate(geometry, &[127, 3, 1, 2, 128]));
        assert!(saturate(geometry, &[128, 3, 1, 2, 128]) && saturate(geometry, &[1]));
    }
}

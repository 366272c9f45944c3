//! Packing into layout `pair`: exponents are counted, a code is made of the counts, and rows are coded with it.
#![allow(unsafe_code)]

use std::ops::Range;

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaSlice, LaunchConfig, PushKernelArg};

use super::decode::DeviceStream;
use super::family::{TILE_ROWS, stages};
use super::kernels::{driver, out_of_memory};
use super::pair::Pair;
use super::pair_code::PairCode;
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// The size of a stage that is too long: `IMPOSSIBLE` in `kernels/pair_code.cuh`.
const IMPOSSIBLE: u32 = 65_535;

impl Pair {
    /// Decodes a stream of BF16 weights and packs it. `None` if the layout does not suit its weights: too many pairs of
    /// exponents occur for codes of eight bits, or the GPU's blocks have too little shared memory.
    pub fn new(stream: &DeviceStream) -> Result<Option<Pair>> {
        let (kernels, device) = (stream.kernels(), stream.device());
        let Geometry { rows, cols } = stream.geometry();
        let (Ok(_), Ok(_)) = (i32::try_from(rows), i32::try_from(cols)) else {
            return Err(Error::Unsupported(format!("a {rows}x{cols} matrix on a GPU: 2^31 is the limit")));
        };
        // Counts and offsets have 32 bits.
        if u32::try_from(rows.saturating_mul(cols) / 2).is_err() {
            return Ok(None);
        }
        let block = stream.block_rows(Dtype::Bf16);
        kernels.scratch.workspace(device, block * cols * 2, |dense| Packing { stream, dense, decoded: 0..0 }.run())
    }
}

/// Passes over the decoded rows of a matrix.
struct Packing<'a> {
    stream: &'a DeviceStream,
    /// The workspace, and the rows that it holds.
    dense: &'a mut CudaSlice<u8>,
    decoded: Range<usize>,
}

impl Packing<'_> {
    fn run(mut self) -> Result<Option<Pair>> {
        let (stream, geometry) = (self.stream, self.stream.geometry());
        let (kernels, device) = (stream.kernels().clone(), stream.device().clone());
        let row = stages(geometry.cols);
        let all = geometry.rows.div_ceil(TILE_ROWS) * row;
        let counts = device.alloc_zeros::<u32>(1 << 16)?;
        let shifts = RowShifts::new(stream)?;
        self.each_block(|packing, rows| {
            packing.levels(rows.clone(), &shifts)?;
            packing.count(rows, &shifts, &counts)
        })?;
        let counted = driver(device.cuda_stream().clone_dtoh(&counts))?;
        stream.check()?;
        let code = PairCode::new(&counted);
        // Longer codes than the exponents themselves: a stage has no room for them.
        if code.bits > 8.0 {
            return Ok(None);
        }
        let codes = (&shifts, &device.clone_htod(&code.codes)?, code.filler as i32);
        let (mut sizes, mut offsets) = (zeros(stream, all)?, zeros(stream, all + 1)?);
        let totals = device.alloc_zeros::<u32>(3)?;
        self.each_block(|packing, rows| {
            packing.size(rows.clone(), codes, &mut sizes)?;
            packing.scan(rows, &sizes, &mut offsets, &totals)
        })?;
        drop(sizes);
        let totals = driver(device.cuda_stream().clone_dtoh(&totals))?;
        let [pieces, largest, besides] = [0, 1, 2].map(|i| totals.get(i).copied().unwrap_or(u32::MAX));
        let [slot, decode_slot] = [largest, besides].map(|pieces| 16 * pieces as usize + 16);
        if largest >= IMPOSSIBLE || !kernels.pair.fit(geometry, slot, decode_slot, kernels.processors) {
            return Ok(None);
        }
        let bytes = 16 * pieces as usize;
        // SAFETY: every byte of a stage is written by the packing kernel.
        let weights = unsafe { device.alloc::<u8>(bytes) }.map_err(|e| out_of_memory(e, bytes, "a matrix"))?;
        let table = device.clone_htod(&code.table)?;
        let pair = Pair { kernels, device, geometry, weights, offsets, table, slot, decode_slot };
        self.each_block(|packing, rows| packing.pack(rows, codes, &pair))?;
        stream.check()?;
        // Products may fetch weights before the kernel that they follow has ended, so weights must be complete by then.
        driver(pair.device.cuda_stream().synchronize())?;
        Ok(Some(pair))
    }

    /// Calls `pass` with each block of rows when it is decoded: again in each pass if there are several.
    fn each_block(&mut self, mut pass: impl FnMut(&Self, Range<usize>) -> Result<()>) -> Result<()> {
        let (height, block) = (self.stream.geometry().rows, self.stream.block_rows(Dtype::Bf16));
        for start in (0..height).step_by(block) {
            let rows = start..height.min(start + block);
            if rows != self.decoded {
                self.stream.decode_rows(rows.clone(), Dtype::Bf16, &mut self.dense.as_view_mut())?;
                self.decoded = rows.clone();
            }
            pass(self, rows)?;
        }
        Ok(())
    }

    /// The first stage of some rows, and how many they have.
    fn stages(&self, rows: &Range<usize>) -> (usize, usize) {
        let row = stages(self.stream.geometry().cols);
        (rows.start / TILE_ROWS * row, rows.len().div_ceil(TILE_ROWS) * row)
    }

    /// How large the weights of the decoded rows are, each row's.
    fn levels(&self, rows: Range<usize>, shifts: &RowShifts) -> Result<()> {
        let stream = self.stream.device().cuda_stream();
        let (levels, first, blocks) =
            (shifts.levels.slice(rows.clone()), i32::from(rows.start == 0), rows.len().div_ceil(8));
        let (rows, cols) = (rows.len() as i32, self.stream.geometry().cols as i32);
        let mut launch = stream.launch_builder(&self.stream.kernels().pair.levels);
        launch.arg(&*self.dense).arg(&rows).arg(&cols).arg(&cols).arg(&first).arg(&levels).arg(&shifts.mean);
        // SAFETY: the workspace holds the rows; there is a level for each, and the mean has two words.
        driver(unsafe { launch.launch(config(blocks, 256)) })?;
        Ok(())
    }

    /// Chooses the decoded rows' shifts, and adds their pairs of shifted exponents to `counts`.
    fn count(&self, rows: Range<usize>, shifts: &RowShifts, counts: &CudaSlice<u32>) -> Result<()> {
        let (kernels, stream) = (self.stream.kernels(), self.stream.device().cuda_stream());
        let (levels, of_rows) = (shifts.levels.slice(rows.clone()), shifts.shifts.slice(rows.clone()));
        let (rows, cols) = (rows.len() as i32, self.stream.geometry().cols as i32);
        let mut launch = stream.launch_builder(&kernels.pair.count);
        launch.arg(&*self.dense).arg(&rows).arg(&cols).arg(&cols);
        launch.arg(&levels).arg(&shifts.mean).arg(&of_rows).arg(counts);
        // SAFETY: as above; there is a shift for each row, and counts are 65,536 words, added to by atomic operations.
        driver(unsafe { launch.launch(config(2 * kernels.processors, 256)) })?;
        Ok(())
    }

    /// The sizes of the stages of the decoded rows.
    fn size(&self, rows: Range<usize>, (shifts, codes, filler): Codes, sizes: &mut CudaSlice<u32>) -> Result<()> {
        let stream = self.stream.device().cuda_stream();
        let (_, blocks) = self.stages(&rows);
        let shifts = shifts.shifts.slice(rows.clone());
        let (rows, cols) = (rows.len() as i32, self.stream.geometry().cols as i32);
        let mut launch = stream.launch_builder(&self.stream.kernels().pair.size);
        launch.arg(&*self.dense).arg(&rows).arg(&cols).arg(&cols).arg(&shifts).arg(codes).arg(&filler).arg(sizes);
        // SAFETY: as above; there is a size for each block.
        driver(unsafe { launch.launch(config(blocks, 256)) })?;
        Ok(())
    }

    /// Where the stages of some rows start.
    fn scan(
        &self,
        rows: Range<usize>,
        sizes: &CudaSlice<u32>,
        offsets: &mut CudaSlice<u32>,
        totals: &CudaSlice<u32>,
    ) -> Result<()> {
        let stream = self.stream.device().cuda_stream();
        let (first, count) = self.stages(&rows);
        let mut part = offsets.slice_mut(first..first + count + 1);
        let (count, cols) = (count as i32, self.stream.geometry().cols as i32);
        let mut launch = stream.launch_builder(&self.stream.kernels().pair.scan);
        launch.arg(sizes).arg(&count).arg(&cols).arg(&mut part).arg(totals);
        // SAFETY: `part` has a word for each size and one more, `totals` three, which only this kernel knows of.
        driver(unsafe { launch.launch(config(1, 1024)) })?;
        Ok(())
    }

    /// Codes the decoded rows.
    fn pack(&self, rows: Range<usize>, (shifts, codes, filler): Codes, pair: &Pair) -> Result<()> {
        let stream = self.stream.device().cuda_stream();
        let (first, blocks) = self.stages(&rows);
        let shifts = shifts.shifts.slice(rows.clone());
        let (rows, cols) = (rows.len() as i32, self.stream.geometry().cols as i32);
        let offsets = pair.offsets.slice(first..first + blocks + 1);
        let mut launch = stream.launch_builder(&self.stream.kernels().pair.pack);
        launch.arg(&*self.dense).arg(&rows).arg(&cols).arg(&cols).arg(&shifts).arg(codes).arg(&filler);
        launch.arg(&offsets).arg(&pair.weights);
        // SAFETY: stages have the sizes that the pass before counted, and nobody else knows of their memory yet.
        driver(unsafe { launch.launch(config(blocks, 256)) })?;
        Ok(())
    }
}

/// The rows' shifts, the codes of all pairs, and the pair for padding.
type Codes<'a> = (&'a RowShifts, &'a CudaSlice<u16>, i32);

/// By which powers of two a matrix's rows are divided, and what that is chosen from (`kernels/pair_code.cuh`).
struct RowShifts {
    levels: CudaSlice<u32>,
    mean: CudaSlice<u64>,
    shifts: CudaSlice<u8>,
}

impl RowShifts {
    fn new(stream: &DeviceStream) -> Result<RowShifts> {
        let (device, rows) = (stream.device(), stream.geometry().rows);
        let levels = zeros(stream, rows)?;
        let shifts = device.alloc_zeros::<u8>(rows).map_err(|e| out_of_memory(e, rows, "a table of rows"))?;
        Ok(RowShifts { levels, mean: device.alloc_zeros::<u64>(2)?, shifts })
    }
}

fn zeros(stream: &DeviceStream, length: usize) -> Result<CudaSlice<u32>> {
    let memory = stream.device().alloc_zeros::<u32>(length);
    memory.map_err(|e| out_of_memory(e, 4 * length, "a table of stages"))
}

fn config(blocks: usize, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

//! Tile streams in a GPU's memory, and `kernels/decode.cu`, which decodes their rows.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, LaunchConfig, PushKernelArg};

use super::kernels::{Kernels, driver};
use super::memory::rows_within;
use super::plan::{AS_STORED, INTEGERS, Plan, UNROUNDED};
use super::rans::{BandIndex, Bands};
use super::scratch::WORKSPACE;
use super::upload::upload;
use crate::codec::band::{ESCAPE_COUNT, UNFINISHED};
use crate::codec::geometry::BAND_WEIGHTS;
use crate::codec::{Coding, Dtype, Geometry, Kind, TILE};
use crate::format::TileStream;
use crate::{Error, Result};

/// Threads of a block: a warp for each band of a tile.
const THREADS: u32 = 128;
/// Bytes that all warps of a block share: scratch, the class map, and with rANS the decode table.
const SCRATCH: usize = 1056;
const TABLE: usize = 4 * 4096;
/// Bytes of a warp with rANS: a ring of words, and the symbols of the weights that it decodes at a time.
const SYMBOLS: usize = 512 + 256;
/// Shared memory of `kernels/tile_bf16.cuh`: tables of a block, and what each of its warps has.
pub(super) const BF16_TABLES: usize = 4 * 4096 + 4 * 256;
pub(super) const BF16_WARP: usize = SYMBOLS + 512;
/// The status of a stream without damage.
const FINE: u32 = u32::MAX;

/// A tile stream in a GPU's memory.
pub struct DeviceStream {
    kernels: Arc<Kernels>,
    device: CudaDevice,
    bytes: CudaSlice<u8>,
    /// The first damaged tile that a kernel met, `8 · tile + what`.
    status: CudaSlice<u32>,
    plan: Plan,
    dtype: Dtype,
    geometry: Geometry,
    /// Whether it is what `kernels/tile_bf16.cuh` is for; see [`Plan::usual`].
    usual: Option<usize>,
    /// Where its bands are, if `kernels/rans.cu` takes them.
    bands: Option<BandIndex>,
    /// Bytes of shared memory that decoding takes.
    shared: u32,
}

impl fmt::Debug for DeviceStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceStream({}x{}, {} bytes)", self.geometry.rows, self.geometry.cols, self.plan.total())
    }
}

impl DeviceStream {
    /// Uploads a stream whose preamble is valid. Tiles are not looked at: decoders are total, and
    /// [`DeviceStream::check`] tells what they met.
    ///
    /// # Errors
    /// If the GPU is too old or its memory too small.
    pub fn new(device: &CudaDevice, stream: &TileStream) -> Result<DeviceStream> {
        let kernels = Kernels::of(device)?;
        let (plan, geometry) = (stream.plan(), stream.geometry());
        let rans = plan.coding == Coding::Rans;
        // Mirrors `buffer_bytes` in `kernels/tile_stream.cuh`.
        let buffer = if rans { SYMBOLS } else { 0 } + if plan.kind == Kind::Int8 { BAND_WEIGHTS } else { 0 };
        let table = if rans { TABLE } else { 0 };
        let bytes = upload(device, &kernels, stream.bytes())?;
        let status = driver(device.cuda_stream().clone_htod(&[FINE]))?;
        let of_kernels = Plan::of(stream);
        let bands = Bands::of(plan, geometry, stream.scales())
            .map(|of| BandIndex::new(device, &kernels, of, geometry, &bytes, &of_kernels, &status))
            .transpose()?;
        Ok(DeviceStream {
            device: device.clone(),
            kernels,
            bytes,
            status,
            plan: of_kernels,
            usual: Plan::usual(plan, geometry),
            bands,
            dtype: plan.dtype,
            geometry,
            shared: (SCRATCH + table + 4 * buffer) as u32,
        })
    }

    /// The shape of the matrix.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The matrix's own dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The GPU that holds it.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Bytes that it takes.
    pub fn stored_bytes(&self) -> usize {
        self.bytes.len() + self.bands.as_ref().map_or(0, BandIndex::bytes)
    }

    pub(super) fn bytes(&self) -> &CudaSlice<u8> {
        &self.bytes
    }

    pub(super) fn status(&self) -> &CudaSlice<u32> {
        &self.status
    }

    pub(super) fn plan(&self) -> Plan {
        self.plan
    }

    pub(super) fn usual(&self) -> Option<usize> {
        self.usual
    }

    pub(super) fn bands(&self) -> Option<&BandIndex> {
        self.bands.as_ref()
    }

    pub(super) fn shared(&self) -> u32 {
        self.shared
    }

    pub(super) fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    /// Enqueues the decoding of some rows into `out`, row-major, as `dtype`: the matrix's own one, or BF16, F16 or F32, to
    /// which values are rounded to nearest even.
    ///
    /// # Errors
    /// If the range is not within the matrix, `out` is too small, or the launch fails. What the decoder meets is told by
    /// [`DeviceStream::check`].
    pub fn decode_rows(&self, rows: Range<usize>, dtype: Dtype, out: &mut CudaViewMut<u8>) -> Result<()> {
        self.decode(&self.device.cuda_stream(), rows, self.plan.to(dtype, AS_STORED), dtype, out)
    }

    /// As [`DeviceStream::decode_rows`], but quantised weights are rounded once, from `f32`, as products take them.
    pub(super) fn decode_factors(&self, rows: Range<usize>, dtype: Dtype, out: &mut CudaViewMut<u8>) -> Result<()> {
        self.decode(&self.device.cuda_stream(), rows, self.plan.to(dtype, UNROUNDED), dtype, out)
    }

    /// As [`DeviceStream::decode_rows`], but the integers of quantised weights, in BF16; escapes are divided by their scale.
    pub(super) fn decode_integers(&self, rows: Range<usize>, out: &mut CudaViewMut<u8>) -> Result<()> {
        let dtype = Dtype::Bf16;
        self.decode(&self.device.cuda_stream(), rows, self.plan.to(dtype, INTEGERS), dtype, out)
    }

    /// As [`DeviceStream::decode_rows`], on another stream than the device's.
    pub(super) fn decode_rows_on(
        &self,
        stream: &Arc<CudaStream>,
        rows: Range<usize>,
        dtype: Dtype,
        out: &mut CudaViewMut<u8>,
    ) -> Result<()> {
        self.decode(stream, rows, self.plan.to(dtype, AS_STORED), dtype, out)
    }

    fn decode(
        &self,
        stream: &Arc<CudaStream>,
        rows: Range<usize>,
        plan: Plan,
        dtype: Dtype,
        out: &mut CudaViewMut<u8>,
    ) -> Result<()> {
        let Geometry { rows: height, cols } = self.geometry;
        if rows.start > rows.end || rows.end > height {
            return Err(Error::Invalid(format!("rows {rows:?} of a matrix with {height} rows")));
        }
        let stride = self.stride(rows.len(), dtype, out.len())?;
        if rows.is_empty() || dtype == Dtype::Bf16 && self.decode_bands(stream, rows.clone(), &plan, stride, out)? {
            return Ok(());
        }
        let tiles = rows.end.div_ceil(TILE) - rows.start / TILE;
        // The grid's second dimension ends at 65,535: matrices of more than 16 M rows take several launches.
        let most = 65_535usize;
        for start in (0..tiles).step_by(most) {
            let top = (rows.start / TILE + start) * TILE;
            let (from, to) = (rows.start.max(top), rows.end.min(top + most * TILE));
            let mut part = out.slice_mut((from - rows.start) * stride..(to - rows.start) * stride);
            let mut config = self.config(cols.div_ceil(TILE), most.min(tiles - start));
            let (from, count, stride) = (from as u32, (to - from) as u32, stride as u64);
            let kernels = &self.kernels;
            let usual = self.usual.filter(|_| dtype == Dtype::Bf16);
            let kernel = usual.map_or(&kernels.decode_rows, |usual| &kernels.decode_rows_bf16[usual]);
            if usual.is_some() {
                config.shared_mem_bytes = (BF16_TABLES + 4 * BF16_WARP) as u32;
            }
            let mut launch = stream.launch_builder(kernel);
            launch.arg(&self.bytes).arg(&plan).arg(&from).arg(&count).arg(&mut part).arg(&stride).arg(&self.status);
            // SAFETY: arguments as the kernel declares them; it reads within `plan.total` bytes, and writes `count` rows of
            // `stride` bytes, which `part` has. The status word is written by atomic operations only.
            driver(unsafe { launch.launch(config) })?;
        }
        Ok(())
    }

    /// Enqueues the decoding of the rows that `ids` name, one after another into `out`. An id outside the matrix gives
    /// zeros.
    ///
    /// # Errors
    /// If `out` is too small or the launch fails.
    pub fn decode_ids(&self, ids: &CudaView<u32>, dtype: Dtype, out: &mut CudaViewMut<u8>) -> Result<()> {
        let stride = self.stride(ids.len(), dtype, out.len())?;
        let plan = self.plan.to(dtype, AS_STORED);
        // In launches of at most 65,535 blocks of four ids.
        let most = 4 * 65_535;
        for start in (0..ids.len()).step_by(most) {
            let count = most.min(ids.len() - start);
            let part = ids.slice(start..start + count);
            let mut out = out.slice_mut(start * stride..(start + count) * stride);
            let config = self.config(self.geometry.cols.div_ceil(TILE), count.div_ceil(4));
            let (count, stride, stream) = (count as u32, stride as u64, self.device.cuda_stream());
            let mut launch = stream.launch_builder(&self.kernels.decode_ids);
            launch.arg(&self.bytes).arg(&plan).arg(&part).arg(&count).arg(&mut out).arg(&stride).arg(&self.status);
            // SAFETY: as above, with `count` ids and as many rows.
            driver(unsafe { launch.launch(config) })?;
        }
        Ok(())
    }

    /// Waits for everything enqueued so far and tells whether a decoder met damage.
    ///
    /// # Errors
    /// If one did: the error names the first damaged tile. Or if the GPU reports that a kernel failed.
    pub fn check(&self) -> Result<()> {
        let status = driver(self.device.cuda_stream().clone_dtoh(&self.status))?;
        let status = status.first().copied().unwrap_or(FINE);
        if status == FINE {
            return Ok(());
        }
        let source = if status % 8 == 1 { UNFINISHED } else { ESCAPE_COUNT };
        Err(Error::Tile { tile: (status / 8) as usize, start: 0, end: 0, source: Box::new(source) })
    }

    /// Rows that a workspace of the usual size holds.
    pub(super) fn block_rows(&self, dtype: Dtype) -> usize {
        rows_within(WORKSPACE, self.geometry.cols * dtype.size()).min(self.geometry.rows)
    }

    /// Decodes everything once, into the workspace, and checks what was met.
    ///
    /// # Errors
    /// As [`DeviceStream::check`].
    pub(super) fn decode_once(&self) -> Result<()> {
        let (rows, block) = (self.geometry.rows, self.block_rows(Dtype::Bf16));
        self.kernels.scratch.workspace(&self.device, block * self.geometry.cols * 2, |workspace| {
            for start in (0..rows).step_by(block) {
                self.decode_rows(start..rows.min(start + block), Dtype::Bf16, &mut workspace.as_view_mut())?;
            }
            self.check()
        })
    }

    /// Bytes of a decoded row, if `rows` of them fit into `room`.
    fn stride(&self, rows: usize, dtype: Dtype, room: usize) -> Result<usize> {
        if dtype != self.dtype && !matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32) {
            return Err(Error::Invalid(format!("{} weights cannot be decoded to {}", self.dtype.name(), dtype.name())));
        }
        let stride = self.geometry.cols * dtype.size();
        match rows.checked_mul(stride) {
            Some(need) if need <= room => Ok(stride),
            _ => Err(Error::Invalid(format!("{rows} rows of {stride} bytes do not fit into {room} bytes"))),
        }
    }

    fn config(&self, across: usize, down: usize) -> LaunchConfig {
        LaunchConfig {
            grid_dim: (across as u32, down as u32, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: self.shared,
        }
    }
}

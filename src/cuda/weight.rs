//! A compressed matrix on a GPU, and its products.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use candle_core::{CudaDevice, CudaStorage, Layout};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr, LaunchConfig, PushKernelArg};
use half::{bf16, f16};

use super::choose::{self, Choice};
use super::decode::DeviceStream;
use super::dtype_of;
use super::form::Form;
use super::kernels::{Kernels, driver, no_room};
use super::memory::{self, Element, bytes_mut, contiguous, rows_within};
use super::packed::Fused;
use super::packing::Scales;
use super::scratch::WORKSPACE;
use crate::codec::{Dtype, Geometry};
use crate::matrix::{GpuLayout, Weight};
use crate::{Error, Result};

/// Why a matrix is in another layout than the first that was tried.
const UNSUITABLE: &str = "too many weights lie outside of what faster layouts can express";

/// A compressed matrix in a GPU's memory.
#[derive(Debug)]
pub struct CudaWeight {
    pub(super) kept: Kept,
    dtype: Dtype,
    why: String,
}

/// What is kept of it.
#[derive(Debug)]
pub(super) enum Kept {
    /// The stream as it is at rest.
    Stream(Box<DeviceStream>),
    /// A layout that fused kernels multiply with.
    Fused(Box<dyn Fused>),
}

impl CudaWeight {
    /// Uploads a matrix and turns it into `layout`. Every tile's checksum is compared and every tile decoded once.
    ///
    /// # Errors
    /// If a tile is damaged; if the GPU is too old, its memory too small, or it cannot hold the matrix in that layout.
    pub fn new(weight: &Weight, device: &CudaDevice, layout: GpuLayout) -> Result<CudaWeight> {
        let Geometry { rows, cols } = weight.geometry();
        CudaWeight::load(weight, device, layout).map_err(|e| no_room(e, &format!("a {rows}x{cols} matrix")))
    }

    fn load(weight: &Weight, device: &CudaDevice, layout: GpuLayout) -> Result<CudaWeight> {
        let matrix = weight.matrix()?;
        matrix.check_tiles()?;
        let stream = DeviceStream::new(device, matrix.stream())?;
        let (dtype, plan) = (stream.dtype(), matrix.plan());
        let place = |error| match error {
            Error::Tile { tile, source, .. } => matrix.stream().in_tile(tile, *source),
            other => other,
        };
        let scales = Scales::of(plan, matrix.geometry(), matrix.stream().scales());
        if layout == GpuLayout::Dense {
            return Err(Error::Invalid("plain weights are no compressed matrix".into()));
        }
        let choice = match layout {
            GpuLayout::Auto => choose::auto(&stream, plan, &scales).map_err(place)?,
            GpuLayout::Smallest => Choice { layout, why: "the smallest".into() },
            _ => Choice { layout, why: "as asked for".into() },
        };
        let forms = Form::of(choice.layout, plan);
        // What was chosen for the shape may not suit these weights: then what is left.
        let rest: &[Form] = match (layout, choice.layout) {
            (GpuLayout::Auto, GpuLayout::Pair | GpuLayout::Fp8 | GpuLayout::Integers) => Form::of(layout, plan),
            _ => &[],
        };
        for (tried, form) in forms.iter().chain(rest).enumerate() {
            if let Some(fused) = form.make(&stream, &scales).map_err(place)? {
                let why = if tried == 0 { choice.why } else { UNSUITABLE.into() };
                return Ok(CudaWeight { kept: Kept::Fused(fused), dtype, why });
            }
        }
        if matches!(
            layout,
            GpuLayout::Fixed | GpuLayout::Window | GpuLayout::Pair | GpuLayout::Fp8 | GpuLayout::Integers
        ) {
            let why = match (forms.is_empty(), layout) {
                (false, GpuLayout::Pair) => {
                    "its exponents are too many for a code of eight bits, or its stages too long for this GPU's shared memory"
                }
                (false, _) => "too many weights lie outside of what it can express",
                (_, GpuLayout::Integers) => "its weights are no small integers",
                (_, GpuLayout::Fp8) => "its weights are no 8-bit floats",
                _ => "its weights are no BF16 numbers",
            };
            let (kind, layout) = (plan.kind.name(), layout.name());
            return Err(Error::Unsupported(format!(
                "a matrix of kind {kind} cannot be kept in the layout {layout}: {why}"
            )));
        }
        stream.decode_once().map_err(place)?;
        let why = if forms.is_empty() { choice.why } else { UNSUITABLE.into() };
        Ok(CudaWeight { kept: Kept::Stream(Box::new(stream)), dtype, why })
    }

    /// What is kept of a matrix of that dtype, and why so.
    pub(super) fn of(kept: Kept, dtype: Dtype, why: &str) -> CudaWeight {
        CudaWeight { kept, dtype, why: why.into() }
    }

    /// The shape of the matrix.
    pub fn geometry(&self) -> Geometry {
        match &self.kept {
            Kept::Stream(stream) => stream.geometry(),
            Kept::Fused(fused) => fused.geometry(),
        }
    }

    /// The matrix's own dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The GPU that holds it.
    pub fn device(&self) -> &CudaDevice {
        match &self.kept {
            Kept::Stream(stream) => stream.device(),
            Kept::Fused(fused) => fused.device(),
        }
    }

    pub(super) fn kernels(&self) -> &Kernels {
        match &self.kept {
            Kept::Stream(stream) => stream.kernels(),
            Kept::Fused(fused) => fused.kernels(),
        }
    }

    /// The layout in use.
    pub fn layout(&self) -> GpuLayout {
        match &self.kept {
            Kept::Stream(_) => GpuLayout::Rans,
            Kept::Fused(fused) => fused.layout(),
        }
    }

    /// Why it is in that layout.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// Bytes that it takes in the GPU's memory.
    pub fn stored_bytes(&self) -> usize {
        match &self.kept {
            Kept::Stream(stream) => stream.stored_bytes(),
            Kept::Fused(fused) => fused.stored_bytes(),
        }
    }

    /// Enqueues the decoding of rows, which start at a multiple of 16, into the front of `memory`, for a product or as the
    /// tensor has them. What lies behind them is used too: see [`CudaWeight::room`].
    pub(super) fn decode_block(
        &self,
        rows: Range<usize>,
        dtype: Dtype,
        memory: &mut CudaViewMut<u8>,
        factors: bool,
    ) -> Result<()> {
        let decode = |rows: Range<usize>, dtype: Dtype, memory: &mut CudaViewMut<u8>| match &self.kept {
            Kept::Stream(stream) if factors => stream.decode_factors(rows, dtype, memory),
            Kept::Stream(stream) => stream.decode_rows(rows, dtype, memory),
            Kept::Fused(fused) => fused.decode_rows(&self.device().cuda_stream(), rows, dtype, memory),
        };
        if self.decodes_to(dtype) {
            return decode(rows, dtype, memory);
        }
        let values = rows.len() * self.geometry().cols;
        let (mut out, mut aside) = memory.split_at_mut(values * dtype.size());
        decode(rows, Dtype::Bf16, &mut aside)?;
        self.convert(&aside.as_view(), Dtype::Bf16, &mut out, values, dtype)
    }

    /// Bytes that [`CudaWeight::decode_block`] needs for a weight.
    pub(super) fn room(&self, dtype: Dtype) -> usize {
        if self.decodes_to(dtype) { dtype.size() } else { dtype.size() + 2 }
    }

    /// Whether rows are decoded to that dtype, or to BF16 and converted.
    fn decodes_to(&self, dtype: Dtype) -> bool {
        match &self.kept {
            Kept::Stream(stream) => stream.decodes_to(dtype),
            Kept::Fused(fused) => fused.decodes_to(dtype),
        }
    }

    /// Enqueues the conversion of values of dtype `from`, which are rounded to the tensor's own dtype on the way.
    fn convert(
        &self,
        values: &CudaView<u8>,
        from: Dtype,
        out: &mut CudaViewMut<u8>,
        count: usize,
        to: Dtype,
    ) -> Result<()> {
        if count * from.size() > values.len() || count * to.size() > out.len() || from.size() == 1 || to.size() == 1 {
            return Err(Error::Invalid("a conversion that does not fit into its memory".into()));
        }
        if count == 0 {
            return Ok(());
        }
        // One-byte kinds are exact in whatever they were decoded to.
        let own = if self.dtype.size() == 1 { from } else { self.dtype };
        let stream = self.device().cuda_stream();
        let blocks = count.div_ceil(1024).min(1 << 16) as u32;
        let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        let (count, from, own, to) = (count as u64, from as u32, own as u32, to as u32);
        let mut launch = stream.launch_builder(&self.kernels().convert);
        launch.arg(values).arg(out).arg(&count).arg(&from).arg(&own).arg(&to);
        // SAFETY: both sides hold `count` values, as checked above.
        driver(unsafe { launch.launch(config) })?;
        Ok(())
    }

    /// Some rows, row-major, rounded to `dtype` (BF16, F16 or F32).
    ///
    /// # Errors
    /// If the range is not within the matrix or the memory is too small.
    pub fn decode_rows(&self, rows: Range<usize>, dtype: candle_core::DType) -> Result<CudaStorage> {
        match dtype_of(dtype)? {
            Dtype::Bf16 => self.decode_as::<bf16>(rows),
            Dtype::F16 => self.decode_as::<f16>(rows),
            _ => self.decode_as::<f32>(rows),
        }
    }

    fn decode_as<T: Element>(&self, rows: Range<usize>) -> Result<CudaStorage> {
        let Geometry { rows: height, cols } = self.geometry();
        if rows.start > rows.end || rows.end > height {
            return Err(Error::Invalid(format!("rows {rows:?} of a matrix with {height} rows")));
        }
        let (block, size) = (self.block_rows(T::DTYPE), T::DTYPE.size());
        let mut out = self.alloc::<T>(rows.len() * cols, "decoded weights")?;
        let mut target = bytes_mut(&mut out)?;
        // Whole blocks of 16 rows through the workspace; what was not asked for is left behind.
        self.kernels().scratch.workspace(self.device(), block * cols * self.room(T::DTYPE), |workspace| {
            for start in (rows.start / 16 * 16..rows.end).step_by(block) {
                let end = height.min((start + block).min(rows.end.next_multiple_of(16)));
                self.decode_block(start..end, T::DTYPE, &mut workspace.as_view_mut(), false)?;
                let (from, to) = (start.max(rows.start), end.min(rows.end));
                let decoded = workspace.slice((from - start) * cols * size..(to - start) * cols * size);
                let place = (from - rows.start) * cols * size..(to - rows.start) * cols * size;
                self.device().memcpy_dtod(&decoded, &mut target.slice_mut(place))?;
            }
            Ok(())
        })?;
        Ok(CudaStorage::wrap_cuda_slice(out, self.device().clone()))
    }

    /// The rows that `ids` (U32, contiguous) name, rounded to `dtype`. An id outside the matrix gives zeros.
    ///
    /// # Errors
    /// If the ids have another dtype or device, or the memory is too small.
    pub fn decode_ids(&self, ids: &CudaStorage, layout: &Layout, dtype: candle_core::DType) -> Result<CudaStorage> {
        self.expect_device(ids)?;
        let ids = ids.as_cuda_slice::<u32>()?.slice(contiguous(layout)?);
        match dtype_of(dtype)? {
            Dtype::Bf16 => self.decode_ids_as::<bf16>(&ids),
            Dtype::F16 => self.decode_ids_as::<f16>(&ids),
            _ => self.decode_ids_as::<f32>(&ids),
        }
    }

    fn decode_ids_as<T: Element>(&self, ids: &CudaView<u32>) -> Result<CudaStorage> {
        let values = ids.len() * self.geometry().cols;
        let mut out = self.alloc::<T>(values, "embeddings")?;
        match &self.kept {
            Kept::Stream(stream) => stream.decode_ids(ids, T::DTYPE, &mut bytes_mut(&mut out)?)?,
            // Rounding to F32 on the way would change nothing.
            Kept::Fused(fused)
                if T::DTYPE == fused.ids_dtype(T::DTYPE) && (T::DTYPE == self.dtype || self.dtype == Dtype::F32) =>
            {
                fused.decode_ids(ids, &mut bytes_mut(&mut out)?, T::DTYPE)?;
            }
            Kept::Fused(fused) => {
                let from = fused.ids_dtype(T::DTYPE);
                self.kernels().scratch.workspace(self.device(), from.size() * values, |aside| {
                    fused.decode_ids(ids, &mut aside.as_view_mut(), T::DTYPE)?;
                    self.convert(&aside.as_view(), from, &mut bytes_mut(&mut out)?, values, T::DTYPE)
                })?;
            }
        }
        Ok(CudaStorage::wrap_cuda_slice(out, self.device().clone()))
    }

    /// Enqueues the decoding of the whole matrix on a stream, as the tensor has it: false, with nothing done, if it takes more
    /// than one step.
    pub(super) fn decode_on(&self, stream: &Arc<CudaStream>, dtype: Dtype, out: &mut CudaViewMut<u8>) -> Result<bool> {
        let rows = 0..self.geometry().rows;
        if !self.decodes_to(dtype) {
            return Ok(false);
        }
        match &self.kept {
            Kept::Stream(kept) => kept.decode_rows_on(stream, rows, dtype, out)?,
            Kept::Fused(fused) => fused.decode_rows(stream, rows, dtype, out)?,
        }
        Ok(true)
    }

    /// Rows that are decoded at a time.
    pub(super) fn block_rows(&self, dtype: Dtype) -> usize {
        rows_within(WORKSPACE, self.geometry().cols * self.room(dtype)).min(self.geometry().rows)
    }

    pub(super) fn alloc<T: DeviceRepr>(&self, length: usize, what: &str) -> Result<CudaSlice<T>> {
        memory::alloc(self.device(), length, what)
    }

    pub(super) fn expect_device(&self, x: &CudaStorage) -> Result<()> {
        if x.device.id() == self.device().id() {
            return Ok(());
        }
        let ordinal = |device: &CudaDevice| device.cuda_stream().context().ordinal();
        Err(Error::Invalid(format!(
            "the input lies on another device (cuda:{}) than the weight (cuda:{}); two devices made for one GPU differ too",
            ordinal(&x.device),
            ordinal(self.device())
        )))
    }
}

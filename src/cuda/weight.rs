//! A compressed matrix on a GPU, and its products.
#![allow(unsafe_code)]

use std::ops::Range;

use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, cudarc};
use candle_core::{CudaDevice, CudaStorage, Layout, Shape};
use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DeviceRepr, LaunchConfig, PushKernelArg};
use half::{bf16, f16};

use super::decode::DeviceStream;
use super::dtype_of;
use super::gemm::{Gemm, Strides};
use super::kernels::{Kernels, driver, no_room, out_of_memory};
use super::packed::{FactorsOf, Family, Packed, rows_within};
use super::scratch::WORKSPACE;
use crate::codec::{Dtype, Geometry, Kind, Plan, ScaleLayout};
use crate::matrix::{GpuLayout, Weight};
use crate::{Error, Result};

/// A compressed matrix in a GPU's memory.
#[derive(Debug)]
pub struct CudaWeight {
    kept: Kept,
    dtype: Dtype,
}

/// What is kept of it.
#[derive(Debug)]
enum Kept {
    Stream(DeviceStream),
    Packed(Packed),
}

/// One of the element types of activations.
trait Element: CudaDType + DeviceRepr {
    const DTYPE: Dtype;
}
impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}
impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
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
        let families: &[Family] = match (layout, plan.kind) {
            (GpuLayout::Dense, _) => return Err(Error::Invalid("plain weights are no compressed matrix".into())),
            (GpuLayout::Fixed, _) if plan.exact_in_bf16() => &[Family::Fixed],
            (GpuLayout::Integers | GpuLayout::Auto, Kind::Rate) => &[Family::Int4, Family::Int5, Family::Int8],
            (GpuLayout::Integers, Kind::Int8) => &[Family::Int8],
            (GpuLayout::Auto, Kind::Int8) if plan.quantised() => &[Family::Int8],
            (GpuLayout::Auto, Kind::Int8) => &[Family::Int8, Family::Fixed],
            (GpuLayout::Auto, _) if plan.exact_in_bf16() => &[Family::Fixed],
            _ => &[],
        };
        for &family in families {
            if let Some(packed) = Packed::new(&stream, family, scales.factors()).map_err(place)? {
                return Ok(CudaWeight { kept: Kept::Packed(packed), dtype });
            }
        }
        if matches!(layout, GpuLayout::Fixed | GpuLayout::Integers) {
            let why = match (families.is_empty(), layout) {
                (false, _) => "too many weights lie outside of what it can express",
                (_, GpuLayout::Fixed) => "its weights are no BF16 numbers",
                _ => "its weights are no small integers",
            };
            let (kind, layout) = (plan.kind.name(), layout.name());
            return Err(Error::Unsupported(format!(
                "a matrix of kind {kind} cannot be kept in the layout {layout}: {why}"
            )));
        }
        stream.decode_once().map_err(place)?;
        Ok(CudaWeight { kept: Kept::Stream(stream), dtype })
    }

    /// The shape of the matrix.
    pub fn geometry(&self) -> Geometry {
        match &self.kept {
            Kept::Stream(stream) => stream.geometry(),
            Kept::Packed(packed) => packed.geometry(),
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
            Kept::Packed(packed) => packed.device(),
        }
    }

    fn kernels(&self) -> &Kernels {
        match &self.kept {
            Kept::Stream(stream) => stream.kernels(),
            Kept::Packed(packed) => packed.kernels(),
        }
    }

    /// The layout in use.
    pub fn layout(&self) -> GpuLayout {
        match &self.kept {
            Kept::Stream(_) => GpuLayout::Rans,
            Kept::Packed(packed) => match packed.family() {
                Family::Fixed => GpuLayout::Fixed,
                Family::Int8 | Family::Int5 | Family::Int4 => GpuLayout::Integers,
            },
        }
    }

    /// Bytes that it takes in the GPU's memory.
    pub fn stored_bytes(&self) -> usize {
        match &self.kept {
            Kept::Stream(stream) => stream.stored_bytes(),
            Kept::Packed(packed) => packed.stored_bytes(),
        }
    }

    /// Enqueues the decoding of rows, which start at a multiple of 16, into the front of `memory`, for a product or as the
    /// tensor has them. What lies behind them is used too: see [`CudaWeight::room`].
    fn decode_block(
        &self,
        rows: Range<usize>,
        dtype: Dtype,
        memory: &mut CudaViewMut<u8>,
        factors: bool,
    ) -> Result<()> {
        let packed = match &self.kept {
            Kept::Stream(stream) if factors => return stream.decode_factors(rows, dtype, memory),
            Kept::Stream(stream) => return stream.decode_rows(rows, dtype, memory),
            Kept::Packed(packed) => packed,
        };
        if packed.decodes_to(dtype) {
            return packed.decode_rows(rows, dtype, memory);
        }
        let values = rows.len() * self.geometry().cols;
        let (mut out, mut aside) = memory.split_at_mut(values * dtype.size());
        packed.decode_rows(rows, Dtype::Bf16, &mut aside)?;
        self.convert(&aside.as_view(), Dtype::Bf16, &mut out, values, dtype)
    }

    /// Bytes that [`CudaWeight::decode_block`] needs for a weight.
    fn room(&self, dtype: Dtype) -> usize {
        match &self.kept {
            Kept::Packed(packed) if !packed.decodes_to(dtype) => dtype.size() + 2,
            _ => dtype.size(),
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
            Kept::Packed(packed) if T::DTYPE == packed.ids_dtype() && T::DTYPE == self.dtype => {
                packed.decode_ids(ids, &mut bytes_mut(&mut out)?)?;
            }
            Kept::Packed(packed) => {
                let from = packed.ids_dtype();
                self.kernels().scratch.workspace(self.device(), from.size() * values, |aside| {
                    packed.decode_ids(ids, &mut aside.as_view_mut())?;
                    self.convert(&aside.as_view(), from, &mut bytes_mut(&mut out)?, values, T::DTYPE)
                })?;
            }
        }
        Ok(CudaStorage::wrap_cuda_slice(out, self.device().clone()))
    }

    /// `x · Wᵀ` for a contiguous `x` of shape `[…, columns]`: `[…, rows]` in `x`'s dtype, with sums in F32.
    ///
    /// # Errors
    /// If the shapes do not fit, `x` lies on another device or has another dtype than BF16, F16 and F32, or a launch fails.
    pub fn matmul(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let Geometry { rows, cols } = self.geometry();
        self.apply(x, layout, [cols, rows], Direction::Forward)
    }

    /// `y · W` for a contiguous `y` of shape `[…, rows]`: the gradient of [`CudaWeight::matmul`].
    ///
    /// # Errors
    /// As [`CudaWeight::matmul`].
    pub fn matmul_transposed(&self, y: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let Geometry { rows, cols } = self.geometry();
        self.apply(y, layout, [rows, cols], Direction::Backward)
    }

    fn apply(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        [inner, outer]: [usize; 2],
        direction: Direction,
    ) -> Result<(CudaStorage, Shape)> {
        self.expect_device(x)?;
        let Some((_, leading)) = layout.dims().split_last().filter(|(last, _)| **last == inner) else {
            let Geometry { rows, cols } = self.geometry();
            let dims = layout.dims();
            return Err(Error::Invalid(format!(
                "an input of shape {dims:?} does not fit a weight of shape [{rows}, {cols}]"
            )));
        };
        let shape = Shape::from([leading, &[outer]].concat());
        let range = contiguous(layout)?;
        let y = match &x.slice {
            CudaStorageSlice::BF16(x) => self.product(&x.slice(range), inner, outer, direction)?,
            CudaStorageSlice::F16(x) => self.product(&x.slice(range), inner, outer, direction)?,
            CudaStorageSlice::F32(x) => self.product(&x.slice(range), inner, outer, direction)?,
            _ => return Err(Error::Unsupported("an input of another dtype than f32, bf16 and f16".into())),
        };
        Ok((y, shape))
    }

    /// The product for the rows of `inner` values in `x`.
    fn product<T: Element>(
        &self,
        x: &CudaView<T>,
        inner: usize,
        outer: usize,
        direction: Direction,
    ) -> Result<CudaStorage> {
        let m = x.len() / inner;
        let mut y = self.alloc::<T>(m * outer, "a result")?;
        if m > 0 {
            let fused = match (&self.kept, direction) {
                (Kept::Packed(packed), Direction::Forward) => {
                    packed.product(&bytes(x)?, &mut bytes_mut(&mut y)?, m, T::DTYPE)?
                }
                _ => false,
            };
            match direction {
                _ if fused => {}
                Direction::Forward => self.forward_dense(x, m, &mut y)?,
                Direction::Backward => self.backward_dense(x, m, &mut y)?,
            }
        }
        Ok(CudaStorage::wrap_cuda_slice(y, self.device().clone()))
    }

    /// Decodes rows of weights and multiplies with them, block by block: each gives some columns of the result.
    fn forward_dense<T: Element>(&self, x: &CudaView<T>, m: usize, y: &mut CudaSlice<T>) -> Result<()> {
        let Geometry { rows, cols } = self.geometry();
        let (block, size) = (self.block_rows(T::DTYPE), T::DTYPE.size());
        let (x, mut y) = (bytes(x)?, bytes_mut(y)?);
        self.kernels().scratch.workspace(self.device(), block * cols * self.room(T::DTYPE), |workspace| {
            for start in (0..rows).step_by(block) {
                let n = block.min(rows - start);
                self.decode_block(start..start + n, T::DTYPE, &mut workspace.as_view_mut(), true)?;
                let strides = Strides { a: cols, b: cols, c: rows };
                let (dtype, out) = (T::DTYPE, T::DTYPE);
                let gemm = Gemm { m, n, k: cols, transposed: true, dtype, out, strides, add: false };
                gemm.run(self.device(), &x, &workspace.as_view(), &mut y.slice_mut(start * size..))?;
            }
            Ok(())
        })
    }

    /// As [`CudaWeight::forward_dense`]; each block adds to the whole result, in F32 where there are several.
    fn backward_dense<T: Element>(&self, y: &CudaView<T>, m: usize, x: &mut CudaSlice<T>) -> Result<()> {
        let Geometry { rows, cols } = self.geometry();
        let (block, size) = (self.block_rows(T::DTYPE), T::DTYPE.size());
        let y = bytes(y)?;
        let single = block >= rows;
        let mut sums = if single { None } else { Some(self.alloc::<f32>(m * cols, "a gradient")?) };
        self.kernels().scratch.workspace(self.device(), block * cols * self.room(T::DTYPE), |workspace| {
            for start in (0..rows).step_by(block) {
                let k = block.min(rows - start);
                self.decode_block(start..start + k, T::DTYPE, &mut workspace.as_view_mut(), true)?;
                let strides = Strides { a: rows, b: cols, c: cols };
                let out = if single { T::DTYPE } else { Dtype::F32 };
                let gemm = Gemm { m, n: cols, k, transposed: false, dtype: T::DTYPE, out, strides, add: start > 0 };
                let mut target = match &mut sums {
                    Some(sums) => bytes_mut(sums)?,
                    None => bytes_mut(x)?,
                };
                gemm.run(self.device(), &y.slice(start * size..), &workspace.as_view(), &mut target)?;
            }
            Ok(())
        })?;
        if let Some(sums) = sums {
            use candle_core::backend::BackendStorage;
            let sums = CudaStorage::wrap_cuda_slice(sums, self.device().clone());
            let dtype = match T::DTYPE {
                Dtype::Bf16 => candle_core::DType::BF16,
                Dtype::F16 => candle_core::DType::F16,
                _ => candle_core::DType::F32,
            };
            let mut rounded = sums.to_dtype(&Layout::contiguous((m, cols)), dtype)?;
            std::mem::swap(x, T::as_cuda_slice_mut(&mut rounded)?);
        }
        Ok(())
    }

    /// Rows that are decoded at a time.
    fn block_rows(&self, dtype: Dtype) -> usize {
        rows_within(WORKSPACE, self.geometry().cols * self.room(dtype)).min(self.geometry().rows)
    }

    fn alloc<T: DeviceRepr>(&self, length: usize, what: &str) -> Result<CudaSlice<T>> {
        // SAFETY: whoever asks for it writes all of it before anyone reads.
        let memory = unsafe { self.device().alloc::<T>(length) };
        memory.map_err(|e| out_of_memory(e, length * size_of::<T>(), what))
    }

    fn expect_device(&self, x: &CudaStorage) -> Result<()> {
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

/// Which product.
#[derive(Clone, Copy)]
enum Direction {
    Forward,
    Backward,
}

/// The elements of a contiguous layout.
fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::Invalid("the input is not contiguous".into()));
    };
    Ok(start..end)
}

/// The bytes of typed memory.
fn bytes<'a, T>(view: &'a CudaView<'_, T>) -> Result<CudaView<'a, u8>> {
    // SAFETY: any memory is bytes, and the length is that of the view.
    let bytes = unsafe { view.transmute::<u8>(view.len() * size_of::<T>()) };
    bytes.ok_or_else(|| Error::Invalid("a view that is no bytes".into()))
}

/// The bytes of typed memory, to be written.
fn bytes_mut<T>(memory: &mut CudaSlice<T>) -> Result<CudaViewMut<'_, u8>> {
    let length = memory.len() * size_of::<T>();
    // SAFETY: as above; whoever writes them writes values of `T`, of which every pattern is one.
    let bytes = unsafe { memory.transmute_mut::<u8>(length) };
    bytes.ok_or_else(|| Error::Invalid("a view that is no bytes".into()))
}

/// Scales of a quantised matrix.
enum Scales {
    None,
    Rows(Vec<f32>),
    Tiles(Vec<f32>),
}

impl Scales {
    /// Those of a stream: one for the whole matrix is one for each row.
    fn of(plan: &Plan, geometry: Geometry, bytes: &[u8]) -> Scales {
        let scales = || bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b));
        match plan.scale {
            ScaleLayout::None | ScaleLayout::Levels => Scales::None,
            ScaleLayout::Matrix => Scales::Rows(vec![scales().next().unwrap_or(0.0); geometry.rows]),
            ScaleLayout::Row => Scales::Rows(scales().take(geometry.rows).collect()),
            ScaleLayout::Tile => Scales::Tiles(scales().take(geometry.tiles()).collect()),
        }
    }

    fn factors(&self) -> FactorsOf<'_> {
        match self {
            Scales::None => FactorsOf::Nothing,
            Scales::Rows(scales) => FactorsOf::Rows(scales),
            Scales::Tiles(scales) => FactorsOf::Tiles(scales),
        }
    }
}

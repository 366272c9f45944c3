//! `Y = X·Wᵀ` with a compressed `W`.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};

#[cfg(feature = "cuda")]
use super::joined;
use super::kept;
use super::place::{Place, dense_product};
use crate::matrix::{Executor, GpuLayout, Weight, matmul_each};

/// candle's own pool, so that its threads and ours do not compete.
#[derive(Clone, Copy, Debug, Default)]
pub struct PoolExecutor;

impl Executor for PoolExecutor {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        candle_core::utils::barrier_pool().execute_chunked(tasks, |range| range.for_each(task));
    }
}

/// The product of an activation with the transpose of a compressed matrix, as candle's linear layers compute it.
///
/// Strips of 64 rows are decoded as they are multiplied; the matrix never exists as a whole. The gradient with respect to
/// the activation is the product with the matrix itself; the matrix has none.
#[derive(Clone, Debug)]
pub struct CompressedMatmul {
    pub(super) weight: Weight,
    pub(super) place: Place,
}

impl CompressedMatmul {
    /// Holds a weight of `out × in` (rows × columns), to be multiplied on the CPU.
    pub fn new(weight: Weight) -> CompressedMatmul {
        CompressedMatmul { weight, place: Place::Cpu }
    }

    /// Holds a weight of `out × in`, to be multiplied on `device`. On a GPU it is kept in its memory as `layout` says.
    ///
    /// # Errors
    /// If a tile is damaged; if the device is neither the CPU nor a GPU that this build has kernels for, its memory is too
    /// small, or it cannot hold the matrix in that layout.
    pub fn on(weight: Weight, device: &Device, layout: GpuLayout) -> crate::Result<CompressedMatmul> {
        let place = Place::new(&weight, device, layout)?;
        Ok(CompressedMatmul { weight, place })
    }

    /// The layout in a GPU's memory, and the bytes that it takes there; `None` on the CPU.
    pub fn in_use(&self) -> Option<(GpuLayout, usize)> {
        self.place.in_use()
    }

    /// Why it is in that layout: `auto` tells what it measured. `None` on the CPU.
    pub fn why(&self) -> Option<&str> {
        self.place.why()
    }

    /// The GPU that the weight is on.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu(&self) -> Option<Device> {
        self.place.gpu()
    }

    /// Rows of a matrix on a GPU by their ids (U32, contiguous).
    #[cfg(feature = "cuda")]
    pub(crate) fn embed(&self, ids: &Tensor, dtype: candle_core::DType) -> Result<Tensor> {
        let ids = ids.flatten_all()?;
        match &self.place {
            Place::Dense(table, _) => table.index_select(&ids, 0)?.to_dtype(dtype),
            _ => ids.apply_op1_no_bwd(&TableRows(self.on_gpu()?, dtype)).map(kept),
        }
    }

    /// The weight.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The weight on the GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn on_gpu(&self) -> Result<&crate::cuda::CudaWeight> {
        match &self.place {
            Place::Cuda(weight) => Ok(weight),
            _ => bail!(
                "compressed linear{}: the input is on a GPU and the weight on the CPU; load the layer for that device",
                self.weight.name().map_or(String::new(), |name| format!(" {name}"))
            ),
        }
    }

    /// Names the operation and the tensor in an error.
    #[cfg(feature = "cuda")]
    fn named(&self, error: crate::Error) -> candle_core::Error {
        let name = self.weight.name().map_or(String::new(), |name| format!(" {name}"));
        candle_core::Error::Msg(format!("compressed linear{name}: {error}"))
    }

    /// Refuses to run on the CPU what was loaded for a GPU.
    fn expect_cpu(&self) -> Result<()> {
        match &self.place {
            Place::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            _ => bail!(
                "compressed linear{}: the input is on the CPU and the weight on a GPU; move the input there",
                self.weight.name().map_or(String::new(), |name| format!(" {name}"))
            ),
        }
    }

    /// The rows of an activation whose last dimension is `inner`, and its other dimensions.
    fn rows<'l>(&self, storage: &'l CpuStorage, layout: &'l Layout, inner: usize) -> Result<Rows<'l>> {
        self.expect_cpu()?;
        let g = self.weight.geometry();
        activation_rows("compressed linear", self.weight.name(), [g.rows, g.cols], storage, layout, inner)
    }
}

/// Rows of activations, and the dimensions before the last.
pub(super) type Rows<'l> = (Cow<'l, [f32]>, &'l [usize]);

/// The rows of a strided activation whose last dimension is `inner`, and its other dimensions. Errors name the operation,
/// its tensor and the weight's shape.
pub(super) fn activation_rows<'l>(
    what: &str,
    name: Option<&str>,
    weight: [usize; 2],
    storage: &'l CpuStorage,
    layout: &'l Layout,
    inner: usize,
) -> Result<Rows<'l>> {
    let dims = layout.dims();
    let Some((_, leading)) = dims.split_last().filter(|(last, _)| **last == inner) else {
        let name = name.map_or(String::new(), |name| format!(" {name}"));
        bail!("{what}{name}: an input of shape {dims:?} does not fit a weight of shape {weight:?}")
    };
    let rows = match storage {
        CpuStorage::F32(x) => match layout.contiguous_offsets() {
            Some((start, end)) => Cow::Borrowed(&x[start..end]),
            None => Cow::Owned(gather(x, layout, |x| x)),
        },
        CpuStorage::BF16(x) => Cow::Owned(gather(x, layout, bf16::to_f32)),
        CpuStorage::F16(x) => Cow::Owned(gather(x, layout, f16::to_f32)),
        other => bail!("{what}: an input of {:?}, allowed are f32, bf16 and f16", other.dtype()),
    };
    Ok((rows, leading))
}

/// Results in the dtype of the activation that they were made of.
pub(super) fn store(like: &CpuStorage, y: Vec<f32>) -> CpuStorage {
    match like {
        CpuStorage::BF16(_) => CpuStorage::BF16(y.into_iter().map(bf16::from_f32).collect()),
        CpuStorage::F16(_) => CpuStorage::F16(y.into_iter().map(f16::from_f32).collect()),
        _ => CpuStorage::F32(y),
    }
}

/// A tensor's values in row-major order, wherever its strides and offset put them.
fn gather<T: Copy>(storage: &[T], layout: &Layout, value: impl Fn(T) -> f32) -> Vec<f32> {
    if let Some((start, end)) = layout.contiguous_offsets() {
        return storage[start..end].iter().map(|&x| value(x)).collect();
    }
    let (dims, strides) = (layout.dims(), layout.stride());
    let place = |index: usize| {
        let (mut rest, mut offset) = (index, layout.start_offset());
        for (&dim, &stride) in dims.iter().zip(strides).rev() {
            offset += rest % dim * stride;
            rest /= dim;
        }
        offset
    };
    (0..layout.shape().elem_count()).map(|index| value(storage[place(index)])).collect()
}

impl CustomOp1 for CompressedMatmul {
    fn name(&self) -> &'static str {
        "compressed-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let g = self.weight.geometry();
        let (x, leading) = self.rows(storage, layout, g.cols)?;
        let y = self.weight.matrix()?.matmul(&x, leading.iter().product(), &PoolExecutor)?;
        Ok((store(storage, y), Shape::from([leading, &[g.rows]].concat())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_gpu()?.matmul(storage, layout).map_err(|e| self.named(e))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        bail!("compressed linear: this build has no CUDA kernels; build it with feature cuda")
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1_no_bwd(&Transposed(self)).map(Some)
    }
}

/// `dX = dY·W`.
struct Transposed<'a>(&'a CompressedMatmul);

impl CustomOp1 for Transposed<'_> {
    fn name(&self) -> &'static str {
        "compressed-linear-backward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let g = self.0.weight.geometry();
        let (y, leading) = self.0.rows(storage, layout, g.rows)?;
        let x = self.0.weight.matrix()?.matmul_transposed(&y, leading.iter().product(), &PoolExecutor)?;
        Ok((store(storage, x), Shape::from([leading, &[g.cols]].concat())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.on_gpu()?.matmul_transposed(storage, layout).map_err(|e| self.0.named(e))
    }
}

/// Rows of a table on a GPU.
#[cfg(feature = "cuda")]
pub(super) struct TableRows<'a>(pub &'a crate::cuda::CudaWeight, pub candle_core::DType);

#[cfg(feature = "cuda")]
impl CustomOp1 for TableRows<'_> {
    fn name(&self) -> &'static str {
        "compressed-embedding"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("compressed embedding: the table is on a GPU, the ids are not")
    }

    fn cuda_fwd(&self, ids: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let rows = self.0.decode_ids(ids, layout, self.1)?;
        Ok((rows, Shape::from((layout.shape().elem_count(), self.0.geometry().cols))))
    }
}

/// Several products with one activation. candle's operations have one result: it holds the products one after another.
#[derive(Clone)]
struct Merged(Vec<CompressedMatmul>);

impl Merged {
    /// Cuts the result, or a gradient of its shape, into the products for an activation of leading dimensions `leading`.
    fn split(&self, y: &Tensor, leading: &[usize]) -> Result<Vec<Tensor>> {
        split_products(y, leading, self.0.iter().map(|op| op.weight.geometry().rows))
    }
}

/// Cuts a tensor that holds the products of several weights, one after another, into those products. `rows` are those of
/// the weights.
pub(super) fn split_products(y: &Tensor, leading: &[usize], rows: impl Iterator<Item = usize>) -> Result<Vec<Tensor>> {
    let m = leading.iter().product::<usize>();
    let mut start = 0;
    let part = |rows: usize| {
        let part = y.narrow(0, start, m * rows)?.reshape([leading, &[rows]].concat());
        start += m * rows;
        part
    };
    rows.map(part).collect()
}

impl CustomOp1 for Merged {
    fn name(&self) -> &'static str {
        "compressed-linears"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (mut x, mut leading) = (Cow::Borrowed(&[][..]), &[][..]);
        for (index, op) in self.0.iter().enumerate() {
            let cols = op.weight.geometry().cols;
            if index == 0 || layout.dims().last() != Some(&cols) {
                (x, leading) = op.rows(storage, layout, cols)?;
            }
        }
        let matrices = self.0.iter().map(|op| op.weight.matrix()).collect::<crate::Result<Vec<_>>>()?;
        let y = matmul_each(&matrices, &x, leading.iter().product(), &PoolExecutor)?;
        let shape = Shape::from(y.len());
        Ok((store(storage, y), shape))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Some((_, leading)) = arg.dims().split_last() else { return Ok(None) };
        let parts = self.split(grad, leading)?.into_iter().zip(&self.0);
        let mut parts = parts.map(|(grad, op)| grad.apply_op1_no_bwd(&Transposed(op)));
        let first = parts.next().transpose()?;
        first.map(|first| parts.try_fold(first, |sum, part| sum + part?)).transpose()
    }
}

/// `x·Wᵀ` for `x` of shape `[…, in]` (f32, bf16 or f16; any strides) and a compressed weight of `out × in`: a tensor of
/// shape `[…, out]` in `x`'s dtype. Differentiable with respect to `x`.
///
/// # Errors
/// If the shapes do not fit (the message has both), the dtype is another, or a tile of the weight is damaged.
pub fn compressed_linear(x: &Tensor, op: &CompressedMatmul) -> Result<Tensor> {
    if let Some(dense) = op.place.dense() {
        return dense_product(x, dense);
    }
    // Kernels on a GPU take rows that follow one another.
    let x = if x.device().is_cpu() { x } else { &x.contiguous()? };
    // Only a tracked argument needs the op to be kept for the way back.
    if x.track_op() { x.apply_op1(op.clone()) } else { x.apply_op1_no_bwd(op) }.map(kept)
}

/// What [`compressed_linear`] gives for each of `ops`, to the last bit, in one parallel region: the activation is gathered
/// and made ready once for all of them. For queries, keys and values, or for gate and up.
///
/// # Errors
/// As [`compressed_linear`].
pub fn compressed_linears(x: &Tensor, ops: &[&CompressedMatmul]) -> Result<Vec<Tensor>> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(products) = joined(x, ops.iter().map(|op| op.on_gpu().ok()).collect())?
    {
        return Ok(products);
    }
    if ops.len() < 2 || !x.device().is_cpu() {
        return ops.iter().map(|op| compressed_linear(x, op)).collect();
    }
    let merged = Merged(ops.iter().map(|&op| op.clone()).collect());
    let y = if x.track_op() { x.apply_op1(merged.clone())? } else { x.apply_op1_no_bwd(&merged)? };
    merged.split(&y, &x.dims()[..x.rank() - 1])
}

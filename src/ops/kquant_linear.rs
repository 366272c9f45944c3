//! `Y = X·Wᵀ` with a `W` of ggml's block formats.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};

use super::PoolExecutor;
use super::compressed_linear::{Rows, activation_rows, split_products, store};
#[cfg(feature = "cuda")]
use super::joined;
use super::kept;
#[cfg(feature = "cuda")]
use super::place::dense_product;
use crate::codec::kquant::GgmlType;
use crate::matrix::{KQuantMatrix, kquant_matmul_each, run_parts};
use crate::{Error, Result as TaperResult};

/// The product of an activation with the transpose of a quantised matrix.
///
/// On the CPU it is what candle's `QMatMul` computes: the activation is quantised to 8 bits, the sums of integers are exact.
/// On a GPU activations are as they are, and sums are F32. Types without kernels for the CPU (F32, F16, BF16, Q8_K,
/// INT4_G128) are dequantised there, some rows at a time, and multiplied in F32.
///
/// The gradient with respect to the activation is that of the dequantised matrix; the matrix has none.
#[derive(Clone, Debug)]
pub struct KQuantMatmul {
    place: Place,
    shape: [usize; 2],
    name: Option<Arc<str>>,
    /// Only GPUs look at it.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    fp8: bool,
}

/// Where the matrix is.
#[derive(Clone, Debug)]
enum Place {
    Cpu(Arc<KQuantMatrix>),
    /// In a GPU's memory, as many bits as in the file.
    #[cfg(feature = "cuda")]
    Cuda(Arc<crate::cuda::CudaWeight>),
    /// In a GPU's memory, of a type without kernels: plain weights, for candle's own product.
    #[cfg(feature = "cuda")]
    Dense(Tensor),
}

/// A matrix as blocks of a file, to be laid out: see [`KQuantMatrix::pack`].
pub struct Blocks<'a> {
    /// Their format.
    pub ty: GgmlType,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// The blocks, row by row.
    pub data: &'a [u8],
    /// Which of the file's rows is row `r`.
    pub order: &'a (dyn Fn(usize) -> usize + Sync),
    /// Gets the ranges of `data` that are no longer needed.
    pub done: &'a (dyn Fn(Range<usize>) + Sync),
}

impl KQuantMatmul {
    /// Holds a matrix of `out × in` (rows × columns), to be multiplied on the CPU.
    pub fn new(matrix: Arc<KQuantMatrix>) -> KQuantMatmul {
        let shape = [matrix.rows(), matrix.cols()];
        KQuantMatmul { place: Place::Cpu(matrix), shape, name: None, fp8: false }
    }

    /// Lays out a matrix in the memory of `device`.
    ///
    /// # Errors
    /// If its rows are not made of whole blocks or the data has another size; if the device is neither the CPU nor a GPU that
    /// this build has kernels for, or its memory is too small.
    pub fn on(blocks: &Blocks, device: &Device) -> TaperResult<KQuantMatmul> {
        let Blocks { ty, shape, data, order, done } = *blocks;
        let [rows, cols] = shape;
        crate::codec::kquant::int4::check(ty, data)?;
        let place = match device {
            Device::Cpu => Place::Cpu(Arc::new(KQuantMatrix::pack(ty, rows, cols, data, order, &PoolExecutor, done)?)),
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) if crate::cuda::CudaWeight::takes(ty) => {
                Place::Cuda(Arc::new(crate::cuda::CudaWeight::from_blocks(ty, shape, data, order, cuda, &done)?))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                let matrix = KQuantMatrix::pack(ty, rows, cols, data, order, &PoolExecutor, done)?;
                let dtype = match ty {
                    GgmlType::F16 => candle_core::DType::F16,
                    GgmlType::BF16 => candle_core::DType::BF16,
                    _ => candle_core::DType::F32,
                };
                let ids: Vec<u32> = (0..rows as u32).collect();
                Place::Dense(rows_of(&matrix, &ids)?.to_dtype(dtype)?.to_device(device)?)
            }
            other => {
                let text = format!("quantised layers run on the CPU and with CUDA, not on {other:?}");
                return Err(Error::Unsupported(text));
            }
        };
        Ok(KQuantMatmul { place, shape, name: None, fp8: false })
    }

    /// Remembers the tensor's name for errors.
    pub fn with_name(mut self, name: &str) -> KQuantMatmul {
        self.name = Some(name.into());
        self
    }

    /// Rounds activations to FP8: from 64 rows on, for 4-bit integers in groups of 128 on a GPU of compute capability 8.9 or
    /// later. How fast that is says the README. E4M3 has four significant bits and each row a power of two of its own, which
    /// costs some 2.7% of the result's norm for Gaussian rows; a row with infinities or NaN gives NaN. Elsewhere activations
    /// stay as they are. It is off unless this turns it on.
    pub fn with_fp8(self, fp8: bool) -> KQuantMatmul {
        KQuantMatmul { fp8, ..self }
    }

    /// The matrix, if it is on the CPU.
    pub fn matrix(&self) -> Option<&Arc<KQuantMatrix>> {
        match &self.place {
            Place::Cpu(matrix) => Some(matrix),
            #[cfg(feature = "cuda")]
            _ => None,
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Bytes that it takes.
    pub fn stored_bytes(&self) -> usize {
        match &self.place {
            Place::Cpu(matrix) => matrix.stored_bytes(),
            #[cfg(feature = "cuda")]
            Place::Cuda(weight) => weight.stored_bytes(),
            #[cfg(feature = "cuda")]
            Place::Dense(weight) => weight.elem_count() * weight.dtype().size_in_bytes(),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match &self.place {
            Place::Cpu(_) => Device::Cpu,
            #[cfg(feature = "cuda")]
            Place::Cuda(weight) => Device::Cuda(weight.device().clone()),
            #[cfg(feature = "cuda")]
            Place::Dense(weight) => weight.device().clone(),
        }
    }

    /// Rows by their ids (one dimension, U32), dequantised and rounded to `dtype`. Of ids that are on a GPU, which would have
    /// to be waited for, those outside the matrix give zeros.
    ///
    /// # Errors
    /// If an id on the CPU is outside the matrix.
    pub fn rows_of(&self, ids: &Tensor, dtype: candle_core::DType) -> Result<Tensor> {
        let [rows, _] = self.shape();
        let known = if ids.device().is_cpu() || self.matrix().is_some() { ids.to_vec1::<u32>()? } else { vec![] };
        if let Some(id) = known.iter().find(|&&id| id as usize >= rows) {
            bail!("token id {id} is not in a vocabulary of {rows}")
        }
        #[cfg(feature = "cuda")]
        let ids = &ids.to_device(&self.device())?;
        match &self.place {
            Place::Cpu(matrix) => rows_of(matrix, &known)?.to_dtype(dtype),
            #[cfg(feature = "cuda")]
            Place::Cuda(weight) => {
                ids.contiguous()?.apply_op1_no_bwd(&super::compressed_linear::TableRows(weight, dtype)).map(kept)
            }
            #[cfg(feature = "cuda")]
            Place::Dense(weight) => weight.index_select(ids, 0)?.to_dtype(dtype),
        }
    }

    /// The whole matrix, dequantised and rounded to `dtype`.
    ///
    /// # Errors
    /// If the memory is too small.
    pub fn dequantize(&self, dtype: candle_core::DType) -> Result<Tensor> {
        self.rows_of(&Tensor::arange(0, self.shape[0] as u32, &self.device())?, dtype)
    }

    fn on_cpu(&self) -> Result<&Arc<KQuantMatrix>> {
        self.matrix().ok_or_else(|| self.elsewhere("the CPU", "a GPU"))
    }

    fn elsewhere(&self, input: &str, weight: &str) -> candle_core::Error {
        let name = self.name.as_ref().map_or(String::new(), |name| format!(" {name}"));
        candle_core::Error::Msg(format!(
            "kquant linear{name}: the input is on {input} and the weight on {weight}; load the layer for that device"
        ))
    }

    /// The weight on the GPU.
    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> Result<&crate::cuda::CudaWeight> {
        match &self.place {
            Place::Cuda(weight) => Ok(weight),
            _ => Err(self.elsewhere("a GPU", "the CPU")),
        }
    }

    /// Names the operation and the tensor in an error.
    #[cfg(feature = "cuda")]
    fn named(&self, error: Error) -> candle_core::Error {
        let name = self.name.as_ref().map_or(String::new(), |name| format!(" {name}"));
        candle_core::Error::Msg(format!("kquant linear{name}: {error}"))
    }

    fn rows<'l>(&self, storage: &'l CpuStorage, layout: &'l Layout, inner: usize) -> Result<Rows<'l>> {
        activation_rows("kquant linear", self.name.as_deref(), self.shape, storage, layout, inner)
    }
}

/// Rows of a matrix as a tensor `[rows, columns]`.
fn rows_of(matrix: &KQuantMatrix, ids: &[u32]) -> Result<Tensor> {
    let cols = matrix.cols();
    let mut values = vec![0.0; ids.len() * cols];
    let rows = values.chunks_exact_mut(cols).collect();
    run_parts(&PoolExecutor, rows, |row, values| matrix.dequantize_row(ids[row] as usize, values))?;
    Tensor::from_vec(values, (ids.len(), cols), &Device::Cpu)
}

impl CustomOp1 for KQuantMatmul {
    fn name(&self) -> &'static str {
        "kquant-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let matrix = self.on_cpu()?;
        let (x, leading) = self.rows(storage, layout, matrix.cols())?;
        let y = matrix.matmul(&x, leading.iter().product(), &PoolExecutor)?;
        Ok((store(storage, y), Shape::from([leading, &[matrix.rows()]].concat())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let weight = self.on_gpu()?;
        let product = if self.fp8 { weight.matmul_fp8(storage, layout) } else { weight.matmul(storage, layout) };
        product.map_err(|e| self.named(e))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        bail!("kquant linear: this build has no CUDA kernels; build it with feature cuda")
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1_no_bwd(&Transposed(self)).map(Some)
    }
}

/// `dX = dY·W`.
struct Transposed<'a>(&'a KQuantMatmul);

impl CustomOp1 for Transposed<'_> {
    fn name(&self) -> &'static str {
        "kquant-linear-backward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let matrix = self.0.on_cpu()?;
        let (y, leading) = self.0.rows(storage, layout, matrix.rows())?;
        let x = matrix.matmul_transposed(&y, leading.iter().product(), &PoolExecutor)?;
        Ok((store(storage, x), Shape::from([leading, &[matrix.cols()]].concat())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.on_gpu()?.matmul_transposed(storage, layout).map_err(|e| self.0.named(e))
    }
}

/// Several products with one activation; the result holds them one after another.
struct Merged<'a>(&'a [&'a KQuantMatmul]);

impl CustomOp1 for Merged<'_> {
    fn name(&self) -> &'static str {
        "kquant-linears"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some(first) = self.0.first() else { bail!("kquant linears: there is no weight") };
        // All of them are asked, so that the one that does not fit is named.
        let last = layout.dims().last().copied().unwrap_or(0);
        let other = self.0.iter().find(|op| op.shape[1] != last).unwrap_or(first);
        let (x, leading) = other.rows(storage, layout, other.shape[1])?;
        let matrices = self.0.iter().map(|op| op.on_cpu().map(|matrix| &**matrix)).collect::<Result<Vec<_>>>()?;
        let y = kquant_matmul_each(&matrices, &x, leading.iter().product(), &PoolExecutor)?;
        let shape = Shape::from(y.len());
        Ok((store(storage, y), shape))
    }
}

/// `x·Wᵀ` for `x` of shape `[…, in]` (f32, bf16 or f16; any strides) and a quantised weight of `out × in`: a tensor of shape
/// `[…, out]` in `x`'s dtype. Differentiable with respect to `x`.
///
/// # Errors
/// If the shapes do not fit (the message has both), the dtype is another, or `x` is not where the weight is.
pub fn kquant_linear(x: &Tensor, op: &KQuantMatmul) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Place::Dense(dense) = &op.place {
        return dense_product(x, dense);
    }
    // Kernels on a GPU take rows that follow one another.
    let x = if x.device().is_cpu() { x } else { &x.contiguous()? };
    // Only a tracked argument needs the op to be kept for the way back.
    if x.track_op() { x.apply_op1(op.clone()) } else { x.apply_op1_no_bwd(op) }.map(kept)
}

/// What [`kquant_linear`] gives for each of `ops`, to the last bit, in one parallel region: the activation is quantised once
/// for all of them. For queries, keys and values, or for gate and up.
///
/// # Errors
/// As [`kquant_linear`].
pub fn kquant_linears(x: &Tensor, ops: &[&KQuantMatmul]) -> Result<Vec<Tensor>> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(products) = joined(x, ops.iter().map(|op| op.on_gpu().ok()).collect())?
    {
        return Ok(products);
    }
    if ops.len() < 2 || x.track_op() || !x.device().is_cpu() {
        return ops.iter().map(|op| kquant_linear(x, op)).collect();
    }
    let y = x.apply_op1_no_bwd(&Merged(ops))?;
    split_products(&y, &x.dims()[..x.rank() - 1], ops.iter().map(|op| op.shape[0]))
}

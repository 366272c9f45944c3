//! `Y = X·Wᵀ` with a compressed `W`.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};

use crate::matrix::{Executor, Weight};

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
    weight: Weight,
}

impl CompressedMatmul {
    /// Holds a weight of `out × in` (rows × columns).
    pub fn new(weight: Weight) -> CompressedMatmul {
        CompressedMatmul { weight }
    }

    /// The weight.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Applies `product` (of `m` rows of `inner` values with the matrix) to the last dimension of a strided tensor.
    fn apply(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
        [inner, outer]: [usize; 2],
        product: impl Fn(&[f32], usize) -> crate::Result<Vec<f32>>,
    ) -> Result<(CpuStorage, Shape)> {
        let dims = layout.dims();
        let Some((&last, leading)) = dims.split_last().filter(|(last, _)| **last == inner) else {
            let g = self.weight.geometry();
            bail!(
                "compressed linear: an input of shape {dims:?} does not fit a weight of shape [{}, {}]",
                g.rows,
                g.cols
            )
        };
        let m = layout.shape().elem_count() / last;
        let shape = Shape::from([leading, &[outer]].concat());
        if m == 0 {
            return Ok((zeros(storage.dtype())?, shape));
        }
        let y = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(product(&gather(x, layout, |x| x), m)?),
            CpuStorage::BF16(x) => {
                let y = product(&gather(x, layout, bf16::to_f32), m)?;
                CpuStorage::BF16(y.into_iter().map(bf16::from_f32).collect())
            }
            CpuStorage::F16(x) => {
                let y = product(&gather(x, layout, f16::to_f32), m)?;
                CpuStorage::F16(y.into_iter().map(f16::from_f32).collect())
            }
            other => bail!("compressed linear: an input of {:?}, allowed are f32, bf16 and f16", other.dtype()),
        };
        Ok((y, shape))
    }
}

fn zeros(dtype: DType) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F32 => CpuStorage::F32(Vec::new()),
        DType::BF16 => CpuStorage::BF16(Vec::new()),
        DType::F16 => CpuStorage::F16(Vec::new()),
        other => bail!("compressed linear: an input of {other:?}, allowed are f32, bf16 and f16"),
    })
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
        self.apply(storage, layout, [g.cols, g.rows], |x, m| self.weight.matrix()?.matmul(x, m, &PoolExecutor))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.apply_op1_no_bwd(&Transposed(self)).map(Some)
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
        let product = |y: &[f32], m: usize| self.0.weight.matrix()?.matmul_transposed(y, m, &PoolExecutor);
        self.0.apply(storage, layout, [g.rows, g.cols], product)
    }
}

/// `x·Wᵀ` for `x` of shape `[…, in]` (f32, bf16 or f16; any strides) and a compressed weight of `out × in`: a tensor of
/// shape `[…, out]` in `x`'s dtype. Differentiable with respect to `x`.
///
/// # Errors
/// If the shapes do not fit (the message has both), the dtype is another, or a tile of the weight is damaged.
pub fn compressed_linear(x: &Tensor, op: &CompressedMatmul) -> Result<Tensor> {
    // Only a tracked argument needs the op to be kept for the way back.
    if x.track_op() { x.apply_op1(op.clone()) } else { x.apply_op1_no_bwd(op) }
}

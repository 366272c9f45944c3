//! `Y = X·Wᵀ` with a `W` of ggml's block formats.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::PoolExecutor;
use super::compressed_linear::{Rows, activation_rows, split_products, store};
use crate::matrix::{KQuantMatrix, kquant_matmul_each};

/// The product of an activation with the transpose of a quantised matrix, as candle's `QMatMul` computes it: the
/// activation is quantised to 8 bits, the sums of integers are exact. On the CPU.
///
/// The gradient with respect to the activation is that of the dequantised matrix; the matrix has none.
#[derive(Clone, Debug)]
pub struct KQuantMatmul {
    matrix: Arc<KQuantMatrix>,
    name: Option<Arc<str>>,
}

impl KQuantMatmul {
    /// Holds a matrix of `out × in` (rows × columns).
    pub fn new(matrix: Arc<KQuantMatrix>) -> KQuantMatmul {
        KQuantMatmul { matrix, name: None }
    }

    /// Remembers the tensor's name for errors.
    pub fn with_name(mut self, name: &str) -> KQuantMatmul {
        self.name = Some(name.into());
        self
    }

    /// The matrix.
    pub fn matrix(&self) -> &Arc<KQuantMatrix> {
        &self.matrix
    }

    fn rows<'l>(&self, storage: &'l CpuStorage, layout: &'l Layout, inner: usize) -> Result<Rows<'l>> {
        let shape = [self.matrix.rows(), self.matrix.cols()];
        activation_rows("kquant linear", self.name.as_deref(), shape, storage, layout, inner)
    }
}

impl CustomOp1 for KQuantMatmul {
    fn name(&self) -> &'static str {
        "kquant-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, leading) = self.rows(storage, layout, self.matrix.cols())?;
        let y = self.matrix.matmul(&x, leading.iter().product(), &PoolExecutor)?;
        Ok((store(storage, y), Shape::from([leading, &[self.matrix.rows()]].concat())))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.apply_op1_no_bwd(&Transposed(self)).map(Some)
    }
}

/// `dX = dY·W`.
struct Transposed<'a>(&'a KQuantMatmul);

impl CustomOp1 for Transposed<'_> {
    fn name(&self) -> &'static str {
        "kquant-linear-backward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let matrix = &self.0.matrix;
        let (y, leading) = self.0.rows(storage, layout, matrix.rows())?;
        let x = matrix.matmul_transposed(&y, leading.iter().product(), &PoolExecutor)?;
        Ok((store(storage, x), Shape::from([leading, &[matrix.cols()]].concat())))
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
        let other = self.0.iter().find(|op| op.matrix.cols() != last).unwrap_or(first);
        let (x, leading) = other.rows(storage, layout, other.matrix.cols())?;
        let matrices: Vec<&KQuantMatrix> = self.0.iter().map(|op| &*op.matrix).collect();
        let y = kquant_matmul_each(&matrices, &x, leading.iter().product(), &PoolExecutor)?;
        let shape = Shape::from(y.len());
        Ok((store(storage, y), shape))
    }
}

/// `x·Wᵀ` for `x` of shape `[…, in]` (f32, bf16 or f16; any strides) and a quantised weight of `out × in`: a tensor of shape
/// `[…, out]` in `x`'s dtype. Differentiable with respect to `x`.
///
/// # Errors
/// If the shapes do not fit (the message has both), the dtype is another, or `x` is not on the CPU.
pub fn kquant_linear(x: &Tensor, op: &KQuantMatmul) -> Result<Tensor> {
    // Only a tracked argument needs the op to be kept for the way back.
    if x.track_op() { x.apply_op1(op.clone()) } else { x.apply_op1_no_bwd(op) }
}

/// What [`kquant_linear`] gives for each of `ops`, to the last bit, in one parallel region: the activation is quantised once
/// for all of them. For queries, keys and values, or for gate and up.
///
/// # Errors
/// As [`kquant_linear`].
pub fn kquant_linears(x: &Tensor, ops: &[&KQuantMatmul]) -> Result<Vec<Tensor>> {
    if ops.len() < 2 || x.track_op() {
        return ops.iter().map(|op| kquant_linear(x, op)).collect();
    }
    let y = x.apply_op1_no_bwd(&Merged(ops))?;
    split_products(&y, &x.dims()[..x.rank() - 1], ops.iter().map(|op| op.matrix.rows()))
}

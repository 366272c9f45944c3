//! A linear layer over a compressed weight.

use std::sync::Arc;

use candle_core::{Device, Module, Result, Tensor, bail};
use candle_nn::{Linear, VarBuilder};

use super::compress_tensor;
use crate::checkpoint::Checkpoint;
use crate::matrix::{GpuLayout, Options, Weight};
use crate::ops::{CompressedMatmul, bytes_to_tensor, compressed_linear, compressed_linears};

/// Replaces [`candle_nn::Linear`]: `x·Wᵀ + b` with `W` of shape `[out, in]` kept compressed.
#[derive(Clone, Debug)]
pub struct CompressedLinear {
    op: CompressedMatmul,
    bias: Option<Tensor>,
    span: tracing::Span,
}

impl CompressedLinear {
    /// Takes a compressed weight and perhaps a bias of shape `[out]`.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> CompressedLinear {
        CompressedLinear::of(CompressedMatmul::new(weight), bias)
    }

    /// As [`CompressedLinear::new`], on `device`; on a GPU the weight is kept as `layout` says.
    ///
    /// # Errors
    /// As [`CompressedMatmul::on`].
    pub fn on(weight: Weight, bias: Option<Tensor>, device: &Device, layout: GpuLayout) -> Result<CompressedLinear> {
        let bias = bias.map(|bias| bias.to_device(device)).transpose()?;
        Ok(CompressedLinear::of(CompressedMatmul::on(weight, device, layout)?, bias))
    }

    /// The same layer on another device.
    ///
    /// # Errors
    /// As [`CompressedLinear::on`].
    pub fn to_device(&self, device: &Device, layout: GpuLayout) -> Result<CompressedLinear> {
        CompressedLinear::on(self.weight().clone(), self.bias.clone(), device, layout)
    }

    pub(super) fn of(op: CompressedMatmul, bias: Option<Tensor>) -> CompressedLinear {
        let span = tracing::span!(tracing::Level::TRACE, "compressed-linear");
        CompressedLinear { op, bias, span }
    }

    /// The layout in a GPU's memory, and the bytes that it takes there; `None` on the CPU.
    pub fn in_use(&self) -> Option<(GpuLayout, usize)> {
        self.op.in_use()
    }

    /// Compresses a weight of shape `[out, in]` (bf16, f16 or f32).
    ///
    /// # Errors
    /// If the tensor has one dimension or another dtype, or the options contradict each other.
    pub fn from_tensor(weight: &Tensor, bias: Option<Tensor>, options: &Options) -> Result<CompressedLinear> {
        Ok(CompressedLinear::new(compress_tensor(weight, options)?, bias))
    }

    /// Compresses a layer.
    pub fn from_linear(linear: &Linear, options: &Options) -> Result<CompressedLinear> {
        CompressedLinear::from_tensor(linear.weight(), linear.bias().cloned(), options)
    }

    /// The layer whose weight is `weight`, `[out_dim, in_dim]`, and whose bias is `bias`, if there is one, where `vb`
    /// points: what [`candle_nn::linear_b`] takes. The weight is compressed now, in the dtype of `vb`; from a compressed
    /// checkpoint [`CompressedLinear::load`] takes it as it is.
    ///
    /// # Errors
    /// If the weight is missing, has another shape or dtype, or the options contradict each other.
    pub fn from_var_builder(
        in_dim: usize,
        out_dim: usize,
        options: &Options,
        vb: VarBuilder,
    ) -> Result<CompressedLinear> {
        let bias = vb.contains_tensor("bias").then(|| vb.get(out_dim, "bias")).transpose()?;
        CompressedLinear::from_tensor(&vb.get((out_dim, in_dim), "weight")?, bias, options)
    }

    /// The tensor `name` of a checkpoint, mapped where it is compressed, else compressed now as `options` say. `bias` is
    /// the name of another tensor.
    ///
    /// # Errors
    /// If a tensor is missing, damaged or of a dtype that cannot be multiplied.
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        name: &str,
        bias: Option<&str>,
        options: &Options,
    ) -> Result<CompressedLinear> {
        let weight = checkpoint.weight(name, options)?;
        let bias = bias.map(|bias| {
            let info = checkpoint.info(bias)?;
            let dtype = crate::codec::Dtype::from_name(&info.dtype).unwrap_or(crate::codec::Dtype::F32);
            let bytes = checkpoint.read(bias)?;
            bytes_to_tensor(&bytes, dtype, (1, bytes.len() / dtype.size()))?.flatten_all()
        });
        Ok(CompressedLinear::new(weight, bias.transpose()?))
    }

    /// The compressed weight.
    pub fn weight(&self) -> &Weight {
        self.op.weight()
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The uncompressed layer, in the weight's own dtype.
    pub fn to_dense(&self) -> Result<Linear> {
        let matrix = self.weight().matrix()?;
        let (rows, cols) = (matrix.geometry().rows, matrix.geometry().cols);
        Ok(Linear::new(bytes_to_tensor(&matrix.decode()?, matrix.dtype(), (rows, cols))?, self.bias.clone()))
    }

    /// Bytes that the weight takes, and took before.
    pub fn size(&self) -> (usize, usize) {
        let g = self.weight().geometry();
        (self.weight().stored_bytes(), g.rows * g.cols * self.weight().dtype().size())
    }
}

impl CompressedLinear {
    /// The product with the bias added.
    fn biased(&self, y: Tensor) -> Result<Tensor> {
        match &self.bias {
            None => Ok(y),
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
        }
    }
}

impl Module for CompressedLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let _enter = self.span.enter();
        self.biased(compressed_linear(x, &self.op)?)
    }
}

/// A linear layer that may run together with others on the same input, as Q, K and V or gate and up do.
pub trait LinearLayer: Module {
    /// What [`Module::forward`] of each layer gives, to the last bit. Layers that can do so make the input ready once and
    /// share one parallel region; by default they run one after another.
    ///
    /// # Errors
    /// As [`Module::forward`] of the first layer that fails.
    fn forward_each<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        all(layers.iter().map(|layer| layer.forward(x)))
    }
}

impl LinearLayer for Linear {}

impl LinearLayer for CompressedLinear {
    fn forward_each<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let _enter = layers.first().map(|layer| layer.span.enter());
        let products = compressed_linears(x, &layers.map(|layer| &layer.op))?;
        all(products.into_iter().zip(layers).map(|(y, layer)| layer.biased(y)))
    }
}

/// The results of `N` layers.
pub(super) fn all<const N: usize>(results: impl Iterator<Item = Result<Tensor>>) -> Result<[Tensor; N]> {
    let results: Vec<Tensor> = results.collect::<Result<_>>()?;
    let count = results.len();
    results.try_into().or_else(|_| bail!("{N} layers gave {count} results"))
}

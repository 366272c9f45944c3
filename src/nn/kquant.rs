//! Layers over matrices of ggml's block formats.

use std::sync::Arc;

use candle_core::{DType, Device, Module, Result, Tensor, bail};
use candle_nn::Linear;

use super::linear::{LinearLayer, all};
use crate::codec::kquant::GgmlType;
use crate::matrix::KQuantMatrix;
use crate::ops::{Blocks, KQuantMatmul, kquant_linear, kquant_linears};

/// Replaces candle's `QMatMul` and [`candle_nn::Linear`]: `x·Wᵀ + b` with `W` of shape `[out, in]` in a format of GGUF files, or of
/// 4-bit integers ([`KQuantLinear::from_int4`]).
#[derive(Clone, Debug)]
pub struct KQuantLinear {
    op: KQuantMatmul,
    bias: Option<Tensor>,
    span: tracing::Span,
}

impl KQuantLinear {
    /// Takes a quantised weight on the CPU and perhaps a bias of shape `[out]`.
    pub fn new(matrix: Arc<KQuantMatrix>, bias: Option<Tensor>) -> KQuantLinear {
        KQuantLinear::of(KQuantMatmul::new(matrix), bias)
    }

    /// Lays out a weight in the memory of `device`; the bias is there already.
    ///
    /// # Errors
    /// As [`KQuantMatmul::on`].
    pub fn on(blocks: &Blocks, bias: Option<Tensor>, device: &Device) -> Result<KQuantLinear> {
        Ok(KQuantLinear::of(KQuantMatmul::on(blocks, device)?, bias))
    }

    fn of(op: KQuantMatmul, bias: Option<Tensor>) -> KQuantLinear {
        KQuantLinear { op, bias, span: tracing::span!(tracing::Level::TRACE, "kquant-linear") }
    }

    /// Lays out a weight that candle quantised, on its device.
    ///
    /// # Errors
    /// If it is no matrix, or of a type that this crate does not read.
    pub fn from_qtensor(weight: &candle_core::quantized::QTensor, bias: Option<Tensor>) -> Result<KQuantLinear> {
        let (rows, cols) = weight.shape().dims2()?;
        let name = format!("{:?}", weight.dtype());
        let plain = |name: &str| name.replace('_', "");
        let Some(ty) = GgmlType::ALL.into_iter().find(|ty| plain(ty.name()) == plain(&name)) else {
            bail!("a weight of {name} cannot be laid out")
        };
        let data = weight.data()?;
        let blocks = Blocks { ty, shape: [rows, cols], data: &data, order: &|row| row, done: &|_| () };
        KQuantLinear::on(&blocks, bias, &weight.device())
    }

    /// Remembers the tensor's name for errors.
    pub fn with_name(self, name: &str) -> KQuantLinear {
        KQuantLinear { op: self.op.with_name(name), ..self }
    }

    /// Rounds many rows of activations to FP8: see [`KQuantMatmul::with_fp8`].
    pub fn with_fp8(self, fp8: bool) -> KQuantLinear {
        KQuantLinear { op: self.op.with_fp8(fp8), ..self }
    }

    /// The quantised weight, if it is on the CPU.
    pub fn matrix(&self) -> Option<&Arc<KQuantMatrix>> {
        self.op.matrix()
    }

    /// Bytes that the weight takes where it is.
    pub fn stored_bytes(&self) -> usize {
        self.op.stored_bytes()
    }

    /// The weight as an operation, without the bias.
    pub fn op(&self) -> &KQuantMatmul {
        &self.op
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The layer with dequantised weights (F32).
    ///
    /// # Errors
    /// None for a layer that could be made.
    pub fn to_dense(&self) -> Result<Linear> {
        Ok(Linear::new(self.op.dequantize(DType::F32)?, self.bias.clone()))
    }

    fn biased(&self, y: Tensor) -> Result<Tensor> {
        match &self.bias {
            None => Ok(y),
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
        }
    }
}

impl Module for KQuantLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let _enter = self.span.enter();
        self.biased(kquant_linear(x, &self.op)?)
    }
}

impl LinearLayer for KQuantLinear {
    fn forward_each<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let _enter = layers.first().map(|layer| layer.span.enter());
        let products = kquant_linears(x, &layers.map(|layer| &layer.op))?;
        all(products.into_iter().zip(layers).map(|(y, layer)| layer.biased(y)))
    }
}

/// Replaces [`candle_nn::Embedding`]: a quantised table of shape `[vocabulary, hidden]`; only the rows asked for are
/// dequantised.
#[derive(Clone, Debug)]
pub struct KQuantEmbedding {
    op: KQuantMatmul,
    dtype: DType,
}

impl KQuantEmbedding {
    /// Takes a quantised table on the CPU; embeddings come out in `dtype`.
    pub fn new(matrix: Arc<KQuantMatrix>, dtype: DType) -> KQuantEmbedding {
        KQuantEmbedding { op: KQuantMatmul::new(matrix), dtype }
    }

    /// Lays out a table in the memory of `device`.
    ///
    /// # Errors
    /// As [`KQuantMatmul::on`].
    pub fn on(blocks: &Blocks, dtype: DType, device: &Device) -> Result<KQuantEmbedding> {
        Ok(KQuantEmbedding { op: KQuantMatmul::on(blocks, device)?, dtype })
    }

    /// The quantised table, if it is on the CPU.
    pub fn matrix(&self) -> Option<&Arc<KQuantMatrix>> {
        self.op.matrix()
    }

    /// The output layer that shares this table (a tied `lm_head`).
    pub fn as_linear(&self) -> KQuantLinear {
        KQuantLinear::of(self.op.clone(), None)
    }
}

impl Module for KQuantEmbedding {
    /// `ids` of any shape and an integer dtype; the result has one more dimension, `hidden`. An id outside the table is an
    /// error, except where ids and table are on a GPU, which would have to be waited for: its embedding is zeros.
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let [_, hidden] = self.op.shape();
        let flat = ids.to_dtype(DType::U32)?.flatten_all()?;
        self.op.rows_of(&flat, self.dtype)?.reshape([ids.dims(), &[hidden]].concat())
    }
}

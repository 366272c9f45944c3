//! Layers over matrices of ggml's block formats.

use std::sync::Arc;

use candle_core::{DType, Device, Module, Result, Tensor, bail};
use candle_nn::Linear;

use super::linear::{LinearLayer, all};
use crate::codec::kquant::GgmlType;
use crate::matrix::KQuantMatrix;
use crate::ops::{KQuantMatmul, kquant_linear, kquant_linears};

/// Replaces candle's `QMatMul` and [`candle_nn::Linear`]: `x·Wᵀ + b` with `W` of shape `[out, in]` in a format of GGUF files.
#[derive(Clone, Debug)]
pub struct KQuantLinear {
    op: KQuantMatmul,
    bias: Option<Tensor>,
    span: tracing::Span,
}

impl KQuantLinear {
    /// Takes a quantised weight and perhaps a bias of shape `[out]`.
    pub fn new(matrix: Arc<KQuantMatrix>, bias: Option<Tensor>) -> KQuantLinear {
        KQuantLinear {
            op: KQuantMatmul::new(matrix),
            bias,
            span: tracing::span!(tracing::Level::TRACE, "kquant-linear"),
        }
    }

    /// Lays out a weight that candle quantised.
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
        Ok(KQuantLinear::new(Arc::new(KQuantMatrix::new(ty, rows, cols, &weight.data()?)?), bias))
    }

    /// Remembers the tensor's name for errors.
    pub fn with_name(self, name: &str) -> KQuantLinear {
        KQuantLinear { op: self.op.with_name(name), ..self }
    }

    /// The quantised weight.
    pub fn matrix(&self) -> &Arc<KQuantMatrix> {
        self.op.matrix()
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
        let ids: Vec<u32> = (0..self.matrix().rows() as u32).collect();
        Ok(Linear::new(rows_of(self.matrix(), &ids)?, self.bias.clone()))
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
    matrix: Arc<KQuantMatrix>,
    dtype: DType,
}

impl KQuantEmbedding {
    /// Takes a quantised table; embeddings come out in `dtype`.
    pub fn new(matrix: Arc<KQuantMatrix>, dtype: DType) -> KQuantEmbedding {
        KQuantEmbedding { matrix, dtype }
    }

    /// The quantised table.
    pub fn matrix(&self) -> &Arc<KQuantMatrix> {
        &self.matrix
    }

    /// The output layer that shares this table (a tied `lm_head`).
    pub fn as_linear(&self) -> KQuantLinear {
        KQuantLinear::new(self.matrix.clone(), None)
    }
}

impl Module for KQuantEmbedding {
    /// `ids` of any shape and an integer dtype; the result has one more dimension, `hidden`.
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let flat = ids.to_dtype(DType::U32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u32>()?;
        if let Some(id) = flat.iter().find(|&&id| id as usize >= self.matrix.rows()) {
            bail!("token id {id} is not in a vocabulary of {}", self.matrix.rows())
        }
        let shape = [ids.dims(), &[self.matrix.cols()]].concat();
        rows_of(&self.matrix, &flat)?.to_dtype(self.dtype)?.reshape(shape)
    }
}

/// Rows of a matrix as a tensor `[rows, columns]`.
fn rows_of(matrix: &KQuantMatrix, ids: &[u32]) -> Result<Tensor> {
    let cols = matrix.cols();
    let mut values = vec![0.0; ids.len() * cols];
    for (&id, values) in ids.iter().zip(values.chunks_exact_mut(cols)) {
        matrix.dequantize_row(id as usize, values)?;
    }
    Tensor::from_vec(values, (ids.len(), cols), &Device::Cpu)
}

//! Where a model's parameters come from.

use candle_core::{DType, Device, Module, Tensor};
use half::f16;

use crate::checkpoint::{Checkpoint, Tensor as Stored};
use crate::nn::LinearLayer;
use crate::{Error, Result};

/// A source of a model's parameters, by their Hugging Face names.
///
/// Every method that takes a name fails with an error that names the tensor if it is missing, has another shape (the
/// error then names both) or holds something other than floating-point weights.
pub trait Weights {
    /// A layer that maps `[.., in_dim]` to `[.., out_dim]`, without a bias.
    type Linear: LinearLayer;
    /// A layer that maps token ids `[..]` to `[.., dim]`.
    type Embedding: Module;

    /// The layer whose weight is the tensor `name` of shape `[out_dim, in_dim]`.
    ///
    /// # Errors
    /// If the tensor is missing, misshapen or not made of floats.
    fn linear(&self, name: &str, out_dim: usize, in_dim: usize) -> Result<Self::Linear>;

    /// The embedding whose table is the tensor `name` of shape `[vocab, dim]`.
    ///
    /// # Errors
    /// If the tensor is missing, misshapen or not made of floats.
    fn embedding(&self, name: &str, vocab: usize, dim: usize) -> Result<Self::Embedding>;

    /// The tensor `name`, such as the weight of a norm, in the dtype of the activations.
    ///
    /// # Errors
    /// If the tensor is missing, misshapen or not made of floats.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// An output layer that shares the embedding's table.
    ///
    /// # Errors
    /// If the table cannot be used so.
    fn tied_lm_head(&self, embedding: &Self::Embedding) -> Result<Self::Linear>;

    /// Names and shapes of all tensors, so that a model can refuse those that it would ignore.
    fn tensors(&self) -> Vec<(&str, &[u64])>;

    /// True if there is a tensor of that name.
    fn contains(&self, name: &str) -> bool;

    /// The dtype of the activations.
    fn dtype(&self) -> DType;

    /// Where the model runs.
    fn device(&self) -> &Device;
}

/// Every tensor of a checkpoint as an ordinary candle tensor, decoded when it is asked for.
#[derive(Debug)]
pub struct DenseWeights<'a> {
    checkpoint: &'a Checkpoint,
    dtype: DType,
    device: Device,
}

impl<'a> DenseWeights<'a> {
    /// The tensors of `checkpoint`, compressed or not, converted to `dtype` on `device`.
    pub fn new(checkpoint: &'a Checkpoint, dtype: DType, device: &Device) -> Self {
        DenseWeights { checkpoint, dtype, device: device.clone() }
    }
}

impl Weights for DenseWeights<'_> {
    type Linear = candle_nn::Linear;
    type Embedding = candle_nn::Embedding;

    fn linear(&self, name: &str, out_dim: usize, in_dim: usize) -> Result<Self::Linear> {
        Ok(candle_nn::Linear::new(self.tensor(name, &[out_dim, in_dim])?, None))
    }

    fn embedding(&self, name: &str, vocab: usize, dim: usize) -> Result<Self::Embedding> {
        Ok(candle_nn::Embedding::new(self.tensor(name, &[vocab, dim])?, dim))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        dense_tensor(self.checkpoint, name, shape, self.dtype, &self.device)
    }

    fn tied_lm_head(&self, embedding: &Self::Embedding) -> Result<Self::Linear> {
        Ok(candle_nn::Linear::new(embedding.embeddings().clone(), None))
    }

    fn tensors(&self) -> Vec<(&str, &[u64])> {
        self.checkpoint.tensors().iter().map(|info| (info.name.as_str(), info.shape.as_slice())).collect()
    }

    fn contains(&self, name: &str) -> bool {
        self.checkpoint.info(name).is_ok()
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

/// Checks that a checkpoint's tensor has the shape that a model needs.
///
/// # Errors
/// If it is missing, or has another shape: the error names the tensor and both.
pub fn expect_shape(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<()> {
    let info = checkpoint.info(name).map_err(|_| {
        Error::Invalid(format!("the checkpoint has no tensor {name}; the model needs it with shape {shape:?}"))
    })?;
    if info.shape.iter().copied().eq(shape.iter().map(|&dim| dim as u64)) {
        return Ok(());
    }
    let text = format!("its shape is {:?}, but the model's config.json asks for {shape:?}", info.shape);
    Err(Error::Invalid(text).in_tensor(name).in_file(checkpoint.file_of(info)))
}

/// A checkpoint's tensor of floats, decoded and converted to `dtype` on `device`.
///
/// # Errors
/// If it is missing, misshapen, damaged, or not made of floats.
pub fn dense_tensor(
    checkpoint: &Checkpoint,
    name: &str,
    shape: &[usize],
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    expect_shape(checkpoint, name, shape)?;
    let info = checkpoint.info(name)?;
    let at = |error: Error| error.in_tensor(name).in_file(checkpoint.file_of(info));
    let decoded;
    let bytes = match checkpoint.tensor(name)? {
        Stored::Plain(bytes) => bytes,
        Stored::Compressed(matrix) => {
            decoded = matrix.decode().map_err(at)?;
            &decoded
        }
    };
    let own = match info.dtype.as_str() {
        "F64" => DType::F64,
        "F32" => DType::F32,
        "F16" | "F8_E5M2" => DType::F16,
        "BF16" => DType::BF16,
        "F8_E4M3" => DType::F8E4M3,
        other => return Err(at(Error::Unsupported(format!("its dtype is {other}, but a model's weights are floats")))),
    };
    let tensor = if info.dtype == "F8_E5M2" {
        // The upper byte of an F16.
        let wide: Vec<f16> = bytes.iter().map(|&byte| f16::from_bits(u16::from(byte) << 8)).collect();
        Tensor::from_vec(wide, shape, &Device::Cpu)
    } else {
        Tensor::from_raw_buffer(bytes, own, shape, &Device::Cpu)
    };
    let tensor = tensor.and_then(|t| t.to_dtype(dtype)).and_then(|t| t.to_device(device));
    tensor.map_err(|error| at(error.into()))
}

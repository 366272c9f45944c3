//! Where a model's parameters come from.

use std::ops::Range;

use candle_core::{DType, Device, Module, Tensor};

use crate::checkpoint::{Checkpoint, Tensor as Stored, TensorInfo};
use crate::codec::{Dtype, TILE, quant};
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

    /// What is odd about the parameters and how it is dealt with.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// What each pair's RoPE frequency is divided by, where the weights come with such factors: half a head's size.
    fn rope_factors(&self) -> Option<&[f32]> {
        None
    }

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
    expect_floats(checkpoint, name, shape)?;
    decode_tensor(checkpoint, name, dtype, device)
}

/// Checks that a checkpoint's tensor has the shape that a model needs and holds floats.
pub(super) fn expect_floats<'a>(checkpoint: &'a Checkpoint, name: &str, shape: &[usize]) -> Result<&'a TensorInfo> {
    expect_shape(checkpoint, name, shape)?;
    let info = checkpoint.info(name)?;
    if !matches!(info.dtype.as_str(), "F64" | "F32" | "F16" | "BF16" | "F8_E4M3" | "F8_E5M2") {
        let text = format!("its dtype is {}, but a model's weights are floats", info.dtype);
        return Err(Error::Unsupported(text).in_tensor(name).in_file(checkpoint.file_of(info)));
    }
    Ok(info)
}

/// A checkpoint's tensor, decoded and converted to `dtype` on `device`, in its own shape.
///
/// Strips of some MiB are decoded and converted one after another, so the memory needed besides the result is theirs. FP8
/// (both kinds), I8, U16 and BOOL are read too; candle's own loader lacks some of them.
///
/// # Errors
/// If it is missing or damaged, or candle has no dtype for its values.
pub fn decode_tensor(checkpoint: &Checkpoint, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
    let info = checkpoint.info(name)?;
    decode(checkpoint, info, dtype, device).map_err(|error| match error {
        error @ (Error::File { .. } | Error::Io { .. }) => error,
        other => other.in_tensor(name).in_file(checkpoint.file_of(info)),
    })
}

/// Bytes of a strip, about.
const STRIP_BYTES: usize = 4 << 20;

fn decode(checkpoint: &Checkpoint, info: &TensorInfo, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape: Vec<usize> = info.shape.iter().map(|&dim| dim as usize).collect();
    let (rows, cols) = match shape.split_last() {
        Some((&cols, leading)) if !leading.is_empty() => (leading.iter().product(), cols),
        _ => (1, shape.iter().product()),
    };
    let stored = checkpoint.tensor(&info.name)?;
    // Whole tiles, so that none is decoded twice.
    let row_bytes = match &stored {
        Stored::Plain(bytes) => bytes.len() / rows.max(1),
        Stored::Compressed(matrix) => cols * matrix.dtype().size(),
    };
    let strip = (STRIP_BYTES / row_bytes.max(1) / TILE).max(1) * TILE;
    let part = |range: Range<usize>| -> Result<Tensor> {
        let (rows, decoded) = (range.len(), &mut Vec::new());
        let bytes = match &stored {
            Stored::Plain(bytes) => bytes.get(range.start * row_bytes..range.end * row_bytes).unwrap_or_default(),
            Stored::Compressed(matrix) => {
                *decoded = matrix.decode_rows(range)?;
                decoded.as_slice()
            }
        };
        Ok(from_bytes(bytes, &info.dtype, (rows, cols), dtype)?.to_dtype(dtype)?)
    };
    let tensor = if rows <= strip {
        part(0..rows)?
    } else {
        let whole = Tensor::zeros((rows, cols), dtype, &Device::Cpu)?;
        for start in (0..rows).step_by(strip) {
            whole.slice_set(&part(start..rows.min(start + strip))?, 0, start)?;
        }
        whole
    };
    Ok(tensor.reshape(shape)?.to_device(device)?)
}

/// Little-endian values of a safetensors dtype as a matrix, in the dtype that candle has for them, or in a wider one.
fn from_bytes(bytes: &[u8], dtype: &str, (rows, cols): (usize, usize), wanted: DType) -> Result<Tensor> {
    let own = match dtype {
        "F64" => DType::F64,
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        // candle 0.11.1 converts it to anything but F64, for which it never returns.
        "F8_E4M3" if wanted == DType::F8E4M3 => DType::F8E4M3,
        "I64" => DType::I64,
        "I32" => DType::I32,
        "I16" => DType::I16,
        "U32" => DType::U32,
        "U8" | "BOOL" => DType::U8,
        _ => return widened(bytes, dtype, (rows, cols)),
    };
    Ok(Tensor::from_raw_buffer(bytes, own, &[rows, cols], &Device::Cpu)?)
}

/// Values for which candle has a wider dtype only.
fn widened(bytes: &[u8], dtype: &str, shape: (usize, usize)) -> Result<Tensor> {
    let tensor = match dtype {
        "F8_E4M3" | "F8_E5M2" | "I8" => {
            let mut wide = vec![0.0; bytes.len()];
            quant::to_f32s(Dtype::from_name(dtype).unwrap_or(Dtype::I8), bytes, &mut wide);
            Tensor::from_vec(wide, shape, &Device::Cpu)
        }
        "U16" => {
            let wide = bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])));
            Tensor::from_vec(wide.collect::<Vec<u32>>(), shape, &Device::Cpu)
        }
        other => return Err(Error::Unsupported(format!("candle has no dtype for the values of {other}"))),
    };
    Ok(tensor?)
}

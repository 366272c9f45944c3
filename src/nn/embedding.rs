//! An embedding over a compressed table.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use candle_core::{DType, Device, Module, Result, Tensor, bail};

use super::{CompressedLinear, compress_tensor};
use crate::checkpoint::Checkpoint;
use crate::codec::BAND_ROWS;
use crate::matrix::{GpuLayout, Options, Weight};
use crate::ops::{CompressedMatmul, bytes_to_tensor};

/// Replaces [`candle_nn::Embedding`]: a table of shape `[vocabulary, hidden]` kept compressed. Only the strips of 64 rows
/// that hold the ids asked for are decoded.
#[derive(Clone, Debug)]
pub struct CompressedEmbedding {
    op: CompressedMatmul,
    dtype: DType,
}

impl CompressedEmbedding {
    /// Takes a compressed table; embeddings come out in `dtype`.
    pub fn new(weight: Weight, dtype: DType) -> CompressedEmbedding {
        CompressedEmbedding { op: CompressedMatmul::new(weight), dtype }
    }

    /// As [`CompressedEmbedding::new`], on `device`; on a GPU the table is kept as `layout` says.
    ///
    /// # Errors
    /// As [`CompressedMatmul::on`].
    pub fn on(weight: Weight, dtype: DType, device: &Device, layout: GpuLayout) -> Result<CompressedEmbedding> {
        Ok(CompressedEmbedding { op: CompressedMatmul::on(weight, device, layout)?, dtype })
    }

    /// Compresses a table (bf16, f16 or f32); embeddings come out in its dtype.
    pub fn from_tensor(table: &Tensor, options: &Options) -> Result<CompressedEmbedding> {
        Ok(CompressedEmbedding::new(compress_tensor(table, options)?, table.dtype()))
    }

    /// The tensor `name` of a checkpoint, mapped where it is compressed, else compressed now.
    ///
    /// # Errors
    /// If the tensor is missing, damaged or of a dtype that cannot be embedded.
    pub fn load(
        checkpoint: &Arc<Checkpoint>,
        name: &str,
        dtype: DType,
        options: &Options,
    ) -> Result<CompressedEmbedding> {
        Ok(CompressedEmbedding::new(checkpoint.weight(name, options)?, dtype))
    }

    /// The compressed table.
    pub fn weight(&self) -> &Weight {
        self.op.weight()
    }

    /// The layout in a GPU's memory, and the bytes that it takes there; `None` on the CPU.
    pub fn in_use(&self) -> Option<(GpuLayout, usize)> {
        self.op.in_use()
    }

    /// The output layer that shares this table (a tied `lm_head`).
    pub fn as_linear(&self) -> CompressedLinear {
        CompressedLinear::of(self.op.clone(), None)
    }
}

impl Module for CompressedEmbedding {
    /// `ids` of any shape and an integer dtype; the result has one more dimension, `hidden`. An id outside the table is an
    /// error, except where ids and table are on a GPU, which would have to be waited for: its embedding is zeros.
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(device) = self.op.gpu() {
            return self.forward_on(&device, ids);
        }
        let matrix = self.weight().matrix()?;
        let (vocabulary, hidden) = (matrix.geometry().rows, matrix.geometry().cols);
        let flat = ids.to_dtype(DType::U32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u32>()?;
        let row_bytes = hidden * matrix.dtype().size();
        let mut strips: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
        let mut bytes = Vec::with_capacity(flat.len() * row_bytes);
        for &id in &flat {
            let id = id as usize;
            if id >= vocabulary {
                bail!("token id {id} is not in a vocabulary of {vocabulary}")
            }
            let strip = id / BAND_ROWS;
            let rows = strip * BAND_ROWS..vocabulary.min((strip + 1) * BAND_ROWS);
            let decoded = match strips.entry(strip) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(matrix.decode_rows(rows)?),
            };
            bytes.extend_from_slice(&decoded[id % BAND_ROWS * row_bytes..][..row_bytes]);
        }
        let shape = [ids.dims(), &[hidden]].concat();
        bytes_to_tensor(&bytes, matrix.dtype(), (flat.len(), hidden))?.to_dtype(self.dtype)?.reshape(shape)
    }
}

#[cfg(feature = "cuda")]
impl CompressedEmbedding {
    /// The rows of a table on a GPU.
    fn forward_on(&self, device: &Device, ids: &Tensor) -> Result<Tensor> {
        let geometry = self.weight().geometry();
        let ids = ids.to_dtype(DType::U32)?.contiguous()?;
        if ids.device().is_cpu()
            && let Some(id) = ids.flatten_all()?.to_vec1::<u32>()?.iter().find(|&&id| id as usize >= geometry.rows)
        {
            bail!("token id {id} is not in a vocabulary of {}", geometry.rows)
        }
        let rows = self.op.embed(&ids.to_device(device)?, self.dtype)?;
        rows.reshape([ids.dims(), &[geometry.cols]].concat())
    }
}

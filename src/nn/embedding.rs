//! An embedding over a compressed table.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use candle_core::{DType, Device, Module, Result, Tensor, bail};

use super::{CompressedLinear, bytes_to_tensor, compress_tensor};
use crate::checkpoint::Checkpoint;
use crate::codec::BAND_ROWS;
use crate::matrix::{Options, Weight};

/// Replaces [`candle_nn::Embedding`]: a table of shape `[vocabulary, hidden]` kept compressed. Only the strips of 64 rows
/// that hold the ids asked for are decoded.
#[derive(Clone, Debug)]
pub struct CompressedEmbedding {
    weight: Weight,
    dtype: DType,
}

impl CompressedEmbedding {
    /// Takes a compressed table; embeddings come out in `dtype`.
    pub fn new(weight: Weight, dtype: DType) -> CompressedEmbedding {
        CompressedEmbedding { weight, dtype }
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
        &self.weight
    }

    /// The output layer that shares this table (a tied `lm_head`).
    pub fn as_linear(&self) -> CompressedLinear {
        CompressedLinear::new(self.weight.clone(), None)
    }
}

impl Module for CompressedEmbedding {
    /// `ids` of any shape and an integer dtype; the result has one more dimension, `hidden`.
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let matrix = self.weight.matrix()?;
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

//! Whole compressed weights as plain tensors.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{Result, Tensor};

use super::place::Place;
use super::{CompressedMatmul, bytes_to_tensor};

impl CompressedMatmul {
    /// Whole weights as plain tensors of `dtype` (BF16, F16 or F32), where they are: on a GPU several are decoded at once, on
    /// streams of their own.
    ///
    /// # Errors
    /// If a tile is damaged, the weights lie on different devices, or the memory is too small.
    pub fn decode_each(ops: &[&CompressedMatmul], dtype: candle_core::DType) -> Result<Vec<Tensor>> {
        #[cfg(feature = "cuda")]
        if !ops.is_empty() && ops.iter().all(|op| matches!(op.place, Place::Cuda(_))) {
            let weights = ops.iter().map(|op| op.on_gpu()).collect::<Result<Vec<_>>>()?;
            let decoded = crate::cuda::decode_layers(&weights, dtype)?;
            return decoded.into_iter().zip(ops).map(|(storage, op)| Ok(op.tensor(storage))).collect();
        }
        ops.iter().map(|op| op.decode(dtype)).collect()
    }

    fn decode(&self, dtype: candle_core::DType) -> Result<Tensor> {
        match &self.place {
            Place::Cpu => {
                let (matrix, geometry) = (self.weight.matrix()?, self.weight.geometry());
                let shape = (geometry.rows, geometry.cols);
                bytes_to_tensor(&matrix.decode()?, matrix.dtype(), shape)?.to_dtype(dtype)
            }
            #[cfg(feature = "cuda")]
            Place::Cuda(weight) => Ok(self.tensor(weight.decode_rows(0..self.weight.geometry().rows, dtype)?)),
            #[cfg(feature = "cuda")]
            Place::Dense(dense, _) => dense.to_dtype(dtype),
        }
    }

    /// A decoded weight.
    #[cfg(feature = "cuda")]
    fn tensor(&self, storage: CudaStorage) -> Tensor {
        let geometry = self.weight.geometry();
        let none = candle_core::op::BackpropOp::none();
        Tensor::from_storage(candle_core::Storage::Cuda(storage), (geometry.rows, geometry.cols), none, false)
    }
}

//! What changes from one step of a generation to the next, where a graph finds it.

use candle_core::cuda_backend::cudarc;
use candle_core::{CpuStorage, CudaStorage, DType, Device, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use cudarc::driver::CudaView;

use super::kernels::driver;

/// Token ids, one for each sequence, and then their position, in a GPU's memory.
#[derive(Debug)]
pub(crate) struct StepInputs {
    values: Tensor,
    batch: usize,
}

impl StepInputs {
    /// Room for them.
    pub fn new(device: &Device, batch: usize) -> Result<StepInputs> {
        Ok(StepInputs { values: Tensor::zeros(batch + 1, DType::U32, device)?, batch })
    }

    /// The ids, `[batch, 1]`.
    pub fn ids(&self) -> Result<Tensor> {
        self.values.narrow(0, 0, self.batch)?.reshape((self.batch, 1))
    }

    /// The position, `[1]`.
    pub fn position(&self) -> Result<Tensor> {
        self.values.narrow(0, self.batch, 1)
    }

    /// Enqueues the upload of ids and a position.
    pub fn write(&self, ids: &[u32], position: usize) -> Result<()> {
        let position = u32::try_from(position).map_err(candle_core::Error::wrap)?;
        self.values.inplace_op1(&Write { ids: Ids::Cpu([ids, &[position]].concat()), batch: self.batch, position })
    }

    /// As [`StepInputs::write`], with ids that are on the GPU: U32, one after another.
    pub fn write_from(&self, ids: &Tensor, position: usize) -> Result<()> {
        let position = u32::try_from(position).map_err(candle_core::Error::wrap)?;
        self.values.inplace_op1(&Write { ids: Ids::Gpu(ids), batch: self.batch, position })
    }
}

enum Ids<'a> {
    /// And the position behind them.
    Cpu(Vec<u32>),
    Gpu(&'a Tensor),
}

struct Write<'a> {
    ids: Ids<'a>,
    batch: usize,
    position: u32,
}

impl InplaceOp1 for Write<'_> {
    fn name(&self) -> &'static str {
        "step-inputs"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("the inputs of a CUDA graph on the CPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        let stream = storage.device.cuda_stream();
        let to = storage.as_cuda_slice_mut::<u32>()?;
        match &self.ids {
            Ids::Cpu(values) if values.len() == self.batch + 1 => Ok(driver(stream.memcpy_htod(&values[..], to))?),
            Ids::Cpu(values) => bail!("{} ids for a step of {}", values.len().saturating_sub(1), self.batch),
            Ids::Gpu(ids) => {
                let (ids, layout) = ids.storage_and_layout();
                let (Storage::Cuda(ids), Some((start, end))) = (&*ids, layout.contiguous_offsets()) else {
                    bail!("ids of a step must be on the GPU, one after another")
                };
                if end - start != self.batch {
                    bail!("{} ids for a step of {}", end - start, self.batch)
                }
                let from: CudaView<u32> = ids.as_cuda_slice::<u32>()?.slice(start..end);
                driver(stream.memcpy_dtod(&from, &mut to.slice_mut(..self.batch)))?;
                Ok(driver(stream.memcpy_htod(&[self.position][..], &mut to.slice_mut(self.batch..)))?)
            }
        }
    }
}

//! Products straight from tile streams: `kernels/hybrid.cu`, the reference of the fused ones.
#![allow(unsafe_code)]

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, PushKernelArg};

use super::decode::{BF16_TABLES, BF16_WARP, DeviceStream};
use super::kernels::driver;
use super::launch::Grid;
use super::plan::UNROUNDED;
use super::rans::grid;
use crate::codec::{Dtype, Geometry, TILE};
use crate::{Error, Result};

/// Rows of activations that a launch takes. More are faster with decoded weights.
const ROWS: usize = 8;
/// Bytes of shared memory for decoded weights: 512 F32 values of each warp.
const RINGS: u32 = 4 * 512 * 4;
/// Bytes of a warp for each row of activations, where weights are taken by eights: what comes of 256 of these.
const EIGHTS: usize = 256 * 4;
/// Rows of a band.
const BAND: usize = 64;

/// What is multiplied: the struct of that name in `kernels/tile_values.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Activations {
    pub x: u64,
    pub y: u64,
    pub partial: u64,
    pub arrived: u64,
    pub batch: u32,
    pub dtype: u32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Activations {}
const _: () = assert!(size_of::<Activations>() == 40);

impl DeviceStream {
    /// Enqueues `y = x · Wᵀ` for `batch` rows of `x` in `dtype`: false, with nothing done, if there are too many rows.
    pub(super) fn product(
        &self,
        x: &CudaView<u8>,
        y: &mut CudaViewMut<u8>,
        batch: usize,
        dtype: Dtype,
    ) -> Result<bool> {
        let (Geometry { rows, cols }, size) = (self.geometry(), dtype.size());
        if batch * cols * size > x.len() || batch * rows * size > y.len() {
            return Err(Error::Invalid("a product that does not fit into its memory".into()));
        }
        if self.bands().is_some() {
            return self.product_bands(x, y, batch, dtype);
        }
        let (across, down) = (cols.div_ceil(TILE), rows.div_ceil(BAND));
        let partial = across * batch * rows;
        if batch > ROWS || 4 * partial > super::scratch::WORKSPACE {
            return Ok(false);
        }
        let (kernels, stream) = (self.kernels(), self.device().cuda_stream());
        // Activations are read by eights, as weights are.
        let usual = self.usual().filter(|_| x.device_ptr(&stream).0.is_multiple_of(16));
        let by_eights = usual.and_then(|usual| {
            let (kernel, room) = &kernels.hybrid_bf16[usual];
            let shared = (BF16_TABLES, BF16_WARP + EIGHTS * batch);
            Some((kernel, grid(across * down, kernels.processors, *room, shared)?))
        });
        let (kernel, grid, plan) = match by_eights {
            Some((kernel, grid)) => (kernel, grid, self.plan()),
            None => {
                let blocks = (across * down).div_ceil(4) as u32;
                let grid = Grid { blocks: [blocks, 1, 1], threads: 128, shared: self.shared() + RINGS };
                (&kernels.hybrid, grid, self.plan().to(Dtype::F32, UNROUNDED))
            }
        };
        kernels.scratch.product(self.device(), partial, down, |partial, arrived| {
            let (x, _x) = x.device_ptr(&stream);
            let (y, _y) = y.device_ptr_mut(&stream);
            let (partial, _partial) = partial.device_ptr_mut(&stream);
            let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
            let activations = Activations { x, y, partial, arrived, batch: batch as u32, dtype: dtype as u32 };
            let mut launch = stream.launch_builder(kernel);
            launch.arg(self.bytes()).arg(&plan).arg(&activations).arg(self.status());
            // SAFETY: arguments as the kernel declares them, memory of the sizes that it asks for, as checked above; a word of
            // `arrived` for each row of bands.
            driver(unsafe { launch.launch(grid.config()) })?;
            Ok(true)
        })
    }
}

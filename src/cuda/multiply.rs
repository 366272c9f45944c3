//! Products with a matrix on a GPU: fused ones for few rows of activations; for many, rows of weights are decoded into the
//! workspace and multiplied with cuBLAS.
#![allow(unsafe_code)]

use candle_core::cuda_backend::{CudaStorageSlice, cudarc};
use candle_core::{CudaStorage, Layout, Shape};
use cudarc::driver::{CudaSlice, CudaView};

use super::gemm::{Gemm, Strides};
use super::memory::{Element, bytes, bytes_mut, contiguous};
use super::weight::{CudaWeight, Kept};
use crate::codec::{Dtype, Geometry};
use crate::{Error, Result};

/// Which product.
#[derive(Clone, Copy)]
enum Direction {
    Forward,
    /// With activations rounded to FP8 where there are kernels for it.
    Fp8,
    Backward,
}

impl CudaWeight {
    /// `x · Wᵀ` for a contiguous `x` of shape `[…, columns]`: `[…, rows]` in `x`'s dtype, with sums in F32.
    ///
    /// # Errors
    /// If the shapes do not fit, `x` lies on another device or has another dtype than BF16, F16 and F32, or a launch fails.
    pub fn matmul(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let Geometry { rows, cols } = self.geometry();
        self.apply(x, layout, [cols, rows], Direction::Forward)
    }

    /// [`CudaWeight::matmul`], but from 64 rows on `x` is rounded to FP8 (E4M3, times a power of two for each row) and
    /// multiplied on FP8 tensor cores, if `W` is of 4-bit integers in groups of 128 and the GPU of compute capability 8.9 or
    /// later. A row of `x` with infinities or NaN gives NaN.
    ///
    /// # Errors
    /// As [`CudaWeight::matmul`].
    pub fn matmul_fp8(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let Geometry { rows, cols } = self.geometry();
        self.apply(x, layout, [cols, rows], Direction::Fp8)
    }

    /// `y · W` for a contiguous `y` of shape `[…, rows]`: the gradient of [`CudaWeight::matmul`].
    ///
    /// # Errors
    /// As [`CudaWeight::matmul`].
    pub fn matmul_transposed(&self, y: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let Geometry { rows, cols } = self.geometry();
        self.apply(y, layout, [rows, cols], Direction::Backward)
    }

    fn apply(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        [inner, outer]: [usize; 2],
        direction: Direction,
    ) -> Result<(CudaStorage, Shape)> {
        self.expect_device(x)?;
        let Some((_, leading)) = layout.dims().split_last().filter(|(last, _)| **last == inner) else {
            let Geometry { rows, cols } = self.geometry();
            let dims = layout.dims();
            return Err(Error::Invalid(format!(
                "an input of shape {dims:?} does not fit a weight of shape [{rows}, {cols}]"
            )));
        };
        let shape = Shape::from([leading, &[outer]].concat());
        let range = contiguous(layout)?;
        let y = match &x.slice {
            CudaStorageSlice::BF16(x) => self.product(&x.slice(range), inner, outer, direction)?,
            CudaStorageSlice::F16(x) => self.product(&x.slice(range), inner, outer, direction)?,
            CudaStorageSlice::F32(x) => self.product(&x.slice(range), inner, outer, direction)?,
            _ => return Err(Error::Unsupported("an input of another dtype than f32, bf16 and f16".into())),
        };
        Ok((y, shape))
    }

    /// The product for the rows of `inner` values in `x`.
    fn product<T: Element>(
        &self,
        x: &CudaView<T>,
        inner: usize,
        outer: usize,
        direction: Direction,
    ) -> Result<CudaStorage> {
        let m = x.len() / inner;
        let mut y = self.alloc::<T>(m * outer, "a result")?;
        if m > 0 {
            let fused = match (&self.kept, direction) {
                (_, Direction::Backward) => false,
                (Kept::Fused(fused), _) => {
                    let (x, y) = (&bytes(x)?, &mut bytes_mut(&mut y)?);
                    let packed = fused.packed().filter(|_| matches!(direction, Direction::Fp8));
                    packed.map_or(Ok(false), |packed| packed.product_fp8(x, y, m, T::DTYPE))?
                        || fused.product(x, y, m, T::DTYPE)?
                }
                (Kept::Stream(stream), _) => stream.product(&bytes(x)?, &mut bytes_mut(&mut y)?, m, T::DTYPE)?,
            };
            match direction {
                _ if fused => {}
                Direction::Forward | Direction::Fp8 => self.forward_dense(x, m, &mut y)?,
                Direction::Backward => self.backward_dense(x, m, &mut y)?,
            }
        }
        Ok(CudaStorage::wrap_cuda_slice(y, self.device().clone()))
    }

    /// Decodes rows of weights and multiplies with them, block by block: each gives some columns of the result.
    fn forward_dense<T: Element>(&self, x: &CudaView<T>, m: usize, y: &mut CudaSlice<T>) -> Result<()> {
        let Geometry { rows, cols } = self.geometry();
        let (block, size) = (self.block_rows(T::DTYPE), T::DTYPE.size());
        let (x, mut y) = (bytes(x)?, bytes_mut(y)?);
        self.kernels().scratch.workspace(self.device(), block * cols * self.room(T::DTYPE), |workspace| {
            for start in (0..rows).step_by(block) {
                let n = block.min(rows - start);
                self.decode_block(start..start + n, T::DTYPE, &mut workspace.as_view_mut(), true)?;
                let strides = Strides { a: cols, b: cols, c: rows };
                let (dtype, out) = (T::DTYPE, T::DTYPE);
                let gemm = Gemm { m, n, k: cols, transposed: true, dtype, out, strides, add: false };
                gemm.run(self.device(), &x, &workspace.as_view(), &mut y.slice_mut(start * size..))?;
            }
            Ok(())
        })
    }

    /// As [`CudaWeight::forward_dense`]; each block adds to the whole result, in F32 where there are several.
    fn backward_dense<T: Element>(&self, y: &CudaView<T>, m: usize, x: &mut CudaSlice<T>) -> Result<()> {
        let Geometry { rows, cols } = self.geometry();
        let (block, size) = (self.block_rows(T::DTYPE), T::DTYPE.size());
        let y = bytes(y)?;
        let single = block >= rows;
        let mut sums = if single { None } else { Some(self.alloc::<f32>(m * cols, "a gradient")?) };
        self.kernels().scratch.workspace(self.device(), block * cols * self.room(T::DTYPE), |workspace| {
            for start in (0..rows).step_by(block) {
                let k = block.min(rows - start);
                self.decode_block(start..start + k, T::DTYPE, &mut workspace.as_view_mut(), true)?;
                let strides = Strides { a: rows, b: cols, c: cols };
                let out = if single { T::DTYPE } else { Dtype::F32 };
                let gemm = Gemm { m, n: cols, k, transposed: false, dtype: T::DTYPE, out, strides, add: start > 0 };
                let mut target = match &mut sums {
                    Some(sums) => bytes_mut(sums)?,
                    None => bytes_mut(x)?,
                };
                gemm.run(self.device(), &y.slice(start * size..), &workspace.as_view(), &mut target)?;
            }
            Ok(())
        })?;
        if let Some(sums) = sums {
            use candle_core::backend::BackendStorage;
            let sums = CudaStorage::wrap_cuda_slice(sums, self.device().clone());
            let dtype = match T::DTYPE {
                Dtype::Bf16 => candle_core::DType::BF16,
                Dtype::F16 => candle_core::DType::F16,
                _ => candle_core::DType::F32,
            };
            let mut rounded = sums.to_dtype(&Layout::contiguous((m, cols)), dtype)?;
            std::mem::swap(x, T::as_cuda_slice_mut(&mut rounded)?);
        }
        Ok(())
    }
}

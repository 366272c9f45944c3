//! Dense products through candle's own cuBLAS handle, of parts of matrices.
#![allow(unsafe_code)]

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::cublas::{result, sys};
use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut};

use super::kernels::driver;
use crate::codec::Dtype;
use crate::{Error, Result};

/// The shape of `c[m × n] = a[m × k] · b`. Matrices are row-major.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gemm {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// `b` is `[n × k]`, to be transposed; else `[k × n]`.
    pub transposed: bool,
    /// What `a` and `b` hold.
    pub dtype: Dtype,
    /// What `c` holds. Sums are F32.
    pub out: Dtype,
    /// Elements from one row to the next.
    pub strides: Strides,
    /// Adds to `c` instead of overwriting it.
    pub add: bool,
}

/// Elements from one row to the next of each matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strides {
    pub a: usize,
    pub b: usize,
    pub c: usize,
}

impl Gemm {
    /// Enqueues the product.
    ///
    /// # Errors
    /// If a matrix does not fit into its memory, a size exceeds 2^31, or cuBLAS fails.
    pub fn run(&self, device: &CudaDevice, a: &CudaView<u8>, b: &CudaView<u8>, c: &mut CudaViewMut<u8>) -> Result<()> {
        let Gemm { m, n, k, transposed, dtype, out, strides, add } = *self;
        let (b_rows, b_cols) = if transposed { (n, k) } else { (k, n) };
        let fits = |rows: usize, cols: usize, stride: usize, size: usize, room: usize| {
            rows > 0 && cols > 0 && stride >= cols && ((rows - 1) * stride + cols) * size <= room
        };
        let within = fits(m, k, strides.a, dtype.size(), a.len())
            && fits(b_rows, b_cols, strides.b, dtype.size(), b.len())
            && fits(m, n, strides.c, out.size(), c.len());
        let most = [m, n, k, strides.a, strides.b, strides.c].into_iter().max().unwrap_or(0);
        if !within || i32::try_from(most).is_err() {
            return Err(Error::Invalid(format!("a product that does not fit into its memory: {self:?}")));
        }
        let int = |size: usize| size as i32;
        let (alpha, beta) = (1f32, if add { 1f32 } else { 0f32 });
        let transpose =
            if transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N };
        let (stream, blas) = (device.cuda_stream(), device.cublas_handle());
        let (a, _read_a) = a.device_ptr(&stream);
        let (b, _read_b) = b.device_ptr(&stream);
        let (c, _written) = c.device_ptr_mut(&stream);
        // cuBLAS is column-major: it computes the transpose of `c` from those of `b` and `a`.
        // SAFETY: all three matrices lie within their memory, as checked above; the scalars are F32 as the compute type asks.
        driver(unsafe {
            result::gemm_ex(
                *blas.handle(),
                transpose,
                sys::cublasOperation_t::CUBLAS_OP_N,
                int(n),
                int(m),
                int(k),
                (&raw const alpha).cast(),
                b as *const _,
                data_type(dtype),
                int(strides.b),
                a as *const _,
                data_type(dtype),
                int(strides.a),
                (&raw const beta).cast(),
                c as *mut _,
                data_type(out),
                int(strides.c),
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        })
    }
}

fn data_type(dtype: Dtype) -> sys::cudaDataType_t {
    match dtype {
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        Dtype::F16 => sys::cudaDataType_t::CUDA_R_16F,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

//! Descriptions of matrices for tensor copies (`kernels/cluster.cuh`), from compute capability 9.0 on.
#![allow(unsafe_code)]

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc;
use cudarc::driver::{DeviceRepr, sys};

use super::kernels::driver;
use crate::codec::Dtype;
use crate::{Error, Result};

/// Columns of a box, the 128 bytes that copies swizzle.
const BOX_COLS: usize = 64;

/// A matrix of BF16 or F16 in memory, to be copied in boxes of 64 columns; the struct of that name in `kernels/cluster.cuh`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct TensorMap(sys::CUtensorMap);

// SAFETY: words that the driver wrote, in C's layout.
unsafe impl DeviceRepr for TensorMap {}
const _: () = assert!(size_of::<TensorMap>() == 128);

impl TensorMap {
    /// Whether there can be one of rows that start at `address` and are `stride` elements apart.
    pub fn takes(address: u64, stride: usize) -> bool {
        address.is_multiple_of(16) && stride.is_multiple_of(8)
    }

    /// `rows × cols` elements from `address` on, in boxes of `box_rows` rows.
    ///
    /// # Errors
    /// If the driver refuses it.
    pub fn of(
        address: u64,
        [rows, cols]: [usize; 2],
        stride: usize,
        box_rows: usize,
        dtype: Dtype,
    ) -> Result<TensorMap> {
        if !TensorMap::takes(address, stride) || stride < cols {
            return Err(Error::Invalid(format!("rows of {cols} elements, {stride} apart, in boxes")));
        }
        let element = match dtype {
            Dtype::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let (sizes, strides) = ([cols as u64, rows as u64], [stride as u64 * 2]);
        let (sides, steps) = ([BOX_COLS as u32, box_rows as u32], [1u32; 2]);
        let mut map = TensorMap(sys::CUtensorMap { opaque: [0; 16] });
        // SAFETY: two sizes, a stride and two sides, as a matrix has; the address is only written down.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map.0,
                element,
                2,
                address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                sides.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        driver(result.result())?;
        Ok(map)
    }
}

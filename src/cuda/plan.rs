//! How a matrix is coded, as kernels take it.
#![allow(unsafe_code)]

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

use crate::codec::{self, Coding, Dtype, Geometry, Kind, ScaleLayout};
use crate::format::TileStream;
use crate::format::header::{HEADER_BYTES, RECORD_BYTES, TABLE_BYTES};

/// What quantised weights become: `Form` in `kernels/tile_stream.cuh`.
pub(super) const AS_STORED: u32 = 0;
pub(super) const UNROUNDED: u32 = 1;
pub(super) const INTEGERS: u32 = 2;

/// How a matrix is coded: the struct of that name in `kernels/tile_stream.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    total: u64,
    scales: u64,
    rows: u32,
    cols: u32,
    tile_cols: u32,
    kind: u8,
    dtype: u8,
    class_bits: u8,
    coding: u8,
    raw_bits: u8,
    scale: u8,
    escape: u8,
    out: u8,
    map: [u8; 16],
    form: u32,
}

// SAFETY: plain numbers in C's layout, without padding.
unsafe impl DeviceRepr for Plan {}
const _: () = assert!(size_of::<Plan>() == 56);

impl Plan {
    /// That of a stream, decoded to its own dtype.
    pub fn of(stream: &TileStream) -> Plan {
        let (plan, geometry) = (stream.plan(), stream.geometry());
        let records = RECORD_BYTES * geometry.tiles();
        Plan {
            total: stream.total_bytes() as u64,
            scales: (HEADER_BYTES + TABLE_BYTES + records) as u64,
            rows: geometry.rows as u32,
            cols: geometry.cols as u32,
            tile_cols: geometry.tile_cols() as u32,
            kind: plan.kind as u8,
            dtype: plan.dtype as u8,
            class_bits: plan.class_bits as u8,
            coding: plan.coding as u8,
            raw_bits: plan.raw_bits as u8,
            scale: plan.scale as u8,
            escape: plan.escape_class().unwrap_or(u8::MAX),
            out: plan.dtype as u8,
            map: plan.map.values,
            form: AS_STORED,
        }
    }

    /// Whether a matrix is what `kernels/tile_bf16.cuh` is for: without levels (0), or with them (1).
    pub fn usual(plan: &codec::Plan, geometry: Geometry) -> Option<usize> {
        let usual = (plan.kind, plan.dtype, plan.coding) == (Kind::Bf16, Dtype::Bf16, Coding::Rans)
            && (plan.class_bits, plan.raw_bits) == (4, 8)
            && geometry.cols.is_multiple_of(8);
        match plan.scale {
            ScaleLayout::None if usual => Some(0),
            ScaleLayout::Levels if usual => Some(1),
            _ => None,
        }
    }

    /// Bytes of the stream.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The same matrix, decoded to another dtype and form.
    pub fn to(self, dtype: Dtype, form: u32) -> Plan {
        Plan { out: dtype as u8, form, ..self }
    }
}

//! The layouts that fused kernels multiply with: units of 16×128 weights in the order of tensor-core fragments
//! (`kernels/unit.cuh`), eight of them a stage; and the kernels of each.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule};

use super::kernels::function;
use crate::Result;

/// Rows and columns of a unit.
pub(super) const TILE_ROWS: usize = 16;
pub(super) const UNIT_COLS: usize = 128;

/// One of the layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    /// BF16 weights, 12 bits each: `kernels/fixed.cuh`.
    Fixed,
    /// Integers from −127 to 127 with scales: `kernels/integers.cuh`.
    Int8,
    /// Integers from −16 to 15 with scales.
    Int5,
    /// Integers from −8 to 7 with scales.
    Int4,
}

impl Family {
    pub const ALL: [Family; 4] = [Family::Fixed, Family::Int8, Family::Int5, Family::Int4];

    /// What its kernels' names begin with.
    pub fn prefix(self) -> &'static str {
        match self {
            Family::Fixed => "fixed",
            Family::Int8 => "int8",
            Family::Int5 => "int5",
            Family::Int4 => "int4",
        }
    }

    /// Bytes of a unit, and of the trailer of a stage of eight.
    pub fn bytes(self) -> (usize, usize) {
        match self {
            Family::Fixed => (3072, 96),
            Family::Int8 => (2048, 128),
            Family::Int5 => (1280, 128),
            Family::Int4 => (1024, 128),
        }
    }

    pub fn scaled(self) -> bool {
        self != Family::Fixed
    }

    pub fn stage_bytes(self) -> usize {
        let (unit, trailer) = self.bytes();
        Family::UNITS * unit + trailer
    }

    /// The most stages that a block keeps on their way: some 48 KB.
    pub fn in_flight(self) -> usize {
        (49_152 + self.stage_bytes() / 2) / self.stage_bytes()
    }

    /// Units of a stage.
    pub const UNITS: usize = 8;
}

/// The kernels of one layout.
#[derive(Debug)]
pub(super) struct PackedKernels {
    pub plan: CudaFunction,
    pub pack: CudaFunction,
    pub decode: CudaFunction,
    pub ids: CudaFunction,
    /// For up to 8, 16, 32 and 64 columns of activations, with the shared memory that each may ask for.
    pub products: [(CudaFunction, usize); 4],
    /// For 33 to 64 columns with whole warpgroups: of layout `fixed`, on compute capability 9.0.
    pub warpgroups: Option<(CudaFunction, usize)>,
}

impl PackedKernels {
    pub fn load(family: Family, module: &Arc<CudaModule>, shared: i32, hopper: bool) -> Result<PackedKernels> {
        let prefix = family.prefix();
        let product = |columns: usize| function(module, &format!("{prefix}_product_{columns}"), shared);
        Ok(PackedKernels {
            plan: function(module, &format!("{prefix}_plan"), 0)?.0,
            pack: function(module, &format!("{prefix}_pack"), 0)?.0,
            decode: function(module, &format!("{prefix}_decode"), 0)?.0,
            ids: function(module, &format!("{prefix}_ids"), 0)?.0,
            products: [product(8)?, product(16)?, product(32)?, product(64)?],
            warpgroups: match family {
                Family::Fixed if hopper => Some(function(module, "fixed_warpgroup_64", shared)?),
                _ => None,
            },
        })
    }

    /// The product of that number.
    pub fn product(&self, kernel: usize) -> Option<&CudaFunction> {
        self.products.get(kernel).or(self.warpgroups.as_ref()).map(|(function, _)| function)
    }
}

/// Stages of a tile of `cols` columns.
pub(super) fn stages(cols: usize) -> usize {
    cols.div_ceil(UNIT_COLS).div_ceil(Family::UNITS)
}

pub(super) fn tile_bytes(family: Family, cols: usize) -> usize {
    let (unit, trailer) = family.bytes();
    cols.div_ceil(UNIT_COLS) * unit + stages(cols) * trailer
}

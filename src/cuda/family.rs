//! The layouts that fused kernels multiply with: units of 16×128 weights in the order of tensor-core fragments
//! (`kernels/unit.cuh`), eight of them a stage; and the kernels of each.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule};

use super::kernels::{function, load_module};
use super::{prefill, stream};
use crate::Result;
use crate::codec::kquant::GgmlType;

/// Rows and columns of a unit.
pub(super) const TILE_ROWS: usize = 16;
pub(super) const UNIT_COLS: usize = 128;

/// One of the layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    /// BF16 weights, 12 bits each: `kernels/fixed.cuh`.
    Fixed,
    /// BF16 weights, 11.5 bits each: `kernels/window.cuh`.
    Window,
    /// F8_E4M3 weights as they are: `kernels/float8.cuh`.
    E4m3,
    /// The same of F8_E5M2.
    E5m2,
    /// Integers from −128 to 127 with scales: `kernels/integers.cuh`.
    Int8,
    /// Integers from −16 to 15 with scales.
    Int5,
    /// Integers from −8 to 7 with scales.
    Int4,
    /// One of ggml's block formats: `kernels/kquant.cuh`.
    Blocks(GgmlType),
}

impl Family {
    /// Those that are made from decoded rows.
    pub const FROM_ROWS: [Family; 7] =
        [Family::Fixed, Family::Window, Family::E4m3, Family::E5m2, Family::Int8, Family::Int5, Family::Int4];

    /// The block formats that have kernels; others are dequantised.
    pub const BLOCKS: [GgmlType; 11] = [
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::Q8_0,
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Int4G128,
    ];

    /// What its kernels' names begin with.
    pub fn prefix(self) -> String {
        match self {
            Family::Fixed => "fixed".into(),
            Family::Window => "window".into(),
            Family::E4m3 => "e4m3".into(),
            Family::E5m2 => "e5m2".into(),
            Family::Int8 => "int8".into(),
            Family::Int5 => "int5".into(),
            Family::Int4 => "int4".into(),
            Family::Blocks(ty) => ty.name().to_lowercase(),
        }
    }

    /// Bytes of a unit, and of the trailer of a stage of eight.
    pub fn bytes(self) -> (usize, usize) {
        match self {
            Family::Fixed => (3072, 96),
            Family::Window => (2816, 1024),
            Family::E4m3 | Family::E5m2 => (2048, 128),
            Family::Int8 => (2048, 128),
            Family::Int5 => (1280, 128),
            Family::Int4 => (1024, 128),
            // Codes, then scales of the unit's 16 rows; in the trailer those of superblocks.
            Family::Blocks(ty) => match ty {
                GgmlType::Q2_K => (512 + 128, 256),
                GgmlType::Q3_K => (768 + 128, 128),
                GgmlType::Q4_K => (1024 + 96, 256),
                GgmlType::Q5_K => (1280 + 96, 256),
                GgmlType::Q6_K => (1536 + 128, 128),
                GgmlType::Q4_0 => (1024 + 128, 0),
                GgmlType::Q4_1 => (1024 + 256, 0),
                GgmlType::Q5_0 => (1280 + 128, 0),
                GgmlType::Q5_1 => (1280 + 256, 0),
                GgmlType::Int4G128 => (1024 + 48, 0),
                _ => (2048 + 128, 0),
            },
        }
    }

    /// Whether its weights are floats without scales: `kernels/floats.cuh`.
    pub fn floats(self) -> bool {
        matches!(self, Family::Fixed | Family::Window | Family::E4m3 | Family::E5m2)
    }

    /// Whether its weights have scales, and decode to more than one dtype.
    pub fn scaled(self) -> bool {
        !self.floats()
    }

    /// The most rows of activations that its weights are multiplied with as bytes (`kernels/byte_product.cuh`); 0 if they
    /// are no bytes.
    pub fn byte_rows(self) -> usize {
        match self {
            Family::Int8 | Family::Int5 => 8,
            Family::Int4 => 2,
            _ => 0,
        }
    }

    /// Whether it is one of the block formats.
    pub fn blocks(self) -> bool {
        matches!(self, Family::Blocks(_))
    }

    pub fn stage_bytes(self) -> usize {
        let (unit, trailer) = self.bytes();
        Family::UNITS * unit + trailer
    }

    /// Stages of `bytes`, to the nearest, and at least one.
    pub fn stages_of(self, bytes: usize) -> usize {
        ((bytes + self.stage_bytes() / 2) / self.stage_bytes()).max(1)
    }

    /// Shared memory for the sums of a unit's groups of activations, in each column of them: `kernels/kquant_product.cuh`.
    pub fn group_sums_bytes(self) -> usize {
        match self {
            // Signed bytes: nothing is to be subtracted.
            Family::Blocks(GgmlType::Q8_0) => 0,
            Family::Blocks(GgmlType::Int4G128) => 8,
            Family::Blocks(GgmlType::Q2_K | GgmlType::Q3_K | GgmlType::Q6_K) => 64,
            Family::Blocks(_) => 32,
            _ => 0,
        }
    }

    /// The same for a single row, in integers: `kernels/kquant_single.cuh`.
    pub fn plane_sums_bytes(self) -> usize {
        match self {
            Family::Blocks(GgmlType::Q2_K | GgmlType::Q3_K | GgmlType::Q6_K) => 64,
            _ => 32,
        }
    }

    /// The same for each eight rows, in F16: `kernels/kquant_few.cuh`.
    pub fn few_group_bytes(self) -> usize {
        match self {
            Family::Blocks(GgmlType::Int4G128) => 32,
            Family::Blocks(GgmlType::Q2_K | GgmlType::Q3_K | GgmlType::Q6_K) => 256,
            _ => 128,
        }
    }

    /// Bytes of weights that are on their way to such products at most. By measurement: more is faster where codes have 4 or 8
    /// bits, and slower where a warp has more to do with them.
    pub fn few_in_flight(self) -> usize {
        use GgmlType::{Int4G128, Q4_0, Q4_1, Q4_K, Q8_0};
        match self {
            Family::Blocks(Q4_K | Q4_0 | Q4_1 | Q8_0 | Int4G128) => 55_296,
            _ => 36_864,
        }
    }

    /// Units of a stage.
    pub const UNITS: usize = 8;
}

/// The kernels of one layout.
#[derive(Debug)]
pub(super) struct PackedKernels {
    pub pack: Pack,
    pub decode: CudaFunction,
    pub ids: CudaFunction,
    /// For up to 8, 16, 32 and 64 columns of activations, with the shared memory that each may ask for. Block formats also
    /// have one for a single row of BF16 or F16, and two for compute capability 9.0 and up to 8 and 16 rows of these; floats
    /// have two for compute capability 9.0 and up to 8 and 16 columns with more warps.
    pub products: Vec<(CudaFunction, usize)>,
    /// For some rows of activations, on compute capability 9.0: `super::stream`.
    pub stream: Vec<(CudaFunction, usize)>,
    /// For many, likewise: `super::prefill`.
    pub prefill: Vec<(CudaFunction, usize)>,
}

/// The modules of the kernels that compute capability 9.0 has besides.
pub(super) struct Warpgroups {
    stream: Arc<CudaModule>,
    prefill: Arc<CudaModule>,
}

impl Warpgroups {
    pub fn load(context: &Arc<CudaContext>, stream: &[u8], prefill: &[u8]) -> Result<Warpgroups> {
        Ok(Warpgroups { stream: load_module(context, stream)?, prefill: load_module(context, prefill)? })
    }
}

/// What makes the layout.
#[derive(Debug)]
pub(super) enum Pack {
    /// From decoded rows, in two passes.
    Rows { plan: CudaFunction, pack: CudaFunction },
    /// From a file's blocks.
    Blocks { repack: CudaFunction },
}

impl PackedKernels {
    pub fn load(
        family: Family,
        module: &Arc<CudaModule>,
        warpgroups: Option<&Warpgroups>,
        shared: i32,
    ) -> Result<PackedKernels> {
        let (prefix, hopper) = (family.prefix(), warpgroups.is_some());
        let product = |columns: &usize| function(module, &format!("{prefix}_product_{columns}"), shared);
        let other = |name: &str| Ok::<_, crate::Error>(function(module, &format!("{prefix}_{name}"), 0)?.0);
        let pack = match family.blocks() {
            true => Pack::Blocks { repack: other("repack")? },
            false => Pack::Rows { plan: other("plan")?, pack: other("pack")? },
        };
        let mut products = [8, 16, 32, 64].iter().map(product).collect::<Result<Vec<_>>>()?;
        if family.blocks() {
            products.push(product(&1)?);
            for rows in [8, 16] {
                products.push(function(module, &format!("{prefix}_few_{rows}"), shared)?);
            }
        }
        if family.floats() && hopper {
            for columns in [8, 16] {
                products.push(function(module, &format!("{prefix}_teams_{columns}"), shared)?);
            }
        }
        let stream = warpgroups.map_or(Ok(vec![]), |modules| stream::load(&modules.stream, family, shared))?;
        let prefill = warpgroups.map_or(Ok(vec![]), |modules| prefill::load(&modules.prefill, family, shared))?;
        Ok(PackedKernels { pack, decode: other("decode")?, ids: other("ids")?, products, stream, prefill })
    }

    /// The product of that number.
    pub fn product(&self, kernel: usize) -> Option<&CudaFunction> {
        self.products.get(kernel).map(|(function, _)| function)
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

//! How one matrix is coded: everything that encoder and decoder must agree on before the first tile.

use super::classes::ClassMap;
use super::kind::{Coding, Dtype, FloatBits, Kind, ScaleLayout};
use super::planes;
use super::rans::{LANES, STATE_BYTES};
use super::table::FreqTable;
use crate::{Error, Result};

/// The coding of one matrix, as its header and table state it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What is stored.
    pub kind: Kind,
    /// The tensor's own dtype, to which decompression restores it.
    pub dtype: Dtype,
    /// Bits of a class: 0 (no classes, all bits raw), 3, 4 or 8.
    pub class_bits: u32,
    /// What happens to the class plane.
    pub coding: Coding,
    /// Raw bits of a weight.
    pub raw_bits: u32,
    /// Scales of a quantised matrix.
    pub scale: ScaleLayout,
    /// High parts of the classes.
    pub map: ClassMap,
    /// Frequencies of the class plane's bytes (with 3-bit classes: of the classes); `None` without classes.
    pub freqs: Option<FreqTable>,
}

/// `class_bits` and `coding` under one name, as users choose it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Stage {
    /// Entropy-coded: the smallest.
    #[default]
    Rans,
    /// 4-bit classes as they are: 12 bits for BF16, the fastest to decode. INT8 weights are plain bytes.
    Fixed12,
    /// 3-bit classes as they are, the rest escapes: about 11.2 bits for BF16.
    Fixed11,
}

impl Stage {
    /// Name as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Rans => "rans",
            Stage::Fixed12 => "fixed12",
            Stage::Fixed11 => "fixed11",
        }
    }
}

impl Plan {
    /// A plan with the raw bits, escape and identity map that follow from the other choices; frequencies come later.
    pub fn new(kind: Kind, dtype: Dtype, class_bits: u32, coding: Coding, scale: ScaleLayout) -> Plan {
        let mut plan = Plan {
            kind,
            dtype,
            class_bits,
            coding,
            raw_bits: 0,
            scale,
            map: ClassMap { values: [0; 16], escape: None },
            freqs: None,
        };
        plan.raw_bits = plan.fixed_raw_bits().unwrap_or(0);
        plan.map.escape = plan.escape_class();
        if plan.uses_map() && plan.map.escape.is_none() {
            plan.map = ClassMap::identity(None);
        }
        plan
    }

    /// All bits in raw planes: for matrices that no class shrinks.
    pub fn raw(kind: Kind, dtype: Dtype, scale: ScaleLayout) -> Plan {
        Plan::new(kind, dtype, 0, Coding::Plain, scale)
    }

    /// Raw bits as they follow from kind and class width; rate-coded matrices choose theirs.
    fn fixed_raw_bits(&self) -> Option<u32> {
        match (self.class_bits, self.kind) {
            (_, Kind::Rate) => None,
            (0, kind) => Some(kind.code_bits()),
            (8, _) => Some(0),
            (_, kind) => Some(kind.code_bits() - kind.high_bits()),
        }
    }

    /// The class that announces an escape, if there is one.
    pub(crate) fn escape_class(&self) -> Option<u8> {
        let last = ((1u32 << self.class_bits) - 1) as u8;
        let full = match self.kind {
            Kind::Rate => false,
            _ => self.class_bits == 8 || self.class_bits == self.kind.high_bits(),
        };
        (self.class_bits > 0 && !full).then_some(last)
    }

    /// True if the header's class map is in use: 3- and 4-bit classes, except rate-coded ones, which count upwards.
    pub(crate) fn uses_map(&self) -> bool {
        self.kind != Kind::Rate && (self.class_bits == 3 || self.class_bits == 4)
    }

    /// What class 0 stands for in rate-coded matrices is `-bias`.
    pub(crate) fn rate_bias(&self) -> i32 {
        (1 << (self.class_bits.max(1) - 1)) - 1
    }

    /// True if weights are integers times scales.
    pub fn quantised(&self) -> bool {
        !matches!(self.scale, ScaleLayout::None | ScaleLayout::Levels)
    }

    /// True if every weight, as products take it, is a BF16 number.
    pub fn exact_in_bf16(&self) -> bool {
        matches!(self.kind, Kind::Bf16 | Kind::F8E4M3 | Kind::F8E5M2) || self.kind == Kind::Int8 && !self.quantised()
    }

    /// Levels work on exponents, and need an escape for those that no class reaches.
    pub(crate) fn allows_levels(&self) -> bool {
        self.kind.is_float() && self.map.escape.is_some()
    }

    /// Predictors work on INT8 weights only.
    pub fn allows_predictor(&self) -> bool {
        self.kind == Kind::Int8 && self.class_bits > 0
    }

    /// Bytes of a decoded weight: its stored code, or an `f32` for quantised kinds.
    pub fn value_bytes(&self) -> usize {
        self.value_dtype().size()
    }

    /// What decoded values are, by the dtype of the same layout.
    pub fn value_dtype(&self) -> Dtype {
        match self.kind {
            Kind::Int8 | Kind::Rate if self.quantised() => Dtype::F32,
            Kind::Bf16 => Dtype::Bf16,
            Kind::F16 => Dtype::F16,
            Kind::F8E4M3 => Dtype::F8E4M3,
            Kind::F8E5M2 => Dtype::F8E5M2,
            Kind::Int8 => Dtype::I8,
            Kind::F32 | Kind::Rate => Dtype::F32,
        }
    }

    /// Name of the stage, for tables: `rans`, `rans8`, `fixed12`, `fixed11` or `raw`.
    pub fn stage_name(&self) -> &'static str {
        match (self.class_bits, self.coding) {
            (0, _) => "raw",
            (8, _) => "rans8",
            (_, Coding::Rans) => "rans",
            (4, Coding::Plain) => "fixed12",
            _ => "fixed11",
        }
    }

    /// Checks that the choices fit together; what passes here decodes without a panic whatever the tile bytes are.
    pub fn validate(&self) -> Result<()> {
        let coding = match (self.class_bits, self.coding) {
            (0, Coding::Plain) => self.kind != Kind::Rate,
            (3, Coding::Plain) | (4, _) => true,
            (8, Coding::Rans) => matches!(self.kind, Kind::Int8 | Kind::Rate),
            _ => false,
        };
        if !coding {
            let got = format!("{} {}-bit {:?}", self.kind.name(), self.class_bits, self.coding);
            return Err(Error::field("stage", got, "0-, 3- or 4-bit plain, 4-bit rans, 8-bit rans for int8 and rate"));
        }
        match self.fixed_raw_bits() {
            Some(bits) if bits != self.raw_bits => {
                return Err(Error::field("raw bits", self.raw_bits, bits));
            }
            None if self.raw_bits > 7 => {
                return Err(Error::field("raw bits", self.raw_bits, "0..=7"));
            }
            _ => {}
        }
        let wide = matches!(self.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32);
        let restores = match self.kind {
            Kind::Int8 if self.scale == ScaleLayout::None => self.dtype == Dtype::I8,
            Kind::Int8 | Kind::Rate => self.quantised() && wide,
            Kind::Bf16 => !self.quantised() && wide,
            kind => !self.quantised() && kind == Kind::of(self.dtype),
        };
        if !restores {
            let got = format!("{} with {:?} scales from {}", self.kind.name(), self.scale, self.dtype.name());
            return Err(Error::field("kind", got, "a kind that restores the tensor's dtype"));
        }
        if self.scale == ScaleLayout::Levels && !self.allows_levels() {
            return Err(Error::field("scale layout", "levels", "none: levels need float classes with an escape"));
        }
        if self.kind == Kind::Rate && self.scale == ScaleLayout::Tile {
            return Err(Error::field("scale layout", "per tile", "per matrix or per row for rate-coded weights"));
        }
        Ok(())
    }

    /// Rate-coded: the class of quantised value `q`, or the escape class.
    #[inline(always)]
    pub(crate) fn rate_class(&self, q: i32) -> u32 {
        let escape = (1u32 << self.class_bits) - 1;
        let class = (q >> self.raw_bits).wrapping_add(self.rate_bias()) as u32;
        class.min(escape)
    }

    /// Bytes of the uncoded class plane of `n` weights.
    pub(crate) fn class_plane_bytes(&self, n: usize) -> usize {
        planes::field_bytes(n, self.class_bits)
    }

    /// Symbols of a rANS-coded band of `n` weights: the bytes of its class plane, padded to whole steps.
    pub(crate) fn symbols(&self, n: usize) -> usize {
        super::geometry::padded(n) * self.class_bits as usize / 8
    }

    /// Smallest and largest size of a band's coded classes.
    pub(crate) fn coded_bounds(&self, n: usize) -> (usize, usize) {
        match self.coding {
            Coding::Plain => (self.class_plane_bytes(n), self.class_plane_bytes(n)),
            Coding::Rans => (STATE_BYTES, STATE_BYTES + 2 * self.symbols(n)),
        }
    }

    /// Bytes of the raw planes of `n` weights.
    pub(crate) fn raw_bytes(&self, n: usize) -> usize {
        planes::field_bytes(n, self.raw_bits)
    }

    /// The float layout of lossless float kinds.
    pub(crate) fn float_bits(&self) -> Option<FloatBits> {
        FloatBits::of(self.kind)
    }
}

const _: () = assert!(LANES == 32);

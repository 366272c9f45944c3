//! What a weight is: source dtypes, weight kinds, and how each kind splits into a high part and raw bits.

use crate::{Error, Result};

/// The dtype of a tensor as its checkpoint stores it, limited to those that the codec compresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Dtype {
    /// bfloat16.
    Bf16 = 1,
    /// IEEE half precision.
    F16 = 2,
    /// IEEE single precision.
    F32 = 3,
    /// 8-bit float, 4 exponent and 3 mantissa bits.
    F8E4M3 = 4,
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8E5M2 = 5,
    /// Signed byte.
    I8 = 6,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::I8 => 1,
        }
    }

    /// The dtype's name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Bf16 => "BF16",
            Dtype::F16 => "F16",
            Dtype::F32 => "F32",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::F8E5M2 => "F8_E5M2",
            Dtype::I8 => "I8",
        }
    }

    /// The dtype of that name in a safetensors header, if the codec compresses it.
    pub fn from_name(name: &str) -> Option<Dtype> {
        const ALL: [Dtype; 6] = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8];
        ALL.into_iter().find(|d| d.name() == name)
    }

    pub(crate) fn from_u8(v: u8) -> Result<Dtype> {
        Ok(match v {
            1 => Dtype::Bf16,
            2 => Dtype::F16,
            3 => Dtype::F32,
            4 => Dtype::F8E4M3,
            5 => Dtype::F8E5M2,
            6 => Dtype::I8,
            _ => return Err(Error::field("dtype", v, "1..=6")),
        })
    }
}

/// How the weights of a compressed matrix are represented.
///
/// The lossless kinds carry every bit pattern; [`Kind::Int8`] with scales and [`Kind::Rate`] are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// 8-bit exponent high; sign and 7 mantissa bits raw. Also F16 and F32 sources whose values are all BF16-exact.
    Bf16 = 1,
    /// 5-bit exponent high; sign and 10 mantissa bits raw.
    F16 = 2,
    /// 8-bit exponent high; sign and 23 mantissa bits raw.
    F32 = 3,
    /// 4-bit exponent high; sign and 3 mantissa bits raw.
    F8E4M3 = 4,
    /// 5-bit exponent high; sign and 2 mantissa bits raw.
    F8E5M2 = 5,
    /// A signed byte after prediction; with scales a quantised weight `q · scale`.
    Int8 = 6,
    /// `q · step` for an unbounded integer `q`; an escape holds the weight itself as an `f32`.
    Rate = 7,
}

impl Kind {
    pub(crate) fn from_u8(v: u8) -> Result<Kind> {
        Ok(match v {
            1 => Kind::Bf16,
            2 => Kind::F16,
            3 => Kind::F32,
            4 => Kind::F8E4M3,
            5 => Kind::F8E5M2,
            6 => Kind::Int8,
            7 => Kind::Rate,
            _ => return Err(Error::field("kind", v, "1..=7")),
        })
    }

    /// Short name for tables and messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Bf16 => "bf16",
            Kind::F16 => "f16",
            Kind::F32 => "f32",
            Kind::F8E4M3 => "f8e4m3",
            Kind::F8E5M2 => "f8e5m2",
            Kind::Int8 => "int8",
            Kind::Rate => "rate",
        }
    }

    /// The lossless kind that stores `dtype` itself.
    pub fn of(dtype: Dtype) -> Kind {
        match dtype {
            Dtype::Bf16 => Kind::Bf16,
            Dtype::F16 => Kind::F16,
            Dtype::F32 => Kind::F32,
            Dtype::F8E4M3 => Kind::F8E4M3,
            Dtype::F8E5M2 => Kind::F8E5M2,
            Dtype::I8 => Kind::Int8,
        }
    }

    /// Bits of the whole stored code; for [`Kind::Rate`] there is no such width.
    pub(crate) fn code_bits(self) -> u32 {
        match self {
            Kind::Bf16 | Kind::F16 => 16,
            Kind::F32 | Kind::Rate => 32,
            Kind::F8E4M3 | Kind::F8E5M2 | Kind::Int8 => 8,
        }
    }

    /// Bits of the high part with 3- and 4-bit classes.
    pub(crate) fn high_bits(self) -> u32 {
        match self {
            Kind::Bf16 | Kind::F32 => 8,
            Kind::F16 | Kind::F8E5M2 => 5,
            Kind::F8E4M3 | Kind::Int8 => 4,
            Kind::Rate => 4,
        }
    }

    /// True for the kinds whose high part is a float's exponent.
    pub fn is_float(self) -> bool {
        !matches!(self, Kind::Int8 | Kind::Rate)
    }

    /// Bytes of one escape entry: the high part itself, or for [`Kind::Rate`] the whole weight as an `f32`.
    pub(crate) fn escape_bytes(self) -> usize {
        if self == Kind::Rate { 4 } else { 1 }
    }
}

/// What happens to the class plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Coding {
    /// Stored as it is.
    Plain = 0,
    /// Each byte of it is one rANS symbol.
    Rans = 1,
}

/// How many scales a quantised matrix has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ScaleLayout {
    /// Not quantised.
    None = 0,
    /// One for the matrix.
    Matrix = 1,
    /// One for each row.
    Row = 2,
    /// One for each 256×256 tile.
    Tile = 3,
    /// No scales but levels: a byte for each row, then one for each column, in sixteenths of an octave, relative to
    /// which the exponents of a lossless matrix are classed (see [`crate::codec::levels`]).
    Levels = 4,
}

impl ScaleLayout {
    pub(crate) fn from_u8(v: u8) -> Result<ScaleLayout> {
        Ok(match v {
            0 => ScaleLayout::None,
            1 => ScaleLayout::Matrix,
            2 => ScaleLayout::Row,
            3 => ScaleLayout::Tile,
            4 => ScaleLayout::Levels,
            _ => return Err(Error::field("scale layout", v, "0..=4")),
        })
    }
}

/// One float format: how its bits split into exponent (high) and sign with mantissa (raw).
///
/// All formats have the layout sign, exponent, mantissa from the top bit down. The raw part is the mantissa with the
/// sign on top, so that for BF16 it fills a byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FloatBits {
    pub exponent: u32,
    pub mantissa: u32,
}

impl FloatBits {
    pub(crate) const fn of(kind: Kind) -> Option<FloatBits> {
        let (exponent, mantissa) = match kind {
            Kind::Bf16 => (8, 7),
            Kind::F16 => (5, 10),
            Kind::F32 => (8, 23),
            Kind::F8E4M3 => (4, 3),
            Kind::F8E5M2 => (5, 2),
            Kind::Int8 | Kind::Rate => return None,
        };
        Some(FloatBits { exponent, mantissa })
    }

    /// The exponent field of a code.
    #[inline(always)]
    pub(crate) const fn high(self, code: u32) -> u8 {
        ((code >> self.mantissa) & ((1 << self.exponent) - 1)) as u8
    }

    /// Sign and mantissa of a code.
    #[inline(always)]
    pub(crate) const fn raw(self, code: u32) -> u32 {
        (code & ((1 << self.mantissa) - 1)) | (((code >> (self.mantissa + self.exponent)) & 1) << self.mantissa)
    }

    /// The code with that exponent, sign and mantissa. Total: excess bits of `high` and `raw` are dropped.
    #[inline(always)]
    pub(crate) const fn join(self, high: u8, raw: u32) -> u32 {
        let exponent = high as u32 & ((1 << self.exponent) - 1);
        let sign = (raw >> self.mantissa) & 1;
        (sign << (self.mantissa + self.exponent)) | (exponent << self.mantissa) | (raw & ((1 << self.mantissa) - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_and_8_bit_pattern_splits_and_joins() {
        for kind in [Kind::Bf16, Kind::F16, Kind::F8E4M3, Kind::F8E5M2] {
            let f = FloatBits::of(kind).unwrap();
            for code in 0..1u32 << kind.code_bits() {
                assert_eq!(f.join(f.high(code), f.raw(code)), code, "{kind:?}");
                assert!(f.raw(code) < 1 << (f.mantissa + 1));
            }
        }
    }

    #[test]
    fn f32_patterns_split_and_join() {
        let f = FloatBits::of(Kind::F32).unwrap();
        for code in (0..=u32::MAX).step_by(65_537).chain([0x8000_0000, 0x7fc0_0001, 0xff80_0000, u32::MAX]) {
            assert_eq!(f.join(f.high(code), f.raw(code)), code);
        }
    }
}

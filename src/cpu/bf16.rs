//! A band of BF16 weights as kernels take it that multiply them in registers.

use crate::codec::band::Band;
use crate::codec::quant::Scales;
use crate::codec::{Coding, Kind};
use crate::cpu::dot::LANES;

/// The planes of a band of BF16 weights, each as long as the band needs, and the escapes not yet taken.
pub(super) struct Planes<'a> {
    /// 3 or 4.
    pub class_bits: u32,
    pub map: &'a [u8; 16],
    /// 4-bit classes, or the lower two bits of 3-bit ones.
    pub classes: &'a [u8],
    /// The upper bit of 3-bit classes.
    pub tops: &'a [u8],
    /// A byte for each weight: its length is the band's.
    pub raw: &'a [u8],
    /// Levels of rows and of columns; empty without.
    pub row_levels: &'a [u8],
    pub col_levels: &'a [u8],
    pub escapes: &'a [u8],
    /// Set when a marker had no escape.
    pub missing: bool,
    /// Columns of the band: a multiple of 64.
    pub cols: usize,
}

impl<'a> Planes<'a> {
    /// Those of `band`, whose rANS symbols, if it has any, are in `plane`. `None` if the band holds other weights, its
    /// width is not a multiple of 64, or a plane is too short.
    pub fn of(band: &Band<'a>, plane: &'a [u8]) -> Option<Planes<'a>> {
        if band.plan.kind != Kind::Bf16 || !band.cols.is_multiple_of(LANES) {
            return None;
        }
        let plane = if band.plan.coding == Coding::Plain { band.bytes.coded } else { plane };
        let (n, class_bits) = (band.weights(), band.plan.class_bits);
        let (classes, tops) = match class_bits {
            4 => (plane.get(..n / 2)?, &[][..]),
            3 => (plane.get(..n / 4)?, plane.get(n / 4..n / 4 + n / 8)?),
            _ => return None,
        };
        let (row_levels, col_levels) = match band.scales {
            Scales::Levels { rows, cols } => (rows.get(..band.rows)?, cols.get(..band.cols)?),
            _ => (&[][..], &[][..]),
        };
        Some(Planes {
            class_bits,
            map: &band.plan.map.values,
            classes,
            tops,
            raw: band.bytes.raw.get(..n)?,
            row_levels,
            col_levels,
            escapes: band.bytes.escapes,
            missing: false,
            cols: band.cols,
        })
    }

    /// True if every marker had an escape and none is left.
    pub fn finished(&self) -> bool {
        !self.missing && self.escapes.is_empty()
    }

    /// Puts escapes where `mask` has a bit, in order. For vector units without an expand instruction.
    #[cold]
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
    pub fn patch<const N: usize>(&mut self, mask: u64, high: &mut [u8; N]) {
        super::patch(&mut self.escapes, &mut self.missing, mask, high);
    }
}

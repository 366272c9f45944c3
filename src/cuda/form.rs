//! Which layouts suit a matrix, and how it is made into them.

use super::decode::DeviceStream;
use super::family::Family;
use super::packed::{Fused, Packed};
use super::packing::Scales;
use super::pair::Pair;
use crate::Result;
use crate::codec::{Kind, Plan};
use crate::matrix::GpuLayout;

/// A layout that a matrix may be made into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Packed(Family),
    Pair,
}

impl Form {
    pub const FIXED: Form = Form::Packed(Family::Fixed);
    const WINDOW: Form = Form::Packed(Family::Window);

    /// What to try for a layout, the best first. `Auto` is what is left if that which was chosen does not suit the weights.
    pub fn of(layout: GpuLayout, plan: &Plan) -> &'static [Form] {
        const FIXED: Form = Form::FIXED;
        const INT8: Form = Form::Packed(Family::Int8);
        match (layout, plan.kind) {
            (GpuLayout::Fixed, _) if plan.exact_in_bf16() => &[FIXED],
            (GpuLayout::Window, _) if plan.exact_in_bf16() => &[Form::WINDOW],
            (GpuLayout::Fp8, Kind::F8E4M3) => &[Form::Packed(Family::E4m3)],
            (GpuLayout::Fp8, Kind::F8E5M2) => &[Form::Packed(Family::E5m2)],
            (GpuLayout::Auto, Kind::F8E4M3) => &[Form::Packed(Family::E4m3), FIXED],
            (GpuLayout::Auto, Kind::F8E5M2) => &[Form::Packed(Family::E5m2), FIXED],
            (GpuLayout::Pair, _) if plan.exact_in_bf16() => &[Form::Pair],
            (GpuLayout::Integers | GpuLayout::Auto, Kind::Rate) => {
                &[Form::Packed(Family::Int4), Form::Packed(Family::Int5), INT8]
            }
            (GpuLayout::Integers, Kind::Int8) => &[INT8],
            (GpuLayout::Auto, Kind::Int8) if plan.quantised() => &[INT8],
            (GpuLayout::Auto, Kind::Int8) => &[INT8, FIXED],
            (GpuLayout::Auto, _) if plan.exact_in_bf16() => &[FIXED],
            _ => &[],
        }
    }

    /// Makes it of a stream; `None` if it does not suit the weights.
    pub fn make(self, stream: &DeviceStream, scales: &Scales) -> Result<Option<Box<dyn Fused>>> {
        Ok(match self {
            Form::Packed(family) => Packed::new(stream, family, scales.factors())?.map(|packed| Box::new(packed) as _),
            Form::Pair => Pair::new(stream)?.map(|pair| Box::new(pair) as _),
        })
    }
}

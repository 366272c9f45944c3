//! What becomes of a matrix in a GPU's memory.

use crate::{Error, Result};

/// What a compressed matrix is kept as in a GPU's memory. Which of them a matrix can have depends on its kind; one that
/// it cannot have is an error, except for the choices that are left to this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum GpuLayout {
    /// The fastest: measured once for each shape, kind and GPU, and remembered.
    #[default]
    Auto,
    /// The one that takes the least memory.
    Smallest,
    /// 12.05 bits a BF16 weight, decoded in registers: for matrices whose weights are all BF16 numbers.
    Fixed,
    /// Integers of 8, 5 or 4 bits with their scales, multiplied as they are: for INT8 and rate-coded matrices.
    Integers,
    /// The stream as it is at rest.
    Rans,
    /// Plain weights: what candle's own layers have.
    Dense,
}

impl GpuLayout {
    /// All choices.
    pub const ALL: [GpuLayout; 6] = [
        GpuLayout::Auto,
        GpuLayout::Smallest,
        GpuLayout::Fixed,
        GpuLayout::Integers,
        GpuLayout::Rans,
        GpuLayout::Dense,
    ];

    /// Name as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            GpuLayout::Auto => "auto",
            GpuLayout::Smallest => "smallest",
            GpuLayout::Fixed => "fixed",
            GpuLayout::Integers => "integers",
            GpuLayout::Rans => "rans",
            GpuLayout::Dense => "dense",
        }
    }

    /// The choice of that name.
    ///
    /// # Errors
    /// If there is none; the error lists them.
    pub fn from_name(name: &str) -> Result<GpuLayout> {
        GpuLayout::ALL.into_iter().find(|layout| layout.name() == name).ok_or_else(|| {
            Error::Invalid(format!("layout {name}: allowed are {}", GpuLayout::ALL.map(GpuLayout::name).join(", ")))
        })
    }
}

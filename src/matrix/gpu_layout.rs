//! What becomes of a matrix in a GPU's memory.

use crate::{Error, Result};

/// What a compressed matrix is kept as in a GPU's memory. Which of them a matrix can have depends on its kind; one that
/// it cannot have is an error, except for the choices that are left to this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum GpuLayout {
    /// The fastest for one row of activations. For BF16 matrices `Fixed`, `Pair` and `Dense` are timed when their shape is
    /// first met on a GPU, and the fastest is remembered, also in a file in the user's cache; `TAPER_MEASURE=0` turns that
    /// off, and `Fixed` is taken, as for matrices of more than 64 M weights. Quantised ones are `Integers`, 8-bit floats
    /// `Fp8`. Matrices that none of these suits (F16 and F32 ones, and BF16 ones whose exponents are all over the range) are
    /// `Dense`.
    #[default]
    Auto,
    /// The one that takes the least memory: the stream as it is at rest.
    Smallest,
    /// 12.05 bits a BF16 weight, decoded in registers: for matrices whose weights are all BF16 numbers.
    Fixed,
    /// 11.5 bits a BF16 weight, decoded in registers: for the same matrices as `Fixed` where few weights (some 2%) lie
    /// outside of eight neighbouring exponents. Up to a tenth slower than `Fixed` for up to 16 rows, more for more.
    Window,
    /// 10.9 to 11.3 bits a BF16 weight, exponents in an entropy code: for the same matrices as `Fixed` where a few hundred
    /// pairs of exponents are most of what occurs. Slower than `Fixed`, still faster than plain weights for few rows.
    Pair,
    /// 8.06 bits a weight, 8-bit floats as they are: for F8_E4M3 and F8_E5M2 matrices.
    Fp8,
    /// Integers of 8, 5 or 4 bits with their scales, multiplied as they are: for INT8 and rate-coded matrices.
    Integers,
    /// The stream as it is at rest: the least memory, and the slowest products, which decode all of it for each.
    Rans,
    /// Plain weights: what candle's own layers have.
    Dense,
}

impl GpuLayout {
    /// All choices.
    pub const ALL: [GpuLayout; 9] = [
        GpuLayout::Auto,
        GpuLayout::Smallest,
        GpuLayout::Fixed,
        GpuLayout::Window,
        GpuLayout::Pair,
        GpuLayout::Fp8,
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
            GpuLayout::Window => "window",
            GpuLayout::Pair => "pair",
            GpuLayout::Fp8 => "fp8",
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

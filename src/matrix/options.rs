//! What the user may choose about compressing a matrix.

use crate::codec::ScaleLayout;
use crate::codec::plan::Stage;
use crate::{Error, Result};

/// What becomes of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub enum Codec {
    /// Every bit is kept.
    #[default]
    Lossless,
    /// 8-bit integers with scales, entropy-coded.
    Int8,
    /// Quantised with one uniform step so that `bits` bits a weight come out, everything counted.
    Rate {
        /// Bits per weight, 1 to 10.
        bits: f64,
    },
}

impl Codec {
    /// Name as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Codec::Lossless => "lossless",
            Codec::Int8 => "int8",
            Codec::Rate { .. } => "rate",
        }
    }
}

/// What INT8 weights with scales are multiplied with. It has no effect on what is stored, nor on other weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Activations {
    /// Activations rounded to 8 bits in blocks of 32 columns, as ggml does for its Q8_0 weights: the fastest.
    /// [`crate::cpu::int8`] states the error: for normally distributed activations 0.5% of the result's root mean square.
    #[default]
    Int8,
    /// Activations as they are, with weights turned to `f32`s.
    Exact,
}

/// Choices for compressing a matrix, and for multiplying with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// What becomes of the weights.
    pub codec: Codec,
    /// What happens to the classes.
    pub stage: Stage,
    /// Scales of quantised weights; by default per row for INT8 and per matrix for rate coding.
    pub scale: Option<ScaleLayout>,
    /// Decode every tile again and compare it with its source.
    pub verify: bool,
    /// What INT8 weights are multiplied with, in layers made with these options.
    pub activations: Activations,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            codec: Codec::Lossless,
            stage: Stage::Rans,
            scale: None,
            verify: true,
            activations: Activations::Int8,
        }
    }
}

impl Options {
    /// Checks that the choices fit together.
    pub fn validate(&self) -> Result<()> {
        let invalid = |why: &str| Err(Error::Invalid(why.to_string()));
        match (self.codec, self.stage, self.scale) {
            (Codec::Rate { bits }, _, _) if !(1.0..=10.0).contains(&bits) => {
                invalid("bits per weight must lie between 1 and 10")
            }
            (Codec::Rate { .. }, Stage::Fixed12 | Stage::Fixed11, _) => {
                invalid("a chosen rate needs the rans stage: fixed stages have a fixed size")
            }
            (Codec::Rate { .. }, _, Some(ScaleLayout::Tile)) => {
                invalid("rate coding has one step per matrix or per row")
            }
            (Codec::Lossless, _, Some(_)) => invalid("lossless weights have no scales"),
            (_, _, Some(ScaleLayout::None | ScaleLayout::Levels)) => invalid("quantised weights need scales"),
            _ => Ok(()),
        }
    }
}

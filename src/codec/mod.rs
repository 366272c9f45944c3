//! The codec: weights to bytes and back, as pure functions over slices. No IO, no candle, no `unsafe`.
//!
//! # Read me first
//!
//! 1. **A weight is split in two.** The *high* part (a float's exponent, the high bits of an integer) is skewed and
//!    worth coding; the *raw* part (sign and mantissa, low bits) is noise and is stored as it is. See [`kind`].
//! 2. **High parts become classes.** The commonest high parts get a small number, their *class*; all others share
//!    the *escape* class and are listed, in order, behind the coded data. Nothing points at an escape: its marker
//!    in the class stream does. See [`classes`].
//! 3. **Everything is bit planes.** Classes and raw bits are packed into planes of 1, 2, 4 or 8 bits a weight. A byte
//!    of a 4-bit plane holds the classes of *two* neighbouring weights. See [`planes`].
//! 4. **A stage is what happens to the class plane**: it is stored as it is ([`Coding::Plain`]: 4-bit classes make
//!    12-bit BF16 weights, 3-bit ones about 11.2), or its bytes are rANS-coded ([`Coding::Rans`]), so that one decode
//!    step yields two weights with 4-bit classes, or one with 8-bit classes. See [`rans`].
//!
//! 5. **Exponents may be coded relative to the level of their row and column**, where that saves bits. See [`levels`].
//!
//! There is no other difference between the formats: `class_bits` and `coding` name them all.
//!
//! | `class_bits` | `coding` | called | BF16 bits/weight (Gaussian) |
//! |---|---|---|---|
//! | 4 | rANS | `rans` over pairs | 10.6 |
//! | 8 | rANS | `rans` over bytes | INT8 and rate-coded weights |
//! | 4 | plain | `fixed12` | 12.0 |
//! | 3 | plain | `fixed11` | 11.2 |
//! | 0 | plain | raw: all bits in raw planes | 16 |
//!
//! A matrix is cut into 256×256 tiles, a tile into *bands* of 64 rows. A band is one independently decodable substream.

pub mod band;
pub mod classes;
pub mod geometry;
pub mod kind;
pub mod kquant;
pub mod levels;
pub mod plan;
pub mod planes;
pub mod predictor;
pub mod quant;
pub mod rans;
pub mod table;

pub use band::{BandBytes, Scratch};
pub use classes::ClassMap;
pub use geometry::{BAND_ROWS, Geometry, Rect, TILE};
pub use kind::{Coding, Dtype, Kind, ScaleLayout};
pub use plan::Plan;
pub use predictor::Predictor;
pub use table::{DecodeTable, EncodeTable, FreqTable};

//! The compressed formats: the tile stream of one matrix, and the safetensors files that hold it.
//!
//! The README's format section is the specification; the tests decode what it describes.

pub mod checksum;
pub mod header;
pub mod stream;

pub use header::{Header, MAGIC, Record, VERSION};
pub use stream::{Checks, TileStream};

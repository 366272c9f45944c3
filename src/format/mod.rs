//! The compressed formats: the tile stream of one matrix, and the safetensors files that hold it.
//!
//! The README's format section is the specification.

pub mod checksum;
pub mod header;
pub mod manifest;
pub mod map;
pub mod safetensors;
pub mod shard;
pub mod staging;
pub mod stream;

pub use header::{Header, MAGIC, Record, VERSION};
pub use map::Map;
pub use safetensors::SafeTensors;
pub use shard::{Shard, Stored};
pub use stream::{Checks, TileStream};

//! Streams with a field changed and their checksums made right again, as an attacker would.

use candle_taper::format::header::{HASH_OFFSET, HEADER_BYTES, RECORD_BYTES, TABLE_BYTES};
use candle_taper::format::{Checks, TileStream, checksum};
use candle_taper::{CompressedMatrix, Result};

/// Where in the stream the fields lie.
pub mod at {
    pub const VERSION: usize = 4;
    pub const KIND: usize = 6;
    pub const DTYPE: usize = 7;
    pub const ROWS: usize = 8;
    pub const COLS: usize = 12;
    pub const TILE_ROWS: usize = 16;
    pub const TILE_COLS: usize = 20;
    pub const CLASS_BITS: usize = 28;
    pub const CODING: usize = 29;
    pub const RAW_BITS: usize = 30;
    pub const SCALE: usize = 31;
    pub const TOTAL: usize = 56;
    pub const TABLE: usize = 64;
}

/// Offsets in a tile record.
pub mod record {
    pub const OFFSET: usize = 0;
    pub const HASH: usize = 8;
    pub const SIZE: usize = 16;
    pub const ESCAPES: usize = 20;
    pub const PREDICTOR: usize = 24;
    pub const FLAGS: usize = 25;
    pub const BANDS: usize = 26;
}

/// A stream being damaged on purpose.
#[derive(Clone)]
pub struct Patch {
    pub bytes: Vec<u8>,
    /// Bytes that the preamble's checksum covers.
    preamble: usize,
}

impl Patch {
    /// Starts from a valid stream: its first tile lies behind the preamble.
    pub fn new(stream: &[u8]) -> Patch {
        let mut patch = Patch { bytes: stream.to_vec(), preamble: 0 };
        patch.preamble = patch.tile(0).start;
        patch
    }

    /// Where the record of tile `tile` starts.
    pub fn record(tile: usize) -> usize {
        HEADER_BYTES + TABLE_BYTES + RECORD_BYTES * tile
    }

    /// The little-endian number of `N` bytes at `at`.
    pub fn get<const N: usize>(&self, at: usize) -> u64 {
        self.bytes[at..at + N].iter().rev().fold(0, |value, &b| value << 8 | u64::from(b))
    }

    /// Overwrites bytes.
    pub fn put(mut self, at: usize, bytes: impl AsRef<[u8]>) -> Patch {
        self.bytes[at..at + bytes.as_ref().len()].copy_from_slice(bytes.as_ref());
        self
    }

    /// The bytes of tile `tile`.
    pub fn tile(&self, tile: usize) -> std::ops::Range<usize> {
        let at = Patch::record(tile);
        let start = self.get::<8>(at + record::OFFSET) as usize;
        start..start + self.get::<4>(at + record::SIZE) as usize
    }

    /// Exchanges two ranges of equal length.
    pub fn swap(mut self, a: std::ops::Range<usize>, b: std::ops::Range<usize>) -> Patch {
        let old = self.bytes.clone();
        self.bytes[a.clone()].copy_from_slice(&old[b.clone()]);
        self.bytes[b].copy_from_slice(&old[a]);
        self
    }

    /// Makes the checksum of tile `tile` right.
    pub fn seal_tile(self, tile: usize) -> Patch {
        let hash = checksum::of_tile(tile, &self.bytes[self.tile(tile)]);
        self.put(Patch::record(tile) + record::HASH, hash.to_le_bytes())
    }

    /// Makes the preamble's checksum right and returns the stream.
    pub fn seal(self) -> Vec<u8> {
        let hash = checksum::with_hole(&self.bytes[..self.preamble], HASH_OFFSET);
        self.put(HASH_OFFSET, hash.to_le_bytes()).bytes
    }
}

/// Decodes the whole stream, checksums and all.
pub fn decode(stream: &[u8]) -> Result<Vec<u8>> {
    CompressedMatrix::open(stream)?.decode()
}

/// Decodes without checksums on every backend; only bounds matter.
pub fn decode_unchecked(stream: &[u8]) {
    for backend in super::backends() {
        let Ok(parsed) = TileStream::parse_with(stream, Checks::Off) else {
            return;
        };
        let matrix = CompressedMatrix::from_stream(parsed).unwrap().with_backend(backend);
        let _ = matrix.decode();
    }
}

/// Opening or decoding must fail with a message that names the cause; without checksums nothing may panic.
#[track_caller]
pub fn refused(stream: &[u8], cause: &str) {
    let message = decode(stream).expect_err(cause).to_string();
    assert!(message.contains(cause), "{message:?} does not name {cause:?}");
    decode_unchecked(stream);
}

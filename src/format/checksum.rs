//! XXH3-64, as the format uses it.

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

/// Checksum of a byte range.
pub fn of(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// Checksum of a tile, bound to its index: a tile that was swapped with another does not match.
pub fn of_tile(index: usize, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, index as u64)
}

/// Checksum of `bytes` with the 8 bytes at `hole` read as zeros: where the checksum itself is stored.
pub fn with_hole(bytes: &[u8], hole: usize) -> u64 {
    let mut state = Xxh3::new();
    let (before, after) = bytes.split_at(hole.min(bytes.len()));
    state.update(before);
    state.update(&[0; 8][..after.len().min(8)]);
    state.update(&after[after.len().min(8)..]);
    state.digest()
}

/// What stands in a text for a checksum that covers itself.
pub const NO_HEX: &str = "0000000000000000";

/// A checksum as 16 lower-case hexadecimal digits.
pub fn to_hex(hash: u64) -> String {
    format!("{hash:016x}")
}

/// The inverse of [`to_hex`]; `None` for anything that it does not write.
pub fn from_hex(digits: &str) -> Option<u64> {
    let valid = digits.len() == 16 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    valid.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

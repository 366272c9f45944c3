//! Bounded reading of numbers and strings.

use super::MAX_NAME;
use crate::{Error, Result};

/// A place in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// At byte `at` of `bytes`.
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Reader<'a> {
        Reader { bytes, at: at.min(bytes.len()) }
    }

    /// Bytes before this place.
    pub(super) fn at(&self) -> u64 {
        self.at as u64
    }

    /// Bytes behind it.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next `count` bytes.
    pub(super) fn take(&mut self, count: u64, what: &'static str) -> Result<&'a [u8]> {
        let have = self.bytes.len() as u64;
        let end = self.at().saturating_add(count);
        if end > have {
            return Err(Error::Truncated { what, need: end, have });
        }
        let taken = &self.bytes[self.at..end as usize];
        self.at = end as usize;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8> {
        Ok(self.array::<1>(what)?[0])
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A string's bytes.
    pub(super) fn string(&mut self) -> Result<&'a [u8]> {
        let (at, length) = (self.at, self.u64("a string's length")?);
        if length > self.left() {
            let allowed = format!("at most the {} bytes that follow", self.left());
            return Err(Error::field("string length", format!("{length} at byte {at}"), allowed));
        }
        self.take(length, "a string")
    }

    /// A key or a tensor's name.
    pub(super) fn name(&mut self) -> Result<&'a str> {
        let at = self.at;
        let bytes = self.string()?;
        if bytes.len() as u64 > MAX_NAME {
            let got = format!("{} bytes at byte {at}", bytes.len());
            return Err(Error::field("name", got, format!("at most {MAX_NAME}")));
        }
        std::str::from_utf8(bytes).map_err(|_| Error::field("name", format!("{bytes:.20?} at byte {at}"), "UTF-8"))
    }
}

/// A name for a message: not longer than a line.
pub(super) fn shown(name: &str) -> String {
    if name.chars().count() > 80 { format!("{:.80}…", name) } else { name.to_string() }
}

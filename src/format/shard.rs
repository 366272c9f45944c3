//! A compressed safetensors file: what its metadata says, and the checksums that cover every byte of it.
//!
//! | metadata key | value |
//! |---|---|
//! | `taper.version` | `1` |
//! | `taper.header` | XXH3 of the header's bytes, its own 16 hexadecimal digits read as zeros |
//! | `taper.tensors` | for each tensor in the order of offsets 16 digits: XXH3 of its bytes, or of its stream's preamble |
//! | `taper.source` | the header of the original file, byte for byte |
//!
//! A tensor whose dtype is `U8` here and another in `taper.source` is a tile stream. All others are as they were.

use std::fmt::Write as _;

use super::checksum::{self, NO_HEX};
use super::safetensors::{SafeTensors, TensorEntry};
use super::stream::{Checks, TileStream};
use crate::codec::Dtype;
use crate::{Error, Result};

/// The version in `taper.version`.
pub const SHARD_VERSION: &str = "1";
const VERSION_KEY: &str = "taper.version";
const HEADER_KEY: &str = "taper.header";
const TENSORS_KEY: &str = "taper.tensors";
const SOURCE_KEY: &str = "taper.source";

/// True if a file's metadata announces compressed tensors (of whatever version).
pub fn is_compressed(header: &SafeTensors) -> bool {
    header.metadata(VERSION_KEY).is_some()
}

/// The parsed header of a compressed file, its own checksum compared.
#[derive(Debug)]
pub struct Shard<'a> {
    file: &'a [u8],
    header: SafeTensors<'a>,
    hash: u64,
    hashes: Vec<u64>,
    checks: Checks,
}

/// A tensor of a compressed file.
#[derive(Clone, Debug)]
pub enum Stored<'a> {
    /// Its bytes as they were.
    Plain(&'a [u8]),
    /// A tile stream.
    Compressed(Box<TileStream<'a>>),
}

impl<'a> Shard<'a> {
    /// Parses the header of a compressed file. Reads nothing but the header.
    pub fn parse(file: &'a [u8]) -> Result<Shard<'a>> {
        Self::parse_with(file, Checks::On)
    }

    /// As [`Shard::parse`], with a choice about checksums.
    pub fn parse_with(file: &'a [u8], checks: Checks) -> Result<Shard<'a>> {
        let header = SafeTensors::parse(file)?;
        match header.metadata(VERSION_KEY) {
            None => return Err(Error::Unsupported("not compressed by taper".into())),
            Some(SHARD_VERSION) => {}
            Some(other) => {
                return Err(Error::version("the compressed file", other, SHARD_VERSION));
            }
        }
        let digits = header.metadata(HEADER_KEY).unwrap_or_default();
        let hash = checksum::from_hex(digits).ok_or_else(|| missing(HEADER_KEY))?;
        let computed = header_hash(header.text, digits);
        if checks == Checks::On && computed != hash {
            return Err(Error::Checksum { what: "the safetensors header", stored: hash, computed });
        }
        let all = header.metadata(TENSORS_KEY).unwrap_or_default().as_bytes();
        let hashes: Option<Vec<u64>> =
            all.chunks(16).map(|digits| std::str::from_utf8(digits).ok().and_then(checksum::from_hex)).collect();
        let hashes = hashes.filter(|hashes| hashes.len() == header.len()).ok_or_else(|| missing(TENSORS_KEY))?;
        Ok(Shard { file, header, hash, hashes, checks })
    }

    /// XXH3 of the header, which covers the checksums of all tensors: a fingerprint of the file.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The header as it is.
    pub fn header(&self) -> &SafeTensors<'a> {
        &self.header
    }

    /// The header of the original file, parsed from this file's metadata, with its text.
    pub fn source(&self) -> Result<SafeTensors<'_>> {
        let text = self.header.metadata(SOURCE_KEY).ok_or_else(|| missing(SOURCE_KEY))?;
        let source = SafeTensors::parse_header(text.as_bytes())?;
        let same =
            source.len() == self.header.len() && source.iter().zip(self.header.iter()).all(|(a, b)| a.name == b.name);
        if same { Ok(source) } else { Err(Error::Malformed(format!("the tensors in {SOURCE_KEY} are not those here"))) }
    }

    /// Where tensor `index` (in the order of offsets) lies and what it must be; `source` is its entry in the original
    /// header. Touches no tensor.
    pub fn place(&self, index: usize, source: &TensorEntry) -> Result<Place> {
        let (Some(entry), Some(&hash)) = (self.header.get(index), self.hashes.get(index)) else {
            return Err(Error::Invalid(format!("no tensor {index}")));
        };
        let start = self.header.data_start + entry.start as usize;
        let compressed = entry.dtype != source.dtype;
        let fits = match compressed {
            true => entry.dtype == "U8" && Dtype::from_name(source.dtype).is_some(),
            false => entry.shape == source.shape,
        };
        if !fits {
            let (now, then) = ((entry.dtype, entry.shape), (source.dtype, source.shape));
            return Err(Error::field("tensor", format!("{now:?}"), format!("{then:?}, or a tile stream of it"))
                .in_tensor(entry.name));
        }
        Ok(Place { start, end: start + entry.bytes() as usize, compressed, hash: Some(hash) })
    }

    /// Tensor `index` in the order of offsets; `source` is its entry in the original header.
    ///
    /// The checksum of a plain tensor is compared here, that of a stream's preamble too; its tiles are not touched.
    pub fn tensor(&self, index: usize, source: &TensorEntry) -> Result<Stored<'a>> {
        self.place(index, source)?
            .open(self.file, source.dtype, source.shape, self.checks)
            .map_err(|e| e.in_tensor(source.name))
    }
}

/// Where a tensor lies in its file, and what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First byte, from the start of the file.
    pub start: usize,
    /// Past the last byte.
    pub end: usize,
    /// True if it is a tile stream.
    pub compressed: bool,
    /// Its checksum, or that of its stream's preamble, if the file has one.
    pub hash: Option<u64>,
}

impl Place {
    /// Opens the tensor in its file's bytes; `dtype` and `shape` are its own.
    pub fn open<'a>(&self, file: &'a [u8], dtype: &str, shape: &[u64], checks: Checks) -> Result<Stored<'a>> {
        let have = file.len() as u64;
        let bytes = file.get(self.start..self.end);
        let bytes = bytes.ok_or(Error::Truncated { what: "the tensor", need: self.end as u64, have })?;
        if !self.compressed {
            let computed = if checks == Checks::On && self.hash.is_some() { Some(checksum::of(bytes)) } else { None };
            return match (self.hash, computed) {
                (Some(stored), Some(computed)) if stored != computed => {
                    Err(Error::Checksum { what: "the tensor", stored, computed })
                }
                _ => Ok(Stored::Plain(bytes)),
            };
        }
        let stream = TileStream::parse_with(bytes, checks)?;
        if let (Checks::On, Some(stored)) = (checks, self.hash)
            && stream.hash() != stored
        {
            let computed = stream.hash();
            return Err(Error::Checksum { what: "the list of tensors (another tensor's data?)", stored, computed });
        }
        let (rows, cols) = matrix_shape(shape).unwrap_or((0, 0));
        let (geometry, own) = (stream.geometry(), stream.plan().dtype.name());
        if (geometry.rows as u64, geometry.cols as u64, own) != (rows, cols, dtype) {
            let got = format!("{}x{} of {own}", geometry.rows, geometry.cols);
            return Err(Error::field("shape", got, format!("{rows}x{cols} of {dtype}")));
        }
        Ok(Stored::Compressed(Box::new(stream)))
    }
}

/// The matrix that a tensor of two or more dimensions is coded as: the last one is its columns.
pub fn matrix_shape(shape: &[u64]) -> Option<(u64, u64)> {
    let (cols, rows) = shape.split_last()?;
    let rows = rows.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim))?;
    (shape.len() >= 2 && rows > 0 && *cols > 0).then_some((rows, *cols))
}

fn missing(key: &str) -> Error {
    Error::Malformed(format!("the safetensors metadata has no valid {key}"))
}

/// XXH3 of a header in which `digits` (as they stand in its `taper.header`) are read as zeros.
fn header_hash(text: &str, digits: &str) -> u64 {
    let field = format!("\"{HEADER_KEY}\":\"{digits}\"");
    checksum::of(text.replacen(&field, &format!("\"{HEADER_KEY}\":\"{NO_HEX}\""), 1).as_bytes())
}

/// What the writer knows of a tensor when its shard is complete.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its name.
    pub name: String,
    /// Its dtype now: `U8` for a stream.
    pub dtype: String,
    /// Its shape now.
    pub shape: Vec<u64>,
    /// Its bytes now.
    pub bytes: u64,
    /// XXH3 of its bytes, or of its stream's preamble.
    pub hash: u64,
}

/// The JSON of a compressed file's header, with zeros for its own checksum.
fn header_json(source: &SafeTensors, tensors: &[Written]) -> String {
    let quote = |text: &str| serde_json::Value::from(text).to_string();
    let mut text = format!("{{\"__metadata__\":{{\"{VERSION_KEY}\":\"{SHARD_VERSION}\",\"{HEADER_KEY}\":\"{NO_HEX}\"");
    let hashes: String = tensors.iter().map(|t| checksum::to_hex(t.hash)).collect();
    let _ = write!(text, ",\"{TENSORS_KEY}\":\"{hashes}\",\"{SOURCE_KEY}\":{}", quote(source.text));
    for (key, value) in source.metadata.iter().filter(|(key, _)| !key.starts_with("taper.")) {
        let _ = write!(text, ",{}:{}", quote(key), quote(value));
    }
    text.push('}');
    let mut offset = 0;
    for Written { name, dtype, shape, bytes, .. } in tensors {
        let (name, dtype, end) = (quote(name), quote(dtype), offset + bytes);
        let _ = write!(text, ",{name}:{{\"dtype\":{dtype},\"shape\":{shape:?},\"data_offsets\":[{offset},{end}]}}");
        offset = end;
    }
    text.push('}');
    text
}

/// The header of a compressed file with its checksum, padded with spaces to `room` bytes.
///
/// # Errors
/// If it does not fit.
pub fn header_text(source: &SafeTensors, tensors: &[Written], room: usize) -> Result<String> {
    let mut text = header_json(source, tensors);
    if text.len() > room {
        return Err(Error::Malformed(format!("a header of {} bytes in a place of {room}", text.len())));
    }
    text.push_str(&" ".repeat(room - text.len()));
    let hash = checksum::of(text.as_bytes());
    let field = |digits: &str| format!("\"{HEADER_KEY}\":\"{digits}\"");
    Ok(text.replacen(&field(NO_HEX), &field(&checksum::to_hex(hash)), 1))
}

/// Room for the header of a compressed file, however its tensors shrink. With the 8 bytes before it a multiple of 64.
pub fn header_room(source: &SafeTensors) -> usize {
    // A stream is never larger than the tensor was, so no offset gets longer. Its shape becomes one number.
    let longest = |entry: TensorEntry| Written {
        name: entry.name.to_string(),
        dtype: entry.dtype.to_string(),
        shape: entry.shape.iter().copied().chain([entry.bytes()]).collect(),
        bytes: entry.bytes(),
        hash: 0,
    };
    let tensors: Vec<Written> = source.iter().map(longest).collect();
    (header_json(source, &tensors).len() + 8).next_multiple_of(64) - 8
}

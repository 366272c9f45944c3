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
    Compressed(TileStream<'a>),
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
                return Err(Error::Unsupported(format!(
                    "compressed with format version {other}, this build reads version {SHARD_VERSION}: update candle-taper"
                )));
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

    /// Bytes of tensor `index`, unchecked.
    fn bytes(&self, entry: &TensorEntry) -> &'a [u8] {
        let start = self.header.data_start + entry.start as usize;
        self.file.get(start..start + entry.bytes() as usize).unwrap_or(&[])
    }

    /// Tensor `index` in the order of offsets; `source` is its entry in the original header.
    ///
    /// The checksum of a plain tensor is compared here, that of a stream's preamble too; its tiles are not touched.
    pub fn tensor(&self, index: usize, source: &TensorEntry) -> Result<Stored<'a>> {
        let open = |entry: &TensorEntry| {
            let (bytes, stored) = (self.bytes(entry), self.hashes[index]);
            if entry.dtype == source.dtype {
                if entry.shape != source.shape {
                    return Err(Error::field("shape", format!("{:?}", entry.shape), format!("{:?}", source.shape)));
                }
                let computed = checksum::of(bytes);
                if self.checks == Checks::On && computed != stored {
                    return Err(Error::Checksum { what: "the tensor", stored, computed });
                }
                return Ok(Stored::Plain(bytes));
            }
            if entry.dtype != "U8" || Dtype::from_name(source.dtype).is_none() {
                return Err(Error::Unsupported(format!("stored as {}, originally {}", entry.dtype, source.dtype)));
            }
            let stream = TileStream::parse_with(bytes, self.checks)?;
            if self.checks == Checks::On && stream.hash() != stored {
                let computed = stream.hash();
                return Err(Error::Checksum { what: "the list of tensors (another tensor's data?)", stored, computed });
            }
            let (rows, cols) = matrix_shape(source.shape).unwrap_or((0, 0));
            let geometry = stream.geometry();
            let plan = stream.plan();
            if (geometry.rows as u64, geometry.cols as u64, plan.dtype.name()) != (rows, cols, source.dtype) {
                let got = format!("{}x{} of {}", geometry.rows, geometry.cols, plan.dtype.name());
                return Err(Error::field("shape", got, format!("{rows}x{cols} of {}", source.dtype)));
            }
            Ok(Stored::Compressed(stream))
        };
        let entry = self.header.get(index).ok_or_else(|| Error::Invalid(format!("no tensor {index}")))?;
        open(&entry).map_err(|e| e.in_tensor(entry.name))
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

//! GGUF files, versions 2 and 3: read in place, every claim checked before it is used.
//!
//! | part | bytes |
//! |---|---|
//! | header | `GGUF`, `u32` version, `u64` tensors, `u64` metadata entries |
//! | metadata entry | string key, `u32` type, value; a string is a `u64` length and that many bytes of UTF-8 |
//! | tensor entry | string name, `u32` dimensions, a `u64` for each (the row length first), `u32` type, `u64` offset |
//! | data | from the next multiple of `general.alignment` (32 if absent); offsets count from there |
//!
//! All numbers are little-endian. The specification is ggml's `docs/gguf.md`. [`Gguf::new`] walks the whole header once;
//! what it accepts can be read without further errors. It keeps 12 bytes for each metadata entry and 16 for each tensor,
//! less than they take in the file, so no file costs more memory than it is long.

mod read;
mod value;

use std::fmt;
use std::ops::Range;
use std::path::Path;

use crate::codec::kquant::GgmlType;
use crate::format::Map;
use crate::{Error, Result};

use read::{Reader, shown};
pub use value::{Array, Value, ValueType};

/// The versions that are read.
pub const VERSIONS: [u32; 2] = [2, 3];
/// Longest key or name, as in the specification.
pub const MAX_NAME: u64 = 65_535;
/// Most dimensions of a tensor.
pub const MAX_RANK: u32 = 4;
/// Deepest nesting of arrays.
pub const MAX_DEPTH: u32 = 4;
/// Multiple at which data lies unless the file says otherwise.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// No metadata entry is shorter: an empty key, a type and a byte.
const MIN_ENTRY: u64 = 8 + 4 + 1;
/// No tensor entry is shorter: an empty name and one dimension.
const MIN_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;

/// A validated GGUF file over its bytes: `&[u8]`, `Vec<u8>` or a memory map ([`Gguf::open`]).
pub struct Gguf<B> {
    bytes: B,
    version: u32,
    /// Offsets of metadata entries, and their order by key.
    entries: Vec<u64>,
    entries_by_key: Vec<u32>,
    /// Offsets of tensor entries, and their order by name.
    tensors: Vec<u64>,
    tensors_by_name: Vec<u32>,
    alignment: u64,
    data_start: u64,
}

/// One tensor of a file.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// How its weights are stored.
    pub ty: GgmlType,
    rank: u32,
    dims: [u64; MAX_RANK as usize],
    start: u64,
    end: u64,
    data: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// Its shape, rows before columns as in candle: the reverse of the order in the file.
    pub fn shape(&self) -> Vec<usize> {
        self.dims[..self.rank as usize].iter().rev().map(|&dim| dim as usize).collect()
    }

    /// Weights of a row: the last dimension of its shape.
    pub fn cols(&self) -> usize {
        self.dims[0] as usize
    }

    /// All rows of all dimensions.
    pub fn rows(&self) -> usize {
        self.dims[1..self.rank as usize].iter().product::<u64>() as usize
    }

    /// Its blocks, row by row.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Where its data lies in the file.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }
}

impl Gguf<Map> {
    /// Maps and validates the file at `path`.
    ///
    /// # Errors
    /// If it cannot be mapped; and as [`Gguf::new`], with the path.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf<Map>> {
        let path = path.as_ref();
        Gguf::new(Map::open(path)?).map_err(|error| error.in_file(path))
    }

    /// The map.
    pub fn map(&self) -> &Map {
        &self.bytes
    }
}

impl<B: AsRef<[u8]>> Gguf<B> {
    /// Validates a whole file. `bytes.as_ref()` must always give the same bytes.
    ///
    /// # Errors
    /// If it is no GGUF file of a version and byte order that is read, is truncated, contradicts itself, or has a tensor
    /// of a type that is not supported. The error names the key, the tensor or the offset.
    pub fn new(bytes: B) -> Result<Gguf<B>> {
        let mut reader = Reader::new(bytes.as_ref(), 0);
        if reader.take(4, "the magic")? != b"GGUF" {
            return Err(Error::field("magic", format!("{:?}", &bytes.as_ref()[..4]), "the letters GGUF"));
        }
        let version = reader.u32("the version")?;
        if version.swap_bytes() <= 3 && version > 3 {
            return Err(Error::Unsupported("a big-endian GGUF file; only little-endian ones are read".into()));
        }
        if !VERSIONS.contains(&version) {
            return Err(Error::Unsupported(format!(
                "GGUF version {version}; versions 2 and 3 are read: convert the file again with a current llama.cpp"
            )));
        }
        let (tensor_count, entry_count) = (reader.u64("the number of tensors")?, reader.u64("the number of entries")?);
        let need = entry_count.saturating_mul(MIN_ENTRY).saturating_add(tensor_count.saturating_mul(MIN_TENSOR));
        let counts = entry_count.max(tensor_count) <= u64::from(u32::MAX);
        if need > reader.left() || !counts {
            let got = format!("{entry_count} metadata entries and {tensor_count} tensors");
            return Err(Error::field("header", got, format!("what fits into the {} bytes behind it", reader.left())));
        }
        let mut file = Gguf {
            version,
            entries: Vec::with_capacity(entry_count as usize),
            entries_by_key: Vec::new(),
            tensors: Vec::with_capacity(tensor_count as usize),
            tensors_by_name: Vec::new(),
            alignment: DEFAULT_ALIGNMENT,
            data_start: 0,
            bytes,
        };
        file.read_entries(entry_count)?;
        file.read_tensors(tensor_count)?;
        Ok(file)
    }

    /// Walks the metadata.
    fn read_entries(&mut self, count: u64) -> Result<()> {
        let bytes = self.bytes.as_ref();
        let mut reader = Reader::new(bytes, 24);
        for index in 0..count {
            self.entries.push(reader.at());
            let key = reader.name().map_err(|e| e.in_entry(&format!("metadata entry {index}")))?;
            value::skip(&mut reader).map_err(|e| e.in_entry(&format!("key {}", shown(key))))?;
        }
        self.data_start = reader.at();
        let key = |&i: &u32| name_at(bytes, self.entries[i as usize]);
        self.entries_by_key = sorted(count, key);
        if let Some(twice) = duplicate(&self.entries_by_key, key) {
            return Err(Error::Malformed(format!("the key {} occurs twice", shown(twice))));
        }
        if let Some(value) = self.get("general.alignment") {
            let alignment = value.to_u64().filter(|a| a.is_power_of_two());
            let Some(alignment) = alignment else {
                return Err(Error::field("general.alignment", value, "a power of two"));
            };
            self.alignment = alignment;
        }
        Ok(())
    }

    /// Walks the tensors' entries, then checks where their data lies.
    fn read_tensors(&mut self, count: u64) -> Result<()> {
        let bytes = self.bytes.as_ref();
        let mut reader = Reader::new(bytes, self.data_start as usize);
        for index in 0..count {
            self.tensors.push(reader.at());
            let name = reader.name().map_err(|e| e.in_entry(&format!("tensor entry {index}")))?;
            tensor_entry(&mut reader).map_err(|e| e.in_tensor(&shown(name)))?;
        }
        let name = |&i: &u32| name_at(bytes, self.tensors[i as usize]);
        self.tensors_by_name = sorted(count, name);
        if let Some(twice) = duplicate(&self.tensors_by_name, name) {
            return Err(Error::Malformed(format!("the tensor {} occurs twice", shown(twice))));
        }
        let aligned = reader.at().checked_next_multiple_of(self.alignment);
        let Some(data_start) = aligned.filter(|&start| count == 0 || start <= bytes.len() as u64) else {
            let (need, have) = (aligned.unwrap_or(u64::MAX), bytes.len() as u64);
            return Err(Error::Truncated { what: "the start of the tensors' data", need, have });
        };
        self.data_start = data_start;
        let mut by_offset = (0..count as u32).collect::<Vec<u32>>();
        by_offset.sort_unstable_by_key(|&i| self.range(i).0);
        let mut end = data_start;
        let mut before = None;
        for &index in &by_offset {
            let (start, past, name) = self.range(index);
            let check = || {
                let (Some(start), Some(past)) = (start, past) else {
                    return Err(Error::field("data offset", "beyond 2^64", "an offset in the file"));
                };
                let offset = start - data_start;
                if !offset.is_multiple_of(self.alignment) {
                    return Err(Error::field("data offset", offset, format!("a multiple of {}", self.alignment)));
                }
                if past > bytes.len() as u64 {
                    return Err(Error::Truncated { what: "its data", need: past, have: bytes.len() as u64 });
                }
                if start < end {
                    let other = before.map(shown).unwrap_or_default();
                    return Err(Error::field("data offset", offset, format!("no byte of tensor {other}")));
                }
                Ok(past)
            };
            end = check().map_err(|e| e.in_tensor(&shown(name)))?;
            before = Some(name);
        }
        Ok(())
    }

    /// Where the data of tensor `index` starts and ends, with its name; `None` for what does not fit into 64 bits.
    fn range(&self, index: u32) -> (Option<u64>, Option<u64>, &str) {
        let mut reader = Reader::new(self.bytes.as_ref(), self.tensors[index as usize] as usize);
        let name = reader.name().unwrap_or_default();
        let Ok(entry) = tensor_entry(&mut reader) else { return (None, None, name) };
        let start = self.data_start.checked_add(entry.offset);
        (start, start.and_then(|start| start.checked_add(entry.bytes)), name)
    }

    /// The version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Multiple at which every tensor's data lies.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> usize {
        self.bytes.as_ref().len()
    }

    /// All metadata in the file's order.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.entries.iter().map(|&at| entry(self.bytes.as_ref(), at))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        let bytes = self.bytes.as_ref();
        let found =
            self.entries_by_key.binary_search_by(|&i| name_at(bytes, self.entries[i as usize]).cmp(key)).ok()?;
        Some(entry(bytes, self.entries[self.entries_by_key[found] as usize]).1)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// True if there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// All tensors in the file's order.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.tensors.iter().map(|&at| self.open_tensor(at))
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let bytes = self.bytes.as_ref();
        let found =
            self.tensors_by_name.binary_search_by(|&i| name_at(bytes, self.tensors[i as usize]).cmp(name)).ok()?;
        Some(self.open_tensor(self.tensors[self.tensors_by_name[found] as usize]))
    }

    /// The tensor whose entry is at `at`, validated before.
    fn open_tensor(&self, at: u64) -> Tensor<'_> {
        let bytes = self.bytes.as_ref();
        let mut reader = Reader::new(bytes, at as usize);
        let name = reader.name().unwrap_or_default();
        let entry = tensor_entry(&mut reader).unwrap_or_default();
        let start = self.data_start.saturating_add(entry.offset);
        let end = start.saturating_add(entry.bytes);
        let data = bytes.get(start as usize..end as usize).unwrap_or(&[]);
        Tensor { name, ty: entry.ty, rank: entry.rank, dims: entry.dims, start, end, data }
    }
}

impl<B: AsRef<[u8]>> fmt::Debug for Gguf<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gguf(version {}, {} entries, {} tensors)", self.version, self.entries.len(), self.tensors.len())
    }
}

/// What an entry says about its tensor, checked on its own.
struct TensorEntry {
    ty: GgmlType,
    rank: u32,
    dims: [u64; MAX_RANK as usize],
    offset: u64,
    bytes: u64,
}

impl Default for TensorEntry {
    fn default() -> Self {
        TensorEntry { ty: GgmlType::F32, rank: 0, dims: [0; MAX_RANK as usize], offset: 0, bytes: 0 }
    }
}

/// Reads what follows a tensor's name.
fn tensor_entry(reader: &mut Reader) -> Result<TensorEntry> {
    let rank = reader.u32("the number of dimensions")?;
    if rank == 0 || rank > MAX_RANK {
        return Err(Error::field("number of dimensions", rank, format!("1 to {MAX_RANK}")));
    }
    let mut dims = [1; MAX_RANK as usize];
    for dim in &mut dims[..rank as usize] {
        *dim = reader.u64("a dimension")?;
        if *dim == 0 {
            return Err(Error::field("dimension", 0, "at least 1"));
        }
    }
    let ty = GgmlType::from_id(reader.u32("the type")?)?;
    let offset = reader.u64("the data offset")?;
    let shape = || format!("{:?}", dims[..rank as usize].iter().rev().collect::<Vec<_>>());
    if !dims[0].is_multiple_of(ty.block_len() as u64) {
        let allowed = format!("rows of whole {ty} blocks: a multiple of {} last", ty.block_len());
        return Err(Error::field("shape", shape(), allowed));
    }
    let elements = dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
    let bytes = elements.and_then(|n| (n / ty.block_len() as u64).checked_mul(ty.block_bytes() as u64));
    let Some(bytes) = bytes.filter(|&bytes| bytes <= isize::MAX as u64) else {
        return Err(Error::field("shape", shape(), "one of fewer than 2^63 bytes"));
    };
    Ok(TensorEntry { ty, rank, dims, offset, bytes })
}

/// The name that an entry at `at`, validated before, begins with.
fn name_at(bytes: &[u8], at: u64) -> &str {
    Reader::new(bytes, at as usize).name().unwrap_or_default()
}

/// The metadata entry at `at`, validated before.
fn entry(bytes: &[u8], at: u64) -> (&str, Value<'_>) {
    let mut reader = Reader::new(bytes, at as usize);
    let key = reader.name().unwrap_or_default();
    (key, value::read(&mut reader).unwrap_or(Value::Bool(false)))
}

/// `0..count` in the order of their names.
fn sorted<'a>(count: u64, name: impl Fn(&u32) -> &'a str) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    order.sort_unstable_by(|a, b| name(a).cmp(name(b)));
    order
}

/// A name that occurs twice in a sorted order.
fn duplicate<'a>(order: &[u32], name: impl Fn(&u32) -> &'a str) -> Option<&'a str> {
    order.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])).map(|pair| name(&pair[0]))
}

impl Error {
    /// Wraps the error with the part of a header that it occurred in.
    fn in_entry(self, part: &str) -> Error {
        match self {
            // These carry their text only.
            Error::Unsupported(text) => Error::Unsupported(format!("{part}: {text}")),
            other => Error::Malformed(format!("{part}: {other}")),
        }
    }
}

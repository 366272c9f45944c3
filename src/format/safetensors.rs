//! The safetensors container: headers read with every claim checked, and written.
//!
//! The `safetensors` crate accepts duplicate names and lets a crafted header cost 13 times its size in memory; this
//! reader borrows from the header, refuses both, and agrees with the crate on every other file (tested).

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::{Error, Result};

/// Longest header that is read, as in the `safetensors` crate.
pub const MAX_HEADER: u64 = 100_000_000;
/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 8;
/// No tensor's entry is shorter than this, so a header of `n` bytes has at most `n / 50` of them.
const MIN_ENTRY: usize = 50;

/// A parsed header: tensors in the order of their offsets, which cover the data without holes or overlaps.
#[derive(Debug)]
pub struct SafeTensors<'a> {
    /// The header's JSON text as it is in the file, padding included.
    pub text: &'a str,
    /// Bytes before the tensors' data: the length field and the header.
    pub data_start: usize,
    /// `__metadata__`.
    pub metadata: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    entries: Vec<Entry<'a>>,
    dims: Vec<u64>,
    /// Entries by name.
    by_name: Vec<u32>,
}

#[derive(Debug)]
struct Entry<'a> {
    name: Cow<'a, str>,
    dtype: Cow<'a, str>,
    start: u64,
    end: u64,
    first_dim: u32,
    rank: u8,
}

/// One tensor of a header.
#[derive(Clone, Copy, Debug)]
pub struct TensorEntry<'s> {
    /// Its name.
    pub name: &'s str,
    /// Its dtype, as the header spells it.
    pub dtype: &'s str,
    /// Its shape.
    pub shape: &'s [u64],
    /// First byte of its data, from the start of the data section.
    pub start: u64,
    /// Past its last byte.
    pub end: u64,
}

impl TensorEntry<'_> {
    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

impl<'a> SafeTensors<'a> {
    /// Parses and validates the header of a whole file.
    pub fn parse(file: &'a [u8]) -> Result<SafeTensors<'a>> {
        let have = file.len() as u64;
        let Some(length) = file.first_chunk::<8>() else {
            return Err(Error::Truncated { what: "the header's length", need: 8, have });
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER {
            return Err(Error::field(
                "header length",
                length,
                format!("at most {MAX_HEADER}: not a safetensors file?"),
            ));
        }
        let data_start = 8 + length as usize;
        let Some(header) = file.get(8..data_start) else {
            return Err(Error::Truncated { what: "the header", need: data_start as u64, have });
        };
        let header = Self::parse_header(header)?;
        let (need, data) = (header.data_bytes(), have - data_start as u64);
        if need > data {
            return Err(Error::Truncated { what: "the tensors' data", need: need + data_start as u64, have });
        }
        if need < data {
            return Err(Error::Malformed(format!("{} bytes behind the last tensor", data - need)));
        }
        Ok(header)
    }

    /// Parses and validates the JSON of a header, without the file around it.
    pub fn parse_header(header: &'a [u8]) -> Result<SafeTensors<'a>> {
        let malformed = |what: &dyn fmt::Display| Error::Malformed(format!("the safetensors header: {what}"));
        let text = std::str::from_utf8(header).map_err(|e| malformed(&e))?;
        // One allocation of just the size needed; the word may also occur elsewhere, which the division bounds.
        let count = text.matches("\"data_offsets\"").count().min(header.len() / MIN_ENTRY);
        let mut parsed = SafeTensors {
            text,
            data_start: 8 + header.len(),
            metadata: Vec::new(),
            entries: Vec::with_capacity(count),
            dims: Vec::new(),
            by_name: Vec::new(),
        };
        let mut json = serde_json::Deserializer::from_slice(header);
        json.deserialize_map(HeaderVisitor(&mut parsed)).and_then(|()| json.end()).map_err(|e| malformed(&e))?;
        parsed.validate()?;
        Ok(parsed)
    }

    /// Offsets must cover the data without holes or overlaps, sizes must fit shapes, names must be unique.
    fn validate(&mut self) -> Result<()> {
        self.entries.sort_unstable_by(|a, b| (a.start, a.end, &a.name).cmp(&(b.start, b.end, &b.name)));
        let mut end = 0;
        for entry in self.iter() {
            let check = || {
                if entry.start != end || entry.end < entry.start {
                    let got = format!("{}..{}", entry.start, entry.end);
                    return Err(Error::field("data offsets", got, format!("{end}.., where the last tensor ends")));
                }
                let elements = entry.shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
                let Some(bits) = dtype_bits(entry.dtype) else { return Ok(()) };
                let bytes = elements.and_then(|n| n.checked_mul(bits)).filter(|b| b % 8 == 0).map(|b| b / 8);
                if bytes != Some(entry.bytes()) {
                    let shape = format!("{:?} of {}", entry.shape, entry.dtype);
                    return Err(Error::field("shape", shape, format!("a shape of {} bytes", entry.bytes())));
                }
                Ok(())
            };
            check().map_err(|e| e.in_tensor(entry.name))?;
            end = entry.end;
        }
        self.by_name = (0..self.entries.len() as u32).collect();
        self.by_name.sort_unstable_by(|&a, &b| self.entries[a as usize].name.cmp(&self.entries[b as usize].name));
        let name = |i: &u32| &self.entries[*i as usize].name;
        match self.by_name.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])) {
            Some(pair) => Err(Error::Malformed(format!("the name {:?} occurs twice", name(&pair[0])))),
            None => Ok(()),
        }
    }

    /// Bytes of all tensors.
    pub fn data_bytes(&self) -> u64 {
        self.entries.last().map_or(0, |e| e.end)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Tensor `index` in the order of offsets.
    pub fn get(&self, index: usize) -> Option<TensorEntry<'_>> {
        let entry = self.entries.get(index)?;
        let first = entry.first_dim as usize;
        Some(TensorEntry {
            name: &entry.name,
            dtype: &entry.dtype,
            shape: self.dims.get(first..first + usize::from(entry.rank)).unwrap_or(&[]),
            start: entry.start,
            end: entry.end,
        })
    }

    /// All tensors in the order of their offsets.
    pub fn iter(&self) -> impl Iterator<Item = TensorEntry<'_>> {
        (0..self.entries.len()).filter_map(|i| self.get(i))
    }

    /// The index of the tensor of that name.
    pub fn find(&self, name: &str) -> Option<usize> {
        let found = self.by_name.binary_search_by(|&i| (*self.entries[i as usize].name).cmp(name)).ok()?;
        Some(self.by_name[found] as usize)
    }

    /// A value of `__metadata__`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| &**v)
    }
}

/// Bits of one element; `None` for dtypes that this crate does not know, whose shapes are not checked.
pub fn dtype_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "C64" | "I64" | "U64" | "F64" => 64,
        _ => return None,
    })
}

/// A string that borrows from the JSON where it has no escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, v: &'de str) -> std::result::Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(v)))
            }
            fn visit_str<E>(self, v: &str) -> std::result::Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(v.to_owned())))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

/// The header object: `__metadata__` and tensors.
struct HeaderVisitor<'h, 'a>(&'h mut SafeTensors<'a>);

impl<'a> Visitor<'a> for HeaderVisitor<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> std::result::Result<(), M::Error> {
        let mut seen_metadata = false;
        while let Some(Text(name)) = map.next_key::<Text>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut seen_metadata, true) {
                    return Err(serde::de::Error::custom("__metadata__ occurs twice"));
                }
                map.next_value_seed(MetadataSeed(&mut self.0.metadata))?;
            } else {
                map.next_value_seed(EntrySeed { name, entries: &mut self.0.entries, dims: &mut self.0.dims })?;
            }
        }
        Ok(())
    }
}

struct MetadataSeed<'h, 'a>(&'h mut Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'a> serde::de::DeserializeSeed<'a> for MetadataSeed<'_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for MetadataSeed<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> std::result::Result<(), M::Error> {
        while let Some((Text(key), Text(value))) = map.next_entry()? {
            // A pair costs 48 bytes here and at least 6 in the JSON: thousands of them are an attack, not metadata.
            if self.0.len() == 4096 {
                return Err(serde::de::Error::custom("more than 4096 metadata entries"));
            }
            self.0.push((key, value));
        }
        Ok(())
    }
}

struct EntrySeed<'h, 'a> {
    name: Cow<'a, str>,
    entries: &'h mut Vec<Entry<'a>>,
    dims: &'h mut Vec<u64>,
}

impl<'a> serde::de::DeserializeSeed<'a> for EntrySeed<'_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for EntrySeed<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> std::result::Result<(), M::Error> {
        use serde::de::Error as _;
        let first_dim = self.dims.len();
        let (mut dtype, mut offsets, mut rank) = (None, None, None);
        while let Some(Text(key)) = map.next_key::<Text>()? {
            match &*key {
                "dtype" => dtype = Some(map.next_value::<Text>()?.0),
                "data_offsets" => offsets = Some(map.next_value::<[u64; 2]>()?),
                "shape" if rank.is_none() => rank = Some(map.next_value_seed(ShapeSeed(self.dims))?),
                "shape" => return Err(M::Error::duplicate_field("shape")),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let [start, end] = offsets.ok_or_else(|| M::Error::missing_field("data_offsets"))?;
        self.entries.push(Entry {
            name: self.name,
            dtype: dtype.ok_or_else(|| M::Error::missing_field("dtype"))?,
            start,
            end,
            first_dim: first_dim as u32,
            rank: rank.ok_or_else(|| M::Error::missing_field("shape"))?,
        });
        Ok(())
    }
}

struct ShapeSeed<'h>(&'h mut Vec<u64>);

impl<'a> serde::de::DeserializeSeed<'a> for ShapeSeed<'_> {
    type Value = u8;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> std::result::Result<u8, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'a> Visitor<'a> for ShapeSeed<'_> {
    type Value = u8;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "a list of at most {MAX_RANK} dimensions")
    }

    fn visit_seq<S: SeqAccess<'a>>(self, mut seq: S) -> std::result::Result<u8, S::Error> {
        let mut rank = 0;
        while let Some(dim) = seq.next_element()? {
            if usize::from(rank) == MAX_RANK {
                return Err(serde::de::Error::custom(format!("more than {MAX_RANK} dimensions")));
            }
            self.0.push(dim);
            rank += 1;
        }
        Ok(rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,2],"data_offsets":[4,12]},"a\"":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}  "#;

    #[test]
    fn a_good_header_parses_in_offset_order() {
        let bytes = file(GOOD, 12);
        let parsed = SafeTensors::parse(&bytes).unwrap();
        let names: Vec<_> = parsed.iter().map(|t| t.name).collect();
        assert_eq!(names, ["a\"", "b"]);
        assert_eq!(parsed.metadata("format"), Some("pt"));
        assert_eq!(parsed.get(1).unwrap().shape, [2, 2]);
        assert_eq!((parsed.find("b"), parsed.find("c")), (Some(1), None));
        assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
    }

    #[test]
    fn bad_headers_are_refused() {
        let entry = |shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let twice = r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
        let overlap = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#;
        let bad = [
            (entry("[4]", "[1,5]"), "data offsets"),
            (entry("[5]", "[0,4]"), "shape"),
            (entry("[4294967296,4294967296]", "[0,4]"), "shape"),
            (entry("[1,1,1,1,1,1,1,1,4]", "[0,4]"), "dimensions"),
            (entry("[8]", "[0,8]"), "truncated"),
            (entry("[2]", "[0,2]"), "behind the last tensor"),
            (entry("[-4]", "[0,4]"), "invalid value"),
            (entry("[4]", "[4,0]"), "data offsets"),
            (twice.to_string(), "twice"),
            (overlap.to_string(), "data offsets"),
            ("{".to_string(), "EOF"),
            ("[]".to_string(), "an object of tensors"),
            (r#"{"a":{"dtype":"U8","shape":[4]}}"#.to_string(), "data_offsets"),
        ];
        for (header, cause) in bad {
            let error = SafeTensors::parse(&file(&header, 4)).unwrap_err().to_string();
            assert!(error.contains(cause), "{header}: {error}");
        }
        for bytes in [&b""[..], &[1, 2, 3], &u64::MAX.to_le_bytes(), &file(GOOD, 12)[..20]] {
            assert!(SafeTensors::parse(bytes).is_err());
        }
    }
}

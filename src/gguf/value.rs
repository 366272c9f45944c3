//! Values of metadata.

use std::borrow::Cow;
use std::fmt;

use super::MAX_DEPTH;
use super::read::Reader;
use crate::{Error, Result};

/// The type of a value, with its number in the file.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    fn read(reader: &mut Reader) -> Result<ValueType> {
        let id = reader.u32("a value's type")?;
        ValueType::ALL.get(id as usize).copied().ok_or_else(|| Error::field("value type", id, "0 to 12"))
    }

    /// Bytes of every value of this type, or of the shortest.
    fn min_bytes(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 12,
        }
    }
}

/// A value of metadata; strings and arrays stay in the file.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// UTF-8 by the specification, which some files break.
    String(&'a [u8]),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> Value<'a> {
    /// An integer that is not negative.
    pub fn to_u64(self) -> Option<u64> {
        match self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// A floating-point number.
    pub fn to_f32(self) -> Option<f32> {
        match self {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// A truth value.
    pub fn to_bool(self) -> Option<bool> {
        match self {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// A string; what is not UTF-8 in it is replaced.
    pub fn to_str(self) -> Option<Cow<'a, str>> {
        match self {
            Value::String(bytes) => Some(String::from_utf8_lossy(bytes)),
            _ => None,
        }
    }

    /// An array.
    pub fn to_array(self) -> Option<Array<'a>> {
        match self {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::U8(v) => v.fmt(f),
            Value::I8(v) => v.fmt(f),
            Value::U16(v) => v.fmt(f),
            Value::I16(v) => v.fmt(f),
            Value::U32(v) => v.fmt(f),
            Value::I32(v) => v.fmt(f),
            Value::F32(v) => v.fmt(f),
            Value::Bool(v) => v.fmt(f),
            Value::String(bytes) => {
                write!(f, "{:?}", super::shown(&String::from_utf8_lossy(&bytes[..bytes.len().min(400)])))
            }
            Value::Array(array) => write!(f, "an array of {} values of type {:?}", array.len, array.ty),
            Value::U64(v) => v.fmt(f),
            Value::I64(v) => v.fmt(f),
            Value::F64(v) => v.fmt(f),
        }
    }
}

/// An array in the file.
#[derive(Clone, Copy, Debug)]
pub struct Array<'a> {
    ty: ValueType,
    len: u64,
    reader: Reader<'a>,
}

impl PartialEq for Array<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.ty == other.ty && self.len == other.len && self.iter().eq(other.iter())
    }
}

impl<'a> Array<'a> {
    /// The type of its values.
    pub fn ty(&self) -> ValueType {
        self.ty
    }

    /// Number of its values.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// True if it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its values.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (ty, mut reader) = (self.ty, self.reader);
        // Validated before, so that no value is missing.
        (0..self.len).map_while(move |_| read_as(&mut reader, ty, 1).ok())
    }
}

/// Reads a type and a value of it.
pub(super) fn read<'a>(reader: &mut Reader<'a>) -> Result<Value<'a>> {
    let ty = ValueType::read(reader)?;
    read_as(reader, ty, 0)
}

/// As [`read`], past the end of the value.
pub(super) fn skip(reader: &mut Reader) -> Result<()> {
    read(reader).map(drop)
}

/// Reads a value of type `ty` that lies in `depth` arrays, and leaves the reader behind it.
fn read_as<'a>(reader: &mut Reader<'a>, ty: ValueType, depth: u32) -> Result<Value<'a>> {
    Ok(match ty {
        ValueType::U8 => Value::U8(reader.u8("a value")?),
        ValueType::I8 => Value::I8(reader.u8("a value")? as i8),
        ValueType::U16 => Value::U16(reader.u16("a value")?),
        ValueType::I16 => Value::I16(reader.u16("a value")? as i16),
        ValueType::U32 => Value::U32(reader.u32("a value")?),
        ValueType::I32 => Value::I32(reader.u32("a value")? as i32),
        ValueType::U64 => Value::U64(reader.u64("a value")?),
        ValueType::I64 => Value::I64(reader.u64("a value")? as i64),
        ValueType::F32 => Value::F32(f32::from_bits(reader.u32("a value")?)),
        ValueType::F64 => Value::F64(f64::from_bits(reader.u64("a value")?)),
        ValueType::Bool => match reader.u8("a value")? {
            0 => Value::Bool(false),
            1 => Value::Bool(true),
            other => return Err(Error::field("boolean", other, "0 or 1")),
        },
        ValueType::String => Value::String(reader.string()?),
        ValueType::Array => Value::Array(read_array(reader, depth)?),
    })
}

fn read_array<'a>(reader: &mut Reader<'a>, depth: u32) -> Result<Array<'a>> {
    if depth >= MAX_DEPTH {
        return Err(Error::field(
            "nesting of arrays",
            format!("more than {MAX_DEPTH}"),
            format!("at most {MAX_DEPTH}"),
        ));
    }
    let (ty, at) = (ValueType::read(reader)?, reader.at());
    let len = reader.u64("an array's length")?;
    if len.saturating_mul(ty.min_bytes()) > reader.left() {
        let got = format!("{len} values of type {ty:?} at byte {at}");
        return Err(Error::field(
            "array length",
            got,
            format!("what fits into the {} bytes that follow", reader.left()),
        ));
    }
    let array = Array { ty, len, reader: *reader };
    match ty {
        ValueType::String | ValueType::Array | ValueType::Bool => {
            for _ in 0..len {
                read_as(reader, ty, depth + 1)?;
            }
        }
        fixed => {
            reader.take(len * fixed.min_bytes(), "an array")?;
        }
    }
    Ok(array)
}

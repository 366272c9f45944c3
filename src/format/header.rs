//! The 64-byte header of a tile stream and its 32-byte tile records. All numbers are little-endian.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `0x52414E53` |
//! | 4 | 2 | version, 1 |
//! | 6 | 1 | kind |
//! | 7 | 1 | dtype of the source tensor |
//! | 8 | 4 | rows |
//! | 12 | 4 | columns |
//! | 16 | 4 | tile rows (grid height) |
//! | 20 | 4 | tile columns (grid width) |
//! | 24 | 2 | tile size, 256 |
//! | 26 | 1 | rows of a band, 64 |
//! | 27 | 1 | probability bits, 12 |
//! | 28 | 1 | bits of a class: 0, 3, 4, 8 |
//! | 29 | 1 | coding of the class plane: 0 plain, 1 rANS |
//! | 30 | 1 | raw bits of a weight |
//! | 31 | 1 | scale layout |
//! | 32 | 16 | class map |
//! | 48 | 8 | XXH3 of the preamble (header, table, records, scales) with this field zero |
//! | 56 | 8 | bytes of the whole stream |
//!
//! | offset | bytes | field of a tile record |
//! |---|---|---|
//! | 0 | 8 | offset of the tile's bytes from the start of the stream |
//! | 8 | 8 | XXH3 of the tile's bytes, seeded with the tile's index |
//! | 16 | 4 | size in bytes, a multiple of 16 |
//! | 20 | 4 | escapes |
//! | 24 | 1 | predictor |
//! | 25 | 1 | flags, 0 |
//! | 26 | 2 | bands |
//! | 28 | 4 | 0 |

use crate::codec::rans::STATE_BYTES;
use crate::codec::{BAND_ROWS, ClassMap, Coding, Dtype, Geometry, Kind, Plan, Predictor, ScaleLayout, TILE};
use crate::{Error, Result};

/// First four bytes of a tile stream, as a little-endian number.
pub const MAGIC: u32 = 0x5241_4E53;
/// The format version that this crate writes; it reads no other.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of the frequency table.
pub const TABLE_BYTES: usize = 512;
/// Bytes of a tile record.
pub const RECORD_BYTES: usize = 32;
/// Where in the header the preamble's checksum lies.
pub const HASH_OFFSET: usize = 48;

/// The header's fields, checked on their own; [`super::TileStream::parse`] checks what lies behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// How the matrix is coded; its frequencies follow in the table.
    pub plan: Plan,
    /// Its shape.
    pub geometry: Geometry,
    /// XXH3 of the preamble.
    pub hash: u64,
    /// Bytes of the whole stream.
    pub total: u64,
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

/// An error unless a field has the one value that this version allows.
fn expect(field: &'static str, got: u64, allowed: u64) -> Result<()> {
    if got == allowed { Ok(()) } else { Err(Error::field(field, got, allowed)) }
}

impl Header {
    /// Parses and checks the 64 bytes.
    pub fn parse(b: &[u8; HEADER_BYTES]) -> Result<Header> {
        if u32_at(b, 0) != MAGIC {
            return Err(Error::field("magic", format!("{:#010x}", u32_at(b, 0)), format!("{MAGIC:#010x}")));
        }
        if u16_at(b, 4) != VERSION {
            return Err(Error::version("the tile stream", u16_at(b, 4), VERSION));
        }
        let (rows, cols) = (u32_at(b, 8), u32_at(b, 12));
        if rows == 0 || cols == 0 {
            return Err(Error::field("shape", format!("{rows}x{cols}"), "at least 1x1"));
        }
        let geometry = Geometry { rows: rows as usize, cols: cols as usize };
        expect("tile rows", u32_at(b, 16).into(), geometry.tile_rows() as u64)?;
        expect("tile columns", u32_at(b, 20).into(), geometry.tile_cols() as u64)?;
        expect("tile size", u16_at(b, 24).into(), TILE as u64)?;
        expect("band rows", b[26].into(), BAND_ROWS as u64)?;
        expect("probability bits", b[27].into(), 12)?;
        let coding = match b[29] {
            0 => Coding::Plain,
            1 => Coding::Rans,
            other => return Err(Error::field("coding", other, "0 or 1")),
        };
        if ![0, 3, 4, 8].contains(&b[28]) {
            return Err(Error::field("class bits", b[28], "0, 3, 4 or 8"));
        }
        let (kind, dtype) = (Kind::from_u8(b[6])?, Dtype::from_u8(b[7])?);
        let mut plan = Plan::new(kind, dtype, b[28].into(), coding, ScaleLayout::from_u8(b[31])?);
        plan.raw_bits = b[30].into();
        plan.validate()?;
        let values: [u8; 16] = std::array::from_fn(|i| b[32 + i]);
        if plan.uses_map() {
            plan.map = ClassMap { values, escape: plan.map.escape };
        } else if values != [0; 16] {
            return Err(Error::field("class map", format!("{values:?}"), "zeros for this stage"));
        }
        Ok(Header { plan, geometry, hash: u64_at(b, HASH_OFFSET), total: u64_at(b, 56) })
    }

    /// The 64 bytes that [`Header::parse`] reads.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let Header { plan, geometry, .. } = self;
        let mut b = [0; HEADER_BYTES];
        b[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        b[4..6].copy_from_slice(&VERSION.to_le_bytes());
        b[6] = plan.kind as u8;
        b[7] = plan.dtype as u8;
        for (at, value) in
            [(8, geometry.rows), (12, geometry.cols), (16, geometry.tile_rows()), (20, geometry.tile_cols())]
        {
            b[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
        }
        b[24..26].copy_from_slice(&(TILE as u16).to_le_bytes());
        b[26] = BAND_ROWS as u8;
        b[27] = 12;
        b[28] = plan.class_bits as u8;
        b[29] = plan.coding as u8;
        b[30] = plan.raw_bits as u8;
        b[31] = plan.scale as u8;
        if plan.uses_map() {
            b[32..48].copy_from_slice(&plan.map.values);
        }
        b[48..56].copy_from_slice(&self.hash.to_le_bytes());
        b[56..64].copy_from_slice(&self.total.to_le_bytes());
        b
    }

    /// Bytes of the scales, or levels.
    pub fn scale_bytes(&self) -> u64 {
        match self.plan.scale {
            ScaleLayout::None => 0,
            ScaleLayout::Matrix => 4,
            ScaleLayout::Row => 4 * self.geometry.rows as u64,
            ScaleLayout::Tile => 4 * self.geometry.tiles() as u64,
            ScaleLayout::Levels => self.geometry.rows as u64 + self.geometry.cols as u64,
        }
    }

    /// Offset of the scales: behind header, table and records.
    pub fn scales_offset(&self) -> u64 {
        (HEADER_BYTES + TABLE_BYTES) as u64 + RECORD_BYTES as u64 * self.geometry.tiles() as u64
    }

    /// Bytes of header, table, records and scales, the last padded to 16 bytes.
    pub fn preamble_bytes(&self) -> u64 {
        self.scales_offset() + self.scale_bytes().next_multiple_of(16)
    }

    /// Smallest and largest possible size of tile `index`.
    pub(crate) fn tile_bounds(&self, index: usize) -> (u64, u64) {
        let rect = self.geometry.tile(index);
        let align = |n: usize| n.next_multiple_of(16);
        let mut bounds = (align(8 * rect.bands()), align(8 * rect.bands()));
        for band in 0..rect.bands() {
            let n = rect.band(band).weights();
            let (least, most) = self.plan.coded_bounds(n);
            let escapes = if self.plan.escape_class().is_some() { n * self.plan.kind.escape_bytes() } else { 0 };
            bounds.0 += align(least) + align(self.plan.raw_bytes(n));
            bounds.1 += align(most) + align(self.plan.raw_bytes(n)) + align(escapes);
        }
        (bounds.0 as u64, bounds.1 as u64)
    }
}

/// What a matrix says about one of its tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Record {
    /// Offset of the tile's bytes from the start of the stream.
    pub offset: u64,
    /// XXH3 of the tile's bytes, seeded with the tile's index.
    pub hash: u64,
    /// Bytes of the tile.
    pub size: u32,
    /// Escapes in all its bands.
    pub escapes: u32,
    /// Predictor of its INT8 weights.
    pub predictor: Predictor,
    /// Number of its bands.
    pub bands: u16,
}

impl Record {
    /// Parses the 32 bytes of a record; whether it fits its matrix is checked by the stream.
    pub fn parse(b: &[u8; RECORD_BYTES]) -> Result<Record> {
        expect("tile flags", b[25].into(), 0)?;
        expect("tile record padding", u32_at(b, 28).into(), 0)?;
        Ok(Record {
            offset: u64_at(b, 0),
            hash: u64_at(b, 8),
            size: u32_at(b, 16),
            escapes: u32_at(b, 20),
            predictor: Predictor::from_u8(b[24])?,
            bands: u16_at(b, 26),
        })
    }

    /// The 32 bytes that [`Record::parse`] reads.
    pub fn to_bytes(&self) -> [u8; RECORD_BYTES] {
        let mut b = [0; RECORD_BYTES];
        b[0..8].copy_from_slice(&self.offset.to_le_bytes());
        b[8..16].copy_from_slice(&self.hash.to_le_bytes());
        b[16..20].copy_from_slice(&self.size.to_le_bytes());
        b[20..24].copy_from_slice(&self.escapes.to_le_bytes());
        b[24] = self.predictor as u8;
        b[26..28].copy_from_slice(&self.bands.to_le_bytes());
        b
    }
}

const _: () = assert!(STATE_BYTES.is_multiple_of(16));

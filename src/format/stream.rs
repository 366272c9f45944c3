//! A tile stream: the parsed and validated bytes of one compressed matrix.

use std::borrow::Cow;

use super::checksum;
use super::header::{HASH_OFFSET, HEADER_BYTES, Header, RECORD_BYTES, Record, TABLE_BYTES};
use crate::codec::band::{Band, BandBytes, BandSizes, encoded_bytes};
use crate::codec::quant::Scales;
use crate::codec::{Coding, DecodeTable, FreqTable, Geometry, Plan, Rect};
use crate::{Error, Result};

/// Whether checksums are compared. Tests and fuzzers skip them, so that damage reaches the decoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Checks {
    /// Compare: what every user gets.
    #[default]
    On,
    /// Ignore checksums. Decoding stays within bounds, but damage may go unnoticed.
    Off,
}

/// One compressed matrix in borrowed bytes, its preamble validated. Tiles are untouched until they are asked for.
#[derive(Clone, Debug)]
pub struct TileStream<'a> {
    data: &'a [u8],
    header: Cow<'a, Header>,
    checks: Checks,
}

impl<'a> TileStream<'a> {
    /// A stream that was parsed before, from its bytes and its header.
    pub(crate) fn reopened(data: &'a [u8], header: &'a Header, checks: Checks) -> TileStream<'a> {
        TileStream { data, header: Cow::Borrowed(header), checks }
    }

    /// The header with its table, for [`TileStream::reopened`].
    pub(crate) fn into_header(self) -> (Header, Checks) {
        (self.header.into_owned(), self.checks)
    }

    /// Parses and validates the preamble of `data`, which must be exactly one tile stream.
    pub fn parse(data: &'a [u8]) -> Result<TileStream<'a>> {
        Self::parse_with(data, Checks::On)
    }

    /// As [`TileStream::parse`], with a choice about checksums.
    pub fn parse_with(data: &'a [u8], checks: Checks) -> Result<TileStream<'a>> {
        let need = |what, need: u64| Error::Truncated { what, need, have: data.len() as u64 };
        let bytes: &[u8; HEADER_BYTES] = data.first_chunk().ok_or(need("the header", HEADER_BYTES as u64))?;
        let mut header = Header::parse(bytes)?;
        let preamble = header.preamble_bytes();
        if (data.len() as u64) < preamble {
            return Err(need("header, table, tile records and scales", preamble));
        }
        if header.total != data.len() as u64 {
            return Err(Error::field("stream size", header.total, data.len()));
        }
        let computed = checksum::with_hole(&data[..preamble as usize], HASH_OFFSET);
        if checks == Checks::On && computed != header.hash {
            return Err(Error::Checksum { what: "header, table, records and scales", stored: header.hash, computed });
        }
        let table = &data[HEADER_BYTES..HEADER_BYTES + TABLE_BYTES];
        header.plan.freqs = match table.first_chunk::<TABLE_BYTES>() {
            _ if header.plan.class_bits == 0 => {
                if table.iter().any(|&b| b != 0) {
                    return Err(Error::field("frequency table", "not empty", "zeros without classes"));
                }
                None
            }
            Some(table) => Some(FreqTable::parse(table)?),
            None => return Err(need("the frequency table", TABLE_BYTES as u64)),
        };
        let stream = TileStream { data, header: Cow::Owned(header), checks };
        stream.validate_records()?;
        Ok(stream)
    }

    /// Tiles must follow one another without holes or overlaps from the preamble's end to the stream's.
    fn validate_records(&self) -> Result<()> {
        let mut offset = self.header.preamble_bytes();
        for tile in 0..self.geometry().tiles() {
            let check = || {
                let record = self.record(tile)?;
                let rect = self.geometry().tile(tile);
                if record.offset != offset {
                    return Err(Error::field("tile offset", record.offset, offset));
                }
                let (least, most) = self.header.tile_bounds(tile);
                let size = u64::from(record.size);
                if size < least || size > most || size % 16 != 0 {
                    return Err(Error::field("tile size", size, format!("a multiple of 16 in {least}..={most}")));
                }
                if usize::from(record.bands) != rect.bands() {
                    return Err(Error::field("bands", record.bands, rect.bands()));
                }
                if record.predictor as u8 != 0 && !self.plan().allows_predictor() {
                    return Err(Error::field("predictor", record.predictor.name(), "none for this kind"));
                }
                Ok(offset + size)
            };
            offset = check().map_err(|e| self.in_tile(tile, e))?;
        }
        if offset != self.header.total {
            return Err(Error::field("stream size", self.header.total, format!("{offset}, where the last tile ends")));
        }
        Ok(())
    }

    /// How the matrix is coded.
    pub fn plan(&self) -> &Plan {
        &self.header.plan
    }

    /// Shape and tile grid.
    pub fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// XXH3 of the preamble, which covers the checksums of all tiles: a fingerprint of the matrix.
    pub fn hash(&self) -> u64 {
        self.header.hash
    }

    /// Bytes of header, table, records and scales.
    pub fn preamble_bytes(&self) -> usize {
        self.header.preamble_bytes() as usize
    }

    /// The stream itself.
    pub fn bytes(&self) -> &'a [u8] {
        self.data
    }

    /// Bytes of the whole stream.
    pub fn total_bytes(&self) -> usize {
        self.data.len()
    }

    /// The decode table of the matrix's frequencies; a dummy where nothing is rANS-coded.
    pub fn decode_table(&self) -> DecodeTable {
        let freqs = match (&self.plan().freqs, self.plan().coding) {
            (Some(freqs), Coding::Rans) => freqs.clone(),
            _ => FreqTable::from_counts(&[0; 256]),
        };
        DecodeTable::new(&freqs)
    }

    /// The scales as little-endian `f32`s, or the levels as bytes, in the order of their layout.
    pub fn scales(&self) -> &'a [u8] {
        let start = self.header.scales_offset() as usize;
        self.data.get(start..start + self.header.scale_bytes() as usize).unwrap_or(&[])
    }

    /// The record of tile `tile`.
    pub fn record(&self, tile: usize) -> Result<Record> {
        let at = RECORD_BYTES.checked_mul(tile).and_then(|at| at.checked_add(HEADER_BYTES + TABLE_BYTES));
        match at.and_then(|at| self.data.get(at..)).and_then(|rest| rest.first_chunk()) {
            Some(bytes) if tile < self.geometry().tiles() => Record::parse(bytes),
            _ => Err(Error::Invalid(format!("tile {tile} of a matrix with {} tiles", self.geometry().tiles()))),
        }
    }

    /// The bytes of tile `tile`, compared with their checksum.
    pub fn tile(&self, tile: usize) -> Result<Tile<'a>> {
        self.tile_with(tile, self.checks)
    }

    /// As [`TileStream::tile`]; the caller may skip the checksum of a tile that it has compared before.
    pub fn tile_with(&self, tile: usize, checks: Checks) -> Result<Tile<'a>> {
        let open = || {
            let record = self.record(tile)?;
            let start = record.offset as usize;
            let data = self.data.get(start..start + record.size as usize);
            let data = data.ok_or(Error::Stream("the tile lies outside of the stream"))?;
            if checks == Checks::On && self.checks == Checks::On {
                let computed = checksum::of_tile(tile, data);
                if computed != record.hash {
                    return Err(Error::Checksum { what: "the tile", stored: record.hash, computed });
                }
            }
            Tile::parse(self.plan(), self.geometry().tile(tile), tile, record, data)
        };
        open().map_err(|e| self.in_tile(tile, e))
    }

    /// Everything a decoder needs for band `index` of a tile of this stream.
    pub fn band<'s>(&'s self, tile: &Tile<'s>, index: usize, table: &'s DecodeTable) -> Band<'s> {
        let rect = tile.rect.band(index);
        Band {
            plan: self.plan(),
            table,
            bytes: tile.band(self.plan(), index),
            predictor: tile.record.predictor,
            scales: Scales::of(self.plan().scale, self.scales(), self.geometry(), tile.index, &rect),
            rows: rect.rows,
            cols: rect.cols,
        }
    }

    /// Names tile `tile` and its bytes in an error.
    pub(crate) fn in_tile(&self, tile: usize, source: Error) -> Error {
        let (start, size) = self.record(tile).map_or((0, 0), |r| (r.offset, u64::from(r.size)));
        Error::Tile { tile, start, end: start.saturating_add(size), source: Box::new(source) }
    }
}

/// One tile's bytes, their division into bands validated.
#[derive(Clone, Copy, Debug)]
pub struct Tile<'a> {
    /// Index in the grid.
    pub index: usize,
    /// Place in the matrix.
    pub rect: Rect,
    /// Its record.
    pub record: Record,
    data: &'a [u8],
}

impl<'a> Tile<'a> {
    /// A tile starts with `u32` coded bytes and `u32` escapes for each band; the bands must fill the rest exactly.
    pub(crate) fn parse(plan: &Plan, rect: Rect, index: usize, record: Record, data: &'a [u8]) -> Result<Tile<'a>> {
        let tile = Tile { index, rect, record, data };
        let mut end = tile.first_band();
        if data.len() < end {
            return Err(Error::Truncated { what: "the band table", need: end as u64, have: data.len() as u64 });
        }
        if data[8 * rect.bands()..end].iter().any(|&b| b != 0) {
            return Err(Error::field("band table padding", "not zero", "zeros"));
        }
        let mut escapes = 0;
        for band in 0..rect.bands() {
            let sizes = tile.sizes(band);
            let n = rect.band(band).weights();
            let (least, most) = plan.coded_bounds(n);
            if sizes.coded < least
                || sizes.coded > most
                || !sizes.coded.is_multiple_of(2) && plan.coding == Coding::Rans
            {
                return Err(Error::field("coded bytes of a band", sizes.coded, format!("{least}..={most}")));
            }
            let allowed = if plan.escape_class().is_some() { n } else { 0 };
            if sizes.escapes > allowed {
                return Err(Error::field("escapes of a band", sizes.escapes, format!("0..={allowed}")));
            }
            escapes += sizes.escapes;
            end += encoded_bytes(plan, n, sizes);
        }
        if end != data.len() {
            return Err(Error::field("tile size", data.len(), format!("{end}, the sum of its bands")));
        }
        if escapes as u64 != u64::from(record.escapes) {
            return Err(Error::field("escapes of the tile", record.escapes, escapes));
        }
        Ok(tile)
    }

    /// Offset of the first band: the size of the band table.
    pub(crate) fn first_band(&self) -> usize {
        (8 * self.rect.bands()).next_multiple_of(16)
    }

    /// Entry `band` of the band table.
    pub fn sizes(&self, band: usize) -> BandSizes {
        let entry = self.data.get(8 * band..8 * band + 8).unwrap_or(&[0; 8]);
        let read = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]) as usize;
        BandSizes { coded: read(0), escapes: read(4) }
    }

    /// The byte ranges of band `index`.
    pub(crate) fn band(&self, plan: &Plan, index: usize) -> BandBytes<'a> {
        let before: usize = (0..index).map(|b| encoded_bytes(plan, self.rect.band(b).weights(), self.sizes(b))).sum();
        let sizes = self.sizes(index);
        let mut rest = self.data.get(self.first_band() + before..).unwrap_or(&[]);
        let mut section = |bytes: usize| {
            let (section, after) = rest.split_at(bytes.next_multiple_of(16).min(rest.len()));
            rest = after;
            &section[..bytes.min(section.len())]
        };
        BandBytes {
            coded: section(sizes.coded),
            raw: section(plan.raw_bytes(self.rect.band(index).weights())),
            escapes: section(sizes.escapes * plan.kind.escape_bytes()),
        }
    }
}

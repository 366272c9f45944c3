//! Reading a compressed matrix.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use rayon::prelude::*;

use crate::codec::band::Scratch;
use crate::codec::quant::{from_f32, widen};
use crate::codec::{BAND_ROWS, DecodeTable, Dtype, Geometry, Kind, Plan, Rect, ScaleLayout, TILE};
use crate::cpu::{self, Backend};
use crate::format::{Checks, TileStream};
use crate::{Error, Result};

/// A compressed matrix in borrowed bytes. Opening it reads the preamble only; each tile's checksum is compared when the
/// tile is first used.
#[derive(Debug)]
pub struct CompressedMatrix<'a> {
    stream: TileStream<'a>,
    table: OnceLock<DecodeTable>,
    /// One bit for each tile whose checksum has been compared.
    checked: Vec<AtomicU8>,
    backend: Backend,
}

impl<'a> CompressedMatrix<'a> {
    /// Opens a tile stream.
    ///
    /// # Errors
    /// If the bytes are not exactly one valid tile stream, or `TAPER_CPU` asks for a backend that is not there.
    pub fn open(bytes: &'a [u8]) -> Result<CompressedMatrix<'a>> {
        Self::from_stream(TileStream::parse(bytes)?)
    }

    /// Wraps a parsed stream.
    pub fn from_stream(stream: TileStream<'a>) -> Result<CompressedMatrix<'a>> {
        let checked = (0..stream.geometry().tiles().div_ceil(8)).map(|_| AtomicU8::new(0)).collect();
        Ok(CompressedMatrix { stream, table: OnceLock::new(), checked, backend: Backend::current()? })
    }

    /// Decodes with another backend, which must be available.
    pub fn with_backend(mut self, backend: Backend) -> CompressedMatrix<'a> {
        assert!(backend.available(), "backend {} is not available on this machine", backend.name());
        self.backend = backend;
        self
    }

    /// The parsed stream.
    pub fn stream(&self) -> &TileStream<'a> {
        &self.stream
    }

    /// How the matrix is coded.
    pub fn plan(&self) -> &Plan {
        self.stream.plan()
    }

    /// Shape and tile grid.
    pub fn geometry(&self) -> Geometry {
        self.stream.geometry()
    }

    /// The dtype to which the matrix decodes: that of the tensor it was made from.
    pub fn dtype(&self) -> Dtype {
        self.plan().dtype
    }

    /// Bytes of the whole decoded matrix.
    pub fn decoded_bytes(&self) -> usize {
        self.geometry().rows * self.geometry().cols * self.dtype().size()
    }

    /// Bits per weight, everything counted.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.stream.total_bytes() as f64 / (self.geometry().rows * self.geometry().cols) as f64
    }

    /// The whole matrix, row-major in its own dtype. Tiles are decoded in parallel.
    pub fn decode(&self) -> Result<Vec<u8>> {
        self.decode_rows(0..self.geometry().rows)
    }

    /// Some rows, in the matrix's dtype. Only the bands that hold them are decoded.
    ///
    /// # Errors
    /// If the range is not within the matrix, or a tile is damaged.
    pub fn decode_rows(&self, rows: Range<usize>) -> Result<Vec<u8>> {
        let Geometry { rows: height, cols } = self.geometry();
        if rows.start > rows.end || rows.end > height {
            return Err(Error::Invalid(format!("rows {rows:?} of a matrix with {height} rows")));
        }
        let mut out = vec![0; rows.len() * cols * self.dtype().size()];
        self.decode_rows_into(rows, &mut out)?;
        Ok(out)
    }

    /// As [`CompressedMatrix::decode_rows`], into `out`, which has just their size.
    pub fn decode_rows_into(&self, rows: Range<usize>, out: &mut [u8]) -> Result<()> {
        let Geometry { rows: height, cols } = self.geometry();
        let row_bytes = cols * self.dtype().size();
        if rows.start > rows.end || rows.end > height || out.len() != rows.len() * row_bytes {
            return Err(Error::Invalid(format!(
                "rows {rows:?} of a {height}x{cols} matrix into {} bytes: {} are needed",
                out.len(),
                rows.len().saturating_mul(row_bytes)
            )));
        }
        // The strips of whole bands that cover the rows, each with its part of the output.
        let mut strips = Vec::new();
        let mut rest = out;
        let mut row = rows.start;
        while row < rows.end {
            let end = rows.end.min((row / BAND_ROWS + 1) * BAND_ROWS);
            let (strip, after) = rest.split_at_mut((end - row) * row_bytes);
            strips.push((row..end, strip));
            (rest, row) = (after, end);
        }
        strips.into_par_iter().try_for_each_init(Work::default, |work, (rows, out)| self.decode_strip(rows, out, work))
    }

    /// Rows that lie within one band of each tile column.
    fn decode_strip(&self, rows: Range<usize>, out: &mut [u8], work: &mut Work) -> Result<()> {
        let geometry = self.geometry();
        let size = self.dtype().size();
        let row_bytes = geometry.cols * size;
        for col in 0..geometry.tile_cols() {
            let index = rows.start / TILE * geometry.tile_cols() + col;
            let rect = geometry.tile(index);
            let band = (rows.start - rect.row) / BAND_ROWS;
            let part = rect.band(band);
            let skip = rows.start - part.row;
            let at = rect.col * size;
            if skip == 0 && rows.len() == part.rows {
                self.decode_band(index, band, work, &mut out[at..], row_bytes)?;
                continue;
            }
            // Some rows of a band: decode all of it aside.
            let mut aside = std::mem::take(&mut work.aside);
            aside.resize(part.weights() * size, 0);
            let decoded = self.decode_band(index, band, work, &mut aside, part.cols * size);
            for (row, weights) in aside.chunks_exact(part.cols * size).skip(skip).take(rows.len()).enumerate() {
                out[row * row_bytes + at..][..weights.len()].copy_from_slice(weights);
            }
            work.aside = aside;
            decoded?;
        }
        Ok(())
    }

    /// One tile, row by row in the matrix's dtype, and its place in the matrix.
    pub fn decode_tile(&self, index: usize) -> Result<(Rect, Vec<u8>)> {
        if index >= self.geometry().tiles() {
            return Err(Error::Invalid(format!("tile {index} of a matrix with {} tiles", self.geometry().tiles())));
        }
        let rect = self.geometry().tile(index);
        let mut out = vec![0; rect.weights() * self.dtype().size()];
        self.decode_tile_into(index, &mut out)?;
        Ok((rect, out))
    }

    /// As [`CompressedMatrix::decode_tile`], into `out`, which has just its size.
    pub fn decode_tile_into(&self, index: usize, out: &mut [u8]) -> Result<()> {
        let rect = self.geometry().tile(index);
        let stride = rect.cols * self.dtype().size();
        let mut work = Work::default();
        for (band, out) in out.chunks_mut(BAND_ROWS * stride).enumerate().take(rect.bands()) {
            self.decode_band(index, band, &mut work, out, stride)?;
        }
        Ok(())
    }

    /// One band (substream) of a tile into rows of `stride` bytes, in the matrix's dtype.
    fn decode_band(&self, tile: usize, band: usize, work: &mut Work, out: &mut [u8], stride: usize) -> Result<()> {
        let (byte, bit) = (&self.checked[tile / 8], 1u8 << (tile % 8));
        let fresh = byte.load(Ordering::Relaxed) & bit == 0;
        let opened = self.stream.tile_with(tile, if fresh { Checks::On } else { Checks::Off })?;
        if fresh {
            byte.fetch_or(bit, Ordering::Relaxed);
        }
        let table = self.table.get_or_init(|| self.stream.decode_table());
        let band = self.stream.band(&opened, band, table);
        let result = if self.plan().value_bytes() == self.dtype().size() && self.stores_dtype() {
            cpu::decode_band(self.backend, &band, &mut work.scratch, out, stride)
        } else {
            let width = self.plan().value_bytes();
            work.values.resize(band.weights() * width, 0);
            let decoded =
                cpu::decode_band(self.backend, &band, &mut work.scratch, &mut work.values, band.cols * width);
            self.convert(&work.values, band.cols, out, stride);
            decoded
        };
        result.map_err(|e| self.stream.in_tile(tile, e))
    }

    /// True if decoded values are the matrix's own bits already.
    fn stores_dtype(&self) -> bool {
        self.plan().kind == Kind::of(self.dtype()) && self.plan().scale == ScaleLayout::None
            || self.plan().scale != ScaleLayout::None && self.dtype() == Dtype::F32
    }

    /// Turns narrowed or dequantised values into the matrix's dtype.
    fn convert(&self, values: &[u8], cols: usize, out: &mut [u8], stride: usize) {
        let (dtype, width) = (self.dtype(), self.plan().value_bytes());
        let size = dtype.size();
        for (values, out) in values.chunks_exact(cols * width).zip(out.chunks_mut(stride)) {
            for (value, out) in values.chunks_exact(width).zip(out.chunks_exact_mut(size)) {
                let bits = match *value {
                    [a, b] => widen(dtype, u16::from_le_bytes([a, b])),
                    [a, b, c, d] => from_f32(dtype, f32::from_le_bytes([a, b, c, d])),
                    _ => 0,
                };
                out.copy_from_slice(&bits.to_le_bytes()[..size]);
            }
        }
    }
}

/// Buffers of one decoding thread.
#[derive(Default)]
struct Work {
    scratch: Scratch,
    values: Vec<u8>,
    aside: Vec<u8>,
}

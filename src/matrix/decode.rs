//! Reading a compressed matrix.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

use super::Activations;
use crate::codec::band::{self, Band, Scratch};
use crate::codec::{BAND_ROWS, DecodeTable, Dtype, Geometry, Kind, Plan, Rect, TILE};
use crate::cpu::{self, Backend};
use crate::format::stream::Tile;
use crate::format::{Checks, TileStream};
use crate::{Error, Result};

/// A compressed matrix in borrowed bytes. Opening it reads the preamble only; each tile's checksum is compared when the
/// tile is first used.
#[derive(Debug)]
pub struct CompressedMatrix<'a> {
    stream: TileStream<'a>,
    shared: Arc<Shared>,
    backend: Backend,
    activations: Activations,
    origin: Option<Arc<Origin>>,
}

/// Where a matrix comes from, for errors.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) file: PathBuf,
    pub(crate) tensor: String,
}

impl Origin {
    /// Names tensor and file in an error.
    pub(crate) fn name(&self, error: Error) -> Error {
        error.in_tensor(&self.tensor).in_file(&self.file)
    }
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
        let shared = Arc::new(Shared::new(&stream));
        let backend = Backend::current()?;
        Ok(CompressedMatrix { stream, shared, backend, activations: Activations::default(), origin: None })
    }

    /// Opens a matrix that was opened before, with what was made for it then.
    pub(crate) fn reopened(
        stream: TileStream<'a>,
        shared: Arc<Shared>,
        backend: Backend,
        origin: Option<Arc<Origin>>,
    ) -> CompressedMatrix<'a> {
        CompressedMatrix { stream, shared, backend, activations: Activations::default(), origin }
    }

    /// Names a tile, and the tensor and file if they are known, in an error.
    pub(crate) fn in_tile(&self, tile: usize, error: Error) -> Error {
        self.named(self.stream.in_tile(tile, error))
    }

    fn named(&self, error: Error) -> Error {
        match &self.origin {
            Some(origin) => origin.name(error),
            None => error,
        }
    }

    /// The backend that it decodes with.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Decodes with another backend, which must be available.
    pub fn with_backend(mut self, backend: Backend) -> CompressedMatrix<'a> {
        assert!(backend.available(), "backend {} is not available on this machine", backend.name());
        self.backend = backend;
        self
    }

    /// What it is multiplied with, if it is INT8 with scales.
    pub fn activations(&self) -> Activations {
        self.activations
    }

    /// Chooses what it is multiplied with, if it is INT8 with scales.
    pub fn with_activations(mut self, activations: Activations) -> CompressedMatrix<'a> {
        self.activations = activations;
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
        strips
            .into_par_iter()
            .try_for_each_init(<[Work; 2]>::default, |work, (rows, out)| self.decode_strip(rows, out, work))
    }

    /// Rows that lie within one band of each tile column. Two columns are decoded side by side.
    fn decode_strip(&self, rows: Range<usize>, out: &mut [u8], work: &mut [Work; 2]) -> Result<()> {
        let across = self.geometry().tile_cols();
        let first = rows.start / TILE * across;
        let band = rows.start % TILE / BAND_ROWS;
        let [left, right] = work;
        for col in (0..across).step_by(2) {
            if col + 1 < across {
                let bands = [self.open_band(first + col, band)?, self.open_band(first + col + 1, band)?];
                let [a, b] = [self.view(&bands[0]), self.view(&bands[1])];
                let done = cpu::symbols(self.backend, [&a, &b], [&mut left.scratch, &mut right.scratch]);
                self.place(&bands[0], &a, done[0], &rows, out, left)?;
                self.place(&bands[1], &b, done[1], &rows, out, right)?;
            } else {
                let opened = self.open_band(first + col, band)?;
                let view = self.view(&opened);
                let [done] = cpu::symbols(self.backend, [&view], [&mut left.scratch]);
                self.place(&opened, &view, done, &rows, out, left)?;
            }
        }
        Ok(())
    }

    /// Joins a band and puts those of its weights that lie in `rows` into `out`, which holds those rows.
    fn place(
        &self,
        opened: &OpenBand,
        view: &Band,
        finished: bool,
        rows: &Range<usize>,
        out: &mut [u8],
        work: &mut Work,
    ) -> Result<()> {
        let size = self.dtype().size();
        let stride = self.geometry().cols * size;
        let part = opened.rect;
        let (skip, at) = (rows.start - part.row, part.col * size);
        if skip == 0 && rows.len() == part.rows {
            return self.join(opened, view, finished, work, &mut out[at..], stride);
        }
        // Some rows of a band: decode all of it aside.
        let mut aside = std::mem::take(&mut work.aside);
        aside.resize(part.weights() * size, 0);
        let joined = self.join(opened, view, finished, work, &mut aside, part.cols * size);
        for (row, weights) in aside.chunks_exact(part.cols * size).skip(skip).take(rows.len()).enumerate() {
            out[row * stride + at..][..weights.len()].copy_from_slice(weights);
        }
        work.aside = aside;
        joined
    }

    /// One tile, row by row in the matrix's dtype, and its place in the matrix.
    pub fn decode_tile(&self, index: usize) -> Result<(Rect, Vec<u8>)> {
        let rect = self.tile_rect(index)?;
        let mut out = vec![0; rect.weights() * self.dtype().size()];
        self.decode_tile_into(index, &mut out)?;
        Ok((rect, out))
    }

    /// As [`CompressedMatrix::decode_tile`], into `out`, which has just its size.
    pub fn decode_tile_into(&self, index: usize, out: &mut [u8]) -> Result<()> {
        let rect = self.tile_rect(index)?;
        let stride = rect.cols * self.dtype().size();
        if out.len() != rect.rows * stride {
            return Err(Error::Invalid(format!(
                "tile {index} into {} bytes: {} are needed",
                out.len(),
                rect.rows * stride
            )));
        }
        let mut work = Work::default();
        for (band, out) in out.chunks_mut(BAND_ROWS * stride).enumerate().take(rect.bands()) {
            let opened = self.open_band(index, band)?;
            let view = self.view(&opened);
            let [done] = cpu::symbols(self.backend, [&view], [&mut work.scratch]);
            self.join(&opened, &view, done, &mut work, out, stride)?;
        }
        Ok(())
    }

    /// Calls `each` with the high part of every weight of a tile: an exponent, a class of integers, or an INT8
    /// difference. Escaped rate-coded weights give their escape class.
    pub(crate) fn for_each_class(&self, tile: usize, scratch: &mut Scratch, mut each: impl FnMut(u8)) -> Result<()> {
        for band in 0..self.geometry().tile(tile).bands() {
            let opened = self.open_band(tile, band)?;
            let highs = band::high_parts_of(&self.view(&opened), scratch);
            highs.map_err(|e| self.in_tile(tile, e))?.iter().for_each(|&high| each(high));
        }
        Ok(())
    }

    /// Compares the checksums of all tiles that have not been used yet, in parallel. Nothing is decoded.
    ///
    /// # Errors
    /// If a tile's bytes are not what they were, or do not divide into bands.
    pub fn check_tiles(&self) -> Result<()> {
        (0..self.geometry().tiles()).into_par_iter().try_for_each(|tile| self.open_band(tile, 0).map(drop))
    }

    /// Where tile `index` lies, if there is one.
    fn tile_rect(&self, index: usize) -> Result<Rect> {
        let tiles = self.geometry().tiles();
        if index >= tiles {
            return Err(Error::Invalid(format!("tile {index} of a matrix with {tiles} tiles")));
        }
        Ok(self.geometry().tile(index))
    }

    /// Finds a band (substream) of a tile; compares the tile's checksum when it is first used.
    pub(crate) fn open_band(&self, tile: usize, band: usize) -> Result<OpenBand<'_>> {
        let (byte, bit) = (&self.shared.checked[tile / 8], 1u8 << (tile % 8));
        let fresh = byte.load(Ordering::Relaxed) & bit == 0;
        let opened = self.stream.tile_with(tile, if fresh { Checks::On } else { Checks::Off });
        let opened = opened.map_err(|e| self.named(e))?;
        if fresh {
            byte.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(OpenBand { tile: opened, band, rect: opened.rect.band(band) })
    }

    /// What a decoder needs of it.
    pub(crate) fn view<'s>(&'s self, band: &'s OpenBand<'s>) -> Band<'s> {
        let table = self.shared.table.get_or_init(|| self.stream.decode_table());
        self.stream.band(&band.tile, band.band, table)
    }

    /// The second half of decoding a band, in the matrix's dtype.
    fn join(
        &self,
        opened: &OpenBand,
        view: &Band,
        finished: bool,
        work: &mut Work,
        out: &mut [u8],
        stride: usize,
    ) -> Result<()> {
        let result = if self.stores_dtype() {
            cpu::join(self.backend, view, finished, &mut work.scratch, out, stride)
        } else {
            let width = self.plan().value_bytes();
            work.values.resize(view.weights() * width, 0);
            let stride_aside = view.cols * width;
            let joined = cpu::join(self.backend, view, finished, &mut work.scratch, &mut work.values, stride_aside);
            cpu::convert(self.backend, &work.values, view.cols, width, self.dtype(), out, stride);
            joined
        };
        result.map_err(|e| self.in_tile(opened.tile.index, e))
    }

    /// True if decoded values are the matrix's own bits already.
    fn stores_dtype(&self) -> bool {
        let own = self.plan().kind == Kind::of(self.dtype()) && !self.plan().quantised();
        own || self.plan().quantised() && self.dtype() == Dtype::F32
    }
}

/// What is made once for a matrix, however often it is opened.
#[derive(Debug)]
pub(crate) struct Shared {
    table: OnceLock<DecodeTable>,
    /// One bit for each tile whose checksum has been compared.
    checked: Vec<AtomicU8>,
}

impl Shared {
    pub(crate) fn new(stream: &TileStream) -> Shared {
        let checked = (0..stream.geometry().tiles().div_ceil(8)).map(|_| AtomicU8::new(0)).collect();
        Shared { table: OnceLock::new(), checked }
    }
}

/// A band whose tile's checksum has been compared.
pub(crate) struct OpenBand<'a> {
    tile: Tile<'a>,
    band: usize,
    /// Its place in the matrix.
    pub(crate) rect: Rect,
}

/// Buffers for one band being decoded.
#[derive(Default)]
struct Work {
    scratch: Scratch,
    values: Vec<u8>,
    aside: Vec<u8>,
}

//! The second pass: tiles to bytes, in parallel, each decoded again and compared.

use rayon::prelude::*;

use super::analyse::{Analysis, Buffers, Candidates, analyse, residuals};
use super::options::Options;
use super::source::Source;
use crate::codec::band::{self, BandCodes, ESCAPE_CODE, Scratch, align};
use crate::codec::levels;
use crate::codec::quant::Scales;
use crate::codec::{Coding, DecodeTable, Dtype, EncodeTable, FreqTable, Kind, Plan, Predictor, ScaleLayout};
use crate::cpu::{self, Backend};
use crate::format::checksum;
use crate::format::header::{HASH_OFFSET, Header, Record};
use crate::format::stream::Tile;
use crate::{Error, Result};

/// Tiles that a thread encodes before the finished ones are handed on: what bounds the memory.
const TILES_PER_THREAD: usize = 4;

/// Compresses a row-major little-endian `rows × cols` matrix of `dtype` into a tile stream.
///
/// A matrix that would not shrink is stored raw; [`crate::CompressedMatrix::plan`] says so. INT8 and rate coding apply
/// to BF16, F16 and F32; other dtypes, and INT8 of a matrix with a NaN or infinity, are coded losslessly.
///
/// # Errors
/// If the shape does not fit the data, or the options contradict each other.
pub fn compress(data: &[u8], dtype: Dtype, rows: usize, cols: usize, options: &Options) -> Result<Vec<u8>> {
    let source = Source::new(data, dtype, rows, cols)?;
    let mut out = Vec::new();
    let encoder = MatrixEncoder::new(source, options)?;
    encoder.run(&mut out)?;
    if out.len() >= data.len() && encoder.plan().class_bits > 0 {
        out.clear();
        MatrixEncoder::stored(source, options)?.run(&mut out)?;
    }
    Ok(out)
}

/// What came of encoding a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EncodeReport {
    /// Bytes of the tile stream.
    pub bytes: u64,
    /// XXH3 of its preamble.
    pub hash: u64,
    /// Sum of the squared weights, for quantised kinds.
    pub signal: f64,
    /// Sum of the squared errors, for quantised kinds.
    pub noise: f64,
}

impl EncodeReport {
    /// Signal-to-noise ratio in dB; `None` for lossless kinds.
    pub fn snr(&self) -> Option<f64> {
        (self.noise > 0.0).then(|| 10.0 * (self.signal / self.noise).log10())
    }
}

/// A matrix whose first pass is done, ready to be written tile by tile.
#[derive(Debug)]
pub struct MatrixEncoder<'a> {
    source: Source<'a>,
    analysis: Analysis,
    encode_table: Option<EncodeTable>,
    decode_table: DecodeTable,
    verify: bool,
}

/// One encoded tile.
struct EncodedTile {
    bytes: Vec<u8>,
    escapes: usize,
    predictor: Predictor,
    signal: f64,
    noise: f64,
}

/// Buffers of one encoding thread.
#[derive(Default)]
struct Work {
    buffers: Buffers,
    scratch: Scratch,
    decoded: Vec<u8>,
}

/// Where a tile stream goes: a preamble is written last, over the place kept for it.
pub trait Sink {
    /// Appends bytes.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;
    /// Overwrites the first bytes that this matrix appended.
    fn rewrite(&mut self, preamble: &[u8]) -> Result<()>;
    /// Called after every batch of tiles with the source bytes done; may cancel.
    fn progress(&mut self, _source_bytes: u64) -> Result<()> {
        Ok(())
    }
}

impl Sink for Vec<u8> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }

    fn rewrite(&mut self, preamble: &[u8]) -> Result<()> {
        self[..preamble.len()].copy_from_slice(preamble);
        Ok(())
    }
}

impl<'a> MatrixEncoder<'a> {
    /// Analyses the matrix: kind, classes, frequencies, scales, predictors.
    pub fn new(source: Source<'a>, options: &Options) -> Result<MatrixEncoder<'a>> {
        Ok(Self::with(source, analyse(&source, options)?, options.verify))
    }

    /// Every bit as it is, without classes.
    pub fn stored(source: Source<'a>, options: &Options) -> Result<MatrixEncoder<'a>> {
        let plan = Plan::raw(Kind::of(source.dtype), source.dtype, ScaleLayout::None);
        let analysis = Analysis { plan, scales: Vec::new(), candidates: Vec::new() };
        Ok(Self::with(source, analysis, options.verify))
    }

    fn with(source: Source<'a>, analysis: Analysis, verify: bool) -> MatrixEncoder<'a> {
        let rans = analysis.plan.coding == Coding::Rans;
        let freqs = analysis.plan.freqs.clone().filter(|_| rans);
        let encode_table = freqs.as_ref().map(EncodeTable::new);
        let decode_table = DecodeTable::new(&freqs.unwrap_or_else(|| FreqTable::from_counts(&[0; 256])));
        MatrixEncoder { source, analysis, encode_table, decode_table, verify }
    }

    /// How the matrix will be coded.
    pub fn plan(&self) -> &Plan {
        &self.analysis.plan
    }

    /// Encodes all tiles and writes the stream. The bytes do not depend on the number of threads.
    pub fn run(&self, sink: &mut impl Sink) -> Result<EncodeReport> {
        let geometry = self.source.geometry;
        let mut header = Header { plan: self.plan().clone(), geometry, hash: 0, total: 0 };
        let backend = Backend::current()?;
        let mut records = Vec::with_capacity(geometry.tiles());
        let mut report = EncodeReport::default();
        let mut offset = header.preamble_bytes();
        sink.append(&vec![0; offset as usize])?;
        let batch = TILES_PER_THREAD * rayon::current_num_threads();
        let mut done = 0;
        for first in (0..geometry.tiles()).step_by(batch) {
            let range = first..geometry.tiles().min(first + batch);
            let encoded: Result<Vec<EncodedTile>> = range
                .clone()
                .into_par_iter()
                .map_init(Work::default, |work, tile| self.encode_tile(tile, backend, work))
                .collect();
            for (tile, encoded) in range.zip(encoded?) {
                let rect = geometry.tile(tile);
                records.push(Record {
                    offset,
                    hash: checksum::of_tile(tile, &encoded.bytes),
                    size: encoded.bytes.len() as u32,
                    escapes: encoded.escapes as u32,
                    predictor: encoded.predictor,
                    bands: rect.bands() as u16,
                });
                sink.append(&encoded.bytes)?;
                offset += encoded.bytes.len() as u64;
                report.signal += encoded.signal;
                report.noise += encoded.noise;
                done += (rect.weights() * self.source.dtype.size()) as u64;
            }
            sink.progress(done)?;
        }
        header.total = offset;
        report.bytes = offset;
        let mut preamble = header.to_bytes().to_vec();
        preamble.extend(self.plan().freqs.as_ref().map_or([0; 512], FreqTable::to_bytes));
        records.iter().for_each(|r| preamble.extend(r.to_bytes()));
        preamble.extend(&self.analysis.scales);
        align(&mut preamble);
        report.hash = checksum::with_hole(&preamble, HASH_OFFSET);
        preamble[HASH_OFFSET..HASH_OFFSET + 8].copy_from_slice(&report.hash.to_le_bytes());
        sink.rewrite(&preamble)?;
        Ok(report)
    }

    fn encode_tile(&self, tile: usize, backend: Backend, work: &mut Work) -> Result<EncodedTile> {
        let plan = self.plan();
        let rect = self.source.geometry.tile(tile);
        let predictor = self.predictor(tile, &mut work.buffers);
        let table_bytes = (8 * rect.bands()).next_multiple_of(16);
        let mut bytes = Vec::with_capacity(rect.weights() * self.source.dtype.size() + table_bytes);
        bytes.resize(table_bytes, 0);
        let mut escapes = 0;
        for index in 0..rect.bands() {
            let band = rect.band(index);
            let buffers = &mut work.buffers;
            let scales = Scales::of(plan.scale, &self.analysis.scales, self.source.geometry, tile, &band);
            cpu::vectorize(
                backend,
                #[inline(always)]
                || {
                    self.source.codes(plan, scales, band, &mut buffers.codes, &mut buffers.values);
                },
            );
            if predictor != Predictor::None {
                buffers.bytes.clear();
                buffers.bytes.extend(buffers.codes.iter().map(|&c| c as u8));
                buffers.residuals.resize(buffers.bytes.len(), 0);
                predictor.forward(&buffers.bytes, band.cols, &mut buffers.residuals);
                buffers.codes.iter_mut().zip(&buffers.residuals).for_each(|(code, &r)| *code = r.into());
            }
            let sizes = cpu::vectorize(
                backend,
                #[inline(always)]
                || {
                    levels::shifts(&scales, band.cols, &mut buffers.shifts);
                    let Buffers { codes, values, shifts, .. } = &*buffers;
                    let codes = BandCodes { codes, values, shifts };
                    band::encode(plan, self.encode_table.as_ref(), codes, &mut work.scratch, &mut bytes)
                },
            )?;
            bytes[8 * index..8 * index + 4].copy_from_slice(&(sizes.coded as u32).to_le_bytes());
            bytes[8 * index + 4..8 * index + 8].copy_from_slice(&(sizes.escapes as u32).to_le_bytes());
            escapes += sizes.escapes;
        }
        let mut encoded = EncodedTile { bytes, escapes, predictor, signal: 0.0, noise: 0.0 };
        if self.verify || plan.quantised() {
            self.check(tile, &mut encoded, backend, work)?;
        }
        Ok(encoded)
    }

    /// The predictor that makes the tile smallest under the matrix's table.
    fn predictor(&self, tile: usize, buffers: &mut Buffers) -> Predictor {
        let plan = self.plan();
        let candidates = self.analysis.candidates.get(tile).copied().unwrap_or_default();
        let modes = || Predictor::ALL.into_iter().filter(|&m| Candidates::contains(candidates, m));
        if !candidates.several() {
            return modes().next().unwrap_or_default();
        }
        let costs = plan.freqs.as_ref().map_or([None; 256], FreqTable::costs);
        let class = plan.map.lookup(3);
        let mut size = |mode| {
            let mut total = Some(0u64);
            residuals(&self.source, plan, &self.analysis.scales, tile, mode, buffers, |residuals| {
                let cost = |&r: &u8| match plan.class_bits {
                    8 => costs[r as usize],
                    _ => Some(u64::from(class[(r >> 4) as usize] == 7)),
                };
                let sum = residuals.iter().try_fold(0, |sum, r| cost(r).map(|c| sum + c));
                total = total.zip(sum).map(|(a, b)| a + b);
            });
            total
        };
        // A predictor whose differences meet a frequency of 0 cannot be used; the sampled best always can.
        let sized: Vec<_> = modes().filter_map(|mode| size(mode).map(|bits| (bits, mode))).collect();
        sized.into_iter().min_by_key(|&(bits, mode)| (bits, mode as u8)).map_or(Predictor::None, |(_, mode)| mode)
    }

    /// Decodes a tile again, compares it with its source, and adds up the quantisation error.
    fn check(&self, tile: usize, encoded: &mut EncodedTile, backend: Backend, work: &mut Work) -> Result<()> {
        let plan = self.plan();
        let rect = self.source.geometry.tile(tile);
        let (width, lossless) = (plan.value_bytes(), !plan.quantised());
        let record = Record {
            size: encoded.bytes.len() as u32,
            escapes: encoded.escapes as u32,
            predictor: encoded.predictor,
            bands: rect.bands() as u16,
            ..Record::default()
        };
        let view = Tile::parse(plan, rect, tile, record, &encoded.bytes)?;
        let (mut signal, mut noise) = (0.0, 0.0);
        for index in 0..rect.bands() {
            let part = rect.band(index);
            let bytes = view.band(plan, index);
            let scales = Scales::of(plan.scale, &self.analysis.scales, self.source.geometry, tile, &part);
            let (table, predictor) = (&self.decode_table, encoded.predictor);
            let band = band::Band { plan, table, bytes, predictor, scales, rows: part.rows, cols: part.cols };
            work.decoded.resize(part.weights() * width, 0);
            let stride = part.cols * width;
            cpu::decode_band(backend, &band, &mut work.scratch, &mut work.decoded, stride)?;
            if lossless && plan.kind == Kind::of(self.source.dtype) {
                let mut rows = self.source.rows(part).zip(work.decoded.chunks(stride));
                if rows.any(|(source, decoded)| source != decoded) {
                    return Err(Error::Verify);
                }
                continue;
            }
            let Work { buffers, decoded, .. } = &mut *work;
            let same = cpu::vectorize(
                backend,
                #[inline(always)]
                || {
                    self.source.codes(plan, scales, part, &mut buffers.codes, &mut buffers.values);
                    let rows = buffers.codes.chunks(part.cols).zip(decoded.chunks(stride)).enumerate();
                    let values = &buffers.values;
                    let mut same = true;
                    for (row, (codes, decoded)) in rows {
                        let values = values.get(row * part.cols..(row + 1) * part.cols).unwrap_or(&[]);
                        same &= compare(plan, codes, values, scales.row(row), decoded);
                        let (s, n) = power(values, decoded);
                        signal += s;
                        noise += n;
                    }
                    same
                },
            );
            if !same {
                return Err(Error::Verify);
            }
        }
        (encoded.signal, encoded.noise) = (signal, noise);
        Ok(())
    }
}

/// True if every decoded value is what its code stands for.
#[inline(always)]
fn compare(plan: &Plan, codes: &[u32], values: &[f32], scale: f32, decoded: &[u8]) -> bool {
    let words = || decoded.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let differ = match plan.kind {
        Kind::Int8 => {
            codes.iter().zip(words()).fold(0, |d, (&q, got)| d | ((f32::from(q as u8 as i8) * scale).to_bits() ^ got))
        }
        Kind::Rate => {
            let escape = (1 << plan.class_bits) - 1;
            let expected = |q: u32, value: f32| {
                let escaped = q == ESCAPE_CODE || plan.rate_class(q as i32) == escape;
                if escaped { value.to_bits() } else { (q as i32 as f32 * scale).to_bits() }
            };
            codes.iter().zip(values).zip(words()).fold(0, |d, ((&q, &value), got)| d | (expected(q, value) ^ got))
        }
        // BF16s of a wider dtype.
        _ => {
            let got = decoded.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])));
            codes.iter().zip(got).fold(0, |d, (&code, got)| d | (code ^ got))
        }
    };
    differ == 0
}

/// Sums of the squared values and of the squared errors of their decoded `f32`s, over finite values.
#[inline(always)]
fn power(values: &[f32], decoded: &[u8]) -> (f64, f64) {
    // Eight sums side by side, so that the loop vectorises.
    let (mut signal, mut noise) = ([0f64; 8], [0f64; 8]);
    for (values, decoded) in values.chunks(8).zip(decoded.chunks(32)) {
        for (lane, (&value, b)) in values.iter().zip(decoded.chunks_exact(4)).enumerate() {
            let got = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            let (value, error) = if value.is_finite() { (value, got - value) } else { (0.0, 0.0) };
            signal[lane] += f64::from(value) * f64::from(value);
            noise[lane] += f64::from(error) * f64::from(error);
        }
    }
    (signal.iter().sum(), noise.iter().sum())
}

//! One band: the coded classes, raw planes and escapes of up to 64 rows of a tile, encoded and decoded.
//!
//! The decoder here is the truth that every faster backend must equal byte for byte. It is total: on damaged bytes it
//! writes some weights and reports that the stream did not end as it must.

use super::geometry::{BAND_WEIGHTS, padded};
use super::kind::{Coding, Kind};
use super::levels;
use super::plan::Plan;
use super::planes;
use super::predictor::Predictor;
use super::quant::{ESCAPED, Scales};
use super::rans::{self, Decoder};
use super::table::{DecodeTable, EncodeTable};
use crate::{Error, Result};

/// The three byte ranges of a band.
#[derive(Clone, Copy, Debug)]
pub struct BandBytes<'a> {
    /// Classes: plane bytes, or rANS states and words.
    pub coded: &'a [u8],
    /// Raw planes.
    pub raw: &'a [u8],
    /// Escape entries, in the order of their markers.
    pub escapes: &'a [u8],
}

/// Everything a decoder needs for one band.
#[derive(Clone, Copy, Debug)]
pub struct Band<'a> {
    /// How the matrix is coded.
    pub plan: &'a Plan,
    /// Decode table of the plan's frequencies.
    pub table: &'a DecodeTable,
    /// The band's bytes.
    pub bytes: BandBytes<'a>,
    /// Predictor of its tile.
    pub predictor: Predictor,
    /// Scales of its rows.
    pub scales: Scales<'a>,
    /// Rows of the band, 1 to 64.
    pub rows: usize,
    /// Columns of the band, 1 to 256.
    pub cols: usize,
}

impl Band<'_> {
    /// Number of weights.
    pub fn weights(&self) -> usize {
        self.rows * self.cols
    }
}

/// Buffers that a thread reuses from band to band.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Bytes of the class plane.
    pub(crate) plane: Vec<u8>,
    /// One class for each weight.
    pub(crate) classes: Vec<u8>,
    /// Raw bits, then codes.
    pub(crate) codes: Vec<u32>,
    /// INT8 weights.
    pub(crate) bytes: Vec<u8>,
    /// What exponents are raised by.
    pub(crate) shifts: Vec<u8>,
    /// rANS words of the encoder.
    pub(crate) words: Vec<u16>,
}

/// Encoding of one band: sizes for the tile's band table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BandSizes {
    /// Bytes of the coded classes.
    pub coded: usize,
    /// Number of escapes.
    pub escapes: usize,
}

/// Sections of a band start at multiples of 16 bytes.
pub const ALIGN: usize = 16;

/// Appends zeros up to the next multiple of 16.
pub(crate) fn align(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(ALIGN), 0);
}

/// A band's weights as the encoder takes them: the codes of the plan's kind, and for rate coding also the values, from
/// which escapes are taken.
#[derive(Clone, Copy, Debug)]
pub struct BandCodes<'a> {
    /// Stored bits of float kinds, INT8 differences (predicted already), or rate-coded integers.
    pub codes: &'a [u32],
    /// The weights as `f32`, for rate coding only.
    pub values: &'a [f32],
    /// What exponents are lowered by before they are classed; empty without levels.
    pub shifts: &'a [u8],
}

/// The class of each code; for escapes the escape class. Fills `classes` to the padded length.
#[inline(always)]
pub fn classify(plan: &Plan, codes: &[u32], shifts: &[u8], classes: &mut Vec<u8>) {
    let filler = match plan.kind {
        Kind::Rate => plan.rate_bias() as u8,
        _ => 0,
    };
    classes.clear();
    classes.reserve(padded(codes.len()));
    match (plan.kind, plan.float_bits()) {
        _ if plan.class_bits == 0 => {}
        (Kind::Rate, _) => classes.extend(codes.iter().map(|&q| plan.rate_class(q as i32) as u8)),
        (_, Some(float)) => {
            // In passes of their own, the first two of which vectorise.
            classes.extend(codes.iter().map(|&c| float.high(c)));
            classes.iter_mut().zip(shifts).for_each(|(high, &shift)| *high = high.wrapping_sub(shift));
            let lookup = plan.map.lookup(plan.class_bits);
            classes.iter_mut().for_each(|high| *high = lookup[*high as usize]);
        }
        _ if plan.class_bits == 8 => classes.extend(codes.iter().map(|&c| c as u8)),
        _ => {
            let lookup = plan.map.lookup(plan.class_bits);
            classes.extend(codes.iter().map(|&c| lookup[(c >> 4 & 15) as usize]));
        }
    }
    classes.resize(padded(codes.len()), filler);
}

/// Packs classes into symbols: pairs for 4-bit classes (the first weight in the low nibble), bytes for others.
#[inline(always)]
pub fn symbols(plan: &Plan, classes: &[u8], plane: &mut Vec<u8>) {
    plane.clear();
    if plan.class_bits != 4 {
        plane.extend_from_slice(classes);
        return;
    }
    plane.resize(classes.len() / 2, 0);
    for (symbol, pair) in plane.iter_mut().zip(classes.chunks_exact(2)) {
        let pair = u16::from_le_bytes([pair[0], pair[1]]);
        *symbol = (pair | pair >> 4) as u8;
    }
}

/// Appends a band's bytes to `out`: classes, raw planes and escapes, each padded to 16 bytes.
#[inline(always)]
pub fn encode(
    plan: &Plan,
    table: Option<&EncodeTable>,
    band: BandCodes,
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> Result<BandSizes> {
    let n = band.codes.len();
    let codes = band.codes;
    let mut sizes = BandSizes::default();
    let start = out.len();
    let Scratch { classes, plane, words, .. } = scratch;
    classify(plan, codes, band.shifts, classes);
    match (plan.coding, table) {
        (Coding::Plain, _) => planes::pack_field(&classes[..n], plan.class_bits, out, u32::from),
        (Coding::Rans, Some(table)) => {
            symbols(plan, classes, plane);
            if !rans::encode(plane, table, words, out) {
                return Err(Error::Stream("a class has no frequency in the matrix's table"));
            }
        }
        (Coding::Rans, None) => return Err(Error::Stream("a rANS stage needs a table")),
    }
    sizes.coded = out.len() - start;
    align(out);
    match plan.float_bits() {
        Some(float) if plan.class_bits > 0 => planes::pack_field(codes, plan.raw_bits, out, |code| float.raw(code)),
        _ => planes::pack_field(codes, plan.raw_bits, out, |code| code),
    }
    align(out);
    if let Some(escape) = plan.escape_class() {
        let start = out.len();
        // Escapes are rare: whole runs without one are passed over.
        let runs = classes[..n].chunks(64).enumerate().filter(|(_, run)| run.contains(&escape));
        let marked = runs.flat_map(|(at, run)| {
            run.iter().enumerate().filter(|&(_, &class)| class == escape).map(move |(i, _)| 64 * at + i)
        });
        match plan.float_bits() {
            _ if plan.kind == Kind::Rate => marked.for_each(|i| out.extend(band.values[i].to_le_bytes())),
            Some(float) => marked.for_each(|i| out.push(float.high(codes[i]))),
            None => marked.for_each(|i| out.push((codes[i] >> 4 & 15) as u8)),
        }
        sizes.escapes = (out.len() - start) / plan.kind.escape_bytes();
        align(out);
    }
    Ok(sizes)
}

/// Bytes that [`encode`] appends for a band of `n` weights with these sizes.
pub fn encoded_bytes(plan: &Plan, n: usize, sizes: BandSizes) -> usize {
    let escapes = sizes.escapes * plan.kind.escape_bytes();
    [sizes.coded, plan.raw_bytes(n), escapes].iter().map(|bytes| bytes.next_multiple_of(ALIGN)).sum()
}

/// Decodes the classes of a band into `scratch.classes`, one for each weight.
fn decode_classes(band: &Band, scratch: &mut Scratch) -> Result<()> {
    let n = band.weights();
    let Scratch { plane, classes, codes, .. } = scratch;
    classes.clear();
    classes.resize(padded(n), 0);
    if band.plan.coding == Coding::Plain {
        codes.clear();
        codes.resize(n, 0);
        planes::unpack_field(band.bytes.coded, band.plan.class_bits, codes);
        classes.iter_mut().zip(codes.iter()).for_each(|(class, &c)| *class = c as u8);
        return Ok(());
    }
    plane.clear();
    plane.resize(band.plan.symbols(n), 0);
    let mut decoder = Decoder::new(band.bytes.coded);
    decoder.decode(band.table, plane);
    unpack_symbols(band.plan, plane, classes);
    if decoder.finished() { Ok(()) } else { Err(UNFINISHED) }
}

/// What a decoder reports when states or word count are not what they must be at the end.
pub const UNFINISHED: Error = Error::Stream("rANS states or word count are wrong at the end");
/// What a decoder reports when there are more or fewer escape entries than markers.
pub const ESCAPE_COUNT: Error = Error::Stream("escape entries and markers differ in number");

/// The inverse of [`symbols`].
#[inline(always)]
pub(crate) fn unpack_symbols(plan: &Plan, plane: &[u8], classes: &mut [u8]) {
    match plan.class_bits {
        4 => classes.chunks_exact_mut(2).zip(plane).for_each(|(pair, &b)| {
            pair[0] = b & 15;
            pair[1] = b >> 4;
        }),
        _ => classes.iter_mut().zip(plane).for_each(|(class, &b)| *class = b),
    }
}

/// Decodes a band's weights into rows of `stride` bytes at `out`: stored codes, or `f32`s for quantised kinds,
/// little-endian.
///
/// Writes every row even when it returns an error, so that damaged data is noticed by the caller and harmless.
pub fn decode(band: &Band, scratch: &mut Scratch, out: &mut [u8], stride: usize) -> Result<()> {
    debug_assert!(band.weights() <= BAND_WEIGHTS);
    let classes = decode_classes(band, scratch);
    let joined = join(band, scratch, out, stride);
    classes.and(joined)
}

/// Turns `scratch.classes` with a band's raw bits and escapes into weights. Shared by all backends: those with vector
/// units compile it again for them.
#[inline(always)]
pub(crate) fn join(band: &Band, scratch: &mut Scratch, out: &mut [u8], stride: usize) -> Result<()> {
    if band.plan.kind == Kind::Int8 {
        let joined = join_int8(band, scratch);
        write_int8(band, &scratch.bytes, out, stride);
        return joined;
    }
    let n = band.weights();
    let Scratch { classes, codes, shifts, .. } = scratch;
    codes.resize(n, 0);
    planes::unpack_field(band.bytes.raw, band.plan.raw_bits, codes);
    let mut left = Escapes::of(band);
    let classes = &mut classes[..n];
    if band.plan.kind == Kind::Rate {
        join_rate(band, classes, codes, &mut left);
    } else {
        levels::shifts(&band.scales, band.cols, shifts);
        join_float(band, classes, shifts, codes, &mut left);
    }
    write(codes, band.plan.value_bytes(), band.cols, out, stride);
    left.finish()
}

/// Decodes an INT8 band's integers, row by row, to `scratch.bytes`.
pub(crate) fn decode_int8(band: &Band, scratch: &mut Scratch) -> Result<()> {
    let classes = decode_classes(band, scratch);
    let joined = join_int8(band, scratch);
    classes.and(joined)
}

/// Turns `scratch.classes` with an INT8 band's raw bits and escapes into integers, in `scratch.bytes`.
#[inline(always)]
pub(crate) fn join_int8(band: &Band, scratch: &mut Scratch) -> Result<()> {
    let n = band.weights();
    let Scratch { classes, codes, bytes, .. } = scratch;
    if band.plan.raw_bits > 0 {
        codes.resize(n, 0);
        planes::unpack_field(band.bytes.raw, band.plan.raw_bits, codes);
    }
    let mut left = Escapes::of(band);
    int8_bytes(band, &mut classes[..n], codes, &mut left, bytes);
    band.predictor.inverse(bytes, band.cols);
    left.finish()
}

/// Escape entries not yet taken.
struct Escapes<'a> {
    bytes: &'a [u8],
    width: usize,
    missing: bool,
}

impl<'a> Escapes<'a> {
    /// All of a band.
    fn of(band: &Band<'a>) -> Escapes<'a> {
        Escapes { bytes: band.bytes.escapes, width: band.plan.kind.escape_bytes(), missing: false }
    }

    /// An error unless every marker had an entry and none is left.
    fn finish(&self) -> Result<()> {
        if self.missing || !self.bytes.is_empty() { Err(ESCAPE_COUNT) } else { Ok(()) }
    }

    /// The next entry as a number; zero if there is none.
    fn next(&mut self) -> u32 {
        let Some((entry, rest)) = self.bytes.split_at_checked(self.width) else {
            self.missing = true;
            return 0;
        };
        self.bytes = rest;
        entry.iter().rev().fold(0, |value, &b| value << 8 | u32::from(b))
    }
}

/// Replaces each class by its high part, in place.
#[inline(always)]
fn high_parts(band: &Band, classes: &mut [u8], shifts: &[u8], escapes: &mut Escapes) {
    let map = &band.plan.map;
    let mut shifts = shifts.iter();
    for class in classes {
        let shift = shifts.next().copied().unwrap_or(0);
        *class = if Some(*class) == map.escape {
            escapes.next() as u8
        } else {
            map.values[(*class & 15) as usize].wrapping_add(shift)
        };
    }
}

/// The high part of every weight of a band: for statistics.
pub(crate) fn high_parts_of<'s>(band: &Band, scratch: &'s mut Scratch) -> Result<&'s [u8]> {
    decode_classes(band, scratch)?;
    let classes = &mut scratch.classes[..band.weights()];
    if band.plan.uses_map() {
        // Without shifts: entropies are those of what is classed.
        high_parts(band, classes, &[], &mut Escapes { bytes: band.bytes.escapes, width: 1, missing: false });
    }
    Ok(classes)
}

#[inline(always)]
fn join_float(band: &Band, classes: &mut [u8], shifts: &[u8], codes: &mut [u32], escapes: &mut Escapes) {
    let Some(float) = band.plan.float_bits() else {
        return;
    };
    if band.plan.class_bits == 0 {
        return; // the raw bits are the code
    }
    high_parts(band, classes, shifts, escapes);
    for (code, &high) in codes.iter_mut().zip(classes.iter()) {
        *code = float.join(high, *code);
    }
}

#[inline(always)]
fn int8_bytes(band: &Band, classes: &mut [u8], codes: &[u32], escapes: &mut Escapes, bytes: &mut Vec<u8>) {
    bytes.clear();
    match band.plan.class_bits {
        0 => bytes.extend(codes.iter().map(|&c| c as u8)),
        8 => bytes.extend_from_slice(classes),
        _ => {
            high_parts(band, classes, &[], escapes);
            bytes.extend(codes.iter().zip(classes.iter()).map(|(&raw, &high)| high << 4 | (raw as u8 & 15)));
        }
    }
}

#[inline(always)]
fn write_int8(band: &Band, bytes: &[u8], out: &mut [u8], stride: usize) {
    for (row, (weights, out)) in bytes.chunks_exact(band.cols).zip(out.chunks_mut(stride)).enumerate() {
        match band.scales {
            Scales::None | Scales::Levels { .. } => out[..band.cols].copy_from_slice(weights),
            scales => {
                let scale = scales.row(row);
                for (out, &q) in out.chunks_exact_mut(4).zip(weights) {
                    out.copy_from_slice(&(f32::from(q as i8) * scale).to_le_bytes());
                }
            }
        }
    }
}

#[inline(always)]
fn join_rate(band: &Band, classes: &[u8], codes: &mut [u32], escapes: &mut Escapes) {
    let (bias, shift) = (band.plan.rate_bias(), band.plan.raw_bits);
    let escape = band.plan.escape_class();
    for (row, (codes, classes)) in codes.chunks_mut(band.cols).zip(classes.chunks(band.cols)).enumerate() {
        let scale = band.scales.row(row);
        for (code, &class) in codes.iter_mut().zip(classes) {
            let q = (i32::from(class) - bias) << shift | *code as i32;
            *code = (q as f32 * scale).to_bits();
        }
        for (code, _) in codes.iter_mut().zip(classes).filter(|&(_, &class)| Some(class) == escape) {
            *code = escapes.next();
        }
    }
}

/// Writes the low `width` bytes of each code, little-endian, in rows.
#[inline(always)]
fn write(codes: &[u32], width: usize, cols: usize, out: &mut [u8], stride: usize) {
    for (codes, out) in codes.chunks_exact(cols).zip(out.chunks_mut(stride)) {
        match width {
            1 => out.iter_mut().zip(codes).for_each(|(o, &c)| *o = c as u8),
            2 => out.chunks_exact_mut(2).zip(codes).for_each(|(o, &c)| o.copy_from_slice(&(c as u16).to_le_bytes())),
            _ => out.chunks_exact_mut(4).zip(codes).for_each(|(o, &c)| o.copy_from_slice(&c.to_le_bytes())),
        }
    }
}

/// A rate-coded integer that becomes an escape whatever the class width.
pub const ESCAPE_CODE: u32 = ESCAPED as u32;

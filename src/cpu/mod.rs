//! Decoding on the CPU: one scalar truth, faster backends that equal it byte for byte, and the choice between them.
//!
//! A backend turns rANS words into the class plane, joins a plane of BF16 classes with raw bits and escapes, and multiplies
//! BF16 weights ([`dot`]) and INT8 ones ([`int8`]) in registers. The other kinds share loops over bytes, compiled once more
//! for the backend's vector units. All `unsafe` of this layer is in the backend files, behind one safe
//! door each, and in [`zeros`], which hands out parts of a result to the threads that fill them.

use std::sync::OnceLock;

use crate::codec::band::{self, Band, ESCAPE_COUNT, Scratch, UNFINISHED};
use crate::codec::geometry::padded;
use crate::codec::levels;
use crate::codec::{Coding, Dtype, Kind, TILE};
use crate::{Error, Result};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bf16;
pub mod dot;
mod float;
pub mod gemm;
pub mod int8;
pub mod kquant;
#[cfg(target_arch = "aarch64")]
mod neon;
mod rate;
pub mod softmax;
mod spread;
pub mod zeros;

/// A set of CPU instructions to decode with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// Portable Rust, the truth.
    Scalar,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL, VBMI and VBMI2 (Ice Lake, Zen 4 and later).
    Avx512,
    /// AArch64.
    Neon,
}

impl Backend {
    /// All backends, slowest first.
    pub const ALL: [Backend; 4] = [Backend::Scalar, Backend::Neon, Backend::Avx2, Backend::Avx512];

    /// The name that `TAPER_CPU` takes.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Scalar => "scalar",
            Backend::Avx2 => "avx2",
            Backend::Avx512 => "avx512",
            Backend::Neon => "neon",
        }
    }

    /// True if this machine has the instructions.
    pub fn available(self) -> bool {
        match self {
            Backend::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2 => avx2::available(),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512 => avx512::available(),
            #[cfg(target_arch = "aarch64")]
            Backend::Neon => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The backend in use: what the environment variable `TAPER_CPU` (`scalar`, `avx2`, `avx512` or `neon`) asks for,
    /// or the fastest that the machine has.
    ///
    /// # Errors
    /// If `TAPER_CPU` names no backend, or one that this machine lacks.
    pub fn current() -> Result<Backend> {
        static CHOICE: OnceLock<std::result::Result<Backend, String>> = OnceLock::new();
        let choice = CHOICE.get_or_init(|| match std::env::var("TAPER_CPU") {
            Err(_) => Ok(Backend::best()),
            Ok(name) if name.is_empty() => Ok(Backend::best()),
            Ok(name) => match Backend::ALL.into_iter().find(|b| b.name() == name) {
                Some(backend) if backend.available() => Ok(backend),
                Some(_) => Err(format!("TAPER_CPU={name}: this machine does not have these instructions")),
                None => Err(format!("TAPER_CPU={name}: allowed are scalar, avx2, avx512 and neon")),
            },
        });
        choice.clone().map_err(Error::Unsupported)
    }

    /// The fastest backend that the machine has.
    pub(crate) fn best() -> Backend {
        Backend::ALL.into_iter().rev().find(|b| b.available()).unwrap_or(Backend::Scalar)
    }
}

/// Decodes one band into rows of `stride` bytes at `out`, as [`band::decode`] does.
///
/// # Errors
/// If `out` is too short, or the stream does not end as it must; `out` then holds wrong weights.
pub fn decode_band(backend: Backend, band: &Band, scratch: &mut Scratch, out: &mut [u8], stride: usize) -> Result<()> {
    let [finished] = symbols(backend, [band], [scratch]);
    join(backend, band, finished, scratch, out, stride)
}

/// The first half of decoding: rANS words of some bands of one matrix to their class planes, which wait in `scratch`.
/// For each band true if its stream ended as it must. Several bands at once hide each other's latencies.
pub fn symbols<const N: usize>(backend: Backend, bands: [&Band; N], scratch: [&mut Scratch; N]) -> [bool; N] {
    let Some(first) = bands.first() else {
        return [true; N];
    };
    // Without a vector unit the scalar decoder does both halves at once.
    if backend == Backend::Scalar || first.plan.coding == Coding::Plain {
        return [true; N];
    }
    let mut bands_left = bands.iter();
    let planes = scratch.map(|scratch| {
        let symbols = bands_left.next().map_or(0, |band| band.plan.symbols(band.weights()));
        scratch.plane.resize(symbols, 0);
        &mut scratch.plane[..]
    });
    let coded = bands.map(|band| band.bytes.coded);
    match backend {
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 => avx512::rans(coded, first.table, planes),
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 => each(coded, planes, |coded, plane| avx2::rans(coded, first.table, plane)),
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => each(coded, planes, |coded, plane| neon::rans(coded, first.table, plane)),
        _ => [true; N],
    }
}

/// One substream after the other.
fn each<const N: usize>(
    coded: [&[u8]; N],
    planes: [&mut [u8]; N],
    decode: impl Fn(&[u8], &mut [u8]) -> bool,
) -> [bool; N] {
    let mut coded = coded.into_iter();
    planes.map(|plane| coded.next().is_some_and(|coded| decode(coded, plane)))
}

/// The second half of decoding: the class plane of a band, raw bits and escapes to weights, in rows of `stride` bytes at
/// `out`. `finished` is what [`symbols`] returned.
pub fn join(
    backend: Backend,
    band: &Band,
    finished: bool,
    scratch: &mut Scratch,
    out: &mut [u8],
    stride: usize,
) -> Result<()> {
    let row = band.cols * band.plan.value_bytes();
    if stride < row || out.len() < stride * (band.rows - 1) + row {
        return Err(Error::Invalid(format!(
            "a band of {} rows of {row} bytes, {stride} bytes apart, does not fit into {} bytes",
            band.rows,
            out.len()
        )));
    }
    if backend == Backend::Scalar || band.plan.class_bits == 0 {
        return band::decode(band, scratch, out, stride);
    }
    if let Some(mut rows) = rate::Rows::of(backend, band, scratch) {
        vectorize(
            backend,
            #[inline(always)]
            || {
                let mut values = [0.0f32; TILE];
                for (row, out) in out.chunks_mut(stride).take(band.rows).enumerate() {
                    rows.row(row, &mut values);
                    let out = out.as_chunks_mut::<4>().0;
                    out.iter_mut().zip(&values[..band.cols]).for_each(|(out, value)| *out = value.to_le_bytes());
                }
            },
        );
        return ended(finished, rows.finished());
    }
    let joined = match band.plan.kind {
        Kind::Bf16 => join_bf16(backend, band, scratch, out, stride),
        _ => vectorize(
            backend,
            #[inline(always)]
            || {
                fill_classes(band, scratch);
                band::join(band, scratch, out, stride)
            },
        ),
    };
    if finished { joined } else { Err(UNFINISHED) }
}

/// An error unless the symbols ended as they must and every escape was used.
fn ended(finished: bool, escapes: bool) -> Result<()> {
    match (finished, escapes) {
        (true, true) => Ok(()),
        (true, false) => Err(ESCAPE_COUNT),
        (false, _) => Err(UNFINISHED),
    }
}

/// One class for each weight from the class plane.
#[inline(always)]
fn fill_classes(band: &Band, scratch: &mut Scratch) {
    let n = band.weights();
    scratch.classes.clear();
    scratch.classes.resize(padded(n), 0);
    match band.plan.coding {
        Coding::Rans => band::unpack_symbols(band.plan, &scratch.plane, &mut scratch.classes),
        Coding::Plain => {
            scratch.codes.clear();
            scratch.codes.resize(n, 0);
            crate::codec::planes::unpack_field(band.bytes.coded, band.plan.class_bits, &mut scratch.codes);
            scratch.classes.iter_mut().zip(&scratch.codes).for_each(|(class, &c)| *class = c as u8);
        }
    }
}

/// Runs `f` with its loops compiled for the backend's vector units. A closure must be `#[inline(always)]`: it is called from
/// several places, and compilers would rather compile it once, for none of them.
#[inline(always)]
pub(crate) fn vectorize<R>(backend: Backend, f: impl FnOnce() -> R) -> R {
    match backend {
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 => avx2::vectorize(f),
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 => avx512::vectorize(f),
        _ => f(),
    }
}

/// Replaces each byte below 16 by what `map` has for it.
#[inline(always)]
fn lookup(backend: Backend, map: &[u8; 16], bytes: &mut [u8]) {
    match backend {
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 | Backend::Avx2 => avx2::lookup(map, bytes),
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => neon::lookup(map, bytes),
        _ => bytes.iter_mut().for_each(|b| *b = map[usize::from(*b & 15)]),
    }
}

/// Turns rows of `cols` decoded values of `width` bytes into rows of `dtype`, `stride` bytes apart.
pub(crate) fn convert(
    backend: Backend,
    values: &[u8],
    cols: usize,
    width: usize,
    dtype: Dtype,
    out: &mut [u8],
    stride: usize,
) {
    for (values, out) in values.chunks_exact(cols * width).zip(out.chunks_mut(stride)) {
        vectorize(
            backend,
            #[inline(always)]
            || crate::codec::quant::convert(values, width, dtype, &mut out[..cols * dtype.size()]),
        );
    }
}

/// BF16 classes, raw bytes and escapes to weights.
fn join_bf16(backend: Backend, band: &Band, scratch: &mut Scratch, out: &mut [u8], stride: usize) -> Result<()> {
    let cols = band.cols;
    let Scratch { plane, shifts, bytes, .. } = scratch;
    let mut join = Bf16Join::new(backend, band, plane, shifts);
    if cols.is_multiple_of(64) {
        for row in 0..band.rows {
            join.run(backend, row * cols, &mut out[row * stride..row * stride + 2 * cols]);
        }
    } else {
        bytes.clear();
        bytes.resize(2 * band.weights(), 0);
        join.run(backend, 0, bytes);
        for (row, weights) in bytes.chunks_exact(2 * cols).enumerate() {
            out[row * stride..row * stride + 2 * cols].copy_from_slice(weights);
        }
    }
    join.finish()
}

/// The state of joining BF16 weights: where the planes lie, and the escapes not yet taken.
struct Bf16Join<'a> {
    class_bits: u32,
    map: &'a [u8; 16],
    /// What exponents are raised by; empty without levels.
    shifts: &'a [u8],
    /// Classes: a 4-bit plane, or a 2-bit plane with a 1-bit plane behind it at `high_plane`.
    plane: &'a [u8],
    high_plane: usize,
    raw: &'a [u8],
    escapes: &'a [u8],
    missing: bool,
}

impl<'a> Bf16Join<'a> {
    /// At the start of a band whose rANS symbols, if it has any, are in `plane`.
    fn new(backend: Backend, band: &Band<'a>, plane: &'a [u8], shifts: &'a mut Vec<u8>) -> Bf16Join<'a> {
        vectorize(
            backend,
            #[inline(always)]
            || levels::shifts(&band.scales, band.cols, shifts),
        );
        let plane = if band.plan.coding == Coding::Plain { band.bytes.coded } else { plane };
        Bf16Join {
            class_bits: band.plan.class_bits,
            map: &band.plan.map.values,
            shifts,
            plane,
            high_plane: plane.len().min(band.weights().div_ceil(4)),
            raw: band.bytes.raw,
            escapes: band.bytes.escapes,
            missing: false,
        }
    }

    /// An error unless every marker had an escape entry and none is left.
    fn finish(&self) -> Result<()> {
        if self.missing || !self.escapes.is_empty() { Err(ESCAPE_COUNT) } else { Ok(()) }
    }

    /// Writes the weights from `first` (a multiple of 64) on, as many as `out` holds.
    fn run(&mut self, backend: Backend, first: usize, out: &mut [u8]) {
        match backend {
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2 => avx2::join_bf16(self, first, out),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512 => avx512::join_bf16(self, first, out),
            #[cfg(target_arch = "aarch64")]
            Backend::Neon => neon::join_bf16(self, first, out),
            _ => unreachable!("the scalar backend has its own path"),
        }
    }

    /// The class that marks an escape.
    #[inline(always)]
    fn escape(&self) -> u8 {
        (1 << self.class_bits) - 1
    }

    /// The next `count` escape bytes, zeros where they are missing, in a buffer of 64.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    fn take_escapes(&mut self, count: usize) -> [u8; 64] {
        let mut buffer = [0; 64];
        let have = count.min(self.escapes.len());
        self.missing |= have < count;
        if let Some(full) = self.escapes.first_chunk::<64>() {
            buffer = *full;
        } else {
            buffer[..have].copy_from_slice(&self.escapes[..have]);
        }
        self.escapes = &self.escapes[have..];
        buffer
    }

    /// Puts escape bytes where `mask` has a bit, in order. For vector units without an expand instruction.
    #[inline(always)]
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
    fn patch<const N: usize>(&mut self, mask: u64, high: &mut [u8; N]) {
        patch(&mut self.escapes, &mut self.missing, mask, high);
    }
}

/// Puts escape bytes where `mask` has a bit, in order; zeros, and a note of it, where they are missing.
#[inline(always)]
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
fn patch<const N: usize>(escapes: &mut &[u8], missing: &mut bool, mut mask: u64, high: &mut [u8; N]) {
    while mask != 0 {
        let value = match escapes.split_first() {
            Some((&value, rest)) => {
                *escapes = rest;
                value
            }
            None => {
                *missing = true;
                0
            }
        };
        high[mask.trailing_zeros() as usize % N] = value;
        mask &= mask - 1;
    }
}

/// `N` bytes of `bytes` from `at` on, zeros behind its end.
#[inline(always)]
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
fn load<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let rest = bytes.get(at..).unwrap_or(&[]);
    match rest.first_chunk::<N>() {
        Some(full) => *full,
        None => {
            let mut partial = [0; N];
            partial[..rest.len()].copy_from_slice(rest);
            partial
        }
    }
}

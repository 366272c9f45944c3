//! 4-bit integers in groups of 128 columns with an F16 scale and a zero each, as AWQ and GPTQ checkpoints have them
//! (W4A16): their three tensors, turned into blocks that lie row by row as ggml's do.
//!
//! A block is 128 weights of a row, `scale · quant − scale · zero`:
//!
//! | bytes | what |
//! |---|---|
//! | 2 | the scale, an `f16` |
//! | 1 | the zero, 0 to 16 |
//! | 1 | nothing |
//! | 64 | quants: those of the first 64 weights in the low nibbles, of the others in the high ones |
//!
//! The tensors (`K` columns or inputs, `N` rows or outputs, `G` groups of columns; words are 32 bits, nibbles of a word
//! from the lowest bits on):
//!
//! | | `qweight` | `qzeros` | `scales` | nibble `i` of a word is | zero |
//! |---|---|---|---|---|---|
//! | AWQ | `K × N/8` | `G × N/8` | `G × N` | row 0, 2, 4, 6, 1, 3, 5, 7 of eight | as stored |
//! | GPTQ | `K/8 × N` | `G × N/8` | `G × N` | column `i` of eight; in `qzeros` row `i` | one more than stored |
//! | GPTQ, format 2 | the same | | | | as stored |
//!
//! Layouts are those of AutoAWQ's `gemm` and of AutoGPTQ, whose two formats are named `gptq` and `gptq_v2` in
//! `quantize_config.json`.

use half::f16;

use super::GgmlType;
use crate::{Error, Result};

/// Weights of a block.
pub const LEN: usize = 128;
/// Bytes of a block.
pub const BYTES: usize = 4 + LEN / 2;
/// Rows whose nibbles share words.
pub const ROWS: usize = 8;
/// The largest zero that a block may have; larger ones lose their high bits.
const MOST_ZERO: u8 = 31;

/// How a checkpoint packs 4-bit integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int4Format {
    /// AutoAWQ's `gemm`.
    Awq,
    /// AutoGPTQ's, which stores zeros less one: `"checkpoint_format": "gptq"`, or none named.
    Gptq,
    /// The same with zeros as they are: `"checkpoint_format": "gptq_v2"`.
    GptqV2,
}

/// A matrix as a checkpoint packs it.
#[derive(Clone, Copy, Debug)]
pub struct Int4<'a> {
    format: Int4Format,
    rows: usize,
    cols: usize,
    groups: usize,
    qweight: &'a [u32],
    qzeros: &'a [u32],
    scales: &'a [f16],
}

impl<'a> Int4<'a> {
    /// Takes tensors of a matrix of `rows` outputs and `cols` inputs in `groups` groups of inputs.
    ///
    /// # Errors
    /// If the sizes are no such matrix's, groups are not 128 columns or a multiple of that, or a scale is infinite or NaN.
    pub fn new(
        format: Int4Format,
        [rows, cols, groups]: [usize; 3],
        qweight: &'a [u32],
        qzeros: &'a [u32],
        scales: &'a [f16],
    ) -> Result<Int4<'a>> {
        let what = || format!("a {rows}x{cols} matrix of 4-bit integers in {groups} groups");
        if rows == 0 || !rows.is_multiple_of(ROWS) {
            return Err(Error::Unsupported(format!("{}: outputs must be a multiple of {ROWS}", what())));
        }
        if groups == 0 || cols == 0 || !cols.is_multiple_of(groups) || !(cols / groups).is_multiple_of(LEN) {
            let size = if groups > 0 { cols as f64 / groups as f64 } else { 0.0 };
            let text = format!("{}, which are {size} columns each: a multiple of {LEN} is supported", what());
            return Err(Error::Unsupported(text));
        }
        let sizes = [(qweight.len(), rows / ROWS * cols), (qzeros.len(), rows / ROWS * groups)];
        if sizes.iter().any(|(have, need)| have != need) || scales.len() != rows * groups {
            let [weights, zeros, scales] = [qweight.len(), qzeros.len(), scales.len()];
            let text = format!("{weights} words of weights, {zeros} of zeros and {scales} scales are not {}", what());
            return Err(Error::Invalid(text));
        }
        if let Some(at) = scales.iter().position(|scale| !scale.is_finite()) {
            let (group, row) = (at / rows, at % rows);
            return Err(Error::Invalid(format!("the scale of group {group} of output {row} is {}", scales[at])));
        }
        Ok(Int4 { format, rows, cols, groups, qweight, qzeros, scales })
    }

    /// Bytes of a row's blocks.
    pub fn row_bytes(&self) -> usize {
        self.cols / LEN * BYTES
    }

    /// Eights of rows.
    pub fn eights(&self) -> usize {
        self.rows / ROWS
    }

    /// The blocks of rows `8 eight` to `8 eight + 7`, one after another.
    ///
    /// # Panics
    /// If there are no such rows, or `out` has another length than eight rows.
    pub fn blocks(&self, eight: usize, out: &mut [u8]) {
        assert_eq!(out.len(), ROWS * self.row_bytes());
        let words = self.rows / ROWS;
        for (r, out) in out.chunks_exact_mut(self.row_bytes()).enumerate() {
            let row = ROWS * eight + r;
            // AWQ: even rows have the low nibbles of a word, odd ones the high ones.
            let awq = 4 * (r / 2 + 4 * (r % 2));
            for (b, block) in out.chunks_exact_mut(BYTES).enumerate() {
                let group = b * LEN / (self.cols / self.groups);
                let shift = if self.format == Int4Format::Awq { awq } else { 4 * r };
                let stored = (self.qzeros[group * words + eight] >> shift & 15) as u8;
                block[..2].copy_from_slice(&self.scales[group * self.rows + row].to_le_bytes());
                block[2] = stored + u8::from(self.format == Int4Format::Gptq);
                block[3] = 0;
                let quant = |k: usize| match self.format {
                    Int4Format::Awq => self.qweight[k * words + eight] >> awq & 15,
                    _ => self.qweight[k / 8 * self.rows + row] >> (4 * (k % 8)) & 15,
                };
                for (i, byte) in block[4..].iter_mut().enumerate() {
                    let k = b * LEN + i;
                    *byte = (quant(k) | quant(k + LEN / 2) << 4) as u8;
                }
            }
        }
    }
}

/// The weights of a block.
pub(super) fn weights(block: &[u8], out: &mut [f32]) {
    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let min = scale * f32::from(block[2] & MOST_ZERO);
    let (low, high) = out.split_at_mut(LEN / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(&block[4..BYTES]) {
        *low = scale * f32::from(byte & 15) - min;
        *high = scale * f32::from(byte >> 4) - min;
    }
}

/// Refuses blocks of [`GgmlType::Int4G128`] with scales that are infinite or NaN, which products would not treat as such.
///
/// # Errors
/// The first of them.
pub fn check(ty: GgmlType, blocks: &[u8]) -> Result<()> {
    let finite = |block: &[u8]| f16::from_le_bytes([block[0], block[1]]).is_finite();
    if ty == GgmlType::Int4G128
        && let Some(at) = blocks.chunks_exact(BYTES).position(|block| !finite(block))
    {
        return Err(Error::Invalid(format!("the scale of block {at} of {ty} is infinite or NaN")));
    }
    Ok(())
}

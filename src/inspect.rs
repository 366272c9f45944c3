//! What a checkpoint is made of: where each tensor's bits went.

use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::{Checkpoint, Tensor};
use crate::codec::Coding;
use crate::codec::band::Scratch;
use crate::codec::rans::STATE_BYTES;
use crate::convert::{Progress, check_cancelled};
use crate::format::Checks;
use crate::format::manifest::Manifest;
use crate::matrix::CompressedMatrix;
use crate::{Error, Result};

/// Everything `taper inspect` knows about a checkpoint.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Inspection {
    /// The path that was inspected.
    pub path: String,
    /// Codec of the conversion, such as `lossless` or `rate 3.5`; `None` for a checkpoint that is not compressed.
    pub codec: Option<String>,
    /// True if entropies were counted on all weights; else on a few tiles of each tensor.
    pub exact: bool,
    /// All tensors, in the order of their files and offsets.
    pub tensors: Vec<TensorInfo>,
}

/// One tensor.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TensorInfo {
    /// Name in the checkpoint.
    pub name: String,
    /// File that holds it.
    pub file: String,
    /// Shape of the original tensor.
    pub shape: Vec<u64>,
    /// Its dtype, as safetensors names it.
    pub dtype: String,
    /// Weight kind (`bf16`, `int8`, …), or `-` for tensors that pass through.
    pub kind: String,
    /// Stage (`rans`, `rans8`, `fixed12`, `fixed11`, `raw`), or `-`.
    pub stage: String,
    /// Number of weights.
    pub weights: u64,
    /// Bytes of the original tensor.
    pub original_bytes: u64,
    /// Bytes that it takes now.
    pub stored_bytes: u64,
    /// Order-0 entropy of its classes plus raw bits, in bits per weight; `None` for tensors that pass through.
    pub ideal_bits: Option<f64>,
    /// Where the stored bytes went.
    pub parts: Parts,
    /// Tiles by predictor: none, left, up, average, gradient.
    pub predictors: [u64; 5],
}

/// Stored bytes of a tensor by purpose. They add up to its stored bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Tensors that pass through unchanged.
    pub plain: u64,
    /// Class planes, or the rANS words that stand for them.
    pub classes: u64,
    /// Raw bits: signs, mantissas, low bits.
    pub raw: u64,
    /// Escape entries.
    pub escapes: u64,
    /// rANS states.
    pub states: u64,
    /// Header, frequency table, tile records, scales, band tables.
    pub tables: u64,
    /// Zeros up to multiples of 16.
    pub padding: u64,
}

impl TensorInfo {
    /// Stored bits per weight, everything counted.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.stored_bytes as f64 / self.weights.max(1) as f64
    }

    /// True if the tensor is a tile stream.
    pub fn compressed(&self) -> bool {
        self.kind != "-"
    }

    /// The layer's number in names such as `model.layers.12.mlp.up_proj.weight`.
    pub fn layer(&self) -> Option<u64> {
        self.name.split('.').find_map(|part| part.parse().ok())
    }

    /// The name without its layer and `.weight`: `mlp.up_proj`, `embed_tokens`.
    pub fn family(&self) -> &str {
        let name = self.name.strip_suffix(".weight").unwrap_or(&self.name);
        let after_layer = name.split_once('.').map_or(name, |(_, rest)| rest);
        let mut rest = after_layer;
        while let Some((head, tail)) = rest.split_once('.') {
            rest = tail;
            if head.parse::<u64>().is_ok() {
                return rest;
            }
        }
        after_layer
    }
}

impl Parts {
    /// All bytes.
    pub fn total(&self) -> u64 {
        self.plain + self.classes + self.raw + self.escapes + self.states + self.tables + self.padding
    }

    /// Adds another tensor's parts.
    pub fn add(&mut self, other: &Parts) {
        self.plain += other.plain;
        self.classes += other.classes;
        self.raw += other.raw;
        self.escapes += other.escapes;
        self.states += other.states;
        self.tables += other.tables;
        self.padding += other.padding;
    }
}

/// Inspects the checkpoint at `path`, compressed or not.
///
/// Reads the headers, the tiles' band tables, and a few tiles of each matrix, on which entropies are counted; with
/// `exact` all of them.
///
/// # Errors
/// If a header, a band table or a tile that it reads is damaged; with `exact` any damage.
pub fn inspect(path: impl AsRef<Path>, exact: bool, progress: &dyn Progress) -> Result<Inspection> {
    let path = path.as_ref();
    let checkpoint = Checkpoint::open(path)?;
    let codec = if path.is_dir() { Manifest::read(path)?.map(|m| m.codec) } else { None };
    let mut inspection = Inspection { path: path.display().to_string(), codec, exact, tensors: Vec::new() };
    for info in checkpoint.tensors() {
        check_cancelled(progress)?;
        progress.tensor(&info.name);
        let file = checkpoint.file_of(info).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut tensor = TensorInfo {
            name: info.name.clone(),
            file,
            shape: info.shape.clone(),
            dtype: info.dtype.clone(),
            kind: "-".into(),
            stage: "-".into(),
            weights: info.shape.iter().product(),
            original_bytes: info.stored_bytes,
            stored_bytes: info.stored_bytes,
            ..TensorInfo::default()
        };
        if info.compressed {
            describe(&checkpoint, &mut tensor, exact)?;
        } else {
            tensor.parts.plain = info.stored_bytes;
        }
        progress.advance(info.stored_bytes);
        inspection.tensors.push(tensor);
    }
    Ok(inspection)
}

/// Fills in what only a tile stream has.
fn describe(checkpoint: &Checkpoint, tensor: &mut TensorInfo, exact: bool) -> Result<()> {
    let Tensor::Compressed(matrix) = checkpoint.tensor(&tensor.name)? else { return Ok(()) };
    let plan = matrix.plan();
    tensor.kind = plan.kind.name().into();
    tensor.stage = plan.stage_name().into();
    tensor.original_bytes = matrix.decoded_bytes() as u64;
    let named = |e: Error| e.in_tensor(&tensor.name);
    tensor.parts.tables = matrix.stream().preamble_bytes() as u64;
    for tile in 0..matrix.geometry().tiles() {
        tensor.parts.add(&tile_parts(&matrix, tile).map_err(named)?);
        let predictor = matrix.stream().record(tile).map_err(named)?.predictor;
        tensor.predictors[predictor as usize] += 1;
    }
    let tiles = matrix.geometry().tiles();
    let step = if exact { 1 } else { tiles.div_ceil(SAMPLED_TILES) };
    let entropy = if plan.class_bits > 0 { class_entropy(&matrix, step).map_err(named)? } else { 0.0 };
    tensor.ideal_bits = Some(f64::from(plan.raw_bits) + entropy);
    Ok(())
}

/// Tiles of a tensor on which its entropy is counted unless all are asked for: half a million weights.
const SAMPLED_TILES: usize = 8;

/// Where the bytes of one tile went.
fn tile_parts(matrix: &CompressedMatrix, tile: usize) -> Result<Parts> {
    let plan = matrix.plan();
    // The checksum is `verify`'s business; structure is checked.
    let tile = matrix.stream().tile_with(tile, Checks::Off)?;
    let mut parts = Parts { tables: tile.first_band() as u64, ..Parts::default() };
    for band in 0..tile.rect.bands() {
        let bytes = tile.band(plan, band);
        let states = if plan.coding == Coding::Rans { STATE_BYTES } else { 0 };
        parts.states += states as u64;
        parts.classes += (bytes.coded.len() - states) as u64;
        parts.raw += bytes.raw.len() as u64;
        parts.escapes += bytes.escapes.len() as u64;
    }
    parts.padding = u64::from(tile.record.size) - parts.total();
    Ok(parts)
}

/// Order-0 entropy of the high parts of every `step`th tile, in bits per weight: of the exponents (relative to their
/// levels), the differences of INT8 weights, or the integers of rate-coded ones without their raw bits.
fn class_entropy(matrix: &CompressedMatrix, step: usize) -> Result<f64> {
    let count = |scratch: &mut Scratch, tile: usize| -> Result<[u64; 256]> {
        let mut counts = [0u64; 256];
        matrix.for_each_class(tile, scratch, |high| counts[usize::from(high)] += 1)?;
        Ok(counts)
    };
    let add = |mut a: [u64; 256], b: [u64; 256]| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        Ok(a)
    };
    let tiles = (0..matrix.geometry().tiles()).into_par_iter().step_by(step.max(1));
    let counts = tiles.map_init(Scratch::default, count).try_reduce(|| [0; 256], add)?;
    let total: u64 = counts.iter().sum();
    let p = |c: u64| c as f64 / total as f64;
    let entropy: f64 = counts.iter().filter(|&&c| c > 0).map(|&c| -p(c) * p(c).log2()).sum();
    Ok(entropy)
}

//! What a checkpoint is made of: where each tensor's bits went.

use serde::Serialize;

/// Everything `taper inspect` knows about a checkpoint.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Inspection {
    /// The path that was inspected.
    pub path: String,
    /// Codec of the conversion, such as `lossless` or `rate 3.5`; `None` for a checkpoint that is not compressed.
    pub codec: Option<String>,
    /// True if entropies were counted on the decoded weights; else they come from the frequency tables.
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

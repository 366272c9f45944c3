//! The tensors of a GGUF file by their Hugging Face names.

use candle_core::{DType, Device, Tensor};

use super::File;
use super::config::{Architecture, config, rope_factors};
use crate::codec::kquant::dequantize;
use crate::gguf;
use crate::models::Weights;
use crate::nn::{KQuantEmbedding, KQuantLinear};
use crate::ops::Blocks;
use crate::{Error, Result};

/// Parts of a layer: Hugging Face's name and llama.cpp's.
const PARTS: [(&str, &str); 9] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];
/// What is not part of a layer.
const OTHERS: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// The name that llama.cpp gives a tensor.
fn to_gguf(name: &str) -> Option<String> {
    if let Some((_, other)) = OTHERS.iter().find(|(hf, _)| *hf == name) {
        return Some(other.to_string());
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = part.rsplit_once('.')?;
    let (_, part) = PARTS.iter().find(|(hf, _)| *hf == part)?;
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// The inverse; other names stay as they are, for the model to refuse.
fn to_hf(name: &str) -> String {
    if let Some((hf, _)) = OTHERS.iter().find(|(_, other)| *other == name) {
        return hf.to_string();
    }
    let layer = || {
        let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
        let (part, kind) = part.rsplit_once('.')?;
        let (hf, _) = PARTS.iter().find(|(_, other)| *other == part)?;
        Some(format!("model.layers.{layer}.{hf}.{kind}"))
    };
    layer().unwrap_or_else(|| name.to_string())
}

/// Layers over the tensors of a GGUF file, laid out when they are asked for.
#[derive(Debug)]
pub struct GgufWeights<'a> {
    file: &'a File,
    architecture: Architecture,
    heads: [usize; 2],
    rope_factors: Option<Vec<f32>>,
    dtype: DType,
    device: Device,
    /// Names as Hugging Face has them, and shapes.
    tensors: Vec<(String, Vec<u64>)>,
}

impl<'a> GgufWeights<'a> {
    /// The tensors of `file`, for activations of `dtype` on the CPU.
    ///
    /// # Errors
    /// If the metadata is not that of a supported model.
    pub fn new(file: &'a File, dtype: DType) -> Result<GgufWeights<'a>> {
        let architecture = Architecture::of(file)?;
        let config = config(file)?;
        let heads = [config.num_attention_heads, config.num_key_value_heads];
        let rope_factors = rope_factors(file, config.hidden_size / config.num_attention_heads.max(1))?;
        let known = |name: &str| {
            // Biases come with their layers, factors with the model.
            let bias = architecture == Architecture::Qwen2
                && ["attn_q.bias", "attn_k.bias", "attn_v.bias"].iter().any(|bias| name.ends_with(bias));
            bias || name == "rope_freqs.weight"
        };
        let tensors = file
            .tensors()
            .filter(|tensor| !known(tensor.name))
            .map(|tensor| (to_hf(tensor.name), tensor.shape().into_iter().map(|dim| dim as u64).collect()));
        let device = Device::Cpu;
        Ok(GgufWeights { file, architecture, heads, rope_factors, dtype, device, tensors: tensors.collect() })
    }

    /// Lays matrices out in the memory of `device`.
    pub fn with_device(self, device: &Device) -> GgufWeights<'a> {
        GgufWeights { device: device.clone(), ..self }
    }

    /// The tensor that Hugging Face calls `name`, if it has that shape.
    fn find(&self, name: &str, shape: &[usize]) -> Result<gguf::Tensor<'a>> {
        let own = to_gguf(name).unwrap_or_else(|| name.to_string());
        let Some(tensor) = self.file.tensor(&own) else {
            return Err(Error::Invalid(format!("there is no tensor {own}; the model needs it with shape {shape:?}")));
        };
        if tensor.shape() != shape {
            let got = tensor.shape();
            let text = format!("its shape is {got:?}, but the metadata asks for {shape:?}");
            return Err(Error::Invalid(text).in_tensor(&own));
        }
        Ok(tensor)
    }

    /// Has `make` lay out a matrix, and lets go of the file's pages that it came from.
    fn matrix<T>(
        &self,
        name: &str,
        shape: [usize; 2],
        make: impl FnOnce(&Blocks) -> candle_core::Result<T>,
    ) -> Result<T> {
        let [rows, cols] = shape;
        let tensor = self.find(name, &[rows, cols])?;
        let start = tensor.range().start as usize;
        let done = |range: std::ops::Range<usize>| self.file.map().forget(start + range.start..start + range.end);
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => self.heads[0],
            Some("k_proj") => self.heads[1],
            _ => 0,
        };
        let half = rows / heads.max(1) / 2;
        // llama.cpp rotates neighbours and put the rows of a head's two halves in turns for that; this model rotates halves.
        let turns = |row: usize| {
            let (head, place) = (row / (2 * half), row % (2 * half));
            head * 2 * half + 2 * (place % half) + place / half
        };
        let same = |row: usize| row;
        let turned = self.architecture == Architecture::Llama && heads > 0 && rows.is_multiple_of(2 * heads);
        let order: &(dyn Fn(usize) -> usize + Sync) = if turned { &turns } else { &same };
        let blocks = Blocks { ty: tensor.ty, shape, data: tensor.data(), order, done: &done };
        make(&blocks).map_err(|error| Error::from(error).in_tensor(tensor.name))
    }
}

impl Weights for GgufWeights<'_> {
    type Linear = KQuantLinear;
    type Embedding = KQuantEmbedding;

    fn linear(&self, name: &str, out_dim: usize, in_dim: usize) -> Result<KQuantLinear> {
        let bias = name.replace(".weight", ".bias");
        let bias = match to_gguf(&bias).filter(|own| self.file.tensor(own).is_some()) {
            Some(_) => Some(self.tensor(&bias, &[out_dim])?),
            None => None,
        };
        let layer = self.matrix(name, [out_dim, in_dim], |blocks| KQuantLinear::on(blocks, bias, &self.device))?;
        Ok(layer.with_name(name))
    }

    fn embedding(&self, name: &str, vocab: usize, dim: usize) -> Result<KQuantEmbedding> {
        self.matrix(name, [vocab, dim], |blocks| KQuantEmbedding::on(blocks, self.dtype, &self.device))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.find(name, shape)?;
        let mut values = vec![0.0; shape.iter().product()];
        dequantize(tensor.ty, tensor.data(), &mut values);
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).and_then(|values| values.to_dtype(self.dtype));
        let tensor = tensor.and_then(|values| values.to_device(&self.device));
        tensor.map_err(|error| Error::from(error).in_tensor(name))
    }

    fn tied_lm_head(&self, embedding: &KQuantEmbedding) -> Result<KQuantLinear> {
        Ok(embedding.as_linear())
    }

    fn tensors(&self) -> Vec<(&str, &[u64])> {
        self.tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect()
    }

    fn contains(&self, name: &str) -> bool {
        to_gguf(name).is_some_and(|own| self.file.tensor(&own).is_some())
    }

    fn rope_factors(&self) -> Option<&[f32]> {
        self.rope_factors.as_deref()
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for name in ["blk.3.attn_q.weight", "blk.3.attn_q.bias", "blk.0.ffn_norm.weight", "output.weight"] {
            let hf = to_hf(name);
            assert_ne!(hf, name);
            assert_eq!(to_gguf(&hf).unwrap(), name);
        }
        assert_eq!(to_hf("blk.0.ffn_gate_inp.weight"), "blk.0.ffn_gate_inp.weight");
        assert_eq!(to_gguf("rope_freqs.weight"), None);
    }
}

//! What a GGUF file's metadata says about its model.

use crate::gguf::{Gguf, Value};
use crate::models::{Config, LlamaEosToks};
use crate::{Error, Result};

/// An architecture whose graph is a Llama's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// `llama`: Llama, Mistral and others. RoPE turns neighbouring values of a head; Q and K were permuted for that.
    Llama,
    /// `qwen2`: RoPE turns the halves of a head, as in the Hugging Face layout; Q, K and V have biases.
    Qwen2,
}

impl Architecture {
    /// Its name in the file, which begins its metadata's keys.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
        }
    }

    /// What `general.architecture` says.
    ///
    /// # Errors
    /// If it is missing or another.
    pub fn of<B: AsRef<[u8]>>(file: &Gguf<B>) -> Result<Architecture> {
        let supported = [Architecture::Llama, Architecture::Qwen2];
        let name = file.get("general.architecture").and_then(Value::to_str);
        let name = name.ok_or_else(|| missing("general.architecture"))?;
        supported.into_iter().find(|a| a.name() == name).ok_or_else(|| {
            let names = supported.map(Architecture::name).join(" and ");
            Error::Unsupported(format!("the architecture {name:?} is not supported; supported are {names}"))
        })
    }
}

fn missing(key: &str) -> Error {
    Error::Malformed(format!("the metadata has no {key}, or one of another type"))
}

/// Metadata of one architecture.
struct Metadata<'a, B> {
    file: &'a Gguf<B>,
    architecture: Architecture,
}

impl<B: AsRef<[u8]>> Metadata<'_, B> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name())
    }

    fn get(&self, key: &str) -> Option<Value<'_>> {
        self.file.get(&self.key(key))
    }

    /// A size, if the key is there.
    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        // Models whose layers differ have an array here.
        let same = value.to_array().and_then(|array| {
            let first = array.iter().next()?;
            array.iter().all(|v| v == first).then_some(first)
        });
        let size = same.unwrap_or(value).to_u64().and_then(|v| u32::try_from(v).ok());
        match size {
            Some(size) => Ok(Some(size as usize)),
            None => {
                Err(Error::Unsupported(format!("{} is {value}, one number for all layers is supported", self.key(key))))
            }
        }
    }

    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| missing(&self.key(key)))
    }

    /// An error unless a size, where it is given, is the one that the model has.
    fn expect(&self, key: &str, size: usize) -> Result<()> {
        match self.size(key)? {
            Some(got) if got != size => {
                Err(Error::Unsupported(format!("{} is {got}, only {size} is supported here", self.key(key))))
            }
            _ => Ok(()),
        }
    }
}

/// The model's sizes. [`Config::tie_word_embeddings`] tells whether the file has no output layer of its own.
///
/// # Errors
/// If the architecture is not supported, a key is missing, or says something that [`Llama`](crate::models::Llama) lacks:
/// experts, heads of a size of their own, layers that differ, RoPE scaling other than linear or a table of factors.
pub fn config<B: AsRef<[u8]>>(file: &Gguf<B>) -> Result<Config> {
    let architecture = Architecture::of(file)?;
    let metadata = Metadata { file, architecture };
    if let Some(experts) = metadata.size("expert_count")?.filter(|&count| count > 0) {
        return Err(Error::Unsupported(format!("a mixture of {experts} experts is not supported")));
    }
    let hidden_size = metadata.need("embedding_length")?;
    let heads = metadata.need("attention.head_count")?;
    let head_dim = hidden_size.checked_div(heads).unwrap_or(0);
    if head_dim == 0 {
        let key = metadata.key("attention.head_count");
        return Err(Error::Invalid(format!("{key} is {heads}, which does not divide {hidden_size}")));
    }
    for key in ["rope.dimension_count", "attention.key_length", "attention.value_length"] {
        metadata.expect(key, head_dim)?;
    }
    let rms_norm_eps = metadata.get("attention.layer_norm_rms_epsilon").and_then(Value::to_f32);
    let tokens = file.get("tokenizer.ggml.tokens").and_then(Value::to_array).map(|tokens| tokens.len());
    // The table itself has the last word: files without a tokenizer, and tables padded beyond it, exist.
    let rows = file.tensor("token_embd.weight").map(|table| table.rows());
    let vocab_size = rows.or(metadata.size("vocab_size")?).or(tokens);
    let token = |key: &str| file.get(key).and_then(Value::to_u64).and_then(|id| u32::try_from(id).ok());
    let ends = ["eos", "eot", "eom"].into_iter().filter_map(|end| token(&format!("tokenizer.ggml.{end}_token_id")));
    let mut ends: Vec<u32> = ends.collect();
    ends.dedup();
    Ok(Config {
        hidden_size,
        intermediate_size: metadata.need("feed_forward_length")?,
        vocab_size: vocab_size.ok_or_else(|| missing("tokenizer.ggml.tokens"))?,
        num_hidden_layers: metadata.need("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: metadata.size("attention.head_count_kv")?.unwrap_or(heads),
        use_flash_attn: false,
        rms_norm_eps: rms_norm_eps.ok_or_else(|| missing(&metadata.key("attention.layer_norm_rms_epsilon")))?.into(),
        rope_theta: metadata.get("rope.freq_base").and_then(Value::to_f32).unwrap_or(10_000.0),
        bos_token_id: token("tokenizer.ggml.bos_token_id"),
        eos_token_id: (!ends.is_empty()).then_some(LlamaEosToks::Multiple(ends)),
        rope_scaling: None,
        max_position_embeddings: metadata.need("context_length")?,
        tie_word_embeddings: file.tensor("output.weight").is_none(),
    })
}

/// What each pair's frequency is divided by, if not 1: the tensor `rope_freqs.weight` (as Llama 3 has it), or linear scaling.
pub(super) fn rope_factors<B: AsRef<[u8]>>(file: &Gguf<B>, head_dim: usize) -> Result<Option<Vec<f32>>> {
    let metadata = Metadata { file, architecture: Architecture::of(file)? };
    let scaling = metadata.get("rope.scaling.type").and_then(Value::to_str);
    let factor = metadata.get("rope.scaling.factor").or(metadata.get("rope.scale_linear")).and_then(Value::to_f32);
    let linear = match scaling.as_deref() {
        None | Some("none") | Some("linear") => factor.unwrap_or(1.0),
        Some(other) => {
            let key = metadata.key("rope.scaling.type");
            return Err(Error::Unsupported(format!("{key} is {other:?}; supported are \"none\" and \"linear\"")));
        }
    };
    let linear = if scaling.as_deref() == Some("none") { 1.0 } else { linear };
    if !(linear.is_finite() && linear > 0.0) {
        return Err(Error::field("rope.scaling.factor", linear, "a number above 0"));
    }
    let Some(table) = file.tensor("rope_freqs.weight") else {
        return Ok((linear != 1.0).then(|| vec![linear; head_dim / 2]));
    };
    if table.rows() * table.cols() != head_dim / 2 {
        let error = Error::field("shape", format!("{:?}", table.shape()), format!("[{}]", head_dim / 2));
        return Err(error.in_tensor(table.name));
    }
    let mut factors = vec![0.0; head_dim / 2];
    crate::codec::kquant::dequantize(table.ty, table.data(), &mut factors);
    if let Some(factor) = factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
        return Err(Error::field("factor", factor, "a number above 0").in_tensor(table.name));
    }
    Ok(Some(factors.into_iter().map(|factor| factor * linear).collect()))
}

//! A model directory's `config.json`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::{Config, LlamaConfig, LlamaEosToks};
use crate::format::manifest;
use crate::{Error, Result};

/// Reads `config.json` of a Llama's directory.
///
/// # Errors
/// If the file is missing or malformed, describes another model than a Llama, or asks for something that
/// [`Llama`](super::Llama) lacks: biases, heads of a size of their own, another activation or RoPE scaling.
pub fn read(dir: impl AsRef<Path>) -> Result<Config> {
    let dir = dir.as_ref();
    let path = dir.join("config.json");
    if dir.exists() && !path.exists() {
        let hint = if dir.is_dir() {
            "has no config.json; a model's directory holds config.json, tokenizer.json and .safetensors files"
        } else {
            "is not a directory; pass the directory that holds config.json and the .safetensors files"
        };
        return Err(Error::Invalid(format!("{} {hint}", dir.display())));
    }
    let text = fs::read(&path).map_err(Error::io(&path))?;
    parse(&text).map_err(|error| error.in_file(&path))
}

/// Refuses a directory whose `config.json` says that something else than this crate quantised the weights: the tensors
/// are then no weights as they stand.
///
/// # Errors
/// If it says so, or names a version of this crate's format that this build lacks. A directory without `config.json`, or
/// a file, passes.
pub(super) fn refuse_foreign_quantisation(dir: &Path) -> Result<()> {
    let path = dir.join("config.json");
    let Ok(text) = fs::read(&path) else { return Ok(()) };
    let json: Value = serde_json::from_slice(&text).map_err(|e| Error::Malformed(e.to_string()).in_file(&path))?;
    check_quantisation(&json["quantization_config"]).map_err(|error| error.in_file(&path))
}

fn check_quantisation(quantisation: &Value) -> Result<()> {
    if !quantisation.is_object() {
        return Ok(());
    }
    match quantisation["quant_method"].as_str() {
        Some("taper") => {}
        method => {
            let by = method.map_or("a method that it does not name".to_string(), |method| format!("{method:?}"));
            return Err(Error::Unsupported(format!(
                "quantization_config says that the weights were quantised with {by}, which this build cannot read; take \
                 the model's unquantised weights, and quantise them with taper compress --codec int8 or --bits"
            )));
        }
    }
    if let Some(format) = quantisation["format"].as_u64().filter(|&format| format != u64::from(manifest::VERSION)) {
        return Err(Error::version("the checkpoint", format, manifest::VERSION));
    }
    // What the weights were before this crate compressed them.
    check_quantisation(&quantisation["original"])
}

/// Parses the text of a `config.json`.
fn parse(text: &[u8]) -> Result<Config> {
    let malformed = |error: serde_json::Error| Error::Malformed(error.to_string());
    let mut json: Value = serde_json::from_slice(text).map_err(malformed)?;
    check_quantisation(&json["quantization_config"])?;
    let unsupported = |text: String| Err(Error::Unsupported(text));
    match json.get("model_type").and_then(Value::as_str) {
        Some("llama") => {}
        Some(other) => return unsupported(format!("model_type is {other:?}; this build runs \"llama\" models only")),
        None => return unsupported("there is no model_type; this build runs \"llama\" models only".into()),
    }
    move_rope_parameters(&mut json);
    for bias in ["attention_bias", "mlp_bias"] {
        if json[bias] == Value::Bool(true) {
            return unsupported(format!("{bias} is true; layers with biases are not supported"));
        }
    }
    if let Some(activation) = json["hidden_act"].as_str().filter(|&act| act != "silu") {
        return unsupported(format!("hidden_act is {activation:?}, only \"silu\" is supported"));
    }
    let scaling = &json["rope_scaling"];
    if let Some(kind) = scaling.get("rope_type").or(scaling.get("type")).filter(|kind| *kind != "llama3") {
        if kind != "default" {
            return unsupported(format!("rope_scaling of type {kind} is not supported, only \"llama3\" is"));
        }
        json["rope_scaling"] = Value::Null;
    }
    let head_dim = json["head_dim"].as_u64();
    let config: LlamaConfig = serde_json::from_value(json).map_err(malformed)?;
    let config = config.into_config(false);
    if let Some(head_dim) = head_dim
        && head_dim.checked_mul(config.num_attention_heads as u64) != Some(config.hidden_size as u64)
    {
        let (heads, hidden) = (config.num_attention_heads, config.hidden_size);
        return unsupported(format!("head_dim is {head_dim}, but {heads} heads must add up to hidden_size {hidden}"));
    }
    Ok(config)
}

/// Since version 5 transformers writes `rope_theta` and the scaling into one object.
fn move_rope_parameters(json: &mut Value) {
    let Some(parameters) = json.get("rope_parameters").filter(|p| p.is_object()).cloned() else { return };
    if json.get("rope_theta").is_none()
        && let Some(theta) = parameters.get("rope_theta")
    {
        json["rope_theta"] = theta.clone();
    }
    if json.get("rope_scaling").is_none_or(Value::is_null) {
        json["rope_scaling"] = parameters;
    }
}

/// The tokens that end a text: those of `config`, and those of `generation_config.json` if the directory has one.
///
/// # Errors
/// If that file cannot be read or is malformed.
pub fn end_tokens(dir: impl AsRef<Path>, config: &Config) -> Result<BTreeSet<u32>> {
    let mut ends: BTreeSet<u32> = match &config.eos_token_id {
        None => BTreeSet::new(),
        Some(LlamaEosToks::Single(id)) => [*id].into(),
        Some(LlamaEosToks::Multiple(ids)) => ids.iter().copied().collect(),
    };
    let path = dir.as_ref().join("generation_config.json");
    if path.exists() {
        let text = fs::read(&path).map_err(Error::io(&path))?;
        let json: Value = serde_json::from_slice(&text).map_err(|e| Error::Malformed(e.to_string()).in_file(&path))?;
        let ids = match &json["eos_token_id"] {
            Value::Array(ids) => ids.iter().collect(),
            id => vec![id],
        };
        ends.extend(ids.into_iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
    }
    Ok(ends)
}

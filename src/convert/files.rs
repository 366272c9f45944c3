//! Which files of a model directory are what.

use std::fs;
use std::path::Path;

use crate::checkpoint::INDEX_NAME;
use crate::format::manifest;
use crate::{Error, Result};

/// The model's configuration, to which a `quantization_config` is added.
pub(super) const CONFIG_NAME: &str = "config.json";

/// Endings of weights in other formats, which a compressed checkpoint does not take along.
const OTHER_WEIGHTS: [&str; 9] = [".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt"];

/// The files of a model directory besides its weights.
#[derive(Debug, Default)]
pub(super) struct Companions {
    /// Copied as they are: tokenizer, generation settings, licences.
    pub copied: Vec<String>,
    /// Left out: weights in other formats, and folders.
    pub left_out: Vec<String>,
    /// True if there is a `config.json`.
    pub config: bool,
    /// True if there is an index of several weight files.
    pub index: bool,
}

/// Sorts out everything in `dir` that is not one of the weight files.
pub(super) fn companions(dir: &Path) -> Result<Companions> {
    let mut found = Companions::default();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Follows links: the Hugging Face cache consists of them.
        let is_file = fs::metadata(entry.path()).map_err(Error::io(entry.path()))?.is_file();
        match name.as_str() {
            _ if name.starts_with('.') || name.ends_with(".safetensors") => {}
            manifest::FILE_NAME => {}
            CONFIG_NAME if is_file => found.config = true,
            INDEX_NAME if is_file => found.index = true,
            _ if !is_file || OTHER_WEIGHTS.iter().any(|end| name.ends_with(end)) => found.left_out.push(name),
            _ => found.copied.push(name),
        }
    }
    found.copied.sort();
    found.left_out.sort();
    Ok(found)
}

/// The name of a path's last component.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

//! Models on the Hugging Face hub.
//!
//! With feature `hub`, [`download`] fetches a model into the cache that all Hugging Face libraries share and returns its
//! directory there. Their environment variables hold: `HF_HOME` or `HF_HUB_CACHE` (where the cache is), `HF_TOKEN`,
//! `HF_TOKEN_PATH` or the token that `hf auth login` stored, `HF_ENDPOINT`, `HF_HUB_OFFLINE`. Without the feature it is an
//! error that says how to get the model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::convert::Progress;
use crate::{Error, Result};

/// Short names of models and their repositories, those of candle's llama example.
pub const KNOWN: [(&str, &str); 18] = [
    ("v1", "Narsil/amall-7b"),
    ("v2", "meta-llama/Llama-2-7b-hf"),
    ("v3", "meta-llama/Meta-Llama-3-8B"),
    ("v31", "meta-llama/Llama-3.1-8B"),
    ("v3-instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ("v31-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    ("v32-1b", "meta-llama/Llama-3.2-1B"),
    ("v32-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    ("v32-3b", "meta-llama/Llama-3.2-3B"),
    ("v32-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct"),
    ("solar-10.7b", "upstage/SOLAR-10.7B-v1.0"),
    ("tiny-llama-1.1b-chat", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ("SmoLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B"),
    ("SmoLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    ("SmoLM2-360M", "HuggingFaceTB/SmolLM2-360M"),
    ("SmoLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    ("SmoLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ("SmoLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
];

/// The repository of a short name.
///
/// # Errors
/// If there is no such name; the error lists all.
pub fn known(name: &str) -> Result<&'static str> {
    // `SmolLM2` is how its makers spell it.
    let found = KNOWN.iter().find(|(known, _)| name == *known || name == known.replace("SmoLM", "SmolLM"));
    found.map(|(_, id)| *id).ok_or_else(|| {
        let names: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).collect();
        Error::Invalid(format!("unknown model {name}; known are {}", names.join(", ")))
    })
}

/// A model's directory: `path` itself where it exists; else, if it reads like the name of a repository on the hub, such as
/// `meta-llama/Llama-3.2-1B`, the directory that [`download`] gives.
///
/// # Errors
/// As [`download`].
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let id = path.to_str().filter(|text| !path.exists() && reads_like_an_id(text));
    id.map_or(Ok(path.to_path_buf()), |id| download(id, None, Arc::new(())))
}

/// `owner/name`, each of letters, digits, `-`, `_` and `.`.
fn reads_like_an_id(text: &str) -> bool {
    let part = |part: &str| {
        let allowed = part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        allowed && part.starts_with(|c: char| c.is_ascii_alphanumeric())
    };
    text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name)) && !text.ends_with(".safetensors")
}

/// The directory of a model on the hub, in the cache: its safetensors, tokenizer and configuration, downloaded as far as
/// they are not there yet. `revision` is a branch, tag or commit, by default `main`. If the hub cannot be reached, what the
/// cache holds of that revision will do, and `progress` is told so.
///
/// # Errors
/// If the build lacks feature `hub`, the hub refuses, or it cannot be reached and the cache lacks the model.
pub fn download(id: &str, revision: Option<&str>, progress: Arc<dyn Progress + Send + Sync>) -> Result<PathBuf> {
    let failed = |text: String| Error::Hub { id: id.to_string(), text };
    fetch(id, revision.unwrap_or("main"), progress).map_err(failed)
}

/// How to get a model without this build's help.
fn by_hand(id: &str) -> String {
    format!("get the files elsewhere with `hf download {id} --local-dir DIR` and use that directory")
}

#[cfg(not(feature = "hub"))]
fn fetch(id: &str, _: &str, _: Arc<dyn Progress + Send + Sync>) -> std::result::Result<PathBuf, String> {
    Err(format!(
        "there is no such directory, and this build cannot download. Build it with feature hub (cargo install --path . \
         --features hub), or {}",
        by_hand(id)
    ))
}

#[cfg(feature = "hub")]
fn fetch(id: &str, revision: &str, progress: Arc<dyn Progress + Send + Sync>) -> std::result::Result<PathBuf, String> {
    use hf_hub::{HFClientSync, HFError};

    let patterns = |patterns: &[&str]| patterns.iter().map(|pattern| pattern.to_string()).collect::<Vec<_>>();
    let (owner, name) = hf_hub::split_id(id);
    let model = HFClientSync::new().map_err(|error| error.to_string())?.model(owner, name);
    let cached =
        || model.snapshot_download().revision(revision).local_files_only(true).send().ok().filter(|dir| whole(dir));
    let offline =
        std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| !["", "0", "false", "no", "off"].contains(&&*value));
    if offline {
        return cached().ok_or_else(|| {
            format!(
                "the cache lacks revision {revision}, and HF_HUB_OFFLINE forbids to download it; unset it, or {}",
                by_hand(id)
            )
        });
    }
    let sent = model
        .snapshot_download()
        .revision(revision)
        .allow_patterns(patterns(&["*.safetensors", "*.json", "*.jinja"]))
        // Folders hold the same weights in other formats; a second copy beside the shards is not needed either.
        .ignore_patterns(patterns(&["*/*", "consolidated*.safetensors"]))
        .progress(Arc::new(Bytes { progress: progress.clone(), seen: Default::default() }))
        .send();
    let error = match sent {
        Ok(dir) => return Ok(dir),
        Err(error) => error,
    };
    match &error {
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => Err(format!(
            "the hub refuses ({error}): the model is gated, private or misspelt. Accept its licence at \
             https://huggingface.co/{id}, and set HF_TOKEN or run `hf auth login`"
        )),
        // The hub is asked for a revision first, so a model that is not there looks like one without that revision.
        HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } => Err(format!(
            "the hub has no such model, or no revision {revision} of it, or it is private: check the name, and HF_TOKEN if \
             it is yours"
        )),
        HFError::Request { .. } | HFError::Http { .. } => match cached() {
            Some(dir) => {
                progress.note(&format!("the hub cannot be reached ({error}); using the copy of {id} in the cache"));
                Ok(dir)
            }
            None => Err(format!(
                "the hub cannot be reached ({error}), and the cache lacks revision {revision}. Check the network, or {}",
                by_hand(id)
            )),
        },
        _ => Err(error.to_string()),
    }
}

/// True if a directory holds a model's configuration and all files of its weights.
#[cfg(feature = "hub")]
fn whole(dir: &Path) -> bool {
    let files = crate::checkpoint::weight_files(dir).unwrap_or_default();
    dir.join("config.json").is_file() && !files.is_empty() && files.iter().all(|file| file.is_file())
}

/// Passes a download's bytes on.
#[cfg(feature = "hub")]
struct Bytes {
    progress: Arc<dyn Progress + Send + Sync>,
    /// Bytes that each file has so far; the empty name is for files that are only counted together.
    seen: std::sync::Mutex<std::collections::HashMap<String, u64>>,
}

#[cfg(feature = "hub")]
impl Bytes {
    fn advance(&self, file: &str, bytes: u64) {
        let mut seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = seen.entry(file.to_string()).or_default();
        self.progress.advance(bytes.saturating_sub(*before));
        *before = bytes.max(*before);
    }
}

#[cfg(feature = "hub")]
impl hf_hub::progress::ProgressHandler for Bytes {
    fn on_progress(&self, event: &hf_hub::progress::ProgressEvent) {
        use hf_hub::progress::{DownloadEvent, ProgressEvent};
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Start { total_files, total_bytes } if *total_files > 0 => {
                self.progress.file(&format!("{total_files} files"), *total_bytes);
            }
            DownloadEvent::Progress { files } => {
                for file in files {
                    self.progress.tensor(&file.filename);
                    self.advance(&file.filename, file.bytes_completed);
                }
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => self.advance("", *bytes_completed),
            _ => {}
        }
    }
}

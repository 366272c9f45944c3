//! A checkpoint to a compressed checkpoint.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::{Map as Json, Value, json};

use super::files::{CONFIG_NAME, companions, file_name};
use super::shard_writer::compress_file;
use super::{ConvertOptions, Progress, Summary};
use crate::checkpoint::{INDEX_NAME, weight_files};
use crate::format::manifest::{self, FileEntry, Manifest};
use crate::format::{Map, Shard, Stored, checksum, staging};
use crate::matrix::Codec;
use crate::{Error, Result};

/// The journal of an unfinished run: what it must find unchanged to go on.
const JOURNAL: &str = "taper-journal.json";
/// Ending of the files that an unfinished run has finished.
const DONE: &str = ".done";

/// Compresses the `.safetensors` file or model directory `input` to `output`.
///
/// Each matrix becomes one `U8` tensor under its own name; small tensors, unknown dtypes and what would not shrink pass
/// through. A directory gets a `quantization_config` in its `config.json` and a manifest `taper.json`; tokenizer and
/// other files are copied.
///
/// # Errors
/// If the input is malformed or compressed already, the output exists (without `force`), an interrupted run had other
/// options or input (without `force`), or the disk is full: in every case `output` is as it was before.
pub fn compress(
    input: impl AsRef<Path>,
    output: impl AsRef<Path>,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Summary> {
    let (input, output) = (input.as_ref(), output.as_ref());
    options.matrix.validate()?;
    if fs::metadata(input).map_err(Error::io(input))?.is_dir() {
        compress_dir(input, output, options, progress)
    } else {
        compress_single(input, output, options, progress)
    }
}

fn compress_single(input: &Path, output: &Path, options: &ConvertOptions, progress: &dyn Progress) -> Result<Summary> {
    let output = if output.is_dir() { output.join(file_name(input)) } else { output.to_path_buf() };
    refuse_existing(input, &output, options.force)?;
    let partial = staging::partial_path(&output)?;
    let mut summary = Summary::default();
    progress.file(&file_name(input), fs::metadata(input).map_err(Error::io(input))?.len());
    let done = compress_file(input, &partial, options, progress, &mut summary)
        .and_then(|()| staging::publish(&partial, &output));
    if done.is_err() {
        // The error at hand says more than a failure to clean up would.
        let _ = staging::remove(&partial);
    }
    done.map(|()| summary)
}

/// Output that exists is replaced only on request, and never if it is the input.
pub(super) fn refuse_existing(input: &Path, output: &Path, force: bool) -> Result<()> {
    let empty = |dir: &Path| fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    if !output.exists() || output.is_dir() && empty(output) {
        return Ok(());
    }
    let (from, to) =
        (input.canonicalize().map_err(Error::io(input))?, output.canonicalize().map_err(Error::io(output))?);
    if from == to || from.starts_with(&to) {
        return Err(Error::Invalid(format!("{} is the input, it cannot be the output", output.display())));
    }
    if force { Ok(()) } else { Err(Error::Invalid(format!("{} exists: use --force to replace it", output.display()))) }
}

fn compress_dir(input: &Path, output: &Path, options: &ConvertOptions, progress: &dyn Progress) -> Result<Summary> {
    refuse_existing(input, output, options.force)?;
    let weights = weight_files(input)?;
    let partial = staging::partial_path(output)?;
    let _lock = begin(&partial, &journal(&weights, options)?, options.force, progress)?;
    let summary = fill(input, &weights, &partial, options, progress);
    let published = summary.and_then(|summary| staging::publish(&partial, output).map(|()| summary));
    if published.is_err() && !holds_finished(&partial) {
        // Nothing to go on with later. The error at hand says more than a failure to clean up would.
        let _ = staging::remove(&partial);
    }
    published
}

/// True if a directory has weight files that a later run need not make again.
fn holds_finished(partial: &Path) -> bool {
    let finished = |name: &str| name.ends_with(DONE) || name.ends_with(".safetensors");
    fs::read_dir(partial).is_ok_and(|mut dir| dir.any(|e| e.is_ok_and(|e| finished(&e.file_name().to_string_lossy()))))
}

/// Makes everything that belongs to the result in `partial`.
fn fill(
    input: &Path,
    weights: &[PathBuf],
    partial: &Path,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Summary> {
    let companions = companions(input)?;
    let mut summary = Summary::default();
    for file in weights {
        let name = file_name(file);
        progress.file(&name, fs::metadata(file).map_err(Error::io(file))?.len());
        let (done, finished) = (partial.join(format!("{name}{DONE}")), partial.join(&name));
        if done.exists() || finished.exists() {
            let size = fs::metadata(file).map_err(Error::io(file))?.len();
            summary.resumed += 1;
            summary.bytes_in += size;
            summary.bytes_out += fs::metadata(if done.exists() { &done } else { &finished }).map_or(0, |m| m.len());
            progress.advance(size);
            continue;
        }
        let growing = partial.join(format!("{name}.partial"));
        compress_file(file, &growing, options, progress, &mut summary)?;
        fs::rename(&growing, &done).map_err(Error::io(&done))?;
        staging::sync_dir(partial)?;
    }
    for name in &companions.copied {
        staging::copy_file(&input.join(name), &partial.join(name))?;
    }
    for name in &companions.left_out {
        progress.note(&format!("{name} is left out: not part of a safetensors checkpoint"));
    }
    // Everything is there: give the weights their names, write what describes them, and publish.
    for file in weights {
        let name = file_name(file);
        let done = partial.join(format!("{name}{DONE}"));
        if done.exists() {
            fs::rename(&done, partial.join(&name)).map_err(Error::io(&done))?;
        }
    }
    let mut entries = BTreeMap::new();
    let codings = describe_weights(partial, weights, &mut entries)?;
    for name in &companions.copied {
        entries.insert(name.clone(), file_entry(&partial.join(name), None)?);
    }
    let texts = [
        (companions.config, CONFIG_NAME, Rewrite::Config(&codings, options)),
        (companions.index, INDEX_NAME, Rewrite::Index(&codings)),
    ];
    for (_, name, rewrite) in texts.into_iter().filter(|(there, ..)| *there) {
        let from = input.join(name);
        let original = fs::read_to_string(&from).map_err(Error::io(&from))?;
        let text = rewrite.apply(&original).map_err(|e| e.in_file(&from))?;
        staging::write_file(&partial.join(name), text.as_bytes())?;
        entries.insert(name.into(), file_entry(&partial.join(name), Some(original))?);
    }
    let manifest = Manifest {
        version: manifest::VERSION,
        writer: format!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")),
        codec: codec_name(options),
        files: entries,
        checksum: String::new(),
    };
    staging::write_file(&partial.join(manifest::FILE_NAME), &manifest.to_bytes()?)?;
    staging::remove(&partial.join(JOURNAL))?;
    staging::sync_dir(partial)?;
    Ok(summary)
}

/// What a later run must find unchanged: options, version, and the weight files' names, sizes and times.
fn journal(weights: &[PathBuf], options: &ConvertOptions) -> Result<Value> {
    let file = |path: &PathBuf| {
        let info = fs::metadata(path).map_err(Error::io(path))?;
        let modified = info.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        Ok(json!([file_name(path), info.len(), modified.map(|t| t.as_nanos().to_string())]))
    };
    let files: Result<Vec<Value>> = weights.iter().map(file).collect();
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "codec": format!("{:?}", options.matrix),
        "include": options.include.as_ref().map(|r| r.as_str()),
        "exclude": options.exclude.as_ref().map(|r| r.as_str()),
        "files": files?,
    }))
}

/// Opens the directory of a run, new or interrupted, and locks it against a second process.
fn begin(partial: &Path, journal: &Value, force: bool, progress: &dyn Progress) -> Result<File> {
    let path = partial.join(JOURNAL);
    let unchanged = |text: &[u8]| serde_json::from_slice::<Value>(text).is_ok_and(|found| found == *journal);
    match fs::read(&path) {
        Ok(text) if unchanged(&text) => progress.note("going on with an interrupted run"),
        Ok(_) if !force => {
            return Err(Error::Invalid(format!(
                "{} is left from an interrupted run with other options or another input: run it with the same ones to \
                 go on, or use --force to start over",
                partial.display()
            )));
        }
        found => {
            if found.is_ok() {
                lock(&path, partial)?;
            }
            // No valid journal means that not even the first file is finished.
            staging::remove(partial)?;
            fs::create_dir_all(partial).map_err(Error::io(partial))?;
            staging::write_file(&path, journal.to_string().as_bytes())?;
            staging::sync_dir(partial)?;
        }
    }
    lock(&path, partial)
}

/// Locks a run's journal for as long as the result lives.
fn lock(journal: &Path, partial: &Path) -> Result<File> {
    let file = File::open(journal).map_err(Error::io(journal))?;
    file.try_lock().map_err(|_| Error::Invalid(format!("another run is writing to {}", partial.display())))?;
    Ok(file)
}

/// Enters all weight files into the manifest; returns how each tensor is coded, and the bytes of all.
fn describe_weights(dir: &Path, weights: &[PathBuf], entries: &mut BTreeMap<String, FileEntry>) -> Result<Codings> {
    let mut codings = Codings::default();
    for name in weights.iter().map(|file| file_name(file)) {
        let map = Map::open(&dir.join(&name))?;
        let mut read = || {
            let shard = Shard::parse(map.bytes())?;
            let source = shard.source()?;
            for (index, entry) in source.iter().enumerate() {
                codings.bytes += shard.header().get(index).map_or(0, |e| e.bytes());
                if shard.header().get(index).is_some_and(|stored| stored.dtype != entry.dtype)
                    && let Stored::Compressed(stream) = shard.tensor(index, &entry)?
                {
                    codings.tensors.insert(entry.name.into(), stream_name(stream.plan()).into());
                }
            }
            Ok(shard.hash())
        };
        let hash = read().map_err(|e: Error| e.in_file(map.path()))?;
        let entry =
            FileEntry { bytes: map.bytes().len() as u64, xxh3: checksum::to_hex(hash), weights: true, original: None };
        entries.insert(name, entry);
    }
    Ok(codings)
}

/// How the tensors of a checkpoint are coded.
#[derive(Default)]
struct Codings {
    tensors: Json<String, Value>,
    bytes: u64,
}

fn stream_name(plan: &crate::codec::Plan) -> String {
    format!("{} {}", plan.kind.name(), plan.stage_name())
}

/// Codec and stage as the manifest names them.
fn codec_name(options: &ConvertOptions) -> String {
    let stage = options.matrix.stage.name();
    match options.matrix.codec {
        Codec::Rate { bits } => format!("rate {bits} {stage}"),
        codec => format!("{} {stage}", codec.name()),
    }
}

fn file_entry(path: &Path, original: Option<String>) -> Result<FileEntry> {
    let map = fs::read(path).map_err(Error::io(path))?;
    Ok(FileEntry { bytes: map.len() as u64, xxh3: checksum::to_hex(checksum::of(&map)), weights: false, original })
}

/// The two files that say something else about a compressed checkpoint.
enum Rewrite<'a> {
    Config(&'a Codings, &'a ConvertOptions),
    Index(&'a Codings),
}

impl Rewrite<'_> {
    fn apply(&self, original: &str) -> Result<String> {
        let malformed = |e: serde_json::Error| Error::Malformed(e.to_string());
        let mut json: Json<String, Value> = serde_json::from_str(original).map_err(malformed)?;
        match self {
            Rewrite::Config(codings, options) => {
                let mut quantization = json!({
                    "quant_method": "taper",
                    "version": env!("CARGO_PKG_VERSION"),
                    "format": crate::format::VERSION,
                    "codec": options.matrix.codec.name(),
                    "stage": options.matrix.stage.name(),
                    "lossless": options.matrix.codec == Codec::Lossless,
                    "tensors": codings.tensors,
                });
                if let Codec::Rate { bits } = options.matrix.codec {
                    quantization["bits"] = json!(bits);
                }
                if let Some(before) = json.get("quantization_config") {
                    quantization["original"] = before.clone();
                }
                json.insert("quantization_config".into(), quantization);
            }
            Rewrite::Index(codings) => {
                let metadata = json.entry("metadata").or_insert_with(|| json!({}));
                if let Some(metadata) = metadata.as_object_mut() {
                    metadata.insert("total_size".into(), codings.bytes.into());
                }
            }
        }
        serde_json::to_string_pretty(&json).map(|text| text + "\n").map_err(malformed)
    }
}

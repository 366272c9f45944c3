//! Checking a compressed checkpoint: every checksum, every structure, every entropy-coded stream.

use std::fs;
use std::path::Path;

use rayon::prelude::*;

use super::files::file_name;
use super::{Progress, check_cancelled};
use crate::checkpoint::weight_files;
use crate::format::manifest::{self, Manifest};
use crate::format::{Map, Shard, Stored, checksum};
use crate::matrix::CompressedMatrix;
use crate::{Error, Result};

/// What was checked and found right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Files, the manifest included.
    pub files: u64,
    /// Tensors.
    pub tensors: u64,
    /// Tiles.
    pub tiles: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Verifies the compressed `.safetensors` file or directory at `path`.
///
/// # Errors
/// The first damage found, in the order of files and offsets, with file, tensor, tile and byte range; or a file that is
/// missing from a directory or has been changed.
pub fn verify(path: impl AsRef<Path>, progress: &dyn Progress) -> Result<VerifyReport> {
    let path = path.as_ref();
    let mut report = VerifyReport::default();
    let is_dir = fs::metadata(path).map_err(Error::io(path))?.is_dir();
    let manifest = if is_dir { Manifest::read(path)? } else { None };
    if let Some(manifest) = &manifest {
        verify_companions(path, manifest, progress, &mut report)?;
    } else if is_dir {
        progress.note("no taper.json: only the weights can be checked");
    }
    for file in weight_files(path)? {
        let name = file_name(&file);
        let map = Map::open(&file)?;
        progress.file(&name, map.bytes().len() as u64);
        let hash = verify_weights(&map, progress, &mut report).map_err(|e| e.in_file(&file))?;
        let listed = manifest.as_ref().map(|m| m.files.get(&name).filter(|e| e.weights));
        match listed {
            Some(None) => return Err(Error::Malformed("not listed in taper.json".into()).in_file(&file)),
            Some(Some(entry)) => check_hash(&entry.xxh3, hash).map_err(|e| e.in_file(&file))?,
            None => {}
        }
    }
    Ok(report)
}

/// Every file of the manifest must be there; those without weights are compared whole.
fn verify_companions(
    dir: &Path,
    manifest: &Manifest,
    progress: &dyn Progress,
    report: &mut VerifyReport,
) -> Result<()> {
    report.files += 1;
    for (name, entry) in &manifest.files {
        let path = dir.join(name);
        let size = fs::metadata(&path).map_err(Error::io(&path))?.len();
        if size != entry.bytes {
            return Err(Error::field("file size", size, entry.bytes).in_file(&path));
        }
        if !entry.weights {
            let bytes = fs::read(&path).map_err(Error::io(&path))?;
            check_hash(&entry.xxh3, checksum::of(&bytes)).map_err(|e| e.in_file(&path))?;
            report.files += 1;
            report.bytes += size;
        }
    }
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let name = entry.map_err(Error::io(dir))?.file_name().to_string_lossy().into_owned();
        if name != manifest::FILE_NAME && !manifest.files.contains_key(&name) {
            progress.note(&format!("{name} is not part of the checkpoint"));
        }
    }
    Ok(())
}

fn check_hash(listed: &str, computed: u64) -> Result<()> {
    let stored = checksum::from_hex(listed).unwrap_or_default();
    if stored == computed { Ok(()) } else { Err(Error::Checksum { what: "the file", stored, computed }) }
}

/// Verifies one weight file and returns the checksum of its header.
fn verify_weights(map: &Map, progress: &dyn Progress, report: &mut VerifyReport) -> Result<u64> {
    let shard = Shard::parse(map.bytes())?;
    let source = shard.source()?;
    for (index, entry) in source.iter().enumerate() {
        check_cancelled(progress)?;
        progress.tensor(entry.name);
        match shard.tensor(index, &entry)? {
            Stored::Plain(bytes) => progress.advance(bytes.len() as u64),
            Stored::Compressed(stream) => {
                let matrix = CompressedMatrix::from_stream(*stream)?;
                report.tiles += matrix.geometry().tiles() as u64;
                verify_tiles(&matrix, progress).map_err(|e| e.in_tensor(entry.name))?;
            }
        }
    }
    report.files += 1;
    report.tensors += source.len() as u64;
    report.bytes += map.bytes().len() as u64;
    Ok(shard.hash())
}

/// Decodes every tile, which compares its checksum, its structure and its final states.
fn verify_tiles(matrix: &CompressedMatrix, progress: &dyn Progress) -> Result<()> {
    let check = |buffer: &mut Vec<u8>, tile: usize| {
        let rect = matrix.geometry().tile(tile);
        buffer.resize(rect.weights() * matrix.dtype().size(), 0);
        let decoded = matrix.decode_tile_into(tile, buffer);
        if let Ok(record) = matrix.stream().record(tile) {
            progress.advance(u64::from(record.size));
        }
        decoded.err()
    };
    let first = (0..matrix.geometry().tiles()).into_par_iter().map_init(Vec::new, check).find_map_first(|e| e);
    first.map_or(Ok(()), Err)
}

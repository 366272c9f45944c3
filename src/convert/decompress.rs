//! A compressed checkpoint back to the original files.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use super::compress::refuse_existing;
use super::files::{companions, file_name};
use super::{Progress, Summary, check_cancelled};
use crate::checkpoint::weight_files;
use crate::codec::TILE;
use crate::format::manifest::Manifest;
use crate::format::shard::is_compressed;
use crate::format::{Map, SafeTensors, Shard, Stored, staging};
use crate::matrix::CompressedMatrix;
use crate::{Error, Result};

/// Restores the original files of the compressed `.safetensors` file or directory `input` at `output`: after lossless
/// compression byte for byte, after quantisation with the quantised values in the original dtypes.
///
/// # Errors
/// If the input is not compressed or is damaged, or the output exists (without `force`). `output` is then as it was.
pub fn decompress(
    input: impl AsRef<Path>,
    output: impl AsRef<Path>,
    force: bool,
    progress: &dyn Progress,
) -> Result<Summary> {
    let (input, output) = (input.as_ref(), output.as_ref());
    let is_dir = fs::metadata(input).map_err(Error::io(input))?.is_dir();
    let output = if !is_dir && output.is_dir() { output.join(file_name(input)) } else { output.to_path_buf() };
    refuse_existing(input, &output, force)?;
    let partial = staging::partial_path(&output)?;
    staging::remove(&partial)?;
    let mut summary = Summary::default();
    let restored = if is_dir {
        restore_dir(input, &partial, progress, &mut summary)
    } else {
        restore_file(input, &partial, progress, &mut summary)
    };
    let done = restored.and_then(|()| staging::publish(&partial, &output));
    if done.is_err() {
        // The error at hand says more than a failure to clean up would.
        let _ = staging::remove(&partial);
    }
    done.map(|()| summary)
}

fn restore_dir(input: &Path, partial: &Path, progress: &dyn Progress, summary: &mut Summary) -> Result<()> {
    let manifest = Manifest::read(input)?;
    fs::create_dir_all(partial).map_err(Error::io(partial))?;
    for file in weight_files(input)? {
        restore_file(&file, &partial.join(file_name(&file)), progress, summary)?;
    }
    for name in &companions(input)?.copied {
        staging::copy_file(&input.join(name), &partial.join(name))?;
    }
    match manifest {
        Some(manifest) => {
            for (name, entry) in &manifest.files {
                if let Some(original) = &entry.original {
                    staging::write_file(&partial.join(name), original.as_bytes())?;
                }
            }
        }
        None => progress.note("no taper.json: config.json and the index cannot be restored"),
    }
    staging::sync_dir(partial)
}

fn restore_file(input: &Path, output: &Path, progress: &dyn Progress, summary: &mut Summary) -> Result<()> {
    let map = Map::open(input)?;
    let header = SafeTensors::parse(map.bytes()).map_err(|e| e.in_file(input))?;
    if !is_compressed(&header) {
        return Err(Error::Invalid("not compressed by taper".into()).in_file(input));
    }
    drop(header);
    let shard = Shard::parse(map.bytes()).map_err(|e| e.in_file(input))?;
    let source = shard.source().map_err(|e| e.in_file(input))?;
    progress.file(&file_name(input), source.data_bytes());
    let file = File::create(output).map_err(Error::io(output))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io(output));
    write(&(source.text.len() as u64).to_le_bytes())?;
    write(source.text.as_bytes())?;
    for (index, entry) in source.iter().enumerate() {
        progress.tensor(entry.name);
        let mut tensor = || match shard.tensor(index, &entry)? {
            Stored::Plain(bytes) => {
                progress.advance(bytes.len() as u64);
                write(bytes)
            }
            Stored::Compressed(stream) => {
                summary.compressed += 1;
                let matrix = CompressedMatrix::from_stream(*stream)?;
                strips(&matrix, progress, &mut write).map_err(|e| e.in_tensor(entry.name))
            }
        };
        tensor().map_err(|e| e.in_file(input))?;
    }
    summary.tensors += source.len() as u64;
    summary.bytes_in += map.bytes().len() as u64;
    summary.bytes_out += 8 + source.text.len() as u64 + source.data_bytes();
    out.into_inner().map_err(|e| Error::io(output)(e.into_error()))?.sync_all().map_err(Error::io(output))
}

/// Decodes a matrix some rows of tiles at a time, so that memory stays bounded.
fn strips(
    matrix: &CompressedMatrix,
    progress: &dyn Progress,
    write: &mut impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let geometry = matrix.geometry();
    // At least as many tiles as keep all threads busy.
    let tile_rows = (2 * rayon::current_num_threads()).div_ceil(geometry.tile_cols());
    let mut buffer = Vec::new();
    for first in (0..geometry.rows).step_by(tile_rows * TILE) {
        check_cancelled(progress)?;
        let rows = first..geometry.rows.min(first + tile_rows * TILE);
        buffer.resize(rows.len() * geometry.cols * matrix.dtype().size(), 0);
        matrix.decode_rows_into(rows, &mut buffer)?;
        write(&buffer)?;
        progress.advance(buffer.len() as u64);
    }
    Ok(())
}

//! One compressed weight file, written front to back; its header comes last.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use super::{ConvertOptions, MIN_WEIGHTS, Progress, Summary, check_cancelled};
use crate::codec::Dtype;
use crate::format::safetensors::TensorEntry;
use crate::format::shard::{Written, header_room, header_text, is_compressed, matrix_shape};
use crate::format::{Map, SafeTensors, checksum};
use crate::matrix::{MatrixEncoder, Sink, Source};
use crate::{Error, Result};

/// Compresses the safetensors file at `input` to `output`, which is synced but keeps its name.
pub(super) fn compress_file(
    input: &Path,
    output: &Path,
    options: &ConvertOptions,
    progress: &dyn Progress,
    summary: &mut Summary,
) -> Result<()> {
    let map = Map::open(input)?;
    let header = SafeTensors::parse(map.bytes()).map_err(|e| e.in_file(input))?;
    if is_compressed(&header) {
        return Err(Error::Invalid("already compressed".into()).in_file(input));
    }
    let file = File::create(output).map_err(Error::io(output))?;
    let room = header_room(&header);
    let mut out = Output { file: BufWriter::with_capacity(1 << 20, file), path: output, at: 0 };
    out.append(&(room as u64).to_le_bytes())?;
    out.append(&vec![b' '; room])?;
    let data = &map.bytes()[header.data_start..];
    let mut written = Vec::with_capacity(header.len());
    for entry in header.iter() {
        progress.tensor(entry.name);
        let tensor = write_tensor(&entry, data, &mut out, options, progress, summary);
        written.push(tensor.map_err(|e| e.in_tensor(entry.name).in_file(input))?);
    }
    let text = header_text(&header, &written, room).map_err(|e| e.in_file(output))?;
    out.at(8, text.as_bytes())?;
    out.file.get_ref().sync_all().map_err(Error::io(output))?;
    summary.tensors += header.len() as u64;
    summary.bytes_in += map.bytes().len() as u64;
    summary.bytes_out += out.at;
    Ok(())
}

/// True if the user's choices and the tensor's shape and dtype ask for compression.
fn wanted<'e>(entry: &TensorEntry<'e>, options: &ConvertOptions) -> Option<(Dtype, usize, usize)> {
    let included = options.include.as_ref().is_none_or(|r| r.is_match(entry.name));
    let excluded = options.exclude.as_ref().is_some_and(|r| r.is_match(entry.name));
    let dtype = Dtype::from_name(entry.dtype).filter(|_| included && !excluded)?;
    let (rows, cols) = matrix_shape(entry.shape).filter(|(rows, cols)| rows * cols >= MIN_WEIGHTS)?;
    let limit = u64::from(u32::MAX);
    (rows <= limit && cols <= limit).then_some((dtype, rows as usize, cols as usize))
}

fn write_tensor(
    entry: &TensorEntry,
    data: &[u8],
    out: &mut Output,
    options: &ConvertOptions,
    progress: &dyn Progress,
    summary: &mut Summary,
) -> Result<Written> {
    let bytes = &data[entry.start as usize..entry.end as usize];
    let name = entry.name.to_string();
    let start = out.at;
    // Bytes of a matrix that did not shrink were reported once already.
    let mut reported = 0;
    if let Some((dtype, rows, cols)) = wanted(entry, options) {
        let encoder = MatrixEncoder::new(Source::new(bytes, dtype, rows, cols)?, &options.matrix)?;
        let mut sink = TensorSink { out, start, progress, reported: 0 };
        // A plan without classes or scales cannot shrink anything.
        let shrinks = encoder.plan().class_bits > 0 || encoder.plan().quantised();
        let report = if shrinks { Some(encoder.run(&mut sink)?) } else { None };
        reported = sink.reported;
        match report.filter(|report| report.bytes < bytes.len() as u64) {
            Some(report) => {
                summary.compressed += 1;
                summary.signal += report.signal;
                summary.noise += report.noise;
                let shape = vec![report.bytes];
                return Ok(Written { name, dtype: "U8".into(), shape, bytes: report.bytes, hash: report.hash });
            }
            None => {
                summary.incompressible += 1;
                out.truncate(start)?;
            }
        }
    }
    for part in bytes.chunks(1 << 24) {
        check_cancelled(progress)?;
        out.append(part)?;
        let fresh = (part.len() as u64).saturating_sub(reported);
        reported = reported.saturating_sub(part.len() as u64);
        progress.advance(fresh);
    }
    let (dtype, shape) = (entry.dtype.to_string(), entry.shape.to_vec());
    Ok(Written { name, dtype, shape, bytes: bytes.len() as u64, hash: checksum::of(bytes) })
}

/// The growing file.
struct Output<'p> {
    file: BufWriter<File>,
    path: &'p Path,
    at: u64,
}

impl Output<'_> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.at += bytes.len() as u64;
        self.file.write_all(bytes).map_err(Error::io(self.path))
    }

    /// Overwrites bytes at `offset`; appending goes on at the end.
    fn at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let end = self.at;
        let mut write = || {
            self.file.seek(SeekFrom::Start(offset))?;
            self.file.write_all(bytes)?;
            self.file.seek(SeekFrom::Start(end)).map(drop)
        };
        write().map_err(Error::io(self.path))
    }

    /// Forgets everything from `end` on.
    fn truncate(&mut self, end: u64) -> Result<()> {
        self.at = end;
        let mut cut = || {
            self.file.seek(SeekFrom::Start(end))?;
            self.file.get_ref().set_len(end)
        };
        cut().map_err(Error::io(self.path))
    }
}

/// Where a matrix's stream goes within the file.
struct TensorSink<'o, 'p> {
    out: &'o mut Output<'p>,
    start: u64,
    progress: &'o dyn Progress,
    reported: u64,
}

impl Sink for TensorSink<'_, '_> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.append(bytes)
    }

    fn rewrite(&mut self, preamble: &[u8]) -> Result<()> {
        self.out.at(self.start, preamble)
    }

    fn progress(&mut self, source_bytes: u64) -> Result<()> {
        self.progress.advance(source_bytes - self.reported);
        self.reported = source_bytes;
        check_cancelled(self.progress)
    }
}

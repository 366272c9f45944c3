//! A checkpoint on disk, compressed or not: opened by memory map, read by tensor, tile or row.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::codec::Dtype;
use crate::format::safetensors::TensorEntry;
use crate::format::shard::{self, Place, matrix_shape};
use crate::format::{Checks, Map, SafeTensors, Shard, Stored};
use crate::matrix::{self, CompressedMatrix, Options, Weight};
use crate::{Error, Result};

/// Name of the list of tensors of a checkpoint with several files.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// The safetensors files at `path`: itself, or those of the directory (as its index lists them, or else all of them),
/// sorted by name.
///
/// # Errors
/// If there are none, or the index names one that is missing or lies elsewhere.
pub fn weight_files(path: &Path) -> Result<Vec<PathBuf>> {
    let info = fs::metadata(path).map_err(Error::io(path))?;
    if info.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let index = path.join(INDEX_NAME);
    let mut names: Vec<String> = if index.is_file() {
        let text = fs::read(&index).map_err(Error::io(&index))?;
        index_files(&text).map_err(|e| e.in_file(&index))?
    } else {
        let entries = fs::read_dir(path).map_err(Error::io(path))?;
        let names = entries.map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned()));
        names.collect::<std::io::Result<_>>().map_err(Error::io(path))?
    };
    names.retain(|name| name.ends_with(".safetensors") && !name.starts_with('.'));
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(Error::Invalid(format!("{}: no .safetensors file in this directory", path.display())));
    }
    Ok(names.into_iter().map(|name| path.join(name)).collect())
}

/// The files that an index lists.
fn index_files(text: &[u8]) -> Result<Vec<String>> {
    let json: serde_json::Value = serde_json::from_slice(text).map_err(|e| Error::Malformed(e.to_string()))?;
    let map = json.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| Error::Malformed("the index has no weight_map".into()))?;
    let file = |value: &serde_json::Value| match value.as_str() {
        Some(name) if !name.contains(['/', '\\']) && name != ".." => Ok(name.to_string()),
        _ => Err(Error::Malformed(format!("the index names {value}, which is not a file beside it"))),
    };
    map.values().map(file).collect()
}

/// A checkpoint, opened: headers parsed and checked, no tensor touched.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<Map>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    compressed: bool,
}

/// What a checkpoint knows of a tensor without touching it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its own dtype, as safetensors spells it.
    pub dtype: String,
    /// Its own shape.
    pub shape: Vec<u64>,
    /// True if it is stored as a tile stream.
    pub compressed: bool,
    /// Bytes that it takes in its file.
    pub stored_bytes: u64,
    file: usize,
    place: Place,
}

/// A tensor of a checkpoint.
#[derive(Debug)]
pub enum Tensor<'a> {
    /// Stored as it is.
    Plain(&'a [u8]),
    /// Stored as a tile stream. Dimensions but the last are its rows.
    Compressed(Box<CompressedMatrix<'a>>),
}

impl Checkpoint {
    /// Opens a `.safetensors` file or a directory in the Hugging Face layout, compressed or not.
    ///
    /// # Errors
    /// If a header is malformed or damaged, or a tensor's name occurs twice.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
        let files: Result<Vec<Map>> = weight_files(path.as_ref())?.iter().map(|file| Map::open(file)).collect();
        let mut checkpoint =
            Checkpoint { files: files?, tensors: Vec::new(), by_name: HashMap::new(), compressed: false };
        for file in 0..checkpoint.files.len() {
            let (tensors, compressed) =
                list(checkpoint.files[file].bytes(), file).map_err(|e| e.in_file(checkpoint.files[file].path()))?;
            checkpoint.compressed |= compressed;
            checkpoint.tensors.extend(tensors);
        }
        for (index, tensor) in checkpoint.tensors.iter().enumerate() {
            if checkpoint.by_name.insert(tensor.name.clone(), index).is_some() {
                let twice = Error::Malformed(format!("tensor {} is in two files", tensor.name));
                return Err(twice.in_file(path.as_ref()));
            }
        }
        Ok(checkpoint)
    }

    /// True if any of its files was written by `taper compress`.
    pub fn is_compressed(&self) -> bool {
        self.compressed
    }

    /// All tensors, in the order of files and offsets.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// What is known of the tensor of that name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        let index = self.by_name.get(name);
        index.map(|&i| &self.tensors[i]).ok_or_else(|| Error::Invalid(format!("the checkpoint has no tensor {name}")))
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, info: &TensorInfo) -> &Path {
        self.files[info.file].path()
    }

    /// A tensor's data. Compares the checksum of a plain tensor or of a stream's preamble; tiles stay untouched.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let info = self.info(name)?;
        self.open_tensor(info).map_err(|e| e.in_file(self.file_of(info)))
    }

    fn open_tensor(&self, info: &TensorInfo) -> Result<Tensor<'_>> {
        let stored = info.place.open(self.files[info.file].bytes(), &info.dtype, &info.shape, Checks::On);
        match stored.map_err(|e| e.in_tensor(&info.name))? {
            Stored::Plain(bytes) => Ok(Tensor::Plain(bytes)),
            Stored::Compressed(stream) => Ok(Tensor::Compressed(Box::new(CompressedMatrix::from_stream(*stream)?))),
        }
    }

    /// A whole tensor in its own dtype, row-major, little-endian.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        match self.tensor(name)? {
            Tensor::Plain(bytes) => Ok(bytes.to_vec()),
            Tensor::Compressed(matrix) => matrix.decode().map_err(|e| self.name(e, name)),
        }
    }

    /// Some rows of a tensor of two or more dimensions; only the bands that hold them are decoded.
    pub fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<u8>> {
        match self.tensor(name)? {
            Tensor::Compressed(matrix) => matrix.decode_rows(rows).map_err(|e| self.name(e, name)),
            Tensor::Plain(bytes) => {
                let info = self.info(name)?;
                let height = matrix_shape(&info.shape).map_or(1, |(rows, _)| rows as usize);
                let row = bytes.len() / height;
                let range = rows.start.saturating_mul(row)..rows.end.saturating_mul(row);
                let part = bytes.get(range).filter(|_| rows.end <= height);
                part.map(<[u8]>::to_vec).ok_or_else(|| {
                    self.name(Error::Invalid(format!("rows {rows:?} of a tensor with {height} rows")), name)
                })
            }
        }
    }

    /// A tensor of two or more dimensions as a compressed weight that keeps the checkpoint's map: without a copy where it
    /// is compressed, else compressed now as `options` say.
    ///
    /// # Errors
    /// If there is no such tensor, it is damaged, or its dtype or shape cannot be compressed.
    pub fn weight(self: &Arc<Self>, name: &str, options: &Options) -> Result<Weight> {
        let info = self.info(name)?;
        let weight = || match self.open_tensor(info)? {
            Tensor::Compressed(_) => Weight::new(MappedTensor { checkpoint: self.clone(), place: info.clone() }),
            Tensor::Plain(bytes) => {
                let dtype = Dtype::from_name(&info.dtype);
                let Some((dtype, (rows, cols))) = dtype.zip(matrix_shape(&info.shape)) else {
                    let what = format!("a tensor of shape {:?} and dtype {} is no weight", info.shape, info.dtype);
                    return Err(Error::Unsupported(what).in_tensor(name));
                };
                let stream = matrix::compress(bytes, dtype, rows as usize, cols as usize, options);
                Weight::new(stream.map_err(|e| e.in_tensor(name))?)
            }
        };
        let weight = weight().map_err(|e| e.in_file(self.file_of(info)))?;
        Ok(weight.with_activations(options.activations).with_origin(self.file_of(info), name))
    }

    /// One 256×256 tile of a compressed tensor: its place and its weights.
    pub fn read_tile(&self, name: &str, tile: usize) -> Result<(crate::codec::Rect, Vec<u8>)> {
        match self.tensor(name)? {
            Tensor::Compressed(matrix) => matrix.decode_tile(tile).map_err(|e| self.name(e, name)),
            Tensor::Plain(_) => Err(self.name(Error::Invalid("not compressed: it has no tiles".into()), name)),
        }
    }

    /// Names tensor and file in an error.
    fn name(&self, error: Error, name: &str) -> Error {
        match self.info(name) {
            Ok(info) => error.in_tensor(name).in_file(self.file_of(info)),
            Err(_) => error,
        }
    }
}

/// A tensor's bytes, for as long as its checkpoint is mapped.
struct MappedTensor {
    checkpoint: Arc<Checkpoint>,
    place: TensorInfo,
}

impl AsRef<[u8]> for MappedTensor {
    fn as_ref(&self) -> &[u8] {
        let TensorInfo { file, place, .. } = &self.place;
        self.checkpoint.files[*file].bytes().get(place.start..place.end).unwrap_or(&[])
    }
}

/// The tensors of one file, and whether it is compressed.
fn list(bytes: &[u8], file: usize) -> Result<(Vec<TensorInfo>, bool)> {
    let header = SafeTensors::parse(bytes)?;
    let info = |own: TensorEntry, place: Place| TensorInfo {
        name: own.name.to_string(),
        dtype: own.dtype.to_string(),
        shape: own.shape.to_vec(),
        compressed: place.compressed,
        stored_bytes: (place.end - place.start) as u64,
        file,
        place,
    };
    if !shard::is_compressed(&header) {
        let place = |entry: &TensorEntry| {
            let at = |offset: u64| header.data_start + offset as usize;
            Place { start: at(entry.start), end: at(entry.end), compressed: false, hash: None }
        };
        return Ok((header.iter().map(|entry| info(entry, place(&entry))).collect(), false));
    }
    drop(header);
    let shard = Shard::parse(bytes)?;
    let source = shard.source()?;
    let tensors = source.iter().enumerate().map(|(index, own)| Ok(info(own, shard.place(index, &own)?)));
    Ok((tensors.collect::<Result<_>>()?, true))
}

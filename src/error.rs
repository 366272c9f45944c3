//! The one error type of the crate.

use std::path::{Path, PathBuf};

/// What went wrong, and where.
///
/// Causes are wrapped from the inside out: a [`Error::Tile`] sits in an [`Error::Tensor`], which sits in an
/// [`Error::File`], so the printed message reads `FILE: tensor NAME: tile 3: checksum mismatch …`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operating system error on a path.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or directory concerned.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// An error inside a file.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file concerned.
        path: PathBuf,
        /// What is wrong in it.
        source: Box<Error>,
    },
    /// An error inside a named tensor.
    #[error("tensor {name}: {source}")]
    Tensor {
        /// The tensor's name in the checkpoint.
        name: String,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// An error inside one tile of a matrix.
    #[error("tile {tile} (bytes {start}..{end} of the tensor): {source}")]
    Tile {
        /// Index of the tile, row-major.
        tile: usize,
        /// Offset of the tile's first byte from the start of the tensor's data.
        start: u64,
        /// Offset past the tile's last byte.
        end: u64,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// Data ended before something that it announces.
    #[error("truncated: {what} needs {need} bytes, only {have} are there")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Bytes needed.
        need: u64,
        /// Bytes present.
        have: u64,
    },
    /// A field holds a value that the format does not allow.
    #[error("{field} is {got}, allowed: {allowed}")]
    Field {
        /// The field's name in the format specification.
        field: &'static str,
        /// The value found.
        got: String,
        /// What the specification allows there.
        allowed: String,
    },
    /// A stored checksum does not match the bytes.
    #[error("checksum mismatch in {what}: stored {stored:016x}, computed {computed:016x}; the data is damaged")]
    Checksum {
        /// What the checksum covers.
        what: &'static str,
        /// The checksum in the file.
        stored: u64,
        /// The checksum of the bytes.
        computed: u64,
    },
    /// An entropy-coded stream did not end where it must.
    #[error("corrupt stream: {0}")]
    Stream(&'static str),
    /// The safetensors header or a JSON file is malformed.
    #[error("{0}")]
    Malformed(String),
    /// Valid data that this build cannot handle, or a request that makes no sense for it.
    #[error("{0}")]
    Unsupported(String),
    /// The caller's arguments do not fit together.
    #[error("{0}")]
    Invalid(String),
    /// A model on the Hugging Face hub cannot be had.
    #[error("{id}: {text}")]
    Hub {
        /// The model's repository.
        id: String,
        /// Why, and what to do.
        text: String,
    },
    /// An error of candle's.
    #[cfg(feature = "candle")]
    #[error("{0}")]
    Candle(Box<candle_core::Error>),
    /// A re-decoded tile differs from its source: never expected, nothing was published.
    #[error("verification failed: the re-decoded weights differ from the source (this is a bug, please report it)")]
    Verify,
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// Shorthand used throughout the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    pub(crate) fn field(field: &'static str, got: impl ToString, allowed: impl ToString) -> Error {
        Error::Field { field, got: got.to_string(), allowed: allowed.to_string() }
    }

    /// Data of a format version that this build lacks.
    pub(crate) fn version(what: &str, found: impl std::fmt::Display, reads: impl std::fmt::Display) -> Error {
        Error::Unsupported(format!(
            "{what} has format version {found}, written by a newer candle-taper; this build reads version {reads}: update \
             candle-taper"
        ))
    }

    /// Wraps the error with the file it occurred in.
    pub(crate) fn in_file(self, path: impl AsRef<Path>) -> Error {
        match self {
            // Already names its file.
            Error::Io { .. } | Error::File { .. } | Error::Cancelled => self,
            other => Error::File { path: path.as_ref().to_path_buf(), source: Box::new(other) },
        }
    }

    /// Wraps the error with the tensor it occurred in.
    pub(crate) fn in_tensor(self, name: &str) -> Error {
        match self {
            Error::Io { .. } | Error::Cancelled => self,
            other => Error::Tensor { name: name.to_string(), source: Box::new(other) },
        }
    }
}

#[cfg(feature = "candle")]
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Error {
        Error::Candle(Box::new(error))
    }
}

//! Whole checkpoints: compress, decompress, verify.
//!
//! Output grows beside its final place as `.NAME.partial` and is renamed when it is complete and synced, so that a
//! killed run leaves nothing that loads as the result. A compression that was interrupted goes on after the last
//! finished file.

mod compress;
mod decompress;
mod files;
mod shard_writer;
mod verify;

use regex::Regex;

pub use compress::compress;
pub use decompress::decompress;
pub use verify::{VerifyReport, verify};

use crate::matrix::Options;
use crate::{Error, Result};

/// Tensors with fewer weights than this pass through: a stream's header, table and states would eat what it saves.
pub const MIN_WEIGHTS: u64 = 4096;

/// Choices for compressing a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct ConvertOptions {
    /// How each matrix is coded.
    pub matrix: Options,
    /// Only tensors whose name matches are compressed.
    pub include: Option<Regex>,
    /// Tensors whose name matches pass through.
    pub exclude: Option<Regex>,
    /// Replace existing output, and discard an interrupted run with other options.
    pub force: bool,
}

/// What a conversion did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Tensors in all files.
    pub tensors: u64,
    /// Of these, compressed ones.
    pub compressed: u64,
    /// Matrices that would not shrink and pass through.
    pub incompressible: u64,
    /// Files that an earlier, interrupted run had finished.
    pub resumed: u64,
    /// Bytes of all weight files before.
    pub bytes_in: u64,
    /// Bytes of all weight files after.
    pub bytes_out: u64,
    /// Sum of the squared weights of quantised matrices.
    pub signal: f64,
    /// Sum of the squared errors of quantised matrices.
    pub noise: f64,
}

/// What happens during long work. All methods may be called from the working thread at any time.
pub trait Progress: Sync {
    /// Work on a file begins; it has this many bytes of tensors.
    fn file(&self, _name: &str, _bytes: u64) {}
    /// Work on a tensor begins.
    fn tensor(&self, _name: &str) {}
    /// This many bytes more are done.
    fn advance(&self, _bytes: u64) {}
    /// Something that the user should know, such as a file that is left out.
    fn note(&self, _text: &str) {}
    /// True if the work should stop; what is finished stays for a later run.
    fn cancelled(&self) -> bool {
        false
    }
}

/// No progress is reported.
impl Progress for () {}

pub(crate) fn check_cancelled(progress: &dyn Progress) -> Result<()> {
    if progress.cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}

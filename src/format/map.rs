//! Memory maps, behind one safe door.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A whole file, mapped read-only.
///
/// Nothing is promised if another process changes or shortens the file meanwhile: weights may then be wrong, or the
/// process be ended by the system, as with every memory map.
#[derive(Debug)]
pub struct Map {
    map: memmap2::Mmap,
    path: PathBuf,
}

impl Map {
    /// Maps the file at `path`.
    pub fn open(path: &Path) -> Result<Map> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read-only and private to this value; that others leave the file alone is documented.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Map { map, path: path.to_path_buf() })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Lets go of the memory that holds these bytes, for those who have copied them. Read again, they come from the file.
    pub fn forget(&self, range: Range<usize>) {
        let end = range.end.min(self.map.len());
        // Advice: if it cannot be followed, the pages stay until the system needs them.
        #[cfg(unix)]
        if let Some(length) = end.checked_sub(range.start).filter(|&length| length > 0) {
            // SAFETY: the map is of a file and read-only, so what is dropped is read from there again.
            let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, length) };
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

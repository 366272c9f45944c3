//! Output that appears whole or not at all: written under another name in the same folder, synced, then renamed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The name under which `output` grows: `.NAME.partial` beside it.
pub fn partial_path(output: &Path) -> Result<PathBuf> {
    let Some(name) = output.file_name() else {
        return Err(Error::Invalid(format!("{} is not a place for output", output.display())));
    };
    let mut partial = OsString::from(".");
    partial.push(name);
    partial.push(".partial");
    Ok(output.with_file_name(partial))
}

/// Makes a file's or directory's entry durable by syncing the directory that holds it.
pub fn sync_parent(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    sync_dir(parent)
}

/// Syncs a directory.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io(dir))
}

/// Writes a whole file under a temporary name, syncs it and renames it to `path`.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = partial_path(path)?;
    let mut file = File::create(&partial).map_err(Error::io(&partial))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(&partial))?;
    fs::rename(&partial, path).map_err(Error::io(path))
}

/// Copies a file under a temporary name, syncs the copy and renames it to `to`.
pub fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let partial = partial_path(to)?;
    fs::copy(from, &partial).map_err(Error::io(from))?;
    File::open(&partial).and_then(|f| f.sync_all()).map_err(Error::io(&partial))?;
    fs::rename(&partial, to).map_err(Error::io(to))
}

/// Renames a finished file or directory to its final name and syncs the folder. What was there before is replaced, a
/// directory by exchanging the two, so that at every moment one of them is there whole.
pub fn publish(partial: &Path, output: &Path) -> Result<()> {
    if output.is_dir() && fs::read_dir(output).map_err(Error::io(output))?.next().is_some() {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
        renameat_with(CWD, partial, CWD, output, RenameFlags::EXCHANGE)
            .map_err(|e| Error::io(output)(std::io::Error::from(e)))?;
        sync_parent(output)?;
        return fs::remove_dir_all(partial).map_err(Error::io(partial));
    }
    fs::rename(partial, output).map_err(Error::io(output))?;
    sync_parent(output)
}

/// Removes a file or directory if it exists.
pub fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

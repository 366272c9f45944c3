//! `taper.json`: which files make up a compressed directory, and what is needed to restore the original one.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::checksum::{self, NO_HEX};
use crate::{Error, Result};

/// Name of the manifest in a compressed directory.
pub const FILE_NAME: &str = "taper.json";
/// The version that this crate writes, and the only one that it reads.
pub const VERSION: u32 = 1;

/// The manifest's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format version.
    pub version: u32,
    /// Name and version of the crate that wrote it.
    pub writer: String,
    /// Codec and stage of the conversion, such as `lossless rans`.
    pub codec: String,
    /// All files but the manifest.
    pub files: BTreeMap<String, FileEntry>,
    /// XXH3 of this file's bytes with these 16 digits read as zeros.
    pub checksum: String,
}

/// One file of a compressed directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its size in bytes.
    pub bytes: u64,
    /// For weights the checksum of their header, which covers all others; else XXH3 of the file.
    pub xxh3: String,
    /// True for compressed weights.
    #[serde(default)]
    pub weights: bool,
    /// The original file's text, where this one differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<String>,
}

impl Manifest {
    /// The file's bytes, its checksum filled in.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let blank = Manifest { checksum: NO_HEX.into(), ..self.clone() };
        let text = serde_json::to_string_pretty(&blank).map_err(|e| Error::Malformed(format!("{FILE_NAME}: {e}")))?;
        let hash = checksum::of(text.as_bytes());
        Ok(replace_last(&text, NO_HEX, &checksum::to_hex(hash)).into_bytes())
    }

    /// Parses a manifest and compares its checksum.
    pub fn parse(bytes: &[u8]) -> Result<Manifest> {
        let text = std::str::from_utf8(bytes).map_err(|e| Error::Malformed(e.to_string()))?;
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let version: Version = serde_json::from_str(text).map_err(|e| Error::Malformed(e.to_string()))?;
        if version.version != VERSION {
            return Err(Error::version("the checkpoint", version.version, VERSION));
        }
        let manifest: Manifest = serde_json::from_str(text).map_err(|e| Error::Malformed(e.to_string()))?;
        let stored = checksum::from_hex(&manifest.checksum);
        let computed = checksum::of(replace_last(text, &manifest.checksum, NO_HEX).as_bytes());
        if stored != Some(computed) {
            return Err(Error::Checksum { what: "the manifest", stored: stored.unwrap_or_default(), computed });
        }
        Ok(manifest)
    }

    /// Reads the manifest of a directory; `None` if there is none.
    pub fn read(dir: &Path) -> Result<Option<Manifest>> {
        let path = dir.join(FILE_NAME);
        match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(&path)(e)),
            Ok(bytes) => Manifest::parse(&bytes).map(Some).map_err(|e| e.in_file(&path)),
        }
    }
}

/// The checksum is the last field, so its last occurrence is itself.
fn replace_last(text: &str, from: &str, to: &str) -> String {
    match text.rfind(from) {
        Some(at) if !from.is_empty() => format!("{}{to}{}", &text[..at], &text[at + from.len()..]),
        _ => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_of_a_manifest_is_noticed() {
        let entry =
            FileEntry { bytes: 3, xxh3: "00000000000000aa".into(), weights: true, original: Some("{}\n".into()) };
        let manifest = Manifest {
            version: VERSION,
            writer: "candle-taper 0.1.0".into(),
            codec: "lossless rans".into(),
            files: [("model.safetensors".to_string(), entry)].into(),
            checksum: String::new(),
        };
        let bytes = manifest.to_bytes().unwrap();
        let back = Manifest::parse(&bytes).unwrap();
        assert_eq!(back.files, manifest.files);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::parse(&damaged).is_err(), "bit {bit}");
        }
    }
}

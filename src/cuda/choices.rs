//! Layouts and kernels that were the fastest, remembered for this process and, in a file in the user's cache, for the next
//! ones.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::{env, fs, io};

use serde::{Deserialize, Serialize};

/// What was measured for one shape on one GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// The name of the layout or kernel to take.
    #[serde(rename = "layout")]
    choice: String,
    /// Microseconds of a product with each.
    us: Vec<(String, f64)>,
}

impl Measured {
    pub fn new(choice: &str, times: &[(&str, f64)]) -> Measured {
        let us = times.iter().map(|(name, us)| ((*name).into(), (us * 100.0).round() / 100.0)).collect();
        Measured { choice: choice.into(), us }
    }

    /// The name of what to take: another version of this crate may have written one that this one does not know.
    pub fn choice(&self) -> &str {
        &self.choice
    }

    /// The times, as text.
    pub fn times(&self) -> String {
        let times: Vec<String> = self.us.iter().map(|(layout, us)| format!("{layout} {us:.1} us")).collect();
        times.join(", ")
    }
}

/// All that is remembered.
#[derive(Debug, Default)]
pub(super) struct Choices {
    file: Option<PathBuf>,
    known: HashMap<String, Measured>,
}

impl Choices {
    /// Calls `work` with those of this process. Whoever measures does it there: one at a time.
    pub fn shared<T>(work: impl FnOnce(&mut Choices) -> T) -> T {
        static CHOICES: Mutex<Option<Choices>> = Mutex::new(None);
        let mut choices = CHOICES.lock().unwrap_or_else(PoisonError::into_inner);
        work(choices.get_or_insert_with(|| Choices::open(default_file())))
    }

    /// What `file` holds: nothing if it is not there or cannot be read.
    pub fn open(file: Option<PathBuf>) -> Choices {
        let known = file.as_deref().map(read).unwrap_or_default();
        Choices { file, known }
    }

    pub fn get(&self, key: &str) -> Option<&Measured> {
        self.known.get(key)
    }

    /// Remembers a measurement. That the file cannot be written is no error: it will be measured again.
    pub fn put(&mut self, key: String, measured: Measured) {
        self.known.insert(key, measured);
        if let Some(file) = &self.file {
            _ = write(file, &self.known);
        }
    }
}

fn read(file: &Path) -> HashMap<String, Measured> {
    fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Adds what is known to what other processes wrote meanwhile, in a new file that takes the old one's place when it is
/// complete.
fn write(file: &Path, known: &HashMap<String, Measured>) -> io::Result<()> {
    let mut all = read(file);
    all.extend(known.iter().map(|(key, measured)| (key.clone(), measured.clone())));
    let sorted: std::collections::BTreeMap<_, _> = all.iter().collect();
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = file.with_extension(format!("{}.tmp", std::process::id()));
    let result = fs::write(&new, serde_json::to_vec_pretty(&sorted)?).and_then(|()| fs::rename(&new, file));
    if result.is_err() {
        _ = fs::remove_file(&new);
    }
    result
}

/// Where it is kept: `candle-taper/layouts.json` in the user's cache.
fn default_file() -> Option<PathBuf> {
    let named = |name: &str| env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let cache = named("XDG_CACHE_HOME")
        .or_else(|| named("HOME").map(|home| home.join(".cache")))
        .or_else(|| named("LOCALAPPDATA"))?;
    Some(cache.join("candle-taper").join("layouts.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_outlive_a_process_and_damage_to_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a").join("layouts.json");
        let measured = Measured::new("pair", &[("fixed", 10.126), ("pair", 9.5)]);
        assert_eq!(measured.times(), "fixed 10.1 us, pair 9.5 us");
        let mut choices = Choices::open(Some(file.clone()));
        assert!(choices.get("a").is_none());
        choices.put("a".into(), measured.clone());
        // Two processes do not forget each other's.
        let (mut one, mut other) = (Choices::open(Some(file.clone())), Choices::open(Some(file.clone())));
        one.put("b".into(), measured.clone());
        other.put("c".into(), measured.clone());
        let all = Choices::open(Some(file.clone()));
        assert!(["a", "b", "c"].iter().all(|key| all.get(key) == Some(&measured)));
        assert_eq!(all.get("a").unwrap().choice(), "pair");
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "a temporary file was left");
        for damage in ["", "{", "[1, 2]", "{\"a\": {\"layout\": 3}}"] {
            fs::write(&file, damage).unwrap();
            let mut choices = Choices::open(Some(file.clone()));
            assert!(choices.get("a").is_none());
            choices.put("a".into(), measured.clone());
            assert_eq!(Choices::open(Some(file.clone())).get("a"), Some(&measured));
        }
        // A cache that cannot be written is none.
        let mut nowhere = Choices::open(Some(file.join("below a file").join("layouts.json")));
        nowhere.put("a".into(), measured.clone());
        assert_eq!(nowhere.get("a"), Some(&measured));
    }
}

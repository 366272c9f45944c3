//! Models from a hub: a server of our own that speaks its protocol, then without it.
#![cfg(feature = "hub")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use common::llama::{Tiny, VOCAB};
use common::model::files;
use serde_json::json;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves the model `owner/name` at revision `main`; others and the model `owner/gated` are refused.
struct Hub {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (files, log) = (Arc::new(files), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, log) = (files.clone(), log.clone());
                std::thread::spawn(move || answer(stream, &files, &log));
            }
        });
        Hub { address, requests }
    }
}

/// Answers one request and closes the connection.
fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, log: &Mutex<Vec<String>>) {
    let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let Some((method, path)) = head.first().and_then(|line| line.split_once(' ')) else { return };
    let path = path.split([' ', '?']).next().unwrap_or_default();
    log.lock().unwrap().push(head.join("\n"));
    let file = path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/")).and_then(|name| files.get(name));
    let (status, body) = match path {
        "/api/models/owner/name/revision/main" => {
            ("200 OK", json!({"id": "owner/name", "sha": COMMIT}).to_string().into())
        }
        _ if path == format!("/api/models/owner/name/tree/{COMMIT}") => {
            let entry = |(name, bytes): (&String, &Vec<u8>)| json!({"type": "file", "oid": "1", "size": bytes.len(), "path": name});
            ("200 OK", json!(files.iter().map(entry).collect::<Vec<_>>()).to_string().into_bytes())
        }
        _ if path.starts_with("/api/models/owner/gated") => ("403 Forbidden", Vec::new()),
        _ => file.map_or(("404 Not Found", Vec::new()), |bytes| ("200 OK", bytes.clone())),
    };
    let tag = body.iter().fold(body.len() as u64, |hash, &byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"{tag:016x}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
         Content-Type: application/json\r\nConnection: close\r\n\r\n",
        body.len()
    );
    if method != "HEAD" {
        let _ = stream.write_all(&body);
    }
}

/// A tiny model with files that nobody needs.
fn repository() -> (Tiny, BTreeMap<String, Vec<u8>>) {
    let tiny = Tiny::new();
    let vocab: serde_json::Map<_, _> = (0..VOCAB).map(|i| (format!("w{i}"), i.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    });
    fs::write(tiny.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let mut files = files(tiny.path());
    for unwanted in ["README.md", "pytorch_model.bin", "original/model.safetensors", "consolidated.00.safetensors"] {
        files.insert(unwanted.into(), vec![1; 99]);
    }
    (tiny, files)
}

/// `taper generate ARGS` with this hub, this home and a token.
fn generate(hub: &str, home: &Path, more: &[(&str, &str)], args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taper"));
    command.args(["generate", "-n", "8", "--temperature", "0", "--prompt", "w3 w4"]).args(args);
    command.env("HF_ENDPOINT", hub).env("HF_HOME", home).env("HF_TOKEN", "hf_secret").env_remove("HF_HUB_CACHE");
    command.envs(more.iter().copied()).output().unwrap()
}

#[track_caller]
fn text(output: &Output) -> (String, String) {
    assert!(output.status.success(), "{output:?}");
    (String::from_utf8(output.stdout.clone()).unwrap(), String::from_utf8(output.stderr.clone()).unwrap())
}

#[track_caller]
fn error(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Nobody listens there.
const NOWHERE: &str = "http://127.0.0.1:9";

#[test]
fn models_are_downloaded_once_and_found_in_the_cache() {
    let (tiny, files) = repository();
    let expected = text(&generate(NOWHERE, tiny.path(), &[], &["--model", tiny.path().to_str().unwrap()])).0;
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(files);
    let model = ["--model-id", "owner/name"];
    assert_eq!(text(&generate(&hub.address, home.path(), &[], &model)).0, expected);
    let snapshot = home.path().join("hub/models--owner--name/snapshots").join(COMMIT);
    let mut names: Vec<_> = fs::read_dir(&snapshot).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    let requests = hub.requests.lock().unwrap().drain(..).collect::<Vec<_>>();
    assert!(requests.iter().all(|head| head.to_lowercase().contains("authorization: bearer hf_secret")));

    // Again: no file is asked for.
    assert_eq!(text(&generate(&hub.address, home.path(), &[], &model)).0, expected);
    assert!(!hub.requests.lock().unwrap().iter().any(|head| head.contains("/resolve/")));
    // A hub that cannot be reached, and one that must not be.
    let (again, notes) = text(&generate(NOWHERE, home.path(), &[], &model));
    assert_eq!(again, expected);
    assert!(notes.contains("using the copy of owner/name in the cache"), "{notes}");
    let offline = [("HF_HUB_OFFLINE", "1")];
    assert_eq!(text(&generate(&hub.address, home.path(), &offline, &model)).0, expected);
    let commit = ["--model-id", "owner/name", "--revision", COMMIT];
    assert_eq!(text(&generate(&hub.address, home.path(), &offline, &commit)).0, expected);

    // What is missing, and what is not ours.
    let other = generate(&hub.address, home.path(), &offline, &["--model-id", "owner/name", "--revision", "v2"]);
    let other = error(&other);
    assert!(other.contains("owner/name: the cache lacks revision v2") && other.contains("HF_HUB_OFFLINE"), "{other}");
    let none = error(&generate(&hub.address, home.path(), &[], &["--model-id", "owner/none"]));
    assert!(none.contains("owner/none: the hub has no such model"), "{none}");
    let gated = error(&generate(&hub.address, home.path(), &[], &["--model-id", "owner/gated"]));
    assert!(gated.contains("HF_TOKEN") && gated.contains("/owner/gated"), "{gated}");
    let which = error(&generate(NOWHERE, home.path(), &[], &["--which", "v32-1b"]));
    for part in ["meta-llama/Llama-3.2-1B: the hub cannot be reached", "hf download meta-llama/Llama-3.2-1B"] {
        assert!(which.contains(part), "{which}");
    }
}

/// A cache that another program filled, by the layout that all share.
#[test]
fn caches_of_other_programs_are_read() {
    let (tiny, _) = repository();
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("hub/models--owner--name");
    let snapshot = model.join("snapshots").join(COMMIT);
    fs::create_dir_all(model.join("refs")).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(model.join("refs/main"), COMMIT).unwrap();
    let offline = [("HF_HUB_OFFLINE", "1")];
    let run = || generate(NOWHERE, home.path(), &offline, &["--model-id", "owner/name"]);
    for (name, bytes) in files(tiny.path()).into_iter().rev() {
        // Whatever is missing of it, it is not used in part.
        assert!(error(&run()).contains("the cache lacks revision main"));
        fs::write(snapshot.join(name), bytes).unwrap();
    }
    text(&run());
}

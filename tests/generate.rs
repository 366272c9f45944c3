//! `taper generate` as a user meets it.
#![cfg(feature = "candle")]

mod common;

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use common::llama::{Tiny, VOCAB};
use serde_json::json;

/// A tiny model whose tokens are the words `w0` to `w96`; `w1` begins a text.
fn model() -> Tiny {
    let tiny = Tiny::new();
    let vocab: serde_json::Map<_, _> = (0..VOCAB).map(|i| (format!("w{i}"), i.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    });
    fs::write(tiny.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    tiny
}

/// `taper generate --model MODEL ARGS`, with `input` piped into it.
fn generate(tiny: &Tiny, args: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taper"));
    command.args(["generate", "--model"]).arg(tiny.path()).args(args).current_dir(tiny.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // The command may end without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

#[track_caller]
fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn error(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn text_follows_the_prompt_wherever_it_comes_from() {
    let tiny = model();
    let greedy = ["-q", "-n", "12", "--temperature", "0"];
    let run = |more: &[&str], input: &str| text(&generate(&tiny, &[&greedy, more].concat(), input));
    let expected = run(&["--prompt", "w3 w4"], "");
    assert!(expected.starts_with("w3 w4 w") && expected.ends_with('\n'), "{expected}");
    assert_eq!(expected.split_whitespace().count(), 14, "{expected}");
    assert_eq!(run(&[], "w3 w4\n"), expected);
    fs::write(tiny.path().join("prompt"), "w3 w4").unwrap();
    assert_eq!(run(&["--file", "prompt"], ""), expected);
    assert_eq!(run(&["--prompt", "w3 w4", "--no-kv-cache", "--cpu"], ""), expected);
    let penalised = run(&["--prompt", "w3 w4", "--repeat-penalty", "5"], "");
    let mut words: Vec<&str> = penalised.split_whitespace().collect();
    words.sort();
    assert!(words.windows(2).all(|pair| pair[0] != pair[1]), "nothing repeats: {penalised}");
    assert_eq!(text(&generate(&tiny, &["-n", "0", "--prompt", "w3 w4"], "w5")), "w3 w4\n");

    let random = |seed: &str| {
        let args = ["-n", "30", "--prompt", "w5", "--top-k", "40", "--top-p", "0.9", "--seed", seed];
        generate(&tiny, &args, "")
    };
    let output = random("1");
    assert_eq!(text(&output), text(&random("1")));
    assert_ne!(text(&output), text(&random("2")));
    let notes = String::from_utf8(output.stderr).unwrap();
    for part in ["2 prompt tokens (", "tokens generated", "token/s", "peak memory"] {
        assert!(notes.contains(part), "{notes}");
    }
}

#[test]
fn bos_is_added_unless_the_tokenizer_does_not_want_it() {
    let tiny = model();
    let count = |prompt: &str| {
        let output = generate(&tiny, &["-n", "1", "--prompt", prompt], "");
        String::from_utf8(output.stderr).unwrap().lines().find(|l| l.contains("prompt tokens")).unwrap()[..1]
            .to_string()
    };
    assert_eq!(count("w5 w6"), "3");
    assert_eq!(count("w1 w5 w6"), "3");
    assert_eq!(count(""), "1");
    fs::write(tiny.path().join("tokenizer_config.json"), r#"{"add_bos_token": false}"#).unwrap();
    assert_eq!(count("w5 w6"), "2");
    assert!(error(&generate(&tiny, &["--prompt", ""], "")).contains("the prompt has no tokens"));
}

#[test]
fn it_stops_at_the_end_of_text_and_of_the_context() {
    let mut tiny = model();
    let args = ["-n", "40", "--prompt", "w7", "--temperature", "0"];
    let whole = text(&generate(&tiny, &args, ""));
    let words: Vec<&str> = whole.split_whitespace().collect();
    let third = words[3];
    let first = words.iter().skip(1).position(|word| *word == third).unwrap();
    // Single, in a list, and in generation_config.json.
    let id: u32 = third[1..].parse().unwrap();
    tiny.config["eos_token_id"] = json!([96, id]);
    tiny.write();
    assert_eq!(text(&generate(&tiny, &args, "")).split_whitespace().count(), 1 + first);
    tiny.config["eos_token_id"] = json!(null);
    tiny.write();
    assert_eq!(text(&generate(&tiny, &args, "")).split_whitespace().count(), 41);
    fs::write(tiny.path().join("generation_config.json"), json!({ "eos_token_id": id }).to_string()).unwrap();
    assert_eq!(text(&generate(&tiny, &args, "")).split_whitespace().count(), 1 + first);
    fs::remove_file(tiny.path().join("generation_config.json")).unwrap();

    // Position 8 is beyond the context, but what follows position 7 can be told: with BOS, w7 and seven more.
    tiny.config["max_position_embeddings"] = 8.into();
    tiny.write();
    let output = generate(&tiny, &args, "");
    assert_eq!(text(&output).split_whitespace().count(), 8);
    assert!(String::from_utf8_lossy(&output.stderr).contains("context is full"));
    let long = error(&generate(&tiny, &["--prompt", &"w5 ".repeat(8)], ""));
    assert!(long.contains("the prompt has 9 tokens, the model's context is 8"), "{long}");
}

#[test]
fn errors_say_what_to_do() {
    let mut tiny = model();
    let fails = |tiny: &Tiny, args: &[&str], part: &str| {
        let text = error(&generate(tiny, args, "w5"));
        assert!(text.contains(part), "{text}");
    };
    for flag in ["--model-id", "--revision", "--which"] {
        fails(&tiny, &[flag, "v3"], "pass --compressed DIR");
    }
    fails(&tiny, &["--use-flash-attn"], "GPU");
    fails(&tiny, &["--top-k", "0"], "--top-k");
    fails(&tiny, &["--repeat-penalty", "0"], "--repeat-penalty");
    fails(&tiny, &["--file", "nothing"], "nothing");
    tiny.config["rms_norm_eps"] = json!(-1000.0);
    tiny.write();
    fails(&tiny, &["-n", "3"], "not finite");
    fs::remove_file(tiny.path().join("tokenizer.json")).unwrap();
    fails(&tiny, &[], "no tokenizer.json");
    fs::remove_file(tiny.path().join("config.json")).unwrap();
    fails(&tiny, &[], "no config.json");
}

#[test]
fn tracing_writes_spans() {
    let tiny = model();
    text(&generate(&tiny, &["--tracing", "-n", "3", "--temperature", "0", "--prompt", "w7"], ""));
    let mut files = fs::read_dir(tiny.path()).unwrap().map(|entry| entry.unwrap().path());
    let path = files.find(|path| path.file_name().unwrap().to_string_lossy().starts_with("trace-")).unwrap();
    let events: Vec<serde_json::Value> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    // Three forward passes through two layers.
    let count = |phase: &str| events.iter().filter(|e| e["ph"] == phase && e["name"] == "block").count();
    assert_eq!((count("B"), count("E")), (6, 6));
}

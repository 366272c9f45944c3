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

/// Fails with this exit code.
#[track_caller]
fn fails_with(tiny: &Tiny, code: i32, part: &str) {
    let output = generate(tiny, &[], "w5");
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains(part), "{output:?}");
}

#[test]
fn errors_say_what_to_do() {
    let mut tiny = model();
    let fails = |tiny: &Tiny, args: &[&str], part: &str| {
        let text = error(&generate(tiny, args, "w5"));
        assert!(text.contains(part), "{text}");
    };
    fails(&tiny, &["--revision", "main"], "--revision goes with --model-id");
    fails(&tiny, &["--use-flash-attn"], "GPU");
    #[cfg(not(feature = "hub"))]
    for flags in [["--model-id", "meta-llama/Llama-3.2-1B"], ["--which", "v32-1b"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_taper")).arg("generate").args(flags).output().unwrap();
        let text = error(&output);
        for part in ["meta-llama/Llama-3.2-1B: ", "--features hub", "hf download meta-llama/Llama-3.2-1B"] {
            assert!(text.contains(part), "{text}");
        }
    }
    let unknown = generate(&tiny, &["--which", "v9"], "");
    assert!(unknown.status.code() == Some(2) && String::from_utf8_lossy(&unknown.stderr).contains("v32-1b"));
    fails(&tiny, &["--top-k", "0"], "--top-k");
    fails(&tiny, &["--repeat-penalty", "0"], "--repeat-penalty");
    fails(&tiny, &["--top-p", "nan"], "--top-p");
    fails(&tiny, &["--temperature=-1"], "--temperature");
    fails(&tiny, &["--codec", "rate"], "--codec rate needs --bits");
    fails(&tiny, &["--codec", "int8", "--bits", "3"], "--bits goes with --codec rate");
    fails(&tiny, &["--bits", "11"], "between 1 and 10");
    fails(&tiny, &["--chat"], "no chat template");
    fails(&tiny, &["--file", "nothing"], "nothing");
    tiny.config["rms_norm_eps"] = json!(-1000.0);
    tiny.write();
    fails(&tiny, &["-n", "3"], "not finite");
    // NaN in the weights themselves.
    tiny.config["rms_norm_eps"] = json!(1e-5);
    tiny.nan = Some("model.layers.0.mlp.down_proj.weight".into());
    tiny.write();
    fails(&tiny, &["-n", "3"], "not finite: the weights hold a NaN");
    tiny.nan = None;
    // A tokenizer that knows more words than the model.
    tiny.tensors.insert("model.embed_tokens.weight".into(), vec![5, 64]);
    tiny.tensors.insert("lm_head.weight".into(), vec![5, 64]);
    tiny.config["vocab_size"] = 5.into();
    tiny.write();
    fails(&tiny, &["-n", "3"], "token 5 of \"w5\", but the model's vocabulary has 5 tokens");
    fs::write(tiny.path().join("tokenizer.json"), "{}").unwrap();
    fails_with(&tiny, 3, "tokenizer.json");
    fs::remove_file(tiny.path().join("tokenizer.json")).unwrap();
    fails(&tiny, &[], "no tokenizer.json");
    fs::remove_file(tiny.path().join("config.json")).unwrap();
    fails(&tiny, &[], "no config.json");
}

#[test]
fn models_are_compressed_on_the_fly() {
    let mut tiny = model();
    tiny.bf16 = true;
    tiny.write();
    let greedy = |dir: &Tiny, more: &[&str]| {
        text(&generate(dir, &[&["-n", "20", "--temperature", "0", "--prompt", "w7"], more].concat(), ""))
    };
    let expected = greedy(&tiny, &[]);
    for stage in ["rans", "fixed12", "fixed11"] {
        assert_eq!(greedy(&tiny, &["--codec", "lossless", "--stage", stage]), expected);
    }
    // Ten bits change little, two bits a lot.
    assert_eq!(greedy(&tiny, &["--bits", "10"]).split_whitespace().nth(1), expected.split_whitespace().nth(1));
    assert_ne!(greedy(&tiny, &["--bits", "2"]), expected);
    assert_eq!(greedy(&tiny, &["--codec", "int8"]).split_whitespace().count(), 21);

    // What is compressed stays as it is.
    let out = tempfile::tempdir().unwrap();
    candle_taper::convert::compress(tiny.path(), out.path().join("c"), &Default::default(), &()).unwrap();
    fs::copy(out.path().join("c/model.safetensors"), tiny.path().join("model.safetensors")).unwrap();
    assert_eq!(greedy(&tiny, &[]), expected);
    let refused = error(&generate(&tiny, &["--codec", "int8", "--prompt", "w7"], ""));
    assert!(refused.contains("compressed already"), "{refused}");
}

/// Messages between `w10` and `w11`, answers from `w12` on; `w1` begins a conversation, `w90` what the system says.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'system' %} w90 {{ m['content'] | trim }}
    {%- elif m.role == 'user' %} w10 {{ m.content.strip() }} w11
    {%- else %} w12 {{ m.content.strip() }}{% endif %}
{%- endfor %}{% if add_generation_prompt %} w12{% endif %}";

/// A model with a chat template, whose answers end with the token that it says fourth.
fn chat_model() -> Tiny {
    let mut tiny = model();
    tiny.config["eos_token_id"] = json!(null);
    tiny.write();
    let settings = json!({ "bos_token": { "content": "w1" }, "chat_template": TEMPLATE });
    fs::write(tiny.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    tiny
}

const CHAT: [&str; 5] = ["--chat", "-n", "6", "--temperature", "0"];

#[test]
fn a_message_gets_an_answer_through_the_template() {
    let tiny = chat_model();
    let chat = |more: &[&str], input: &str| text(&generate(&tiny, &[&CHAT, more].concat(), input));
    // The template's text is the prompt; the answer alone is printed.
    let plain = text(&generate(&tiny, &["-n", "6", "--temperature", "0", "--prompt", "w1 w10 w5 w11 w12"], ""));
    let expected = plain.strip_prefix("w1 w10 w5 w11 w12").unwrap();
    assert_eq!(chat(&["--prompt", "w5"], ""), expected);
    assert_eq!(chat(&[], " w5 \n"), expected);
    let other = chat(&["--prompt", "w5", "--system", "w33"], "");
    let plain = ["-n", "6", "--temperature", "0", "--prompt", "w1 w90 w33 w10 w5 w11 w12"];
    let plain = text(&generate(&tiny, &plain, ""));
    assert_eq!(Some(other.as_str()), plain.strip_prefix("w1 w90 w33 w10 w5 w11 w12"));

    // Without --chat the template does nothing. The same in a file of its own, which counts more.
    let unaffected = |dir: &Tiny| text(&generate(dir, &["-n", "6", "--temperature", "0", "--prompt", "w5"], ""));
    assert_eq!(unaffected(&tiny), unaffected(&model()));
    fs::write(tiny.path().join("chat_template.jinja"), "{{ raise_exception('no ' ~ messages[0].role) }}").unwrap();
    let refused = error(&generate(&tiny, &[&CHAT[..], &["--prompt", "w5"]].concat(), ""));
    assert!(refused.contains("refuses the conversation: no user"), "{refused}");
    fs::write(tiny.path().join("chat_template.jinja"), "{% if %}").unwrap();
    let broken = error(&generate(&tiny, &[&CHAT[..], &["--prompt", "w5"]].concat(), ""));
    assert!(broken.contains("chat template cannot be run: syntax error"), "{broken}");
    assert_eq!(generate(&tiny, &["--system", "w5"], "").status.code(), Some(2));
    assert!(error(&generate(&tiny, &CHAT, "")).contains("there is no message"));
}

#[test]
fn the_end_token_of_the_tokenizer_ends_an_answer() {
    let tiny = chat_model();
    let args = [&CHAT[..], &["--prompt", "w5"]].concat();
    let whole = text(&generate(&tiny, &args, ""));
    let words: Vec<&str> = whole.split_whitespace().collect();
    let third = words[2];
    let first = words.iter().position(|word| *word == third).unwrap();
    let settings = json!({ "bos_token": "w1", "eos_token": third, "chat_template": [
        { "name": "tool_use", "template": "w4" }, { "name": "default", "template": TEMPLATE }
    ] });
    fs::write(tiny.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    assert_eq!(text(&generate(&tiny, &args, "")).split_whitespace().count(), first);
}

/// `taper generate --chat` at a terminal where `typed` is typed.
#[cfg(target_os = "linux")]
fn at_a_terminal(tiny: &Tiny, args: &[&str], typed: &str) -> Output {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let peer = ioctl_tiocgptpeer(&terminal, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    fs::File::from(terminal.try_clone().unwrap()).write_all(typed.as_bytes()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_taper"));
    command.args(["generate", "--model"]).arg(tiny.path()).args(args).stdin(Stdio::from(peer));
    command.output().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn conversations_go_on_at_a_terminal() {
    let mut tiny = chat_model();
    let output = at_a_terminal(&tiny, &CHAT, "w5\n\nw6\n\u{4}");
    let answers = text(&output);
    let answers: Vec<&str> = answers.split("> ").collect();
    let first = text(&generate(&tiny, &[&CHAT[..], &["--prompt", "w5"]].concat(), ""));
    assert_eq!((answers.len(), answers[1], answers[2]), (5, first.as_str(), ""));
    // The second answer follows all that was said before; keys and values of it are not computed again.
    let before = format!("w1 w10 w5 w11 w12{} w10 w6 w11 w12", first.trim_end());
    let plain = text(&generate(&tiny, &["-n", "6", "--temperature", "0", "--prompt", &before], ""));
    assert_eq!(Some(answers[3]), plain.strip_prefix(&before));
    let notes = String::from_utf8(output.stderr).unwrap();
    assert!(notes.contains("15 prompt tokens, 10 known ("), "{notes}");

    // A short context: the oldest turn is forgotten, and a message that never fits is an error.
    tiny.config["max_position_embeddings"] = 16.into();
    tiny.write();
    let output = at_a_terminal(&tiny, &CHAT, "w5\nw6 w7\n\u{4}");
    let answers = text(&output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("its oldest turn is forgotten"), "{output:?}");
    let alone = text(&generate(&tiny, &[&CHAT[..], &["--prompt", "w6 w7"]].concat(), ""));
    assert_eq!(answers.split("> ").nth(2), Some(alone.as_str()));
    let long = error(&generate(&tiny, &[&CHAT[..], &["--prompt", &"w5 ".repeat(20)]].concat(), ""));
    assert!(long.contains("the message has 24 tokens"), "{long}");
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

//! Tokenizers out of GGUF metadata beside the `tokenizer.json` that it was made from.
#![cfg(feature = "candle")]

mod common;

use std::path::Path;

use candle_taper::gguf::Gguf;
use candle_taper::models::gguf::tokenizer;
use common::gguf::{Builder, array_value, bool_value, string, string_value, u32_value};
use serde_json::Value;
use tokenizers::Tokenizer;

/// What llama.cpp's converter makes of a `tokenizer.json`.
fn metadata(json: &Value, model: &str) -> Builder {
    let vocabulary = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocabulary.len()];
    for (token, id) in vocabulary {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let mut kinds = vec![1u32; tokens.len()];
    for token in json["added_tokens"].as_array().unwrap() {
        kinds[token["id"].as_u64().unwrap() as usize] = if token["content"] == "<unk>" { 2 } else { 3 };
    }
    let merges: Vec<[&str; 2]> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|merge| match merge.as_str() {
            Some(text) => <[&str; 2]>::try_from(text.split(' ').collect::<Vec<_>>()).unwrap(),
            None => [merge[0].as_str().unwrap(), merge[1].as_str().unwrap()],
        })
        .collect();
    let score = |token: &String| {
        let rank = merges.iter().position(|merge| merge.concat() == *token);
        (-(rank.map_or(0.0, |rank| rank as f32 + 1.0))).to_le_bytes().to_vec()
    };
    let text: Vec<Vec<u8>> = tokens.iter().map(|token| string(token)).collect();
    let kinds: Vec<Vec<u8>> = kinds.iter().map(|kind| kind.to_le_bytes().to_vec()).collect();
    let builder = Builder::new()
        .entry("tokenizer.ggml.model", string_value(model))
        .entry("tokenizer.ggml.tokens", array_value(8, &text))
        .entry("tokenizer.ggml.token_type", array_value(5, &kinds));
    if model == "llama" {
        let scores: Vec<Vec<u8>> = tokens.iter().map(score).collect();
        return builder.entry("tokenizer.ggml.scores", array_value(6, &scores));
    }
    let merges: Vec<Vec<u8>> = merges.iter().map(|[left, right]| string(&format!("{left} {right}"))).collect();
    builder.entry("tokenizer.ggml.merges", array_value(8, &merges))
}

fn read(builder: &Builder) -> candle_taper::Result<Tokenizer> {
    tokenizer(&Gguf::new(builder.build()).unwrap())
}

/// Both tokenizers give the same ids, and texts come back.
fn agree(original: &Tokenizer, made: &Tokenizer, texts: &[&str]) {
    for text in texts {
        let ids = original.encode(*text, true).unwrap().get_ids().to_vec();
        assert_eq!(made.encode(*text, true).unwrap().get_ids(), ids, "{text:?}");
        assert_eq!(made.decode(&ids, true).unwrap(), *text);
    }
}

const TEXTS: [&str; 5] = [
    "Once upon a time, there was a fox.",
    "",
    "Tom  said: \"I'm 12!\"",
    "caf\u{e9} \u{1f98a}\n\nThe end",
    " two  spaces ",
];

#[test]
fn byte_level_bpe_is_rebuilt() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tales/tokenizer.json");
    let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let builder = metadata(&json, "gpt2")
        .entry("tokenizer.ggml.bos_token_id", u32_value(0))
        .entry("tokenizer.ggml.add_bos_token", bool_value(true));
    let original = Tokenizer::from_file(&path).unwrap();
    agree(&original, &read(&builder).unwrap(), &TEXTS);
    // A control token in the text is one token.
    let made = read(&builder.clone().entry("tokenizer.ggml.pre", string_value("gpt-2"))).unwrap();
    assert_eq!(made.encode("a</s>", false).unwrap().get_ids().last(), Some(&1));
    let plain = metadata(&json, "gpt2").entry("tokenizer.ggml.bos_token_id", u32_value(0));
    let count = |pre: &str| {
        let made = read(&plain.clone().entry("tokenizer.ggml.pre", string_value(pre))).unwrap();
        made.encode("12345", true).unwrap().get_ids().len()
    };
    // Llama 3 begins with BOS and takes three digits together, Qwen one.
    assert_eq!((count("llama-bpe"), count("qwen2")), (count("default") + 1, 5));
}

#[test]
fn sentence_piece_is_rebuilt() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    let path = dir.join("TinyStories-656K/tokenizer.json");
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return;
    }
    let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let builder = metadata(&json, "llama")
        .entry("tokenizer.ggml.unknown_token_id", u32_value(0))
        .entry("tokenizer.ggml.bos_token_id", u32_value(1))
        .entry("tokenizer.ggml.add_bos_token", bool_value(true));
    let (original, made) = (Tokenizer::from_file(&path).unwrap(), read(&builder).unwrap());
    let text = std::fs::read_to_string(dir.join("text/tinystories-197k.txt")).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.is_ascii() && !line.is_empty()).take(200).collect();
    agree(&original, &made, &lines);
}

/// SentencePiece's own rule on a vocabulary small enough to follow: the best pair first, bytes for what is unknown.
#[test]
fn scores_decide_what_is_merged() {
    let tokens = ["<unk>", "<s>", "\u{2581}", "a", "b", "ab", "\u{2581}a", "ba", "<0x63>"];
    let kinds = [2u32, 3, 1, 1, 1, 1, 1, 1, 6];
    let builder = |scores: [f32; 9]| {
        Builder::new()
            .entry("tokenizer.ggml.model", string_value("llama"))
            .entry("tokenizer.ggml.tokens", array_value(8, &tokens.map(string)))
            .entry("tokenizer.ggml.token_type", array_value(5, &kinds.map(|kind| kind.to_le_bytes().to_vec())))
            .entry("tokenizer.ggml.scores", array_value(6, &scores.map(|score| score.to_le_bytes().to_vec())))
            .entry("tokenizer.ggml.bos_token_id", u32_value(1))
    };
    let ids = |scores: [f32; 9], text: &str| {
        let tokenizer = read(&builder(scores)).unwrap();
        tokenizer.encode(text, true).unwrap().get_ids().to_vec()
    };
    let ab_first = [0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, 0.0];
    assert_eq!(ids(ab_first, "ab"), [1, 2, 5]);
    assert_eq!(ids(ab_first, "abac"), [1, 2, 5, 3, 8]);
    let space_first = [0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, 0.0];
    assert_eq!(ids(space_first, "ab"), [1, 6, 4]);
    let bare = builder(ab_first).entry("tokenizer.ggml.add_bos_token", bool_value(false));
    let bare = bare.entry("tokenizer.ggml.add_space_prefix", bool_value(false));
    assert_eq!(read(&bare).unwrap().encode("ba ", true).unwrap().get_ids(), [7, 2]);
}

#[test]
fn what_cannot_be_rebuilt_is_refused() {
    let refused = |builder: Builder, cause: &str| {
        let error = read(&builder).expect_err(cause).to_string();
        assert!(error.contains(cause), "{error:?} does not say {cause:?}");
    };
    let model = |model: &str| Builder::new().entry("tokenizer.ggml.model", string_value(model));
    let tokens = array_value(8, &[string("a"), string("b")]);
    let gpt2 = || {
        model("gpt2")
            .entry("tokenizer.ggml.tokens", tokens.clone())
            .entry("tokenizer.ggml.merges", array_value(8, &[string("a b")]))
    };
    refused(Builder::new(), "the file has no tokenizer");
    refused(model("gpt2"), "no list tokenizer.ggml.tokens");
    refused(
        model("bert").entry("tokenizer.ggml.tokens", tokens.clone()),
        "\"bert\"; supported are \"gpt2\" and \"llama\"",
    );
    refused(model("llama").entry("tokenizer.ggml.tokens", tokens.clone()), "no list tokenizer.ggml.scores");
    refused(
        gpt2().entry("tokenizer.ggml.pre", string_value("jais")),
        "tokenizer.ggml.pre is \"jais\"; supported are default",
    );
    // The merge gives a token that is not there.
    refused(gpt2(), "the merge \"a b\" makes no token");
    let few = model("llama").entry("tokenizer.ggml.tokens", tokens.clone());
    refused(few.entry("tokenizer.ggml.scores", array_value(6, &[vec![0; 4]])), "2 tokens, but 1 scores");
    let kinds =
        model("gpt2").entry("tokenizer.ggml.tokens", tokens).entry("tokenizer.ggml.token_type", array_value(5, &[]));
    assert!(read(&kinds).is_err());
    let far = metadata_of_one_token().entry("tokenizer.ggml.bos_token_id", u32_value(9));
    refused(far, "tokenizer.ggml.bos_token_id is 9, but there are 1 tokens");
}

fn metadata_of_one_token() -> Builder {
    Builder::new()
        .entry("tokenizer.ggml.model", string_value("llama"))
        .entry("tokenizer.ggml.tokens", array_value(8, &[string("a")]))
        .entry("tokenizer.ggml.scores", array_value(6, &[vec![0; 4]]))
}

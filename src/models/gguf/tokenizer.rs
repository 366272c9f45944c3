//! The tokenizer that a GGUF file carries.
//!
//! Two kinds exist for Llamas: `gpt2`, byte-level BPE with merges and a regular expression that splits text first (its
//! name is in `tokenizer.ggml.pre`), and `llama`, SentencePiece's BPE, which has scores instead of merges. Expressions are
//! those of the models' own `tokenizer.json`.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer, decoders};

use crate::gguf::{Gguf, Value};
use crate::{Error, Result};

/// Words, numbers and the rest, as GPT-2 splits text; contractions in lower case only.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// As Llama 3 does: at most three digits together.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Qwen 2 does: every digit alone.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Every digit alone, before GPT-2's expression.
const DIGITS: &str = r"\p{N}";

/// Names of `tokenizer.ggml.pre`, the expressions that they stand for, and whether a text begins with BOS by default.
const PRE: [(&[&str], &[&str], bool); 4] = [
    (&["default", "gpt-2", "gpt2"], &[GPT2], false),
    (&["llama-bpe", "llama3", "llama-v3", "smaug-bpe"], &[LLAMA3], true),
    (&["qwen2", "deepseek-r1-qwen"], &[QWEN2], false),
    (&["smollm"], &[DIGITS, GPT2], false),
];

/// SentencePiece's mark for a space.
const SPACE: &str = "\u{2581}";

/// Kinds of tokens in `tokenizer.ggml.token_type`.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// What both kinds have.
struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<u64>,
}

/// The tokenizer of a GGUF file. It puts BOS before a text, and EOS behind it, where the file asks for it.
///
/// # Errors
/// If the file has none, or one of a kind that is not supported; if its lists do not fit together.
pub fn tokenizer<B: AsRef<[u8]>>(file: &Gguf<B>) -> Result<Tokenizer> {
    let model = file.get("tokenizer.ggml.model").and_then(Value::to_str);
    let Some(model) = model else {
        return Err(Error::Unsupported("the file has no tokenizer (tokenizer.ggml.model)".into()));
    };
    let vocabulary = vocabulary(file)?;
    let (mut tokenizer, bos) = match &*model {
        "gpt2" => gpt2(file, &vocabulary)?,
        "llama" => (sentence_piece(file, &vocabulary)?, true),
        other => {
            let text = format!("tokenizer.ggml.model is {other:?}; supported are \"gpt2\" and \"llama\"");
            return Err(Error::Unsupported(text));
        }
    };
    add_tokens(&mut tokenizer, &vocabulary)?;
    if let Some(template) = template(file, &vocabulary, bos)? {
        tokenizer.with_post_processor(Some(template));
    }
    Ok(tokenizer)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Malformed(format!("the tokenizer: {error}"))
}

/// All strings of an array.
fn strings<B: AsRef<[u8]>>(file: &Gguf<B>, key: &str) -> Result<Vec<String>> {
    let array = file.get(key).and_then(Value::to_array);
    let array = array.ok_or_else(|| Error::Malformed(format!("the metadata has no list {key}")))?;
    let strings = array.iter().map(|value| value.to_str().map(|text| text.into_owned()));
    strings.collect::<Option<_>>().ok_or_else(|| Error::Malformed(format!("{key} does not hold strings")))
}

fn vocabulary<B: AsRef<[u8]>>(file: &Gguf<B>) -> Result<Vocabulary> {
    let tokens = strings(file, "tokenizer.ggml.tokens")?;
    let kinds = file.get("tokenizer.ggml.token_type").and_then(Value::to_array);
    let kinds: Vec<u64> = kinds.map_or(Vec::new(), |kinds| kinds.iter().map(|k| k.to_u64().unwrap_or(1)).collect());
    if !kinds.is_empty() && kinds.len() != tokens.len() {
        let text = format!("{} tokens, but {} types of tokens", tokens.len(), kinds.len());
        return Err(failed(text));
    }
    Ok(Vocabulary { tokens, kinds })
}

impl Vocabulary {
    fn ids(&self) -> Vocab {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect()
    }

    /// The token that a key of the metadata names.
    fn special<B: AsRef<[u8]>>(&self, file: &Gguf<B>, key: &str) -> Result<Option<(String, u32)>> {
        let key = format!("tokenizer.ggml.{key}_token_id");
        let Some(id) = file.get(&key).and_then(Value::to_u64) else { return Ok(None) };
        match usize::try_from(id).ok().and_then(|id| self.tokens.get(id)) {
            Some(token) => Ok(Some((token.clone(), id as u32))),
            None => Err(failed(format!("{key} is {id}, but there are {} tokens", self.tokens.len()))),
        }
    }
}

/// Byte-level BPE.
fn gpt2<B: AsRef<[u8]>>(file: &Gguf<B>, vocabulary: &Vocabulary) -> Result<(Tokenizer, bool)> {
    let name = file.get("tokenizer.ggml.pre").and_then(Value::to_str);
    let name = name.as_deref().unwrap_or("default");
    let Some((_, patterns, bos)) = PRE.iter().find(|(names, ..)| names.contains(&name)) else {
        let known: Vec<&str> = PRE.iter().flat_map(|(names, ..)| names.iter().copied()).collect();
        let text = format!("tokenizer.ggml.pre is {name:?}; supported are {}", known.join(", "));
        return Err(Error::Unsupported(text));
    };
    let ids = vocabulary.ids();
    let merges = strings(file, "tokenizer.ggml.merges")?.into_iter().map(|merge| match merge.split_once(' ') {
        // The library takes for granted that there is a token for every merge.
        Some((left, right)) if ids.contains_key(&format!("{left}{right}")) => Ok((left.to_string(), right.to_string())),
        Some(_) => Err(failed(format!("the merge {merge:?} makes no token"))),
        None => Err(failed(format!("the merge {merge:?} is no pair"))),
    });
    let merges = merges.collect::<Result<Vec<_>>>()?;
    let bpe = BPE::builder().vocab_and_merges(ids, merges);
    // Tokens that are a whole word are taken as they are, as Llama 3 was trained.
    let bpe = bpe.ignore_merges(patterns.contains(&LLAMA3)).build().map_err(failed)?;
    let mut tokenizer = Tokenizer::new(bpe);
    let mut splits = Vec::new();
    for pattern in *patterns {
        let pattern = SplitPattern::Regex(pattern.to_string());
        splits.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(failed)?.into());
    }
    splits.push(ByteLevel::new(false, true, false).into());
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(splits)));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, false)));
    Ok((tokenizer, *bos))
}

/// SentencePiece's BPE. Its merges follow from the scores: every pair of tokens that make up a token, best score first.
fn sentence_piece<B: AsRef<[u8]>>(file: &Gguf<B>, vocabulary: &Vocabulary) -> Result<Tokenizer> {
    let scores = file.get("tokenizer.ggml.scores").and_then(Value::to_array);
    let scores = scores.ok_or_else(|| Error::Malformed("the metadata has no list tokenizer.ggml.scores".into()))?;
    let scores: Vec<f32> = scores.iter().map(|score| score.to_f32().unwrap_or(0.0)).collect();
    if scores.len() != vocabulary.tokens.len() {
        return Err(failed(format!("{} tokens, but {} scores", vocabulary.tokens.len(), scores.len())));
    }
    let ids = vocabulary.ids();
    let mut merges = Vec::new();
    for (token, &score) in vocabulary.tokens.iter().zip(&scores) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((score, l, r));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let text = |id: u32| vocabulary.tokens[id as usize].clone();
    let merges = merges.into_iter().map(|(_, l, r)| (text(l), text(r))).collect();
    let unknown = vocabulary.special(file, "unknown")?.or(vocabulary.special(file, "unk")?);
    let mut bpe = BPE::builder().vocab_and_merges(ids, merges).byte_fallback(true).fuse_unk(true);
    if let Some((unknown, _)) = unknown {
        bpe = bpe.unk_token(unknown);
    }
    let mut tokenizer = Tokenizer::new(bpe.build().map_err(failed)?);
    let prefix = file.get("tokenizer.ggml.add_space_prefix").and_then(Value::to_bool).unwrap_or(true);
    let spaces = Replace::new(" ", SPACE).map_err(failed)?;
    let mut normalizers = Vec::new();
    if prefix {
        normalizers.push(Prepend::new(SPACE.to_string()).into());
    }
    normalizers.push(spaces.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(failed)?;
    let mut steps: Vec<decoders::DecoderWrapper> = vec![
        Replace::new(SPACE, " ").map_err(failed)?.into(),
        decoders::byte_fallback::ByteFallback::default().into(),
        decoders::fuse::Fuse::default().into(),
    ];
    if prefix {
        steps.push(decoders::strip::Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(decoders::sequence::Sequence::new(steps)));
    Ok(tokenizer)
}

/// Control tokens, and those that are never split.
fn add_tokens(tokenizer: &mut Tokenizer, vocabulary: &Vocabulary) -> Result<()> {
    let of_kind = |kind: u64| {
        let tokens = vocabulary.tokens.iter().zip(&vocabulary.kinds);
        let tokens = tokens.filter(move |(token, k)| **k == kind && !token.is_empty());
        tokens.map(move |(token, _)| AddedToken::from(token.clone(), kind == CONTROL).normalized(false))
    };
    tokenizer.add_special_tokens(of_kind(CONTROL).collect::<Vec<_>>()).map_err(failed)?;
    tokenizer.add_tokens(of_kind(USER_DEFINED).collect::<Vec<_>>()).map_err(failed)?;
    Ok(())
}

/// What puts BOS and EOS around a text.
fn template<B: AsRef<[u8]>>(
    file: &Gguf<B>,
    vocabulary: &Vocabulary,
    bos_by_default: bool,
) -> Result<Option<TemplateProcessing>> {
    let asked = |key: &str| file.get(&format!("tokenizer.ggml.add_{key}_token")).and_then(Value::to_bool);
    let bos = if asked("bos").unwrap_or(bos_by_default) { vocabulary.special(file, "bos")? } else { None };
    let eos = if asked("eos").unwrap_or(false) { vocabulary.special(file, "eos")? } else { None };
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let around = |text: &str, ty: usize| {
        let token =
            |special: &Option<(String, u32)>| special.iter().map(|(t, _)| format!("{t}:{ty}")).collect::<Vec<_>>();
        [token(&bos), vec![format!("{text}:{ty}")], token(&eos)].concat()
    };
    // Names in a template end at a colon, so tokens with one cannot be written there.
    if let Some((token, _)) =
        bos.iter().chain(&eos).find(|(token, _)| token.contains([':', ' ']) || token.starts_with('$'))
    {
        return Err(Error::Unsupported(format!("the token {token:?} cannot begin or end a text")));
    }
    let mut template = TemplateProcessing::builder();
    template.try_single(around("$A", 0)).map_err(failed)?;
    template.try_pair([around("$A", 0), around("$B", 1)].concat()).map_err(failed)?;
    template.special_tokens(bos.iter().chain(&eos).cloned().collect::<Vec<_>>());
    template.build().map(Some).map_err(failed)
}

//! A model's tokenizer, with what the files beside it say about how to use it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value as Json;
use tokenizers::Tokenizer;

use super::{ChatTemplate, TextStream};
use crate::gguf::Value;
use crate::models::{Config, LlamaEosToks, config, gguf};
use crate::{Error, Result};

/// The tokenizer of a model's directory.
#[derive(Clone, Debug)]
pub struct ModelTokenizer {
    tokenizer: Tokenizer,
    /// Token that begins a text, if one is to be put before a prompt that lacks it.
    bos: Option<u32>,
    ends: BTreeSet<u32>,
    /// Tokens that the model knows.
    vocabulary: usize,
    template: Option<ChatTemplate>,
}

impl ModelTokenizer {
    /// Reads `tokenizer.json` of a model's directory, and of `tokenizer_config.json`, `generation_config.json` and
    /// `chat_template.jinja` those that are there. `config` is the model's.
    ///
    /// # Errors
    /// If there is no `tokenizer.json`, or a file is malformed.
    pub fn from_pretrained(dir: impl AsRef<Path>, config: &Config) -> Result<ModelTokenizer> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            let text = format!(
                "{} has no tokenizer.json, which text needs; copy the one of the model that was compressed",
                dir.display()
            );
            return Err(Error::Invalid(text));
        }
        let malformed = |error: tokenizers::Error| Error::Malformed(error.to_string()).in_file(&path);
        let tokenizer = Tokenizer::from_file(&path).map_err(malformed)?;
        let settings = settings(dir)?;
        // The tokenizer puts BOS before a text if it was made to; else it is put there if `tokenizer_config.json` asks for
        // it, or if neither knows anything and the model has one.
        let wanted = settings["add_bos_token"].as_bool().unwrap_or(tokenizer.get_post_processor().is_none());
        let mut ends = config::end_tokens(dir, config)?;
        let template = ChatTemplate::read(dir, &settings)?;
        if template.is_some() {
            ends.extend(token_text(&settings, "eos_token").and_then(|text| tokenizer.token_to_id(text)));
        }
        Ok(ModelTokenizer {
            bos: config.bos_token_id.filter(|_| wanted),
            tokenizer,
            ends,
            vocabulary: config.vocab_size,
            template,
        })
    }

    /// The tokenizer and chat template of a GGUF file. `config` is the model's.
    ///
    /// # Errors
    /// If the file has none, or one of a kind that is not supported.
    pub fn from_gguf(file: &gguf::File, config: &Config) -> Result<ModelTokenizer> {
        let tokenizer = gguf::tokenizer(file).map_err(|error| error.in_file(file.map().path()))?;
        let ends = match &config.eos_token_id {
            None => Vec::new(),
            Some(LlamaEosToks::Single(id)) => vec![*id],
            Some(LlamaEosToks::Multiple(ids)) => ids.clone(),
        };
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        let named = [("bos_token", text(config.bos_token_id)), ("eos_token", text(ends.first().copied()))];
        let named = named.into_iter().filter_map(|(name, text)| Some((name, text?))).collect();
        let template = file.get("tokenizer.chat_template").and_then(Value::to_str);
        let template = template.map(|source| ChatTemplate::new(&source, named));
        // The tokenizer puts BOS before a text where the file asks for it.
        let ends = ends.into_iter().collect();
        Ok(ModelTokenizer { tokenizer, bos: None, ends, vocabulary: config.vocab_size, template })
    }

    /// The tokenizer itself.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The tokens that end a text.
    pub fn ends(&self) -> &BTreeSet<u32> {
        &self.ends
    }

    /// The template that turns a conversation into a prompt, if the model comes with one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// A prompt's tokens, after the one that begins a text where the model wants that.
    ///
    /// # Errors
    /// If there is not one token, or one that the model does not know: the tokenizer belongs to another model.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = self.ids(prompt, true)?;
        if let Some(bos) = self.bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        self.check(ids)
    }

    /// The tokens of a conversation as a chat template rendered it, special ones included.
    ///
    /// # Errors
    /// As [`ModelTokenizer::encode`].
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>> {
        self.check(self.ids(rendered, false)?)
    }

    /// Text that follows the tokens `context`.
    ///
    /// # Errors
    /// If the tokens cannot be decoded.
    pub fn stream(&self, context: &[u32]) -> Result<TextStream<'_>> {
        TextStream::new(&self.tokenizer, context)
    }

    fn ids(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, special);
        let encoding = encoding.map_err(|error| Error::Invalid(format!("cannot tokenize the prompt: {error}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn check(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        if ids.is_empty() {
            return Err(Error::Invalid("the prompt has no tokens, and the model no token that begins a text".into()));
        }
        match ids.iter().find(|&&id| id as usize >= self.vocabulary) {
            None => Ok(ids),
            Some(id) => Err(Error::Invalid(format!(
                "tokenizer.json makes token {id} of {:?}, but the model's vocabulary has {} tokens: it belongs to another \
                 model",
                self.tokenizer.id_to_token(*id).unwrap_or_default(),
                self.vocabulary
            ))),
        }
    }
}

/// What `tokenizer_config.json` says; null if there is none.
fn settings(dir: &Path) -> Result<Json> {
    let path = dir.join("tokenizer_config.json");
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|e| Error::Malformed(e.to_string()).in_file(&path)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Json::Null),
        Err(e) => Err(Error::io(&path)(e)),
    }
}

/// A special token's text, which stands there alone or in an object.
pub(super) fn token_text<'a>(settings: &'a Json, name: &str) -> Option<&'a str> {
    let token = &settings[name];
    token.as_str().or(token["content"].as_str())
}

//! A byte-level BPE tokenizer for the tales.

use std::path::Path;

use anyhow::{Error, Result};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};

/// Begins a tale.
pub const BOS: u32 = 0;
/// Ends a tale.
pub const EOS: u32 = 1;

/// Trains the tokenizer and writes `tokenizer.json`.
pub fn train(tales: &[String], size: usize, file: &Path) -> Result<Tokenizer> {
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from("<s>", true), AddedToken::from("</s>", true)])
        .build();
    let template = TemplateProcessing::builder()
        .try_single("<s> $A")
        .and_then(|builder| builder.try_pair("<s> $A <s> $B"))
        .map_err(Error::msg)?
        .special_tokens(vec![("<s>", BOS)])
        .build()?;
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<NormalizerWrapper>)
        .with_pre_tokenizer(Some(ByteLevel::new(false, false, true)))
        .with_post_processor(Some(template))
        .with_decoder(Some(ByteLevel::new(false, false, true)))
        .build()
        .map_err(Error::msg)?;
    tokenizer.train(&mut trainer, tales.iter()).map_err(Error::msg)?;
    tokenizer.save(file, true).map_err(Error::msg)?;
    load(file)
}

/// Reads `tokenizer.json`.
pub fn load(file: &Path) -> Result<Tokenizer> {
    Tokenizer::from_file(file).map_err(Error::msg)
}

/// Each tale as tokens, with its beginning and end.
pub fn encode(tokenizer: &Tokenizer, tales: &[String]) -> Result<Vec<Vec<u32>>> {
    let one = |tale: &String| {
        let mut ids = tokenizer.encode(tale.as_str(), true).map_err(Error::msg)?.get_ids().to_vec();
        ids.push(EOS);
        Ok(ids)
    };
    tales.iter().map(one).collect()
}

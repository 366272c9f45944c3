//! Tokens to text, as far as it is complete.

use tokenizers::Tokenizer;

use crate::{Error, Result};

/// Tokens that may wait for the rest of a character before they are printed as they are.
const PATIENCE: usize = 8;

/// Turns tokens into text one by one. What a token prints can depend on the one before, and a character can take
/// several tokens, so text is the difference between two decodings.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens that were printed last, then those that wait.
    ids: Vec<u32>,
    printed: usize,
    /// What the printed ones decode to.
    text: String,
}

impl<'a> TextStream<'a> {
    /// A stream that goes on after `context`.
    ///
    /// # Errors
    /// If the tokenizer cannot decode tokens, as for the other methods.
    pub fn new(tokenizer: &'a Tokenizer, context: &[u32]) -> Result<Self> {
        let ids = context.to_vec();
        let text = decode(tokenizer, &ids)?;
        Ok(TextStream { tokenizer, printed: ids.len(), ids, text })
    }

    /// Adds a token and returns the text that is complete now.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = decode(self.tokenizer, &self.ids)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.printed < PATIENCE {
            return Ok(None);
        }
        self.take(text).map(Some)
    }

    /// What still waits, with replacement characters for what never became complete.
    pub fn finish(mut self) -> Result<String> {
        let text = decode(self.tokenizer, &self.ids)?;
        self.take(text)
    }

    /// The part of `text` that is new.
    fn take(&mut self, text: String) -> Result<String> {
        let same = text.char_indices().zip(self.text.chars()).take_while(|((_, a), b)| a == b);
        let start = same.last().map_or(0, |((at, char), _)| at + char.len_utf8());
        let new = text[start..].to_string();
        // Tokens without text, such as special ones, stay: the next one's text may depend on what came before them.
        if !new.is_empty() {
            self.ids.drain(..self.printed);
            self.text = decode(self.tokenizer, &self.ids)?;
            self.printed = self.ids.len();
        }
        Ok(new)
    }
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String> {
    tokenizer.decode(ids, true).map_err(|error| Error::Invalid(format!("cannot decode tokens: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer whose tokens are the 256 bytes, then words.
    fn tokenizer() -> Tokenizer {
        let bytes = (0..256).map(|byte| format!("\"<0x{byte:02X}>\": {byte}"));
        let words = ["▁", "▁Once", "▁upon"].iter().enumerate().map(|(i, word)| format!("\"{word}\": {}", 256 + i));
        let vocab: Vec<String> = bytes.chain(words).collect();
        let json = format!(
            r#"{{"version": "1.0", "added_tokens": [], "decoder": {{"type": "Sequence", "decoders": [
                {{"type": "Replace", "pattern": {{"String": "▁"}}, "content": " "}}, {{"type": "ByteFallback"}},
                {{"type": "Fuse"}}, {{"type": "Strip", "content": " ", "start": 1, "stop": 0}}]}},
                "model": {{"type": "BPE", "byte_fallback": true, "merges": [], "vocab": {{{}}}}}}}"#,
            vocab.join(", ")
        );
        json.parse().unwrap()
    }

    #[test]
    fn characters_come_whole_and_spaces_stay() {
        let tokenizer = tokenizer();
        let mut stream = TextStream::new(&tokenizer, &[257]).unwrap();
        assert_eq!(stream.push(258).unwrap().unwrap(), " upon");
        let mut text = String::new();
        for (index, byte) in " é€🦙".bytes().enumerate() {
            let part = stream.push(byte.into()).unwrap();
            let ends = [1, 3, 6, 10].contains(&(index + 1));
            assert_eq!(part.is_some(), ends, "byte {index}");
            text.extend(part);
        }
        assert_eq!(text, " é€🦙");
        assert_eq!(stream.push(257).unwrap().unwrap(), " Once");
        assert_eq!(stream.push(0xf0).unwrap(), None);
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    }

    #[test]
    fn bytes_that_are_no_text_do_not_wait_for_ever() {
        let tokenizer = tokenizer();
        let mut stream = TextStream::new(&tokenizer, &[]).unwrap();
        assert!((0..2 * PATIENCE).any(|_| stream.push(0x80).unwrap().is_some()));
    }
}

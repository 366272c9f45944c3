//! Models of llama2.c: its checkpoints and tokenizers, turned into the Hugging Face layout.
//!
//! A checkpoint is seven `i32`s (width, inner width, layers, heads, heads for keys and values, tokens, context; tokens
//! negative if the output layer is not the embedding) and then all weights as `f32`s: the embedding, and of all layers
//! the first norms, Q, K, V, O, the second norms, gate, down, up; then the last norm and tables of the rotary embedding.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use serde_json::json;

/// Little-endian values, taken one after the other.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>().context("the file is too short")?;
        self.0 = rest;
        Ok(*first)
    }

    fn int(&mut self) -> Result<usize> {
        Ok(usize::try_from(i32::from_le_bytes(self.take()?))?)
    }

    fn tensor(&mut self, rows: usize, cols: usize) -> Result<Vec<f32>> {
        (0..rows * cols).map(|_| Ok(f32::from_le_bytes(self.take()?))).collect()
    }
}

/// Rows of Q and K from llama2.c's order, where the two values that are rotated together are neighbours, to that of
/// Hugging Face, where they are half a head apart.
fn apart(rows: &[f32], heads: usize, cols: usize) -> Vec<f32> {
    let head_dim = rows.len() / cols / heads;
    let row = |row: usize| &rows[row * cols..(row + 1) * cols];
    let of_head = |head: usize| {
        let pairs = move |second: usize| (0..head_dim / 2).map(move |pair| head * head_dim + 2 * pair + second);
        pairs(0).chain(pairs(1))
    };
    (0..heads).flat_map(of_head).flat_map(row).copied().collect()
}

/// Writes the checkpoint `bin` as `config.json` and `model.safetensors` to `dir`.
pub fn convert(bin: &[u8], dir: &Path) -> Result<()> {
    let mut reader = Reader(bin);
    let [dim, hidden, layers, heads, kv_heads, vocab, context] = {
        let mut sizes = [0; 7];
        for size in &mut sizes {
            *size = reader.int()?;
        }
        sizes
    };
    ensure!(heads > 0 && kv_heads > 0 && dim.is_multiple_of(2 * heads), "{dim} values, {heads} heads");
    let kv_dim = dim / heads * kv_heads;
    let mut tensors = HashMap::new();
    let mut add = |name: String, values: Vec<f32>, rows: usize, cols: usize| -> Result<()> {
        // Vectors have one dimension.
        let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
        Ok(())
    };
    add("model.embed_tokens.weight".into(), reader.tensor(vocab, dim)?, vocab, dim)?;
    let parts = [
        ("input_layernorm", 1, dim),
        ("self_attn.q_proj", dim, dim),
        ("self_attn.k_proj", kv_dim, dim),
        ("self_attn.v_proj", kv_dim, dim),
        ("self_attn.o_proj", dim, dim),
        ("post_attention_layernorm", 1, dim),
        ("mlp.gate_proj", hidden, dim),
        ("mlp.down_proj", dim, hidden),
        ("mlp.up_proj", hidden, dim),
    ];
    for (part, rows, cols) in parts {
        for layer in 0..layers {
            let values = reader.tensor(rows, cols)?;
            let values = match part {
                "self_attn.q_proj" => apart(&values, heads, cols),
                "self_attn.k_proj" => apart(&values, kv_heads, cols),
                _ => values,
            };
            add(format!("model.layers.{layer}.{part}.weight"), values, rows, cols)?;
        }
    }
    add("model.norm.weight".into(), reader.tensor(1, dim)?, 1, dim)?;
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors"))?;
    let config = json!({
        "model_type": "llama", "hidden_size": dim, "intermediate_size": hidden, "vocab_size": vocab,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"
    });
    Ok(std::fs::write(dir.join("config.json"), config.to_string())?)
}

/// A tokenizer of llama2.c: pieces with scores. Of all neighbours that make a piece together, those with the best score
/// are joined, again and again.
pub struct Tokenizer {
    pieces: HashMap<Vec<u8>, (u32, f32)>,
}

impl Tokenizer {
    /// Reads the file: the length of the longest piece, then for each piece its score, its length and its bytes.
    pub fn read(bin: &[u8]) -> Result<Tokenizer> {
        let mut reader = Reader(bin);
        reader.int()?;
        let mut pieces = HashMap::new();
        for id in 0.. {
            if reader.0.is_empty() {
                break;
            }
            let score = f32::from_le_bytes(reader.take()?);
            let length = reader.int()?;
            let (piece, rest) = reader.0.split_at_checked(length).context("the file is too short")?;
            reader.0 = rest;
            // No piece has a space inside, so that words can be encoded one by one.
            ensure!(!piece.iter().skip(1).any(|&byte| byte == b' ') || id < 3, "piece {id} spans words");
            pieces.entry(piece.to_vec()).or_insert((id, score));
        }
        Ok(Tokenizer { pieces })
    }

    /// The tokens of a text, which begins with a space that is not written.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let text = format!(" {text}");
        let starts = text.match_indices(' ').map(|(at, _)| at);
        let ends = text.match_indices(' ').map(|(at, _)| at).skip(1).chain([text.len()]);
        starts.zip(ends).flat_map(|(start, end)| self.word(&text[start..end])).collect()
    }

    fn word(&self, word: &str) -> Vec<u32> {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        for char in word.chars() {
            let bytes = char.to_string().into_bytes();
            if self.pieces.contains_key(&bytes) {
                parts.push(bytes);
            } else {
                parts.extend(bytes.into_iter().map(|byte| vec![byte]));
            }
        }
        loop {
            let score = |pair: &[Vec<u8>]| self.pieces.get(&pair.concat()).map(|&(_, score)| score);
            let scored = parts.windows(2).enumerate().filter_map(|(at, pair)| Some((at, score(pair)?)));
            // Of equal scores the first.
            let best = scored.fold(None, |best: Option<(usize, f32)>, (at, score)| match best {
                Some((_, other)) if other >= score => best,
                _ => Some((at, score)),
            });
            let Some((at, _)) = best else { break };
            let second = parts.remove(at + 1);
            parts[at].extend(second);
        }
        // What is no piece is a byte; those follow the three special tokens.
        let id = |part: &Vec<u8>| self.pieces.get(part).map_or(u32::from(part[0]) + 3, |&(id, _)| id);
        parts.iter().map(id).collect()
    }
}

//! GGUF files for tests, byte by byte.
#![allow(dead_code)]

use candle_taper::codec::kquant::GgmlType;

/// A string as the format has it.
pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A `u32` value with its type.
pub fn u32_value(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

/// An `f32` value with its type.
pub fn f32_value(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

/// A truth value with its type.
pub fn bool_value(value: bool) -> Vec<u8> {
    [&7u32.to_le_bytes()[..], &[value.into()]].concat()
}

/// A string value with its type.
pub fn string_value(text: &str) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &string(text)].concat()
}

/// An array with its type: `values` are those of type `ty`, without it.
pub fn array_value(ty: u32, values: &[Vec<u8>]) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &ty.to_le_bytes(), &(values.len() as u64).to_le_bytes(), &values.concat()].concat()
}

/// A file in the making.
#[derive(Clone)]
pub struct Builder {
    pub version: u32,
    pub alignment: usize,
    /// Keys, and types with values.
    pub entries: Vec<(String, Vec<u8>)>,
    /// Names, dimensions (row length first), types, data.
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl Builder {
    pub fn new() -> Builder {
        Builder { version: 3, alignment: 32, entries: Vec::new(), tensors: Vec::new() }
    }

    pub fn entry(mut self, key: &str, value: Vec<u8>) -> Builder {
        self.entries.push((key.to_string(), value));
        self
    }

    /// A tensor of shape `[rows, cols]`.
    pub fn tensor(mut self, name: &str, rows: usize, cols: usize, ty: GgmlType, data: Vec<u8>) -> Builder {
        assert_eq!(data.len(), rows * ty.row_bytes(cols).unwrap());
        self.tensors.push((name.to_string(), vec![cols as u64, rows as u64], ty as u32, data));
        self
    }

    /// All that comes before the data of tensors of these sizes, padded.
    pub fn header(&self, sizes: impl Iterator<Item = usize>) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            bytes.extend([string(key), value.clone()].concat());
        }
        let mut offset = 0;
        for ((name, dims, ty, _), size) in self.tensors.iter().zip(sizes) {
            bytes.extend(string(name));
            bytes.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
            bytes.extend(ty.to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
            offset += size.next_multiple_of(self.alignment);
        }
        if !self.tensors.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        }
        bytes
    }

    pub fn build(&self) -> Vec<u8> {
        let mut bytes = self.header(self.tensors.iter().map(|(.., data)| data.len()));
        for (.., data) in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
            bytes.extend(data);
        }
        bytes
    }
}

/// A small file with values of every type and tensors of several.
pub fn sample() -> Builder {
    let strings: Vec<Vec<u8>> = ["<s>", "</s>", "a", "\u{2581}the"].map(string).to_vec();
    let nested = array_value(4, &[vec![1, 0, 0, 0], vec![2, 0, 0, 0]])[4..].to_vec();
    let mut builder = Builder::new()
        .entry("general.architecture", string_value("llama"))
        .entry("general.alignment", u32_value(32))
        .entry("llama.rope.freq_base", f32_value(10000.0))
        .entry("tokenizer.ggml.add_bos_token", bool_value(true))
        .entry("tokenizer.ggml.tokens", array_value(8, &strings))
        .entry("tokenizer.ggml.scores", array_value(6, &[vec![0; 4], vec![1; 4]]))
        .entry("nested", array_value(9, &[nested.clone(), nested]))
        .entry("empty", array_value(8, &[]));
    for (ty, size) in [(0, 1), (1, 1), (2, 2), (3, 2), (5, 4), (10, 8), (11, 8), (12, 8)] {
        builder = builder.entry(&format!("type {ty}"), [&(ty as u32).to_le_bytes()[..], &[7; 8][..size]].concat());
    }
    for (i, ty) in GgmlType::ALL.into_iter().enumerate() {
        let bytes = (0..2 * ty.row_bytes(256).unwrap()).map(|b| (b * 31 + i) as u8 & 0x3f).collect();
        builder = builder.tensor(&format!("blk.{i}.weight"), 2, 256, ty, bytes);
    }
    builder
}

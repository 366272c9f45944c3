//! GGUF files: what is in them, and that each lie is refused with a message that names it.

mod common;

use candle_taper::codec::kquant::GgmlType;
use candle_taper::gguf::{Gguf, Value, ValueType};
use common::gguf::{Builder, array_value, sample, string, string_value, u32_value};

fn refused(bytes: &[u8], cause: &str) {
    let error = Gguf::new(bytes).expect_err(cause).to_string();
    assert!(error.contains(cause), "{error:?} does not say {cause:?}");
}

/// Replaces the only occurrence of some bytes.
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let places: Vec<usize> = (0..=bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from)).collect();
    assert_eq!(places.len(), 1, "{from:?} occurs {} times", places.len());
    [&bytes[..places[0]], to, &bytes[places[0] + from.len()..]].concat()
}

fn one_tensor(dims: &[u64], ty: u32, bytes: usize) -> Builder {
    let mut builder = Builder::new();
    builder.tensors.push(("t".into(), dims.to_vec(), ty, vec![0; bytes]));
    builder
}

#[test]
fn both_versions_are_read() {
    for version in [2, 3] {
        let builder = Builder { version, ..sample() };
        let file = Gguf::new(builder.build()).unwrap();
        assert_eq!(file.version(), version);
        assert_eq!(file.metadata().count(), builder.entries.len());
        assert!(file.metadata().map(|(key, _)| key).eq(builder.entries.iter().map(|(key, _)| key.as_str())));
        assert_eq!(file.get("general.architecture").unwrap().to_str().unwrap(), "llama");
        assert_eq!(file.get("llama.rope.freq_base").unwrap().to_f32(), Some(10000.0));
        assert_eq!(file.get("type 11"), Some(Value::I64(0x0707_0707_0707_0707)));
        let tokens = file.get("tokenizer.ggml.tokens").unwrap().to_array().unwrap();
        assert_eq!((tokens.ty(), tokens.len()), (ValueType::String, 4));
        assert_eq!(tokens.iter().last().unwrap().to_str().unwrap(), "\u{2581}the");
        let nested = file.get("nested").unwrap().to_array().unwrap();
        let sums = nested.iter().map(|a| a.to_array().unwrap().iter().map(|v| v.to_u64().unwrap()).sum::<u64>());
        assert_eq!(sums.collect::<Vec<_>>(), [3, 3]);
        assert_eq!(file.len(), GgmlType::ALL.len());
        for (tensor, (name, _, ty, data)) in file.tensors().zip(&builder.tensors) {
            assert_eq!((tensor.name, tensor.ty as u32, tensor.data()), (name.as_str(), *ty, &data[..]));
            assert_eq!((tensor.shape(), tensor.rows(), tensor.cols()), (vec![2, 256], 2, 256));
            assert_eq!(file.tensor(name).unwrap().range(), tensor.range());
        }
        assert!(file.tensor("blk").is_none() && file.get("general").is_none());
    }
}

#[test]
fn files_without_tensors_may_end_early() {
    let builder = Builder::new().entry("a", string_value("b"));
    assert!(Gguf::new(builder.build()).unwrap().is_empty());
    let wide = Builder { alignment: 1 << 20, ..one_tensor(&[8], 0, 32).entry("general.alignment", u32_value(1 << 20)) };
    assert_eq!(Gguf::new(wide.build()).unwrap().tensor("t").unwrap().range().start, 1 << 20);
}

#[test]
fn foreign_files_are_refused() {
    refused(b"", "truncated: the magic");
    refused(&[0; 100], "magic");
    refused(&Builder { version: 1, ..sample() }.build(), "version 1; versions 2 and 3");
    refused(&Builder { version: 4, ..sample() }.build(), "version 4");
    refused(&Builder { version: 3 << 24, ..sample() }.build(), "big-endian");
    let bytes = sample().build();
    for end in 0..bytes.len() {
        assert!(Gguf::new(&bytes[..end]).is_err(), "{end} of {} bytes", bytes.len());
    }
}

#[test]
fn absurd_counts_and_lengths_are_refused() {
    let bytes = sample().build();
    for (at, what) in [(8, "tensors"), (16, "metadata entries")] {
        for count in [u64::MAX, 1 << 40, bytes.len() as u64] {
            let mut lie = bytes.clone();
            lie[at..at + 8].copy_from_slice(&count.to_le_bytes());
            refused(&lie, &format!("{count} {what}"));
        }
    }
    let long = replace(&bytes, &string("general.architecture"), &[&[255; 8][..], b"general.architecture"].concat());
    refused(&long, "string length is 18446744073709551615 at byte 24");
    refused(&Builder::new().entry(&"k".repeat(70_000), u32_value(1)).build(), "name is 70000 bytes at byte 24");
    let array = [&9u32.to_le_bytes()[..], &4u32.to_le_bytes(), &(1u64 << 62).to_le_bytes(), &[0; 64]].concat();
    refused(&Builder::new().entry("a", array).build(), "key a: array length is 4611686018427387904 values");
    let deep = (0..5).fold(array_value(4, &[])[4..].to_vec(), |inner, _| array_value(9, &[inner])[4..].to_vec());
    let deep = [&9u32.to_le_bytes()[..], &deep].concat();
    refused(&Builder::new().entry("deep", deep).build(), "key deep: nesting of arrays");
}

#[test]
fn metadata_that_lies_is_refused() {
    for alignment in [0, 3, 48, u32::MAX] {
        refused(&sample_with_alignment(u32_value(alignment)), &format!("general.alignment is {alignment}"));
    }
    refused(&sample_with_alignment(string_value("32")), "general.alignment is \"32\"");
    refused(&sample_with_alignment(u32_value(1 << 31)), "the start of the tensors' data");
    refused(&Builder::new().entry("x", u32_value(1)).entry("x", u32_value(2)).build(), "the key x occurs twice");
    refused(&Builder::new().entry("x", [13u32.to_le_bytes(); 2].concat()).build(), "key x: value type is 13");
    refused(&Builder::new().entry("x", [&7u32.to_le_bytes()[..], &[2]].concat()).build(), "key x: boolean is 2");
    let bytes = Builder::new().entry("xyz", u32_value(1)).build();
    refused(&replace(&bytes, b"xyz", b"x\xffz"), "name is");
}

fn sample_with_alignment(value: Vec<u8>) -> Vec<u8> {
    let mut builder = sample();
    builder.entries.retain(|(key, _)| key != "general.alignment");
    builder.entry("general.alignment", value).build()
}

#[test]
fn tensors_that_lie_are_refused() {
    refused(&one_tensor(&[1 << 40, 1 << 40], 0, 32).build(), "tensor t: shape is [1099511627776, 1099511627776]");
    refused(&one_tensor(&[1 << 32, 1 << 31], 0, 32).build(), "tensor t: shape");
    refused(&one_tensor(&[u64::MAX - 255, 1], 12, 32).build(), "tensor t");
    refused(&one_tensor(&[0, 3], 0, 0).build(), "tensor t: dimension is 0");
    refused(&one_tensor(&[], 0, 0).build(), "tensor t: number of dimensions is 0");
    refused(&one_tensor(&[1; 5], 0, 4).build(), "tensor t: number of dimensions is 5");
    refused(&one_tensor(&[128, 3], 12, 216).build(), "tensor t: shape is [3, 128], allowed: rows of whole Q4_K blocks");
    refused(&one_tensor(&[33], 8, 34).build(), "rows of whole Q8_0 blocks: a multiple of 32");
    refused(
        &one_tensor(&[256], 23, 136).build(),
        "tensor t: tensor type 23 (IQ4_XS) is not supported; supported are F32",
    );
    refused(&one_tensor(&[256], 999, 136).build(), "tensor type 999 (unknown)");
    refused(&one_tensor(&[64], 0, 255).build(), "tensor t: truncated: its data");
    let twice = one_tensor(&[8], 0, 32).tensor("t", 1, 8, GgmlType::F32, vec![0; 32]);
    refused(&twice.build(), "the tensor t occurs twice");
    let two = one_tensor(&[16], 0, 64).tensor("u", 1, 16, GgmlType::F32, vec![0; 64]).build();
    assert!(Gguf::new(&two[..]).is_ok());
    let entry = [&string("u")[..], &2u32.to_le_bytes(), &16u64.to_le_bytes(), &1u64.to_le_bytes(), &[0; 4]].concat();
    let moved = |offset: u64| {
        replace(&two, &[&entry[..], &64u64.to_le_bytes()].concat(), &[&entry[..], &offset.to_le_bytes()].concat())
    };
    refused(&moved(32), "tensor u: data offset is 32, allowed: no byte of tensor t");
    refused(&moved(0), "no byte of tensor");
    refused(&moved(8), "tensor u: data offset is 8, allowed: a multiple of 32");
    refused(&moved(96), "tensor u: truncated: its data");
    refused(&moved(u64::MAX - 31), "tensor u: data offset is beyond 2^64");
}

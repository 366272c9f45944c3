//! What stands between products, on the GPU: each step of a generation gives the logits of the CPU's.

use candle_core::{DType, Device, Tensor};
use candle_taper::models::DenseLlama;

use crate::common::llama::{Tiny, VOCAB};
use crate::gpu;

/// A tiny Llama with heads of `size` values.
pub fn tiny(heads: usize, kv_heads: usize, size: usize) -> Tiny {
    let mut tiny = Tiny::new();
    let hidden = heads * size;
    for (key, value) in [("hidden_size", hidden), ("num_attention_heads", heads), ("num_key_value_heads", kv_heads)] {
        tiny.config[key] = value.into();
    }
    for (name, shape) in &mut tiny.tensors {
        shape.iter_mut().filter(|n| **n == 64).for_each(|n| *n = hidden);
        if name.contains("k_proj") || name.contains("v_proj") {
            shape[0] = kv_heads * size;
        }
    }
    tiny.write();
    tiny
}

/// Logits of two sequences after a prompt of `prompt` tokens, and after each of `steps` more.
pub fn logits(tiny: &Tiny, dtype: DType, device: &Device, prompt: usize, steps: usize) -> Vec<Vec<f32>> {
    let llama = DenseLlama::from_pretrained(tiny.path(), dtype, device).unwrap();
    let mut cache = llama.new_cache(true).unwrap();
    let ids = |first: usize, count: usize| {
        let ids: Vec<u32> =
            (0..2).flat_map(|b| (first..first + count).map(move |i| ((i * 37 + b * 11) % VOCAB) as u32)).collect();
        Tensor::from_vec(ids, (2, count), &Device::Cpu).unwrap()
    };
    let mut all = Vec::new();
    let mut run = |first: usize, count: usize| {
        let y = llama.forward(&ids(first, count), first, &mut cache).unwrap();
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    all.push(run(0, prompt));
    (prompt..prompt + steps).for_each(|position| all.push(run(position, 1)));
    // Two tokens are forgotten and come again: the same bits.
    let again = run(prompt + steps - 2, 1);
    assert!(again == all[all.len() - 2], "the same token at the same position");
    all
}

/// The root mean square of all differences, relative to that of the expected values.
fn error(values: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let (values, expected) = (values.concat(), expected.concat());
    assert_eq!(values.len(), expected.len());
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    let difference = squares(&mut values.iter().zip(&expected).map(|(v, e)| v - e));
    (difference / squares(&mut expected.iter().copied())).sqrt()
}

#[test]
fn steps_of_a_generation_equal_the_cpus() {
    let Some(device) = gpu() else { return };
    // Chunks of 1, 2, 4 and 8 queries; heads with idle lanes; with 24, halves that are no multiple of 8; one that has no kernel.
    let shapes = [
        (4, 2, 16),
        (4, 1, 64),
        (8, 8, 8),
        (6, 2, 80),
        (8, 1, 128),
        (3, 3, 24),
        (7, 1, 96),
        (16, 2, 32),
        (2, 1, 256),
        (4, 2, 12),
    ];
    for (heads, kv_heads, size) in shapes {
        let tiny = tiny(heads, kv_heads, size);
        // One position, spans of 64 and their borders, the cache's first growth.
        for prompt in [1, 63, 254] {
            let expected = logits(&tiny, DType::F32, &Device::Cpu, prompt, 4);
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let all = logits(&tiny, dtype, &device, prompt, 4);
                // 16 bits are rounded after every operation: the CPU's candle says how much that may change.
                let allowed = match dtype {
                    DType::F32 => 1e-4,
                    _ => 2.0 * error(&logits(&tiny, dtype, &Device::Cpu, prompt, 4), &expected),
                };
                let error = error(&all, &expected);
                let what = format!("{heads}/{kv_heads} heads of {size}, {dtype:?}, after {prompt}");
                assert!(error < allowed, "{what}: {error}, allowed {allowed}");
                assert!(all == logits(&tiny, dtype, &device, prompt, 4), "{what}: not the same bits again");
            }
        }
    }
}

//! Whole models: the same greedy text on the GPU as on the CPU.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_taper::matrix::Activations;
use candle_taper::matrix::GpuLayout;
use candle_taper::models::CompressedLlama;
use candle_taper::{Codec, Options};

use crate::gpu;

/// `count` greedy tokens that follow `prompt`.
fn greedy(llama: &CompressedLlama, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut cache = llama.new_cache(true).unwrap();
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let input = Tensor::new(&tokens[cache.len()..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = llama.forward(&input, cache.len(), &mut cache).unwrap();
        tokens.push(logits.squeeze(0).unwrap().argmax(0).unwrap().to_scalar::<u32>().unwrap());
    }
    tokens
}

/// The shipped model and, where it is at hand, a real one: `TINY_STORIES` names its directory.
pub fn models() -> Vec<PathBuf> {
    let tales = ["examples/tales", concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tales")];
    let found = tales.iter().map(Path::new).find(|path| path.is_dir()).expect("run in the repository's directory");
    let named = std::env::var_os("TINY_STORIES").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/TinyStories-656K");
    let real = named.into_iter().chain([beside]).find(|path| path.is_dir());
    if real.is_none() {
        println!("skipped: TinyStories-656K is not here (TINY_STORIES names its directory)");
    }
    [found.to_path_buf()].into_iter().chain(real).collect()
}

#[test]
fn greedy_text_equals_the_cpus() {
    let Some(device) = gpu() else { return };
    for dir in models() {
        let config = candle_taper::models::config::read(&dir).unwrap();
        let prompt: Vec<u32> = [config.bos_token_id.unwrap_or(1), 5, 40, 7].to_vec();
        let count = 200.min(config.max_position_embeddings - prompt.len());
        let on = |device: &Device, layout, dtype, options: &Options| {
            let llama = CompressedLlama::from_pretrained_on(&dir, dtype, device, layout, options).unwrap();
            greedy(&llama, &prompt, count)
        };
        for codec in [Codec::Lossless, Codec::Int8] {
            let options = Options { codec, activations: Activations::Exact, ..Options::default() };
            let expected = on(&Device::Cpu, GpuLayout::Auto, DType::F32, &options);
            for layout in [GpuLayout::Auto, GpuLayout::Window, GpuLayout::Pair, GpuLayout::Rans, GpuLayout::Dense] {
                if matches!(layout, GpuLayout::Dense | GpuLayout::Window | GpuLayout::Pair) && codec != Codec::Lossless
                {
                    continue; // plain weights are rounded to the tensor's dtype, quantised ones are not
                }
                let text = on(&device, layout, DType::F32, &options);
                assert!(text == expected, "{} {codec:?} {layout:?}: {text:?}, not {expected:?}", dir.display());
            }
            // With BF16 activations two backends may part where two tokens are equally likely: reported, not asserted.
            let narrow = on(&device, GpuLayout::Auto, DType::BF16, &options);
            let on_cpu = on(&Device::Cpu, GpuLayout::Auto, DType::BF16, &options);
            let same = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count() - prompt.len();
            println!(
                "{} {codec:?}: with bf16 activations the GPU follows the CPU for {} of {count} tokens, f32 for {}; the CPU \
                 follows f32 for {}",
                dir.display(),
                same(&narrow, &on_cpu),
                same(&narrow, &expected),
                same(&on_cpu, &expected)
            );
        }
    }
}

//! Perplexity against bits on real models, beside GGUF's formats: `cargo run --release --example quality -- [DATA]`.
//!
//! DATA is a directory with `TinyStories-656K`, `stories260K` and `text/tinystories-197k.txt`; by default `shared/data`
//! in a directory above this one. All formats run through the same Llama with `f32` activations, so that the tables show
//! the formats' own errors and nothing else.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/quality/drift.rs"]
mod drift;
#[path = "../tests/quality/formats.rs"]
mod formats;
#[path = "../tests/quality/llama2c.rs"]
mod llama2c;
#[path = "../tests/quality/models.rs"]
mod models;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use candle_taper::Options;
use candle_taper::models::{CompressedLlama, DenseLlama};

use drift::Drift;
use formats::Format;
use models::Forecast;

/// All text there is, for the divergences.
const CHARACTERS: usize = usize::MAX;

fn main() -> Result<()> {
    let data = std::env::args().nth(1).map(Into::into).or_else(common::shared_data);
    let data = data.context("pass the directory that holds TinyStories-656K and stories260K")?;
    for model in models::all(&data, CHARACTERS)? {
        let stated = model.stated();
        let exact = Forecast::new(&model.dense()?, &model.windows)?;
        let perplexity = exact.perplexity(stated);
        println!("{}, perplexity {perplexity:.4} on {} tokens\n", model.name, models::WINDOW * stated.len());
        let windows = model.windows.len();
        println!("| format | what the matrices became | bits/weight | SNR, dB | perplexity | change | as it runs |");
        println!("|---|---|---|---|---|---|---|");
        let mut drifts = Vec::new();
        for (name, format) in formats::all() {
            let packed = formats::quantise(&model.dir, &format)?;
            let llama = DenseLlama::from_pretrained(packed.dir.path(), DType::F32, &Device::Cpu)?;
            let forecast = Forecast::new(&llama, &model.windows)?;
            let own = forecast.perplexity(stated);
            let change = 100.0 * (own / perplexity - 1.0);
            let runs = match format {
                Format::Taper(_) => {
                    let llama = CompressedLlama::from_pretrained(packed.dir.path(), DType::F32, &Options::default())?;
                    format!("{:.3}", Forecast::new(&llama, stated)?.perplexity(stated))
                }
                _ => "".into(),
            };
            let (bits, snr, parts) = (packed.bits, packed.snr, packed.parts);
            println!("| {name} | {parts} | {bits:.2} | {snr:.1} | {own:.3} | {change:+.2}% | {runs} |");
            if snr.is_finite() {
                drifts.push((name, Drift::of(&exact.divergence(&forecast))));
            }
        }
        println!("\nDivergence from the uncompressed model (nats a token) by position, {windows} windows of 256\n");
        println!("| format | 1-64 | 65-128 | 129-192 | 193-256 | growth over 256 positions |");
        println!("|---|---|---|---|---|---|");
        for (name, Drift { quarters: [a, b, c, d], growth, error, .. }) in drifts {
            println!("| {name} | {a:.5} | {b:.5} | {c:.5} | {d:.5} | {growth:+.5} ± {error:.5} |");
        }
        println!();
    }
    Ok(())
}

//! Perplexity against bits on real models, beside GGUF's formats: `cargo run --release --example quality -- [DATA]`.
//!
//! DATA is a directory with `TinyStories-656K`, `stories260K` and `text/tinystories-197k.txt`; by default `shared/data`
//! in a directory above this one. Without it only the model that comes with the source is measured, on texts of its own.
//! All formats run through the same Llama with `f32` activations, so that the tables show the formats' own errors and nothing else;
//! *as it runs* is the same with layers that stay compressed, which multiply INT8 weights with rounded activations.

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

use anyhow::Result;
use candle_core::{DType, Device};
use candle_taper::Options;
use candle_taper::models::{CompressedLlama, DenseLlama};

use drift::Drift;
use formats::Format;
use models::Forecast;

/// Text for the divergences, which need more of it than perplexities.
const CHARACTERS: usize = 80_000;
/// Texts that the model that comes with the source writes.
const TEXTS: u64 = 48;

fn main() -> Result<()> {
    let data = std::env::args().nth(1).map(Into::into).or_else(common::shared_data);
    let mut models = vec![models::tales(TEXTS)?];
    if let Some(data) = data {
        models.extend(models::all(&data, CHARACTERS)?);
    }
    for model in models {
        let stated = model.stated();
        let exact = Forecast::new(&model.dense()?, &model.windows)?;
        let perplexity = exact.perplexity(stated);
        println!("## {}\n", model.name);
        println!("Perplexity of the uncompressed model {perplexity:.4} on {} tokens.\n", models::WINDOW * stated.len());
        let windows = model.windows.len();
        println!(
            "| format | what the matrices became | bits/weight | SNR, dB | divergence | perplexity | change | as it runs |"
        );
        println!("|---|---|---|---|---|---|---|---|");
        let mut drifts = Vec::new();
        for (name, format) in formats::all() {
            let packed = formats::quantise(&model.dir, &format)?;
            let llama = DenseLlama::from_pretrained(packed.dir.path(), DType::F32, &Device::Cpu)?;
            let forecast = Forecast::new(&llama, &model.windows)?;
            let own = forecast.perplexity(stated);
            let same = forecast.bits().eq(exact.bits());
            let change = 100.0 * (own / perplexity - 1.0);
            let change = if same { "none, to the last bit".into() } else { format!("{change:+.2}%") };
            let runs = match format {
                Format::Taper(_) => {
                    let llama = CompressedLlama::from_pretrained(packed.dir.path(), DType::F32, &Options::default())?;
                    format!("{:.3}", Forecast::new(&llama, stated)?.perplexity(stated))
                }
                _ => "".into(),
            };
            let (bits, snr, parts) = (packed.bits, packed.snr, packed.parts);
            let drift = Drift::of(&exact.divergence(&forecast));
            let divergence = drift.mean;
            println!("| {name} | {parts} | {bits:.2} | {snr:.1} | {divergence:.5} | {own:.3} | {change} | {runs} |");
            if snr.is_finite() {
                drifts.push((name, drift));
            }
        }
        println!("\nDivergence from the uncompressed model by position, nats a token, {windows} windows of 256:\n");
        println!("| format | 1-64 | 65-128 | 129-192 | 193-256 | growth over 256 positions |");
        println!("|---|---|---|---|---|---|");
        for (name, Drift { quarters: [a, b, c, d], growth, error, .. }) in drifts {
            println!("| {name} | {a:.5} | {b:.5} | {c:.5} | {d:.5} | {growth:+.5} ± {error:.5} |");
        }
        println!();
    }
    Ok(())
}

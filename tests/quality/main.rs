//! What quantisation costs on real models, that the cost does not grow with the position, and that lossless costs nothing.
//! `cargo run --release --example quality` prints the whole tables.
#![cfg(feature = "candle")]

#[path = "../common/mod.rs"]
mod common;
mod drift;
mod formats;
mod llama2c;
mod models;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use candle_taper::models::{CompressedLlama, DenseLlama};
use candle_taper::{Codec, Options};

use drift::Drift;
use formats::{Format, Quantised, quantise};
use models::{Forecast, Model};

/// Characters that the known perplexities are over.
const CHARACTERS: usize = 20_000;

fn taper(codec: Codec) -> Format {
    Format::Taper(Options { codec, ..Options::default() })
}

/// The model after it went through a format, and its forecast by plain layers.
fn through(model: &Model, format: &Format) -> (Quantised, Forecast) {
    let packed = quantise(&model.dir, format).unwrap();
    let llama = DenseLlama::from_pretrained(packed.dir.path(), DType::F32, &Device::Cpu).unwrap();
    (packed, Forecast::new(&llama, &model.windows).unwrap())
}

/// The forecast by layers that stay compressed.
fn as_it_runs(model: &Model, packed: &Quantised) -> Forecast {
    let llama = CompressedLlama::from_pretrained(packed.dir.path(), DType::F32, &Options::default()).unwrap();
    Forecast::new(&llama, &model.windows).unwrap()
}

#[track_caller]
fn assert_no_drift(name: &str, exact: &Forecast, other: &Forecast) {
    let divergence = exact.divergence(other);
    let Drift { quarters, growth, error, .. } = Drift::of(&divergence);
    println!("{name}: divergence by quarters {quarters:.5?}, growth {growth:+.5} ± {error:.5}");
    assert!(quarters.iter().all(|&mean| mean > 0.0), "{name}: the format changes something");
    // By chance alone once in 700 times, but these numbers are the same in every run.
    assert!(growth <= 3.0 * error, "{name}: the divergence grows by {growth} ± {error} over 256 positions");
}

#[test]
fn perplexities_on_real_models_are_as_good_as_their_bits() {
    let Some(data) = common::shared_data() else { return };
    let models = models::all(&data, CHARACTERS).unwrap();
    // What an independent implementation has.
    for (model, known, tokens) in [(&models[0], "32.39", 4352), (&models[1], "4.712", 9472)] {
        assert_eq!((model.tokens, model.stated().len() * models::WINDOW), (tokens, tokens));
        let exact = Forecast::new(&model.dense().unwrap(), &model.windows).unwrap();
        let perplexity = exact.perplexity(model.stated());
        println!("{}: perplexity {perplexity:.4}", model.name);
        assert_eq!(format!("{perplexity:.*}", known.len() - known.find('.').unwrap() - 1), known);

        let (packed, lossless) = through(model, &taper(Codec::Lossless));
        assert!(packed.snr.is_infinite());
        assert!(lossless.bits().eq(exact.bits()), "not the same bits");
        let runs = as_it_runs(model, &packed).perplexity(model.stated());
        assert_eq!(format!("{runs:.4}"), format!("{perplexity:.4}"));

        let change = |forecast: &Forecast| forecast.perplexity(model.stated()) / perplexity - 1.0;
        let (packed, int8) = through(model, &taper(Codec::Int8));
        assert!(packed.snr > 42.0 && change(&int8).abs() < 0.001, "{} dB, {}", packed.snr, change(&int8));
        assert_no_drift("INT8", &exact, &int8);
        let runs = as_it_runs(model, &packed);
        assert!(change(&runs).abs() < 0.002, "as it runs: {}", change(&runs));
        assert_no_drift("INT8 as it runs", &exact, &runs);
        for bits in [6.0, 4.0] {
            assert_no_drift(&format!("rate {bits}"), &exact, &through(model, &taper(Codec::Rate { bits })).1);
        }
    }
}

/// Fewer bits cost quality, a bit 6 dB; and at the bits of a K-quant the rate codec has less noise and diverges less.
/// (Rows of 128 are too short for K-quants; theirs go on over the ends of rows here.)
#[test]
fn rate_coding_beats_k_quants_at_their_own_bits() {
    let Some(data) = common::shared_data() else { return };
    let model = &models::all(&data, CHARACTERS).unwrap()[0];
    let exact = Forecast::new(&model.dense().unwrap(), &model.windows).unwrap();
    let at = |format: Format| {
        let (packed, forecast) = through(model, &format);
        let mean = Drift::of(&exact.divergence(&forecast)).mean;
        println!("{format:?}: {:.3} bits, {:.2} dB, divergence {mean:.5}", packed.bits, packed.snr);
        (packed.bits, packed.snr, mean)
    };
    let rates = [5.5, 4.5, 3.5].map(|bits| (bits, at(taper(Codec::Rate { bits }))));
    for (asked, (bits, ..)) in rates {
        assert!((bits - asked).abs() < 0.02, "{bits} instead of {asked}");
    }
    let [(_, high), (_, middle), (_, low)] = rates;
    for (more, less) in [(high, middle), (middle, low)] {
        assert!((5.5..6.7).contains(&(more.1 - less.1)) && more.2 < less.2, "{more:?} {less:?}");
    }
    for (ours, blocks) in [(high, GgmlDType::Q5K), (middle, GgmlDType::Q4K)] {
        let theirs = at(Format::GgufAcross(blocks));
        assert!(ours.0 <= theirs.0 && ours.1 > theirs.1 + 1.0 && ours.2 < theirs.2, "{ours:?} {theirs:?}");
    }
}

/// What llama.cpp's quantiser takes for rows that are no whole number of blocks.
#[test]
fn short_rows_fall_back_as_in_llama_cpp() {
    let Some(data) = common::shared_data() else { return };
    let models = models::all(&data, CHARACTERS).unwrap();
    let small = ["79% Q8_0, 21% F16", "79% Q8_0, 21% F16", "79% Q5_1, 21% F16", "79% Q5_0, 21% F16"];
    for (model, expected) in [(&models[0], ["Q8_0", "Q8_0", "Q5_1", "Q5_0"]), (&models[1], small)] {
        let gguf = formats::all().into_iter().filter(|(_, format)| matches!(format, Format::Gguf(_)));
        let parts: Vec<String> = gguf.map(|(_, format)| quantise(&model.dir, &format).unwrap().parts).collect();
        assert_eq!(parts, expected, "{}", model.name);
    }
}

/// On the model that comes with the source, so that it is always tested.
#[test]
fn divergence_does_not_grow_with_the_position() {
    let model = models::tales(16).unwrap();
    let exact = Forecast::new(&model.dense().unwrap(), &model.windows).unwrap();
    let (packed, lossless) = through(&model, &taper(Codec::Lossless));
    assert!(packed.snr.is_infinite() && lossless.bits().eq(exact.bits()));
    let (packed, int8) = through(&model, &taper(Codec::Int8));
    assert_no_drift("INT8", &exact, &int8);
    assert_no_drift("INT8 as it runs", &exact, &as_it_runs(&model, &packed));
    for bits in [6.0, 4.5] {
        assert_no_drift(&format!("rate {bits}"), &exact, &through(&model, &taper(Codec::Rate { bits })).1);
    }
}

/// The bound above would see an error that grows.
#[test]
fn drift_is_seen_where_there_is_one() {
    let mut random = common::golden::Random(1);
    let mut noise = |size: f64| size * (random.below(2001) as f64 / 1000.0 - 1.0);
    let windows: Vec<Vec<f64>> =
        (0..16).map(|_| (0..256).map(|x| 1.0 + 0.2 * f64::from(x) / 255.0 + noise(0.5)).collect()).collect();
    let drift = Drift::of(&windows);
    assert!((drift.growth - 0.2).abs() < 4.0 * drift.error && drift.growth > 3.0 * drift.error, "{drift:?}");
    assert!(drift.quarters.is_sorted(), "{drift:?}");
    let steady: Vec<Vec<f64>> = windows.iter().map(|w| w.iter().rev().chain(w).copied().collect()).collect();
    let drift = Drift::of(&steady);
    assert!(drift.growth.abs() <= 3.0 * drift.error, "{drift:?}");
}

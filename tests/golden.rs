//! Streams of format version 1 decode for ever, and the encoder still makes the same bytes.

mod common;

use candle_taper::format::checksum;
use candle_taper::{CompressedMatrix, Kind, Predictor, compress};
use common::golden::{Golden, all};

fn compressed(golden: &Golden) -> Vec<u8> {
    compress(&golden.source(), golden.dtype, golden.rows, golden.cols, &golden.options).unwrap()
}

/// Writes the files anew: `cargo test --test golden -- --ignored --nocapture`. Only for a new format version, or for a
/// new golden stream; the checksums of the decoded weights that it prints belong into `tests/common/golden.rs`.
#[test]
#[ignore = "writes the golden files"]
fn write() {
    for golden in all() {
        let stream = compressed(&golden);
        let decoded = CompressedMatrix::open(&stream).unwrap().decode().unwrap();
        println!("{}: {} bytes, decoded: {:#018x}", golden.name, stream.len(), checksum::of(&decoded));
        std::fs::write(golden.path(), stream).unwrap();
    }
}

#[test]
fn the_encoder_still_makes_the_same_bytes() {
    for golden in all() {
        assert!(compressed(&golden) == golden.stream, "{} is encoded differently now", golden.name);
    }
}

#[test]
fn golden_streams_decode_to_the_same_weights_with_every_backend() {
    for golden in all() {
        for backend in common::backends() {
            let matrix = CompressedMatrix::open(golden.stream).unwrap().with_backend(backend);
            assert_eq!((matrix.geometry().rows, matrix.geometry().cols), (golden.rows, golden.cols));
            let decoded = matrix.decode().unwrap();
            assert_eq!(checksum::of(&decoded), golden.decoded, "{} with {}", golden.name, backend.name());
            assert!(matrix.plan().kind != Kind::Bf16 || decoded == golden.source());
        }
    }
}

/// What each stream is there for.
#[test]
fn golden_streams_cover_escapes_scales_and_predictors() {
    let [bf16, int8, rate] = all().map(|golden| CompressedMatrix::open(golden.stream).unwrap());
    assert_eq!([&bf16, &int8, &rate].map(|m| m.plan().kind), [Kind::Bf16, Kind::Int8, Kind::Rate]);
    assert_eq!([&bf16, &int8].map(|m| m.plan().stage_name()), ["rans", "rans8"]);
    assert!(bf16.stream().record(0).unwrap().escapes > 0);
    assert!(rate.stream().record(0).unwrap().escapes > 2, "more than those for NaN and infinity");
    assert_ne!(int8.stream().record(0).unwrap().predictor, Predictor::None);
    assert_eq!(int8.stream().record(1).unwrap().predictor, Predictor::None);
}

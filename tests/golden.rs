//! Streams of format version 1 decode for ever, and the encoder still makes the same bytes.

mod common;

use candle_taper::format::checksum;
use candle_taper::{CompressedMatrix, Kind, Predictor, ScaleLayout, compress};
use common::golden::{Golden, Random, all};

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

/// Writes what the fuzzers start from: `cargo test --test golden -- --ignored`.
#[test]
#[ignore = "writes the seeds of the fuzz targets"]
fn write_seeds() {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let directory = format!("{}/fuzz/seeds/{target}", env!("CARGO_MANIFEST_DIR"));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(format!("{directory}/{name}"), bytes).unwrap();
    };
    for Golden { name, stream, .. } in all() {
        write("header", name, stream);
        write("header", &format!("{name}-preamble"), &stream[..640]);
        // A table with a coded band behind it.
        write("table", name, &stream[64..1024]);
    }
    let mut random = Random(4);
    for n in [0, 64, 300] {
        write("table", &format!("counts-{n}"), &[vec![n as u8 / 8], random.bytes(n)].concat());
    }
    for stream in 0..8 {
        // Changes to the header, to the first tile, and a new start of its coded data.
        let places = [[7, 0, 0, 1], [0, 3, 0, 255], [200, 2, 0, 0]];
        let changes = places.iter().flatten().copied().chain(random.bytes(stream as usize % 4));
        write("tile", &stream.to_string(), &[stream * 9].into_iter().chain(changes).collect::<Vec<_>>());
        let head = [stream % 6, stream % 4, 40, 30, stream % 3, 0, 10, stream % 3];
        write("roundtrip", &stream.to_string(), &[&head[..], &random.bytes(200)].concat());
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
fn golden_streams_cover_escapes_levels_scales_and_predictors() {
    let [bf16, int8, rate] = all().map(|golden| CompressedMatrix::open(golden.stream).unwrap());
    assert_eq!([&bf16, &int8, &rate].map(|m| m.plan().kind), [Kind::Bf16, Kind::Int8, Kind::Rate]);
    assert_eq!([&bf16, &int8].map(|m| m.plan().stage_name()), ["rans", "rans8"]);
    assert_eq!(bf16.plan().scale, ScaleLayout::Levels);
    assert!(bf16.stream().record(0).unwrap().escapes > 0);
    assert!(rate.stream().record(0).unwrap().escapes > 2, "more than those for NaN and infinity");
    assert_ne!(int8.stream().record(0).unwrap().predictor, Predictor::None);
    assert_eq!(int8.stream().record(1).unwrap().predictor, Predictor::None);
}

//! Compressing and reading back, over kinds, stages, shapes and distributions, with every backend of this machine.

mod common;

use candle_taper::{Backend, Codec, CompressedMatrix, Dtype, Options, ScaleLayout, Stage, compress};
use common::{Shape, backends, weights};
use proptest::prelude::*;

const DTYPES: [Dtype; 6] = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8];
const STAGES: [Stage; 3] = [Stage::Rans, Stage::Fixed12, Stage::Fixed11];

fn lossless(stage: Stage) -> Options {
    Options { stage, ..Options::default() }
}

/// Decodes with every backend; all must give the same bytes, which are returned.
fn decode_everywhere(stream: &[u8]) -> Vec<u8> {
    let scalar = CompressedMatrix::open(stream).unwrap().with_backend(Backend::Scalar).decode().unwrap();
    for backend in backends() {
        let other = CompressedMatrix::open(stream).unwrap().with_backend(backend).decode().unwrap();
        assert!(other == scalar, "{} differs from scalar", backend.name());
    }
    scalar
}

#[test]
fn every_pattern_of_every_dtype_survives() {
    let patterns16: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let patterns32: Vec<u8> =
        (0..=u16::MAX).flat_map(|p| (u32::from(p).wrapping_mul(65_537) ^ 0x55).to_le_bytes()).collect();
    for stage in STAGES {
        for (dtype, data) in [(Dtype::Bf16, &patterns16), (Dtype::F16, &patterns16), (Dtype::F32, &patterns32)] {
            let stream = compress(data, dtype, 256, 256, &lossless(stage)).unwrap();
            assert!(decode_everywhere(&stream) == *data, "{dtype:?} {stage:?}");
        }
        for dtype in [Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8] {
            let data: Vec<u8> = (0..=255u8).cycle().take(1 << 16).collect();
            let stream = compress(&data, dtype, 256, 256, &lossless(stage)).unwrap();
            assert!(decode_everywhere(&stream) == data, "{dtype:?} {stage:?}");
        }
    }
}

/// All patterns at a skewed frequency, so that the class path (not the raw fallback) meets every one of them.
#[test]
fn every_pattern_survives_among_common_weights() {
    for (dtype, count) in [(Dtype::Bf16, 1 << 16), (Dtype::F16, 1 << 16), (Dtype::F8E4M3, 256), (Dtype::F8E5M2, 256)] {
        let (rows, cols) = (1024, 768);
        let mut data = weights(Shape::Gaussian, dtype, rows, cols, 5);
        for pattern in 0..count {
            let at = pattern * 7 * dtype.size();
            data[at..at + dtype.size()].copy_from_slice(&(pattern as u32).to_le_bytes()[..dtype.size()]);
        }
        for stage in STAGES {
            let stream = compress(&data, dtype, rows, cols, &lossless(stage)).unwrap();
            let shrinks = dtype != Dtype::F8E4M3 || stage == Stage::Rans;
            assert!(!shrinks || stage == Stage::Fixed11 || stream.len() < data.len());
            assert!(decode_everywhere(&stream) == data, "{dtype:?} {stage:?}");
        }
    }
}

#[test]
fn shapes_at_every_edge_survive() {
    for (rows, cols) in
        [(1, 1), (1, 2), (2, 1), (1, 600), (600, 1), (63, 65), (64, 64), (65, 63), (255, 257), (256, 256)]
    {
        for dtype in DTYPES {
            for stage in STAGES {
                for shape in [Shape::Gaussian, Shape::Specials, Shape::Noise] {
                    let data = weights(shape, dtype, rows, cols, 7);
                    let stream = compress(&data, dtype, rows, cols, &lossless(stage)).unwrap();
                    assert!(decode_everywhere(&stream) == data, "{rows}x{cols} {dtype:?} {stage:?} {shape:?}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn any_matrix_survives(
        rows in 1usize..=600, cols in 1usize..=600, dtype in 0usize..6, stage in 0usize..3, shape in 0usize..7, seed: u64,
    ) {
        let (dtype, stage, shape) = (DTYPES[dtype], STAGES[stage], Shape::ALL[shape]);
        let data = weights(shape, dtype, rows, cols, seed);
        let stream = compress(&data, dtype, rows, cols, &lossless(stage)).unwrap();
        prop_assert!(decode_everywhere(&stream) == data);
    }

    #[test]
    fn any_matrix_is_quantised_alike_everywhere(
        rows in 1usize..=600, cols in 1usize..=600, dtype in 0usize..3, shape in 0usize..7, seed: u64,
        scale in 0usize..3, codec in 0usize..4, stage in 0usize..3,
    ) {
        let (dtype, shape) = (DTYPES[dtype], Shape::ALL[shape]);
        let data = weights(shape, dtype, rows, cols, seed);
        let scale = [ScaleLayout::Row, ScaleLayout::Matrix, ScaleLayout::Tile][scale];
        let options = match codec {
            0 | 1 => Options { codec: Codec::Int8, scale: Some(scale), stage: STAGES[stage], ..Options::default() },
            _ if scale == ScaleLayout::Tile => Options { codec: Codec::Rate { bits: 1.5 }, ..Options::default() },
            _ => Options { codec: Codec::Rate { bits: 2.0 + codec as f64 }, scale: Some(scale), ..Options::default() },
        };
        let stream = compress(&data, dtype, rows, cols, &options).unwrap();
        decode_everywhere(&stream);
    }

    #[test]
    fn any_range_of_rows_and_any_tile_decodes_alone(
        rows in 1usize..=600, cols in 1usize..=600, stage in 0usize..3, seed: u64, a in 0.0f64..1.0, b in 0.0f64..1.0,
    ) {
        let data = weights(Shape::StudentT, Dtype::Bf16, rows, cols, seed);
        let stream = compress(&data, Dtype::Bf16, rows, cols, &lossless(STAGES[stage])).unwrap();
        let matrix = CompressedMatrix::open(&stream).unwrap();
        let (a, b) = ((a * rows as f64) as usize, (b * rows as f64) as usize + 1);
        let range = a.min(b)..a.max(b);
        prop_assert!(matrix.decode_rows(range.clone()).unwrap() == data[range.start * cols * 2..range.end * cols * 2]);
        for tile in 0..matrix.geometry().tiles() {
            let (rect, decoded) = matrix.decode_tile(tile).unwrap();
            for (r, row) in decoded.chunks(rect.cols * 2).enumerate() {
                let at = ((rect.row + r) * cols + rect.col) * 2;
                prop_assert!(row == &data[at..at + row.len()]);
            }
        }
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads() {
    for (codec, shape) in
        [(Codec::Lossless, Shape::Scaled), (Codec::Int8, Shape::Smooth), (Codec::Rate { bits: 3.5 }, Shape::StudentT)]
    {
        let data = weights(shape, Dtype::Bf16, 777, 1111, 3);
        let options = Options { codec, ..Options::default() };
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| compress(&data, Dtype::Bf16, 777, 1111, &options).unwrap())
        };
        let one = with(1);
        for threads in [2, 3, 7, 64] {
            assert!(with(threads) == one, "{codec:?} with {threads} threads");
        }
    }
}

#[test]
fn bf16_exact_matrices_are_stored_as_bf16_and_restored() {
    let bf16 = weights(Shape::Gaussian, Dtype::Bf16, 300, 300, 1);
    let values = common::decode(&bf16, Dtype::Bf16);
    for dtype in [Dtype::F16, Dtype::F32] {
        // F16 holds these values only where they are not too small for it.
        let rounded: Vec<f32> = values.iter().map(|v| if v.abs() < 1e-3 { 0.0 } else { *v }).collect();
        let data = common::encode(&rounded, dtype);
        let stream = compress(&data, dtype, 300, 300, &Options::default()).unwrap();
        let matrix = CompressedMatrix::open(&stream).unwrap();
        assert_eq!((matrix.plan().kind, matrix.dtype()), (candle_taper::Kind::Bf16, dtype));
        assert!(decode_everywhere(&stream) == data);
        assert!(matrix.bits_per_weight() < 11.2, "{}", matrix.bits_per_weight());
        let mut other = data.clone();
        other[0] ^= 1;
        let stream = compress(&other, dtype, 300, 300, &Options::default()).unwrap();
        assert_eq!(CompressedMatrix::open(&stream).unwrap().plan().kind, candle_taper::Kind::of(dtype));
        assert!(decode_everywhere(&stream) == other);
    }
}

#[test]
fn predictors_are_chosen_where_they_help_and_only_there() {
    let count = |shape| {
        let data = weights(shape, Dtype::F32, 512, 512, 9);
        let options = Options { codec: Codec::Int8, ..Options::default() };
        let stream = compress(&data, Dtype::F32, 512, 512, &options).unwrap();
        let matrix = CompressedMatrix::open(&stream).unwrap();
        let tiles = matrix.geometry().tiles();
        let used = (0..tiles).filter(|&t| matrix.stream().record(t).unwrap().predictor as u8 != 0).count();
        (used, tiles, matrix.bits_per_weight())
    };
    for shape in [Shape::Gaussian, Shape::StudentT, Shape::Scaled] {
        assert_eq!(count(shape).0, 0, "{shape:?}");
    }
    let (used, tiles, bits) = count(Shape::Smooth);
    assert_eq!(used, tiles);
    assert!(bits < 5.5, "{bits}");
}

#[test]
fn a_matrix_that_does_not_shrink_is_stored_raw() {
    for dtype in DTYPES {
        let data = weights(Shape::Noise, dtype, 256, 256, 2);
        let stream = compress(&data, dtype, 256, 256, &Options::default()).unwrap();
        let matrix = CompressedMatrix::open(&stream).unwrap();
        // Random mantissas leave F32 with compressible exponents only if they are skewed: here nothing is.
        assert_eq!(matrix.plan().stage_name(), "raw", "{dtype:?}");
        assert!(decode_everywhere(&stream) == data);
        assert!(stream.len() < data.len() + 1024);
    }
}

/// Order-0 bound of exponent plus raw bits, in bits per weight.
fn bound(data: &[u8]) -> f64 {
    let mut counts = [0u64; 256];
    data.chunks_exact(2).for_each(|b| counts[(u16::from_le_bytes([b[0], b[1]]) >> 7 & 255) as usize] += 1);
    let n = (data.len() / 2) as f64;
    8.0 + counts.iter().filter(|&&c| c > 0).map(|&c| -(c as f64 / n) * (c as f64 / n).log2()).sum::<f64>()
}

#[test]
fn sizes_are_within_two_percent_of_the_bound() {
    for shape in [Shape::Gaussian, Shape::StudentT, Shape::Scaled] {
        let data = weights(shape, Dtype::Bf16, 1024, 1024, 11);
        let stream = compress(&data, Dtype::Bf16, 1024, 1024, &Options::default()).unwrap();
        let (bits, bound) = (8.0 * stream.len() as f64 / (1 << 20) as f64, bound(&data));
        println!("{shape:?}: {bits:.3} bits, bound {bound:.3}, {:+.2}%", 100.0 * (bits / bound - 1.0));
        assert!(bits <= bound * 1.02, "{shape:?} {bits} {bound}");
    }
}

#[test]
fn the_chosen_rate_is_met() {
    for shape in [Shape::Gaussian, Shape::StudentT, Shape::Scaled] {
        let data = weights(shape, Dtype::Bf16, 1024, 1024, 13);
        let values = common::decode(&data, Dtype::Bf16);
        for scale in [ScaleLayout::Matrix, ScaleLayout::Row] {
            for bits in [1.5, 2.0, 3.0, 3.5, 4.5, 6.0, 8.0] {
                let options = Options { codec: Codec::Rate { bits }, scale: Some(scale), ..Options::default() };
                let stream = compress(&data, Dtype::Bf16, 1024, 1024, &options).unwrap();
                let matrix = CompressedMatrix::open(&stream).unwrap();
                let got = matrix.bits_per_weight();
                let snr = common::snr(&values, &common::decode(&matrix.decode().unwrap(), Dtype::Bf16));
                println!("{shape:?} {scale:?} {bits}: {got:.3} bits, {snr:.2} dB, {}", matrix.plan().stage_name());
                assert!((got - bits).abs() <= 0.05, "{shape:?} {scale:?} {bits} {got}");
                if shape == Shape::Gaussian && bits == 3.5 && scale == ScaleLayout::Matrix {
                    assert!(snr >= 19.0, "{snr}");
                }
            }
        }
    }
}

#[test]
fn int8_is_as_exact_as_eight_bits_allow() {
    let data = weights(Shape::Gaussian, Dtype::Bf16, 512, 512, 17);
    let values = common::decode(&data, Dtype::Bf16);
    for (scale, least) in [(ScaleLayout::Row, 40.0), (ScaleLayout::Tile, 38.0), (ScaleLayout::Matrix, 37.0)] {
        let options = Options { codec: Codec::Int8, scale: Some(scale), ..Options::default() };
        let stream = compress(&data, Dtype::Bf16, 512, 512, &options).unwrap();
        let decoded = CompressedMatrix::open(&stream).unwrap().decode().unwrap();
        let snr = common::snr(&values, &common::decode(&decoded, Dtype::Bf16));
        assert!(snr > least, "{scale:?} {snr}");
    }
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let data = vec![0; 2];
    let bad = [
        Options { codec: Codec::Rate { bits: 0.5 }, ..Options::default() },
        Options { codec: Codec::Rate { bits: f64::NAN }, ..Options::default() },
        Options { codec: Codec::Rate { bits: 3.0 }, stage: Stage::Fixed12, ..Options::default() },
        Options { codec: Codec::Rate { bits: 3.0 }, scale: Some(ScaleLayout::Tile), ..Options::default() },
        Options { scale: Some(ScaleLayout::Row), ..Options::default() },
        Options { codec: Codec::Int8, scale: Some(ScaleLayout::None), ..Options::default() },
    ];
    for options in bad {
        assert!(compress(&data, Dtype::Bf16, 1, 1, &options).is_err(), "{options:?}");
    }
    for (rows, cols) in [(0, 1), (1, 0), (1, 2), (usize::MAX, usize::MAX), (1 << 32, 1)] {
        assert!(compress(&data, Dtype::Bf16, rows, cols, &Options::default()).is_err());
    }
}

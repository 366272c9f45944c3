//! Decoded bytes equal the CPU's: every kind, stage, predictor, scale layout and edge.

use candle_core::{CudaDevice, Device};
use candle_taper::codec::quant;
use candle_taper::cuda::DeviceStream;
use candle_taper::format::{Checks, TileStream};
use candle_taper::{Codec, CompressedMatrix, Dtype, Options, Predictor, ScaleLayout, Stage, compress};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::common::patch::{Patch, record};
use crate::common::{Shape, weights};
use crate::{cuda, gpu};

pub const DTYPES: [Dtype; 6] = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8];
pub const STAGES: [Stage; 3] = [Stage::Rans, Stage::Fixed12, Stage::Fixed11];

/// Rows of a stream as the GPU decodes them; every byte of the result was written by it.
fn on_gpu(device: &CudaDevice, stream: &DeviceStream, rows: std::ops::Range<usize>, dtype: Dtype) -> Vec<u8> {
    let bytes = rows.len() * stream.geometry().cols * dtype.size();
    // Two poisons: what is not written differs between them.
    let [a, b] = [0x5au8, 0xa5].map(|poison| {
        let mut out = device.clone_htod(&vec![poison; bytes + 16]).unwrap();
        stream.decode_rows(rows.clone(), dtype, &mut out.slice_mut(..bytes)).unwrap();
        let mut out = device.clone_dtoh(&out).unwrap();
        assert!(out.drain(bytes..).all(|byte| byte == poison), "written past the end");
        out
    });
    assert!(a == b, "not everything was written");
    a
}

/// Compares whole matrices and some rows in every dtype.
pub fn check(device: &Device, bytes: &[u8], what: &str) {
    let device = cuda(device);
    let parsed = TileStream::parse_with(bytes, Checks::Off).unwrap();
    let matrix = CompressedMatrix::from_stream(parsed.clone()).unwrap();
    let own = matrix.decode().unwrap();
    let (rows, dtype) = (matrix.geometry().rows, matrix.dtype());
    let stream = DeviceStream::new(device, &parsed).unwrap();
    let decoded = on_gpu(device, &stream, 0..rows, dtype);
    if decoded != own {
        let at = decoded.iter().zip(&own).position(|(a, b)| a != b).unwrap();
        panic!("{what}: byte {at} of {} is {:#x}, not {:#x}", own.len(), decoded[at], own[at]);
    }
    let mut values = vec![0.0; own.len() / dtype.size()];
    quant::to_f32s(dtype, &own, &mut values);
    let as_bf16: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    let as_f16: Vec<u8> = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
    let as_f32: Vec<u8> = values.iter().flat_map(|&v| v.to_le_bytes()).collect();
    for (out, expected) in [(Dtype::Bf16, &as_bf16), (Dtype::F16, &as_f16), (Dtype::F32, &as_f32)] {
        if out == dtype {
            continue; // its NaNs keep their payload
        }
        let decoded = on_gpu(device, &stream, 0..rows, out);
        assert!(same(&decoded, expected, out), "{what} as {out:?}");
    }
    let row = own.len() / rows;
    for range in [rows / 3..rows, rows / 2..rows / 2 + 1, rows / 4..(rows / 4 + 70).min(rows)] {
        let expected = &own[range.start * row..range.end * row];
        assert!(on_gpu(device, &stream, range.clone(), dtype) == expected, "{what} rows {range:?}");
    }
    stream.check().unwrap_or_else(|error| panic!("{what}: {error}"));
}

/// Equal bytes, but any NaN equals any other: a widened one has another payload on the way through `half`.
fn same(a: &[u8], b: &[u8], dtype: Dtype) -> bool {
    let values = |bytes: &[u8]| {
        let mut values = vec![0.0; bytes.len() / dtype.size()];
        quant::to_f32s(dtype, bytes, &mut values);
        values
    };
    a.len() == b.len()
        && values(a).iter().zip(values(b)).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

#[test]
fn every_kind_stage_and_edge_equals_the_cpu() {
    let Some(device) = gpu() else { return };
    let sizes = [
        (1, 1),
        (1, 2),
        (2, 1),
        (1, 600),
        (600, 1),
        (63, 65),
        (64, 64),
        (65, 63),
        (255, 257),
        (256, 256),
        (520, 513),
        // Multiples of 64 columns, which BF16 has kernels of its own for; those of 8 have some, too.
        (1, 256),
        (63, 256),
        (66, 512),
        (449, 768),
        (70, 192),
        (449, 704),
        (131, 328),
    ];
    let mut count = 0;
    for (rows, cols) in sizes {
        for dtype in DTYPES {
            for stage in STAGES {
                for shape in Shape::ALL {
                    let data = weights(shape, dtype, rows, cols, 7);
                    let options = Options { stage, ..Options::default() };
                    let stream = compress(&data, dtype, rows, cols, &options).unwrap();
                    check(&device, &stream, &format!("{rows}x{cols} {dtype:?} {stage:?} {shape:?}"));
                    count += 1;
                }
            }
        }
    }
    println!("{count} matrices equal");
}

#[test]
fn every_pattern_equals_the_cpu() {
    let Some(device) = gpu() else { return };
    for dtype in DTYPES {
        let (rows, cols) = (1024, 768);
        let mut data = weights(Shape::Gaussian, dtype, rows, cols, 5);
        let patterns = if dtype.size() == 1 { 256 } else { 1 << 16 };
        for pattern in 0..patterns {
            let at = pattern * 7 * dtype.size();
            let bits = if dtype == Dtype::F32 { (pattern as u32).wrapping_mul(65_537) ^ 0x55 } else { pattern as u32 };
            data[at..at + dtype.size()].copy_from_slice(&bits.to_le_bytes()[..dtype.size()]);
        }
        for stage in STAGES {
            let stream = compress(&data, dtype, rows, cols, &Options { stage, ..Options::default() }).unwrap();
            check(&device, &stream, &format!("patterns of {dtype:?} {stage:?}"));
        }
    }
}

#[test]
fn quantised_matrices_of_every_scale_layout_equal_the_cpu() {
    let Some(device) = gpu() else { return };
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for (rows, cols) in [(1, 1), (70, 9), (300, 520), (257, 256)] {
            for shape in Shape::ALL {
                let data = weights(shape, dtype, rows, cols, 3);
                for scale in [ScaleLayout::Row, ScaleLayout::Matrix, ScaleLayout::Tile] {
                    for stage in STAGES {
                        let options = Options { codec: Codec::Int8, scale: Some(scale), stage, ..Options::default() };
                        let stream = compress(&data, dtype, rows, cols, &options).unwrap();
                        check(&device, &stream, &format!("int8 {rows}x{cols} {dtype:?} {stage:?} {shape:?} {scale:?}"));
                    }
                    for bits in [1.5, 3.5, 6.0, 9.5] {
                        if scale != ScaleLayout::Tile {
                            let options =
                                Options { codec: Codec::Rate { bits }, scale: Some(scale), ..Options::default() };
                            let stream = compress(&data, dtype, rows, cols, &options).unwrap();
                            check(
                                &device,
                                &stream,
                                &format!("rate {bits} {rows}x{cols} {dtype:?} {shape:?} {scale:?}"),
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Any differences are weights to a predictor: each is written into the records of a matrix that has none.
#[test]
fn every_predictor_equals_the_cpu() {
    let Some(device) = gpu() else { return };
    for (rows, cols) in [(1, 1), (3, 300), (64, 31), (33, 32), (100, 256), (300, 300)] {
        for shape in [Shape::Gaussian, Shape::Smooth, Shape::Noise] {
            for stage in STAGES {
                let data = weights(shape, Dtype::I8, rows, cols, 11);
                let stream = compress(&data, Dtype::I8, rows, cols, &Options { stage, ..Options::default() }).unwrap();
                let parsed = TileStream::parse(&stream).unwrap();
                if !parsed.plan().allows_predictor() {
                    continue;
                }
                let tiles = parsed.geometry().tiles();
                for predictor in Predictor::ALL {
                    let patched = (0..tiles).fold(Patch::new(&stream), |patch, tile| {
                        patch.put(Patch::record(tile) + record::PREDICTOR, [predictor as u8])
                    });
                    let patched = patched.seal();
                    check(&device, &patched, &format!("{rows}x{cols} {shape:?} {stage:?} {}", predictor.name()));
                }
            }
        }
    }
}

#[test]
fn any_matrix_equals_the_cpu() {
    let Some(device) = gpu() else { return };
    let cols = prop_oneof![1usize..=600, (1usize..=12).prop_map(|steps| 64 * steps)];
    let inputs = (1usize..=600, cols, 0usize..6, 0usize..3, 0usize..7, any::<u64>());
    let config = ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() };
    let run = TestRunner::new(config).run(&inputs, |(rows, cols, dtype, stage, shape, seed)| {
        let (dtype, stage, shape) = (DTYPES[dtype], STAGES[stage], Shape::ALL[shape]);
        let data = weights(shape, dtype, rows, cols, seed);
        let stream = compress(&data, dtype, rows, cols, &Options { stage, ..Options::default() }).unwrap();
        check(&device, &stream, &format!("{rows}x{cols} {dtype:?} {stage:?} {shape:?} {seed}"));
        Ok(())
    });
    run.unwrap();
}

#[test]
fn rows_of_a_table_equal_the_cpu() {
    let Some(device) = gpu() else { return };
    let device = cuda(&device);
    for (rows, cols, dtype) in
        [(1, 1, Dtype::Bf16), (300, 96, Dtype::Bf16), (1000, 520, Dtype::F32), (70, 33, Dtype::I8)]
    {
        let data = weights(Shape::Scaled, dtype, rows, cols, 13);
        let bytes = compress(&data, dtype, rows, cols, &Options::default()).unwrap();
        let stream = DeviceStream::new(device, &TileStream::parse(&bytes).unwrap()).unwrap();
        let ids: Vec<u32> = (0..37u32).map(|i| i * i * 31 % rows as u32).chain([rows as u32, u32::MAX]).collect();
        let row = cols * dtype.size();
        let mut expected: Vec<u8> =
            ids[..37].iter().flat_map(|&id| data[id as usize * row..][..row].to_vec()).collect();
        expected.resize(ids.len() * row, 0);
        let on_device = device.clone_htod(&ids).unwrap();
        let mut out = device.clone_htod(&vec![0x5au8; ids.len() * row]).unwrap();
        stream.decode_ids(&on_device.slice(..), dtype, &mut out.slice_mut(..)).unwrap();
        assert!(device.clone_dtoh(&out).unwrap() == expected, "{rows}x{cols} {dtype:?}");
        stream.check().unwrap();
        assert!(stream.decode_ids(&on_device.slice(..), dtype, &mut out.slice_mut(1..)).is_err());
    }
}

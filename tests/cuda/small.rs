//! Every kernel once, on matrices as small as it can take: what compute-sanitizer is given (README, "Layout"), as
//! its tools need minutes for one second of the other tests.

use candle_core::{DType, Device, Module, Tensor};
use candle_taper::codec::kquant::GgmlType;
use candle_taper::matrix::GpuLayout;
use candle_taper::nn::CompressedLinear;
use candle_taper::{Codec, Dtype, Options, ScaleLayout, Stage, compress};

use crate::common::int4::{FORMATS, Packed};
use crate::common::kquant::QUANTIZED;
use crate::common::{Shape, weights};
use crate::products::{COMPRESSED, LAYOUTS, activations, check, matrix};
use crate::{captured_and_replayed, decode, fp8, generation, gpu, has_fp8, kquant, whole_gpu};

/// Rows of activations, one for each kernel: registers, two widths of rings, on compute capability 9.0 two of streams and
/// elsewhere wide products.
const ROWS: [usize; 5] = [1, 7, 16, 24, 40];
/// Rows that are multiplied by cuBLAS, whose writes initcheck does not see and calls missing; [`prefill`] has those that
/// are not.
const MANY: usize = 70;

/// All layouts but the plain one.
const FUSED: [GpuLayout; 6] =
    [GpuLayout::Fixed, GpuLayout::Window, GpuLayout::Pair, GpuLayout::Fp8, GpuLayout::Integers, GpuLayout::Rans];

#[test]
fn products() {
    let Some(device) = gpu() else { return };
    let quantised = |codec, scale| Options { codec, scale, ..Options::default() };
    let cases = [
        // With repairs; with levels, in whole tiles of columns, which streams at rest have kernels of their own for; in whole
        // bands of rows too.
        (Dtype::Bf16, Shape::StudentT, 40, 520, Options::default()),
        (Dtype::Bf16, Shape::Scaled, 72, 512, Options::default()),
        (Dtype::Bf16, Shape::StudentT, 128, 256, Options::default()),
        (Dtype::F8E4M3, Shape::Gaussian, 40, 520, Options::default()),
        (Dtype::F8E5M2, Shape::Gaussian, 40, 520, Options::default()),
        (Dtype::F32, Shape::Gaussian, 20, 200, Options::default()),
        (Dtype::Bf16, Shape::Scaled, 40, 520, quantised(Codec::Int8, Some(ScaleLayout::Row))),
        (Dtype::Bf16, Shape::Scaled, 40, 520, quantised(Codec::Int8, Some(ScaleLayout::Tile))),
        (Dtype::Bf16, Shape::Smooth, 40, 520, quantised(Codec::Rate { bits: 4.0 }, None)),
    ];
    let teams = [GpuLayout::Fixed, GpuLayout::Window, GpuLayout::Fp8];
    for (dtype, shape, rows, cols, options) in cases {
        let w = matrix(shape, dtype, rows, cols, &options);
        for layout in FUSED {
            let Ok(layer) = CompressedLinear::on(w.weight.clone(), None, &device, layout) else { continue };
            // Of rows at rest more are decoded for cuBLAS.
            for &m in if layout == GpuLayout::Rans { &ROWS[..1] } else { &ROWS[..] } {
                let what = format!("{dtype:?} {shape:?} {layout:?} m={m}");
                check(&device, &layer, &w, &activations(m, cols, 1), m, DType::BF16, &what);
            }
            // Three columns of activations a row: kernels that BF16 has others for.
            let few: &[usize] = if teams.contains(&layout) { &[2, 8, 12] } else { &[2] };
            for &m in few {
                let what = format!("{dtype:?} {layout:?} m={m} F32");
                check(&device, &layer, &w, &activations(m, cols, 1), m, DType::F32, &what);
            }
        }
    }
}

#[test]
fn kquants() {
    let Some(device) = gpu() else { return };
    for ty in QUANTIZED.into_iter().chain([GgmlType::Q8_K]) {
        let matrix = kquant::Matrix::new(ty, 40, 768, 7);
        let layer = matrix.linear(&device);
        for m in ROWS {
            kquant::check(&device, &layer, &matrix, &activations(m, matrix.shape[1], 1), DType::BF16);
        }
        // Two columns of activations a row, or three.
        for (m, dtype) in [(12, DType::F16), (24, DType::F16), (8, DType::F32), (16, DType::F32)] {
            kquant::check(&device, &layer, &matrix, &activations(m, matrix.shape[1], 1), dtype);
        }
    }
    // Blocks of one tile and of two: teams with nothing to do.
    let matrix = kquant::Matrix::new(GgmlType::Q4_K, 2304, 256, 7);
    kquant::check(&device, &matrix.linear(&device), &matrix, &activations(1, 256, 1), DType::BF16);
    let packed = Packed::new(FORMATS[0], 40, 640, 128, false);
    let layer = packed.linear(&device);
    let matrix = kquant::Matrix { ty: GgmlType::Int4G128, shape: packed.shape, data: vec![], values: packed.values };
    for m in ROWS {
        kquant::check(&device, &layer, &matrix, &activations(m, 640, 1), DType::BF16);
    }
}

#[test]
fn activations_as_fp8() {
    let Some(device) = gpu() else { return };
    // Whole blocks; with pieces, as there are fewer blocks than multiprocessors and rows are long.
    for cols in [640, 4352] {
        let packed = Packed::new(FORMATS[0], 40, cols, 128, false);
        let layer = packed.linear(&device).with_fp8(true);
        for m in if has_fp8(&device) { &[64, 130][..] } else { &[] } {
            fp8::check(&device, &layer, &packed, &fp8::exact(*m, cols, 1), DType::BF16);
        }
    }
}

#[test]
fn many_rows() {
    let Some(device) = gpu() else { return };
    let w = matrix(Shape::StudentT, Dtype::Bf16, 40, 520, &Options::default());
    for layout in LAYOUTS {
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap();
        check(&device, &layer, &w, &activations(MANY, 520, 1), MANY, DType::BF16, &format!("{layout:?}"));
    }
    let matrix = kquant::Matrix::new(GgmlType::Q4_K, 40, 768, 7);
    kquant::check(&device, &matrix.linear(&device), &matrix, &activations(MANY, 768, 1), DType::F16);
}

/// Products of random blocks in BF16: rows and columns of the matrix, rows of activations.
fn check_blocks(device: &Device, ty: GgmlType, cases: &[(usize, usize, usize)]) {
    for &(rows, cols, m) in cases {
        let matrix = kquant::Matrix::new(ty, rows, cols, 7);
        let x = activations(m, matrix.shape[1], 1);
        kquant::check(device, &matrix.linear(device), &matrix, &x, DType::BF16);
    }
}

/// Formats of which each kernel is tried, for groups of 32 with minima, of 16, and of 32 in blocks of their own.
const SEVERAL: [GgmlType; 3] = [GgmlType::Q4_K, GgmlType::Q6_K, GgmlType::Q8_0];

/// Each of the kernels through which weights stream, of whole blocks and of pieces, of one block and of several.
#[test]
fn streams() {
    let Some(device) = gpu() else { return };
    let cases = [
        (Shape::Specials, 16, 200, 20),
        (Shape::StudentT, 40, 1300, 40),
        (Shape::Scaled, 600, 1300, 20),
        (Shape::Scaled, 17_000, 128, 40),
    ];
    for (shape, rows, cols, m) in cases {
        let w = matrix(shape, Dtype::Bf16, rows, cols, &Options::default());
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, GpuLayout::Fixed).unwrap();
        let what = format!("{shape:?} {rows}x{cols} m={m}");
        check(&device, &layer, &w, &activations(m, cols, 1), m, DType::BF16, &what);
    }
    for ty in QUANTIZED {
        let cases: &[_] =
            if SEVERAL.contains(&ty) { &[(600, 1280, 20), (17_000, 256, 40)] } else { &[(600, 1280, 40)] };
        check_blocks(&device, ty, cases);
    }
}

/// The smallest matrices for which each of the kernels for many rows is chosen; blocks that are cut; repairs of both lists.
#[test]
fn prefill() {
    let Some(device) = gpu() else { return };
    let cases = [
        (Shape::StudentT, 40, 300, 70),
        (Shape::Specials, 16, 200, 70),
        (Shape::StudentT, 40, 1300, 70),
        (Shape::StudentT, 40, 1300, 130),
        (Shape::Scaled, 2112, 128, 600),
        (Shape::Scaled, 2176, 128, 1000),
        (Shape::Scaled, 2944, 128, 1000),
    ];
    for (shape, rows, cols, m) in cases {
        let w = matrix(shape, Dtype::Bf16, rows, cols, &Options::default());
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, GpuLayout::Fixed).unwrap();
        let what = format!("{shape:?} {rows}x{cols} m={m}");
        check(&device, &layer, &w, &activations(m, cols, 1), m, DType::BF16, &what);
    }
    for ty in QUANTIZED {
        let each = [(40, 512, 70), (600, 1280, 70), (2176, 256, 1000), (2944, 256, 1000)];
        let cases = if SEVERAL.contains(&ty) { &each[..] } else { &each[1..2] };
        check_blocks(&device, ty, cases);
    }
}

#[test]
fn decoding() {
    let Some(device) = gpu() else { return };
    for (dtype, codec) in [
        (Dtype::Bf16, Codec::Lossless),
        (Dtype::F32, Codec::Lossless),
        (Dtype::I8, Codec::Lossless),
        (Dtype::Bf16, Codec::Int8),
        (Dtype::Bf16, Codec::Rate { bits: 3.0 }),
    ] {
        let chosen_rate = matches!(codec, Codec::Rate { .. });
        for stage in [Stage::Rans, Stage::Fixed12, Stage::Fixed11] {
            if chosen_rate && stage != Stage::Rans {
                continue;
            }
            for cols in [270, 512] {
                let data = weights(Shape::StudentT, dtype, 70, cols, 1);
                let stream = compress(&data, dtype, 70, cols, &Options { codec, stage, ..Options::default() }).unwrap();
                decode::check(&device, &stream, &format!("{dtype:?} {codec:?} {stage:?} {cols}"));
            }
        }
    }
}

#[test]
fn generations() {
    let Some(device) = gpu() else { return };
    let tiny = generation::tiny(8, 2, 16);
    // Positions in one span, in several that meet, and in a cache that grows.
    for (prompt, dtype) in [(1, DType::BF16), (70, DType::F32), (254, DType::BF16)] {
        let all = generation::logits(&tiny, dtype, &device, prompt, 3);
        assert!(all.concat().iter().all(|y| y.is_finite()), "{dtype:?} after {prompt}");
    }
}

#[test]
fn graphs() {
    let Some(device) = whole_gpu() else { return };
    let w = matrix(Shape::Scaled, Dtype::Bf16, 256, 256, &Options::default());
    for layout in COMPRESSED {
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap();
        let [x, other] = [1, 2].map(|seed| {
            let x = Tensor::from_vec(activations(2, 256, seed), (2, 256), &device).unwrap();
            x.to_dtype(DType::BF16).unwrap()
        });
        let forward = |x: &Tensor| layer.forward(&layer.forward(x).unwrap()).unwrap();
        captured_and_replayed(&device, [&x, &other], forward, &format!("{layout:?}"));
    }
}

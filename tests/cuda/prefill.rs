//! Products with many rows of BF16 activations against an f64 reference. On compute capability 9.0 weights in layout `fixed`
//! are decoded inside the product; elsewhere cuBLAS multiplies decoded ones.

use candle_core::DType;
use candle_taper::matrix::GpuLayout;
use candle_taper::nn::CompressedLinear;
use candle_taper::{Dtype, Options};

use crate::common::Shape;
use crate::gpu;
use crate::products::{activations, check, matrix};

#[test]
fn many_rows_are_multiplied_right() {
    let Some(device) = gpu() else { return };
    let rows_of_x = [17, 31, 32, 33, 40, 64, 65, 127, 128, 129, 200, 256, 300, 513, 600, 1024, 1025];
    for (rows, cols) in [(1, 1), (3, 130), (16, 128), (37, 1300), (130, 300), (257, 513), (600, 600)] {
        for shape in [Shape::Gaussian, Shape::StudentT, Shape::Scaled, Shape::Constant] {
            let w = matrix(shape, Dtype::Bf16, rows, cols, &Options::default());
            let layer = CompressedLinear::on(w.weight.clone(), None, &device, GpuLayout::Fixed).unwrap();
            for m in rows_of_x {
                let x = activations(m, cols, m as u64);
                check(&device, &layer, &w, &x, m, DType::BF16, &format!("{rows}x{cols} {shape:?} m={m}"));
            }
        }
    }
}

#[test]
fn many_rows_of_larger_matrices_are_multiplied_right() {
    let Some(device) = gpu() else { return };
    // Blocks in pieces of equal number; in any pieces; whole ones in rounds; one row of blocks.
    let cases = [
        (2100, 1500, 530),
        (8600, 2000, 250),
        (9000, 300, 600),
        (130, 9000, 100),
        (16, 60_000, 1000),
        (3000, 4104, 40),
        (3000, 4104, 20),
    ];
    for (rows, cols, m) in cases {
        let w = matrix(Shape::Scaled, Dtype::Bf16, rows, cols, &Options::default());
        let layer = CompressedLinear::on(w.weight.clone(), None, &device, GpuLayout::Fixed).unwrap();
        check(&device, &layer, &w, &activations(m, cols, 4), m, DType::BF16, &format!("{rows}x{cols} m={m}"));
    }
}

#[test]
fn infinities_and_nans_stay_where_they_are_among_many_rows() {
    let Some(device) = gpu() else { return };
    let (rows, cols) = (200, 1100);
    for shape in [Shape::Specials, Shape::Gaussian] {
        let w = matrix(shape, Dtype::Bf16, rows, cols, &Options::default());
        let layer = match CompressedLinear::on(w.weight.clone(), None, &device, GpuLayout::Fixed) {
            Ok(layer) => layer,
            // Every bit pattern alike does not suit windows of exponents.
            Err(error) => {
                assert!(error.to_string().contains("too many") && shape == Shape::Specials, "{error}");
                continue;
            }
        };
        for m in [20, 40, 70, 257] {
            let mut x = activations(m, cols, 8);
            check(&device, &layer, &w, &x, m, DType::BF16, &format!("{shape:?} m={m}"));
            for (i, special) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
                x[(i * 7919 + 13) % (m * cols)] = special;
            }
            check(&device, &layer, &w, &x, m, DType::BF16, &format!("{shape:?} m={m}, special x"));
        }
    }
}

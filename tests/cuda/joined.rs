//! Several products with one activation, in one launch: the bits of each by itself.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_taper::matrix::GpuLayout;
use candle_taper::nn::{CompressedLinear, KQuantLinear, LinearLayer};
use candle_taper::{Codec, Dtype, Options};

use crate::common::Shape;
use crate::products::{activations, matrix};
use crate::{gpu, values};

/// Rows of matrices that are multiplied together: a Llama's, those that leave blocks idle, odd ones, and large ones.
const ROWS: [[usize; 3]; 4] = [[512, 128, 128], [16, 2000, 48], [7, 130, 1], [4096, 4096, 1024]];

fn same_bits<L: LinearLayer>(device: &Device, layers: &[L; 3], cols: usize, what: &str) {
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for m in [1, 2, 5, 8, 9] {
            let x = Tensor::from_vec(activations(m, cols, 3), (m, cols), &Device::Cpu).unwrap();
            let x = x.to_dtype(dtype).unwrap().to_device(device).unwrap();
            let [a, b, c] = layers.each_ref();
            let alone = [a, b, c].map(|layer| values(&layer.forward(&x).unwrap()));
            for _ in 0..2 {
                let three = L::forward_each([a, b, c], &x).unwrap().map(|y| values(&y));
                assert!(three == alone, "{what} {dtype:?} m={m}: three");
                let two = L::forward_each([b, a], &x).unwrap().map(|y| values(&y));
                assert!(two[0] == alone[1] && two[1] == alone[0], "{what} {dtype:?} m={m}: two");
            }
        }
    }
}

#[test]
fn joined_products_are_those_of_each_matrix() {
    let Some(device) = gpu() else { return };
    for (rows, cols) in ROWS.into_iter().zip([2048, 700, 300, 4096]) {
        for (codec, layout) in [
            (Codec::Lossless, GpuLayout::Fixed),
            (Codec::Lossless, GpuLayout::Window),
            (Codec::Lossless, GpuLayout::Pair),
            (Codec::Int8, GpuLayout::Auto),
            (Codec::Rate { bits: 3.5 }, GpuLayout::Auto),
        ] {
            let layer = |rows| {
                let options = Options { codec, ..Options::default() };
                let w = matrix(Shape::Scaled, Dtype::Bf16, rows, cols, &options);
                CompressedLinear::on(w.weight.clone(), None, &device, layout).unwrap()
            };
            same_bits(&device, &rows.map(layer), cols, &format!("{layout:?} {codec:?} {rows:?}x{cols}"));
        }
    }
}

#[test]
fn joined_products_of_blocks_are_those_of_each_matrix() {
    let Some(device) = gpu() else { return };
    for (rows, cols) in ROWS.into_iter().zip([2048, 768, 256, 4096]) {
        for ty in [GgmlDType::Q4K, GgmlDType::Q6K, GgmlDType::Q8_0, GgmlDType::Q5_1] {
            let layer = |rows| {
                let w = Tensor::randn(0f32, 0.1, (rows, cols), &Device::Cpu).unwrap();
                let w = QTensor::quantize_onto(&w, ty, &device).unwrap();
                KQuantLinear::from_qtensor(&w, None).unwrap()
            };
            same_bits(&device, &rows.map(layer), cols, &format!("{ty:?} {rows:?}x{cols}"));
        }
    }
}

/// Matrices of different formats or widths run one after another, or fail as each would.
#[test]
fn matrices_that_differ_run_by_themselves() {
    let Some(device) = gpu() else { return };
    let of = |ty, rows, cols| {
        let w = Tensor::randn(0f32, 0.1, (rows, cols), &Device::Cpu).unwrap();
        KQuantLinear::from_qtensor(&QTensor::quantize_onto(&w, ty, &device).unwrap(), None).unwrap()
    };
    same_bits(
        &device,
        &[of(GgmlDType::Q4K, 64, 512), of(GgmlDType::Q4K, 32, 512), of(GgmlDType::Q6K, 32, 512)],
        512,
        "",
    );
    let (wide, narrow) = (of(GgmlDType::Q4K, 64, 512), of(GgmlDType::Q4K, 64, 256));
    let x = Tensor::zeros((1, 512), DType::BF16, &device).unwrap();
    let error = KQuantLinear::forward_each([&wide, &narrow], &x).unwrap_err().to_string();
    assert!(error.contains("[64, 256]"), "{error}");
}

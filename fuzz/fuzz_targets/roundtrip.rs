//! Any weights of any dtype and shape: compressed, they decode to themselves, or if quantised to the same weights with
//! every backend.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use candle_taper::format::Checks;
use candle_taper::{Codec, Dtype, Options, ScaleLayout, Stage, compress};
use candle_taper_fuzz::decode_everywhere;
use libfuzzer_sys::fuzz_target;

#[derive(Debug)]
struct Matrix {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    options: Options,
    data: Vec<u8>,
}

impl<'a> Arbitrary<'a> for Matrix {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Matrix> {
        let dtypes = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8];
        let dtype = *u.choose(&dtypes)?;
        // Small, tall or wide: tiles and bands end everywhere.
        let (rows, cols) = *u.choose(&[(80, 80), (300, 8), (8, 520), (70, 260)])?;
        let (rows, cols) = (u.int_in_range(1..=rows)?, u.int_in_range(1..=cols)?);
        let stage = *u.choose(&[Stage::Rans, Stage::Fixed12, Stage::Fixed11])?;
        let scale = *u.choose(&[None, Some(ScaleLayout::Row), Some(ScaleLayout::Matrix), Some(ScaleLayout::Tile)])?;
        let bits = f64::from(u.int_in_range(4u8..=40)?) / 4.0;
        let codec = *u.choose(&[Codec::Lossless, Codec::Int8, Codec::Rate { bits }])?;
        let pattern = u.bytes(u.len())?;
        // A few bytes are repeated, each time a little different where the last of them says so.
        let twist = usize::from(pattern.last().copied().unwrap_or(0) % 4);
        let byte = |i: usize| match pattern.get(i % pattern.len().max(1)) {
            Some(&b) => b ^ (i / pattern.len() * twist) as u8,
            None => 0,
        };
        let data = (0..rows * cols * dtype.size()).map(byte).collect();
        Ok(Matrix { dtype, rows, cols, options: Options { codec, stage, scale, ..Options::default() }, data })
    }
}

fuzz_target!(|matrix: Matrix| {
    let Matrix { dtype, rows, cols, options, data } = matrix;
    if options.validate().is_err() {
        assert!(compress(&data, dtype, rows, cols, &options).is_err());
        return;
    }
    let stream = compress(&data, dtype, rows, cols, &options).unwrap();
    let decoded = decode_everywhere(&stream, Checks::On).unwrap();
    assert_eq!(decoded.len(), data.len());
    if options.codec == Codec::Lossless || dtype.size() == 1 {
        assert!(decoded == data);
    }
});

//! A valid stream with some bytes changed and checksums ignored: every backend must decode it alike.
//!
//! The first byte chooses the stream. Then each four bytes are one change: a place (three bytes) and a value; a final
//! rest is laid over the first tile's coded data.
#![no_main]

use std::sync::OnceLock;

use candle_taper::format::{Checks, TileStream};
use candle_taper::{Codec, Dtype, Options, ScaleLayout, Stage, compress};
use candle_taper_fuzz::decode_everywhere;
use libfuzzer_sys::fuzz_target;

/// Small streams of every kind and stage, some of two tiles, some of several bands.
fn streams() -> &'static [Vec<u8>] {
    static STREAMS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    STREAMS.get_or_init(|| {
        let dtypes = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8];
        let stages = [Stage::Rans, Stage::Fixed12, Stage::Fixed11];
        let mut streams = Vec::new();
        for (dtype, stage) in dtypes.into_iter().flat_map(|dtype| stages.map(|stage| (dtype, stage))) {
            let lossless = Options { stage, ..Options::default() };
            streams.push(make(dtype, 65, 33, &lossless));
            streams.push(make(dtype, 5, 258, &lossless));
            streams.push(make(dtype, 64, 64, &lossless));
            if matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32) {
                let int8 = Options { codec: Codec::Int8, stage, ..Options::default() };
                streams.push(make(dtype, 66, 40, &int8));
                streams.push(make(dtype, 9, 256, &Options { scale: Some(ScaleLayout::Tile), ..int8 }));
            }
        }
        for bits in [2.5, 4.0, 6.5, 9.0] {
            let rate = Options { codec: Codec::Rate { bits }, ..Options::default() };
            streams.push(make(Dtype::Bf16, 67, 50, &rate));
            streams.push(make(Dtype::F32, 67, 50, &Options { scale: Some(ScaleLayout::Row), ..rate }));
        }
        streams
    })
}

/// Compresses weights whose high parts are skewed, with a few of every kind among them.
fn make(dtype: Dtype, rows: usize, cols: usize, options: &Options) -> Vec<u8> {
    let mut state = rows as u64;
    let mut weight = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let noise = (state >> 32) as u32;
        let exponent = if noise.is_multiple_of(97) { noise >> 8 & 255 } else { 122 - noise.leading_zeros().min(9) };
        let bits = noise << 31 | exponent << 23 | noise >> 9 & 0x7f_ffff;
        match dtype {
            Dtype::F32 => bits.to_le_bytes().to_vec(),
            Dtype::Bf16 => ((bits >> 16) as u16).to_le_bytes().to_vec(),
            // Five exponent bits and a sign, or as many bits of a byte: skewed is enough.
            Dtype::F16 => ((bits >> 16 & 0x83ff | (exponent & 31) << 10) as u16).to_le_bytes().to_vec(),
            _ => vec![((bits >> 24 & 0x80) | (exponent & 15) << 3 | (noise >> 5 & 7)) as u8],
        }
    };
    let data: Vec<u8> = (0..rows * cols).flat_map(|_| weight()).collect();
    compress(&data, dtype, rows, cols, options).unwrap()
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, changes)) = data.split_first() else {
        return;
    };
    let streams = streams();
    let original = &streams[choice as usize % streams.len()];
    let mut stream = original.clone();
    let mut changes = changes.chunks_exact(4);
    for change in &mut changes {
        let place = u32::from_le_bytes([change[0], change[1], change[2], 0]) as usize % stream.len();
        stream[place] = change[3];
    }
    let preamble = TileStream::parse(original).unwrap().preamble_bytes();
    for (byte, &new) in stream[preamble + 16..].iter_mut().zip(changes.remainder()) {
        *byte = new;
    }
    // With checksums damage must be noticed.
    assert!(decode_everywhere(&stream, Checks::On).is_none() || stream == *original);
    decode_everywhere(&stream, Checks::Off);
});

//! Damage ends in an error, and the GPU stays usable.

use candle_taper::cuda::{CudaWeight, DeviceStream};
use candle_taper::format::{Checks, TileStream};
use candle_taper::matrix::{GpuLayout, Weight};
use candle_taper::{Codec, Dtype, Options, Stage, compress};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::common::patch::Patch;
use crate::common::{Shape, weights};
use crate::{cuda, gpu};

/// Bytes of tiles and records changed at random, checksums ignored: no bad access, and decoding after that still works.
#[test]
fn damaged_tiles_give_wrong_weights_and_nothing_worse() {
    let Some(device) = gpu() else { return };
    let device = cuda(&device);
    let mut rng = SmallRng::seed_from_u64(1);
    let mut noticed = 0;
    const WIDE: usize = 512; // whole tiles, which BF16 has kernels of its own for
    let cases = [
        (Dtype::Bf16, Codec::Lossless, Stage::Rans, Shape::StudentT, 270),
        (Dtype::Bf16, Codec::Lossless, Stage::Rans, Shape::StudentT, WIDE),
        (Dtype::Bf16, Codec::Lossless, Stage::Rans, Shape::Scaled, WIDE),
        (Dtype::Bf16, Codec::Lossless, Stage::Fixed11, Shape::StudentT, 270),
        (Dtype::F32, Codec::Lossless, Stage::Rans, Shape::StudentT, 270),
        (Dtype::I8, Codec::Lossless, Stage::Rans, Shape::StudentT, 270),
        (Dtype::Bf16, Codec::Int8, Stage::Rans, Shape::StudentT, 270),
        (Dtype::Bf16, Codec::Rate { bits: 3.0 }, Stage::Rans, Shape::StudentT, 270),
    ];
    for (dtype, codec, stage, shape, cols) in cases {
        let rows = 300;
        let data = weights(shape, dtype, rows, cols, 1);
        let stream = compress(&data, dtype, rows, cols, &Options { codec, stage, ..Options::default() }).unwrap();
        let preamble = Patch::new(&stream).tile(0).start;
        for round in 0..60 {
            let mut bytes = stream.clone();
            for _ in 0..rng.random_range(1..8) {
                // Tables of bands, which say where everything lies, are hit in every other round.
                let tile = Patch::new(&stream).tile(rng.random_range(0..4));
                let at = if round % 2 == 0 {
                    tile.start + rng.random_range(0..32)
                } else {
                    rng.random_range(preamble..stream.len())
                };
                bytes[at] = rng.random();
            }
            let parsed = TileStream::parse_with(&bytes, Checks::Off).unwrap();
            let on_device = DeviceStream::new(device, &parsed).unwrap();
            let mut out = device.alloc_zeros::<u8>(rows * cols * 4).unwrap();
            on_device.decode_rows(0..rows, Dtype::F32, &mut out.slice_mut(..)).unwrap();
            on_device.decode_rows(0..rows, Dtype::Bf16, &mut out.slice_mut(..)).unwrap();
            on_device.decode_rows(70..71, Dtype::Bf16, &mut out.slice_mut(..)).unwrap();
            let ids = device.clone_htod(&[0u32, 299, 150]).unwrap();
            on_device.decode_ids(&ids.slice(..), Dtype::F32, &mut out.slice_mut(..)).unwrap();
            noticed += usize::from(on_device.check().is_err());
        }
    }
    println!("{noticed} of 480 damaged streams were noticed without checksums");
    assert!(noticed > 100);
}

#[test]
fn a_rans_stream_that_ends_wrongly_is_an_error_that_names_the_tile() {
    let Some(device) = gpu() else { return };
    let data = weights(Shape::Gaussian, Dtype::Bf16, 300, 300, 1);
    let stream = compress(&data, Dtype::Bf16, 300, 300, &Options::default()).unwrap();
    // A state of tile 2 changed, and its checksum made right.
    let patch = Patch::new(&stream);
    let at = patch.tile(2).start + 32 + 5;
    let byte = patch.bytes[at] ^ 0x40;
    let sealed = patch.put(at, [byte]).seal_tile(2).seal();
    let weight = Weight::new(sealed).unwrap();
    let error = CudaWeight::new(&weight, cuda(&device), GpuLayout::Rans).unwrap_err().to_string();
    assert!(error.contains("tile 2") && error.contains("rANS"), "{error}");
    // Without the checksum made right it is noticed before anything is uploaded.
    let mut bytes = stream.clone();
    bytes[at] ^= 0x40;
    let error = CudaWeight::new(&Weight::new(bytes).unwrap(), cuda(&device), GpuLayout::Rans).unwrap_err().to_string();
    assert!(error.contains("tile 2") && error.contains("checksum"), "{error}");
    // The GPU goes on.
    CudaWeight::new(&Weight::new(stream).unwrap(), cuda(&device), GpuLayout::Rans).unwrap();
}

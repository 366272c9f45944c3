//! Damaged streams: with checksums every flipped bit and every missing byte is an error; without them nothing panics
//! and nothing is read or written out of bounds, whatever the bytes are.

mod common;

use candle_taper::{Codec, Dtype, Options, Stage, compress};
use common::golden::{Golden, Random, all};
use common::patch::{decode, decode_unchecked};
use rayon::prelude::*;

fn flipped(stream: &[u8], bit: usize) -> Vec<u8> {
    let mut damaged = stream.to_vec();
    damaged[bit / 8] ^= 1 << (bit % 8);
    damaged
}

#[test]
fn every_truncation_is_noticed() {
    for Golden { name, stream, .. } in all() {
        for length in 0..stream.len() {
            assert!(decode(&stream[..length]).is_err(), "{name} cut to {length} bytes");
        }
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    for Golden { name, stream, .. } in all() {
        (0..8 * stream.len()).into_par_iter().for_each(|bit| {
            assert!(decode(&flipped(stream, bit)).is_err(), "{name}: bit {bit} flipped");
        });
    }
}

#[test]
fn every_flipped_bit_is_harmless_without_checksums() {
    for golden in all() {
        let bits = 0..8 * golden.stream.len();
        bits.into_par_iter().for_each(|bit| decode_unchecked(&flipped(golden.stream, bit)));
    }
}

/// Heavier damage than a single bit, header included or not.
#[test]
fn random_damage_is_harmless_without_checksums() {
    for golden in all() {
        (0..20_000u64).into_par_iter().for_each(|seed| {
            let mut random = Random(seed);
            let mut damaged = golden.stream.to_vec();
            let first = [0, 64, 576, 640][random.below(4)];
            for _ in 0..1 + random.below(8) {
                let start = first + random.below(damaged.len() - first);
                let end = damaged.len().min(start + 1 + random.below(64));
                let byte = random.next() as u8;
                damaged[start..end]
                    .iter_mut()
                    .for_each(|b| *b = if seed % 2 == 0 { byte } else { random.next() as u8 });
            }
            assert!(damaged == golden.stream || decode(&damaged).is_err());
            decode_unchecked(&damaged);
        });
    }
}

#[test]
fn damage_in_plain_stages_and_other_kinds_is_harmless() {
    let lossless = |stage| Options { stage, ..Options::default() };
    let int8 = |stage| Options { codec: Codec::Int8, stage, ..Options::default() };
    let dtypes = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8];
    let stages = [Stage::Rans, Stage::Fixed12, Stage::Fixed11];
    let all = stages.into_iter().flat_map(|s| dtypes.map(|dtype| (dtype, lossless(s))));
    let all: Vec<_> = all.chain(stages.map(|s| (Dtype::F16, int8(s)))).collect();
    all.into_par_iter().for_each(|(dtype, options)| {
        let data = common::weights(common::Shape::StudentT, dtype, 65, 70, 4);
        let stream = compress(&data, dtype, 65, 70, &options).unwrap();
        for bit in (0..8 * stream.len()).step_by(19) {
            assert!(decode(&flipped(&stream, bit)).is_err());
            decode_unchecked(&flipped(&stream, bit));
        }
    });
}

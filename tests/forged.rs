//! Streams that lie, with all checksums made right: each lie must be refused with a message that names it.

mod common;

use candle_taper::{CompressedMatrix, Dtype, Options, Stage, compress};
use common::golden::{Random, all};
use common::patch::{Patch, at, decode, record, refused};

/// Three tiles of 3×256, 3×256 and 3×88 BF16 weights.
fn three_tiles() -> Patch {
    let data = common::weights(common::Shape::Gaussian, Dtype::Bf16, 3, 600, 1);
    let options = Options { stage: Stage::Fixed12, ..Options::default() };
    Patch::new(&compress(&data, Dtype::Bf16, 3, 600, &options).unwrap())
}

fn golden(name: &str) -> Patch {
    Patch::new(all().iter().find(|golden| golden.name == name).unwrap().stream)
}

#[test]
fn empty_and_foreign_input_is_refused() {
    refused(&[], "truncated: the header");
    refused(&[0; 63], "truncated: the header");
    refused(&[0; 640], "magic");
    refused(&Random(1).bytes(4096), "magic");
}

#[test]
fn absurd_shapes_are_refused() {
    let max = u32::MAX.to_le_bytes();
    let tiles = (1u32 << 24).to_le_bytes();
    let base = golden("bf16-rans");
    let huge = base.clone().put(at::ROWS, max).put(at::COLS, max).put(at::TILE_ROWS, tiles).put(at::TILE_COLS, tiles);
    refused(&huge.clone().seal(), "truncated: header, table, tile records");
    refused(&huge.put(at::TOTAL, u64::MAX.to_le_bytes()).seal(), "truncated: header, table, tile records");
    let rows = golden("int8-rows").put(at::ROWS, max).put(at::TILE_ROWS, tiles);
    refused(&rows.seal(), "truncated: header, table, tile records and scales");
    for (field, shape) in [(at::ROWS, "0x47"), (at::COLS, "67x0")] {
        refused(&base.clone().put(field, [0; 4]).seal(), &format!("shape is {shape}"));
    }
    refused(&base.clone().put(at::TILE_ROWS, [2, 0, 0, 0]).seal(), "tile rows is 2, allowed: 1");
    refused(&base.clone().put(at::TILE_COLS, [0; 4]).seal(), "tile columns is 0, allowed: 1");
    // Another shape with the same number of tiles and bands.
    refused(&base.put(at::ROWS, 80u32.to_le_bytes()).seal(), "tile size");
}

#[test]
fn wrong_totals_are_refused() {
    for golden in all() {
        let patch = Patch::new(golden.stream);
        let total = golden.stream.len() as u64;
        for wrong in [0, total - 16, total + 16, 5 << 40, u64::MAX] {
            refused(&patch.clone().put(at::TOTAL, wrong.to_le_bytes()).seal(), &format!("stream size is {wrong}"));
        }
        // The file is as long as the header says, but the tiles end before.
        let mut long = patch.put(at::TOTAL, (total + 16).to_le_bytes());
        long.bytes.extend([0; 16]);
        refused(&long.seal(), "where the last tile ends");
    }
}

#[test]
fn foreign_versions_and_fields_are_refused() {
    let base = golden("bf16-rans");
    let put = |at: usize, byte: u8| base.clone().put(at, [byte]).seal();
    refused(&put(at::VERSION, 2), "format version 2");
    refused(&put(at::VERSION, 0), "format version 0");
    refused(&put(24, 255), "tile size is 511, allowed: 256");
    refused(&put(26, 32), "band rows is 32, allowed: 64");
    refused(&put(27, 11), "probability bits is 11, allowed: 12");
    refused(&put(at::KIND, 0), "kind is 0");
    refused(&put(at::KIND, 8), "kind is 8");
    refused(&put(at::DTYPE, 7), "dtype is 7");
    refused(&put(at::CLASS_BITS, 5), "class bits is 5");
    refused(&put(at::CODING, 2), "coding is 2");
    refused(&put(at::RAW_BITS, 9), "raw bits is 9, allowed: 8");
    refused(&put(at::SCALE, 5), "scale layout is 5");
    refused(&golden("rate").put(at::SCALE, [4]).seal(), "rate with Levels scales");
    refused(&golden("rate").put(at::RAW_BITS, [8]).seal(), "raw bits is 8, allowed: 0..=7");
}

#[test]
fn kinds_that_do_not_restore_their_dtype_are_refused() {
    // Numbers of kinds and dtypes as in the format's tables.
    let (base, cause) = (golden("bf16-rans"), "a kind that restores");
    for dtype in [4, 5, 6] {
        refused(&base.clone().put(at::DTYPE, [dtype]).seal(), cause);
    }
    for scale in [1, 2, 3] {
        refused(&base.clone().put(at::SCALE, [scale]).seal(), cause);
    }
    refused(&base.clone().put(at::KIND, [2]).put(at::RAW_BITS, [11]).seal(), cause);
    refused(&golden("int8-rows").put(at::DTYPE, [6]).seal(), cause);
    refused(&golden("int8-rows").put(at::SCALE, [0]).seal(), cause);
    refused(&golden("rate").put(at::SCALE, [0]).seal(), cause);
    refused(&golden("rate").put(at::SCALE, [3]).seal(), "scale layout is per tile");
    refused(&base.clone().put(at::CLASS_BITS, [8]).seal(), "stage is bf16 8-bit Rans");
    refused(&base.clone().put(at::CLASS_BITS, [3]).seal(), "stage is bf16 3-bit Rans");
    refused(&golden("rate").put(at::CLASS_BITS, [0]).put(at::CODING, [0]).seal(), "stage is rate 0-bit Plain");
    refused(&base.put(at::CLASS_BITS, [0]).seal(), "stage is bf16 0-bit Rans");
}

#[test]
fn tables_that_do_not_sum_are_refused() {
    for golden in all() {
        let patch = Patch::new(golden.stream);
        let more = (patch.get::<2>(at::TABLE) as u16 + 1).to_le_bytes();
        refused(&patch.clone().put(at::TABLE, more).seal(), "frequency table sum");
        refused(&patch.clone().put(at::TABLE, [0; 512]).seal(), "frequency table sum is 0, allowed: 4096");
        refused(&patch.clone().put(at::TABLE, [255; 512]).seal(), "frequency table sum");
        let mut single = [0; 512];
        single[..2].copy_from_slice(&4096u16.to_le_bytes());
        refused(&patch.put(at::TABLE, single).seal(), "frequency is 4096, allowed: 0..=4095");
    }
    let data = common::weights(common::Shape::Noise, Dtype::Bf16, 8, 8, 1);
    let raw = Patch::new(&compress(&data, Dtype::Bf16, 8, 8, &Options::default()).unwrap());
    refused(&raw.put(at::TABLE, [1]).seal(), "frequency table is not empty");
}

#[test]
fn tile_records_that_lie_are_refused() {
    let base = three_tiles();
    assert!(decode(&base.clone().seal()).is_ok());
    let total = base.bytes.len() as u64;
    let [first, second] = [base.tile(0), base.tile(1)];
    let (start, size) = (Patch::record(1), second.len() as u64);
    for offset in [total, u64::MAX, u64::MAX - 15, 0, first.start as u64, second.start as u64 - 16] {
        let moved = base.clone().put(start + record::OFFSET, offset.to_le_bytes());
        refused(&moved.seal(), &format!("tile offset is {offset}"));
    }
    let resized = |size: u64| base.clone().put(start + record::SIZE, (size as u32).to_le_bytes()).seal();
    for wrong in [0, size - 1, size - 512, size + 4096, u64::from(u32::MAX)] {
        refused(&resized(wrong), &format!("tile size is {wrong}"));
    }
    // Tile 1 ends later, so tile 2 seems to start before it ends: an overlap; or earlier: a hole.
    refused(&resized(size + 16), "tile offset");
    refused(&resized(size - 16), "tile");
    let put = |at: usize, byte: u8| base.clone().put(start + at, [byte]).seal();
    refused(&put(record::BANDS, 2), "bands is 2, allowed: 1");
    refused(&put(record::FLAGS, 1), "tile flags is 1, allowed: 0");
    refused(&put(record::ESCAPES, base.bytes[start + record::ESCAPES] ^ 1), "escapes of the tile");
    refused(&put(28, 1), "tile record padding is 1, allowed: 0");
    refused(&put(record::PREDICTOR, 1), "predictor is left, allowed: none");
    refused(&put(record::PREDICTOR, 5), "predictor is 5, allowed: 0..=4");
    refused(&put(record::HASH, base.bytes[start + record::HASH] ^ 1), "checksum mismatch in the tile");
}

#[test]
fn reordered_and_duplicated_tiles_are_refused() {
    let base = three_tiles();
    let [a, b] = [0, 1].map(|tile| Patch::record(tile)..Patch::record(tile) + 32);
    let [first, second] = [base.tile(0), base.tile(1)];
    let copied = base.clone().put(b.start, &base.bytes[a.clone()]);
    refused(&copied.seal(), "tile 1 (bytes");
    let swapped = base.clone().swap(a.clone(), b.clone());
    refused(&swapped.seal(), "tile offset");
    assert_eq!(first.len(), second.len(), "take another seed");
    let bytes = base.clone().swap(first, second);
    refused(&bytes.clone().seal(), "checksum mismatch in the tile");
    // Sizes, checksums and escapes move with the bytes, offsets stay: only the seed of the checksum tells.
    let fields = |r: std::ops::Range<usize>| r.start + record::HASH..r.end;
    refused(&bytes.swap(fields(a), fields(b)).seal(), "checksum mismatch in the tile");
}

#[test]
fn band_tables_that_lie_are_refused() {
    for golden in all() {
        let base = Patch::new(golden.stream);
        let start = base.tile(0).start;
        let (coded, escapes) = (base.get::<4>(start) as u32, base.get::<4>(start + 4) as u32);
        let table = |at: usize, value: u32| base.clone().put(start + at, value.to_le_bytes()).seal_tile(0).seal();
        for wrong in [0, 126, u32::MAX, u32::MAX - 1] {
            refused(&table(0, wrong), "coded bytes of a band");
        }
        refused(&table(0, coded + 1), "coded bytes of a band");
        refused(&table(0, coded + 32), "the sum of its bands");
        refused(&table(4, u32::MAX), "escapes of a band");
        if golden.name == "int8-rows" {
            refused(&table(4, 1), "escapes of a band is 1, allowed: 0..=0");
            refused(&table(8, 1), "band table padding");
        } else {
            refused(&table(4, escapes ^ 1), "escapes of the tile");
        }
    }
}

/// Right checksums over wrong words: the decoder itself must notice.
#[test]
fn forged_rans_words_and_escapes_are_noticed() {
    for golden in all() {
        let base = Patch::new(golden.stream);
        let start = base.tile(0).start + 16;
        let states = base.clone().put(start, [0; 128]).seal_tile(0).seal();
        refused(&states, "rANS states or word count");
        let word = base.bytes[start + 200] ^ 0x10;
        refused(&base.clone().put(start + 200, [word]).seal_tile(0).seal(), "corrupt stream");
        // One word less than the lanes ask for, where that leaves as many blocks of 16 bytes.
        let coded = base.get::<4>(start - 16) as u32;
        if coded % 16 != 2 {
            let short = base.put(start - 16, (coded - 2).to_le_bytes()).seal_tile(0).seal();
            refused(&short, "rANS states or word count");
        }
    }
}

#[test]
fn trailing_bytes_are_refused() {
    for golden in all() {
        for extra in [1, 16, 4096] {
            refused(&[golden.stream, &vec![0; extra]].concat(), "stream size");
        }
    }
}

/// Not the stream but the caller lies here.
#[test]
fn tiles_and_buffers_that_do_not_fit_are_errors() {
    for golden in all() {
        let matrix = CompressedMatrix::open(golden.stream).unwrap();
        let (tiles, bytes) = (matrix.geometry().tiles(), matrix.decode_tile(0).unwrap().1.len());
        for tile in [tiles, tiles + 1, usize::MAX / 32, usize::MAX] {
            assert!(matrix.stream().record(tile).is_err() && matrix.stream().tile(tile).is_err());
            assert!(matrix.decode_tile(tile).is_err());
            assert!(matrix.decode_tile_into(tile, &mut vec![0; bytes]).is_err());
        }
        for wrong in [0, 1, bytes - 1, bytes + 1, 2 * bytes] {
            assert!(matrix.decode_tile_into(0, &mut vec![0; wrong]).is_err(), "{wrong} bytes instead of {bytes}");
        }
        for rows in [golden.rows..golden.rows + 1, 0..usize::MAX, usize::MAX..usize::MAX] {
            assert!(matrix.decode_rows(rows).is_err());
        }
    }
}

//! What a stream announces is no reason to allocate: parsing needs memory in proportion to what is there.

mod common;

use candle_taper::CompressedMatrix;
use candle_taper::format::{Checks, SafeTensors, TileStream};
#[cfg(feature = "candle")]
use common::counting::used;
use common::counting::{Counting, peak_of};
use common::golden::all;
use common::patch::{Patch, at, record};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Streams whose fields ask for far more than is there.
fn greedy() -> Vec<Vec<u8>> {
    let [max, tiles] = [u32::MAX, 1 << 24].map(u32::to_le_bytes);
    let mut streams = vec![Vec::new()];
    for golden in all() {
        let base = Patch::new(golden.stream);
        let rows = base.clone().put(at::ROWS, max).put(at::TILE_ROWS, tiles);
        let columns = base.clone().put(at::COLS, max).put(at::TILE_COLS, tiles);
        streams.push(golden.stream.to_vec());
        streams.push(rows.clone().put(at::COLS, max).put(at::TILE_COLS, tiles).seal());
        streams.push(rows.clone().put(at::TOTAL, u64::MAX.to_le_bytes()).seal());
        streams.extend([rows.seal(), columns.seal()]);
        streams.push(base.clone().put(at::TOTAL, (1u64 << 43).to_le_bytes()).seal());
        for (field, value) in [(record::OFFSET, 8), (record::SIZE, 4), (record::ESCAPES, 4)] {
            streams.push(base.clone().put(Patch::record(0) + field, &[255; 8][..value]).seal());
        }
        let start = base.tile(0).start;
        streams.push(base.put(start, [255; 8]).seal_tile(0).seal());
        streams.extend((0..8 * 640).map(|bit| {
            let mut flipped = golden.stream.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            flipped
        }));
    }
    streams
}

/// Safetensors headers that try to cost more than they are long.
fn greedy_headers() -> Vec<String> {
    let many =
        |n: usize, part: &dyn Fn(usize) -> String| format!("{{{}}}", (0..n).map(part).collect::<Vec<_>>().join(","));
    let empty = |i: usize| format!("\"{i:x}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}");
    let escaped = |i: usize| format!("\"\\u0041{i:x}\":{{\"dtype\":\"\\u0055\",\"shape\":[0],\"data_offsets\":[0,0]}}");
    let ranks = |i: usize| format!("\"{i:x}\":{{\"dtype\":\"U8\",\"shape\":[0,0,0,0,0,0,0,0],\"data_offsets\":[0,0]}}");
    let pairs = |i: usize| format!("\"{i:x}\":\"\"");
    vec![
        many(60_000, &empty),
        many(60_000, &escaped),
        many(60_000, &ranks),
        format!("{{\"__metadata__\":{}}}", many(400_000, &pairs)),
        format!("{{\"__metadata__\":{{\"a\":\"{}\"}}}}", "\"data_offsets\"".replace('"', "\\\"").repeat(200_000)),
        format!("{{\"a\":{{\"dtype\":\"U8\",\"shape\":[{}0],\"data_offsets\":[0,0]}}}}", "0,".repeat(1_000_000)),
        format!("{{\"a\":{}1{}}}", "[".repeat(500_000), "]".repeat(500_000)),
        format!("{{\"a\":{{\"b\":{}", "{\"c\":".repeat(300_000)),
    ]
}

/// One test only: others running beside it would be counted too.
#[test]
fn nothing_allocates_more_than_it_must() {
    parsing_allocates_in_proportion_to_the_header();
    #[cfg(feature = "candle")]
    a_var_builder_needs_the_tensor_and_a_strip();
}

/// A tensor asked for by a model costs its own size and a few strips, in whatever dtype; just-in-time weights leave none.
#[cfg(feature = "candle")]
fn a_var_builder_needs_the_tensor_and_a_strip() {
    use candle_core::{DType, Device};
    use candle_taper::models::{JustInTime, var_builder};
    use candle_transformers::models::with_tracing::linear_no_bias;

    // 32 MiB in BF16.
    let (rows, cols) = (4096, 4096);
    let dir = tempfile::tempdir().unwrap();
    let (plain, packed) = (dir.path().join("plain.safetensors"), dir.path().join("packed.safetensors"));
    let tensor =
        common::model::tensor("w.weight", common::Shape::Gaussian, candle_taper::Dtype::Bf16, &[rows, cols], 1);
    common::model::write_shard(&plain, &[tensor]);
    candle_taper::convert::compress(&plain, &packed, &Default::default(), &()).unwrap();
    for path in [&plain, &packed] {
        for dtype in [DType::BF16, DType::F32] {
            let vb = var_builder(path, dtype, &Device::Cpu).unwrap();
            let size = rows * cols * dtype.size_in_bytes();
            let peak = peak_of(|| assert_eq!(vb.get((rows, cols), "w.weight").unwrap().dims(), [rows, cols]));
            assert!(peak < size + (24 << 20), "{peak} bytes for a tensor of {size}");
        }
    }
    let weights = JustInTime::open(&packed, DType::F32).unwrap();
    let before = used();
    let layer = weights.load(|vb| linear_no_bias(cols, rows, vb.pp("w"))).unwrap();
    let kept = used().saturating_sub(before);
    assert!(kept < 1 << 20, "{kept} bytes stay");
    drop(layer);
}

fn parsing_allocates_in_proportion_to_the_header() {
    for header in greedy_headers() {
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        let peak = peak_of(|| drop(SafeTensors::parse(&file)));
        assert!(peak <= 4 * header.len() + (1 << 20), "{peak} bytes for {}: {:.90}", header.len(), header);
    }
    let length = peak_of(|| assert!(SafeTensors::parse(&99_000_000u64.to_le_bytes()).is_err()));
    assert!(length < 1 << 20, "{length}");

    let streams = greedy();
    // The choice of a backend is made once and kept.
    drop(CompressedMatrix::open(all()[0].stream));
    for stream in &streams {
        for checks in [Checks::On, Checks::Off] {
            let peak = peak_of(|| {
                if let Ok(parsed) = TileStream::parse_with(stream, checks) {
                    let tiles = parsed.geometry().tiles();
                    let matrix = CompressedMatrix::from_stream(parsed);
                    let whole = matrix.map(|m| (0..tiles).all(|tile| m.stream().tile(tile).is_ok()));
                    assert!(whole.is_ok(), "the backend was chosen before");
                }
            });
            let preamble = stream.len().min(Patch::record(1));
            assert!(peak <= 4 * preamble + (1 << 20), "{peak} bytes for a stream of {}", stream.len());
        }
    }
}

//! Any bytes as a tile stream, with and without checksums: parsing must not panic, and nor may what it accepts.
#![no_main]

use candle_taper::CompressedMatrix;
use candle_taper::format::header::{HEADER_BYTES, Header, RECORD_BYTES, Record};
use candle_taper::format::{Checks, TileStream};
use candle_taper_fuzz::decode_everywhere;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some(header) = data.first_chunk::<HEADER_BYTES>().and_then(|bytes| Header::parse(bytes).ok()) {
        assert_eq!(Header::parse(&header.to_bytes()).unwrap(), header);
        header.preamble_bytes();
    }
    if let Some(record) = data.first_chunk::<RECORD_BYTES>().and_then(|bytes| Record::parse(bytes).ok()) {
        assert_eq!(Record::parse(&record.to_bytes()).unwrap(), record);
    }
    drop(CompressedMatrix::open(data));
    let Ok(stream) = TileStream::parse_with(data, Checks::Off) else {
        return;
    };
    let tiles = stream.geometry().tiles();
    // One past the last must be an error.
    for tile in 0..=tiles {
        let opened = stream.record(tile).and_then(|_| stream.tile(tile));
        assert!(tile < tiles || opened.is_err());
    }
    decode_everywhere(data, Checks::Off);
});

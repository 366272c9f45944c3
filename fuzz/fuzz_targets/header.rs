//! Any bytes as a tile stream and as a safetensors file, with and without checksums: parsing must not panic, and nor may
//! what it accepts.
#![no_main]

use candle_taper::CompressedMatrix;
use candle_taper::format::header::{HEADER_BYTES, Header, RECORD_BYTES, Record};
use candle_taper::format::{Checks, SafeTensors, Shard, TileStream};
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
    files(data);
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

/// The container: whatever it accepts must be what the safetensors format allows.
fn files(data: &[u8]) {
    if let Ok(header) = SafeTensors::parse(data) {
        let ends: Vec<u64> = header.iter().map(|entry| entry.end).collect();
        assert_eq!(header.data_start as u64 + ends.last().copied().unwrap_or(0), data.len() as u64);
        assert!(header.iter().enumerate().all(|(index, entry)| header.find(entry.name) == Some(index)));
    }
    for checks in [Checks::On, Checks::Off] {
        let Ok(shard) = Shard::parse_with(data, checks) else { continue };
        let Ok(source) = shard.source() else { continue };
        source.iter().enumerate().for_each(|(index, entry)| drop(shard.tensor(index, &entry)));
    }
}

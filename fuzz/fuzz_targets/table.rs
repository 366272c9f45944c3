//! Frequency tables from any bytes and any counts, and rANS over them.
#![no_main]

use candle_taper::codec::rans::{self, Decoder, LANES};
use candle_taper::codec::{DecodeTable, EncodeTable, FreqTable};
use libfuzzer_sys::fuzz_target;

/// What the format promises of a table.
fn check(table: &FreqTable) {
    assert_eq!(table.0.iter().map(|&f| u32::from(f)).sum::<u32>(), 4096);
    assert!(table.0.iter().all(|&f| f < 4096));
    assert_eq!(FreqTable::parse(&table.to_bytes()).unwrap(), *table);
    // Each symbol owns as many slots as its frequency says.
    let mut slots = [0u16; 256];
    DecodeTable::new(table).0.iter().for_each(|&entry| slots[entry as u8 as usize] += 1);
    assert_eq!(slots, table.0);
    assert!(table.entropy() <= 8.001);
    table.costs();
}

/// Encodes symbols and decodes them again; a symbol without a frequency must be refused.
fn round_trip(table: &FreqTable, symbols: &[u8]) {
    let symbols = &symbols[..symbols.len() / LANES * LANES];
    let known = symbols.iter().all(|&s| table.0[s as usize] > 0);
    let (mut words, mut coded) = (Vec::new(), Vec::new());
    assert_eq!(rans::encode(symbols, &EncodeTable::new(table), &mut words, &mut coded), known);
    if known {
        let mut decoder = Decoder::new(&coded);
        let mut decoded = vec![0; symbols.len()];
        decoder.decode(&DecodeTable::new(table), &mut decoded);
        assert!(decoded == symbols && decoder.finished());
    }
}

/// Any bytes as a coded stream: symbols of the table come out, nothing worse.
fn decode_noise(table: &FreqTable, coded: &[u8]) {
    let mut symbols = vec![0; 4 * LANES];
    let mut decoder = Decoder::new(coded);
    decoder.decode(&DecodeTable::new(table), &mut symbols);
    decoder.finished();
    assert!(symbols.iter().all(|&s| table.0[s as usize] > 0));
}

fuzz_target!(|data: &[u8]| {
    if let Some(table) = data.first_chunk().and_then(|bytes| FreqTable::parse(bytes).ok()) {
        check(&table);
        round_trip(&table, &data[512..]);
        decode_noise(&table, &data[512..]);
    }
    let Some((&shift, data)) = data.split_first() else {
        return;
    };
    // Counts that lead to the symbols coded afterwards, scaled up by any power of two that still adds up.
    let mut counts = [0u64; 256];
    data.iter().for_each(|&b| counts[b as usize] += 1 << (shift % 40));
    let table = FreqTable::from_counts(&counts);
    check(&table);
    assert!(counts.iter().zip(table.0).all(|(&count, f)| count == 0 || f > 0));
    round_trip(&table, data);
    decode_noise(&table, data);
    // Counts of any size.
    let mut counts = [0u64; 256];
    for (count, bytes) in counts.iter_mut().zip(data.chunks_exact(7)) {
        *count = bytes.iter().fold(0, |value, &b| value << 8 | u64::from(b));
    }
    check(&FreqTable::from_counts(&counts));
});

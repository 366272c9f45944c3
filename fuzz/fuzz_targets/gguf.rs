//! Any bytes as a GGUF file: reading must not panic, and what is accepted must all be there and dequantise.
#![no_main]

use candle_taper::codec::kquant::dequantize;
use candle_taper::gguf::{Gguf, Value};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(file) = Gguf::new(data) else { return };
    for (key, value) in file.metadata() {
        assert!(file.get(key).is_some());
        walk(value);
    }
    let mut places: Vec<_> = file.tensors().map(|tensor| tensor.range()).collect();
    places.sort_by_key(|range| range.start);
    assert!(places.windows(2).all(|pair| pair[0].end <= pair[1].start));
    for tensor in file.tensors() {
        assert_eq!(file.tensor(tensor.name).map(|found| found.range()), Some(tensor.range()));
        let mut weights = vec![0.0; tensor.rows() * tensor.cols()];
        dequantize(tensor.ty, tensor.data(), &mut weights);
    }
});

/// Visits every value.
fn walk(value: Value) -> usize {
    let text = value.to_string().len();
    value.to_array().map_or(text, |array| array.iter().map(walk).sum())
}

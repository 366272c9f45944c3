//! Ten thousand damaged GGUF files: each is read or refused, without a panic and without an allocation that its size does
//! not justify.

mod common;

use candle_taper::codec::kquant::GgmlType;
use candle_taper::gguf::{Gguf, Value};
use common::counting::{Counting, peak_of};
use common::gguf::{Builder, array_value, sample, string};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Numbers that break arithmetic.
const EDGES: [u64; 12] = [0, 1, 3, 31, 255, 65_536, 1 << 31, u32::MAX as u64, 1 << 32, 1 << 61, 1 << 63, u64::MAX];

fn mutate(file: &mut Vec<u8>, header: usize, rng: &mut SmallRng) {
    // Most of what can go wrong is in the header.
    let at = if rng.random_bool(0.9) { rng.random_range(0..header) } else { rng.random_range(0..file.len()) };
    match rng.random_range(0..6) {
        0 => file[at] ^= 1 << rng.random_range(0..8),
        1 => file[at] = rng.random(),
        2 | 3 => {
            let bytes = EDGES[rng.random_range(0..EDGES.len())].to_le_bytes();
            let size = [4, 8][rng.random_range(0..2)].min(file.len() - at);
            file[at..at + size].copy_from_slice(&bytes[..size]);
        }
        4 => {
            // A piece of the file written over another.
            let (from, size) = (rng.random_range(0..file.len()), rng.random_range(0..64));
            let piece = file[from..file.len().min(from + size)].to_vec();
            file.splice(at..file.len().min(at + size), piece);
        }
        _ => file.truncate(rng.random_range(0..file.len())),
    }
    if file.is_empty() {
        file.push(0);
    }
}

/// Everything that an accepted file offers.
fn read_all(file: &[u8]) -> Option<usize> {
    fn values(value: Value) -> usize {
        match value {
            Value::Array(array) => array.iter().map(values).sum(),
            Value::String(text) => text.len(),
            _ => 1,
        }
    }
    let gguf = Gguf::new(file).ok()?;
    let metadata: usize = gguf.metadata().map(|(key, value)| key.len() + values(value)).sum();
    gguf.metadata().for_each(|(key, value)| assert!(gguf.get(key).is_some(), "{value}"));
    let data = gguf.tensors().map(|tensor| {
        assert_eq!(tensor.data().len(), tensor.rows() * tensor.ty.row_bytes(tensor.cols()).unwrap());
        assert_eq!(gguf.tensor(tensor.name).unwrap().range(), tensor.range());
        tensor.data().iter().map(|&byte| usize::from(byte)).sum::<usize>()
    });
    Some(metadata + data.sum::<usize>())
}

/// Files that are as costly as can be for their size.
fn costly() -> Vec<Vec<u8>> {
    let many = |count: usize, keys: bool| {
        let mut builder = Builder::new();
        for i in 0..count {
            if keys {
                builder = builder.entry(&format!("{i:x}"), [&0u32.to_le_bytes()[..], &[1]].concat());
            } else {
                builder = builder.tensor(&format!("{i:x}"), 1, 1, GgmlType::F32, vec![0; 4]);
            }
        }
        builder.build()
    };
    let empty = vec![[&4u32.to_le_bytes()[..], &[0; 8]].concat(); 30_000];
    vec![
        many(20_000, true),
        many(20_000, false),
        Builder::new().entry("strings", array_value(8, &vec![string(""); 100_000])).build(),
        Builder::new().entry("arrays", array_value(9, &empty)).build(),
    ]
}

/// One test only: others running beside it would be counted too.
#[test]
fn damaged_files_neither_panic_nor_cost_memory() {
    for file in costly() {
        let peak = peak_of(|| assert!(Gguf::new(&file[..]).is_ok()));
        assert!(peak <= file.len() + (1 << 20), "{peak} bytes for a file of {}", file.len());
    }
    let original = sample().build();
    let header = Gguf::new(&original[..]).unwrap().tensors().next().unwrap().range().start as usize;
    let mut rng = SmallRng::seed_from_u64(5);
    let (mut read, mut refused) = (0, 0);
    for number in 0..10_000 {
        let mut file = original.clone();
        for _ in 0..rng.random_range(1..4) {
            let header = header.min(file.len());
            mutate(&mut file, header, &mut rng);
        }
        let mut result = None;
        let peak = peak_of(|| result = read_all(&file));
        assert!(peak <= file.len() + (1 << 20), "file {number}: {peak} bytes for {}", file.len());
        if result.is_some() { read += 1 } else { refused += 1 }
    }
    // Neither is a rare case.
    assert!(read > 500 && refused > 2000, "{read} read, {refused} refused");
}

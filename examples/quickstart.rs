//! Compress a matrix, look at it, read a row back: `cargo run --release --example quickstart`.

use candle_taper::{CompressedMatrix, Dtype, Options, compress};
use half::bf16;
use rand_distr::{Distribution, Normal};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // 1024×1024 BF16 weights, row-major, little-endian.
    let (rows, cols) = (1024, 1024);
    let normal = Normal::new(0.0, 0.02)?;
    let weights: Vec<u8> =
        (0..rows * cols).flat_map(|_| bf16::from_f32(normal.sample(&mut rand::rng())).to_le_bytes()).collect();

    let bytes = compress(&weights, Dtype::Bf16, rows, cols, &Options::default())?;
    let matrix = CompressedMatrix::open(&bytes)?;
    println!("{} -> {} bytes, {:.3} bits a weight", weights.len(), bytes.len(), matrix.bits_per_weight());

    assert_eq!(matrix.decode()?, weights);
    assert_eq!(matrix.decode_rows(500..501)?, weights[500 * 2 * cols..501 * 2 * cols]);
    println!("all {} tiles decode to the same bits", matrix.geometry().tiles());
    Ok(())
}

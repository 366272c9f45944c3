//! Small streams that are kept byte-exact for ever, and the weights that they were made from.
//!
//! The weights come from integer arithmetic only, so that every machine makes the same ones.

use candle_taper::{Codec, Dtype, Options, ScaleLayout};

/// One golden stream.
pub struct Golden {
    /// File name without directory and extension.
    pub name: &'static str,
    /// The bytes of the file.
    pub stream: &'static [u8],
    /// XXH3 of the decoded weights.
    pub decoded: u64,
    /// Dtype of the source.
    pub dtype: Dtype,
    /// Rows of the source.
    pub rows: usize,
    /// Columns of the source.
    pub cols: usize,
    /// How the source was compressed.
    pub options: Options,
    weights: fn(usize, usize) -> Vec<u8>,
}

impl Golden {
    /// The weights that were compressed.
    pub fn source(&self) -> Vec<u8> {
        (self.weights)(self.rows, self.cols)
    }

    /// Where the file lies.
    pub fn path(&self) -> String {
        format!("{}/tests/golden/{}.taper", env!("CARGO_MANIFEST_DIR"), self.name)
    }
}

/// All golden streams.
pub fn all() -> [Golden; 3] {
    let int8 = Options { codec: Codec::Int8, scale: Some(ScaleLayout::Row), ..Options::default() };
    [
        Golden {
            name: "bf16-rans",
            stream: include_bytes!("../golden/bf16-rans.taper"),
            decoded: 0x2f5c_7d89_c610_ca98,
            dtype: Dtype::Bf16,
            rows: 67,
            cols: 47,
            options: Options::default(),
            weights: bf16,
        },
        Golden {
            name: "int8-rows",
            stream: include_bytes!("../golden/int8-rows.taper"),
            decoded: 0x489c_0b64_0bca_f233,
            dtype: Dtype::F32,
            rows: 21,
            cols: 275,
            options: int8,
            weights: smooth,
        },
        Golden {
            name: "rate",
            stream: include_bytes!("../golden/rate.taper"),
            decoded: 0xf6c9_644f_2d49_ded5,
            dtype: Dtype::Bf16,
            rows: 66,
            cols: 71,
            options: Options { codec: Codec::Rate { bits: 5.0 }, ..Options::default() },
            weights: heavy_tailed,
        },
    ]
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Random bytes.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    /// A sum of four uniform numbers: −2044 to 2044, bell-shaped.
    fn bell(&mut self) -> i32 {
        (0..4).map(|_| self.below(1023) as i32 - 511).sum()
    }
}

/// BF16 bits with geometric exponents at a level that changes from row to row, some rare ones that escape, and special
/// values.
fn bf16(rows: usize, cols: usize) -> Vec<u8> {
    const SPECIALS: [u16; 8] = [0x7fc1, 0xffc0, 0x7f80, 0xff80, 0x8000, 0x0000, 0x0001, 0x7f7f];
    let mut random = Random(1);
    let mut weight = |i: usize| {
        let noise = random.next() as u16 & 0x807f;
        let level = 122 - (i / cols * 7 % 5) as u16;
        match random.below(64) {
            0 => SPECIALS[random.below(8)],
            1 => noise | (random.next() as u16 & 0x7f80),
            _ => noise | (level - random.next().trailing_zeros().min(12) as u16) << 7,
        }
    };
    (0..rows * cols).flat_map(|i| weight(i).to_le_bytes()).collect()
}

/// F32 rows that repeat the row above with a little noise; nothing but noise in the second tile.
fn smooth(rows: usize, cols: usize) -> Vec<u8> {
    let mut random = Random(2);
    let mut values: Vec<i32> = Vec::new();
    for i in 0..rows * cols {
        values.push(match i.checked_sub(cols) {
            Some(above) if i % cols < 256 => values[above] + random.bell() / 64,
            _ => random.bell(),
        });
    }
    values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect()
}

/// BF16 weights of which few are very large, one a NaN and one infinite.
fn heavy_tailed(rows: usize, cols: usize) -> Vec<u8> {
    let mut random = Random(3);
    let mut weight = |i| match i {
        1000 => f32::NAN,
        2000 => f32::NEG_INFINITY,
        _ => (random.bell() << (random.next().trailing_zeros() / 2).min(9)) as f32,
    };
    (0..rows * cols).flat_map(|i| ((weight(i).to_bits() >> 16) as u16).to_le_bytes()).collect()
}

//! What a block says, format by format. This is the truth about ggml's formats: everything else here goes through it.
//!
//! All of them are of one form. A block has `LEN` weights in groups of 16 or 32, and weight `k` in group `g` is
//!
//! ```text
//! d · scale[g] · (quant[k] − ZERO)  −  dmin · min[g]
//! ```
//!
//! with small integers `quant`, `scale` and `min`. The formats differ in the bits of a quant, in which of the factors
//! they have (what is missing is 1, or 0), and in how they pack them. Layouts are those of ggml's `ggml-common.h`.
//!
//! | format | weights | group | quant bits | zero | scales | minima | `d`, `dmin` | bits/weight |
//! |---|---|---|---|---|---|---|---|---|
//! | Q2_K | 256 | 16 | 2 | 0 | 4 bits | 4 bits | f16, f16 | 2.625 |
//! | Q3_K | 256 | 16 | 3 | 4 | 6 bits, signed | – | f16 | 3.4375 |
//! | Q4_K | 256 | 32 | 4 | 0 | 6 bits | 6 bits | f16, f16 | 4.5 |
//! | Q5_K | 256 | 32 | 5 | 0 | 6 bits | 6 bits | f16, f16 | 5.5 |
//! | Q6_K | 256 | 16 | 6 | 32 | 8 bits, signed | – | f16 | 6.5625 |
//! | Q4_0 | 32 | 32 | 4 | 8 | – | – | f16 | 4.5 |
//! | Q4_1 | 32 | 32 | 4 | 0 | – | 1 | f16, f16 | 5 |
//! | Q5_0 | 32 | 32 | 5 | 16 | – | – | f16 | 5.5 |
//! | Q5_1 | 32 | 32 | 5 | 0 | – | 1 | f16, f16 | 6 |
//! | Q8_0 | 32 | 32 | 8 | 128 | – | – | f16 | 8.5 |

use half::f16;

use super::GgmlType;

/// Most weights of a block.
pub const MAX_LEN: usize = 256;

/// A block, unpacked. Entries past the format's length and number of groups are zero.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// One for each weight.
    pub quants: [u8; MAX_LEN],
    /// One for each group.
    pub scales: [i8; 16],
    /// One for each group.
    pub mins: [u8; 16],
    /// What the scales are multiplied by.
    pub d: f16,
    /// What the minima are multiplied by.
    pub dmin: f16,
}

impl Default for Parts {
    fn default() -> Parts {
        Parts { quants: [0; MAX_LEN], scales: [0; 16], mins: [0; 16], d: f16::ZERO, dmin: f16::ZERO }
    }
}

/// A block format.
pub trait Format {
    /// Its type.
    const TYPE: GgmlType;
    /// Weights of a block.
    const LEN: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Weights that share a scale.
    const GROUP: usize;
    /// Bits of a quant.
    const BITS: u32;
    /// The quant that means zero.
    const ZERO: u8;
    /// True if it has minima.
    const MINS: bool;
    /// A format that is the same once quants are unpacked: kernels for unpacked quants are compiled once for both.
    type Unpacked: Format;

    /// Unpacks a block of `BYTES` bytes.
    fn parts(block: &[u8], parts: &mut Parts);
}

macro_rules! format {
    ($name:ident, $len:expr, $bytes:expr, group $group:expr, bits $bits:expr, zero $zero:expr, mins $mins:expr, as $unpacked:ident, $doc:expr,
     |$b:ident, $p:ident| $body:block) => {
        #[doc = $doc]
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        impl Format for $name {
            const TYPE: GgmlType = GgmlType::$name;
            const LEN: usize = $len;
            const BYTES: usize = $bytes;
            const GROUP: usize = $group;
            const BITS: u32 = $bits;
            const ZERO: u8 = $zero;
            const MINS: bool = $mins;
            type Unpacked = $unpacked;

            #[inline]
            fn parts($b: &[u8], $p: &mut Parts) {
                let $b = &$b[..$bytes];
                $body
            }
        }
    };
}

fn f16_at(b: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([b[at], b[at + 1]])
}

format!(Q2_K, 256, 84, group 16, bits 2, zero 0, mins true, as Q2_K,
"`scales[16]` (low nibble scale, high nibble minimum), `qs[64]`, `d`, `dmin`.",
|b, p| {
    for (g, &byte) in b[..16].iter().enumerate() {
        (p.scales[g], p.mins[g]) = ((byte & 15) as i8, byte >> 4);
    }
    pairs(&b[16..80], &mut p.quants);
    (p.d, p.dmin) = (f16_at(b, 80), f16_at(b, 82));
});

format!(Q3_K, 256, 110, group 16, bits 3, zero 4, mins false, as Q6_K,
"`hmask[32]` (bit 2 of the quants), `qs[64]`, `scales[12]` (low nibbles of 16, then their two high bits), `d`.",
|b, p| {
    pairs(&b[32..96], &mut p.quants);
    for (k, q) in p.quants.iter_mut().enumerate() {
        *q |= (b[k % 32] >> (k / 32) & 1) << 2;
    }
    let packed = &b[96..108];
    for g in 0..16 {
        let low = packed[g % 8] >> (4 * (g / 8)) & 15;
        let high = packed[8 + g % 4] >> (2 * (g / 4)) & 3;
        p.scales[g] = (low | high << 4) as i8 - 32;
    }
    p.d = f16_at(b, 108);
});

format!(Q4_K, 256, 144, group 32, bits 4, zero 0, mins true, as Q4_K,
"`d`, `dmin`, `scales[12]` (six bits each of 8 scales and 8 minima), `qs[128]`.",
|b, p| {
    (p.d, p.dmin) = (f16_at(b, 0), f16_at(b, 2));
    six_bits(&b[4..16], p);
    nibbles(&b[16..144], &mut p.quants);
});

format!(Q5_K, 256, 176, group 32, bits 5, zero 0, mins true, as Q4_K,
"`d`, `dmin`, `scales[12]` as in Q4_K, `qh[32]` (bit 4 of the quants), `qs[128]`.",
|b, p| {
    (p.d, p.dmin) = (f16_at(b, 0), f16_at(b, 2));
    six_bits(&b[4..16], p);
    nibbles(&b[48..176], &mut p.quants);
    for (k, q) in p.quants.iter_mut().enumerate() {
        *q |= (b[16 + k % 32] >> (k / 32) & 1) << 4;
    }
});

format!(Q6_K, 256, 210, group 16, bits 6, zero 32, mins false, as Q6_K,
"`ql[128]` (low nibbles), `qh[64]` (two high bits), `scales[16]`, `d`.",
|b, p| {
    for half in 0..2 {
        let (ql, qh) = (&b[64 * half..], &b[128 + 32 * half..]);
        for k in 0..128 {
            let low = ql[k % 64] >> (4 * (k / 64)) & 15;
            let high = qh[k % 32] >> (2 * (k / 32)) & 3;
            p.quants[128 * half + k] = low | high << 4;
        }
    }
    for (scale, &byte) in p.scales.iter_mut().zip(&b[192..208]) {
        *scale = byte as i8;
    }
    p.d = f16_at(b, 208);
});

format!(Q4_0, 32, 18, group 32, bits 4, zero 8, mins false, as Q8_0, "`d`, `qs[16]`.", |b, p| {
    p.d = f16_at(b, 0);
    p.scales[0] = 1;
    halves(&b[2..18], &mut p.quants);
});

format!(Q4_1, 32, 20, group 32, bits 4, zero 0, mins true, as Q4_1, "`d`, `m` (the negated minimum), `qs[16]`.", |b, p| {
    (p.d, p.dmin) = (f16_at(b, 0), -f16_at(b, 2));
    (p.scales[0], p.mins[0]) = (1, 1);
    halves(&b[4..20], &mut p.quants);
});

format!(Q5_0, 32, 22, group 32, bits 5, zero 16, mins false, as Q8_0, "`d`, `qh[4]` (bit 4 of the quants), `qs[16]`.", |b, p| {
    p.d = f16_at(b, 0);
    p.scales[0] = 1;
    halves(&b[6..22], &mut p.quants);
    fifth_bits(&b[2..6], &mut p.quants);
});

format!(Q5_1, 32, 24, group 32, bits 5, zero 0, mins true, as Q4_1, "`d`, `m` (the negated minimum), `qh[4]`, `qs[16]`.", |b, p| {
    (p.d, p.dmin) = (f16_at(b, 0), -f16_at(b, 2));
    (p.scales[0], p.mins[0]) = (1, 1);
    halves(&b[8..24], &mut p.quants);
    fifth_bits(&b[4..8], &mut p.quants);
});

format!(Q8_0, 32, 34, group 32, bits 8, zero 128, mins false, as Q8_0, "`d`, `qs[32]` (signed).", |b, p| {
    p.d = f16_at(b, 0);
    p.scales[0] = 1;
    for (q, &byte) in p.quants.iter_mut().zip(&b[2..34]) {
        *q = byte ^ 128;
    }
});

/// Of each 32 bytes first the low nibbles, then the high ones.
fn nibbles(packed: &[u8], quants: &mut [u8; MAX_LEN]) {
    for (bytes, quants) in packed.chunks_exact(32).zip(quants.chunks_exact_mut(64)) {
        for (k, q) in quants.iter_mut().enumerate() {
            *q = bytes[k % 32] >> (4 * (k / 32)) & 15;
        }
    }
}

/// Of each 32 bytes first the lowest two bits, then the next.
fn pairs(packed: &[u8], quants: &mut [u8; MAX_LEN]) {
    for (bytes, quants) in packed.chunks_exact(32).zip(quants.chunks_exact_mut(128)) {
        for (k, q) in quants.iter_mut().enumerate() {
            *q = bytes[k % 32] >> (2 * (k / 32)) & 3;
        }
    }
}

/// Low nibbles of 16 bytes, then the high ones.
fn halves(packed: &[u8], quants: &mut [u8; MAX_LEN]) {
    for (k, q) in quants[..32].iter_mut().enumerate() {
        *q = packed[k % 16] >> (4 * (k / 16)) & 15;
    }
}

/// Bit 4 of 32 quants.
fn fifth_bits(packed: &[u8], quants: &mut [u8; MAX_LEN]) {
    for (k, q) in quants[..32].iter_mut().enumerate() {
        *q |= (packed[k / 8] >> (k % 8) & 1) << 4;
    }
}

/// Eight scales and eight minima of six bits. The first four of each lie in the low bits of bytes 0 to 7; of the others
/// the low nibbles share bytes 8 to 11, and the two high bits lie above the first four.
fn six_bits(packed: &[u8], parts: &mut Parts) {
    for g in 0..4 {
        parts.scales[g] = (packed[g] & 63) as i8;
        parts.mins[g] = packed[4 + g] & 63;
        parts.scales[4 + g] = (packed[8 + g] & 15 | packed[g] >> 6 << 4) as i8;
        parts.mins[4 + g] = packed[8 + g] >> 4 | packed[4 + g] >> 6 << 4;
    }
}

/// The weights of a block, equal to ggml's to the last bit: the same products in the same order.
pub fn weights<F: Format>(parts: &Parts, out: &mut [f32]) {
    let (d, dmin) = (parts.d.to_f32(), parts.dmin.to_f32());
    for (g, out) in out[..F::LEN].chunks_exact_mut(F::GROUP).enumerate() {
        let quants = &parts.quants[g * F::GROUP..];
        let (scale, min) = (d * f32::from(parts.scales[g]), dmin * f32::from(parts.mins[g]));
        for (y, &q) in out.iter_mut().zip(quants) {
            let product = scale * (i32::from(q) - i32::from(F::ZERO)) as f32;
            *y = if F::MINS { product - min } else { product };
        }
    }
}

//! Frequencies of the 256 symbols of a class plane, and the tables that rANS makes of them.

use crate::{Error, Result};

/// Frequencies sum to `1 << PROB_BITS`.
pub const PROB_BITS: u32 = 12;
const TOTAL: u32 = 1 << PROB_BITS;

/// 256 frequencies that sum to 4096, none above 4095 (so that each fits in 12 bits and a state never overflows).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreqTable(pub [u16; 256]);

impl FreqTable {
    /// The best table for these counts: every counted symbol gets at least 1.
    ///
    /// Integer arithmetic only, so that every machine makes the same table. Starts from rounded shares and moves one
    /// slot at a time to where it saves most: raising `f` to `f+1` saves about `count / (f + ½)`.
    pub fn from_counts(counts: &[u64; 256]) -> FreqTable {
        // Shares are computed on 52-bit counts, so that products stay within u64.
        let max = counts.iter().copied().max().unwrap_or(0);
        let drop = (64 - max.leading_zeros()).saturating_sub(40);
        let scaled: [u64; 256] = std::array::from_fn(|s| counts[s] >> drop | u64::from(counts[s] > 0));
        let total: u64 = scaled.iter().sum();
        let mut freqs = [0u16; 256];
        if total == 0 {
            freqs[0] = (TOTAL - 1) as u16;
            freqs[1] = 1;
            return FreqTable(freqs);
        }
        for (f, &c) in freqs.iter_mut().zip(&scaled) {
            if c > 0 {
                let share = (c * 2 * u64::from(TOTAL) + total) / (2 * total);
                *f = share.clamp(1, u64::from(TOTAL - 1)) as u16;
            }
        }
        loop {
            let sum: u32 = freqs.iter().map(|&f| u32::from(f)).sum();
            match sum.cmp(&TOTAL) {
                std::cmp::Ordering::Equal => return FreqTable(freqs),
                std::cmp::Ordering::Less => raise(&mut freqs, &scaled),
                std::cmp::Ordering::Greater => lower(&mut freqs, &scaled),
            }
        }
    }

    /// Reads 512 little-endian bytes; the frequencies must sum to 4096 with none above 4095.
    pub fn parse(bytes: &[u8; 512]) -> Result<FreqTable> {
        let freqs: [u16; 256] = std::array::from_fn(|s| u16::from_le_bytes([bytes[2 * s], bytes[2 * s + 1]]));
        let sum: u32 = freqs.iter().map(|&f| u32::from(f)).sum();
        if sum != TOTAL {
            return Err(Error::field("frequency table sum", sum, TOTAL));
        }
        if let Some(f) = freqs.iter().find(|&&f| u32::from(f) >= TOTAL) {
            return Err(Error::field("frequency", f, "0..=4095"));
        }
        Ok(FreqTable(freqs))
    }

    /// The 512 bytes that [`FreqTable::parse`] reads.
    pub fn to_bytes(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        for (b, f) in bytes.chunks_exact_mut(2).zip(self.0) {
            b.copy_from_slice(&f.to_le_bytes());
        }
        bytes
    }

    /// What each symbol costs under this table, in 2^-16 bits; `None` for frequency 0.
    pub fn costs(&self) -> [Option<u64>; 256] {
        self.0.map(|f| (f > 0).then(|| log2(u64::from(TOTAL)) - log2(u64::from(f))))
    }

    /// Order-0 entropy of the table itself, in bits per symbol.
    pub fn entropy(&self) -> f64 {
        let term = |f: u16, cost: Option<u64>| f64::from(f) / f64::from(TOTAL) * cost.unwrap_or(0) as f64 / 65_536.0;
        self.0.into_iter().zip(self.costs()).map(|(f, cost)| term(f, cost)).sum()
    }
}

/// `log2(x)` in 2^-16 steps, rounded down, for `x ≥ 1`: one squaring a bit.
///
/// Integer arithmetic, so that whatever is chosen by size is chosen alike on every machine.
pub fn log2(x: u64) -> u64 {
    let whole = u64::from(63 - (x | 1).leading_zeros());
    // 1 ≤ y < 2 with 31 fraction bits.
    let mut y = if whole > 31 { x >> (whole - 31) } else { x << (31 - whole) };
    let mut log = whole;
    for _ in 0..16 {
        y = (y * y) >> 31;
        let bit = y >> 32;
        log = log << 1 | bit;
        y >>= bit;
    }
    log
}

/// Order-0 entropy of counts times their sum, in 2^-16 bits.
pub fn entropy_bits(counts: &[u64; 256]) -> u64 {
    let total: u64 = counts.iter().sum();
    total * log2(total) - counts.iter().filter(|&&c| c > 0).map(|&c| c * log2(c)).sum::<u64>()
}

/// Gives one slot to the symbol that gains most. With a single symbol at 4095 the last slot goes to any other.
fn raise(freqs: &mut [u16; 256], counts: &[u64; 256]) {
    let gain = |s: usize| (u128::from(counts[s]), 2 * u128::from(freqs[s]) + 1);
    let open = (0..256).filter(|&s| counts[s] > 0 && u32::from(freqs[s]) < TOTAL - 1);
    let best = open.reduce(|a, b| if gain(b).0 * gain(a).1 > gain(a).0 * gain(b).1 { b } else { a });
    let target = best.unwrap_or_else(|| (0..256).find(|&s| freqs[s] == 0).unwrap_or(0));
    freqs[target] += 1;
}

/// Takes one slot from the symbol that loses least. At most 256 symbols hold 1 each, so one above 1 exists.
fn lower(freqs: &mut [u16; 256], counts: &[u64; 256]) {
    let loss = |s: usize| (u128::from(counts[s]), 2 * u128::from(freqs[s]) - 1);
    let open = (0..256).filter(|&s| freqs[s] > 1);
    let best = open.reduce(|a, b| if loss(b).0 * loss(a).1 < loss(a).0 * loss(b).1 { b } else { a });
    if let Some(target) = best {
        freqs[target] -= 1;
    }
}

/// What the decoder needs to know of a slot in one word: `symbol | frequency << 8 | (slot − start) << 20`.
#[derive(Clone)]
pub struct DecodeTable(pub Box<[u32; TOTAL as usize]>);

impl DecodeTable {
    /// Builds the table of all 4096 slots.
    pub fn new(freqs: &FreqTable) -> DecodeTable {
        let mut slots = Box::new([0u32; TOTAL as usize]);
        let mut rest = &mut slots[..];
        for (symbol, &freq) in freqs.0.iter().enumerate() {
            let (own, after) = rest.split_at_mut((freq as usize).min(rest.len()));
            for (bias, slot) in own.iter_mut().enumerate() {
                *slot = symbol as u32 | u32::from(freq) << 8 | (bias as u32) << 20;
            }
            rest = after;
        }
        DecodeTable(slots)
    }
}

impl std::fmt::Debug for DecodeTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DecodeTable")
    }
}

/// One symbol's encoding step without a division (after ryg_rans: `x / f` by a rounded-up reciprocal).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct EncodeSymbol {
    /// `ceil(2^64 / f)`; for `f = 1` `2^64 − 1`, with which the quotient is one short and `bias` makes up for it.
    pub reciprocal: u64,
    /// The state must be below this, or a word goes out first.
    pub limit: u32,
    pub bias: u32,
    /// `4096 − f`.
    pub complement: u32,
}

/// The encoder's view of a [`FreqTable`].
#[derive(Clone, Debug)]
pub struct EncodeTable(pub(crate) Box<[EncodeSymbol; 256]>);

impl EncodeTable {
    /// Builds the 256 entries.
    pub fn new(freqs: &FreqTable) -> EncodeTable {
        let mut start = 0u32;
        let symbols = freqs.0.map(|f| {
            let freq = u32::from(f);
            let first = start;
            start += freq;
            let (reciprocal, bias) = match freq {
                0 => return EncodeSymbol::default(),
                1 => (u64::MAX, first + TOTAL - 1),
                _ => (u64::MAX / u64::from(freq) + 1, first),
            };
            EncodeSymbol { reciprocal, limit: freq << 20, bias, complement: TOTAL - freq }
        });
        EncodeTable(Box::new(symbols))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(counts: &[u64; 256]) -> FreqTable {
        let table = FreqTable::from_counts(counts);
        assert_eq!(table.0.iter().map(|&f| u32::from(f)).sum::<u32>(), 4096);
        for (f, c) in table.0.iter().zip(counts) {
            assert!(*c == 0 || *f > 0);
            assert!(*f < 4096);
        }
        assert_eq!(FreqTable::parse(&table.to_bytes()).unwrap(), table);
        table
    }

    #[test]
    fn tables_sum_to_4096_for_any_counts() {
        check(&[0; 256]);
        check(&[1; 256]);
        check(&[u64::MAX >> 8; 256]);
        for symbols in 1..=256 {
            let mut counts = [0; 256];
            for (s, c) in counts.iter_mut().enumerate().take(symbols) {
                *c = 1u64 << (s % 60);
            }
            check(&counts);
        }
        let mut one = [0; 256];
        one[77] = 3;
        assert_eq!(check(&one).0[77], 4095);
    }

    #[test]
    fn tables_cost_little_more_than_the_entropy() {
        let counts: [u64; 256] = std::array::from_fn(|s| (1e6 * (-(s as f64) / 12.0).exp()) as u64);
        let total: u64 = counts.iter().sum();
        let costs = check(&counts).costs();
        let cost: u64 = (0..256).map(|s| counts[s] * costs[s].unwrap_or(0)).sum();
        let (cost, entropy) = (cost as f64 / total as f64, entropy_bits(&counts) as f64 / total as f64);
        assert!(cost < entropy + 0.03 * 65_536.0, "{cost} {entropy}");
    }

    #[test]
    fn integer_logarithms_are_close() {
        for x in [1u64, 2, 3, 5, 4095, 4096, 65_537, 1 << 40, u64::MAX >> 1] {
            let exact = (x as f64).log2();
            let got = log2(x) as f64 / 65_536.0;
            assert!(got <= exact + 1e-9 && exact - got < 1e-4, "{x}: {got} {exact}");
        }
    }

    #[test]
    fn a_wrong_sum_is_refused() {
        let mut bytes = FreqTable::from_counts(&[1; 256]).to_bytes();
        bytes[0] ^= 1;
        assert!(FreqTable::parse(&bytes).is_err());
        let mut only = [0; 512];
        only[..2].copy_from_slice(&4096u16.to_le_bytes());
        assert!(FreqTable::parse(&only).is_err());
    }

    #[test]
    fn reciprocals_divide_exactly() {
        for freq in 1..4096u32 {
            let mut freqs = [0; 256];
            freqs[3] = freq as u16;
            freqs[9] = (4096 - freq) as u16;
            let symbol = EncodeTable::new(&FreqTable(freqs)).0[9];
            let f = 4096 - freq;
            let limit = u64::from(f) << 20;
            for x in
                [1 << 16, (1 << 16) + 1, limit - 1, limit / 2, limit / 3, u64::from(f) * 70_001, limit - u64::from(f)]
            {
                let x = (x.clamp(1 << 16, limit - 1)) as u32;
                assert_eq!(super::super::rans::push(x, symbol), ((x / f) << 12) + x % f + freq, "f {f} x {x}");
            }
        }
    }
}

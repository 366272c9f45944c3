//! The prefix code of layout `pair` (`kernels/pair.cuh`): which pairs of exponents have a code of their own, and how long
//! each code is, for a matrix whose pairs were counted.

use std::cmp::Reverse;

/// No code is longer, so that a table of 256 words decodes them.
const LONGEST: usize = 8;
/// Symbols at most: fewer than a table has entries.
const MOST_SYMBOLS: usize = 250;
/// Bits of a repair.
const REPAIR: u64 = 32;
/// What a repair is worth in bits when symbols are chosen: products spend time on it besides. With 48 a Gaussian's or
/// Student-t's weights have half the repairs that they have with 32, for 0.01 bits a weight.
const REPAIR_COST: u64 = 48;
/// Flags of `codes`: the exponent of the first or second weight is not what the code decodes to.
const WRONG: [u16; 2] = [1 << 12, 1 << 13];

/// A pair of exponents, `256 · first + second`.
type Pair = usize;

/// A code as the kernels take it.
pub(super) struct PairCode {
    /// For each pair: bits, first bit lowest, the length from bit 8 on, and [`WRONG`].
    pub codes: Vec<u16>,
    /// For each index the code that its low bits begin with: `first << 7 | second << 23 | length`.
    pub table: [u32; 256],
    /// A pair with the shortest code, for padding.
    pub filler: u32,
    /// Bits a weight of codes and repairs.
    pub bits: f64,
}

impl PairCode {
    /// The cheapest code for pairs that occur so often: `counts` has 65,536 entries.
    pub fn new(counts: &[u32]) -> PairCode {
        let choice = Choice::cheapest(counts);
        let pairs: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        let mut code = PairCode {
            codes: vec![0; 1 << 16],
            table: [0; 256],
            filler: 0,
            bits: (choice.codes + REPAIR * choice.repairs) as f64 / (2 * pairs.max(1)) as f64,
        };
        // Canonical codes: by length, then in the order of the symbols. The bit that is read first is the lowest.
        let mut order: Vec<usize> = (0..choice.symbols.len()).collect();
        order.sort_by_key(|&symbol| choice.lengths[symbol]);
        let mut words = vec![0u16; order.len()];
        let (mut next, mut length) = (0u32, choice.lengths[order[0]]);
        for &symbol in &order {
            next <<= choice.lengths[symbol] - length;
            length = choice.lengths[symbol];
            let bits = next.reverse_bits() >> (32 - length);
            words[symbol] = (bits | length << 8) as u16;
            let [first, second] = exponents(choice.symbols[symbol]);
            for index in (bits as usize..256).step_by(1 << length) {
                code.table[index] = first << 7 | second << 23 | length;
            }
            next += 1;
        }
        // An index that begins with no code is never met in valid bits; a decoder must get on all the same.
        code.table.iter_mut().filter(|entry| **entry == 0).for_each(|entry| *entry = LONGEST as u32);
        code.filler = choice.symbols[order[0]] as u32;
        for (pair, word) in code.codes.iter_mut().enumerate() {
            let stand_in = choice.stand_in(pair);
            *word = words[stand_in.symbol];
            (0..2).filter(|&i| stand_in.wrong[i]).for_each(|i| *word |= WRONG[i]);
        }
        for (symbol, &pair) in choice.symbols.iter().enumerate() {
            code.codes[pair] = words[symbol];
        }
        code
    }
}

fn exponents(pair: Pair) -> [u32; 2] {
    [pair as u32 >> 8, pair as u32 & 255]
}

/// What is coded for a pair that has no symbol: the symbol, and which of its exponents are not the pair's.
struct StandIn {
    symbol: usize,
    wrong: [bool; 2],
}

/// Pairs that have a symbol, and what that costs.
struct Choice {
    symbols: Vec<Pair>,
    lengths: Vec<u32>,
    /// Bits of all codes, and the number of repairs.
    codes: u64,
    repairs: u64,
    /// The symbol of the pair (0, 0).
    zeros: usize,
    /// The symbols of (e, 0) and of (0, e), where there are such.
    halves: [[Option<u16>; 256]; 2],
}

impl Choice {
    /// Tries numbers of symbols. The most frequent pairs have one; (0, 0) has, as all that decodes to zero can stand for
    /// anything that is repaired; and so have some (e, 0) and (0, e), which leave one weight of the two to be repaired.
    fn cheapest(counts: &[u32]) -> Choice {
        let mut met: Vec<Pair> = (1..1 << 16).filter(|&pair| counts[pair] > 0).collect();
        met.sort_by_key(|&pair| Reverse(counts[pair]));
        // Infinities and NaN are repaired: what stands for a weight must be finite.
        let (coded, never): (Vec<Pair>, Vec<Pair>) = met.into_iter().partition(|&pair| !exponents(pair).contains(&255));
        let mut best: Option<Choice> = None;
        for asked in (0..=208).step_by(8) {
            let whole = asked.min(coded.len());
            let (own, rest) = coded.split_at(whole);
            let rest: Vec<Pair> = rest.iter().chain(&never).copied().collect();
            let halves = halves(counts, own, &rest);
            for count in [0, 2, 4, 6, 8, 10, 12, 16] {
                if count > halves.len() || whole + 1 + count > MOST_SYMBOLS {
                    break;
                }
                let symbols = own.iter().copied().chain([0]).chain(halves[..count].iter().copied()).collect();
                let choice = Choice::new(counts, symbols, whole, &rest);
                if best.as_ref().is_none_or(|best| choice.cost() < best.cost()) {
                    best = Some(choice);
                }
            }
            if whole < asked {
                break;
            }
        }
        best.unwrap_or_else(|| Choice::new(counts, vec![0], 0, &[]))
    }

    /// The choice of `symbols`, of which number `zeros` is (0, 0), with `rest` for the pairs that have none.
    fn new(counts: &[u32], symbols: Vec<Pair>, zeros: usize, rest: &[Pair]) -> Choice {
        let mut halves = [[None; 256]; 2];
        for (symbol, &pair) in symbols.iter().enumerate() {
            match exponents(pair) {
                [first, 0] => halves[0][first as usize] = Some(symbol as u16),
                [0, second] => halves[1][second as usize] = Some(symbol as u16),
                _ => {}
            }
        }
        let mut choice = Choice { symbols, lengths: Vec::new(), codes: 0, repairs: 0, zeros, halves };
        let mut weights: Vec<u64> = choice.symbols.iter().map(|&pair| u64::from(counts[pair])).collect();
        // The counts of halves that are only stand-ins so far are in `rest`; those of their own pairs too, if they occur.
        weights[zeros + 1..].fill(0);
        for &pair in rest {
            let (count, stand_in) = (u64::from(counts[pair]), choice.stand_in(pair));
            weights[stand_in.symbol] += count;
            // An exponent of zero needs no repair: whatever is wrong decodes to it.
            let repairs = (0..2).filter(|&i| stand_in.wrong[i] && exponents(pair)[i] > 0).count();
            choice.repairs += repairs as u64 * count;
        }
        choice.lengths = limited_lengths(&weights);
        choice.codes =
            choice.lengths.iter().zip(&weights).map(|(&length, &weight)| u64::from(length) * weight).sum::<u64>();
        choice
    }

    fn cost(&self) -> u64 {
        self.codes + REPAIR_COST * self.repairs
    }

    fn stand_in(&self, pair: Pair) -> StandIn {
        let [first, second] = exponents(pair);
        let half = |side: usize, exponent: u32| self.halves[side][exponent as usize].filter(|_| exponent > 0);
        match (half(0, first), half(1, second)) {
            (Some(symbol), _) => StandIn { symbol: symbol.into(), wrong: [false, second > 0] },
            (_, Some(symbol)) => StandIn { symbol: symbol.into(), wrong: [first > 0, false] },
            _ => StandIn { symbol: self.zeros, wrong: [true, true] },
        }
    }
}

/// Pairs (e, 0) and (0, e) that have no symbol, those first that could stand for most of `rest`.
fn halves(counts: &[u32], own: &[Pair], rest: &[Pair]) -> Vec<Pair> {
    let mut weights = [[0u64; 256]; 2];
    for &pair in rest {
        let [first, second] = exponents(pair);
        weights[0][first as usize] += u64::from(counts[pair]);
        weights[1][second as usize] += u64::from(counts[pair]);
    }
    let weight = |pair: Pair| match exponents(pair) {
        [first, 0] => weights[0][first as usize],
        [_, second] => weights[1][second as usize],
    };
    let pairs = (1..255).flat_map(|exponent| [exponent << 8, exponent]);
    let mut halves: Vec<Pair> = pairs.filter(|&pair| weight(pair) > 0 && !own.contains(&pair)).collect();
    halves.sort_by_key(|&pair| Reverse(weight(pair)));
    halves
}

/// Lengths of the best prefix code that has none above [`LONGEST`], for at most 256 symbols: package-merge (Larmore and
/// Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", 1990).
fn limited_lengths(weights: &[u64]) -> Vec<u32> {
    let count = weights.len();
    if count < 2 {
        return vec![1; count];
    }
    let mut leaves: Vec<usize> = (0..count).collect();
    leaves.sort_by_key(|&symbol| weights[symbol]);
    // Items of each level, lightest first: a symbol, or a package of two items of the level before.
    let mut levels: Vec<Vec<bool>> = Vec::new();
    let mut packages: Vec<u64> = Vec::new();
    for _ in 0..LONGEST {
        let (mut items, mut is_leaf) = (Vec::new(), Vec::new());
        let (mut leaf, mut package) = (0, 0);
        while leaf < count || package < packages.len() {
            let lighter = leaf < count && packages.get(package).is_none_or(|&both| weights[leaves[leaf]] <= both);
            if lighter {
                items.push(weights[leaves[leaf]]);
                leaf += 1;
            } else {
                items.push(packages[package]);
                package += 1;
            }
            is_leaf.push(lighter);
        }
        packages = items.as_chunks::<2>().0.iter().map(|[a, b]| a + b).collect();
        levels.push(is_leaf);
    }
    // The lightest 2n − 2 items of the last level, and what they are made of: each symbol's length is how often it is there.
    let mut lengths = vec![0; count];
    let mut taken = 2 * count - 2;
    for level in levels.iter().rev() {
        let symbols = level[..taken].iter().filter(|&&leaf| leaf).count();
        leaves[..symbols].iter().for_each(|&symbol| lengths[symbol] += 1);
        taken = 2 * (taken - symbols);
    }
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    /// The code is a prefix code whose table decodes every pair to what its flags say.
    fn check(counts: &[u32]) -> PairCode {
        let code = PairCode::new(counts);
        let mut bits = 0;
        for (pair, &count) in counts.iter().enumerate() {
            let word = code.codes[pair];
            let (low, length) = (usize::from(word & 255), u32::from(word >> 8 & 15));
            assert!((1..=8).contains(&length), "{pair}: length {length}");
            assert_eq!(low >> length, 0);
            for rest in 0..256 >> length {
                let entry = code.table[low | rest << length];
                assert_eq!(entry & 127, length);
                let decoded = [entry >> 7 & 255, entry >> 23];
                for (i, exponent) in exponents(pair).into_iter().enumerate() {
                    let wrong = word & WRONG[i] != 0;
                    assert!(if wrong { decoded[i] == 0 } else { decoded[i] == exponent }, "{pair}: {decoded:?}");
                    assert!(wrong || exponent != 255);
                }
            }
            let repairs = (0..2).filter(|&i| word & WRONG[i] != 0 && exponents(pair)[i] > 0).count();
            bits += u64::from(count) * (u64::from(length) + REPAIR * repairs as u64);
        }
        assert!(code.table.iter().all(|entry| (1..=8).contains(&(entry & 127)) && entry >> 23 != 255));
        let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        assert!((code.bits - bits as f64 / (2 * total.max(1)) as f64).abs() < 1e-9, "{} for {bits}", code.bits);
        let filler = code.codes[code.filler as usize];
        assert!(filler < 1 << 12, "the filler is repaired");
        assert!((0..1 << 16).all(|pair| code.codes[pair] >> 8 & 15 >= filler >> 8 & 15));
        code
    }

    /// Counts of pairs of independent exponents.
    fn counts(exponents: &[(usize, f64)], total: f64) -> Vec<u32> {
        let mut counts = vec![0; 1 << 16];
        for (first, p) in exponents {
            for (second, q) in exponents {
                counts[256 * first + second] = (p * q * total) as u32;
            }
        }
        counts
    }

    #[test]
    fn codes_of_any_counts_decode() {
        let mut rng = SmallRng::seed_from_u64(1);
        check(&[0; 1 << 16]);
        check(&[1; 1 << 16]);
        for pair in [0, 255, 255 << 8, 65_535, 0x7b7c] {
            let mut counts = vec![0; 1 << 16];
            counts[pair] = u32::MAX;
            check(&counts);
            counts[0x7a7a] = 1;
            check(&counts);
        }
        for _ in 0..10 {
            let spread = rng.random_range(1..200);
            let counts: Vec<u32> = (0..1 << 16)
                .map(|_| if rng.random_range(0..spread) == 0 { 1 << rng.random_range(0..24) } else { 0 })
                .collect();
            check(&counts);
        }
    }

    #[test]
    fn a_gaussians_code_is_close_to_its_entropy() {
        // Exponents of a normal distribution: P(2^-k-1 <= |x| < 2^-k), widths of the density near zero.
        let share = |k: i32| {
            let (high, low) = (2f64.powi(2 - k), 2f64.powi(1 - k));
            let density = |x: f64| (-x * x / 2.0).exp() * 0.797_884_560_8;
            (0..1000).map(|i| density(low + (high - low) * (f64::from(i) + 0.5) / 1000.0)).sum::<f64>() / 1000.0
                * (high - low)
        };
        let exponents: Vec<(usize, f64)> = (0..22).map(|k| (123 - k as usize, share(k))).collect();
        let entropy: f64 = -exponents.iter().map(|(_, p)| p * p.log2()).sum::<f64>();
        let code = check(&counts(&exponents, 1e8));
        println!("entropy {entropy:.3}, code {:.3} bits a weight", code.bits);
        assert!(code.bits < entropy + 0.3 && code.bits > entropy - 1e-3);
    }

    #[test]
    fn lengths_are_those_of_the_best_code() {
        // Where the limit does not matter: Huffman's, whose cost is the sum of all merged weights.
        let mut rng = SmallRng::seed_from_u64(2);
        for count in 2..100 {
            let weights: Vec<u64> = (0..count).map(|_| rng.random_range(50..150)).collect();
            let lengths = limited_lengths(&weights);
            let cost: u64 = lengths.iter().zip(&weights).map(|(&length, &weight)| u64::from(length) * weight).sum();
            let mut queue: std::collections::BinaryHeap<_> = weights.iter().map(|&weight| Reverse(weight)).collect();
            let mut huffman = 0;
            while let (Some(Reverse(a)), Some(Reverse(b))) = (queue.pop(), queue.pop()) {
                huffman += a + b;
                queue.push(Reverse(a + b));
            }
            assert_eq!(cost, huffman, "{count} symbols");
        }
        // Where it does: never above, and complete.
        for count in [2usize, 3, 9, 100, 250, 256] {
            let weights: Vec<u64> = (0..count).map(|i| 1 << (i / 6)).collect();
            let lengths = limited_lengths(&weights);
            assert!(lengths.iter().all(|length| (1..=8).contains(length)));
            assert_eq!(lengths.iter().map(|&length| 256u32 >> length).sum::<u32>(), 256, "{count} symbols");
        }
    }
}

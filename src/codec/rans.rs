//! rANS: 32 interleaved states, 16-bit renormalisation words, 12-bit probabilities.
//!
//! # Read me first
//!
//! 1. **The encoder runs backwards.** It takes the last symbol first, so that the decoder runs forwards.
//! 2. **32 lanes share one word stream.** Symbol `i` belongs to lane `i % 32`. A step decodes one symbol in every lane,
//!    then each lane whose state fell below 2^16 takes the next word, lowest lane first. SIMD does a step at once.
//! 3. **A lane starts and ends at 2^16.** The encoder starts every state there, so the decoder must end there, with
//!    every word used: damage is noticed even without the checksum.
//!
//! A coded substream is 32 little-endian `u32` states, then the words as little-endian `u16`s. With `s` the low 12 bits
//! of state `x`, and the symbol whose slots `start..start+freq` hold `s`, a decoding step is
//!
//! ```text
//! x = freq · (x >> 12) + s − start;    if x < 2^16 { x = x << 16 | next word }
//! ```
//!
//! Sources: Duda, "Asymmetric numeral systems" (arXiv 1311.2540); Giesen, "Interleaved entropy coders" (arXiv 1402.3392)
//! and its public-domain code for the division by reciprocal.

use super::table::{DecodeTable, EncodeSymbol, EncodeTable, PROB_BITS};

/// Interleaved states of a substream.
pub const LANES: usize = 32;
/// Bytes of the states at the head of a coded substream.
pub const STATE_BYTES: usize = 4 * LANES;
/// Lower bound of a normalised state, and its value before the first and after the last symbol.
pub const LOW: u32 = 1 << 16;

const SLOT_MASK: u32 = (1 << PROB_BITS) - 1;

/// The state after coding one symbol (`x` already renormalised).
#[inline(always)]
pub(crate) fn push(x: u32, symbol: EncodeSymbol) -> u32 {
    let quotient = ((u128::from(symbol.reciprocal) * u128::from(x)) >> 64) as u32;
    x.wrapping_add(symbol.bias).wrapping_add(quotient.wrapping_mul(symbol.complement))
}

/// Appends the coded form of `symbols` (a multiple of 32 of them) to `out`. `words` is scratch.
///
/// Returns false, with `out` as it was, if a symbol has frequency 0 in the table.
#[must_use]
pub fn encode(symbols: &[u8], table: &EncodeTable, words: &mut Vec<u16>, out: &mut Vec<u8>) -> bool {
    debug_assert_eq!(symbols.len() % LANES, 0);
    // A symbol emits one word at most. Words are written from the back, as the encoder runs backwards.
    words.clear();
    words.resize(symbols.len() + 1, 0);
    let mut at = symbols.len();
    let mut states = [LOW; LANES];
    let mut known = u32::MAX;
    for step in symbols.chunks_exact(LANES).rev() {
        for (x, &s) in states.iter_mut().zip(step).rev() {
            let symbol = table.0[s as usize];
            known = known.min(symbol.limit);
            // Branch-free: the word is always written, but kept only if the state is too large.
            words[at] = *x as u16;
            let full = *x >= symbol.limit;
            at -= usize::from(full);
            *x = push(if full { *x >> 16 } else { *x }, symbol);
        }
    }
    if known == 0 {
        return false;
    }
    out.extend(states.iter().flat_map(|x| x.to_le_bytes()));
    // `words[at]` is the place of the next word, still free.
    let (words, start) = (&words[at + 1..], out.len());
    out.resize(start + 2 * words.len(), 0);
    out[start..].chunks_exact_mut(2).zip(words).for_each(|(bytes, word)| bytes.copy_from_slice(&word.to_le_bytes()));
    true
}

/// A substream being decoded: the states and the words not yet read. The portable truth; backends use it for the tail.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    /// Current states.
    pub states: [u32; LANES],
    /// Renormalisation words as bytes.
    pub words: &'a [u8],
    /// Words taken so far; may run past the end on damaged data, where zeros are read.
    pub taken: usize,
}

impl<'a> Decoder<'a> {
    /// Starts on a coded substream. A missing tail of the states reads as zero.
    pub fn new(coded: &'a [u8]) -> Decoder<'a> {
        let (head, words) = coded.split_at(STATE_BYTES.min(coded.len()));
        let mut states = [0; LANES];
        for (x, b) in states.iter_mut().zip(head.chunks_exact(4)) {
            *x = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
        Decoder { states, words, taken: 0 }
    }

    /// Decodes `out.len()` symbols, a multiple of 32. Total: damaged data gives wrong symbols, nothing worse.
    pub fn decode(&mut self, table: &DecodeTable, out: &mut [u8]) {
        for step in out.chunks_exact_mut(LANES) {
            for (x, symbol) in self.states.iter_mut().zip(step) {
                let entry = table.0[(*x & SLOT_MASK) as usize];
                *symbol = entry as u8;
                *x = ((entry >> 8) & SLOT_MASK) * (*x >> PROB_BITS) + (entry >> 20);
                if *x < LOW {
                    let word = self.words.get(2 * self.taken..2 * self.taken + 2);
                    *x = *x << 16 | word.map_or(0, |w| u32::from(u16::from_le_bytes([w[0], w[1]])));
                    self.taken += 1;
                }
            }
        }
    }

    /// True if the stream ended where a valid one must.
    pub fn finished(&self) -> bool {
        self.states == [LOW; LANES] && 2 * self.taken == self.words.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::FreqTable;
    use super::*;

    #[test]
    fn streams_decode_to_their_symbols() {
        for (steps, spread) in [(0usize, 1u32), (1, 1), (1, 256), (7, 3), (256, 40), (256, 256)] {
            let symbols: Vec<u8> =
                (0..steps * LANES).map(|i| (((i as u32).wrapping_mul(0x9e37_79b9) >> 7) % spread) as u8).collect();
            let mut counts = [0u64; 256];
            symbols.iter().for_each(|&s| counts[s as usize] += 1);
            let freqs = FreqTable::from_counts(&counts);
            let (mut words, mut out) = (Vec::new(), Vec::new());
            assert!(encode(&symbols, &EncodeTable::new(&freqs), &mut words, &mut out));
            let mut decoder = Decoder::new(&out);
            let mut back = vec![0; symbols.len()];
            decoder.decode(&DecodeTable::new(&freqs), &mut back);
            assert_eq!(back, symbols);
            assert!(decoder.finished());
        }
    }

    #[test]
    fn a_symbol_without_frequency_is_refused() {
        let mut counts = [0u64; 256];
        counts[1] = 5;
        counts[2] = 5;
        let table = EncodeTable::new(&FreqTable::from_counts(&counts));
        let mut out = vec![9];
        assert!(!encode(&[3; 32], &table, &mut Vec::new(), &mut out));
        assert_eq!(out, [9]);
    }
}

//! Levels: exponents coded relative to how large their row and column usually are.
//!
//! Rows and columns of trained matrices differ in size: the RMS of the rows of Llama's K and V projections spreads over
//! more than an octave. One table for all then wastes bits: 0.1 to 0.2 a weight. So each row and each column may have a
//! level, a byte in sixteenths of an octave, and what is classed is the exponent less `(row level + column level) / 16`,
//! rounded down. With it a matrix comes out below its order-0 entropy, at the cost of one addition a weight in decoders
//! and `rows + columns` bytes. Matrices without such structure (Gaussian ones) go without.
//!
//! Everything here is integer arithmetic, so that every machine finds the same levels.

use super::quant::Scales;

/// What every weight's exponent is lowered by: the levels of its row and column, in octaves.
#[inline(always)]
fn shift(row: u8, col: u8) -> u8 {
    row.saturating_add(col) >> 4
}

/// Writes the shifts of a band of rows of `cols` weights to `out`; leaves it empty if the matrix has no levels.
#[inline(always)]
pub fn shifts(scales: &Scales, cols: usize, out: &mut Vec<u8>) {
    out.clear();
    if let Scales::Levels { rows, cols: levels } = scales {
        out.resize(rows.len() * cols, 0);
        for (out, &row) in out.chunks_exact_mut(cols).zip(*rows) {
            out.iter_mut().zip(*levels).for_each(|(out, &col)| *out = shift(row, col));
        }
    }
}

/// Sums of exponents by row and column, from which levels are fitted.
#[derive(Clone, Debug)]
pub struct LevelSums {
    rows: Vec<u64>,
    cols: Vec<u64>,
}

impl LevelSums {
    /// Sums for a matrix of this size, all zero.
    pub fn new(rows: usize, cols: usize) -> LevelSums {
        LevelSums { rows: vec![0; rows], cols: vec![0; cols] }
    }

    /// Adds the exponents of one row, starting in column `col`.
    #[inline(always)]
    pub fn add(&mut self, row: usize, col: usize, highs: impl Iterator<Item = u8>) {
        // Of one tile: at most 256 exponents.
        let mut sum = 0u32;
        for (total, high) in self.cols[col..].iter_mut().zip(highs) {
            *total += u64::from(high);
            sum += u32::from(high);
        }
        self.rows[row] += u64::from(sum);
    }

    /// Adds another part's sums.
    pub fn merge(mut self, other: LevelSums) -> LevelSums {
        self.rows.iter_mut().zip(other.rows).for_each(|(a, b)| *a += b);
        self.cols.iter_mut().zip(other.cols).for_each(|(a, b)| *a += b);
        self
    }

    /// The levels, rows first: 64 plus how far a row's or column's mean exponent lies above the matrix's, clamped to
    /// four octaves either way; half an octave is added to rows, so that rounding down rounds to nearest.
    pub fn levels(&self) -> Vec<u8> {
        let (rows, cols) = (self.rows.len() as i64, self.cols.len() as i64);
        let total: i64 = self.rows.iter().map(|&s| s as i64).sum();
        // 16 · (mean of the line − mean of all), over a common denominator.
        let level = |sum: u64, length: i64, offset: i64| {
            let (all, own) = (total / (rows * cols / length).max(1), sum as i64);
            let above = (16 * (own - all)).div_euclid(length);
            (64 + offset + above).clamp(0, 127) as u8
        };
        let by_row = self.rows.iter().map(|&sum| level(sum, cols, 8));
        by_row.chain(self.cols.iter().map(|&sum| level(sum, rows, 0))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_follow_rows_and_columns() {
        let mut sums = LevelSums::new(3, 4);
        for row in 0..3u8 {
            sums.add(row.into(), 0, (0..4u8).map(|col| 120 + row + 2 * (col % 2)));
        }
        let levels = sums.levels();
        assert_eq!(levels, [56, 72, 88, 48, 80, 48, 80]);
        let scales = Scales::Levels { rows: &levels[..3], cols: &levels[3..] };
        let mut out = Vec::new();
        shifts(&scales, 4, &mut out);
        assert_eq!(out[..4], [6, 8, 6, 8]);
        assert_eq!(out[8..], [8, 10, 8, 10]);
    }
}

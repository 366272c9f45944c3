//! Predictors for INT8 weights: what is coded is the difference from a neighbour, wrapped to a byte.
//!
//! A band is predicted on its own (its neighbours outside count as 0), so that it decodes alone. The names and the idea
//! are PNG's filters (RFC 2083, section 6); *gradient* is its plain `left + up − up-left`.

use crate::{Error, Result};

/// How a tile's INT8 weights are predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Predictor {
    /// Not at all: the right choice for nearly every trained matrix.
    #[default]
    None = 0,
    /// The weight to the left.
    Left = 1,
    /// The weight above.
    Up = 2,
    /// The rounded-down mean of left and up.
    Average = 3,
    /// `left + up − up-left`.
    Gradient = 4,
}

impl Predictor {
    /// All modes, in the order of their numbers.
    pub const ALL: [Predictor; 5] =
        [Predictor::None, Predictor::Left, Predictor::Up, Predictor::Average, Predictor::Gradient];

    pub(crate) fn from_u8(v: u8) -> Result<Predictor> {
        Predictor::ALL.get(v as usize).copied().ok_or_else(|| Error::field("predictor", v, "0..=4"))
    }

    /// Short name for tables.
    pub fn name(self) -> &'static str {
        ["none", "left", "up", "average", "gradient"][self as usize]
    }

    #[inline(always)]
    fn predict(self, left: u8, up: u8, corner: u8) -> u8 {
        match self {
            Predictor::None => 0,
            Predictor::Left => left,
            Predictor::Up => up,
            Predictor::Average => ((i32::from(left as i8) + i32::from(up as i8)) >> 1) as u8,
            Predictor::Gradient => left.wrapping_add(up).wrapping_sub(corner),
        }
    }

    /// Writes the differences of a band of rows of `cols` weights to `out`, which has the band's length.
    pub fn forward(self, band: &[u8], cols: usize, out: &mut [u8]) {
        match self {
            Predictor::None => out.copy_from_slice(band),
            Predictor::Left => self.forward_with(band, cols, out, |p, l, u, c| p.predict(l, u, c)),
            Predictor::Up => Predictor::Up.forward_with(band, cols, out, |_, _, u, _| u),
            Predictor::Average => {
                self.forward_with(band, cols, out, |_, l, u, c| Predictor::Average.predict(l, u, c));
            }
            Predictor::Gradient => {
                self.forward_with(band, cols, out, |_, l, u, c| Predictor::Gradient.predict(l, u, c));
            }
        }
    }

    #[inline(always)]
    fn forward_with(self, band: &[u8], cols: usize, out: &mut [u8], predict: impl Fn(Self, u8, u8, u8) -> u8) {
        const ZEROS: [u8; super::TILE] = [0; super::TILE];
        let mut above = &ZEROS[..cols];
        for (row, out) in band.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
            out[0] = row[0].wrapping_sub(predict(self, 0, above[0], 0));
            let neighbours = row.iter().zip(above).zip(&above[1..]);
            for (((&left, &corner), &up), (&w, out)) in neighbours.zip(row[1..].iter().zip(&mut out[1..])) {
                *out = w.wrapping_sub(predict(self, left, up, corner));
            }
            above = row;
        }
    }

    /// Turns the differences of a band back into weights, in place.
    pub fn inverse(self, band: &mut [u8], cols: usize) {
        if self == Predictor::None {
            return;
        }
        for row in 0..band.len() / cols {
            for col in 0..cols {
                let i = row * cols + col;
                let left = if col > 0 { band[i - 1] } else { 0 };
                let up = if row > 0 { band[i - cols] } else { 0 };
                let corner = if row > 0 && col > 0 { band[i - cols - 1] } else { 0 };
                band[i] = band[i].wrapping_add(self.predict(left, up, corner));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_inverts_on_every_width() {
        for cols in [1, 2, 3, 64, 255, 256] {
            let band: Vec<u8> = (0..cols * 5).map(|i| (i as u32).wrapping_mul(0x9e37_79b9).to_le_bytes()[2]).collect();
            for mode in Predictor::ALL {
                let mut coded = vec![0; band.len()];
                mode.forward(&band, cols, &mut coded);
                mode.inverse(&mut coded, cols);
                assert_eq!(coded, band, "{mode:?} {cols}");
            }
        }
    }

    #[test]
    fn up_predicts_repeated_rows() {
        let band: Vec<u8> = (0..10u8).cycle().take(50).collect();
        let mut coded = vec![0; 50];
        Predictor::Up.forward(&band, 10, &mut coded);
        assert!(coded[10..].iter().all(|&d| d == 0));
    }
}

//! Sums over tensors.

use std::collections::HashMap;

use candle_taper::inspect::{Inspection, Parts, TensorInfo};

/// What some tensors add up to.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// How many tensors.
    pub tensors: u64,
    /// Their weights.
    pub weights: u64,
    /// Their bytes before.
    pub original: u64,
    /// Their bytes now.
    pub stored: u64,
    /// Where those went.
    pub parts: Parts,
    /// Tiles by predictor.
    pub predictors: [u64; 5],
    /// The tensors whose ideal is known: ideal bits.
    known_bits: f64,
    /// The same tensors' weights.
    known_weights: u64,
    /// The same tensors' bytes now.
    known_stored: u64,
}

impl Totals {
    /// Sums of one tensor.
    pub fn of(tensor: &TensorInfo) -> Self {
        let mut totals = Self::default();
        totals.add(tensor);
        totals
    }

    /// Sums of a whole checkpoint.
    pub fn all(inspection: &Inspection) -> Self {
        let mut totals = Self::default();
        inspection.tensors.iter().for_each(|tensor| totals.add(tensor));
        totals
    }

    /// Adds a tensor.
    pub fn add(&mut self, tensor: &TensorInfo) {
        self.tensors += 1;
        self.weights += tensor.weights;
        self.original += tensor.original_bytes;
        self.stored += tensor.stored_bytes;
        self.parts.add(&tensor.parts);
        for (sum, tiles) in self.predictors.iter_mut().zip(tensor.predictors) {
            *sum += tiles;
        }
        if let Some(ideal) = tensor.ideal_bits.filter(|bits| bits.is_finite()) {
            self.known_bits += ideal * tensor.weights as f64;
            self.known_weights += tensor.weights;
            self.known_stored += tensor.stored_bytes;
        }
    }

    /// Stored bits per weight, everything counted.
    pub fn bits(&self) -> Option<f64> {
        quotient(8.0 * self.stored as f64, self.weights as f64)
    }

    /// Bits per weight before.
    pub fn original_bits(&self) -> Option<f64> {
        quotient(8.0 * self.original as f64, self.weights as f64)
    }

    /// Ideal bits per weight of the tensors whose ideal is known.
    pub fn ideal(&self) -> Option<f64> {
        quotient(self.known_bits, self.known_weights as f64)
    }

    /// Percent that the same tensors take more than their ideal.
    pub fn overhead(&self) -> Option<f64> {
        quotient(800.0 * self.known_stored as f64, self.known_bits).map(|percent| percent - 100.0)
    }

    /// Percent of the bytes before.
    pub fn percent(&self) -> Option<f64> {
        quotient(100.0 * self.stored as f64, self.original as f64)
    }

    /// True if a predictor other than `none` was used.
    pub fn predicted(&self) -> bool {
        self.predictors[1..].iter().any(|&tiles| tiles > 0)
    }
}

/// A quotient, unless its denominator is zero.
fn quotient(numerator: f64, denominator: f64) -> Option<f64> {
    (denominator > 0.0).then(|| numerator / denominator)
}

/// Sums by a key of the tensor, in the order in which keys first appear.
pub fn by_key(inspection: &Inspection, key: impl Fn(&TensorInfo) -> String) -> Vec<(String, Totals)> {
    let mut places = HashMap::new();
    let mut groups: Vec<(String, Totals)> = Vec::new();
    for tensor in &inspection.tensors {
        let key = key(tensor);
        let place = *places.entry(key.clone()).or_insert(groups.len());
        if place == groups.len() {
            groups.push((key, Totals::default()));
        }
        groups[place].1.add(tensor);
    }
    groups
}

//! Times in turns, so that whatever slows the machine down meets all subjects alike.

use anyhow::Result;

/// The times of one subject, in seconds, one for each round.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// These times.
    pub fn new(times: Vec<f64>) -> Samples {
        Samples(times)
    }

    /// The value below which this share of the times lies, between neighbours linearly; 0 without times.
    pub fn quantile(&self, share: f64) -> f64 {
        quantile(self.0.clone(), share)
    }

    /// The time in the middle.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The distance between the quartiles as a share of the median.
    pub fn spread(&self) -> f64 {
        let median = self.median();
        if median > 0.0 { (self.quantile(0.75) - self.quantile(0.25)) / median } else { 0.0 }
    }

    /// How many times faster this is than `other`: the median of the ratios of each round.
    pub fn faster_than(&self, other: &Samples) -> f64 {
        let pairs = self.0.iter().zip(&other.0).filter(|(own, _)| **own > 0.0);
        quantile(pairs.map(|(own, other)| other / own).collect(), 0.5)
    }

    /// All times in the order in which they were taken.
    pub fn all(&self) -> &[f64] {
        &self.0
    }
}

fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return 0.0 };
    let place = share.clamp(0.0, 1.0) * last as f64;
    let (low, high) = (values[place.floor() as usize], values[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

/// Calls `time` once a round for each of `subjects`; each round begins with another one, so that none always follows the
/// same neighbour. `time` gives the seconds that its work took.
pub fn in_turns(
    subjects: usize,
    rounds: usize,
    mut time: impl FnMut(usize, usize) -> Result<f64>,
) -> Result<Vec<Samples>> {
    let mut samples = vec![Samples::default(); subjects];
    for round in 0..rounds {
        for turn in 0..subjects {
            let subject = (round + turn) % subjects;
            samples[subject].0.push(time(subject, round)?);
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_those_of_the_times() {
        let samples = Samples(vec![5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!((samples.median(), samples.quantile(0.0), samples.quantile(1.0)), (3.0, 1.0, 5.0));
        assert_eq!((samples.quantile(0.25), samples.quantile(0.1)), (2.0, 1.4));
        assert!((samples.spread() - 2.0 / 3.0).abs() < 1e-12);
        // Round by round 2, 4, 1, 3, 1.
        let other = Samples(vec![10.0, 4.0, 3.0, 6.0, 4.0]);
        assert_eq!(samples.faster_than(&other), 2.0);
        let none = Samples::default();
        assert_eq!((none.median(), none.spread(), none.faster_than(&samples)), (0.0, 0.0, 0.0));
    }

    #[test]
    fn every_subject_has_its_turn_in_every_round() {
        let mut order = Vec::new();
        let samples = in_turns(3, 2, |subject, round| {
            order.push(subject);
            Ok((10 * round + subject) as f64)
        });
        assert_eq!(order, [0, 1, 2, 1, 2, 0]);
        assert_eq!(samples.unwrap()[2].all(), [2.0, 12.0]);
    }
}

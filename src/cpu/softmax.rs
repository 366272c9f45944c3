//! What stands between a Llama's products: SiLU, softmax and RMSNorm, written so that compilers turn them into vectors.
//!
//! The first two rest on one exponential function that is the same to the last bit on every backend: a power of two from the
//! exponent's bits times a polynomial on ±ln 2 / 2 (the coefficients of Cephes' `expf`; within 2 units in the last place).
//!
//! Loops are written as such: what is handed to `fold` or `for_each` is compiled without the backend's instructions, and calls
//! a function for every `mul_add`.

/// `exp(x)`, with `x` limited to ±87 so that the result is a normal number; NaN for NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 87.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, c);
    }
    let y = p.mul_add(r * r, r) + 1.0;
    y * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1f32.to_bits()))
}

/// `out = gate / (1 + exp(−gate)) · up`, value by value.
#[inline(always)]
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// Lanes of their own let the compiler vectorise sums that it must not reorder.
const LANES: usize = 16;

/// `sum = x + y` and `norm = sum / √(mean(sum²) + epsilon) · weight`, for one row.
#[inline(always)]
pub fn add_norm(x: &[f32], y: &[f32], weight: &[f32], epsilon: f32, sum: &mut [f32], norm: &mut [f32]) {
    for ((sum, &x), &y) in sum.iter_mut().zip(x).zip(y) {
        *sum = x + y;
    }
    let (lanes, rest) = sum.as_chunks::<LANES>();
    let mut squares = [0f32; LANES];
    for lane in lanes {
        for (square, &v) in squares.iter_mut().zip(lane) {
            *square = v.mul_add(v, *square);
        }
    }
    let mut total = squares.iter().sum::<f32>();
    for &v in rest {
        total = v.mul_add(v, total);
    }
    let root = (total / sum.len() as f32 + epsilon).sqrt();
    for ((norm, &sum), &weight) in norm.iter_mut().zip(sum.iter()).zip(weight) {
        *norm = sum / root * weight;
    }
}

/// Scores, multiplied by `scale` (above 0), become weights that add up to one.
#[inline(always)]
pub fn softmax(scores: &mut [f32], scale: f32) {
    let (lanes, rest) = scores.as_chunks::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    for lane in lanes {
        for (most, &score) in most.iter_mut().zip(lane) {
            *most = most.max(score);
        }
    }
    let most = most.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b)) * scale;
    let (lanes, rest) = scores.as_chunks_mut::<LANES>();
    let mut sums = [0.0; LANES];
    for lane in lanes {
        for (sum, score) in sums.iter_mut().zip(lane) {
            *score = exp(score.mul_add(scale, -most));
            *sum += *score;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for score in rest {
        *score = exp(score.mul_add(scale, -most));
        sum += *score;
    }
    let part = 1.0 / sum;
    for score in scores {
        *score *= part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Backend, vectorize};

    #[test]
    fn exponentials_are_right_to_two_units() {
        for i in -870_000..870_000 {
            let x = i as f32 * 1e-4;
            let (y, exact) = (exp(x), f64::from(x).exp());
            assert!((f64::from(y) - exact).abs() <= 2.5e-7 * exact, "exp({x}) = {y}, not {exact}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan() && exp(f32::INFINITY).is_finite() && exp(-1e30) > 0.0);
    }

    #[test]
    fn every_backend_has_the_same_bits() {
        let gate: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 0.31).collect();
        let up: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.7).sin()).collect();
        let run = |backend: Backend| {
            let (mut wide, mut weights) = (vec![0.0; 1000], gate[..999].to_vec());
            vectorize(
                backend,
                #[inline(always)]
                || silu_mul(&gate, &up, &mut wide),
            );
            vectorize(
                backend,
                #[inline(always)]
                || softmax(&mut weights, 0.125),
            );
            (wide, weights)
        };
        let (wide, weights) = run(Backend::Scalar);
        for ((y, &g), &u) in wide.iter().zip(&gate).zip(&up) {
            let exact = f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u);
            assert!((f64::from(*y) - exact).abs() <= 1e-6 * exact.abs() + 1e-30, "silu({g}) * {u} = {y}, not {exact}");
        }
        let exact: Vec<f64> = gate[..999].iter().map(|&g| (f64::from(g) * 0.125).exp()).collect();
        let total: f64 = exact.iter().sum();
        for (y, exact) in weights.iter().zip(exact) {
            // The exponent, up to 39, is rounded to 2⁻¹⁹ before.
            assert!((f64::from(*y) - exact / total).abs() < 4e-6 * exact / total);
        }
        for backend in [Backend::Avx2, Backend::Avx512, Backend::Neon] {
            if backend.available() {
                let other = run(backend);
                assert!(wide.iter().zip(&other.0).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", backend.name());
                assert!(weights.iter().zip(&other.1).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", backend.name());
            }
        }
    }
}

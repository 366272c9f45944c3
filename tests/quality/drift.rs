//! Whether an error grows from position to position.

/// How a divergence depends on the position.
#[derive(Clone, Copy, Debug)]
pub struct Drift {
    /// The mean over all windows and positions.
    pub mean: f64,
    /// The means over each quarter of the positions.
    pub quarters: [f64; 4],
    /// How much it grows from the first position to the last: the mean over windows of the slopes of least squares.
    pub growth: f64,
    /// The standard error of the growth, from how the windows differ.
    pub error: f64,
}

impl Drift {
    /// Of divergences `[window][position]`.
    pub fn of(windows: &[Vec<f64>]) -> Drift {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let quarter = |i: usize| {
            let of_window = |window: &Vec<f64>| mean(&window[i * window.len() / 4..(i + 1) * window.len() / 4]);
            mean(&windows.iter().map(of_window).collect::<Vec<_>>())
        };
        let growths: Vec<f64> = windows.iter().map(|window| slope(window) * (window.len() - 1) as f64).collect();
        let growth = mean(&growths);
        let variance = growths.iter().map(|g| (g - growth).powi(2)).sum::<f64>() / (growths.len() - 1) as f64;
        let quarters = [0, 1, 2, 3].map(quarter);
        Drift { mean: mean(&quarters), quarters, growth, error: (variance / growths.len() as f64).sqrt() }
    }
}

/// The slope of the line of least squares through values at 0, 1, 2, …
fn slope(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let (x_mean, y_mean) = ((n - 1.0) / 2.0, values.iter().sum::<f64>() / n);
    let products = values.iter().enumerate().map(|(x, y)| (x as f64 - x_mean) * (y - y_mean));
    products.sum::<f64>() / (n * (n * n - 1.0) / 12.0)
}

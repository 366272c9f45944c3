//! What `taper inspect` prints: a table for terminals, JSON for programs, a page for browsers.

mod charts;
mod html;
mod json;
mod layers;
mod table;
#[cfg(test)]
mod tests;
mod totals;

pub use html::html;
pub use json::json;
#[cfg(feature = "candle")]
pub use table::align;
pub use table::table;

use candle_taper::inspect::{Parts, TensorInfo};

/// One purpose of stored bytes.
struct Purpose {
    /// What it is called; also its CSS class, in `page.css`.
    name: &'static str,
    /// What it is, in a few words.
    about: &'static str,
    /// Its bytes.
    bytes: fn(&Parts) -> u64,
}

/// All purposes, in the order in which they are shown.
const PURPOSES: [Purpose; 7] = [
    Purpose { name: "classes", about: "which exponent or high part a weight has", bytes: |p| p.classes },
    Purpose { name: "raw", about: "signs, mantissas, low bits, stored as they are", bytes: |p| p.raw },
    Purpose { name: "escapes", about: "values too rare for a class of their own", bytes: |p| p.escapes },
    Purpose { name: "states", about: "final rANS states", bytes: |p| p.states },
    Purpose { name: "tables", about: "headers, frequencies, tile records, scales", bytes: |p| p.tables },
    Purpose { name: "padding", about: "zeros up to multiples of 16 bytes", bytes: |p| p.padding },
    Purpose { name: "pass-through", about: "tensors stored unchanged", bytes: |p| p.plain },
];

/// Predictors, in the order of `TensorInfo::predictors`.
const PREDICTORS: [&str; 5] = ["none", "left", "up", "average", "gradient"];

/// Kind and stage, such as `bf16 rans`.
fn coding(tensor: &TensorInfo) -> String {
    if tensor.compressed() { format!("{} {}", tensor.kind, tensor.stage) } else { "pass-through".into() }
}

/// A shape, such as `4096x14336`.
fn shape(tensor: &TensorInfo) -> String {
    if tensor.shape.is_empty() {
        return "scalar".into();
    }
    tensor.shape.iter().map(u64::to_string).collect::<Vec<_>>().join("x")
}

/// The tensor's family, with all experts and the like taken together: `mlp.experts.*.up_proj`.
fn family(tensor: &TensorInfo) -> String {
    let parts = tensor.family().split('.');
    parts.map(|part| if part.parse::<u64>().is_ok() { "*" } else { part }).collect::<Vec<_>>().join(".")
}

/// Bytes with three significant digits and a binary unit, at most eight characters wide.
fn size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.5 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.*} {}", decimals(value), units[unit])
}

/// Decimals that leave three significant digits.
fn decimals(value: f64) -> usize {
    match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    }
}

/// A share of a whole, such as `66.5%`; `0%` of nothing.
fn share(part: u64, whole: u64) -> String {
    match 100.0 * part as f64 / whole.max(1) as f64 {
        0.0 => "0%".into(),
        p if p < 0.005 => "<0.01%".into(),
        p if p < 9.995 => format!("{p:.2}%"),
        p => format!("{p:.1}%"),
    }
}

/// Bits per weight, or a dash.
fn bits(value: Option<f64>) -> String {
    value.map_or("-".into(), |v| format!("{v:.2}"))
}

/// Percent more than ideal, or a dash.
fn overhead(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(v) if v.abs() < 9.995 => format!("{v:+.2}%"),
        Some(v) => format!("{v:+.0}%"),
    }
}

/// A number with a separator between thousands.
fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number and its noun: `1 tensor`, `2 tensors`.
fn plural(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(number), if number == 1 { "" } else { "s" })
}

/// Text from the checkpoint without characters that would steer a terminal or reorder a line.
pub fn printable(text: &str) -> String {
    let steers = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if steers(c) { '\u{fffd}' } else { c }).collect()
}

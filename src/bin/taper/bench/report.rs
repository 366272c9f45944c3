//! What was measured, as tables for people and as JSON for programs.

use serde_json::{Map, Value, json};

use super::machine::Machine;
use super::timing::Samples;
use crate::render;

/// Everything that one run measured.
pub struct Report {
    /// What it ran on.
    pub machine: Machine,
    /// What it took to load the models.
    pub loads: Vec<Load>,
    /// What was timed.
    pub groups: Vec<Group>,
}

/// Subjects that did the same work in turns.
pub struct Group {
    /// `4096x4096, 1 row` or `pp128`.
    pub title: String,
    /// For a model: tokens of a test. Samples are then seconds for each token.
    pub tokens: Option<usize>,
    /// How many samples' time it takes to read all weights once.
    pub samples_a_pass: usize,
    /// The subjects, ours first.
    pub rows: Vec<Row>,
    /// Where its ratios stand in a plot.
    pub plot: Option<Place>,
}

/// A place in a plot of ratios against rows of activations.
pub struct Place {
    /// The shape, which has a panel of its own.
    pub panel: String,
    /// Rows of activations.
    pub rows: usize,
}

/// One subject's times.
pub struct Row {
    /// Its coding or format.
    pub name: String,
    /// True for candle's own.
    pub stock: bool,
    /// Bytes of weights that one pass reads.
    pub bytes: u64,
    /// Weights that these bytes hold.
    pub weights: u64,
    /// Bytes that are read and written for one product, where that is compared.
    pub moved: Option<u64>,
    /// Seconds.
    pub samples: Samples,
}

impl Row {
    fn bits(&self) -> f64 {
        8.0 * self.bytes as f64 / self.weights.max(1) as f64
    }

    pub fn label(&self) -> String {
        if self.stock { format!("candle {}", self.name) } else { self.name.clone() }
    }
}

/// What loading a model took, in a process of its own.
pub struct Load {
    /// The model.
    pub name: String,
    /// True for candle's own.
    pub stock: bool,
    /// Seconds until the model was ready for its first token.
    pub seconds: f64,
    /// Bytes of memory at most after a prompt and some tokens, mapped files included; if the system tells.
    pub peak: Option<u64>,
    /// The same while it was loaded, on a GPU.
    pub loading: Option<u64>,
    /// Bytes of the weights.
    pub bytes: u64,
    /// How many there are.
    pub weights: u64,
}

impl Group {
    fn gb_per_s(&self, row: &Row) -> f64 {
        row.bytes as f64 / 1e9 / (row.samples.median() * self.samples_a_pass as f64).max(1e-12)
    }
}

impl Report {
    /// Tables with a heading.
    pub fn table(&self) -> String {
        let mut text = self.machine.to_string();
        if !self.loads.is_empty() {
            text += &format!("\n\n{}", loads(&self.loads));
        }
        for group in &self.groups {
            text += &format!("\n\n{}\n{}", group.title, table(group, self.machine.read_bandwidth()).trim_end());
        }
        text
    }

    /// The same with all samples.
    pub fn json(&self) -> anyhow::Result<String> {
        let load = |load: &Load| {
            json!({"name": load.name, "stock": load.stock, "load_s": load.seconds, "peak_bytes": load.peak,
                "load_peak_bytes": load.loading,
                "bytes": load.bytes, "weights": load.weights})
        };
        let value = json!({
            "machine": self.machine.json(),
            "loads": self.loads.iter().map(load).collect::<Vec<_>>(),
            "groups": self.groups.iter().map(|group| group_json(group, self.machine.read_bandwidth())).collect::<Vec<_>>(),
        });
        Ok(serde_json::to_string_pretty(&value)?)
    }
}

/// A group's ratios to each of candle's formats.
pub fn ratios<'a>(group: &'a Group, row: &'a Row) -> impl Iterator<Item = (&'a Row, f64)> {
    group.rows.iter().filter(|other| other.stock).map(|other| (other, row.samples.faster_than(&other.samples)))
}

/// Times in microseconds for a GPU, whose read bandwidth is `read` bytes a second, else in milliseconds.
fn table(group: &Group, read: Option<f64>) -> String {
    let micro = read.is_some();
    let speed = if group.tokens.is_some() {
        "tok/s"
    } else if micro {
        "us"
    } else {
        "ms"
    };
    let mut header: Vec<String> = ["", "bits/w", "MB", speed, "spread", "GB/s"].map(str::to_owned).to_vec();
    header.extend(read.map(|_| "of read".to_owned()));
    header.extend(group.rows.iter().any(|row| row.moved.is_some()).then(|| "moved MB".to_owned()));
    header.extend(group.rows.iter().filter(|row| row.stock).map(|row| format!("x {}", row.name)));
    let mut lines = vec![header];
    for row in &group.rows {
        let median = row.samples.median().max(1e-12);
        let speed = if group.tokens.is_some() {
            1.0 / median
        } else if micro {
            1e6 * median
        } else {
            1e3 * median
        };
        let mut line = vec![
            row.label(),
            format!("{:.2}", row.bits()),
            number(row.bytes as f64 / 1e6),
            number(speed),
            format!("{:.0}%", 100.0 * row.samples.spread()),
            number(group.gb_per_s(row)),
        ];
        line.extend(read.map(|read| format!("{:.0}%", 100.0 * group.gb_per_s(row) * 1e9 / read)));
        line.extend(row.moved.map(|moved| number(moved as f64 / 1e6)));
        line.extend(ratios(group, row).map(|(_, ratio)| number(ratio)));
        lines.push(line);
    }
    render::align(&lines, 1)
}

fn loads(loads: &[Load]) -> String {
    let mut header = ["loading, each in a new process", "bits/w", "MB", "s", "peak MB"].map(str::to_owned).to_vec();
    let gpu = loads.iter().any(|load| load.loading.is_some());
    header.extend(gpu.then(|| "while loading".to_owned()));
    let mut lines = vec![header];
    lines.extend(loads.iter().map(|load| {
        let mb = |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| number(bytes as f64 / 1e6));
        let mut line = vec![
            if load.stock { format!("candle {}", load.name) } else { load.name.clone() },
            format!("{:.2}", 8.0 * load.bytes as f64 / load.weights.max(1) as f64),
            number(load.bytes as f64 / 1e6),
            number(load.seconds),
            mb(load.peak),
        ];
        line.extend(gpu.then(|| mb(load.loading)));
        line
    }));
    render::align(&lines, 1).trim_end().to_string()
}

/// Three significant digits.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

fn group_json(group: &Group, read: Option<f64>) -> Value {
    let row = |row: &Row| {
        let ratios: Map<String, Value> =
            ratios(group, row).map(|(other, ratio)| (other.name.clone(), ratio.into())).collect();
        let mut value = json!({
            "name": row.name,
            "stock": row.stock,
            "bytes": row.bytes,
            "weights": row.weights,
            "bits_per_weight": row.bits(),
            "median_s": row.samples.median(),
            "quartiles_s": [row.samples.quantile(0.25), row.samples.quantile(0.75)],
            "gb_per_s": group.gb_per_s(row),
            "speed_relative_to": ratios,
            "samples_s": row.samples.all(),
        });
        if let Some(read) = read {
            value["share_of_read_bandwidth"] = (group.gb_per_s(row) * 1e9 / read).into();
        }
        if let Some(moved) = row.moved {
            value["moved_bytes"] = moved.into();
        }
        if group.tokens.is_some() {
            value["tokens_per_s"] = (1.0 / row.samples.median().max(1e-12)).into();
        }
        value
    };
    json!({"title": group.title, "tokens": group.tokens, "rows": group.rows.iter().map(row).collect::<Vec<_>>()})
}

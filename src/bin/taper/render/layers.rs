//! The chart of bytes by layer.

use std::collections::BTreeMap;

use candle_taper::inspect::Inspection;

use super::totals::Totals;
use super::{PURPOSES, plural, size};

/// Columns at most; more layers share columns.
const MAX_COLUMNS: usize = 200;
/// Columns that the chart has room for at least, so that few layers do not become slabs.
const MIN_COLUMNS: f64 = 12.0;
/// Labels under the columns at most.
const MAX_LABELS: usize = 16;
/// Height of the tallest column, and the room above it and below it.
const HEIGHT: f64 = 220.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 26.0;

/// A column: its label and its sums.
type Column = (String, Totals);

/// Positions in percent of the chart's width.
struct Place {
    x: f64,
    width: f64,
}

/// The chart, or nothing if no tensor has a layer.
pub fn layers(inspection: &Inspection) -> Option<String> {
    let (columns, other) = columns(inspection);
    let tallest = columns.iter().map(|(_, totals)| totals.original.max(totals.stored)).max()?;
    let other = (other.tensors > 0).then_some(other);
    let count = columns.len() as f64;
    let other_width = (count * 0.045).max(1.0);
    let units = (count + 0.6 + other_width).max(MIN_COLUMNS);
    let place = |start: f64, width: f64| Place { x: 100.0 * start / units, width: 100.0 * width / units };
    let ticks = ticks(tallest);
    let scale = HEIGHT / ticks.last().copied().unwrap_or(1).max(1) as f64;
    let mut marks = grid(&ticks, scale);
    for (i, (label, totals)) in columns.iter().enumerate() {
        let place = place(i as f64 + 0.12, 0.76);
        marks += &column(&format!("layer {label}"), totals, &place, scale);
    }
    marks += &labels(&columns, 100.0 / units, other.is_some());
    if let Some(other) = &other {
        marks += &other_column(other, &place(count + 0.6, other_width * 0.88), scale);
    }
    Some(wrap(&ticks, scale, &marks, columns.len(), other.is_some()))
}

/// Sums by layer, neighbours taken together if there are too many, and sums of the tensors without a layer.
fn columns(inspection: &Inspection) -> (Vec<Column>, Totals) {
    let mut other = Totals::default();
    let mut layers: BTreeMap<u64, Totals> = BTreeMap::new();
    for tensor in &inspection.tensors {
        tensor.layer().map_or(&mut other, |layer| layers.entry(layer).or_default()).add(tensor);
    }
    let stride = layers.len().div_ceil(MAX_COLUMNS).max(1) as u64;
    let rank: BTreeMap<u64, u64> = layers.keys().enumerate().map(|(rank, &layer)| (layer, rank as u64)).collect();
    let mut columns: BTreeMap<u64, (u64, u64, Totals)> = BTreeMap::new();
    for tensor in &inspection.tensors {
        let Some(layer) = tensor.layer() else { continue };
        let column = columns.entry(rank[&layer] / stride).or_insert((layer, layer, Totals::default()));
        column.0 = column.0.min(layer);
        column.1 = column.1.max(layer);
        column.2.add(tensor);
    }
    let label = |(first, last): (u64, u64)| if first == last { first.to_string() } else { format!("{first}–{last}") };
    (columns.into_values().map(|(first, last, totals)| (label((first, last)), totals)).collect(), other)
}

/// Round numbers of bytes from zero to at least `tallest`.
fn ticks(tallest: u64) -> Vec<u64> {
    let unit = (0..6).map(|i| 1_u64 << (10 * i)).take_while(|&unit| unit <= tallest).last().unwrap_or(1);
    let value = tallest as f64 / unit as f64;
    let steps = (0..4).flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10_f64.powi(power)));
    let steps = [0.25, 0.5].into_iter().filter(|_| unit > 1).chain(steps);
    let step = steps.into_iter().find(|step| value / step <= 5.0).unwrap_or(1000.0);
    let count = (value / step).ceil().max(1.0) as u64;
    (0..=count).map(|i| (i as f64 * step * unit as f64) as u64).collect()
}

/// Lines across the chart.
fn grid(ticks: &[u64], scale: f64) -> String {
    let line = |&tick: &u64| {
        let y = TOP + HEIGHT - tick as f64 * scale;
        let class = if tick == 0 { "axis" } else { "grid" };
        format!(r#"<line class="{class}" x1="0" x2="100%" y1="{y:.1}" y2="{y:.1}"/>"#)
    };
    ticks.iter().map(line).collect()
}

/// One column: the size before as a shade, the parts stacked before it.
fn column(name: &str, totals: &Totals, place: &Place, scale: f64) -> String {
    let Place { x, width } = place;
    let height = totals.original as f64 * scale;
    let y = TOP + HEIGHT - height;
    let ghost = format!(r#"<rect class="ghost" x="{x:.3}%" width="{width:.3}%" y="{y:.1}" height="{height:.1}"/>"#);
    format!("<g><title>{}</title>{ghost}{}</g>", tip(name, totals), stack(totals, place, scale))
}

/// The parts of a column, from the axis upwards.
fn stack(totals: &Totals, Place { x, width }: &Place, scale: f64) -> String {
    let mut y = TOP + HEIGHT;
    let mut marks = String::new();
    for purpose in &PURPOSES {
        let height = (purpose.bytes)(&totals.parts) as f64 * scale;
        y -= height;
        if height >= 0.05 {
            let class = purpose.name;
            marks +=
                &format!(r#"<rect class="{class}" x="{x:.3}%" width="{width:.3}%" y="{y:.2}" height="{height:.2}"/>"#);
        }
    }
    marks
}

/// The tensors without a layer, broken off where they would not fit.
fn other_column(totals: &Totals, place: &Place, scale: f64) -> String {
    let tall = totals.original.max(totals.stored) as f64 * scale;
    let end = place.x + place.width;
    let (middle, base) = (place.x + place.width / 2.0, TOP + HEIGHT + 17.0);
    let anchored = if end > 97.0 { (end, "end") } else { (middle, "middle") };
    let label = |y: f64, text: &str| {
        let (x, anchor) = anchored;
        format!(r#"<text class="label" x="{x:.2}%" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#)
    };
    let name = label(base, "other");
    if tall <= HEIGHT + 1.0 {
        return column("tensors without a layer", totals, place, scale) + &name;
    }
    let scale = HEIGHT / totals.stored.max(1) as f64;
    let (left, right) = (place.x - 0.5, end + 0.5);
    let cut = |y: f64| {
        let low = y + 8.0;
        format!(r#"<line class="cut" x1="{left:.2}%" x2="{right:.2}%" y1="{low:.1}" y2="{y:.1}"/>"#)
    };
    let marks = format!("{}{}", stack(totals, place, scale), cut(TOP + HEIGHT * 0.5));
    let above = label(TOP - 9.0, &size(totals.stored));
    format!("<g><title>{} (not to scale)</title>{marks}</g>{above}{name}", tip("tensors without a layer", totals))
}

/// What a column shows, in words.
fn tip(name: &str, totals: &Totals) -> String {
    let mut lines = vec![format!("{name}: {}, was {}", size(totals.stored), size(totals.original))];
    for purpose in &PURPOSES {
        let bytes = (purpose.bytes)(&totals.parts);
        if bytes > 0 {
            lines.push(format!("{} {}", purpose.name, size(bytes)));
        }
    }
    lines.join("\n")
}

/// Labels under some of the columns.
fn labels(columns: &[Column], pitch: f64, other: bool) -> String {
    let steps = [1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50];
    let step = steps.into_iter().find(|step| columns.len().div_ceil(*step) <= MAX_LABELS).unwrap_or(50);
    let y = TOP + HEIGHT + 17.0;
    let mut marks = String::new();
    for (i, (label, _)) in columns.iter().enumerate().step_by(step) {
        let x = (i as f64 + 0.5) * pitch;
        if other && x > 88.0 && columns.len() > 12 {
            break;
        }
        let label = label.split('–').next().unwrap_or(label);
        marks += &format!(r#"<text class="label" x="{x:.2}%" y="{y:.1}" text-anchor="middle">{label}</text>"#);
    }
    marks
}

/// The chart with its axis.
fn wrap(ticks: &[u64], scale: f64, marks: &str, columns: usize, other: bool) -> String {
    let tall = TOP + HEIGHT + BOTTOM;
    let axis: String = ticks
        .iter()
        .map(|&tick| {
            let y = TOP + HEIGHT - tick as f64 * scale;
            let text = if tick == 0 { "0".into() } else { axis_size(tick) };
            format!(r#"<text class="label" x="100%" y="{y:.1}" dy="4" text-anchor="end">{text}</text>"#)
        })
        .collect();
    let others = if other { " and one for the tensors without a layer" } else { "" };
    format!(
        r#"<div class="chart"><svg class="scale" height="{tall}" aria-hidden="true">{axis}</svg><svg class="plot" height="{tall}" role="img" aria-labelledby="layers-t layers-d"><title id="layers-t">Bytes by layer</title><desc id="layers-d">{}{others}; each is stacked by what its bytes are for.</desc>{marks}</svg></div>"#,
        plural(columns as u64, "column"),
    )
}

/// A size without needless zeros: `200 MiB`, `0.5 GiB`.
fn axis_size(bytes: u64) -> String {
    let text = size(bytes);
    let (number, unit) = text.split_once(' ').unwrap_or((&text, ""));
    let number = if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number };
    format!("{number} {unit}")
}

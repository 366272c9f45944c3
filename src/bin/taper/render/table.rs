//! `taper inspect` in a terminal.

use candle_taper::inspect::{Inspection, TensorInfo};

use super::totals::{Totals, by_key};
use super::{PREDICTORS, PURPOSES, bits, coding, overhead, plural, printable, shape, share, size};

/// Columns that a line should not exceed.
const WIDTH: usize = 120;
/// Names are not made shorter than this.
const MIN_NAME: usize = 20;

/// The inspection as an aligned plain-text table with totals below.
pub fn table(inspection: &Inspection) -> String {
    let all = Totals::all(inspection);
    let mut text = heading(inspection);
    if !inspection.tensors.is_empty() {
        text += &format!("\n{}\n{}", tensors(inspection), groups(inspection, &all));
    }
    text += &format!("\n{}\n", summary(&all));
    if let Some(line) = went(&all) {
        text += &format!("{line}\n");
    }
    if let Some(line) = predictors(&all) {
        text += &format!("{line}\n");
    }
    text
}

/// Path, codec and where ideals come from.
fn heading(inspection: &Inspection) -> String {
    let codec = inspection.codec.as_deref().map_or("not compressed".into(), printable);
    let source = if inspection.exact { "all weights" } else { "a sample" };
    format!("{}  ({codec}; ideal bits from {source})\n", printable(&inspection.path))
}

/// One row per tensor.
fn tensors(inspection: &Inspection) -> String {
    let header = ["name", "shape", "dtype", "coding", "bits/w", "ideal", "over", "escapes", "before", "-> after"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(inspection.tensors.iter().map(row));
    let rest: usize = widths(&rows)[1..].iter().map(|width| width + 2).sum();
    let room = WIDTH.saturating_sub(rest).max(MIN_NAME);
    rows.iter_mut().for_each(|row| row[0] = shorten(&row[0], room));
    align(&rows, 4)
}

/// A tensor's cells.
fn row(tensor: &TensorInfo) -> Vec<String> {
    let totals = Totals::of(tensor);
    let escapes = if tensor.compressed() { size(tensor.parts.escapes) } else { "-".into() };
    let over = totals.overhead().map_or("-".into(), |percent| format!("{percent:+.1}%"));
    vec![
        printable(&tensor.name),
        shape(tensor),
        printable(&tensor.dtype),
        printable(&coding(tensor)),
        bits(totals.bits()),
        bits(totals.ideal()),
        over,
        escapes,
        size(tensor.original_bytes),
        format!("-> {:>8}", size(tensor.stored_bytes)),
    ]
}

/// One row per coding, and one for all.
fn groups(inspection: &Inspection, all: &Totals) -> String {
    let header = ["coding", "tensors", "before", "after", "percent", "bits/w", "ideal", "over"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let groups = by_key(inspection, coding);
    rows.extend(groups.iter().map(|(name, totals)| group(&printable(name), totals)));
    rows.push(group("all", all));
    align(&rows, 1)
}

/// A group's cells.
fn group(name: &str, totals: &Totals) -> Vec<String> {
    vec![
        name.to_owned(),
        super::count(totals.tensors),
        size(totals.original),
        size(totals.stored),
        share(totals.stored, totals.original),
        bits(totals.bits()),
        bits(totals.ideal()),
        overhead(totals.overhead()),
    ]
}

/// The result in a line.
fn summary(all: &Totals) -> String {
    let sizes = format!("{} -> {}", size(all.original), size(all.stored));
    match (all.percent(), all.bits()) {
        (Some(percent), Some(bits)) => {
            format!("{}: {sizes}, {percent:.1}%, {bits:.2} bits per weight", plural(all.tensors, "tensor"))
        }
        _ => format!("{}: {sizes}", plural(all.tensors, "tensor")),
    }
}

/// Where the bits went, in percent.
fn went(all: &Totals) -> Option<String> {
    let total = all.parts.total();
    let used = PURPOSES.iter().filter(|purpose| (purpose.bytes)(&all.parts) > 0);
    let shares: Vec<_> =
        used.map(|purpose| format!("{} {}", purpose.name, share((purpose.bytes)(&all.parts), total))).collect();
    (!shares.is_empty()).then(|| format!("bits went to: {}", shares.join(", ")))
}

/// Which predictors were used, if any but `none`.
fn predictors(all: &Totals) -> Option<String> {
    let total = all.predictors.iter().sum();
    let used = PREDICTORS.iter().zip(all.predictors).filter(|&(_, tiles)| tiles > 0);
    let shares: Vec<_> =
        used.map(|(name, tiles)| format!("{name} {} ({})", plural(tiles, "tile"), share(tiles, total))).collect();
    all.predicted().then(|| format!("predictors: {}", shares.join(", ")))
}

/// Cuts a name down to some characters: first `.weight`, then the middle.
fn shorten(name: &str, room: usize) -> String {
    let chars: Vec<char> = name.chars().collect();
    if chars.len() <= room {
        return name.to_owned();
    }
    let bare = name.strip_suffix(".weight").unwrap_or(name);
    let bare: Vec<char> = bare.chars().collect();
    if bare.len() < room {
        return bare.iter().chain(&['…']).collect();
    }
    // The end tells tensors apart better than the beginning.
    let head = (room - 1) * 2 / 5;
    let tail = &bare[bare.len() - (room - 1 - head)..];
    bare[..head].iter().chain(&['…']).chain(tail).collect()
}

/// Width of each column.
fn widths(rows: &[Vec<String>]) -> Vec<usize> {
    let columns = rows.first().map_or(0, Vec::len);
    (0..columns).map(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect()
}

/// Lines of columns, the first `left` of them left-aligned, the others right-aligned.
pub fn align(rows: &[Vec<String>], left: usize) -> String {
    let widths = widths(rows);
    let cell = |(i, text): (usize, &String)| {
        let width = widths[i];
        if i < left { format!("{text:<width$}") } else { format!("{text:>width$}") }
    };
    let line = |row: &Vec<String>| row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ") + "\n";
    rows.iter().map(line).map(|line| line.replace("  -> ", " -> ")).collect()
}

//! Bars, drawn in percent so that they fit any screen without scaling their text.

use candle_taper::inspect::Parts;

use super::html::escape;
use super::totals::Totals;
use super::{PURPOSES, Purpose, bits, overhead, plural, share, size};

/// Families with a bar of their own.
const MAX_FAMILIES: usize = 24;
/// Percent of a bar that its label needs on a phone.
const LABEL: f64 = 22.0;

/// A stacked bar of all parts, as an SVG.
pub fn parts_bar(id: &str, title: &str, parts: &Parts, shown: &[&Purpose]) -> String {
    let total: u64 = shown.iter().map(|purpose| (purpose.bytes)(parts)).sum();
    let used: Vec<_> =
        shown.iter().map(|purpose| (purpose, (purpose.bytes)(parts))).filter(|part| part.1 > 0).collect();
    let describe = |(purpose, bytes): &(&&Purpose, u64)| format!("{} {}", purpose.name, share(*bytes, total));
    let description = used.iter().map(describe).collect::<Vec<_>>().join(", ");
    let mut marks = String::new();
    let mut x = 0.0;
    for (purpose, bytes) in used {
        let width = 100.0 * bytes as f64 / total as f64;
        marks += &slice(purpose, bytes, total, x, width);
        x += width;
    }
    format!(
        r#"<svg class="stack" role="img" aria-labelledby="{id}-t {id}-d"><title id="{id}-t">{}</title><desc id="{id}-d">{}</desc>{marks}</svg>"#,
        escape(title),
        escape(&description),
    )
}

/// One piece of a stacked bar, with a label if there is room.
fn slice(purpose: &Purpose, bytes: u64, total: u64, x: f64, width: f64) -> String {
    let Purpose { name, .. } = purpose;
    let (share, size) = (share(bytes, total), size(bytes));
    let mut marks = format!(r#"<rect class="{name}" x="{x:.3}%" width="{width:.3}%" height="100%"/>"#);
    if x > 0.0 && width > 0.5 {
        marks += &format!(r#"<rect class="gap" x="{x:.3}%" width="1.5" height="100%"/>"#);
    }
    if width >= LABEL {
        let middle = x + width / 2.0;
        marks += &format!(r#"<text class="on-{name}" x="{middle:.3}%" y="50%">{name} {share}</text>"#);
    }
    format!("<g><title>{name}: {size}, {share}</title>{marks}</g>")
}

/// Bits per weight of each family against its ideal, the largest first.
pub fn families(mut groups: Vec<(String, Totals)>) -> String {
    groups.retain(|(_, totals)| totals.weights > 0);
    groups.sort_by(|a, b| b.1.original.cmp(&a.1.original).then_with(|| a.0.cmp(&b.0)));
    let more = groups.len().saturating_sub(MAX_FAMILIES) as u64;
    groups.truncate(MAX_FAMILIES);
    let scale = groups.iter().flat_map(|(_, totals)| [totals.bits(), totals.original_bits(), totals.ideal()]);
    let scale = scale.flatten().fold(1.0, f64::max);
    let rows: String = groups.iter().map(|(name, totals)| family(name, totals, scale)).collect();
    let rest = match more {
        0 => String::new(),
        1 => "<p class=\"note\">One smaller family is in the table below.</p>".into(),
        more => format!("<p class=\"note\">{more} smaller families are in the table below.</p>"),
    };
    format!("<div class=\"families\">{rows}</div>{rest}")
}

/// A family's row: its name, its bar, its numbers.
fn family(name: &str, totals: &Totals, scale: f64) -> String {
    let name = escape(name);
    let percent = |bits: Option<f64>| 100.0 * bits.unwrap_or(0.0) / scale;
    let plain = if totals.parts.plain * 2 > totals.stored { "pass-through" } else { "classes" };
    let (original, now) = (percent(totals.original_bits()), percent(totals.bits()));
    let tick = totals.ideal().map_or(String::new(), |ideal| {
        let x = percent(Some(ideal));
        format!(r#"<rect class="halo" x="{x:.2}%" y="0" width="7" height="22" transform="translate(-3.5)"/><rect class="tick" x="{x:.2}%" y="0" width="3" height="22" transform="translate(-1.5)"/>"#)
    });
    let title = format!(
        "{name}: {} bits per weight, was {}, ideal {} ({})\n{}, {} now {}",
        bits(totals.bits()),
        bits(totals.original_bits()),
        bits(totals.ideal()),
        overhead(totals.overhead()),
        plural(totals.tensors, "tensor"),
        size(totals.original),
        size(totals.stored),
    );
    let ideal = totals.ideal().map_or("unchanged".into(), |ideal| format!("ideal {ideal:.2}"));
    format!(
        r#"<div class="family"><span class="name">{name}</span><svg class="bar" role="img"><title>{title}</title><rect class="ghost" width="{original:.2}%" y="4" height="14" rx="2"/><rect class="{plain}" width="{now:.2}%" y="4" height="14" rx="2"/>{tick}</svg><span class="value"><b>{}</b> <small>{ideal}</small></span></div>"#,
        bits(totals.bits()),
    )
}

/// The purposes other than classes, raw bits and whole tensors.
pub fn small_parts() -> Vec<&'static Purpose> {
    PURPOSES.iter().filter(|purpose| !matches!(purpose.name, "classes" | "raw" | "pass-through")).collect()
}

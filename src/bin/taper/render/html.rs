//! `taper inspect --html`: one page that needs nothing else.

use candle_taper::inspect::{Inspection, TensorInfo};

use super::layers::layers;
use super::totals::{Totals, by_key};
use super::{
    PREDICTORS, PURPOSES, bits, charts, coding, count, family, overhead, plural, printable, shape, share, size,
};

const CSS: &str = include_str!("page.css");
const JS: &str = include_str!("page.js");

/// The inspection as one self-contained page.
pub fn html(inspection: &Inspection) -> String {
    let all = Totals::all(inspection);
    let title = escape(base_name(&inspection.path));
    let body =
        [header(inspection, &all), breakdown(&all), by_layer(inspection), by_family(inspection), tensors(inspection)];
    format!(
        r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title} · taper inspect</title>
<style>
{CSS}</style>
</head>
<body>
<main>
{}</main>
<div id="tip" hidden></div>
<script>
{JS}</script>
</body>
</html>
"#,
        body.concat(),
    )
}

/// Text made safe for elements and quoted attributes.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in printable(text).chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// The last component of a path, or all of it.
fn base_name(path: &str) -> &str {
    let path = path.trim_end_matches('/');
    path.rsplit('/').next().filter(|name| !name.is_empty() && *name != ".").unwrap_or(path)
}

/// What was inspected, and the headline numbers.
fn header(inspection: &Inspection, all: &Totals) -> String {
    let codec = inspection.codec.as_deref().map_or("not compressed".into(), escape);
    let unchanged = inspection.tensors.iter().filter(|tensor| !tensor.compressed()).count() as u64;
    let ideal =
        all.overhead().map_or(String::new(), |_| format!("ideal {}, {}", bits(all.ideal()), overhead(all.overhead())));
    let percent = all.percent().map_or("-".into(), |percent| format!("{percent:.1}<small>%</small>"));
    let saved = all.original.saturating_sub(all.stored);
    let tiles = [
        stat("hero", "Of the original size", &percent, &format!("{} saved", size(saved))),
        stat("", "Before", &number_unit(&size(all.original)), &plural(all.weights, "weight")),
        stat("", "After", &number_unit(&size(all.stored)), &format!("{} bytes", count(all.stored))),
        stat("", "Bits per weight", &bits(all.bits()), &ideal),
        stat("", "Tensors", &count(all.tensors), &format!("{} unchanged", count(unchanged))),
    ];
    format!(
        "<header>\n<p class=\"kicker\">taper inspect <span class=\"chip\">{codec}</span></p>\n<h1>{}</h1>\n<p class=\"path\">{}</p>\n<dl class=\"stats\">{}</dl>\n</header>\n",
        escape(base_name(&inspection.path)),
        escape(&inspection.path),
        tiles.concat(),
    )
}

/// One headline number.
fn stat(class: &str, name: &str, value: &str, note: &str) -> String {
    format!(r#"<div class="stat {class}"><dt>{name}</dt><dd><b>{value}</b><span>{note}</span></dd></div>"#)
}

/// A size whose unit is set smaller.
fn number_unit(size: &str) -> String {
    size.split_once(' ').map_or(size.into(), |(number, unit)| format!("{number}<small> {unit}</small>"))
}

/// A section with a heading and a line that explains it.
fn section(title: &str, about: &str, content: &str) -> String {
    format!("<section>\n<h2>{title}</h2>\n<p class=\"about\">{about}</p>\n{content}\n</section>\n")
}

/// Where all bits went.
fn breakdown(all: &Totals) -> String {
    let total = all.parts.total();
    if total == 0 {
        return String::new();
    }
    let every: Vec<_> = PURPOSES.iter().collect();
    let mut content = charts::parts_bar("parts", "Where all bits went", &all.parts, &every);
    let small = charts::small_parts();
    let rest: u64 = small.iter().map(|purpose| (purpose.bytes)(&all.parts)).sum();
    if rest > 0 && rest * 20 < total {
        let text = format!("The {} that is none of the above, magnified", share(rest, total));
        content += &format!("<p class=\"zoom\">The {} that is bookkeeping, magnified</p>", share(rest, total));
        content += &charts::parts_bar("zoom", &text, &all.parts, &small).replace("\"stack\"", "\"stack thin\"");
    }
    content += &legend(all);
    content += &predictors(all).unwrap_or_default();
    section("Where the bits went", "All stored bytes by what they are for.", &content)
}

/// The legend, which is also the chart's data.
fn legend(all: &Totals) -> String {
    let total = all.parts.total();
    let row = |purpose: &super::Purpose| {
        let bytes = (purpose.bytes)(&all.parts);
        let name = purpose.name;
        let each = 8.0 * bytes as f64 / all.weights.max(1) as f64;
        format!(
            r#"<tr><th scope="row"><i class="swatch {name}"></i>{name}</th><td class="what">{}</td><td>{}</td><td>{}</td><td class="each">{each:.3}</td></tr>"#,
            purpose.about,
            size(bytes),
            share(bytes, total),
        )
    };
    let rows: String = PURPOSES.iter().filter(|purpose| (purpose.bytes)(&all.parts) > 0).map(row).collect();
    format!(
        r#"<table class="legend"><thead><tr><th scope="col">Part</th><th scope="col" class="what">What it holds</th><th scope="col">Size</th><th scope="col">Share</th><th scope="col" class="each">Bits/weight</th></tr></thead><tbody>{rows}</tbody></table>"#
    )
}

/// Which predictors were used, if any but `none`.
fn predictors(all: &Totals) -> Option<String> {
    let total = all.predictors.iter().sum();
    let used = PREDICTORS.iter().zip(all.predictors).filter(|&(_, tiles)| tiles > 0);
    let shares: Vec<_> = used.map(|(name, tiles)| format!("{name} {}", share(tiles, total))).collect();
    all.predicted().then(|| format!("<p class=\"note\">Predictors, by tiles: {}.</p>", shares.join(", ")))
}

/// The chart by layer.
fn by_layer(inspection: &Inspection) -> String {
    let about = "Stored bytes of each layer, in the colours above; the shade behind is the size before. \
                 “Other” is what belongs to no layer; a slanted cut means that it is not to scale.";
    layers(inspection).map_or(String::new(), |chart| section("By layer", about, &chart))
}

/// The chart by family.
fn by_family(inspection: &Inspection) -> String {
    if inspection.tensors.is_empty() {
        return String::new();
    }
    let source = if inspection.exact { "counted on all weights" } else { "counted on a sample" };
    let about = format!(
        "Bits per weight now; the shade is what it was, the <i class=\"tick-key\"></i> tick the order-0 ideal, {source}. \
         Largest families first."
    );
    section("By family", &about, &charts::families(by_key(inspection, family)))
}

/// Headings of the table of tensors; true for numbers.
const COLUMNS: [(&str, bool); 10] = [
    ("Name", false),
    ("Shape", true),
    ("Dtype", false),
    ("Coding", false),
    ("Bits/weight", true),
    ("Ideal", true),
    ("Overhead", true),
    ("Escapes", true),
    ("Before", true),
    ("After", true),
];

/// The table of all tensors.
fn tensors(inspection: &Inspection) -> String {
    if inspection.tensors.is_empty() {
        return section("Tensors", "There are none.", "");
    }
    let head = |&(name, number): &(&str, bool)| {
        let class = if number { " class=\"n\"" } else { "" };
        format!("<th scope=\"col\"{class}><button type=\"button\">{name}</button></th>")
    };
    let heads: String = COLUMNS.iter().map(head).collect();
    let rows: String = inspection.tensors.iter().map(row).collect();
    let table = format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"All tensors\"><table id=\"tensors\"><thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table></div>"
    );
    let about = format!("{}. Press a heading to sort.", plural(inspection.tensors.len() as u64, "tensor"));
    section("Tensors", &about, &table)
}

/// A tensor's row; cells carry the number to sort by where their text is not it.
fn row(tensor: &TensorInfo) -> String {
    let totals = Totals::of(tensor);
    let text = |text: &str| format!("<td>{}</td>", escape(text));
    let number = |value: f64, text: String| format!("<td class=\"n\" data-v=\"{value}\">{text}</td>");
    let maybe = |value: Option<f64>, text: String| number(value.unwrap_or(-1e9), text);
    let escapes = if tensor.compressed() { size(tensor.parts.escapes) } else { "-".into() };
    let cells = [
        format!("<th scope=\"row\">{}</th>", escape(&tensor.name).replace('.', ".<wbr>")),
        number(tensor.weights as f64, shape(tensor).replace('x', "×")),
        text(&tensor.dtype),
        text(&coding(tensor)),
        maybe(totals.bits(), bits(totals.bits())),
        maybe(totals.ideal(), bits(totals.ideal())),
        maybe(totals.overhead(), overhead(totals.overhead())),
        number(tensor.parts.escapes as f64, escapes),
        number(tensor.original_bytes as f64, size(tensor.original_bytes)),
        number(tensor.stored_bytes as f64, size(tensor.stored_bytes)),
    ];
    format!("<tr>{}</tr>\n", cells.concat())
}

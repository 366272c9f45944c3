//! Ratios against rows of activations, as an SVG: a panel for each shape, a line for each of our layers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use plotters::prelude::*;
use plotters::series::DashedLineSeries;

use super::report::{Report, ratios};

/// Pixels of a panel.
const PANEL: (u32, u32) = (760, 420);

/// A line: rows of activations and how many times faster than candle.
type Line = Vec<(f64, f64)>;

/// Writes the plot of a report, against the first of candle's formats.
pub fn write(report: &Report, file: &Path) -> Result<()> {
    let panels = panels(report);
    ensure!(!panels.is_empty(), "--plot: there are no ratios without --stock");
    let mut svg = String::new();
    draw(&panels, &mut svg).map_err(|error| anyhow!("the plot cannot be drawn: {error}"))?;
    fs::write(file, svg).with_context(|| file.display().to_string())
}

/// For each shape, in the order of the report: the format that is compared with, and our lines.
fn panels(report: &Report) -> Vec<(String, BTreeMap<String, Line>)> {
    let mut panels: Vec<(String, BTreeMap<String, Line>)> = Vec::new();
    for (group, place) in report.groups.iter().filter_map(|group| Some((group, group.plot.as_ref()?))) {
        for row in group.rows.iter().filter(|row| !row.stock) {
            let Some((other, ratio)) = ratios(group, row).next() else { continue };
            let title = format!("{}: times faster than {}", place.panel, other.label());
            if panels.last().is_none_or(|(last, _)| *last != title) {
                panels.push((title, BTreeMap::new()));
            }
            if let Some((_, lines)) = panels.last_mut() {
                lines.entry(row.label()).or_default().push((place.rows as f64, ratio));
            }
        }
    }
    panels
}

fn draw(panels: &[(String, BTreeMap<String, Line>)], svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let height = PANEL.1 * panels.len() as u32;
    let root = SVGBackend::with_string(svg, (PANEL.0, height)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, (title, lines)) in root.split_evenly((panels.len(), 1)).iter().zip(panels) {
        let points = || lines.values().flatten();
        let most = points().map(|point| point.1).fold(1.2, f64::max) * 1.08;
        let (first, last) = points().fold((f64::MAX, 1.0f64), |(a, b), point| (a.min(point.0), b.max(point.0)));
        let range = (first * 0.9)..(last * 1.1);
        let mut chart = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 17))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(46)
            .build_cartesian_2d(range.clone().log_scale().base(2.0), 0.0..most)?;
        chart.configure_mesh().light_line_style(TRANSPARENT).x_desc("rows of activations").draw()?;
        chart.draw_series(LineSeries::new([(range.start, 1.0), (range.end, 1.0)], BLACK.mix(0.5)))?;
        for (index, (name, line)) in lines.iter().enumerate() {
            let color = Palette99::pick(index).to_rgba();
            let points = line.iter().copied();
            let series = if name.ends_with("plain launch") {
                chart.draw_series(DashedLineSeries::new(points, 5, 4, color.stroke_width(2)))?
            } else {
                chart.draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))?
            };
            series.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.2)).draw()?;
    }
    root.present()?;
    Ok(())
}

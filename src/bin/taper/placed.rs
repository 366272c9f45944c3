//! `taper inspect --device`: which layout each tensor has in a GPU's memory, and why.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_taper::convert::Progress;
use candle_taper::matrix::{GpuLayout, Options};
use candle_taper::ops::CompressedMatmul;
use candle_taper::{Checkpoint, checkpoint};
use serde_json::json;

use crate::device::DeviceName;
use crate::render;

/// A tensor on the GPU.
struct Placed {
    name: String,
    rows: usize,
    cols: usize,
    kind: &'static str,
    layout: GpuLayout,
    bytes: usize,
    why: String,
}

impl Placed {
    fn bits(&self) -> f64 {
        8.0 * self.bytes as f64 / (self.rows * self.cols).max(1) as f64
    }
}

/// Puts every compressed tensor of a checkpoint on `device` as layers do, one after another, and prints what became of it.
pub fn run(path: &Path, device: DeviceName, layout: GpuLayout, json: bool, progress: &dyn Progress) -> Result<()> {
    ensure!(device != DeviceName::Cpu, "--device cpu: layouts are a GPU's; on the CPU weights stay as they are");
    let checkpoint = Arc::new(Checkpoint::open(path)?);
    ensure!(checkpoint.is_compressed(), "{}: not compressed; `taper compress` first", path.display());
    let opened = device.open()?;
    let mut all = Vec::new();
    for info in checkpoint.tensors() {
        if !matches!(checkpoint.tensor(&info.name)?, checkpoint::Tensor::Compressed(_)) {
            continue;
        }
        progress.tensor(&info.name);
        let weight = checkpoint.weight(&info.name, &Options::default())?;
        let (geometry, kind) = (weight.geometry(), weight.plan().kind.name());
        let placed = CompressedMatmul::on(weight, &opened, layout)?;
        let Some((layout, bytes)) = placed.in_use() else { continue };
        let why = placed.why().unwrap_or_default().to_owned();
        all.push(Placed {
            name: info.name.clone(),
            rows: geometry.rows,
            cols: geometry.cols,
            kind,
            layout,
            bytes,
            why,
        });
    }
    let text = if json { as_json(&all, device)? } else { table(&all) };
    writeln!(std::io::stdout(), "{}", text.trim_end())?;
    Ok(())
}

fn table(all: &[Placed]) -> String {
    let mut lines = vec![["name", "shape", "kind", "layout", "why", "bits/w", "MB"].map(str::to_owned).to_vec()];
    lines.extend(all.iter().map(|placed| {
        vec![
            render::printable(&placed.name),
            format!("{}x{}", placed.rows, placed.cols),
            placed.kind.to_owned(),
            placed.layout.name().to_owned(),
            placed.why.clone(),
            format!("{:.2}", placed.bits()),
            format!("{:.1}", placed.bytes as f64 / 1e6),
        ]
    }));
    let (bytes, weights) = all.iter().fold((0, 0), |(b, w), p| (b + p.bytes, w + p.rows * p.cols));
    let bits = 8.0 * bytes as f64 / weights.max(1) as f64;
    format!("{}\n{} tensors, {bits:.2} bits/w, {:.1} MB", render::align(&lines, 5), all.len(), bytes as f64 / 1e6)
}

fn as_json(all: &[Placed], device: DeviceName) -> Result<String> {
    let tensor = |placed: &Placed| {
        json!({"name": placed.name, "shape": [placed.rows, placed.cols], "kind": placed.kind,
            "layout": placed.layout.name(), "bytes": placed.bytes, "bits_per_weight": placed.bits(), "why": placed.why})
    };
    let tensors: Vec<_> = all.iter().map(tensor).collect();
    Ok(serde_json::to_string_pretty(&json!({"device": device.to_string(), "tensors": tensors}))?)
}

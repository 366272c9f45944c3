//! Layers decoded to memory on a GPU: one alone, and five at once.

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use candle_taper::matrix::Weight;
use candle_taper::ops::CompressedMatmul;
use candle_taper::{Dtype, compress};

use super::args::{BenchArgs, Coding, Shape};
use super::layers::{Clock, ROUNDS, values};
use super::progress::Steps;
use super::report::{Group, Row};
use super::timing::{Samples, in_turns};

/// Layers that are decoded at once.
const LAYERS: usize = 5;
/// Calls of a sample.
const CALLS: usize = 8;

/// Times the decoding of one shape's layers as `--codec` and `--layout` say. Times are those of one layer.
pub fn run(
    args: &BenchArgs,
    shape: Shape,
    codings: &[Coding],
    device: &Device,
    clock: &mut Clock,
    steps: &Steps,
) -> Result<Group> {
    let title = format!("{shape}, decoded to memory as BF16");
    steps.begin(&title);
    let Shape { out, input } = shape;
    let bytes: Vec<u8> = values(args.weights, shape)?.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut subjects = Vec::new();
    for coding in codings {
        let Some(options) = &coding.options else { continue };
        let stream = compress(&bytes, Dtype::Bf16, out, input, options)?;
        for &layout in &args.layout {
            let layer = || CompressedMatmul::on(Weight::new(stream.clone())?, device, layout);
            let layers = (0..LAYERS).map(|_| layer()).collect::<candle_taper::Result<Vec<_>>>()?;
            let (used, stored) = layers[0].in_use().context("layers are decoded on a GPU")?;
            subjects.push((format!("{} as {}", coding.name, used.name()), stored, layers));
        }
    }
    let rounds = args.repetitions.unwrap_or(ROUNDS) as usize;
    let all: Vec<(usize, bool)> = (0..subjects.len()).flat_map(|subject| [(subject, false), (subject, true)]).collect();
    // The first round is not counted: memory is taken, streams are made.
    let samples = in_turns(all.len(), rounds + 1, |index, _| {
        let (subject, together) = all[index];
        let layers: Vec<&CompressedMatmul> = subjects[subject].2.iter().collect();
        let seconds = clock.time(|| {
            for call in 0..CALLS {
                let turn = call % LAYERS;
                let these = if together { &layers[..] } else { &layers[turn..turn + 1] };
                drop(CompressedMatmul::decode_each(these, DType::BF16)?);
            }
            Ok(())
        })?;
        Ok(seconds / (CALLS * if together { LAYERS } else { 1 }) as f64)
    })?;
    let rows = all.iter().zip(samples).map(|(&(subject, together), samples)| {
        let (name, stored, _) = &subjects[subject];
        let name = if together { format!("{name}, five at once") } else { name.clone() };
        let samples = Samples::new(samples.all()[1..].to_vec());
        Row { name, stock: false, bytes: *stored as u64, weights: (out * input) as u64, moved: None, samples }
    });
    Ok(Group { title, tokens: None, samples_a_pass: 1, rows: rows.collect(), plot: None })
}

//! The formats that are compared: ours, and GGUF's blocks as candle's quantiser makes them.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_taper::convert::{self, ConvertOptions};
use candle_taper::models::DenseWeights;
use candle_taper::models::weights::Weights;
use candle_taper::{Checkpoint, Codec, Options};
use tempfile::TempDir;

/// A format.
#[derive(Clone, Debug)]
pub enum Format {
    /// Ours.
    Taper(Options),
    /// GGUF blocks where the rows are whole blocks long; elsewhere what llama.cpp takes instead.
    Gguf(GgmlDType),
    /// GGUF blocks that go on over the ends of rows. No file has these: they show what K-quants cost and do where rows
    /// are too short for them.
    GgufAcross(GgmlDType),
}

/// All formats that are compared, with their names.
pub fn all() -> Vec<(String, Format)> {
    let taper = |name: &str, codec| (name.to_string(), Format::Taper(Options { codec, ..Options::default() }));
    let rates = [6.5, 6.0, 5.5, 5.0, 4.5, 4.0, 3.5, 3.0];
    let rates = rates.map(|bits| taper(&format!("rate {bits}"), Codec::Rate { bits }));
    let gguf =
        [("Q8_0", GgmlDType::Q8_0), ("Q6_K", GgmlDType::Q6K), ("Q5_K", GgmlDType::Q5K), ("Q4_K", GgmlDType::Q4K)];
    let across = gguf[1..].iter().map(|&(name, dtype)| (format!("{name} across rows"), Format::GgufAcross(dtype)));
    let mut all = vec![taper("lossless", Codec::Lossless), taper("INT8", Codec::Int8)];
    all.extend(rates);
    all.extend(gguf.map(|(name, dtype)| (format!("GGUF {name}"), Format::Gguf(dtype))));
    all.extend(across.map(|(name, format)| (format!("GGUF {name}"), format)));
    all
}

/// A model after it went through a format.
pub struct Quantised {
    /// In the Hugging Face layout. Ours is compressed, of GGUF these are the `f32`s that its blocks stand for.
    pub dir: TempDir,
    /// Bits a weight of the matrices, everything counted.
    pub bits: f64,
    /// Signal to noise of the matrices' weights, in dB; infinite if there is no noise.
    pub snr: f64,
    /// What the matrices became, most first.
    pub parts: String,
}

/// Takes a model through a format.
pub fn quantise(model: &Path, format: &Format) -> Result<Quantised> {
    let dir = tempfile::tempdir()?;
    let packed = dir.path();
    let source = Checkpoint::open(model)?;
    let mut parts: HashMap<String, u64> = HashMap::new();
    let mut bytes = 0;
    match format {
        Format::Taper(options) => {
            let options = ConvertOptions { matrix: options.clone(), force: true, ..Default::default() };
            convert::compress(model, packed, &options, &())?;
            let checkpoint = Checkpoint::open(packed)?;
            for info in checkpoint.tensors().iter().filter(|info| info.shape.len() == 2) {
                bytes += info.stored_bytes;
                let part = if info.compressed { options.matrix.codec.name().into() } else { info.dtype.clone() };
                *parts.entry(part).or_default() += info.shape.iter().product::<u64>();
            }
        }
        Format::Gguf(dtype) | Format::GgufAcross(dtype) => {
            let mut tensors = HashMap::new();
            for (name, tensor) in dense(&source)? {
                let tensor = if tensor.rank() == 2 {
                    let across = matches!(format, Format::GgufAcross(_));
                    let (blocks, dequantised) = blocks(&tensor, *dtype, across)?;
                    bytes += blocks.storage_size_in_bytes() as u64;
                    *parts.entry(format!("{:?}", blocks.dtype())).or_default() += tensor.elem_count() as u64;
                    dequantised
                } else {
                    tensor
                };
                tensors.insert(name, tensor);
            }
            candle_core::safetensors::save(&tensors, packed.join("model.safetensors"))?;
            std::fs::copy(model.join("config.json"), packed.join("config.json"))?;
        }
    }
    let (mut signal, mut noise, mut weights) = (0.0, 0.0, 0);
    let after: HashMap<String, Tensor> = dense(&Checkpoint::open(packed)?)?.into_iter().collect();
    for (name, before) in dense(&source)?.iter().filter(|(_, tensor)| tensor.rank() == 2) {
        let [before, after] = [before, &after[name]].map(|t| t.flatten_all().and_then(|t| t.to_vec1::<f32>()));
        let (before, after) = (before?, after?);
        weights += before.len();
        for (&a, &b) in before.iter().zip(&after) {
            signal += f64::from(a) * f64::from(a);
            noise += (f64::from(a) - f64::from(b)).powi(2);
        }
    }
    let mut parts: Vec<(String, u64)> = parts.into_iter().collect();
    parts.sort_by_key(|(name, weights)| (std::cmp::Reverse(*weights), name.clone()));
    let share = |weights: u64, all: usize| format!("{:.0}%", 100.0 * weights as f64 / all as f64);
    let parts = match &parts[..] {
        [(only, _)] => only.clone(),
        several => {
            let part = |(name, n): &(String, u64)| format!("{} {name}", share(*n, weights));
            several.iter().map(part).collect::<Vec<_>>().join(", ")
        }
    };
    Ok(Quantised { dir, bits: 8.0 * bytes as f64 / weights as f64, snr: 10.0 * (signal / noise).log10(), parts })
}

/// All tensors as `f32`s.
fn dense(checkpoint: &Checkpoint) -> Result<Vec<(String, Tensor)>> {
    let weights = DenseWeights::new(checkpoint, DType::F32, &Device::Cpu);
    let tensor = |info: &candle_taper::checkpoint::TensorInfo| {
        let shape: Vec<usize> = info.shape.iter().map(|&dim| dim as usize).collect();
        Ok((info.name.clone(), weights.tensor(&info.name, &shape)?))
    };
    checkpoint.tensors().iter().map(tensor).collect()
}

/// A matrix in GGUF blocks, and the `f32`s that these stand for.
fn blocks(matrix: &Tensor, dtype: GgmlDType, across: bool) -> Result<(QTensor, Tensor)> {
    let (rows, cols) = matrix.dims2()?;
    let fits = |dtype: GgmlDType, cols: usize| cols.is_multiple_of(dtype.block_size());
    let (dtype, shape) = if across && fits(dtype, rows * cols) {
        (dtype, (rows * cols / dtype.block_size(), dtype.block_size()))
    } else {
        // As llama.cpp's quantiser: first to a format with blocks of 32, then to F16.
        let instead = match dtype {
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            GgmlDType::Q6K => GgmlDType::Q8_0,
            other => other,
        };
        let found = [dtype, instead].into_iter().find(|&dtype| fits(dtype, cols));
        (found.unwrap_or(GgmlDType::F16), (rows, cols))
    };
    let quantised = QTensor::quantize(&matrix.reshape(shape)?, dtype)?;
    let dequantised = quantised.dequantize(&Device::Cpu)?.reshape((rows, cols))?;
    Ok((quantised, dequantised))
}

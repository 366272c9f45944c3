//! Weights as 4-bit integers in groups of 128, packed as GPTQ checkpoints have them.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use candle_taper::codec::kquant::Int4Format;
use candle_taper::nn::{Int4Tensors, KQuantLinear};
use half::{bf16, f16};

use super::args::Shape;

/// Inputs of a group.
pub(super) const GROUP: usize = 128;
/// Integers in a word.
const EACH: usize = 8;

/// The tensors of a layer.
pub(super) struct Packed {
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
}

impl Packed {
    /// Rounds each weight to the nearest of sixteen values from its group's least to its largest.
    pub(super) fn new(weights: &[bf16], Shape { out, input }: Shape) -> Result<Packed> {
        ensure!(out.is_multiple_of(EACH), "{out}x{input}: int4 needs a multiple of {EACH} outputs");
        let groups = input / GROUP;
        let (mut qweight, mut qzeros) = (vec![0u32; input / EACH * out], vec![0u32; groups * (out / EACH)]);
        let mut scales = vec![f16::ZERO; groups * out];
        for (row, weights) in weights.chunks_exact(input).enumerate() {
            for (group, weights) in weights.chunks_exact(GROUP).enumerate() {
                let range = |(least, most): (f32, f32), w: &bf16| (least.min(w.to_f32()), most.max(w.to_f32()));
                let (least, most) = weights.iter().fold((0.0, 0.0), range);
                // At least the smallest that is not zero: what is divided by it is finite.
                let scale = f16::from_f32((most - least) / 15.0).max(f16::from_bits(1));
                let zero = (-least / scale.to_f32()).round().clamp(0.0, 15.0);
                scales[group * out + row] = scale;
                qzeros[group * (out / EACH) + row / EACH] |= (zero as u32) << (4 * (row % EACH));
                for (i, w) in weights.iter().enumerate() {
                    let code = (w.to_f32() / scale.to_f32() + zero).round().clamp(0.0, 15.0) as u32;
                    qweight[(group * GROUP + i) / EACH * out + row] |= code << (4 * (i % EACH));
                }
            }
        }
        let cpu = &Device::Cpu;
        Ok(Packed {
            qweight: Tensor::from_vec(qweight, (input / EACH, out), cpu)?,
            qzeros: Tensor::from_vec(qzeros, (groups, out / EACH), cpu)?,
            scales: Tensor::from_vec(scales, (groups, out), cpu)?,
        })
    }

    /// A layer of them on `device`.
    pub(super) fn layer(&self, device: &Device) -> Result<KQuantLinear> {
        let Packed { qweight, qzeros, scales } = self;
        Ok(KQuantLinear::from_int4(
            Int4Format::GptqV2,
            &Int4Tensors { qweight, qzeros, scales, g_idx: None },
            None,
            device,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn weights_are_rounded_to_the_nearest_of_sixteen() {
        let (shape, groups) = (Shape { out: 16, input: 256 }, 2);
        let weights: Vec<bf16> = (0..16 * 256).map(|i| bf16::from_f32(((i * 37 % 101) as f32 - 30.0) / 64.0)).collect();
        let packed = Packed::new(&weights, shape).unwrap();
        let back = packed.layer(&Device::Cpu).unwrap().op().dequantize(DType::F32).unwrap();
        let back: Vec<f32> = back.flatten_all().unwrap().to_vec1().unwrap();
        let scales: Vec<f16> = packed.scales.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(scales.len(), groups * 16);
        for (i, (back, weight)) in back.iter().zip(&weights).enumerate() {
            let step = scales[i % 256 / GROUP * 16 + i / 256].to_f32();
            assert!((back - weight.to_f32()).abs() <= 0.52 * step, "{i}: {back} for {weight}");
        }
        assert!(Packed::new(&weights[..128 * 4], Shape { out: 4, input: 128 }).is_err());
    }
}

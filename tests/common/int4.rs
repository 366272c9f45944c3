//! 4-bit integers in groups, packed as AWQ and GPTQ checkpoints do, by another way than the crate unpacks them.
#![allow(dead_code)]

use candle_core::{Device, Tensor};
use candle_taper::codec::kquant::Int4Format;
use candle_taper::nn::{Int4Tensors, KQuantLinear};
use half::f16;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

pub const FORMATS: [Int4Format; 3] = [Int4Format::Awq, Int4Format::Gptq, Int4Format::GptqV2];

/// A matrix, and the tensors that stand for it.
pub struct Packed {
    pub format: Int4Format,
    pub shape: [usize; 2],
    pub values: Vec<f32>,
    pub qweight: Tensor,
    pub qzeros: Tensor,
    pub scales: Tensor,
    pub g_idx: Option<Tensor>,
}

/// Adds a number of four bits to a matrix of words.
fn put(words: &mut [i32], at: usize, nibble: usize, value: u32) {
    words[at] |= (value << (4 * nibble)) as i32;
}

impl Packed {
    /// Random weights; `symmetric` ones have the zero in the middle.
    pub fn new(format: Int4Format, rows: usize, cols: usize, group: usize, symmetric: bool) -> Packed {
        let mut rng = SmallRng::seed_from_u64((rows * 31 + cols + group) as u64);
        let groups = cols / group;
        let scales: Vec<f16> = (0..groups * rows).map(|_| f16::from_f32(rng.random_range(0.001..0.05))).collect();
        let lowest = u32::from(format == Int4Format::Gptq);
        let zeros: Vec<u32> =
            (0..groups * rows).map(|_| if symmetric { 8 } else { rng.random_range(lowest..16 + lowest) }).collect();
        let quants: Vec<u32> = (0..rows * cols).map(|_| rng.random_range(0..16)).collect();
        let value = |i: usize| {
            let at = i % cols / group * rows + i / cols;
            scales[at].to_f32() * (quants[i] as f32 - zeros[at] as f32)
        };
        let values = (0..rows * cols).map(value).collect();
        // Where AutoAWQ puts output `8 i + o` of a word's eight.
        let place = |o: usize| [0, 4, 1, 5, 2, 6, 3, 7][o % 8];
        let (mut qweight, mut qzeros) = (vec![0; rows * cols / 8], vec![0; rows * groups / 8]);
        for row in 0..rows {
            for col in 0..cols {
                let quant = quants[row * cols + col];
                match format {
                    Int4Format::Awq => put(&mut qweight, col * (rows / 8) + row / 8, place(row), quant),
                    _ => put(&mut qweight, col / 8 * rows + row, col % 8, quant),
                }
            }
            for g in 0..groups {
                let nibble = if format == Int4Format::Awq { place(row) } else { row % 8 };
                put(&mut qzeros, g * (rows / 8) + row / 8, nibble, zeros[g * rows + row] - lowest);
            }
        }
        let weights = if format == Int4Format::Awq { (cols, rows / 8) } else { (cols / 8, rows) };
        let tensor = |data, shape: (usize, usize)| Tensor::from_vec(data, shape, &Device::Cpu).unwrap();
        let ids = (0..cols as i32).map(|k| k / group as i32).collect();
        Packed {
            format,
            shape: [rows, cols],
            values,
            qweight: tensor(qweight, weights),
            qzeros: tensor(qzeros, (groups, rows / 8)),
            scales: Tensor::from_vec(scales, (groups, rows), &Device::Cpu).unwrap(),
            g_idx: (format != Int4Format::Awq).then(|| Tensor::from_vec::<_, i32>(ids, cols, &Device::Cpu).unwrap()),
        }
    }

    pub fn tensors(&self) -> Int4Tensors<'_> {
        let Packed { qweight, qzeros, scales, g_idx, .. } = self;
        Int4Tensors { qweight, qzeros, scales, g_idx: g_idx.as_ref() }
    }

    pub fn linear(&self, device: &Device) -> KQuantLinear {
        KQuantLinear::from_int4(self.format, &self.tensors(), None, device).unwrap()
    }
}

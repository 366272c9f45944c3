//! Which kernels multiply a matrix of blocks, where several can: chosen by a rule, or timed on the GPU that holds the matrix,
//! once for each format, shape and number of columns, and remembered ([`super::choices`]).

use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::choices::{Choices, Measured};
use super::choose::{copies_of, key, measuring, time_calls};
use super::family::Family;
use super::kernels::Kernels;
use super::packed::Packed;
use crate::Result;
use crate::codec::kquant::GgmlType;
use crate::codec::{Dtype, Geometry};

/// Weights of a matrix below which nothing is measured: launches decide.
const LEAST: usize = 1 << 20;

/// The kernels that a matrix prefers. Matrices that are not of blocks have no choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Preferred {
    /// Whether 17 to 32 columns are multiplied by `kernels/wide.cuh`, not by whole warpgroups, where there are such.
    pub wide_32: bool,
    /// Likewise 33 to 64 columns.
    pub wide_64: bool,
}

impl Preferred {
    /// What is right for most shapes on an H100 and an H200.
    fn rule(family: Family) -> Preferred {
        Preferred { wide_32: family != Family::Blocks(GgmlType::Int4G128), wide_64: false }
    }
}

/// A choice's name, and what makes it.
type Answer = (&'static str, fn(&mut Preferred));

/// One of the things to choose: the columns it is timed with, and what they stand for.
struct Question {
    columns: usize,
    what: &'static str,
    answers: &'static [Answer],
}

const QUESTIONS: [Question; 2] = [
    Question {
        columns: 32,
        what: "17 to 32 columns",
        answers: &[("wide", |p| p.wide_32 = true), ("warpgroups", |p| p.wide_32 = false)],
    },
    Question {
        columns: 64,
        what: "33 to 64 columns",
        answers: &[("wide", |p| p.wide_64 = true), ("warpgroups", |p| p.wide_64 = false)],
    },
];

impl Packed {
    /// Chooses the kernels of a matrix of blocks that is complete, and says how.
    pub(super) fn choose_kernels(&mut self) -> Result<String> {
        let Geometry { rows, cols } = self.geometry;
        self.preferred = Preferred::rule(self.family);
        let Family::Blocks(ty) = self.family else { return Ok("kernels by rule".into()) };
        // Elsewhere there are no warpgroups to choose.
        if !self.kernels.warpgroups || !measuring() || rows * cols < LEAST {
            return Ok("kernels by rule".into());
        }
        let name = format!("{} {rows}x{cols}", ty.name());
        Choices::shared(|choices| {
            let mut said = Vec::new();
            let mut copies = Vec::new();
            for question in &QUESTIONS {
                let key = key(&self.device, &format!("{name}, {}", question.what))?;
                let answer = |name: &str| question.answers.iter().find(|(known, _)| *known == name);
                if let Some((name, set)) = choices.get(&key).and_then(|known| answer(known.choice())) {
                    set(&mut self.preferred);
                    said.push(format!("{}: {name} (remembered)", question.what));
                    continue;
                }
                if copies.is_empty() && !self.copy_for_timing(&mut copies)? {
                    return Ok("kernels by rule, as there was no room to measure".into());
                }
                let mut times = Vec::new();
                for (name, set) in question.answers {
                    let mut preferred = self.preferred;
                    set(&mut preferred);
                    times.extend(self.time(&copies, question.columns, preferred)?.map(|us| (*name, us)));
                }
                let fastest = times.iter().min_by(|a, b| a.1.total_cmp(&b.1));
                let Some((name, set)) = fastest.and_then(|(name, _)| answer(name)) else { continue };
                set(&mut self.preferred);
                let measured = Measured::new(name, &times);
                said.push(format!("{}: {name} ({})", question.what, measured.times()));
                choices.put(key, measured);
            }
            Ok(said.join("; "))
        })
    }

    /// Copies of the weights to take turns with, so that no cache holds them; the first is empty and stands for the matrix
    /// itself. False if the memory is too small.
    fn copy_for_timing(&self, copies: &mut Vec<Option<CudaSlice<u8>>>) -> Result<bool> {
        copies.push(None);
        while copies.len() < copies_of(self.weights.len()) {
            match self.weights.try_clone() {
                Ok(copy) => copies.push(Some(copy)),
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Microseconds of a product with `columns` BF16 rows; `None` if the kernels cannot take them.
    fn time(&self, copies: &[Option<CudaSlice<u8>>], columns: usize, preferred: Preferred) -> Result<Option<f64>> {
        let Geometry { rows, cols } = self.geometry;
        let device = self.device.clone();
        let x = device.alloc_zeros::<u8>(2 * cols * columns)?;
        let mut y = device.alloc_zeros::<u8>(2 * rows * columns)?;
        let kernels: &Kernels = &self.kernels;
        time_calls((&device, kernels), copies.len(), |i| {
            let weights = copies[i].as_ref().unwrap_or(&self.weights);
            self.multiply_with(weights, (&x.as_view(), &mut y.as_view_mut()), (columns, Dtype::Bf16), preferred)
        })
    }
}

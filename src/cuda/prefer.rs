//! How a matrix of blocks is multiplied by more rows of activations than one tensor-core tile has: with which of the kernels
//! of [`super::stream`], in how many pieces. A rule orders the ways; the first few are timed on the GPU that holds the matrix,
//! once for each format, shape and number of rows, and the fastest is remembered ([`super::choices`]).

use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::choices::{Choices, Measured};
use super::choose::{copies_of, key, measuring, time_calls};
use super::family::Family;
use super::packed::Packed;
use super::shares::{Plan, Share, Width};
use super::stream::widths;
use crate::Result;
use crate::codec::{Dtype, Geometry};

/// Weights of a matrix below which nothing is measured: launches decide.
const LEAST: usize = 1 << 20;
/// Ways that are timed.
const TIMED: usize = 4;

/// What a way is called where it is remembered.
fn name(widths: &[Width], share: Share) -> String {
    let columns = widths.get(share.kernel).map_or(0, |width| width.columns);
    format!("{columns} {}", share.cut)
}

impl Packed {
    /// Chooses how a matrix of blocks that is complete is multiplied, and says how.
    pub(super) fn choose_shares(&mut self) -> Result<String> {
        const RULE: &str = "shared out by rule";
        let (Geometry { rows, cols }, Family::Blocks(ty)) = (self.geometry, self.family) else {
            return Ok(RULE.into());
        };
        let Some((widths, _)) = widths(self.family).filter(|_| self.kernels.warpgroups) else { return Ok(RULE.into()) };
        if !measuring() || rows * cols < LEAST {
            return Ok(RULE.into());
        }
        Choices::shared(|choices| {
            let mut said = Vec::new();
            let mut copies = Vec::new();
            for most in widths.iter().map(|width| width.columns) {
                let ways = Plan::likeliest(widths, self.geometry, most, self.kernels.processors);
                let key = key(&self.device, &format!("{} {rows}x{cols}, up to {most} rows", ty.name()))?;
                let known = choices.get(&key).map(Measured::choice);
                if let Some(share) = ways.iter().find(|share| known == Some(&name(widths, **share))) {
                    self.preferred.push((most, *share));
                    said.push(format!("up to {most} rows: {} (remembered)", name(widths, *share)));
                    continue;
                }
                if copies.is_empty() && !self.copy_for_timing(&mut copies)? {
                    return Ok(format!("{RULE}, as there was no room to measure"));
                }
                let mut times = Vec::new();
                for share in ways.into_iter().take(TIMED) {
                    times.extend(self.time(&copies, most, share)?.map(|us| (share, us)));
                }
                let Some((share, _)) = times.iter().min_by(|a, b| a.1.total_cmp(&b.1)).copied() else { continue };
                self.preferred.push((most, share));
                let names: Vec<_> = times.iter().map(|(share, us)| (name(widths, *share), *us)).collect();
                let named: Vec<_> = names.iter().map(|(name, us)| (name.as_str(), *us)).collect();
                let measured = Measured::new(&name(widths, share), &named);
                said.push(format!("up to {most} rows: {} ({})", measured.choice(), measured.times()));
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

    /// Microseconds of a product with `batch` BF16 rows; `None` if the kernels cannot take them.
    fn time(&self, copies: &[Option<CudaSlice<u8>>], batch: usize, share: Share) -> Result<Option<f64>> {
        let Geometry { rows, cols } = self.geometry;
        let device = self.device.clone();
        let x = device.alloc_zeros::<u8>(2 * cols * batch)?;
        let mut y = device.alloc_zeros::<u8>(2 * rows * batch)?;
        time_calls((&device, &self.kernels), copies.len(), |i| {
            let weights = copies[i].as_ref().unwrap_or(&self.weights);
            self.stream_as(weights, (&x.as_view(), &mut y.as_view_mut()), (batch, Dtype::Bf16), Some(share))
        })
    }
}

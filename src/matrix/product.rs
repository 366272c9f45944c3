//! Products with a compressed matrix that never decode more than a strip of it.

use std::cell::RefCell;
use std::sync::Mutex;

use rayon::prelude::*;

use super::CompressedMatrix;
use crate::codec::{BAND_ROWS, Geometry, TILE};
use crate::cpu;
use crate::cpu::dot::{Activation, DotScratch, dot_band};
use crate::cpu::gemm::{Gemm, gemm};
use crate::{Error, Result};

/// Runs numbered tasks on some threads. Results must not depend on which thread runs a task.
pub trait Executor {
    /// Calls `task` once with each of `0..tasks`.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// Rayon's current pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct RayonExecutor;

impl Executor for RayonExecutor {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).into_par_iter().for_each(task);
    }
}

thread_local! {
    /// A thread's buffers: two bands decoded side by side, and a strip of weights.
    static SCRATCH: RefCell<([DotScratch; 2], Vec<f32>)> = RefCell::default();
}

/// Collects the first error of parallel tasks, and their disjoint outputs.
struct Outputs<'y> {
    parts: Vec<Mutex<&'y mut [f32]>>,
    error: Mutex<Option<(usize, Error)>>,
}

impl<'y> Outputs<'y> {
    fn new(y: &'y mut [f32], part: usize) -> Outputs<'y> {
        Outputs { parts: y.chunks_mut(part).map(Mutex::new).collect(), error: Mutex::new(None) }
    }

    fn run(self, executor: &impl Executor, task: impl Fn(usize, &mut [f32]) -> Result<()> + Sync) -> Result<()> {
        executor.run(self.parts.len(), &|index| {
            // Each part is locked by its own task only; a poisoned lock means that one panicked before.
            let mut part = self.parts[index].lock().unwrap_or_else(|e| e.into_inner());
            if let Err(error) = task(index, &mut part) {
                let mut first = self.error.lock().unwrap_or_else(|e| e.into_inner());
                if first.as_ref().is_none_or(|(i, _)| index < *i) {
                    *first = Some((index, error));
                }
            }
        });
        let error = self.error.into_inner().unwrap_or_else(|e| e.into_inner());
        error.map_or(Ok(()), |(_, error)| Err(error))
    }
}

impl CompressedMatrix<'_> {
    /// `y = W·x`: `x` has one value for each column, the result one for each row.
    ///
    /// BF16 weights are multiplied as they are decoded, without passing through memory. The result is the same to the
    /// last bit for every backend, stage and number of threads, and for the uncompressed weights
    /// ([`crate::cpu::dot`] states the order of additions).
    ///
    /// # Errors
    /// If `x` does not fit, or a tile is damaged.
    pub fn matvec(&self, x: &[f32], executor: &impl Executor) -> Result<Vec<f32>> {
        let Geometry { rows, cols } = self.geometry();
        self.expect("x", x.len(), cols)?;
        let x = Activation::new(x);
        let mut y = vec![0.0; rows];
        Outputs::new(&mut y, BAND_ROWS)
            .run(executor, |strip, y| SCRATCH.with_borrow_mut(|(scratch, _)| self.strip_dot(strip, &x, scratch, y)))?;
        Ok(y)
    }

    /// The rows of one strip of bands times `x`. Two tiles are decoded side by side.
    fn strip_dot(&self, strip: usize, x: &Activation, scratch: &mut [DotScratch; 2], y: &mut [f32]) -> Result<()> {
        let across = self.geometry().tile_cols();
        let first = strip * BAND_ROWS / TILE * across;
        let band = strip % (TILE / BAND_ROWS);
        let backend = self.backend();
        let [left, right] = scratch;
        for col in (0..across).step_by(2) {
            let a = self.open_band(first + col, band)?;
            let view = self.view(&a);
            if col + 1 == across {
                let [done] = cpu::symbols(backend, [&view], [&mut left.scratch]);
                let added = dot_band(backend, &view, done, left, x, a.rect.col, y);
                return added.map_err(|e| self.stream().in_tile(first + col, e));
            }
            let b = self.open_band(first + col + 1, band)?;
            let other = self.view(&b);
            let done = cpu::symbols(backend, [&view, &other], [&mut left.scratch, &mut right.scratch]);
            let added = dot_band(backend, &view, done[0], left, x, a.rect.col, y);
            added.map_err(|e| self.stream().in_tile(first + col, e))?;
            let added = dot_band(backend, &other, done[1], right, x, b.rect.col, y);
            added.map_err(|e| self.stream().in_tile(first + col + 1, e))?;
        }
        Ok(())
    }

    /// `Y = X·Wᵀ` for `m` rows of activations: `x` is `m × columns`, the result `m × rows`, both row-major. Each strip of
    /// 64 rows is decoded once and multiplied with all activations.
    ///
    /// # Errors
    /// If `x` does not fit, or a tile is damaged.
    pub fn matmul(&self, x: &[f32], m: usize, executor: &impl Executor) -> Result<Vec<f32>> {
        let Geometry { rows, cols } = self.geometry();
        if m == 1 {
            return self.matvec(x, executor);
        }
        self.expect("x", x.len(), m * cols)?;
        // By strips: [strip][m][row of the strip].
        let mut y = vec![0.0; m * rows];
        Outputs::new(&mut y, m * BAND_ROWS).run(executor, |strip, y| {
            SCRATCH.with_borrow_mut(|([scratch, _], weights)| {
                let (across, band) = (self.geometry().tile_cols(), strip % (TILE / BAND_ROWS));
                let n = BAND_ROWS.min(rows - strip * BAND_ROWS);
                weights.resize(n * cols, 0.0);
                let first = strip * BAND_ROWS / TILE * across;
                for column in 0..across {
                    self.band_f32(first + column, band, scratch, &mut weights[column * TILE..], cols)?;
                }
                // y[m][n] = Σ x[m][k] · w[n][k]
                let shape = Gemm { m, n, k: cols, a: [cols, 1], b: [1, cols], c: [n, 1], add: false };
                gemm(&shape, x, weights, y);
                Ok(())
            })
        })?;
        Ok(from_strips(&y, m, rows))
    }

    /// `X = Y·W` for `m` rows of gradients: `y` is `m × rows`, the result `m × columns`, both row-major. What
    /// back-propagation through [`CompressedMatrix::matmul`] needs.
    ///
    /// # Errors
    /// If `y` does not fit, or a tile is damaged.
    pub fn matmul_transposed(&self, y: &[f32], m: usize, executor: &impl Executor) -> Result<Vec<f32>> {
        let Geometry { rows, cols } = self.geometry();
        self.expect("y", y.len(), m * rows)?;
        // By columns of tiles: [column][m][column of the tile].
        let mut x = vec![0.0; m * cols];
        Outputs::new(&mut x, m * TILE).run(executor, |column, x| {
            SCRATCH.with_borrow_mut(|([scratch, _], weights)| {
                let across = self.geometry().tile_cols();
                for tile in (column..self.geometry().tiles()).step_by(across) {
                    let rect = self.geometry().tile(tile);
                    weights.resize(rect.weights(), 0.0);
                    for (band, weights) in weights.chunks_mut(BAND_ROWS * rect.cols).enumerate() {
                        self.band_f32(tile, band, scratch, weights, rect.cols)?;
                    }
                    // x[m][k] += Σ y[m][n] · w[n][k]
                    let shape = Gemm {
                        m,
                        n: rect.cols,
                        k: rect.rows,
                        a: [rows, 1],
                        b: [rect.cols, 1],
                        c: [rect.cols, 1],
                        add: rect.row > 0,
                    };
                    gemm(&shape, &y[rect.row..], weights, x);
                }
                Ok(())
            })
        })?;
        Ok(unstrip(&x, m, cols, TILE))
    }

    /// A band's weights as `f32`s, in rows of `stride` at `out`.
    fn band_f32(
        &self,
        tile: usize,
        band: usize,
        scratch: &mut DotScratch,
        out: &mut [f32],
        stride: usize,
    ) -> Result<()> {
        let opened = self.open_band(tile, band)?;
        let view = self.view(&opened);
        let [done] = cpu::symbols(self.backend(), [&view], [&mut scratch.scratch]);
        cpu::dot::values(self.backend(), &view, done, scratch, out, stride).map_err(|e| self.stream().in_tile(tile, e))
    }

    fn expect(&self, what: &str, got: usize, need: usize) -> Result<()> {
        let Geometry { rows, cols } = self.geometry();
        if got == need {
            return Ok(());
        }
        Err(Error::Invalid(format!("{what} has {got} values, a product with the {rows}x{cols} matrix needs {need}")))
    }
}

/// From `[strip][m][row of the strip]` to `[m][row]`.
fn from_strips(y: &[f32], m: usize, rows: usize) -> Vec<f32> {
    unstrip(y, m, rows, BAND_ROWS)
}

/// From `[part][m][index in the part]` to `[m][index]`, with parts of `size` but the last.
fn unstrip(y: &[f32], m: usize, total: usize, size: usize) -> Vec<f32> {
    let mut out = vec![0.0; m * total];
    for (part, values) in y.chunks(m * size).enumerate() {
        let n = values.len() / m;
        for (row, values) in values.chunks_exact(n).enumerate() {
            out[row * total + part * size..][..n].copy_from_slice(values);
        }
    }
    out
}

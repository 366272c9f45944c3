//! Products with a compressed matrix that never decode more than a strip of it.

use std::cell::RefCell;
use std::sync::Mutex;

use rayon::prelude::*;

use super::decode::OpenBand;
use super::{Activations, CompressedMatrix};
use crate::codec::band::Band;
use crate::codec::{BAND_ROWS, Geometry, Kind, TILE};
use crate::cpu::dot::{Activation, DotScratch, dot_band};
use crate::cpu::gemm::{Gemm, gemm};
use crate::cpu::int8::Rows;
use crate::cpu::zeros::{sizes, zeros};
use crate::cpu::{self, int8};
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

/// A thread's buffers: two bands decoded side by side, a strip of weights, a band packed for a batch.
#[derive(Default)]
struct Buffers {
    pair: [DotScratch; 2],
    weights: Vec<f32>,
    packed: Vec<u8>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// The first error of parallel tasks, by their numbers.
#[derive(Default)]
struct FirstError(Mutex<Option<(usize, Error)>>);

impl FirstError {
    fn note(&self, task: usize, result: Result<()>) {
        if let Err(error) = result {
            let mut first = self.0.lock().unwrap_or_else(|e| e.into_inner());
            if first.as_ref().is_none_or(|(other, _)| task < *other) {
                *first = Some((task, error));
            }
        }
    }

    fn result(self) -> Result<()> {
        let error = self.0.into_inner().unwrap_or_else(|e| e.into_inner());
        error.map_or(Ok(()), |(_, error)| Err(error))
    }
}

/// Runs a task for each part of an output; each has its part for itself.
pub(crate) fn run_parts<P: Send>(
    executor: &impl Executor,
    parts: Vec<P>,
    task: impl Fn(usize, P) -> Result<()> + Sync,
) -> Result<()> {
    let parts: Vec<_> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
    let error = FirstError::default();
    executor.run(parts.len(), &|index| {
        // Each part is taken by its own task only; a poisoned lock means that one panicked before.
        if let Some(part) = parts[index].lock().unwrap_or_else(|e| e.into_inner()).take() {
            error.note(index, task(index, part));
        }
    });
    error.result()
}

/// Activations made ready for all matrices that they are multiplied with.
#[derive(Default)]
struct Input {
    /// A single row, for matrices that take it as it is.
    vector: Option<Activation>,
    /// Rounded to 8 bits, for matrices that take them so.
    rounded: Option<Rows>,
    /// The rows that cannot be rounded, as they are.
    exact: Vec<(usize, Activation)>,
}

impl Input {
    fn new(matrices: &[CompressedMatrix], x: &[f32], m: usize) -> Input {
        let mut input = Input::default();
        if m == 1 && matrices.iter().any(|matrix| !matrix.rounds()) {
            input.vector = Some(Activation::new(x));
        }
        if matrices.iter().any(CompressedMatrix::rounds) {
            let cols = x.len() / m;
            let rows = Rows::new(x, cols);
            let exact = |&row: &usize| (row, Activation::new(&x[row * cols..(row + 1) * cols]));
            input.exact = rows.exact().iter().map(exact).collect();
            input.rounded = Some(rows);
        }
        input
    }
}

/// `Y = X·Wᵀ` for `m` rows of activations and several matrices of as many columns, in one parallel region: `x` is
/// `m × columns`, and the results, each `m × rows` of its matrix and row-major, stand one after another. The activations
/// are made ready once for all matrices. Each result is, to the last bit, what [`CompressedMatrix::matmul`] gives.
///
/// # Errors
/// If `x` does not fit one of the matrices, or a tile is damaged.
pub fn matmul_each(matrices: &[CompressedMatrix], x: &[f32], m: usize, executor: &impl Executor) -> Result<Vec<f32>> {
    for matrix in matrices {
        matrix.expect("x", x.len(), m * matrix.geometry().cols)?;
    }
    let rows = |matrix: &CompressedMatrix| matrix.geometry().rows;
    if m * matrices.iter().map(rows).sum::<usize>() == 0 {
        return Ok(Vec::new());
    }
    // By matrices and strips: [matrix][strip][m][row of the strip].
    let parts = matrices.iter().flat_map(|matrix| sizes(m * rows(matrix), m * BAND_ROWS));
    let strips =
        matrices.iter().flat_map(|matrix| (0..rows(matrix).div_ceil(BAND_ROWS)).map(move |strip| (matrix, strip)));
    let strips: Vec<_> = strips.collect();
    let input = Input::new(matrices, x, m);
    let y = zeros(parts, |parts| {
        run_parts(executor, parts, |index, y| {
            let ((matrix, strip), y) = (strips[index], y.zeros());
            BUFFERS.with_borrow_mut(|buffers| match (&input.rounded, &input.vector) {
                (Some(rows), _) if matrix.rounds() => matrix.strip_int8(strip, rows, &input.exact, buffers, y),
                (_, Some(x)) => matrix.strip_dot(strip, x, &mut buffers.pair, y),
                _ => matrix.strip_matmul(strip, x, m, buffers, y),
            })
        })
    })?;
    if m == 1 {
        return Ok(y);
    }
    unstrip(executor, &y, m, matrices.iter().map(rows), BAND_ROWS)
}

impl CompressedMatrix<'_> {
    /// `y = W·x`: `x` has one value for each column, the result one for each row.
    ///
    /// BF16 weights are multiplied as they are decoded, without passing through memory. The result is the same to the
    /// last bit for every backend, stage and number of threads, and for the uncompressed weights
    /// ([`crate::cpu::dot`] states the order of additions). INT8 weights with scales are multiplied with activations
    /// rounded to 8 bits unless [`Activations::Exact`] are asked for ([`crate::cpu::int8`] states what that costs); their
    /// products too are the same for every backend, stage and number of threads.
    ///
    /// # Errors
    /// If `x` does not fit, or a tile is damaged.
    pub fn matvec(&self, x: &[f32], executor: &impl Executor) -> Result<Vec<f32>> {
        self.matmul(x, 1, executor)
    }

    /// `Y = X·Wᵀ` for `m` rows of activations: `x` is `m × columns`, the result `m × rows`, both row-major. Each strip of
    /// 64 rows is decoded once and multiplied with all activations.
    ///
    /// # Errors
    /// If `x` does not fit, or a tile is damaged.
    pub fn matmul(&self, x: &[f32], m: usize, executor: &impl Executor) -> Result<Vec<f32>> {
        matmul_each(std::slice::from_ref(self), x, m, executor)
    }

    /// True if activations are rounded before they are multiplied.
    fn rounds(&self) -> bool {
        let plan = self.plan();
        self.activations() == Activations::Int8 && plan.kind == Kind::Int8 && plan.quantised()
    }

    /// Calls `each` with every band of a strip, from left to right, its first column, whether its symbols ended as they
    /// must, its buffers, and the raw bytes of the band after it. The symbols of two bands are decoded side by side.
    fn for_bands(
        &self,
        strip: usize,
        pair: &mut [DotScratch; 2],
        mut each: impl FnMut(&Band, usize, bool, &mut DotScratch, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let across = self.geometry().tile_cols();
        let first = strip * BAND_ROWS / TILE * across;
        let (end, band) = (first + across, strip % (TILE / BAND_ROWS));
        let [left, right] = pair;
        let mut each = |tile, band: &Band, col, done, scratch: &mut DotScratch, next: &[u8]| {
            each(band, col, done, scratch, next).map_err(|e| self.in_tile(tile, e))
        };
        let open = |tile: usize| (tile < end).then(|| self.open_band(tile, band));
        let mut next = open(first);
        let mut tile = first;
        while let Some(a) = next {
            let a = a?;
            let view = self.view(&a);
            let Some(b) = open(tile + 1).transpose()? else {
                let [done] = cpu::symbols(self.backend(), [&view], [&mut left.scratch]);
                return each(tile, &view, a.rect.col, done, left, &[]);
            };
            let other = self.view(&b);
            next = open(tile + 2);
            let done = cpu::symbols(self.backend(), [&view, &other], [&mut left.scratch, &mut right.scratch]);
            each(tile, &view, a.rect.col, done[0], left, other.bytes.raw)?;
            each(tile + 1, &other, b.rect.col, done[1], right, self.raw_bytes(&next))?;
            tile += 2;
        }
        Ok(())
    }

    /// The raw bytes of a band, for those who fetch them early; none if there is no band, or a damaged one.
    fn raw_bytes<'s>(&'s self, band: &'s Option<Result<OpenBand<'s>>>) -> &'s [u8] {
        match band {
            Some(Ok(opened)) => self.view(opened).bytes.raw,
            _ => &[],
        }
    }

    /// The rows of one strip of bands times `x`.
    fn strip_dot(&self, strip: usize, x: &Activation, pair: &mut [DotScratch; 2], y: &mut [f32]) -> Result<()> {
        self.for_bands(strip, pair, |band, col, done, scratch, _| {
            dot_band(self.backend(), band, done, scratch, x, col, y)
        })
    }

    /// The rows of one strip of INT8 bands times rounded activations, except for those given as they are: `y` is
    /// `activations × rows of the strip`.
    fn strip_int8(
        &self,
        strip: usize,
        x: &Rows,
        exact: &[(usize, Activation)],
        buffers: &mut Buffers,
        y: &mut [f32],
    ) -> Result<()> {
        let Buffers { pair, packed, .. } = buffers;
        self.for_bands(strip, pair, |band, col, done, scratch, next| {
            let weights = int8::decode(self.backend(), band, done, &mut scratch.scratch, &mut scratch.padded)?;
            if x.len() == 1 {
                let weights = weights.followed_by(next);
                int8::dot(self.backend(), &weights, &band.scales, x, 0, col, y);
            } else {
                int8::matmul(self.backend(), &weights, &band.scales, x, col, y, packed);
            }
            Ok(())
        })?;
        let n = y.len() / x.len();
        for (row, x) in exact {
            let y = &mut y[row * n..(row + 1) * n];
            y.fill(0.0);
            self.strip_dot(strip, x, pair, y)?;
        }
        Ok(())
    }

    /// `m` rows of activations times the rows of one strip of bands, which are decoded first: `y` is
    /// `m × rows of the strip`.
    fn strip_matmul(&self, strip: usize, x: &[f32], m: usize, buffers: &mut Buffers, y: &mut [f32]) -> Result<()> {
        let Geometry { rows, cols } = self.geometry();
        let Buffers { pair, weights, .. } = buffers;
        let n = BAND_ROWS.min(rows - strip * BAND_ROWS);
        weights.resize(n * cols, 0.0);
        self.for_bands(strip, pair, |band, col, done, scratch, _| {
            cpu::dot::values(self.backend(), band, done, scratch, &mut weights[col..], cols)
        })?;
        // y[m][n] = Σ x[m][k] · w[n][k]
        let shape = Gemm { m, n, k: cols, a: [cols, 1], b: [1, cols], c: [n, 1], add: false };
        gemm(&shape, x, weights, y);
        Ok(())
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
        run_parts(executor, x.chunks_mut((m * TILE).max(1)).collect(), |column, x| {
            BUFFERS.with_borrow_mut(|Buffers { pair: [scratch, _], weights, .. }| {
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
        unstrip(executor, &x, m, std::iter::once(cols), TILE)
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
        cpu::dot::values(self.backend(), &view, done, scratch, out, stride).map_err(|e| self.in_tile(tile, e))
    }

    fn expect(&self, what: &str, got: usize, need: usize) -> Result<()> {
        let Geometry { rows, cols } = self.geometry();
        if got == need {
            return Ok(());
        }
        Err(Error::Invalid(format!("{what} has {got} values, a product with the {rows}x{cols} matrix needs {need}")))
    }
}

/// For each of some matrices, of so many columns, one after the other: what stands in `y` as `[part][m][index in the part]`,
/// with parts of `size` columns but the last, as `[m][index]`.
pub(super) fn unstrip(
    executor: &impl Executor,
    y: &[f32],
    m: usize,
    totals: impl Iterator<Item = usize> + Clone,
    size: usize,
) -> Result<Vec<f32>> {
    // Of each row where its matrix begins.
    let mut starts = Vec::new();
    let mut start = 0;
    for total in totals.clone() {
        starts.extend((0..m).map(|row| (start, row)));
        start += m * total;
    }
    zeros(totals.flat_map(|total| std::iter::repeat_n(total, m)), |parts| {
        run_parts(executor, parts, |index, out| {
            let (start, row) = starts[index];
            let mut from = start;
            for out in out.zeros().chunks_mut(size) {
                out.copy_from_slice(&y[from + row * out.len()..][..out.len()]);
                from += m * out.len();
            }
            Ok(())
        })
    })
}

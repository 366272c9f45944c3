//! A matrix of ggml's block formats in memory, laid out for products.

use std::fmt;
use std::ops::Range;
use std::sync::Mutex;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::product::run_parts;
use super::{Executor, RayonExecutor};
use crate::codec::kquant::strip::{self, ROWS, StripFormat};
use crate::codec::kquant::{Activation, Format, GgmlType, Parts, dequantize, with_format};
use crate::codec::{Dtype, quant};
use crate::cpu::dot::dot;
use crate::cpu::gemm::{Gemm, gemm};
use crate::cpu::zeros::{Columns, zeros_by_columns};
use crate::cpu::{self, Backend, kquant};
use crate::{Error, Result};

/// Rows that are dequantised at a time for gradients.
const GRADIENT_ROWS: usize = 64;
/// Activations up to which a dense product is made of dot products.
const FEW: usize = 8;
/// Rows of a task: two strips.
const TASK: usize = kquant::STRIPS * ROWS;

/// A quantised matrix that takes the place of its blocks.
///
/// Formats of 2 to 8 bits are laid out in [`strip`]s; products quantise the activation to 8 bits, as ggml does, and are
/// the same to the last bit for every backend and number of threads. F32, F16, BF16, Q8_K and INT4_G128 keep their blocks;
/// products dequantise 32 rows at a time and multiply in `f32`.
pub struct KQuantMatrix {
    ty: GgmlType,
    rows: usize,
    cols: usize,
    store: Store,
    backend: Backend,
}

enum Store {
    /// Strips, in pages of their own: zeros cost nothing, and large pages make reading faster.
    Strips(memmap2::MmapMut),
    /// Blocks as they are in the file.
    Blocks(Vec<u8>),
}

impl KQuantMatrix {
    /// Lays out `rows × cols` weights given as blocks, row by row.
    ///
    /// # Errors
    /// If rows are not made of whole blocks, or `blocks` has another size; if there is no memory.
    pub fn new(ty: GgmlType, rows: usize, cols: usize, blocks: &[u8]) -> Result<KQuantMatrix> {
        KQuantMatrix::pack(ty, rows, cols, blocks, |row| row, &RayonExecutor, &|_| ())
    }

    /// As [`KQuantMatrix::new`], with the rows in another order: row `r` is the blocks' row `order(r)`. Whenever a part of
    /// `blocks` is no longer needed, `done` gets its range.
    ///
    /// # Errors
    /// As [`KQuantMatrix::new`].
    pub fn pack(
        ty: GgmlType,
        rows: usize,
        cols: usize,
        blocks: &[u8],
        order: impl Fn(usize) -> usize + Sync,
        executor: &impl Executor,
        done: &(dyn Fn(Range<usize>) + Sync),
    ) -> Result<KQuantMatrix> {
        let row_bytes = row_bytes(ty, rows, cols, blocks.len())?;
        let row = |r: usize| &blocks[order(r) * row_bytes..][..row_bytes];
        let strip_bytes = with_format!(ty, F => F::strip_bytes(cols / F::LEN), _ => 0);
        let store = if strip_bytes == 0 {
            let mut copy = Vec::with_capacity(blocks.len());
            (0..rows).for_each(|r| copy.extend_from_slice(row(r)));
            done(0..blocks.len());
            Store::Blocks(copy)
        } else {
            let bytes = rows.div_ceil(ROWS) * strip_bytes;
            let mut strips = memmap2::MmapMut::map_anon(bytes)
                .map_err(|e| Error::Invalid(format!("no memory for {bytes} bytes of weights: {e}")))?;
            // Advice only: without large pages all is the same but slower.
            #[cfg(target_os = "linux")]
            let _ = strips.advise(memmap2::Advice::HugePage);
            // A few megabytes for each thread at a time, so that what was read can be let go of soon.
            let step = (1 << 22) / strip_bytes + 1;
            for (first, part) in strips.chunks_mut(step * strip_bytes).enumerate() {
                let first = first * step;
                let parts: Vec<Mutex<&mut [u8]>> = part.chunks_mut(strip_bytes).map(Mutex::new).collect();
                executor.run(parts.len(), &|index| {
                    let start = (first + index) * ROWS;
                    let rows: Vec<&[u8]> = (start..rows.min(start + ROWS)).map(row).collect();
                    // Each part is locked by its own task only.
                    let mut out = parts[index].lock().unwrap_or_else(|e| e.into_inner());
                    with_format!(ty, F => strip::pack::<F>(&rows, cols / F::LEN, &mut out), _ => ());
                });
                done(first * ROWS * row_bytes..rows.min((first + parts.len()) * ROWS) * row_bytes);
            }
            Store::Strips(strips)
        };
        Ok(KQuantMatrix { ty, rows, cols, store, backend: Backend::current()? })
    }

    /// Multiplies with another backend, which must be available.
    pub fn with_backend(mut self, backend: Backend) -> KQuantMatrix {
        assert!(backend.available(), "backend {} is not available on this machine", backend.name());
        self.backend = backend;
        self
    }

    /// The format of its blocks.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that it takes.
    pub fn stored_bytes(&self) -> usize {
        match &self.store {
            Store::Strips(bytes) => bytes.len(),
            Store::Blocks(bytes) => bytes.len(),
        }
    }

    /// Values of an activation that share a scale when they are quantised for this matrix; `None` if they are not.
    pub fn activation_block(&self) -> Option<usize> {
        matches!(self.store, Store::Strips(_)).then(|| self.ty.block_len())
    }

    /// Row `row` as `f32`s, equal to what its blocks dequantise to.
    ///
    /// # Errors
    /// If there is no such row, or `out` has another length than it.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        if row >= self.rows || out.len() != self.cols {
            let (rows, cols) = (self.rows, self.cols);
            return Err(Error::Invalid(format!("row {row} into {} values of a {rows}x{cols} matrix", out.len())));
        }
        match &self.store {
            Store::Blocks(blocks) => {
                let bytes = blocks.len() / self.rows;
                let blocks = &blocks[row * bytes..][..bytes];
                cpu::vectorize(
                    self.backend,
                    #[inline(always)]
                    || match self.ty {
                        GgmlType::F32 => quant::to_f32s(Dtype::F32, blocks, out),
                        GgmlType::F16 => f16s(blocks, out),
                        GgmlType::BF16 => quant::to_f32s(Dtype::Bf16, blocks, out),
                        _ => dequantize(self.ty, blocks, out),
                    },
                );
            }
            Store::Strips(strips) => with_format!(self.ty, F => {
                let (blocks, r) = (self.cols / F::LEN, row % ROWS);
                let strip = &strips[row / ROWS * F::strip_bytes(blocks)..][..F::strip_bytes(blocks)];
                let (quants, metas) = strip.split_at(blocks * F::QUANTS);
                let mut parts = Parts::default();
                for (b, out) in out.chunks_exact_mut(F::LEN).enumerate() {
                    strip::row_parts::<F>(&quants[b * F::QUANTS..], &metas[b * F::META..], r, &mut parts);
                    parts::weights::<F>(&parts, out);
                }
            }, _ => ()),
        }
        Ok(())
    }

    /// `Y = X·Wᵀ` for `m` rows of activations: `x` is `m × columns`, the result `m × rows`, both row-major.
    ///
    /// # Errors
    /// If `x` does not fit.
    pub fn matmul(&self, x: &[f32], m: usize, executor: &impl Executor) -> Result<Vec<f32>> {
        kquant_matmul_each(&[self], x, m, executor)
    }

    /// `X = Y·W` for `m` rows of gradients: `y` is `m × rows`, the result `m × columns`, both row-major. What
    /// back-propagation through [`KQuantMatrix::matmul`] needs; `W` is dequantised 64 rows at a time.
    ///
    /// # Errors
    /// If `y` does not fit.
    pub fn matmul_transposed(&self, y: &[f32], m: usize, executor: &impl Executor) -> Result<Vec<f32>> {
        let (rows, cols) = (self.rows, self.cols);
        if m.checked_mul(rows) != Some(y.len()) {
            return Err(Error::Invalid(format!("{} gradients are not {m} rows for a {rows}x{cols} matrix", y.len())));
        }
        let mut x = vec![0.0; m * cols];
        let mut weights = vec![0.0; GRADIENT_ROWS.min(rows) * cols];
        for first in (0..rows).step_by(GRADIENT_ROWS) {
            let k = GRADIENT_ROWS.min(rows - first);
            let parts = weights[..k * cols].chunks_mut(cols).collect();
            run_parts(executor, parts, |row, out| self.dequantize_row(first + row, out))?;
            // x[m][n] += Σ y[m][k] · w[k][n]
            let shape = Gemm { m: 1, n: cols, k, a: [rows, 1], b: [cols, 1], c: [cols, 1], add: true };
            let parts = x.chunks_mut(cols).collect();
            run_parts(executor, parts, |row, x| {
                gemm(&shape, &y[row * rows + first..], &weights, x);
                Ok(())
            })?;
        }
        Ok(x)
    }

    /// Fills the columns of some rows, a multiple of a strip's or the last, with their products.
    fn task(&self, rows: Range<usize>, x: &Prepared, bias: &[i32], y: &mut Columns) -> Result<()> {
        let Store::Strips(strips) = &self.store else { return self.dense_task(rows, x, y) };
        let x = x.quantized(self.ty.block_len())?;
        let strip_bytes = strips.len() / self.rows.div_ceil(ROWS);
        let first = rows.start / ROWS;
        let count = rows.len().div_ceil(ROWS);
        let strips = &strips[first * strip_bytes..(first + count) * strip_bytes];
        if rows.len() == count * ROWS {
            kquant::product(self.backend, self.ty, strips, x, bias, y);
            return Ok(());
        }
        // The last strip has rows that the matrix has not.
        let mut wide = vec![0.0; x.rows * count * ROWS];
        kquant::product(self.backend, self.ty, strips, x, bias, &mut Columns::of(&mut wide, count * ROWS));
        for (row, wide) in wide.chunks_exact(count * ROWS).enumerate() {
            y.row(row).copy_from_slice(&wide[..rows.len()]);
        }
        Ok(())
    }

    /// The same with dequantised rows.
    fn dense_task(&self, rows: Range<usize>, x: &Prepared, y: &mut Columns) -> Result<()> {
        let (n, k) = (rows.len(), self.cols);
        let mut weights = vec![0.0; n * k];
        for (row, weights) in rows.zip(weights.chunks_exact_mut(k)) {
            self.dequantize_row(row, weights)?;
        }
        if x.rows <= FEW {
            for (row, x) in x.values.chunks_exact(k).enumerate() {
                for (y, weights) in y.row(row).iter_mut().zip(weights.chunks_exact(k)) {
                    *y = dot(self.backend, weights, x);
                }
            }
            return Ok(());
        }
        // y[m][n] = Σ x[m][k] · w[n][k]
        let mut products = vec![0.0; x.rows * n];
        let shape = Gemm { m: x.rows, n, k, a: [k, 1], b: [1, k], c: [n, 1], add: false };
        gemm(&shape, x.values, &weights, &mut products);
        for (row, products) in products.chunks_exact(n).enumerate() {
            y.row(row).copy_from_slice(products);
        }
        Ok(())
    }

    fn expect(&self, got: usize, m: usize) -> Result<()> {
        if m.checked_mul(self.cols) == Some(got) {
            return Ok(());
        }
        let (rows, cols) = (self.rows, self.cols);
        Err(Error::Invalid(format!("{got} activations are not {m} rows for a {rows}x{cols} matrix")))
    }
}

/// Bytes of a row of a matrix that `bytes` bytes of blocks are said to hold.
pub(crate) fn row_bytes(ty: GgmlType, rows: usize, cols: usize, bytes: usize) -> Result<usize> {
    let row_bytes = ty.row_bytes(cols).ok_or_else(|| {
        let allowed = format!("rows of whole {ty} blocks: a multiple of {} columns", ty.block_len());
        Error::field("shape", format!("{rows}x{cols}"), allowed)
    })?;
    if row_bytes.checked_mul(rows) != Some(bytes) || row_bytes == 0 {
        let text = format!("{bytes} bytes are no {rows}x{cols} matrix of {ty}, which has {row_bytes} a row");
        return Err(Error::Invalid(text));
    }
    Ok(row_bytes)
}

/// `f16`s to `f32`s, many at once: one by one each would ask again whether the CPU has an instruction for it.
fn f16s(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [f16::ZERO; 64];
    for (bytes, out) in bytes.chunks(2 * halves.len()).zip(out.chunks_mut(halves.len())) {
        for (half, &bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *half = f16::from_le_bytes(bytes);
        }
        halves[..out.len()].convert_to_f32_slice(out);
    }
}

/// Activations, made ready once for all matrices.
struct Prepared<'a> {
    values: &'a [f32],
    rows: usize,
    quantized: Vec<Activation>,
}

impl Prepared<'_> {
    /// Quantised in blocks of `block` values.
    fn quantized(&self, block: usize) -> Result<&Activation> {
        let found = self.quantized.iter().find(|x| x.block == block);
        found.ok_or_else(|| Error::Invalid(format!("activations were not quantised in blocks of {block}")))
    }
}

/// Quantises `m` rows of activations.
fn quantize(backend: Backend, x: &[f32], m: usize, block: usize, executor: &impl Executor) -> Activation {
    let cols = x.len() / m;
    let mut activation = Activation::zeros(m, cols, block);
    let rows: Vec<_> = activation.rows_mut().zip(x.chunks_exact(cols)).map(Mutex::new).collect();
    let quantize = |index: usize| {
        let mut pair = rows[index].lock().unwrap_or_else(|e| e.into_inner());
        let (row, x) = &mut *pair;
        cpu::vectorize(
            backend,
            #[inline(always)]
            || row.quantize(x),
        );
    };
    // A few rows are not worth waking other threads.
    if m < 4 {
        (0..m).for_each(quantize)
    } else {
        executor.run(m, &quantize)
    }
    drop(rows);
    activation
}

/// [`KQuantMatrix::matmul`] for several matrices of as many columns, in one parallel region: the results, each `m × rows`
/// of its matrix and row-major, stand one after another, with the bits of separate products. Activations are quantised
/// once for all matrices with blocks of the same length.
///
/// # Errors
/// If `x` does not fit one of the matrices.
pub fn kquant_matmul_each(
    matrices: &[&KQuantMatrix],
    x: &[f32],
    m: usize,
    executor: &impl Executor,
) -> Result<Vec<f32>> {
    matrices.iter().try_for_each(|matrix| matrix.expect(x.len(), m))?;
    let Some(first) = matrices.first().filter(|_| m > 0) else { return Ok(Vec::new()) };
    let mut blocks: Vec<usize> = matrices.iter().filter_map(|matrix| matrix.activation_block()).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let quantized = blocks.into_iter().map(|block| quantize(first.backend, x, m, block, executor)).collect();
    let x = Prepared { values: x, rows: m, quantized };
    let (mut tasks, mut biases) = (Vec::new(), Vec::new());
    for (index, matrix) in matrices.iter().enumerate() {
        tasks.extend((0..matrix.rows.div_ceil(TASK)).map(|task| (index, task)));
        let quantized = matrix.activation_block().map(|block| x.quantized(block)).transpose()?;
        biases.push(quantized.map_or(Vec::new(), |x| kquant::bias(matrix.ty, x)));
    }
    zeros_by_columns(m, matrices.iter().map(|matrix| matrix.rows), TASK, |parts| {
        run_parts(executor, parts, |task, y| {
            let (index, task) = tasks[task];
            let matrix = matrices[index];
            let rows = task * TASK..matrix.rows.min((task + 1) * TASK);
            matrix.task(rows, &x, &biases[index], &mut y.zeros())
        })
    })
}

impl fmt::Debug for KQuantMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KQuantMatrix({}x{} {})", self.rows, self.cols, self.ty)
    }
}

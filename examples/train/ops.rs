//! The parts of a Llama between its matrix products as fused operations with gradients, on the CPU in `f32`.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, bail};

fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("the tensor is not contiguous"),
    }
}

/// Calls `f` with the values of all tensors.
fn with<const N: usize, R>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> R) -> Result<R> {
    let owned: Vec<Tensor> = tensors.iter().map(|t| t.contiguous()).collect::<Result<_>>()?;
    let guards: Vec<_> = owned.iter().map(|t| t.storage_and_layout()).collect();
    let mut slices = [&[][..]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let Storage::Cpu(storage) = &**storage else { bail!("training runs on the CPU") };
        *slice = floats(storage, layout)?;
    }
    Ok(f(slices))
}

fn tensor(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), like.device())
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (heads, tails) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = heads.remainder().iter().zip(tails.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in heads.zip(tails) {
        (0..16).for_each(|i| sums[i] += x[i] * y[i]);
    }
    sums.iter().sum::<f32>() + rest
}

/// `x / rms(x) * weight` over the last dimension.
pub struct RmsNorm(pub f32);

impl RmsNorm {
    fn scale(&self, row: &[f32]) -> f32 {
        (dot(row, row) / row.len() as f32 + self.0).sqrt().recip()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (xs, weight) = (floats(x, lx)?, floats(w, lw)?);
        let mut out = vec![0f32; xs.len()];
        for (row, out) in xs.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
            let scale = self.scale(row);
            out.iter_mut().zip(row).zip(weight).for_each(|((o, x), w)| *o = x * scale * w);
        }
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = with([x, w, grad], |[xs, weight, grad]| {
            let n = weight.len();
            let (mut dx, mut dw) = (vec![0f32; xs.len()], vec![0f32; n]);
            let mut gw = vec![0f32; n];
            for ((row, g), dx) in xs.chunks_exact(n).zip(grad.chunks_exact(n)).zip(dx.chunks_exact_mut(n)) {
                let scale = self.scale(row);
                (0..n).for_each(|i| gw[i] = g[i] * weight[i]);
                (0..n).for_each(|i| dw[i] += g[i] * row[i] * scale);
                let pull = dot(&gw, row) * scale * scale * scale / n as f32;
                (0..n).for_each(|i| dx[i] = gw[i] * scale - row[i] * pull);
            }
            (dx, dw)
        })?;
        Ok((Some(tensor(dx, x)?), Some(tensor(dw, w)?)))
    }
}

/// `silu(gate) * up`.
pub struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, g: &CpuStorage, lg: &Layout, u: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = floats(g, lg)?.iter().zip(floats(u, lu)?).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        Ok((CpuStorage::F32(out), lg.shape().clone()))
    }

    fn bwd(&self, g: &Tensor, u: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dg, du) = with([g, u, grad], |[gate, up, grad]| {
            let (mut dg, mut du) = (vec![0f32; gate.len()], vec![0f32; gate.len()]);
            for i in 0..gate.len() {
                let sigmoid = 1.0 / (1.0 + (-gate[i]).exp());
                let silu = gate[i] * sigmoid;
                dg[i] = grad[i] * up[i] * (sigmoid + silu * (1.0 - sigmoid));
                du[i] = grad[i] * silu;
            }
            (dg, du)
        })?;
        Ok((Some(tensor(dg, g)?), Some(tensor(du, u)?)))
    }
}

/// Softmax of `scale * x` over the positions up to a row's own; rows count `steps` positions, again and again.
pub struct CausalSoftmax {
    /// Number of positions, and of columns.
    pub steps: usize,
    /// Factor on the scores.
    pub scale: f32,
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let xs = floats(x, layout)?;
        let mut out = vec![0f32; xs.len()];
        for (i, (row, out)) in xs.chunks_exact(self.steps).zip(out.chunks_exact_mut(self.steps)).enumerate() {
            let seen = i % self.steps + 1;
            let max = row[..seen].iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let mut sum = 0.0;
            for (o, x) in out[..seen].iter_mut().zip(row) {
                *o = ((x - max) * self.scale).exp();
                sum += *o;
            }
            out[..seen].iter_mut().for_each(|o| *o /= sum);
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let n = self.steps;
        let dx = with([res, grad], |[p, grad]| {
            let mut dx = vec![0f32; p.len()];
            let rows = p.chunks_exact(n).zip(grad.chunks_exact(n)).zip(dx.chunks_exact_mut(n));
            for (i, ((p, g), dx)) in rows.enumerate() {
                let seen = i % n + 1;
                let mean = dot(&p[..seen], &g[..seen]);
                (0..seen).for_each(|i| dx[i] = self.scale * p[i] * (g[i] - mean));
            }
            dx
        })?;
        Ok(Some(tensor(dx, x)?))
    }
}

/// Rotary embedding of `(…, positions, head)`: the first half of a head with the second, as Hugging Face has it.
#[derive(Clone)]
pub struct Rope {
    /// Cosine and sine for each position and half a head.
    table: Arc<Vec<(f32, f32)>>,
    half: usize,
    steps: usize,
    inverse: bool,
}

impl Rope {
    /// For `steps` positions and heads of `size`.
    pub fn new(steps: usize, size: usize, theta: f32) -> Self {
        let half = size / 2;
        let angle = |step: usize, i: usize| step as f32 / theta.powf(2.0 * i as f32 / size as f32);
        let table = (0..steps * half).map(|at| angle(at / half, at % half)).map(|a| (a.cos(), a.sin())).collect();
        Self { table: Arc::new(table), half, steps, inverse: false }
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let xs = floats(x, layout)?;
        let mut out = vec![0f32; xs.len()];
        let (half, size) = (self.half, 2 * self.half);
        let sign = if self.inverse { -1.0 } else { 1.0 };
        for (i, (row, out)) in xs.chunks_exact(size).zip(out.chunks_exact_mut(size)).enumerate() {
            let angles = &self.table[i % self.steps * half..][..half];
            for (j, (cos, sin)) in angles.iter().enumerate() {
                out[j] = row[j] * cos - row[j + half] * sin * sign;
                out[j + half] = row[j + half] * cos + row[j] * sin * sign;
            }
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Self { inverse: !self.inverse, ..self.clone() };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&back)?))
    }
}

/// Mean of `-log softmax(row)[target]`.
pub struct CrossEntropy(pub Vec<u32>);

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let xs = floats(x, layout)?;
        let mut total = 0f64;
        for (row, &target) in xs.chunks_exact(xs.len() / self.0.len()).zip(&self.0) {
            let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let sum: f32 = row.iter().map(|x| (x - max).exp()).sum();
            total += f64::from(sum.ln() + max - row[target as usize]);
        }
        Ok((CpuStorage::F32(vec![(total / self.0.len() as f64) as f32]), Shape::from(())))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let factor = grad.to_scalar::<f32>()? / self.0.len() as f32;
        let dx = with([x], |[xs]| {
            let n = xs.len() / self.0.len();
            let mut dx = vec![0f32; xs.len()];
            for ((row, dx), &target) in xs.chunks_exact(n).zip(dx.chunks_exact_mut(n)).zip(&self.0) {
                let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                dx.iter_mut().zip(row).for_each(|(d, x)| *d = (x - max).exp());
                let scale = factor / dx.iter().sum::<f32>();
                dx.iter_mut().for_each(|d| *d *= scale);
                dx[target as usize] -= factor;
            }
            dx
        })?;
        Ok(Some(tensor(dx, x)?))
    }
}

//! What stands between the products of a Llama and takes each value once: the gated activation, and a residual's sum with
//! its norm.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Module, Result, Shape, Tensor};
use candle_nn::RmsNorm;

use super::attention::{plain, values};
use super::{PoolExecutor, kept};
use crate::cpu::softmax::{add_norm, silu_mul};
use crate::cpu::zeros::{sizes, zeros};
use crate::cpu::{Backend, vectorize};
use crate::matrix::run_parts;

/// Values of a task of the gated activation.
const VALUES: usize = 1 << 14;

/// True if a GPU's kernels can compute with these: one dtype, and nothing differentiates them.
fn takes(tensors: &[&Tensor]) -> bool {
    #[cfg(feature = "cuda")]
    {
        let first = tensors[0].dtype();
        let ready = |t: &&Tensor| t.device().is_cuda() && t.dtype() == first && t.is_contiguous() && !t.track_op();
        crate::cuda::takes(tensors[0]) && tensors.iter().all(ready)
    }
    #[cfg(not(feature = "cuda"))]
    {
        _ = tensors;
        false
    }
}

/// `gate.silu() · up` of two tensors of one shape.
///
/// # Errors
/// If the shapes differ.
pub fn gated(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let ready = (plain(&[gate, up]) || takes(&[gate, up]))
        && gate.is_contiguous()
        && up.is_contiguous()
        && gate.shape() == up.shape();
    if ready { gate.apply_op2_no_bwd(up, &Gated).map(kept) } else { gate.silu()? * up }
}

struct Gated;

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = l1.shape().elem_count();
        let (gate, up) = (&values(s1, l1)?[..n], &values(s2, l2)?[..n]);
        let backend = Backend::current()?;
        let out = zeros(sizes(n, VALUES), |parts| {
            run_parts(&PoolExecutor, parts, |part, out| {
                let out = out.zeros();
                let range = part * VALUES..part * VALUES + out.len();
                let (gate, up) = (&gate[range.clone()], &up[range]);
                vectorize(
                    backend,
                    #[inline(always)]
                    || silu_mul(gate, up, out),
                );
                Ok(())
            })
        })?;
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, gate: &CudaStorage, l1: &Layout, up: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::gated((gate, l1), (up, l2))?, l1.shape().clone()))
    }
}

/// The norm of a Llama's activations, `x / √(mean(x²) + epsilon) · weight`.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    norm: RmsNorm,
    weight: Tensor,
    epsilon: f64,
}

impl Norm {
    pub fn new(weight: Tensor, epsilon: f64) -> Norm {
        Norm { norm: RmsNorm::new(weight.clone(), epsilon), weight, epsilon }
    }

    /// `x + y` and its norm, in one pass or launch. The norm is that of the rounded sum.
    pub fn add(&self, x: &Tensor, y: &Tensor) -> Result<(Tensor, Tensor)> {
        let all = [x, y, &self.weight];
        let fits = x.shape() == y.shape() && x.dims().last() == self.weight.dims().last();
        if fits && plain(&all) && all.iter().all(|t| t.is_contiguous()) {
            let both = x.apply_op3_no_bwd(y, &self.weight, &AddNorm(self.epsilon as f32))?;
            return Ok((both.get(0)?, both.get(1)?));
        }
        #[cfg(feature = "cuda")]
        if fits && takes(&all) {
            // One after the other.
            let shape = [&[2], x.dims()].concat();
            let both = super::on_gpu([x, y, &self.weight], shape, |[x, y, weight]| {
                crate::cuda::add_norm(x, Some(y), weight, self.epsilon as f32)
            })?;
            return Ok((both.get(0)?, both.get(1)?));
        }
        let sum = (y + x)?;
        let norm = self.norm.forward(&sum)?;
        Ok((sum, norm))
    }
}

impl Module for Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if takes(&[x, &self.weight]) && x.dims().last() == self.weight.dims().last() {
            return super::on_gpu([x, &self.weight], x.shape(), |[x, weight]| {
                crate::cuda::add_norm(x, None, weight, self.epsilon as f32)
            });
        }
        self.norm.forward(x)
    }
}

/// The sum, then its norm.
struct AddNorm(f32);

impl CustomOp3 for AddNorm {
    fn name(&self) -> &'static str {
        "add-rms-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, width) = (l1.shape().elem_count(), l3.shape().elem_count());
        let (x, y, weight) = (&values(s1, l1)?[..n], &values(s2, l2)?[..n], &values(s3, l3)?[..width]);
        let backend = Backend::current()?;
        let rows = width.max(1) * (VALUES / width.max(1)).max(1);
        let out = zeros(sizes(n, rows).chain(sizes(n, rows)), |mut sums| {
            let norms = sums.split_off(sums.len() / 2);
            run_parts(&PoolExecutor, sums.into_iter().zip(norms).collect(), |part, (sums, norms)| {
                let at = part * rows;
                let both = x[at..].chunks_exact(width).zip(y[at..].chunks_exact(width));
                let out = sums.zeros().chunks_exact_mut(width).zip(norms.zeros().chunks_exact_mut(width));
                vectorize(
                    backend,
                    #[inline(always)]
                    || {
                        // A loop, as `for_each` would be compiled without the backend's instructions.
                        for ((x, y), (sum, norm)) in both.zip(out) {
                            add_norm(x, y, weight, self.0, sum, norm);
                        }
                    },
                );
                Ok(())
            })
        })?;
        Ok((CpuStorage::F32(out), Shape::from([&[2], l1.dims()].concat())))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn gates_are_those_of_candle_s_operations() {
        let [gate, up] = [(); 2].map(|()| Tensor::randn(0f32, 3.0, (2, 3, 9000), &Device::Cpu).unwrap());
        let y = gated(&gate, &up).unwrap();
        let exact = (gate.silu().unwrap() * &up).unwrap();
        let error = (&y - &exact).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-5 && y.dims() == [2, 3, 9000], "{error}");
        let strided = gated(&gate.transpose(0, 1).unwrap(), &up.transpose(0, 1).unwrap()).unwrap();
        assert_eq!(strided.dims(), [3, 2, 9000]);
        assert!(gated(&gate, &up.narrow(0, 0, 1).unwrap()).is_err());
    }

    #[test]
    fn sums_and_norms_are_those_of_candle_s_operations() {
        for (rows, width) in [(1, 1), (3, 70), (40, 1031), (0, 8)] {
            let [x, y] = [(); 2].map(|()| Tensor::randn(0f32, 2.0, (rows, width), &Device::Cpu).unwrap());
            let norm = Norm::new(Tensor::randn(1f32, 0.3, width, &Device::Cpu).unwrap(), 1e-5);
            let (sum, normed) = norm.add(&x, &y).unwrap();
            let exact = (&x + &y).unwrap();
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(&sum), values(&exact));
            let exact = norm.forward(&exact).unwrap();
            assert_eq!(normed.dims(), exact.dims());
            for (a, b) in values(&normed).into_iter().zip(values(&exact)) {
                assert!((a - b).abs() <= 1e-5 * b.abs(), "{rows}x{width}: {a}, not {b}");
            }
        }
    }
}

//! Rotations and attention, each in one pass: on the CPU for any tokens, on a GPU for one new token, whose key and value
//! are written to the cache on the way.

use std::cell::RefCell;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::PoolExecutor;
use crate::cpu::gemm::{Gemm, gemm};
use crate::cpu::softmax::softmax;
use crate::cpu::zeros::{Part, sizes, zeros};
use crate::cpu::{Backend, vectorize};
use crate::matrix::run_parts;

/// Queries of a head that are scored at a time: their scores fit the second-level cache for contexts of thousands.
const QUERIES: usize = 32;

thread_local! {
    /// A task's scores.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// True if these can be computed here: `f32`s on the CPU that nothing differentiates.
pub(super) fn plain(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == candle_core::DType::F32 && !t.track_op())
}

/// A tensor's `f32`s from its first on.
pub(super) fn values<'s>(storage: &'s CpuStorage, layout: &Layout) -> Result<&'s [f32]> {
    Ok(&storage.as_slice::<f32>()?[layout.start_offset()..])
}

/// Rotates queries or keys `[batch, heads, tokens, size]`, of any strides but the last: pairs of a value and that half a
/// head further on turn by the angles whose cosines and sines are `[tokens, size / 2]`. The result is contiguous.
///
/// # Errors
/// If the shapes do not fit.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if !plain(&[x, cos, sin]) || x.stride().last() != Some(&1) || !cos.is_contiguous() || !sin.is_contiguous() {
        return candle_nn::rotary_emb::rope(&x.contiguous()?, cos, sin);
    }
    x.apply_op3_no_bwd(cos, sin, &Rope)
}

struct Rope;

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
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
        let (batch, heads, tokens, size) = l1.shape().dims4()?;
        if [l2, l3].iter().any(|l| l.dims() != [tokens, size / 2]) || !size.is_multiple_of(2) {
            bail!("rope: angles of {:?} and {:?} do not fit {:?}", l2.dims(), l3.dims(), l1.dims())
        }
        let (x, cos, sin) = (values(s1, l1)?, values(s2, l2)?, values(s3, l3)?);
        let (half, stride) = (size / 2, l1.stride());
        let turn = |head: usize, y: Part| {
            let y = y.zeros();
            let x = &x[head / heads * stride[0] + head % heads * stride[1]..];
            for (token, y) in y.chunks_exact_mut(size).enumerate() {
                let (a, b) = x[token * stride[2]..][..size].split_at(half);
                let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
                let (y, z) = y.split_at_mut(half);
                for i in 0..half {
                    (y[i], z[i]) = (a[i] * cos[i] - b[i] * sin[i], a[i] * sin[i] + b[i] * cos[i]);
                }
            }
            Ok(())
        };
        let y = zeros(sizes(batch * heads * tokens * size, tokens * size), |parts| {
            if tokens == 1 {
                // Not worth waking other threads.
                return parts.into_iter().enumerate().try_for_each(|(head, y)| turn(head, y));
            }
            run_parts(&PoolExecutor, parts, turn)
        })?;
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }
}

/// Causal attention of queries `[batch, heads, rows, size]`, whose first stands at `position`, to keys and values
/// `[batch, kv_heads, ≥ position + rows, size]`: `[batch, rows, heads · size]`, in one parallel region and without
/// copies of keys or values. `None` if the tensors are not `f32`s on the CPU, or are differentiated.
///
/// # Errors
/// If the shapes do not fit.
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, position: usize) -> Result<Option<Tensor>> {
    if !plain(&[q, k, v]) || !q.is_contiguous() {
        return Ok(None);
    }
    q.apply_op3_no_bwd(k, v, &Causal(position)).map(Some)
}

/// Attention of queries that start at this position.
struct Causal(usize);

impl CustomOp3 for Causal {
    fn name(&self) -> &'static str {
        "causal-attention"
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
        let (batch, heads, rows, size) = l1.shape().dims4()?;
        let (b, kv_heads, held, d) = l2.shape().dims4()?;
        let end = self.0 + rows;
        if (b, d) != (batch, size)
            || kv_heads == 0
            || !heads.is_multiple_of(kv_heads)
            || held < end
            || l2.dims() != l3.dims()
        {
            bail!("attention: queries {:?} do not fit keys {:?} and values {:?}", l1.dims(), l2.dims(), l3.dims())
        }
        if [l2, l3].iter().any(|l| l.stride()[3] != 1) {
            bail!("attention: keys and values must be contiguous in their last dimension")
        }
        let (q, k, v) = (&values(s1, l1)?[..l1.shape().elem_count()], values(s2, l2)?, values(s3, l3)?);
        let (scale, backend) = (1.0 / (size as f32).sqrt(), Backend::current()?);
        // A token's queries that share keys are scored together; a prompt's in blocks, head by head.
        let shared = if rows == 1 { heads / kv_heads } else { 1 };
        let (count, blocks) = (heads / shared, rows.div_ceil(QUERIES));
        // By batch, heads and blocks: [..][query][size].
        let block = if rows == 1 { shared * size } else { QUERIES * size };
        let parts = std::iter::repeat_n(shared * rows * size, batch * count).flat_map(|head| sizes(head, block));
        let attend = |task: usize, y: Part| {
            let y = y.zeros();
            let (index, first) = (task / blocks, task % blocks * QUERIES);
            let (b, head) = (index / count, index % count * shared);
            let own = |layout: &Layout| b * layout.stride()[0] + head / (heads / kv_heads) * layout.stride()[1];
            let (k, v) = (&k[own(l2)..], &v[own(l3)..]);
            let queries = y.len() / size;
            let end = if rows == 1 { end } else { self.0 + first + queries };
            SCORES.with_borrow_mut(|scores| {
                scores.resize(scores.len().max(queries * end), 0.0);
                let scores = &mut scores[..queries * end];
                // scores[query][key] = Σ q[query][i] · k[key][i]
                let shape =
                    Gemm { m: queries, n: end, k: size, a: [size, 1], b: [1, l2.stride()[2]], c: [end, 1], add: false };
                gemm(&shape, &q[((b * heads + head) * rows + first) * size..], k, scores);
                for (query, scores) in scores.chunks_exact_mut(end).enumerate() {
                    let seen = if rows == 1 { end } else { self.0 + first + query + 1 };
                    let (scores, unseen) = scores.split_at_mut(seen);
                    unseen.fill(0.0);
                    vectorize(
                        backend,
                        #[inline(always)]
                        || softmax(scores, scale),
                    );
                }
                // y[query][i] = Σ scores[query][key] · v[key][i]
                let shape =
                    Gemm { m: queries, n: size, k: end, a: [end, 1], b: [l3.stride()[2], 1], c: [size, 1], add: false };
                gemm(&shape, scores, v, y);
            });
            Ok(())
        };
        let y = zeros(parts, |parts| run_parts(&PoolExecutor, parts, attend))?;
        let shape = Shape::from((batch, rows, heads * size));
        if rows == 1 {
            return Ok((CpuStorage::F32(y), shape));
        }
        // Heads side by side, as the next product takes them.
        let out = zeros(sizes(y.len(), heads * size), |lines| {
            run_parts(&PoolExecutor, lines, |line, out| {
                let (b, row) = (line / rows, line % rows);
                for (head, out) in out.zeros().chunks_exact_mut(size).enumerate() {
                    out.copy_from_slice(&y[((b * heads + head) * rows + row) * size..][..size]);
                }
                Ok(())
            })
        })?;
        Ok((CpuStorage::F32(out), shape))
    }
}

/// What [`attend_one`] finds in a cache.
pub(crate) struct Held<'a> {
    /// Keys and values `[batch, kv_heads, capacity, size]`.
    pub keys: &'a Tensor,
    pub values: &'a Tensor,
    /// Cosines and sines `[> position, size / 2]`.
    pub cos: &'a Tensor,
    pub sin: &'a Tensor,
    /// Where a CUDA graph finds the position whenever it is replayed (one U32); not for other calls.
    pub at: Option<&'a Tensor>,
}

/// On a GPU: rotates the queries `[batch, 1, heads · size]` and the key of the token at `position`, writes its key and value
/// `[batch, 1, kv_heads · size]` to the cache, and attends to all up to it: `[batch, 1, heads · size]`. `None`, with nothing
/// done, elsewhere, for dtypes and sizes without a kernel, or if anything is differentiated.
///
/// # Errors
/// If the shapes do not fit.
pub(crate) fn attend_one(q: &Tensor, k: &Tensor, v: &Tensor, held: Held, position: usize) -> Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    {
        let all = [q, k, v, held.keys, held.values, held.cos, held.sin];
        let size = held.keys.dims().last().copied().unwrap_or(0);
        let aligned = |t: &&Tensor| (t.layout().start_offset() * t.dtype().size_in_bytes()).is_multiple_of(16);
        let plain = |t: &&Tensor| {
            t.device().is_cuda() && t.dtype() == q.dtype() && t.is_contiguous() && !t.track_op() && aligned(t)
        };
        if crate::cuda::takes(q) && crate::cuda::attends_to(size) && all.iter().all(plain) {
            let one = |[q, k, v, keys, values, cos, sin]: [crate::cuda::Part; 7], at: Option<crate::cuda::Part>| {
                crate::cuda::OneToken { q, k, v, keys, values, cos, sin, position, at }.attend()
            };
            let Some(at) = held.at else { return super::on_gpu(all, q.shape(), |parts| one(parts, None)).map(Some) };
            let [q, k, v, keys, values, cos, sin] = all;
            let all = [q, k, v, keys, values, cos, sin, at];
            return super::on_gpu(all, q.shape(), |[q, k, v, keys, values, cos, sin, at]| {
                one([q, k, v, keys, values, cos, sin], Some(at))
            })
            .map(Some);
        }
    }
    _ = (q, k, v, held.keys, held.values, held.cos, held.sin, held.at, position);
    Ok(None)
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType, Device};

    use super::*;

    #[test]
    fn no_tokens_are_rotated_to_none() {
        let none = |shape| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let x = none(&[1, 0, 4, 8][..]).transpose(1, 2).unwrap();
        let angles = none(&[0, 4][..]);
        assert_eq!(rope(&x, &angles, &angles).unwrap().dims(), [1, 4, 0, 8]);
    }

    #[test]
    fn attention_is_that_of_candle_s_operations() {
        for (batch, heads, kv_heads, rows, position, size) in
            [(1, 1, 1, 1, 0, 2), (2, 6, 2, 1, 40, 16), (2, 6, 3, 70, 0, 16), (1, 4, 2, 33, 7, 8), (1, 8, 8, 32, 31, 4)]
        {
            let end = position + rows;
            let rand = |shape| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
            let q = rand((batch, heads, rows, size));
            let [k, v] = [(); 2].map(|()| rand((batch, kv_heads, end + 3, size)).narrow(2, 0, end).unwrap());
            let y = causal_attention(&q, &k, &v, position).unwrap().unwrap();
            let wide = |t: &Tensor| {
                let t = t.unsqueeze(2).unwrap().repeat((1, 1, heads / kv_heads, 1, 1)).unwrap();
                t.reshape((batch, heads, end, size)).unwrap().to_dtype(DType::F64).unwrap()
            };
            let q = (q.to_dtype(DType::F64).unwrap() / (size as f64).sqrt()).unwrap();
            let scores = q.matmul(&wide(&k).transpose(2, 3).unwrap().contiguous().unwrap()).unwrap();
            let mask =
                (0..rows).flat_map(|r| (0..end).map(move |c| if c > position + r { f64::NEG_INFINITY } else { 0.0 }));
            let mask = Tensor::from_vec(mask.collect(), (rows, end), &Device::Cpu).unwrap();
            let scores = scores.broadcast_add(&mask).unwrap();
            let weights = candle_nn::ops::softmax(&scores, D::Minus1).unwrap();
            let exact =
                weights.matmul(&wide(&v)).unwrap().transpose(1, 2).unwrap().reshape((batch, rows, heads * size));
            let error = (y.to_dtype(DType::F64).unwrap() - exact.unwrap()).unwrap().abs().unwrap().max_all().unwrap();
            assert!(error.to_scalar::<f64>().unwrap() < 3e-6, "{error}");
        }
        let q = Tensor::zeros((1, 4, 1, 8), DType::F32, &Device::Cpu).unwrap();
        let k = Tensor::zeros((1, 3, 1, 8), DType::F32, &Device::Cpu).unwrap();
        assert!(causal_attention(&q, &k, &k, 0).unwrap_err().to_string().contains("do not fit keys [1, 3, 1, 8]"));
        assert!(causal_attention(&q.to_dtype(DType::F64).unwrap(), &k, &k, 0).unwrap().is_none());
    }

    #[test]
    fn rotations_are_candle_s_to_the_last_bit() {
        for (batch, heads, tokens, size) in [(1, 4, 1, 8), (2, 3, 50, 16), (1, 1, 1, 2)] {
            let x =
                Tensor::randn(0f32, 1.0, (batch, tokens, heads, size), &Device::Cpu).unwrap().transpose(1, 2).unwrap();
            let [cos, sin] = [(); 2].map(|()| Tensor::randn(0f32, 1.0, (tokens, size / 2), &Device::Cpu).unwrap());
            let theirs = candle_nn::rotary_emb::rope(&x.contiguous().unwrap(), &cos, &sin).unwrap();
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(&rope(&x, &cos, &sin).unwrap()), bits(&theirs));
            assert!(rope(&x, &cos, &sin.narrow(1, 0, 1).unwrap()).is_err() || size == 2);
        }
    }
}

//! Causal self-attention with grouped queries.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Cache, Config, Weights};
use crate::nn::LinearLayer;
use crate::ops::causal_attention;

/// Queries that are scored at a time, so that a long prompt's scores do not grow with its square.
const QUERY_CHUNK: usize = 256;

/// The attention of one layer.
#[derive(Debug)]
pub(super) struct Attention<L> {
    q: L,
    k: L,
    v: L,
    o: L,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl<L: LinearLayer> Attention<L> {
    /// Loads `PREFIX.{q,k,v,o}_proj.weight`.
    pub(super) fn load<W: Weights<Linear = L>>(weights: &W, prefix: &str, config: &Config) -> crate::Result<Self> {
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (hidden, head_dim) = (config.hidden_size, config.hidden_size / heads);
        let linear = |name: &str, out, input| weights.linear(&format!("{prefix}.{name}_proj.weight"), out, input);
        Ok(Attention {
            q: linear("q", heads * head_dim, hidden)?,
            k: linear("k", kv_heads * head_dim, hidden)?,
            v: linear("v", kv_heads * head_dim, hidden)?,
            o: linear("o", hidden, heads * head_dim)?,
            heads,
            kv_heads,
            head_dim,
        })
    }

    /// `x` is `[batch, tokens, hidden]`, its first token at `position`; so is the result.
    pub(super) fn forward(&self, x: &Tensor, layer: usize, position: usize, cache: &mut Cache) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let split = |y: Tensor, heads: usize| y.reshape((batch, tokens, heads, self.head_dim))?.transpose(1, 2);
        let [q, k, v] = L::forward_each([&self.q, &self.k, &self.v], x)?;
        if let Some(y) = cache.attend_one(layer, position, [&q, &k, &v], self.kv_heads)? {
            return self.o.forward(&y);
        }
        let q = cache.rotate(&split(q, self.heads)?, position)?;
        let k = cache.rotate(&split(k, self.kv_heads)?, position)?;
        let v = split(v, self.kv_heads)?;
        let (k, v) = cache.append(layer, position, &k, &v)?;
        let (k, v) = (k.to_dtype(DType::F32)?, v.to_dtype(DType::F32)?);
        let q = q.to_dtype(DType::F32)?;
        if let Some(y) = causal_attention(&q, &k, &v, position)? {
            return self.o.forward(&y.to_dtype(x.dtype())?);
        }
        let q = (q * (1.0 / (self.head_dim as f64).sqrt()))?;
        let chunks = (0..tokens).step_by(QUERY_CHUNK).map(|start| {
            let rows = QUERY_CHUNK.min(tokens - start);
            self.attend(&q.narrow(2, start, rows)?, &k, &v, position + start)
        });
        let mut chunks = chunks.collect::<Result<Vec<Tensor>>>()?;
        let y = if chunks.len() == 1 { chunks.remove(0) } else { Tensor::cat(&chunks, 2)? };
        let y = y.transpose(1, 2)?.reshape((batch, tokens, self.heads * self.head_dim))?;
        self.o.forward(&y.to_dtype(x.dtype())?)
    }

    /// Queries `[batch, heads, rows, head_dim]` that start at `position`, against the keys and values up to each. The
    /// queries of heads that share keys are stacked, so neither keys nor values are repeated.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, position: usize) -> Result<Tensor> {
        let (batch, heads, rows, head_dim) = q.dims4()?;
        let (end, stacked) = (position + rows, heads / self.kv_heads * rows);
        let q = q.contiguous()?.reshape((batch, self.kv_heads, stacked, head_dim))?;
        let mut scores = q.matmul(&k.narrow(2, 0, end)?.transpose(D::Minus2, D::Minus1)?)?;
        if rows > 1 {
            let mask = causal_mask(rows, position, q.device())?;
            let apart = scores.reshape((batch, heads, rows, end))?.broadcast_add(&mask)?;
            scores = apart.reshape((batch, self.kv_heads, stacked, end))?;
        }
        let weights = candle_nn::ops::softmax_last_dim(&scores)?;
        weights.matmul(&v.narrow(2, 0, end)?)?.reshape((batch, heads, rows, head_dim))
    }
}

/// `[rows, position + rows]`: 0 where a query may look, −∞ behind it.
fn causal_mask(rows: usize, position: usize, device: &Device) -> Result<Tensor> {
    let end = position + rows;
    let mut mask = vec![0f32; rows * end];
    for (row, line) in mask.chunks_exact_mut(end).enumerate() {
        line[position + row + 1..].fill(f32::NEG_INFINITY);
    }
    Tensor::from_vec(mask, (rows, end), device)
}

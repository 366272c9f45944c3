//! ggml's block formats: what is in a block, and how blocks are laid out anew for products.
//!
//! 1. **[`parts`] is the truth**: each format's block unpacked into small integers and two floats. [`dequantize`] gives
//!    ggml's values, equal to the last bit.
//! 2. **[`strip`]** is the layout that products run on: blocks of 16 rows side by side, so that one vector holds 16 rows
//!    of 4 columns. It takes the place of the blocks, at the same number of bits but for scales and minima of Q4_K and
//!    Q5_K (8 bits instead of 6) and Q2_K and Q3_K likewise.
//! 3. **[`activation`]** quantises what the weights are multiplied by to 8 bits, once for all layers that share it.
//!
//! 4. **[`int4`]** makes blocks of AWQ's and GPTQ's tensors. They are kept as blocks on the CPU, which has no kernels of
//!    its own for them.
//!
//! The dot product itself is in [`crate::cpu::kquant`]. Every backend sums the same integers exactly and adds the same
//! floats in the same order, so results are equal to the last bit.

pub mod activation;
pub mod int4;
pub mod parts;
pub mod strip;
mod types;

use half::{bf16, f16};

pub use activation::Activation;
pub use int4::Int4Format;
pub use parts::{Format, Parts};
pub use types::GgmlType;

/// Runs `$body` with `$F` as the [`Format`] of a type, or `$other` for types that have none.
macro_rules! with_format {
    ($ty:expr, $F:ident => $body:expr, _ => $other:expr) => {{
        use $crate::codec::kquant::{GgmlType as Ty, parts};
        match $ty {
            Ty::Q4_0 => {
                type $F = parts::Q4_0;
                $body
            }
            Ty::Q4_1 => {
                type $F = parts::Q4_1;
                $body
            }
            Ty::Q5_0 => {
                type $F = parts::Q5_0;
                $body
            }
            Ty::Q5_1 => {
                type $F = parts::Q5_1;
                $body
            }
            Ty::Q8_0 => {
                type $F = parts::Q8_0;
                $body
            }
            Ty::Q2_K => {
                type $F = parts::Q2_K;
                $body
            }
            Ty::Q3_K => {
                type $F = parts::Q3_K;
                $body
            }
            Ty::Q4_K => {
                type $F = parts::Q4_K;
                $body
            }
            Ty::Q5_K => {
                type $F = parts::Q5_K;
                $body
            }
            Ty::Q6_K => {
                type $F = parts::Q6_K;
                $body
            }
            Ty::F32 | Ty::F16 | Ty::BF16 | Ty::Q8_K | Ty::Int4G128 => $other,
        }
    }};
}
pub(crate) use with_format;

/// Turns whole blocks into `f32`s, one for each weight.
///
/// # Panics
/// If `blocks` and `out` are not the same number of whole blocks.
pub fn dequantize(ty: GgmlType, blocks: &[u8], out: &mut [f32]) {
    let (bytes, len) = (ty.block_bytes(), ty.block_len());
    assert!(blocks.len().is_multiple_of(bytes) && blocks.len() / bytes * len == out.len(), "{ty}: sizes differ");
    let pairs = blocks.chunks_exact(bytes).zip(out.chunks_exact_mut(len));
    let mut parts = Parts::default();
    with_format!(ty, F => pairs.for_each(|(block, out)| {
        F::parts(block, &mut parts);
        parts::weights::<F>(&parts, out);
    }), _ => match ty {
        GgmlType::F32 => pairs.for_each(|(b, out)| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        GgmlType::F16 => pairs.for_each(|(b, out)| out[0] = f16::from_le_bytes([b[0], b[1]]).to_f32()),
        GgmlType::BF16 => pairs.for_each(|(b, out)| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        GgmlType::Int4G128 => pairs.for_each(|(b, out)| int4::weights(b, out)),
        // Q8_K: `d` (f32), 256 signed quants, and sums that products need.
        _ => pairs.for_each(|(b, out)| {
            let d = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            out.iter_mut().zip(&b[4..260]).for_each(|(y, &q)| *y = d * f32::from(q as i8));
        }),
    });
}

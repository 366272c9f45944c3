//! Linear layers from AWQ and GPTQ checkpoints.

use candle_core::{DType, Device, Result, Tensor, bail};
use half::f16;

use super::KQuantLinear;
use crate::codec::kquant::int4::{Int4, ROWS};
use crate::codec::kquant::{GgmlType, Int4Format};
use crate::matrix::run_parts;
use crate::ops::{Blocks, PoolExecutor};

/// The tensors of a 4-bit layer of `in` inputs and `out` outputs, by their names in AWQ and GPTQ checkpoints: `.qweight`,
/// `.qzeros`, `.scales` and `.g_idx`, as [`candle_core::safetensors::load`] gives them.
#[derive(Clone, Copy, Debug)]
pub struct Int4Tensors<'a> {
    /// I32: `[in, out/8]` in AWQ, `[in/8, out]` in GPTQ.
    pub qweight: &'a Tensor,
    /// I32: `[groups, out/8]`.
    pub qzeros: &'a Tensor,
    /// `[groups, out]`: F16, or another float dtype with values that F16 has too.
    pub scales: &'a Tensor,
    /// GPTQ's group of each input, `[in]`; those quantised with `desc_act` (act-order) are not supported.
    pub g_idx: Option<&'a Tensor>,
}

impl KQuantLinear {
    /// Takes a weight of 4-bit integers in groups of 128 inputs (or a multiple of that, as `group_size` -1 gives), symmetric or
    /// not, as an AWQ or GPTQ checkpoint has it, to `device`; the bias is there already. The layer computes with 16-bit
    /// activations as they are (W4A16); [`KQuantLinear::with_fp8`] lets it round those of many rows. A GPU keeps 4.19 bits a
    /// weight, and has kernels for it; the CPU keeps 4.25 and dequantises some rows at a time, which is right but slow.
    ///
    /// # Errors
    /// If a tensor has another shape or dtype than [`Int4Tensors`] says, `out` is no multiple of 8, groups have other sizes, or
    /// inputs another order than that of their groups; if a scale is infinite, NaN or no F16; as [`KQuantLinear::on`].
    pub fn from_int4(
        format: Int4Format,
        tensors: &Int4Tensors,
        bias: Option<Tensor>,
        device: &Device,
    ) -> Result<KQuantLinear> {
        let Int4Tensors { qweight, qzeros, scales, g_idx } = tensors;
        let named = |name: &str, tensor: &Tensor| match tensor.dims() {
            &[a, b] => Ok([a, b]),
            dims => bail!("int4 linear: {name} of shape {dims:?}: two dimensions are expected"),
        };
        let [words, across] = named("qweight", qweight)?;
        let [groups, rows] = named("scales", scales)?;
        let (cols, expected) = match format {
            Int4Format::Awq => (words, rows / ROWS),
            Int4Format::Gptq | Int4Format::GptqV2 => (words.saturating_mul(8), rows),
        };
        let zeros = named("qzeros", qzeros)?;
        if across != expected || zeros != [groups, rows / ROWS] {
            bail!(
                "int4 linear: qweight of shape {:?}, qzeros of {:?} and scales of {:?} are no {format:?} layer: for {groups} groups \
                 and {rows} outputs they would be [{words}, {expected}], [{groups}, {}] and [{groups}, {rows}]",
                qweight.dims(),
                qzeros.dims(),
                scales.dims(),
                rows / ROWS
            )
        }
        if let Some(g_idx) = g_idx {
            in_order(g_idx, cols, groups)?;
        }
        let (qweight, qzeros) = (integers("qweight", qweight)?, integers("qzeros", qzeros)?);
        let scales = halves(scales)?;
        let int4 = Int4::new(format, [rows, cols, groups], &qweight, &qzeros, &scales)?;
        let mut data = vec![0u8; rows * int4.row_bytes()];
        let parts = data.chunks_mut(ROWS * int4.row_bytes()).collect();
        run_parts(&PoolExecutor, parts, |eight, out| {
            int4.blocks(eight, out);
            Ok(())
        })?;
        let blocks =
            Blocks { ty: GgmlType::Int4G128, shape: [rows, cols], data: &data, order: &|row| row, done: &|_| () };
        KQuantLinear::on(&blocks, bias, device)
    }
}

/// The words of a tensor of packed integers.
fn integers(name: &str, tensor: &Tensor) -> Result<Vec<u32>> {
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    match tensor.dtype() {
        DType::I32 => Ok(flat.to_vec1::<i32>()?.into_iter().map(i32::cast_unsigned).collect()),
        DType::U32 => flat.to_vec1(),
        other => bail!("int4 linear: {name} of shape {:?} is {other:?}: I32 is expected", tensor.dims()),
    }
}

fn halves(scales: &Tensor) -> Result<Vec<f16>> {
    if !scales.dtype().is_float() {
        bail!("int4 linear: scales of shape {:?} are {:?}: F16 is expected", scales.dims(), scales.dtype())
    }
    let flat = scales.to_device(&Device::Cpu)?.flatten_all()?;
    let halves = flat.to_dtype(DType::F16)?.to_vec1::<f16>()?;
    let exact = flat.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    // NaN is refused later, with its place.
    match halves.iter().zip(&exact).find(|(half, exact)| half.to_f64() != **exact && !exact.is_nan()) {
        Some((_, exact)) => {
            bail!("int4 linear: a scale of {exact} (scales of shape {:?}) is no F16 value", scales.dims())
        }
        None => Ok(halves),
    }
}

/// Refuses inputs that are not in the order of their groups.
fn in_order(g_idx: &Tensor, cols: usize, groups: usize) -> Result<()> {
    if g_idx.dims() != [cols] {
        bail!("int4 linear: g_idx of shape {:?} for a layer of {cols} inputs", g_idx.dims())
    }
    let group = cols / groups.max(1);
    let found = g_idx.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    match (0..cols).find(|&k| usize::try_from(found[k]) != Ok(k / group.max(1))) {
        Some(k) => bail!(
            "int4 linear: input {k} is in group {} of g_idx, not in {}: weights in act-order (desc_act) are not supported; \
             quantise with desc_act=False",
            found[k],
            k / group.max(1)
        ),
        None => Ok(()),
    }
}

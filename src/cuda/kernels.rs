//! The compiled kernels, loaded once for each GPU context, and the memory that all its weights share.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use candle_core::cuda_backend::cudarc;
use candle_core::{CudaDevice, DType, Device, Tensor};
use cudarc::driver::sys::{CUdevice_attribute as Property, CUfunction_attribute_enum as Attribute};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;

use super::attention::AttentionKernels;
use super::family::{Family, PackedKernels, Warpgroups};
use super::fp8::Fp8Kernels;
use super::layers::SideStreams;
use super::pair::PairKernels;
use super::pointwise::PointwiseKernels;
use super::rans::RansKernels;
use super::scratch::Scratch;
use super::upload::Staging;
use crate::codec::kquant::GgmlType;
use crate::{Error, Result};

/// What `build.rs` compiled.
mod image {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// Kernels of one GPU, and what its weights share.
pub(super) struct Kernels {
    pub decode_rows: CudaFunction,
    /// Without levels, and with them.
    pub decode_rows_bf16: [CudaFunction; 2],
    pub decode_ids: CudaFunction,
    pub hybrid: CudaFunction,
    /// With the shared memory that each may ask for.
    pub hybrid_bf16: [(CudaFunction, usize); 2],
    pub convert: CudaFunction,
    pub read: CudaFunction,
    pub repair_scan: CudaFunction,
    packed: Vec<(Family, PackedKernels)>,
    pub pair: PairKernels,
    pub rans: RansKernels,
    pub attention: AttentionKernels,
    pub pointwise: PointwiseKernels,
    /// Those of block formats, which are loaded when one is first asked for: for a matrix, not while products are captured.
    blocks: OnceLock<BlockKernels>,
    /// Dynamic shared memory that a block may have.
    shared: i32,
    /// Pinned memory for uploads.
    pub staging: Mutex<Option<Staging>>,
    pub scratch: Scratch,
    /// For matrices that are decoded at once.
    pub side: Mutex<Option<SideStreams>>,
    /// Multiprocessors of the GPU.
    pub processors: usize,
    /// The GPU's compute capability.
    capability: (i32, i32),
    /// The one that the code was compiled for: the GPU's, or an earlier one.
    compiled_for: (i32, i32),
    /// True for compute capability 9.0, whose tensor cores take products of whole warpgroups.
    pub warpgroups: bool,
    /// True for code of compute capability 9.0 and later: a kernel may start before the one that it follows has ended, and
    /// waits for it by itself.
    pub programmatic: bool,
    context: Arc<CudaContext>,
}

/// Kernels of ggml's block formats, and for activations as FP8, where the GPU can: these multiply 4-bit integers.
struct BlockKernels {
    packed: Vec<(Family, PackedKernels)>,
    fp8: Option<Fp8Kernels>,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernels(cuda:{})", self.context.ordinal())
    }
}

/// candle's error for an error of the driver.
pub(super) fn driver<T, E>(result: std::result::Result<T, E>) -> Result<T>
where
    E: Into<candle_core::cuda_backend::CudaError>,
{
    use candle_core::cuda_backend::WrapErr;
    Ok(result.w()?)
}

impl Kernels {
    /// The kernels for a device: loaded when they are first asked for, and again after the last weight is gone.
    ///
    /// # Errors
    /// If the GPU is older than compute capability 8.0, or its driver cannot load the kernels.
    pub fn of(device: &CudaDevice) -> Result<Arc<Kernels>> {
        static LOADED: Mutex<Option<HashMap<usize, Weak<Kernels>>>> = Mutex::new(None);
        let context = device.cuda_stream().context().clone();
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = loaded.get_or_insert_default().entry(context.cu_ctx() as usize).or_default();
        if let Some(kernels) = slot.upgrade() {
            return Ok(kernels);
        }
        let kernels = Arc::new(Kernels::load(context)?);
        *slot = Arc::downgrade(&kernels);
        Ok(kernels)
    }

    fn load(context: Arc<CudaContext>) -> Result<Kernels> {
        let capability = driver(context.compute_capability())?;
        supported(&driver(context.name())?, capability)?;
        let property = |property| driver(context.attribute(property));
        let processors = property(Property::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = property(Property::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let module = |image: &[u8]| load_module(&context, image);
        let (decode, repair, hybrid) = (module(image::DECODE)?, module(image::REPAIR)?, module(image::HYBRID)?);
        let decode_rows = function(&decode, "taper_decode_rows", shared)?.0;
        // A GPU that there is no machine code for runs what its driver compiled of the PTX for 8.0, without what came later.
        let ptx = driver(decode_rows.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION))?;
        let compiled_for = capability.min((ptx / 10, ptx % 10));
        let (fixed, window) = (module(image::FIXED)?, module(image::WINDOW)?);
        let (float8, integers) = (module(image::FLOAT8)?, module(image::INTEGERS)?);
        let warpgroups = compiled_for == (9, 0);
        let besides = warpgroups.then(|| Warpgroups::load(&context, image::STREAM, image::PREFILL)).transpose()?;
        let packed = Family::FROM_ROWS.into_iter().map(|family| {
            let module = match family {
                Family::Fixed => &fixed,
                Family::Window => &window,
                Family::E4m3 | Family::E5m2 => &float8,
                _ => &integers,
            };
            Ok((family, PackedKernels::load(family, module, besides.as_ref(), shared)?))
        });
        Ok(Kernels {
            decode_rows,
            decode_rows_bf16: [
                function(&decode, "taper_decode_rows_bf16", shared)?.0,
                function(&decode, "taper_decode_rows_bf16_levels", shared)?.0,
            ],
            decode_ids: function(&decode, "taper_decode_ids", shared)?.0,
            hybrid: function(&hybrid, "hybrid_product", shared)?.0,
            hybrid_bf16: [
                function(&hybrid, "hybrid_product_bf16", shared)?,
                function(&hybrid, "hybrid_product_bf16_levels", shared)?,
            ],
            convert: function(&decode, "taper_convert", 0)?.0,
            read: function(&module(image::BANDWIDTH)?, "taper_read", 0)?.0,
            repair_scan: function(&repair, "repair_scan", 0)?.0,
            packed: packed.collect::<Result<_>>()?,
            attention: AttentionKernels::load(&module(image::ATTENTION)?)?,
            pointwise: PointwiseKernels::load(&module(image::POINTWISE)?)?,
            pair: PairKernels::load(&module(image::PAIR)?, shared)?,
            rans: RansKernels::load(&module(image::RANS)?, shared)?,
            blocks: OnceLock::new(),
            shared,
            staging: Mutex::new(None),
            scratch: Scratch::new(processors as usize),
            side: Mutex::new(None),
            processors: processors as usize,
            capability,
            compiled_for,
            warpgroups,
            programmatic: compiled_for >= (9, 0),
            context,
        })
    }

    fn blocks(&self) -> Result<&BlockKernels> {
        if let Some(loaded) = self.blocks.get() {
            return Ok(loaded);
        }
        let load = |image, stream, prefill| {
            let besides = self.warpgroups.then(|| Warpgroups::load(&self.context, stream, prefill)).transpose()?;
            Ok::<_, Error>((load_module(&self.context, image)?, besides))
        };
        let large = load(image::KQUANT, image::STREAM_KQUANT, image::PREFILL_KQUANT)?;
        let small = load(image::KQUANT_SMALL, image::STREAM_SMALL, image::PREFILL_SMALL)?;
        let load = |ty: GgmlType| {
            let (module, besides) = if ty.block_len() == 256 { &large } else { &small };
            let family = Family::Blocks(ty);
            Ok((family, PackedKernels::load(family, module, besides.as_ref(), self.shared)?))
        };
        let packed = Family::BLOCKS.into_iter().map(load).collect::<Result<_>>()?;
        let fp8 = match (self.has_fp8(), self.warpgroups) {
            (false, _) => None,
            (true, true) => Some(Fp8Kernels::load(&load_module(&self.context, image::FP8)?, self.shared)?),
            // Whatever the rest was compiled for: there is PTX for 8.9 of these.
            (true, false) => Some(Fp8Kernels::load_mma(&load_module(&self.context, image::FP8_MMA)?, self.shared)?),
        };
        // Another thread may have been quicker; both loaded the same.
        Ok(self.blocks.get_or_init(|| BlockKernels { packed, fp8 }))
    }

    fn has_fp8(&self) -> bool {
        self.capability >= (8, 9)
    }

    /// Kernels for activations as FP8: from compute capability 8.9 on.
    pub fn fp8(&self) -> Result<Option<&Fp8Kernels>> {
        Ok(self.blocks()?.fp8.as_ref())
    }

    /// The kernels of a layout.
    pub fn packed(&self, family: Family) -> Result<&PackedKernels> {
        let list = if family.blocks() { &self.blocks()?.packed } else { &self.packed };
        let kernels = list.iter().find(|(of, _)| *of == family);
        kernels.map(|(_, kernels)| kernels).ok_or_else(|| Error::Unsupported(format!("no kernels for {family:?}")))
    }
}

/// The kernels of a device, loaded: they stay so for as long as this is held.
#[derive(Clone, Debug)]
pub struct LoadedKernels(Arc<Kernels>);

impl LoadedKernels {
    /// Loads them if no weight has.
    ///
    /// # Errors
    /// If the GPU is older than compute capability 8.0, or its driver cannot load the kernels.
    pub fn of(device: &CudaDevice) -> Result<LoadedKernels> {
        Kernels::of(device).map(LoadedKernels)
    }

    /// The compute capability that they were compiled for: 9.0 on Hopper, 8.0 on every other GPU (but for products with FP8
    /// activations, of 8.9). `CUDA_FORCE_PTX_JIT=1` makes the driver compile those for 8.0 wherever it is.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.0.compiled_for
    }

    /// Whether there are products with activations rounded to FP8 ([`CudaWeight::matmul_fp8`]): from compute capability 8.9
    /// on.
    ///
    /// [`CudaWeight::matmul_fp8`]: super::CudaWeight::matmul_fp8
    pub fn fp8(&self) -> bool {
        self.0.has_fp8()
    }
}

/// Whether there are kernels where a tensor is, which take its dtype.
pub(crate) fn takes(tensor: &Tensor) -> bool {
    let Device::Cuda(device) = tensor.device() else { return false };
    matches!(tensor.dtype(), DType::BF16 | DType::F16 | DType::F32) && Kernels::of(device).is_ok()
}

/// The kernels of a file of `kernels/`.
pub(super) fn load_module(context: &Arc<CudaContext>, image: &[u8]) -> Result<Arc<CudaModule>> {
    driver(context.load_module(Ptx::from_binary(image.to_vec())))
}

/// A kernel, and how much dynamic shared memory its blocks may ask for, of `most` bytes that a block may have.
pub(super) fn function(module: &Arc<CudaModule>, name: &str, most: i32) -> Result<(CudaFunction, usize)> {
    let function = driver(module.load_function(name))?;
    let room = (most - driver(function.shared_size_bytes())?).max(0);
    if most > 0 {
        driver(function.set_attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, room))?;
    }
    Ok((function, room as usize))
}

/// Refuses GPUs without what the kernels are made of.
fn supported(name: &str, capability: (i32, i32)) -> Result<()> {
    if capability >= (8, 0) {
        return Ok(());
    }
    let (major, minor) = capability;
    Err(Error::Unsupported(format!(
        "{name} has compute capability {major}.{minor}; compressed layers need 8.0 (Ampere) or later: run them on the CPU, or \
         restore the checkpoint with `taper decompress`"
    )))
}

/// Says what there is no room for, if that is the error.
pub(super) fn no_room(error: Error, what: &str) -> Error {
    let text = error.to_string();
    if !text.contains("OUT_OF_MEMORY") && !text.contains("ALLOC_FAILED") {
        return error;
    }
    Error::Unsupported(format!(
        "the GPU has no room for {what}: choose a smaller layout or codec, a larger GPU, or the CPU"
    ))
}

/// As [`no_room`], for an allocation of `bytes`.
pub(super) fn out_of_memory(error: candle_core::Error, bytes: usize, what: &str) -> Error {
    no_room(error.into(), &format!("{what} of {bytes} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_gpus_are_refused_with_a_way_out() {
        assert!(supported("A100", (8, 0)).is_ok() && supported("H100", (9, 0)).is_ok());
        let error = supported("Tesla T4", (7, 5)).unwrap_err().to_string();
        assert!(error.contains("T4") && error.contains("7.5") && error.contains("CPU"), "{error}");
    }
}

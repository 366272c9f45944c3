//! One token's rotation, place in the cache and attention, in one launch: `kernels/attention.cu`.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::CudaStorage;
use candle_core::cuda_backend::{CudaStorageSlice, cudarc};
use cudarc::driver::{CudaFunction, CudaModule, DevicePtr, DevicePtrMut};
use half::{bf16, f16};

use super::kernels::{Kernels, function};
use super::launch::{Grid, launch_with, programmatic};
use super::memory::{Element, Part, alloc, place, view};
use super::packed::kind_of;
use crate::{Error, Result};

/// Threads of a block.
const THREADS: usize = 128;
/// Values of a head that a thread holds.
const VALUES: usize = 8;
/// Queries that a block takes at once.
const CHUNKS: [usize; 4] = [1, 2, 4, 8];
/// The dtypes by the names of their kernels, in the order of `kind_of`.
const NAMES: [&str; 3] = ["bf16", "f16", "f32"];
/// Positions of a block at least.
const SPAN: usize = 64;
/// The largest head.
const LARGEST: usize = 256;

/// The kernels for each dtype and chunk.
pub(super) struct AttentionKernels([[CudaFunction; 4]; 3]);

impl AttentionKernels {
    pub fn load(module: &Arc<CudaModule>) -> Result<AttentionKernels> {
        let mut kernels = Vec::new();
        for name in NAMES {
            let of = |chunk| Ok::<_, Error>(function(module, &format!("attend_{name}_{chunk}"), 0)?.0);
            kernels.push([of(CHUNKS[0])?, of(CHUNKS[1])?, of(CHUNKS[2])?, of(CHUNKS[3])?]);
        }
        kernels.try_into().map(AttentionKernels).map_err(|_| Error::Invalid("kernels are missing".into()))
    }
}

/// The struct of that name in `kernels/attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Step {
    q: u64,
    k: u64,
    v: u64,
    cos: u64,
    sin: u64,
    keys: u64,
    values: u64,
    y: u64,
    partial: u64,
    arrived: u64,
    at: u64,
    heads: u32,
    kv_heads: u32,
    size: u32,
    lanes: u32,
    capacity: u32,
    position: u32,
    span: u32,
    scale: f32,
}

const _: () = assert!(size_of::<Step>() == 120);

/// What attention takes for one token of each sequence. All have one dtype and are contiguous.
pub(crate) struct OneToken<'a> {
    /// Queries `[batch, 1, heads * size]`, not rotated.
    pub q: Part<'a>,
    /// Keys and values `[batch, 1, kv_heads * size]` of the token, not rotated.
    pub k: Part<'a>,
    pub v: Part<'a>,
    /// The cache `[batch, kv_heads, capacity, size]`: the token's are written at `position`.
    pub keys: Part<'a>,
    pub values: Part<'a>,
    /// Angles `[> position, size / 2]`.
    pub cos: Part<'a>,
    pub sin: Part<'a>,
    pub position: usize,
    /// Where a graph finds the position whenever it is replayed: one U32.
    pub at: Option<Part<'a>>,
}

/// Whether heads of `size` values can be taken.
pub(crate) fn attends_to(size: usize) -> bool {
    size.is_multiple_of(VALUES) && (1..=LARGEST).contains(&size)
}

impl OneToken<'_> {
    /// Enqueues it: `[batch, 1, heads * size]`.
    ///
    /// # Errors
    /// If shapes, dtypes or devices do not fit, or a launch fails.
    pub fn attend(&self) -> Result<CudaStorage> {
        match &self.q.0.slice {
            CudaStorageSlice::BF16(_) => self.run::<bf16>(),
            CudaStorageSlice::F16(_) => self.run::<f16>(),
            CudaStorageSlice::F32(_) => self.run::<f32>(),
            _ => Err(Error::Unsupported("attention in another dtype than f32, bf16 and f16".into())),
        }
    }

    fn run<T: Element>(&self) -> Result<CudaStorage> {
        let device = &self.q.0.device;
        let wrong = || {
            let dims =
                [self.q, self.k, self.v, self.keys, self.values, self.cos, self.sin].map(|(_, l)| l.dims().to_vec());
            Error::Invalid(format!("attention at {}: shapes that do not fit: {dims:?}", self.position))
        };
        let (&[batch, kv_heads, capacity, size], &[_, _, width]) = (self.keys.1.dims(), self.q.1.dims()) else {
            return Err(wrong());
        };
        let heads = if attends_to(size) { width / size } else { 0 };
        let fits = heads > 0
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads)
            && self.q.1.dims() == [batch, 1, heads * size]
            && [self.k, self.v].iter().all(|(_, l)| l.dims() == [batch, 1, kv_heads * size])
            && self.values.1.dims() == self.keys.1.dims()
            && [self.cos, self.sin]
                .iter()
                .all(|(_, l)| matches!(l.dims(), [n, d] if *n > self.position && 2 * d == size))
            && self.position < capacity
            && [capacity, heads * size].iter().all(|&n| i32::try_from(n).is_ok())
            && batch <= 65_535;
        if !fits {
            return Err(wrong());
        }
        if batch == 0 {
            return Ok(CudaStorage::wrap_cuda_slice(alloc::<T>(device, 0, "activations")?, device.clone()));
        }
        let kernels = Kernels::of(device)?;
        let shared = heads / kv_heads;
        let index = CHUNKS.iter().rposition(|chunk| shared.is_multiple_of(*chunk)).unwrap_or(0);
        let chunk = CHUNKS[index];
        let (lanes, down) = ((size / VALUES).next_power_of_two(), kv_heads * (shared / chunk));
        // As many blocks as keep the GPU busy with a full cache, in spans that are worth one.
        let most = (4 * kernels.processors / (batch * down)).max(1);
        let span = SPAN.max(capacity.div_ceil(most).next_multiple_of(SPAN));
        // A graph is replayed for any position that the cache has room for.
        let most = capacity.div_ceil(span);
        let splits = if self.at.is_some() { most } else { self.position / span + 1 };
        let line = chunk * (size + 2);
        let grid = Grid {
            blocks: [splits, down, batch].map(|n| n as u32),
            threads: THREADS as u32,
            shared: (THREADS / lanes * line * 4) as u32,
        };
        let mut y = alloc::<T>(device, batch * heads * size, "activations")?;
        let stream = device.cuda_stream();
        let view = |part: Part| view::<T>(device, part).map(|view| view.device_ptr(&stream).0);
        let [q, k, v] = [view(self.q)?, view(self.k)?, view(self.v)?];
        let [keys, values, cos, sin] = [view(self.keys)?, view(self.values)?, view(self.cos)?, view(self.sin)?];
        if [v, keys, values].iter().any(|at| !at.is_multiple_of(16)) {
            return Err(Error::Invalid("attention: keys and values must lie at multiples of 16 bytes".into()));
        }
        let at = match self.at {
            Some((storage, layout)) => place(device, (storage, layout))?.device_ptr(&stream).0,
            None => 0,
        };
        let partial = if most > 1 { batch * down * most * line } else { 0 };
        kernels.scratch.product(device, partial, batch * down, |partial, arrived| {
            let (y, _y) = y.device_ptr_mut(&stream);
            let (partial, _partial) = partial.device_ptr_mut(&stream);
            let (arrived, _arrived) = arrived.device_ptr_mut(&stream);
            let [heads, kv_heads, size] = [heads, kv_heads, size].map(|n| n as u32);
            let [capacity, position, span, lanes] = [capacity, self.position, span, lanes].map(|n| n as u32);
            let scale = std::f32::consts::LOG2_E / (size as f32).sqrt();
            let step = Step {
                q,
                k,
                v,
                cos,
                sin,
                keys,
                values,
                y,
                partial,
                arrived,
                at,
                heads,
                kv_heads,
                size,
                lanes,
                capacity,
                position,
                span,
                scale,
            };
            let function = &kernels.attention.0[kind_of(T::DTYPE) as usize][index];
            // SAFETY: all tensors have the shapes that the kernel takes them for, as checked above; the cache is written at
            // the position only, which is within it, and on the stream that orders all work on it.
            unsafe { launch_with(&stream, function, grid, &[(&raw const step).cast()], programmatic(&kernels)) }
        })?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    }
}

//! What `auto` chooses. BF16 matrices have several layouts: they are timed on the GPU that is to hold the matrix, once for each
//! shape, and the fastest is remembered ([`super::choices`]). For all others there is one that suits.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaSlice, CudaViewMut, sys};

use super::choices::{Choices, Measured};
use super::decode::DeviceStream;
use super::form::Form;
use super::gemm::{Gemm, Strides};
use super::kernels::{Kernels, driver, out_of_memory};
use super::packed::Fused;
use super::packing::Scales;
use super::scratch::WORKSPACE;
use crate::Result;
use crate::codec::{Dtype, Geometry, Kind, Plan};
use crate::matrix::GpuLayout;

/// Weights of a matrix above which nothing is measured: plain ones would no longer fit into a workspace, and what is read from
/// memory decides.
const MOST: usize = WORKSPACE / 2;
/// Bytes of copies that calls take turns with, so that no cache holds them, and how many copies there are at most.
const ROTATE: usize = 128 << 20;
const COPIES: usize = 16;
/// Calls of a round, and rounds.
const CALLS: usize = 16;
const ROUNDS: usize = 5;
/// Two times that differ by less are alike: the smaller layout is taken.
const ALIKE: f64 = 1.02;

/// A layout, and why.
pub(super) struct Choice {
    pub layout: GpuLayout,
    pub why: String,
}

impl Choice {
    fn new(layout: GpuLayout, why: impl Into<String>) -> Choice {
        Choice { layout, why: why.into() }
    }
}

static MEASURE: AtomicBool = AtomicBool::new(true);

/// Lets `auto` time layouts when a shape is met first, and matrices of GGUF files the ways to multiply them, and remember the
/// fastest. It is on, unless the environment has `TAPER_MEASURE=0`; without it `auto` takes `fixed` for BF16 matrices, and
/// others are multiplied by a rule.
pub fn set_measuring(on: bool) {
    MEASURE.store(on, Ordering::Relaxed);
}

pub(super) fn measuring() -> bool {
    let off = std::env::var("TAPER_MEASURE").is_ok_and(|value| matches!(value.trim(), "0" | "off" | "no" | "false"));
    MEASURE.load(Ordering::Relaxed) && !off
}

/// The layout for a matrix that may have any.
pub(super) fn auto(stream: &DeviceStream, plan: &Plan, scales: &Scales) -> Result<Choice> {
    let Geometry { rows, cols } = stream.geometry();
    if plan.kind == Kind::Rate || plan.kind == Kind::Int8 {
        return Ok(Choice::new(GpuLayout::Integers, "small integers are multiplied as they are"));
    }
    if plan.kind == Kind::F8E4M3 || plan.kind == Kind::F8E5M2 {
        return Ok(Choice::new(GpuLayout::Fp8, "8-bit floats are multiplied as they are"));
    }
    if !plan.exact_in_bf16() {
        return Ok(Choice::new(GpuLayout::Dense, format!("no fused kernel takes {} weights", plan.kind.name())));
    }
    if rows * cols > MOST {
        return Ok(Choice::new(GpuLayout::Fixed, "rule for large matrices: decoded while they are read"));
    }
    if !measuring() {
        return Ok(Choice::new(GpuLayout::Fixed, "rule, as measuring is off"));
    }
    let key = key(stream.device(), &format!("bf16 {rows}x{cols}"))?;
    Choices::shared(|choices| {
        let known = choices.get(&key);
        if let Some((layout, known)) = known.and_then(|known| Some((GpuLayout::from_name(known.choice()).ok()?, known)))
        {
            return Ok(Choice::new(layout, format!("fastest at one row: {} (remembered)", known.times())));
        }
        let times = measure(stream, scales)?;
        let Some(fastest) = times.iter().map(|time| time.us).min_by(f64::total_cmp) else {
            return Ok(Choice::new(GpuLayout::Fixed, "rule, as there was no room to measure"));
        };
        let alike = times.iter().filter(|time| time.us <= ALIKE * fastest);
        let layout = alike.min_by_key(|time| time.bytes).map_or(GpuLayout::Fixed, |time| time.layout);
        let named: Vec<_> = times.iter().map(|time| (time.layout.name(), time.us)).collect();
        let measured = Measured::new(layout.name(), &named);
        let why = format!("fastest at one row: {}", measured.times());
        choices.put(key, measured);
        Ok(Choice::new(layout, why))
    })
}

/// What is remembered as `what` on a GPU.
pub(super) fn key(device: &CudaDevice, what: &str) -> Result<String> {
    let gpu = driver(device.cuda_stream().context().name())?;
    Ok(format!("{gpu}, candle-taper {}, {what}", env!("CARGO_PKG_VERSION")))
}

/// How many copies of `bytes` take turns.
pub(super) fn copies_of(bytes: usize) -> usize {
    ROTATE.div_ceil(bytes.max(1)).min(COPIES)
}

/// Microseconds of a call, the median of some rounds: `call(i)` enqueues one with the i-th of `copies`; false if it cannot
/// be.
pub(super) fn time_calls(
    (device, kernels): (&CudaDevice, &Kernels),
    copies: usize,
    mut call: impl FnMut(usize) -> Result<bool>,
) -> Result<Option<f64>> {
    let main = device.cuda_stream();
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let calls = CALLS.max(copies);
    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        // The GPU is busy until all calls are enqueued.
        kernels
            .scratch
            .workspace(device, WORKSPACE, |memory| (0..4).try_for_each(|_| driver(main.memset_zeros(memory))))?;
        let start = driver(main.record_event(flags))?;
        for i in 0..calls {
            if !call(i % copies)? {
                return Ok(None);
            }
        }
        let end = driver(main.record_event(flags))?;
        driver(end.synchronize())?;
        if round > 0 {
            rounds.push(f64::from(driver(start.elapsed_ms(&end))?) * 1e3 / calls as f64);
        }
    }
    rounds.sort_by(f64::total_cmp);
    Ok(rounds.get(ROUNDS / 2).copied())
}

/// What was measured of a layout.
struct Time {
    layout: GpuLayout,
    us: f64,
    bytes: usize,
}

/// A copy of the matrix that is multiplied.
enum Copied {
    Fused(Box<dyn Fused>),
    Dense(CudaSlice<u8>),
}

impl Copied {
    fn bytes(&self) -> usize {
        match self {
            Copied::Fused(fused) => fused.stored_bytes(),
            Copied::Dense(dense) => dense.len(),
        }
    }
}

/// Times every layout that suits a BF16 matrix, one after another; none if the memory is too small for that.
fn measure(stream: &DeviceStream, scales: &Scales) -> Result<Vec<Time>> {
    let mut times = Vec::new();
    for layout in [GpuLayout::Fixed, GpuLayout::Pair, GpuLayout::Dense] {
        match time(stream, scales, layout) {
            Ok(time) => times.extend(time),
            Err(error) if error.to_string().contains("no room") => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    }
    Ok(times)
}

fn time(stream: &DeviceStream, scales: &Scales, layout: GpuLayout) -> Result<Option<Time>> {
    let Some(first) = copy(stream, scales, layout)? else { return Ok(None) };
    let bytes = first.bytes();
    let mut copies = vec![first];
    while copies.len() < copies_of(bytes) {
        copies.extend(copy(stream, scales, layout)?);
    }
    let Geometry { rows, cols } = stream.geometry();
    let device = stream.device();
    let x = device.alloc_zeros::<u8>(2 * cols)?;
    let mut y = device.alloc_zeros::<u8>(2 * rows)?;
    let us = time_calls((device, stream.kernels()), copies.len(), |i| {
        product(stream, &copies[i], &x, &mut y.as_view_mut())
    })?;
    Ok(us.map(|us| Time { layout, us, bytes }))
}

fn copy(stream: &DeviceStream, scales: &Scales, layout: GpuLayout) -> Result<Option<Copied>> {
    let Geometry { rows, cols } = stream.geometry();
    let form = match layout {
        GpuLayout::Fixed => Form::FIXED,
        GpuLayout::Pair => Form::Pair,
        _ => {
            let bytes = 2 * rows * cols;
            // SAFETY: decoding writes all of it.
            let dense = unsafe { stream.device().alloc::<u8>(bytes) };
            let mut dense = dense.map_err(|e| out_of_memory(e, bytes, "plain weights"))?;
            stream.decode_rows(0..rows, Dtype::Bf16, &mut dense.as_view_mut())?;
            return Ok(Some(Copied::Dense(dense)));
        }
    };
    Ok(form.make(stream, scales)?.map(Copied::Fused))
}

/// Enqueues the product with one row of BF16.
fn product(stream: &DeviceStream, weights: &Copied, x: &CudaSlice<u8>, y: &mut CudaViewMut<u8>) -> Result<bool> {
    let Geometry { rows, cols } = stream.geometry();
    match weights {
        Copied::Fused(fused) => fused.product(&x.as_view(), y, 1, Dtype::Bf16),
        Copied::Dense(dense) => {
            let strides = Strides { a: cols, b: cols, c: rows };
            let (dtype, out) = (Dtype::Bf16, Dtype::Bf16);
            let gemm = Gemm { m: 1, n: rows, k: cols, transposed: true, dtype, out, strides, add: false };
            gemm.run(stream.device(), &x.as_view(), &dense.as_view(), y)?;
            Ok(true)
        }
    }
}

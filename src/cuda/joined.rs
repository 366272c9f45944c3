//! Products of several matrices with the same few rows of activations, in one launch: queries, keys and values, or gate and
//! up. Each of them alone is too small to keep a GPU busy, or ends with blocks that wait for the last.
#![allow(unsafe_code)]

use std::ffi::c_void;

use candle_core::cuda_backend::{CudaStorageSlice, cudarc};
use candle_core::{CudaStorage, Layout, Shape};
use cudarc::driver::{CudaView, DevicePtr, DevicePtrMut};

use super::family::TILE_ROWS;
use super::launch::{Grid, launch_with, programmatic};
use super::launch_shape::{Groups, LaunchShape, takes_several};
use super::memory::{Element, bytes, contiguous};
use super::packed::Packed;
use super::product::{MATRICES, Product, columns_of};
use super::weight::{CudaWeight, Kept};
use crate::Result;

/// A product as a tensor's memory and shape.
type Made = (CudaStorage, Shape);

impl CudaWeight {
    /// What [`CudaWeight::matmul`] of each of `weights` gives, to the last bit, in one launch. `None`, with nothing done, where
    /// they have no kernel for that, or what they are given does not fit.
    ///
    /// # Errors
    /// If the memory is too small, or the launch fails.
    pub(crate) fn matmul_each(weights: &[&CudaWeight], x: &CudaStorage, layout: &Layout) -> Result<Option<Vec<Made>>> {
        fn packed<'a>(weight: &&'a CudaWeight) -> Option<&'a Packed> {
            match &weight.kept {
                Kept::Fused(fused) => fused.packed(),
                Kept::Stream(_) => None,
            }
        }
        let same = |a: &Packed, b: &Packed| {
            (a.family, a.geometry.cols, a.device.id()) == (b.family, b.geometry.cols, b.device.id())
        };
        let Some(packed) = weights.iter().map(packed).collect::<Option<Vec<&Packed>>>() else { return Ok(None) };
        let (Some(first), Some((last, leading))) = (packed.first(), layout.dims().split_last()) else {
            return Ok(None);
        };
        let fits = (2..=MATRICES).contains(&packed.len())
            && packed.iter().all(|other| same(first, other))
            && *last == first.geometry.cols
            && x.device.id() == first.device.id();
        if !fits {
            return Ok(None);
        }
        let range = contiguous(layout)?;
        match &x.slice {
            CudaStorageSlice::BF16(x) => products(&packed, &x.slice(range), leading),
            CudaStorageSlice::F16(x) => products(&packed, &x.slice(range), leading),
            CudaStorageSlice::F32(x) => products(&packed, &x.slice(range), leading),
            _ => Ok(None),
        }
    }
}

fn products<T: Element>(packed: &[&Packed], x: &CudaView<T>, leading: &[usize]) -> Result<Option<Vec<Made>>> {
    let first = packed[0];
    let (kernels, device, cols) = (&*first.kernels, &first.device, first.geometry.cols);
    let (batch, (parts, kind)) = (x.len() / cols.max(1), columns_of(T::DTYPE));
    if batch == 0 || batch * parts > 8 {
        return Ok(None);
    }
    let programmatic = programmatic(kernels);
    let shape = |packed: &&Packed| LaunchShape::of(packed.family, packed.geometry, kernels, batch, parts, programmatic);
    let Some(mut shapes) = packed.iter().map(shape).collect::<Option<Vec<_>>>() else { return Ok(None) };
    let kernel = shapes[0].kernel;
    let tiles: Vec<usize> = packed.iter().map(|packed| packed.geometry.rows.div_ceil(TILE_ROWS)).collect();
    let possible = takes_several(kernel, first.family)
        && shapes.iter().all(|shape| shape.kernel == kernel)
        && share(&mut shapes, &tiles, kernels.processors);
    let Some(function) = kernels.packed(first.family)?.product(kernel).filter(|_| possible) else {
        return Ok(None);
    };

    let mut results = Vec::with_capacity(packed.len());
    for matrix in packed {
        results.push(super::memory::alloc::<T>(device, batch * matrix.geometry.rows, "a result")?);
    }
    let stream = device.cuda_stream();
    let (partial, words) = (shapes.iter().map(|s| s.partial).sum(), shapes.iter().map(|s| s.arrived).sum());
    let x = bytes(x)?;
    kernels.scratch.product(device, partial, words, |partial, arrived| {
        let (x, _x) = x.device_ptr(&stream);
        let (mut partial, _partial) = partial.device_ptr_mut(&stream);
        let (mut arrived, _arrived) = arrived.device_ptr_mut(&stream);
        let mut each = [Product::none(); MATRICES];
        let (mut blocks, mut guards) = (0, Vec::new());
        for (((matrix, shape), y), product) in packed.iter().zip(&shapes).zip(&mut results).zip(&mut each) {
            let scale = matrix.row_scale.as_ref().filter(|_| shape.scaled);
            // What orders this by events is told when it is enqueued.
            let mut place = |(pointer, guard)| {
                guards.push(guard);
                pointer
            };
            *product = Product {
                weights: place(matrix.weights.device_ptr(&stream)),
                overflow: place(matrix.overflow.device_ptr(&stream)),
                row_scale: scale.map_or(0, |scale| place(scale.device_ptr(&stream))),
                x,
                y: place(y.device_ptr_mut(&stream)),
                partial,
                arrived,
                first_block: blocks,
                ..Product::of(shape, matrix.geometry, batch, kind)
            };
            blocks += shape.groups.blocks as i32;
            partial += 4 * shape.partial as u64;
            arrived += 4 * shape.arrived as u64;
        }
        let shared = shapes.iter().map(|shape| shape.shared).max().unwrap_or(0);
        let grid = Grid { blocks: [blocks as u32, 1, 1], threads: shapes[0].threads, shared: shared as u32 };
        let argument: *const c_void = (&raw const each).cast();
        // SAFETY: each product has the memory that its shape asks for, of which the scratch memory holds all, and as many
        // blocks of the grid; matrices were packed for these kernels.
        unsafe { launch_with(&stream, function, grid, &[argument], programmatic) }
    })?;
    let made = results.into_iter().zip(packed).map(|(y, matrix)| {
        let shape = Shape::from([leading, &[matrix.geometry.rows]].concat());
        (CudaStorage::wrap_cuda_slice(y, device.clone()), shape)
    });
    Ok(Some(made.collect()))
}

/// Shares the GPU's multiprocessors between products, so that the one that takes longest takes as little as possible, and
/// then the others. Groups change nothing about the sums. False if there are too few.
fn share(shapes: &mut [LaunchShape], tiles: &[usize], processors: usize) -> bool {
    if tiles.contains(&0) {
        return false;
    }
    // Time is counted in the smallest part of a tile that all slabs are multiples of.
    let parts: usize = shapes.iter().map(|shape| shape.slabs).product();
    let groups = |time: usize| -> Option<Vec<usize>> {
        let groups = shapes.iter().zip(tiles).map(|(shape, tiles)| match time * shape.slabs / parts {
            0 => None,
            each => Some(tiles.div_ceil(each)),
        });
        groups.collect()
    };
    let blocks = |groups: &[usize]| groups.iter().zip(shapes.iter()).map(|(n, shape)| n * shape.slabs).sum::<usize>();
    let longest = parts * tiles.iter().max().copied().unwrap_or(0);
    let fits = |time: &usize| groups(*time).is_some_and(|groups| blocks(&groups) <= processors);
    // The first time that fits: the more time, the fewer blocks.
    let (mut low, mut high) = (0, longest);
    if !fits(&high) {
        return false;
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(&middle) { high = middle } else { low = middle }
    }
    let Some(mut groups) = groups(high) else { return false };
    // What is left goes to whichever takes longest of those that it makes faster.
    let time = |i: usize, groups: usize| tiles[i].div_ceil(groups) * parts / shapes[i].slabs;
    loop {
        let left = processors - blocks(&groups);
        let faster = |i: usize| {
            let most = tiles[i].div_ceil(groups[i]);
            let more = tiles[i].div_ceil(most.saturating_sub(1).max(1));
            (most > 1 && (more - groups[i]) * shapes[i].slabs <= left).then_some((i, more))
        };
        let longest = (0..groups.len()).filter_map(faster).max_by_key(|&(i, _)| (time(i, groups[i]), i));
        match longest {
            Some((i, more)) => groups[i] = more,
            None => break,
        }
    }
    shapes.iter_mut().zip(groups).for_each(|(shape, groups)| shape.groups = Groups::even(groups, shape.slabs));
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiprocessors_are_shared_by_what_takes_longest() {
        let share = |matrices: &[(usize, usize)], processors| {
            let shape = |&(_, slabs): &(usize, usize)| LaunchShape {
                kernel: 0,
                groups: Groups::even(1, slabs),
                slabs,
                threads: 288,
                shared: 0,
                slots: 3,
                in_flight: 3,
                keep: 8,
                partial: 0,
                arrived: 0,
                scaled: false,
            };
            let mut shapes: Vec<LaunchShape> = matrices.iter().map(shape).collect();
            let tiles: Vec<usize> = matrices.iter().map(|&(tiles, _)| tiles).collect();
            super::share(&mut shapes, &tiles, processors)
                .then(|| shapes.iter().map(|shape| shape.groups.each).collect::<Vec<_>>())
        };
        // Two tiles for each block of the first, two halves for each of the others.
        assert_eq!(share(&[(128, 1), (32, 2), (32, 2)], 132), Some(vec![64, 16, 16]));
        assert_eq!(share(&[(512, 1), (512, 1)], 132), Some(vec![64, 64]));
        assert_eq!(share(&[(1, 1), (1000, 1)], 132), Some(vec![1, 125]));
        assert_eq!(share(&[(5, 2), (5, 3)], 5), Some(vec![1, 1]));
        assert_eq!(share(&[(5, 2), (5, 3)], 4), None);
        assert_eq!(share(&[(0, 1), (5, 1)], 132), None);
    }
}

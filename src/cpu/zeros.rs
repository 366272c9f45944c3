//! Vectors of zeros that many threads make, each the part that it fills: megabytes that one thread clears alone keep the others
//! waiting, and have left the cache when they are filled.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A part of a vector that does not hold zeros yet.
pub(crate) struct Part<'a> {
    values: &'a mut [MaybeUninit<f32>],
    zeroed: &'a AtomicUsize,
}

impl<'a> Part<'a> {
    /// The part, as zeros.
    pub fn zeros(self) -> &'a mut [f32] {
        for value in self.values.iter_mut() {
            value.write(0.0);
        }
        self.zeroed.fetch_add(self.values.len(), Ordering::AcqRel);
        // SAFETY: all values were written above, and have the layout of `f32`.
        unsafe { &mut *(std::ptr::from_mut(self.values) as *mut [f32]) }
    }
}

/// The sizes of `len` values' parts of `size` but the last.
pub(crate) fn sizes(len: usize, size: usize) -> impl Iterator<Item = usize> + Clone {
    (0..len).step_by(size.max(1)).map(move |at| size.min(len - at))
}

/// A vector of parts of these sizes, all of which `fill` must make and may fill.
///
/// # Errors
/// Those of `fill`.
pub(crate) fn zeros<E>(
    sizes: impl Iterator<Item = usize> + Clone,
    fill: impl FnOnce(Vec<Part>) -> Result<(), E>,
) -> Result<Vec<f32>, E> {
    let len = sizes.clone().sum();
    let mut values: Vec<f32> = Vec::with_capacity(len);
    let zeroed = AtomicUsize::new(0);
    let mut rest = &mut values.spare_capacity_mut()[..len];
    let mut parts = Vec::new();
    for size in sizes {
        let (values, after) = rest.split_at_mut(size);
        parts.push(Part { values, zeroed: &zeroed });
        rest = after;
    }
    fill(parts)?;
    // A part is counted once, as making it takes it away.
    assert_eq!(zeroed.into_inner(), len, "parts were left out");
    // SAFETY: the capacity is there, and the parts, which are all values, were written.
    unsafe { values.set_len(len) };
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zeros_and_keep_what_they_are_filled_with() {
        let sizes = [3, 0, 5, 1];
        let made = zeros(sizes.into_iter(), |parts| {
            for (index, part) in parts.into_iter().enumerate().rev() {
                let part = part.zeros();
                assert_eq!(part, vec![0.0; sizes[index]]);
                part.iter_mut().take(2).for_each(|value| *value = 1.0 + index as f32);
            }
            Ok::<_, ()>(())
        });
        assert_eq!(made.unwrap(), [1.0, 1.0, 0.0, 3.0, 3.0, 0.0, 0.0, 0.0, 4.0]);
        assert_eq!(zeros([2].into_iter(), |_| Err("stopped")), Err("stopped"));
        assert_eq!(zeros(std::iter::empty(), |_| Ok::<_, ()>(())), Ok(Vec::new()));
    }

    #[test]
    #[should_panic(expected = "parts were left out")]
    fn a_part_that_was_not_made_is_not_handed_out() {
        let _ = zeros([2, 2].into_iter(), |mut parts| {
            parts.pop().map(Part::zeros);
            Ok::<_, ()>(())
        });
    }
}

//! Vectors of zeros that many threads make, each the part that it fills: megabytes that one thread clears alone keep the others
//! waiting, and have left the cache when they are filled.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Some columns of a row-major matrix, for one thread to write while others write other columns.
pub struct Columns<'a> {
    first: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: no two have a value in common, and each is borrowed from its matrix as a slice would be.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    /// All columns of a matrix of `cols`.
    pub fn of(values: &'a mut [f32], cols: usize) -> Columns<'a> {
        let rows = values.len().checked_div(cols).unwrap_or(0);
        Columns { first: values.as_mut_ptr(), stride: cols, rows, cols, matrix: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What row `row` has of them.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "there are {} rows", self.rows);
        // SAFETY: the row is there and holds numbers; it is borrowed for as long as `self`, and nothing else has it.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride), self.cols) }
    }
}

/// Columns that may not hold zeros yet.
pub(crate) struct Unmade<'a> {
    columns: Columns<'a>,
    /// Where to count values that become zeros; `None` if they are.
    zeroed: Option<&'a AtomicUsize>,
}

impl<'a> Unmade<'a> {
    /// The columns, as zeros.
    pub fn zeros(self) -> Columns<'a> {
        let Some(zeroed) = self.zeroed else { return self.columns };
        let Columns { first, stride, rows, cols, .. } = self.columns;
        for row in 0..rows {
            // SAFETY: memory for the row is there, and nothing else has these columns of it.
            unsafe { first.add(row * stride).write_bytes(0, cols) };
        }
        zeroed.fetch_add(rows * cols, Ordering::AcqRel);
        self.columns
    }
}

/// A part of a vector that does not hold zeros yet.
pub(crate) struct Part<'a>(Unmade<'a>);

impl<'a> Part<'a> {
    /// The part, as zeros.
    pub fn zeros(self) -> &'a mut [f32] {
        let columns = self.0.zeros();
        // SAFETY: a part is one row, which holds numbers now and which nothing else has.
        unsafe { std::slice::from_raw_parts_mut(columns.first, columns.cols) }
    }
}

/// Where columns lie in a vector: rows of `cols` values from `at` on, `stride` apart.
struct Place {
    at: usize,
    stride: usize,
    rows: usize,
    cols: usize,
}

/// A vector of `len` values, in places that `fill` must make. `counted`: by whoever takes them, else all at once before.
///
/// # Safety
/// Each of the values is in one of the places, and in no other.
unsafe fn made<E>(
    what: &str,
    len: usize,
    places: impl Iterator<Item = Place>,
    counted: bool,
    fill: impl FnOnce(Vec<Unmade>) -> Result<(), E>,
) -> Result<Vec<f32>, E> {
    let mut values: Vec<f32> = Vec::with_capacity(len);
    let spare = &mut values.spare_capacity_mut()[..len];
    if !counted {
        for value in spare.iter_mut() {
            value.write(0.0);
        }
    }
    let (start, zeroed) = (spare.as_mut_ptr().cast::<f32>(), AtomicUsize::new(0));
    let parts = places.map(|Place { at, stride, rows, cols }| Unmade {
        columns: Columns { first: start.wrapping_add(at), stride, rows, cols, matrix: PhantomData },
        zeroed: counted.then_some(&zeroed),
    });
    fill(parts.collect())?;
    // A place is counted once, as making it takes it away.
    assert!(!counted || zeroed.into_inner() == len, "{what} were left out");
    // SAFETY: the capacity is there, and all values were written: before, or with the places that have them.
    unsafe { values.set_len(len) };
    Ok(values)
}

/// The sizes of `len` values' parts of `size` but the last.
pub(crate) fn sizes(len: usize, size: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(size.max(1)).map(move |at| size.min(len - at))
}

/// A vector of parts of these sizes, all of which `fill` must make and may fill.
///
/// # Errors
/// Those of `fill`.
pub(crate) fn zeros<E>(
    sizes: impl Iterator<Item = usize>,
    fill: impl FnOnce(Vec<Part>) -> Result<(), E>,
) -> Result<Vec<f32>, E> {
    let sizes: Vec<usize> = sizes.collect();
    let places = sizes.iter().scan(0, |end, &cols| {
        *end += cols;
        Some(Place { at: *end - cols, stride: cols, rows: 1, cols })
    });
    let fill = |parts: Vec<Unmade>| fill(parts.into_iter().map(Part).collect());
    // SAFETY: one part begins where the one before ends.
    unsafe { made("parts", sizes.iter().sum(), places, true, fill) }
}

/// Rows up to which one thread zeroes all columns: counting them would take longer.
const FEW_ROWS: usize = 7;

/// Row-major matrices of `rows` rows and so many columns each, one after the other, in parts of `size` columns but the last of
/// each, all of which `fill` must make and may write to.
///
/// # Errors
/// Those of `fill`.
pub(crate) fn zeros_by_columns<E>(
    rows: usize,
    cols: impl Iterator<Item = usize>,
    size: usize,
    fill: impl FnOnce(Vec<Unmade>) -> Result<(), E>,
) -> Result<Vec<f32>, E> {
    let widths: Vec<usize> = cols.collect();
    let matrices = widths.iter().scan(0, |end, &stride| {
        *end += rows * stride;
        Some((*end - rows * stride, stride))
    });
    let places = matrices.flat_map(|(at, stride)| {
        let columns = (0..stride).step_by(size.max(1));
        columns.map(move |col| Place { at: at + col, stride, rows, cols: size.min(stride - col) })
    });
    // SAFETY: one matrix begins where the one before ends, and its places begin where those before in its rows end.
    unsafe { made("columns", rows * widths.iter().sum::<usize>(), places, rows > FEW_ROWS, fill) }
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
    fn columns_are_zeros_and_keep_what_is_written_to_them() {
        for rows in [2, FEW_ROWS + 1] {
            let made = zeros_by_columns(rows, [3, 0, 2].into_iter(), 2, |parts| {
                assert_eq!(parts.len(), 3);
                std::thread::scope(|scope| {
                    for (index, part) in parts.into_iter().enumerate() {
                        scope.spawn(move || {
                            let mut columns = part.zeros();
                            let zeros = vec![0.0; columns.cols()];
                            assert!(columns.rows() == rows && columns.row(rows - 1) == zeros);
                            columns.row(rows - 1)[0] = 1.0 + index as f32;
                        });
                    }
                });
                Ok::<_, ()>(())
            });
            let mut expected = vec![0.0; 5 * rows];
            expected[3 * (rows - 1)..3 * rows].copy_from_slice(&[1.0, 0.0, 2.0]);
            expected[5 * rows - 2] = 3.0;
            assert_eq!(made.unwrap(), expected);
        }
        let mut values = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(Columns::of(&mut values, 2).row(1), [3.0, 4.0]);
        assert_eq!((Columns::of(&mut values, 0).rows(), Columns::of(&mut [], 3).rows()), (0, 0));
    }

    #[test]
    #[should_panic(expected = "columns were left out")]
    fn columns_that_were_not_made_are_not_handed_out() {
        let _ = zeros_by_columns(FEW_ROWS + 1, [2].into_iter(), 1, |mut parts| {
            parts.pop().map(Unmade::zeros);
            Ok::<_, ()>(())
        });
    }

    #[test]
    #[should_panic(expected = "there are 1 rows")]
    fn a_row_that_is_not_there_is_not_read() {
        Columns::of(&mut [1.0, 2.0], 2).row(1);
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

//! Products of `f32` matrices by the `gemm` crate, which candle uses too, behind a safe door.
#![allow(unsafe_code)]

/// Shapes and strides of `c = a·b` or `c += a·b`: `a` is `m × k`, `b` is `k × n`, `c` is `m × n`; strides are from row to
/// row and from column to column.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `b` and `c`.
    pub n: usize,
    /// Columns of `a`, rows of `b`.
    pub k: usize,
    /// Strides of `a`.
    pub a: [usize; 2],
    /// Strides of `b`.
    pub b: [usize; 2],
    /// Strides of `c`.
    pub c: [usize; 2],
    /// Add to `c` instead of replacing it.
    pub add: bool,
}

/// The product on the calling thread, in an order of additions that depends on the shape only.
///
/// # Panics
/// If a matrix does not lie within its slice.
pub fn gemm(shape: &Gemm, a: &[f32], b: &[f32], c: &mut [f32]) {
    let Gemm { m, n, k, .. } = *shape;
    if m == 0 || n == 0 {
        return;
    }
    let last = |rows: usize, cols: usize, [row, col]: [usize; 2]| (rows - 1) * row + (cols - 1) * col;
    assert!(k > 0 && last(m, k, shape.a) < a.len() && last(k, n, shape.b) < b.len() && last(m, n, shape.c) < c.len());
    // SAFETY: the assertion above bounds every index that the strides can reach, as each grows with row and column; `c`
    // is borrowed mutably, so it overlaps neither `a` nor `b`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            shape.c[1] as isize,
            shape.c[0] as isize,
            shape.add,
            a.as_ptr(),
            shape.a[1] as isize,
            shape.a[0] as isize,
            b.as_ptr(),
            shape.b[1] as isize,
            shape.b[0] as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_right_with_any_strides() {
        let (m, n, k) = (3, 5, 7);
        let a: Vec<f32> = (0..m * k).map(|i| i as f32 - 9.0).collect();
        let b: Vec<f32> = (0..n * k).map(|i| (i % 11) as f32).collect();
        let mut c = vec![1.0; m * n];
        // `b` is given as its transpose.
        gemm(&Gemm { m, n, k, a: [k, 1], b: [1, k], c: [n, 1], add: true }, &a, &b, &mut c);
        for (i, c) in c.iter().enumerate() {
            let sum: f32 = (0..k).map(|j| a[i / n * k + j] * b[i % n * k + j]).sum();
            assert_eq!(*c, sum + 1.0);
        }
    }
}

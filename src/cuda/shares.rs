//! How a product with many rows of activations is shared out among a GPU's multiprocessors (`kernels/prefill.cuh`).

use super::family::UNIT_COLS;
use crate::codec::Geometry;

/// Rows of the matrix in a multiprocessor's block.
pub(super) const BLOCK_ROWS: usize = 128;

/// A kernel's share of the activations, and what it costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Width {
    /// Rows of activations in a block.
    pub columns: usize,
    /// Multiprocessors that work together: on neighbouring rows of the matrix, or on parts of the same rows.
    pub cluster: usize,
    /// Parts into which the columns of the matrix are cut: the cluster, or 1.
    pub parts: usize,
    /// Time for 128 columns of the matrix in each block, in microseconds on an H200.
    pub unit: f64,
    /// Time to add up the pieces of blocks.
    pub meeting: f64,
}

/// The shares of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Which of the widths.
    pub kernel: usize,
    /// Its rows of activations in a block.
    pub columns: usize,
    /// Rows of activations, with those that fill up the last block.
    pub padded: usize,
    /// Blocks of the grid, a multiprocessor's each.
    pub grid: usize,
    /// Blocks of the product, or of clusters, that are cut into pieces.
    pub cut: usize,
}

impl Plan {
    /// The one that should take the least time: with one of the kernels, blocks whole or cut.
    pub fn of(widths: &[Width], geometry: Geometry, batch: usize, processors: usize) -> Option<Plan> {
        let with = |kernel| [false, true].map(|cut| Plan::with(widths, kernel, cut, geometry, batch, processors));
        let plans = (0..widths.len()).flat_map(with).flatten();
        plans.min_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, plan)| plan)
    }

    /// One of them, and its cost.
    fn with(
        widths: &[Width],
        kernel: usize,
        cut: bool,
        Geometry { rows, cols }: Geometry,
        batch: usize,
        processors: usize,
    ) -> Option<(f64, Plan)> {
        let Width { columns, cluster, parts, unit, meeting } = widths[kernel];
        let (units, padded) = (cols.div_ceil(UNIT_COLS), batch.next_multiple_of(columns));
        let blocks = rows.div_ceil(BLOCK_ROWS * cluster / parts) * (padded / columns);
        let clusters = processors / cluster;
        let plan = |grid, cut| Plan { kernel, columns, padded, grid: grid * cluster, cut };
        if clusters == 0 {
            return None;
        }
        if parts > 1 {
            // Clusters lie within parts of the GPU that are multiples of two, but not of three: not all have room at once.
            let room = if cluster > 2 { clusters * 7 / 8 } else { clusters };
            let fits = cut && blocks <= room && units >= parts;
            return fits.then(|| (unit * units.div_ceil(parts) as f64 + meeting, plan(blocks, blocks)));
        }
        if !cut {
            let grid = clusters.min(blocks);
            return Some((unit * (blocks.div_ceil(grid) * units) as f64, plan(grid, 0)));
        }
        let grid = clusters.min(blocks * units);
        let (each, rest) = ((blocks * units) as f64 / grid as f64, blocks % grid);
        (rest != 0).then(|| (unit * each + meeting, plan(grid, blocks.min(rest + grid))))
    }

    /// Floats that blocks hand to each other.
    pub fn partial(&self) -> usize {
        if self.cut > 0 { self.grid * BLOCK_ROWS * self.columns } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_cover_every_row_and_their_pieces_every_block() {
        let widths = [(64, 1, 1, 0.4, 15.0), (64, 4, 4, 0.4, 3.0), (128, 2, 1, 0.6, 16.0), (256, 2, 1, 1.2, 18.0)];
        let widths =
            widths.map(|(columns, cluster, parts, unit, meeting)| Width { columns, cluster, parts, unit, meeting });
        let mut kinds = [0; 3];
        for (rows, cols) in [(1, 1), (130, 2050), (4096, 4096), (14336, 4096), (28672, 4096), (4096, 14336)] {
            for batch in [1, 64, 65, 100, 128, 200, 512, 600, 1024] {
                for processors in [1, 2, 14, 114, 132] {
                    let plan = Plan::of(&widths, Geometry { rows, cols }, batch, processors).unwrap();
                    let Width { columns, cluster, parts, .. } = widths[plan.kernel];
                    assert!(
                        plan.padded >= batch && plan.padded < batch + columns && plan.padded.is_multiple_of(columns)
                    );
                    let (blocks, grid) =
                        (rows.div_ceil(BLOCK_ROWS * cluster / parts) * (plan.padded / columns), plan.grid / cluster);
                    assert!(plan.columns == columns && plan.grid <= processors && grid > 0);
                    assert!(plan.grid.is_multiple_of(cluster), "{plan:?} of {blocks}");
                    kinds[if parts > 1 { 2 } else { usize::from(plan.cut > 0) }] += 1;
                    if parts > 1 {
                        assert!((plan.cut, grid) == (blocks, blocks), "{plan:?} of {blocks}");
                        continue;
                    }
                    // What is cut is all, or leaves whole rounds.
                    assert!(plan.cut <= blocks && plan.cut < 2 * grid, "{plan:?} of {blocks}");
                    assert!(plan.cut == 0 || (blocks - plan.cut).is_multiple_of(grid), "{plan:?} of {blocks}");
                }
            }
        }
        assert!(kinds.iter().all(|&count| count > 0), "{kinds:?}");
        assert_eq!(Plan::of(&widths, Geometry { rows: 128, cols: 128 }, 64, 0), None);
    }
}

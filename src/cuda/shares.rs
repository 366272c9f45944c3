//! How a product with many rows of activations is shared out among a GPU's multiprocessors (`kernels/prefill.cuh`).

use std::fmt;

use super::family::UNIT_COLS;
use crate::codec::Geometry;

/// A kernel's share of the activations, and what it costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Width {
    /// Rows of activations in a block.
    pub columns: usize,
    /// Rows of the matrix in a block.
    pub rows: usize,
    /// Time for 128 columns of the matrix in each block, in microseconds on an H200.
    pub unit: f64,
    /// Time to add up the pieces of blocks.
    pub meeting: f64,
    /// The same where each block is cut into as many pieces, one for each block of the grid: for kernels that gain by it.
    pub evenly: Option<f64>,
}

impl Width {
    /// Of kernels that gain by even pieces. `meeting`: of any pieces, and of even ones.
    pub const fn of(columns: usize, rows: usize, unit: f64, [meeting, evenly]: [f64; 2]) -> Width {
        Width { columns, rows, unit, meeting, evenly: Some(evenly) }
    }
}

/// Pieces that a block is cut into evenly at most.
const PIECES: usize = 8;

/// How blocks are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    Whole,
    /// Into so many pieces each.
    Evenly(usize),
    /// So that all of the grid have as much to do.
    Any,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cut::Whole => write!(f, "whole"),
            Cut::Evenly(pieces) => write!(f, "in {pieces}"),
            Cut::Any => write!(f, "cut"),
        }
    }
}

/// Which of a layout's kernels multiplies, and how its blocks are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub kernel: usize,
    pub cut: Cut,
}

/// The shares of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Which of the widths.
    pub kernel: usize,
    /// Its rows of activations in a block.
    pub columns: usize,
    /// Its rows of the matrix in a block.
    pub rows: usize,
    /// Rows of activations, with those that fill up the last block.
    pub padded: usize,
    /// Blocks of the grid.
    pub grid: usize,
    /// Blocks of the product that are cut into pieces.
    pub cut: usize,
}

impl Plan {
    /// The one that should take the least time.
    pub fn of(widths: &[Width], geometry: Geometry, batch: usize, processors: usize) -> Option<Plan> {
        let plans = Plan::all(widths, geometry, batch, processors);
        plans.min_by(|(a, ..), (b, ..)| a.total_cmp(b)).map(|(.., plan)| plan)
    }

    /// The ways to share a product out, that which should take the least time first.
    pub fn likeliest(widths: &[Width], geometry: Geometry, batch: usize, processors: usize) -> Vec<Share> {
        let mut plans: Vec<_> = Plan::all(widths, geometry, batch, processors).collect();
        plans.sort_by(|(a, ..), (b, ..)| a.total_cmp(b));
        plans.into_iter().map(|(_, share, _)| share).collect()
    }

    /// The plan of one of them; `None` if there is none for so many rows.
    pub fn shared(widths: &[Width], share: Share, geometry: Geometry, batch: usize, processors: usize) -> Option<Plan> {
        Plan::with(widths, share, geometry, batch, processors).map(|(.., plan)| plan)
    }

    fn all(
        widths: &[Width],
        geometry: Geometry,
        batch: usize,
        processors: usize,
    ) -> impl Iterator<Item = (f64, Share, Plan)> {
        let cuts = || [Cut::Whole, Cut::Any].into_iter().chain((2..=PIECES).map(Cut::Evenly));
        let shares = (0..widths.len()).flat_map(move |kernel| cuts().map(move |cut| Share { kernel, cut }));
        shares.filter_map(move |share| Plan::with(widths, share, geometry, batch, processors))
    }

    /// The time that one of them should take, itself, and its plan.
    fn with(
        widths: &[Width],
        share: Share,
        geometry: Geometry,
        batch: usize,
        processors: usize,
    ) -> Option<(f64, Share, Plan)> {
        let Share { kernel, cut } = share;
        let Width { columns, rows, unit, meeting, evenly } = *widths.get(kernel)?;
        let Geometry { rows: height, cols } = geometry;
        let (units, padded) = (cols.div_ceil(UNIT_COLS), batch.next_multiple_of(columns));
        let blocks = height.div_ceil(rows) * (padded / columns);
        let plan = |grid, cut| Plan { kernel, columns, rows, padded, grid, cut };
        let (time, plan) = match cut {
            Cut::Whole => {
                let grid = processors.min(blocks);
                (unit * (blocks.div_ceil(grid.max(1)) * units) as f64, plan(grid, 0))
            }
            Cut::Evenly(pieces) => {
                let meeting = evenly.filter(|_| pieces <= units && blocks * pieces <= processors)?;
                (unit * units.div_ceil(pieces) as f64 + meeting, plan(blocks * pieces, blocks))
            }
            Cut::Any => {
                let grid = processors.min(blocks * units).max(1);
                if blocks.is_multiple_of(grid) {
                    return None;
                }
                let each = (blocks * units) as f64 / grid as f64;
                (unit * each + meeting, plan(grid, blocks.min(blocks % grid + grid)))
            }
        };
        (plan.grid > 0 && processors > 0).then_some((time, share, plan))
    }

    /// Floats that blocks hand to each other.
    pub fn partial(&self) -> usize {
        if self.cut > 0 { self.grid * self.rows * self.columns } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_cover_every_row_and_their_pieces_every_block() {
        let widths = [
            (32, 256, 0.7, 4.0, Some(2.0)),
            (64, 128, 0.4, 15.0, None),
            (128, 128, 0.6, 16.0, None),
            (256, 128, 1.2, 18.0, None),
        ];
        let widths =
            widths.map(|(columns, rows, unit, meeting, evenly)| Width { columns, rows, unit, meeting, evenly });
        for (rows, cols) in [(1, 1), (130, 2050), (4096, 4096), (14336, 4096), (28672, 4096), (4096, 14336)] {
            for batch in [1, 32, 64, 65, 100, 128, 200, 512, 600, 1024] {
                for processors in [1, 2, 14, 114, 132] {
                    let plan = Plan::of(&widths, Geometry { rows, cols }, batch, processors).unwrap();
                    let Width { columns, rows: height, .. } = widths[plan.kernel];
                    assert!(
                        plan.padded >= batch && plan.padded < batch + columns && plan.padded.is_multiple_of(columns)
                    );
                    let blocks = rows.div_ceil(height) * (plan.padded / columns);
                    assert!((plan.columns, plan.rows) == (columns, height) && plan.grid <= processors && plan.grid > 0);
                    // What is cut is all, or leaves whole rounds.
                    assert!(plan.cut <= blocks && plan.cut < 2 * plan.grid, "{plan:?} of {blocks}");
                    assert!(plan.cut == 0 || (blocks - plan.cut).is_multiple_of(plan.grid), "{plan:?} of {blocks}");
                }
            }
        }
        assert_eq!(Plan::of(&widths, Geometry { rows: 128, cols: 128 }, 64, 0), None);
    }
}

//! The grid and the shared memory that fused products of few rows ask for.

use super::family::{Family, TILE_ROWS, UNIT_COLS, stages};
use super::kernels::Kernels;
use crate::codec::Geometry;

/// The grid of a product, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LaunchShape {
    pub kernel: usize,
    pub groups: Groups,
    pub slabs: usize,
    pub threads: u32,
    pub shared: usize,
    /// Stages in the ring, and on their way at most.
    pub slots: usize,
    pub in_flight: usize,
    /// Partial results that a block keeps before it adds them.
    pub keep: usize,
    /// Floats that blocks hand to each other.
    pub partial: usize,
    /// Words that count which blocks have come, if more than two for each multiprocessor may be needed.
    pub arrived: usize,
    /// Whether its kernel takes the scales of rows.
    pub scaled: bool,
}

/// How many groups of tiles there are for each slab of the columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Groups {
    pub each: usize,
    /// The same for slabs that have a stage more than others.
    pub longer: usize,
    pub blocks: usize,
}

impl Groups {
    /// As many for each slab.
    pub fn even(each: usize, slabs: usize) -> Groups {
        Groups { each, longer: each, blocks: each * slabs }
    }

    /// So that the block that has most stages has as few as can be.
    fn of(tiles: usize, stages: usize, slabs: usize, processors: usize) -> Groups {
        let (length, more) = (stages / slabs, stages % slabs);
        if tiles == 0 {
            return Groups::even(0, slabs);
        }
        let even = tiles.min((processors / slabs).max(1));
        let most = tiles.div_ceil(even) * stages.div_ceil(slabs);
        let least = if more > 0 { (tiles * stages).div_ceil(processors.max(1)).max(length + 1) } else { most };
        for time in least..most {
            let (each, longer) = (tiles.div_ceil(time / length), tiles.div_ceil(time / (length + 1)));
            if each * (slabs - more) + longer * more <= processors {
                // What is left makes some blocks shorter.
                let each = tiles.min((processors - longer * more) / (slabs - more));
                let longer = tiles.min((processors - each * (slabs - more)) / more);
                return Groups { each, longer, blocks: each * (slabs - more) + longer * more };
            }
        }
        Groups::even(even, slabs)
    }
}

impl LaunchShape {
    /// Grid and shared memory for `batch` activations of `parts` columns each; `None` if no kernel can take them.
    pub fn of(
        family: Family,
        geometry: Geometry,
        kernels: &Kernels,
        batch: usize,
        parts: usize,
        programmatic: bool,
    ) -> Option<LaunchShape> {
        let few = if batch > 1 && parts <= 2 { LaunchShape::few(family, geometry, kernels, batch) } else { None };
        let shape = match few {
            Some(shape) => shape,
            None if batch * parts <= 16 => {
                LaunchShape::narrow(family, geometry, kernels, (batch, parts), programmatic)?
            }
            None => LaunchShape::wide(family, geometry, kernels, (batch, parts))?,
        };
        shape.possible()
    }

    /// Up to 16 columns: `kernels/product.cuh`, and `kernels/kquant_single.cuh` for a single row of a block format.
    fn narrow(
        family: Family,
        geometry: Geometry,
        kernels: &Kernels,
        (batch, parts): (usize, usize),
        programmatic: bool,
    ) -> Option<LaunchShape> {
        let columns = batch * parts;
        let single = family.blocks() && batch == 1 && parts <= 2;
        let kernel = match columns {
            _ if single => SINGLE,
            ..=8 => 0,
            _ => 1,
        };
        let (stages, tiles) = (stages(geometry.cols), geometry.rows.div_ceil(TILE_ROWS));
        let (room, processors) = (kernels.packed(family).ok()?.products.get(kernel)?.1, kernels.processors);
        let (slot, hopper) = (slot(family, kernels), kernels.warpgroups);
        // What a block keeps on its way at most. More is slower, or no faster.
        let in_flight = family.stages_of(match family.blocks() {
            true if single => 55_296,
            true => 27_648,
            false => 49_152,
        });
        let keep = |teams: usize| if columns <= 4 { 8 } else { 32 / columns } / teams;
        let besides = |teams: usize, slabs: usize| {
            let units = stages.div_ceil(slabs) * Family::UNITS;
            if single {
                // `single_shared_bytes`.
                let activations = parts * (units * 2 * UNIT_COLS + 64) + units * family.plane_sums_bytes() + 272;
                return 256 + keep(teams) * 512 * teams + activations;
            }
            // `product_shared_bytes`, without the ring.
            let exact = columns * (units * (2 * UNIT_COLS + family.group_sums_bytes()) + 64);
            let planes = 3 * batch * (units * UNIT_COLS + 64) + 32 * units;
            let bytes = parts < 3 && columns <= 8 && batch <= family.byte_rows();
            let activations = if bytes { exact.max(planes) } else { exact };
            384 + keep(teams) * columns * 512 * teams + activations
        };
        // Teams take stages in turn: slots must be more than what is on its way, see `Ring`. Those of a single row are of
        // four warps.
        let apart = |teams: usize| match teams {
            ..=1 => 0,
            _ if single => 2 * teams,
            _ => teams,
        };
        let few = in_flight.min(32_768usize.div_ceil(family.stage_bytes()));
        // Floats with a slab more, and so more slots, are faster than with the fewest of both.
        let more = usize::from(family.floats());
        let least = |teams: usize| if teams > 1 { few + apart(teams) + more } else { 3 };
        let fewest = |teams: usize| (1..=stages).find(|&slabs| least(teams) * slot + besides(teams, slabs) <= room);
        let (one, two) = (fewest(1), fewest(2));
        // Two teams of floats gain where there are many columns, if their slots leave room for those, or few stages. Those of
        // `window`, whose warps have more to do with a unit, gain with few columns too.
        let gain = family.floats()
            && hopper
            && two.is_some()
            && match columns {
                ..=4 => family == Family::Window || tiles * stages <= 8 * processors,
                5..=8 => one > Some(1) || two == Some(1),
                _ => two <= one,
            };
        // `teams`.
        let own = if hopper && (family.blocks() || family.byte_rows() > 0) { 2 } else { 1 };
        let teams = if gain { 2 } else { own };
        let slabs = enough(if teams > 1 { two } else { one }?, tiles, stages, processors);
        let wanted = match (family.blocks(), programmatic) {
            (true, _) => 16,
            (_, true) => 3 * in_flight,
            _ => 2 * in_flight,
        };
        let (least, besides) = (least(teams), besides(teams, slabs));
        let slots = ((room - besides) / slot).min(wanted).clamp(least, 16);
        Some(LaunchShape {
            kernel: if gain { kernel + TEAMS } else { kernel },
            groups: Groups::of(tiles, stages, slabs, processors),
            slabs,
            threads: 256 * teams as u32 + 32,
            shared: slots * slot + besides,
            slots,
            in_flight: in_flight.min(slots - apart(teams)),
            keep: keep(teams),
            partial: if slabs > 1 { slabs * batch * tiles * TILE_ROWS } else { 0 },
            arrived: if slabs > 1 { tiles } else { 0 },
            scaled: !family.blocks(),
        })
    }

    /// 17 to 64 columns: `kernels/wide.cuh`.
    fn wide(
        family: Family,
        geometry: Geometry,
        kernels: &Kernels,
        (batch, parts): (usize, usize),
    ) -> Option<LaunchShape> {
        let (kernel, columns) = match batch * parts {
            ..=32 => (2, 32),
            33..=64 => (3, 64),
            _ => return None,
        };
        let (stages, tiles) = (stages(geometry.cols), geometry.rows.div_ceil(TILE_ROWS));
        let (room, processors) = (kernels.packed(family).ok()?.products.get(kernel)?.1, kernels.processors);
        let slot = slot(family, kernels);
        let besides = 256 + 2 * 8 * batch * parts * 80 + 8 * columns * family.group_sums_bytes();
        let slots = 73_728usize.div_ceil(family.stage_bytes()).min(8).min(room.checked_sub(besides)? / slot);
        // Blocks of a group wait for each other, so all must run at once.
        if stages > processors || slots < 3 {
            return None;
        }
        Some(LaunchShape {
            kernel,
            groups: Groups::even(tiles.min(processors / stages), stages),
            slabs: stages,
            threads: 256,
            shared: slots * slot + besides,
            slots,
            in_flight: slots,
            keep: 0,
            partial: if stages > 1 { stages * batch * tiles * TILE_ROWS } else { 0 },
            arrived: 0,
            scaled: !family.blocks(),
        })
    }

    /// The product for 2 to 16 rows of BF16 or F16, `kernels/kquant_few.cuh`, where there is one.
    fn few(family: Family, geometry: Geometry, kernels: &Kernels, batch: usize) -> Option<LaunchShape> {
        if !family.blocks() || !kernels.warpgroups || batch > 16 {
            return None;
        }
        let (eights, processors) = (batch.div_ceil(8), kernels.processors);
        let (kernel, (stages, tiles)) = (FEW + eights - 1, (stages(geometry.cols), geometry.rows.div_ceil(TILE_ROWS)));
        let room = kernels.packed(family).ok()?.products.get(kernel)?.1;
        // `few_shared_bytes`.
        let slot = family.stage_bytes().next_multiple_of(128);
        let besides = |slabs: usize| {
            let units = stages.div_ceil(slabs) * Family::UNITS;
            704 + eights * 8192 + units * eights * (2048 + family.few_group_bytes())
        };
        // Its four teams take stages in turn, see `Ring`.
        const TEAMS: usize = 4;
        let in_flight = family.stages_of(family.few_in_flight());
        let least = TEAMS + in_flight.min(32_768usize.div_ceil(family.stage_bytes()));
        let mut slabs = (1..=stages).find(|&slabs| least * slot + besides(slabs) <= room)?;
        if slabs > 1 {
            // Where slabs meet anyway, activations of more than four stages take longer to come than more sums to add.
            slabs = slabs.max(stages.div_ceil(4));
        }
        let slabs = enough(slabs, tiles, stages, processors);
        let slots = ((room - besides(slabs)) / slot).clamp(least, 16);
        let shape = LaunchShape {
            kernel,
            groups: Groups::of(tiles, stages, slabs, processors),
            slabs,
            threads: 640,
            shared: slots * slot + besides(slabs),
            slots,
            in_flight: in_flight.min(slots - TEAMS),
            keep: 0,
            partial: if slabs > 1 { slabs * batch * tiles * TILE_ROWS } else { 0 },
            arrived: if slabs > 1 { tiles } else { 0 },
            scaled: false,
        };
        shape.possible()
    }

    /// As [`LaunchShape::of`] for up to 16 columns of a matrix in layout `pair`, whose largest stage takes `slot` bytes of
    /// shared memory: what `kernels/pair_product.cuh` asks for. `room` are the bytes that a block may have.
    pub fn of_pair(
        geometry: Geometry,
        slot: usize,
        (processors, room): (usize, usize),
        batch: usize,
        parts: usize,
        programmatic: bool,
    ) -> Option<LaunchShape> {
        let columns = batch * parts;
        let kernel = [8, 16].iter().position(|&most| columns <= most)?;
        let (stages, tiles) = (stages(geometry.cols), geometry.rows.div_ceil(TILE_ROWS));
        let shared = |slabs: usize, slots: usize, keep: usize| {
            let width = stages.div_ceil(slabs) * Family::UNITS * UNIT_COLS;
            PAIR_TABLE + slots * slot + 256 + 320 + keep * columns * 512 + columns * (2 * width + 64)
        };
        let slabs = enough((1..=stages).find(|&slabs| shared(slabs, 5, 1) <= room)?, tiles, stages, processors);
        let keep = (1..=8).rev().find(|&keep| shared(slabs, 5, keep) <= room)?;
        let slots = (5..=8).rev().find(|&slots| shared(slabs, slots, keep) <= room)?;
        let shape = LaunchShape {
            kernel,
            groups: Groups::of(tiles, stages, slabs, processors),
            slabs,
            threads: 288,
            shared: shared(slabs, slots, keep),
            slots,
            in_flight: if programmatic { 2 } else { 3 },
            keep,
            partial: if slabs > 1 { slabs * batch * tiles * TILE_ROWS } else { 0 },
            arrived: if slabs > 1 { tiles } else { 0 },
            scaled: false,
        };
        shape.possible()
    }

    /// Itself, if what blocks hand to each other fits into the workspace.
    fn possible(self) -> Option<LaunchShape> {
        (4 * self.partial <= super::scratch::WORKSPACE && self.groups.blocks > 0).then_some(self)
    }
}

/// Bytes of a stage in the ring: `slot_bytes` of `kernels/ring.cuh`.
fn slot(family: Family, kernels: &Kernels) -> usize {
    let (unit, trailer) = family.bytes();
    let trailers = if kernels.warpgroups { 1 } else { Family::UNITS };
    (Family::UNITS * unit + trailers * trailer).next_multiple_of(128)
}

/// At least `slabs` of the columns, and so many that blocks of small matrices fill the GPU.
fn enough(slabs: usize, tiles: usize, stages: usize, processors: usize) -> usize {
    (slabs..stages).find(|slabs| tiles * slabs * 2 > processors).unwrap_or(slabs.max(stages))
}

/// The number of the product for a single row among a block format's kernels.
const SINGLE: usize = 4;
/// And the first of those for up to 8 and 16 rows.
const FEW: usize = 5;
/// From the products for 8 and 16 columns of floats to those with two teams.
const TEAMS: usize = 4;

/// Whether a layout's kernel of that number takes several matrices with the same activations.
pub(super) fn takes_several(kernel: usize, family: Family) -> bool {
    match kernel {
        0 => true,
        SINGLE | FEW if family.blocks() => true,
        TEAMS => family.floats(),
        _ => false,
    }
}

/// Bytes of the table of layout `pair`, which each lane has for itself.
pub(super) const PAIR_TABLE: usize = 256 * 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_of_different_lengths_have_groups_of_their_own_number() {
        // Two slabs of four stages and two of three: 28 stages for the longest block, where 33 groups for each had 32.
        assert_eq!(Groups::of(256, 14, 4, 132), Groups { each: 29, longer: 37, blocks: 132 });
        // As many stages in each, one slab, more slabs than processors, no tiles.
        assert_eq!(Groups::of(256, 14, 7, 132), Groups::even(18, 7));
        assert_eq!(Groups::of(384, 4, 1, 132), Groups::even(132, 1));
        assert_eq!(Groups::of(5, 9, 4, 3), Groups::even(1, 4));
        assert_eq!(Groups::of(0, 4, 3, 132).blocks, 0);
        // Never more blocks than processors, nor more groups than tiles.
        for (tiles, stages, slabs) in [(1, 3, 2), (7, 5, 3), (40, 11, 4), (256, 14, 5), (8016, 5, 2)] {
            let groups = Groups::of(tiles, stages, slabs, 132);
            assert!(groups.blocks <= 132 && groups.each.max(groups.longer) <= tiles, "{groups:?}");
        }
    }
}

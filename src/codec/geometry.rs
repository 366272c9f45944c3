//! Tiles and bands: which weights lie where.

/// Rows and columns of a full tile.
pub const TILE: usize = 256;
/// Rows of a full band, the independently decodable substream of a tile.
pub const BAND_ROWS: usize = 64;
/// Weights of a full band.
pub const BAND_WEIGHTS: usize = TILE * BAND_ROWS;

/// The tile grid of a `rows × cols` matrix. Tiles at the right and bottom edge are smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
}

/// A rectangle of weights: a tile, or a band of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// First row.
    pub row: usize,
    /// First column.
    pub col: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
}

impl Geometry {
    /// Tiles from top to bottom.
    pub fn tile_rows(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    /// Tiles from left to right.
    pub fn tile_cols(&self) -> usize {
        self.cols.div_ceil(TILE)
    }

    /// Number of tiles; they are numbered row by row.
    pub fn tiles(&self) -> usize {
        self.tile_rows() * self.tile_cols()
    }

    /// Where tile `index` lies.
    pub fn tile(&self, index: usize) -> Rect {
        let row = index / self.tile_cols() * TILE;
        let col = index % self.tile_cols() * TILE;
        Rect { row, col, rows: TILE.min(self.rows - row), cols: TILE.min(self.cols - col) }
    }
}

impl Rect {
    /// Number of weights.
    pub fn weights(&self) -> usize {
        self.rows * self.cols
    }

    /// Number of bands of a tile.
    pub fn bands(&self) -> usize {
        self.rows.div_ceil(BAND_ROWS)
    }

    /// Where band `index` of this tile lies.
    pub fn band(&self, index: usize) -> Rect {
        let skip = index * BAND_ROWS;
        Rect { row: self.row + skip, rows: BAND_ROWS.min(self.rows - skip), ..*self }
    }
}

/// Weights of a band rounded up to whole rANS steps (32 symbols of up to two weights): decoders fill this many classes.
pub fn padded(weights: usize) -> usize {
    weights.next_multiple_of(64)
}

//! What the fuzz targets share.

use candle_taper::format::{Checks, TileStream};
use candle_taper::{Backend, CompressedMatrix};

/// Matrices larger than this are not decoded: a header may announce a few gigabytes of zero-entropy weights.
const LIMIT: usize = 1 << 22;

/// Backends of this machine, scalar first.
pub fn backends() -> impl Iterator<Item = Backend> {
    Backend::ALL.into_iter().filter(|b| b.available())
}

/// Opens a stream and decodes it with every backend: all must agree on the verdict, and on the bytes if there are any.
/// `None` if it does not open, is too large, or does not decode.
pub fn decode_everywhere(stream: &[u8], checks: Checks) -> Option<Vec<u8>> {
    let parsed = TileStream::parse_with(stream, checks).ok()?;
    let geometry = parsed.geometry();
    if geometry.rows.checked_mul(geometry.cols).is_none_or(|weights| weights > LIMIT) {
        return None;
    }
    let decode = |backend| {
        let matrix = CompressedMatrix::from_stream(parsed.clone()).unwrap().with_backend(backend);
        // Tile by tile, so that what follows a damaged tile is decoded too.
        let tiles = (0..geometry.tiles()).map(|tile| matrix.decode_tile(tile).ok()).collect::<Vec<_>>();
        let whole = matrix.decode().ok();
        assert_eq!(whole.is_some(), tiles.iter().all(Option::is_some), "{}: whole and tiles differ", backend.name());
        (tiles, whole)
    };
    let expected = decode(Backend::Scalar);
    for backend in backends() {
        assert!(decode(backend) == expected, "{} differs from scalar", backend.name());
    }
    expected.1
}

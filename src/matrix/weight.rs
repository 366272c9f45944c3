//! A compressed matrix that owns its bytes, or shares a memory map: what a layer holds.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::decode::{Origin, Shared};
use super::{Activations, CompressedMatrix};
use crate::codec::{Dtype, Geometry, Plan};
use crate::cpu::Backend;
use crate::format::header::Header;
use crate::format::{Checks, TileStream};
use crate::{Error, Result};

/// A compressed matrix, parsed once and opened as often as needed at no cost. Cloning shares everything.
#[derive(Clone)]
pub struct Weight {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    header: Arc<Header>,
    checks: Checks,
    shared: Arc<Shared>,
    backend: Backend,
    activations: Activations,
    origin: Option<Arc<Origin>>,
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Geometry { rows, cols } = self.geometry();
        write!(f, "Weight({rows}x{cols} {} {})", self.plan().kind.name(), self.plan().stage_name())
    }
}

impl Weight {
    /// Takes the bytes of one tile stream: owned ones, or something that keeps a map alive. `bytes.as_ref()` must always
    /// give the same bytes.
    ///
    /// # Errors
    /// If they are not exactly one valid tile stream.
    pub fn new(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Weight> {
        let stream = TileStream::parse(bytes.as_ref())?;
        let shared = Arc::new(Shared::new(&stream));
        let (header, checks) = stream.into_header();
        let backend = Backend::current()?;
        let activations = Activations::default();
        let (bytes, header) = (Arc::new(bytes), Arc::new(header));
        Ok(Weight { bytes, header, checks, shared, backend, activations, origin: None })
    }

    /// Chooses what it is multiplied with, if it is INT8 with scales.
    pub fn with_activations(mut self, activations: Activations) -> Weight {
        self.activations = activations;
        self
    }

    /// Remembers where the matrix comes from: errors then start with file and tensor.
    pub fn with_origin(mut self, file: impl Into<PathBuf>, tensor: impl Into<String>) -> Weight {
        self.origin = Some(Arc::new(Origin { file: file.into(), tensor: tensor.into() }));
        self
    }

    /// The name of its tensor, if it comes from a checkpoint.
    pub fn name(&self) -> Option<&str> {
        self.origin.as_ref().map(|origin| origin.tensor.as_str())
    }

    /// Decodes with another backend, which must be available.
    pub fn with_backend(mut self, backend: Backend) -> Weight {
        assert!(backend.available(), "backend {} is not available on this machine", backend.name());
        self.backend = backend;
        self
    }

    /// The matrix, to decode or multiply with.
    ///
    /// # Errors
    /// If the bytes are no longer as long as they were.
    pub fn matrix(&self) -> Result<CompressedMatrix<'_>> {
        let bytes = (*self.bytes).as_ref();
        if bytes.len() as u64 != self.header.total {
            let (need, have) = (self.header.total, bytes.len() as u64);
            let error = Error::Truncated { what: "the tile stream", need, have };
            return Err(match &self.origin {
                Some(origin) => origin.name(error),
                None => error,
            });
        }
        let stream = TileStream::reopened(bytes, &self.header, self.checks);
        let matrix = CompressedMatrix::reopened(stream, self.shared.clone(), self.backend, self.origin.clone());
        Ok(matrix.with_activations(self.activations))
    }

    /// How the matrix is coded.
    pub fn plan(&self) -> &Plan {
        &self.header.plan
    }

    /// Its shape.
    pub fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// Its own dtype.
    pub fn dtype(&self) -> Dtype {
        self.header.plan.dtype
    }

    /// Bytes that it takes.
    pub fn stored_bytes(&self) -> usize {
        self.header.total as usize
    }
}

//! What a benchmark ran on.

use candle_core::Device;
use serde_json::{Value, json};

/// The machine and how much of it was used.
pub struct Machine {
    cpu: String,
    cores: usize,
    threads: usize,
    backend: &'static str,
    activations: &'static str,
    gpu: Option<Gpu>,
}

/// A GPU and how fast it reads its memory.
struct Gpu {
    name: String,
    bytes_per_s: f64,
}

impl Gpu {
    #[cfg(feature = "cuda")]
    fn of(device: &Device) -> anyhow::Result<Option<Gpu>> {
        let Device::Cuda(device) = device else { return Ok(None) };
        let name = device.cuda_stream().context().name().unwrap_or_else(|error| error.to_string());
        let bytes_per_s = candle_taper::cuda::GpuTimer::new(device)?.read_bandwidth()?;
        Ok(Some(Gpu { name, bytes_per_s }))
    }

    #[cfg(not(feature = "cuda"))]
    fn of(_: &Device) -> anyhow::Result<Option<Gpu>> {
        Ok(None)
    }
}

impl Machine {
    /// This machine.
    ///
    /// # Errors
    /// If `TAPER_CPU` asks for a backend that it lacks.
    pub fn here(activations: &'static str, device: &Device) -> anyhow::Result<Machine> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Ok(Machine {
            cpu: name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_string(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads: candle_core::utils::get_num_threads(),
            backend: candle_taper::Backend::current()?.name(),
            activations,
            gpu: Gpu::of(device)?,
        })
    }

    /// Bytes a second that the GPU's memory gives, if it ran on one.
    pub fn read_bandwidth(&self) -> Option<f64> {
        self.gpu.as_ref().map(|gpu| gpu.bytes_per_s)
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({"cpu": self.cpu, "cores": self.cores, "threads": self.threads, "backend": self.backend,
            "activations": self.activations, "gpu": self.gpu.as_ref().map(|gpu| json!({"name": gpu.name, "read_bytes_per_s": gpu.bytes_per_s})), "taper": env!("CARGO_PKG_VERSION")})
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Machine { cpu, cores, threads, backend, activations, gpu } = self;
        if let Some(Gpu { name, bytes_per_s }) = gpu {
            return write!(
                f,
                "{name}, reads {:.2} TB/s; {activations} activations; {cpu}, {cores} cores",
                bytes_per_s / 1e12
            );
        }
        write!(f, "{cpu}, {cores} cores, {threads} threads, {backend}; {activations} activations")
    }
}

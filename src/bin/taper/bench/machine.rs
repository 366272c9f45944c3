//! What a benchmark ran on.

use serde_json::{Value, json};

/// The machine and how much of it was used.
pub struct Machine {
    cpu: String,
    cores: usize,
    threads: usize,
    backend: &'static str,
    activations: &'static str,
}

impl Machine {
    /// This machine.
    ///
    /// # Errors
    /// If `TAPER_CPU` asks for a backend that it lacks.
    pub fn here(activations: &'static str) -> anyhow::Result<Machine> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Ok(Machine {
            cpu: name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_string(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads: candle_core::utils::get_num_threads(),
            backend: candle_taper::Backend::current()?.name(),
            activations,
        })
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({"cpu": self.cpu, "cores": self.cores, "threads": self.threads, "backend": self.backend,
            "activations": self.activations, "taper": env!("CARGO_PKG_VERSION")})
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Machine { cpu, cores, threads, backend, activations } = self;
        write!(f, "{cpu}, {cores} cores, {threads} threads, {backend}; {activations} activations")
    }
}

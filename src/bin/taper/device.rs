//! Where layers run, as it is given on the command line.

use std::str::FromStr;

use anyhow::{Context, Result};
use candle_core::Device;
use candle_taper::matrix::GpuLayout;

/// `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// The CPU.
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceName, String> {
        let number = |text: &str| text.parse().ok().map(DeviceName::Cuda);
        let device = match text.split_once(':') {
            None if text == "cpu" => Some(DeviceName::Cpu),
            None if text == "cuda" => Some(DeviceName::Cuda(0)),
            Some(("cuda", rest)) => number(rest),
            _ => None,
        };
        device.ok_or_else(|| "devices are cpu, cuda and cuda:N".into())
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl DeviceName {
    /// Opens it.
    pub fn open(self) -> Result<Device> {
        match self {
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Cuda(_) if !cfg!(feature = "cuda") => {
                anyhow::bail!("--device {self}: this build runs on the CPU only; build it with --features cuda")
            }
            DeviceName::Cuda(number) => Device::new_cuda(number).with_context(|| format!("--device {self}")),
        }
    }

    /// The first GPU of a build that can use one, else the CPU; and why not the GPU.
    pub fn best() -> (Device, Option<String>) {
        if !cfg!(feature = "cuda") {
            return (Device::Cpu, None);
        }
        match Device::new_cuda(0) {
            Ok(device) => (device, None),
            Err(error) => (Device::Cpu, Some(format!("running on the CPU: no GPU can be used ({error})"))),
        }
    }
}

/// A layout by its name, for clap.
pub fn layout(text: &str) -> Result<GpuLayout, String> {
    GpuLayout::from_name(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_written() {
        for (text, device) in
            [("cpu", DeviceName::Cpu), ("cuda:0", DeviceName::Cuda(0)), ("cuda:3", DeviceName::Cuda(3))]
        {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(0)));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "metal"] {
            assert!(wrong.parse::<DeviceName>().is_err(), "{wrong}");
        }
        assert_eq!(layout("fixed"), Ok(GpuLayout::Fixed));
        assert!(layout("zip").unwrap_err().contains("smallest"));
    }
}

//! Where the model comes from.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use candle_taper::Checkpoint;
use candle_taper::models::{CausalLm, CompressedLlama, CompressedWeights, Config, KQuantLlama, config, gguf, hub};
use candle_taper::text::ModelTokenizer;

use crate::args::{DtypeName, GenerateArgs};
use crate::device::DeviceName;
use crate::progress::Reporter;

/// The model that comes with the source.
const TALES: &str = "examples/tales";

/// The directory of the model that was asked for, or its GGUF file, or the directory of the one that comes with the source.
pub fn place(args: &GenerateArgs, quiet: bool) -> Result<PathBuf> {
    let id = args.model_id.as_deref().or(args.which);
    ensure!(id.is_some() || args.revision.is_none(), "--revision goes with --model-id or --which");
    if let Some(id) = id {
        let progress = Arc::new(Reporter::new(quiet, 0));
        let dir = hub::download(id, args.revision.as_deref(), progress.clone())?;
        progress.finish();
        return Ok(dir);
    }
    if let Some(place) = args.gguf.as_ref().or(args.compressed.as_ref()) {
        return Ok(place.clone());
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf()));
    let beside = beside.iter().flat_map(|dir| [dir.join(TALES), dir.join("tales")]);
    let mut places = std::iter::once(Path::new(env!("CARGO_MANIFEST_DIR")).join(TALES)).chain(beside);
    places.find(|dir| dir.join("config.json").is_file()).context("pass --compressed DIR: the directory of a Llama")
}

/// Loads the model. Matrices that are not compressed yet are compressed now, in memory, one at a time.
pub fn load(args: &GenerateArgs, dir: &Path, quiet: bool) -> Result<Box<dyn CausalLm>> {
    let (device, why) = match args.device {
        _ if args.cpu => (Device::Cpu, None),
        Some(name) => (name.open()?, None),
        None => DeviceName::best(),
    };
    if let Some(why) = why.filter(|_| !quiet) {
        eprintln!("{why}");
    }
    let dtype = match args.dtype {
        Some(DtypeName::F16) => DType::F16,
        Some(DtypeName::Bf16) => DType::BF16,
        Some(DtypeName::F32) => DType::F32,
        None if device.is_cuda() => DType::BF16,
        None => DType::F32,
    };
    if args.gguf.is_some() {
        return Ok(Box::new(KQuantLlama::from_gguf_on(&gguf::open(dir)?, dtype, &device)?));
    }
    let (options, chosen) = args.options()?;
    let config = config::read(dir)?;
    let checkpoint = Arc::new(Checkpoint::open(dir)?);
    ensure!(
        !(chosen && checkpoint.is_compressed()),
        "{} is compressed already: --codec, --bits and --stage are for models that are not",
        dir.display()
    );
    let bytes = checkpoint.tensors().iter().filter(|info| !info.compressed).map(|info| info.stored_bytes).sum();
    let progress = Arc::new(Reporter::new(quiet || checkpoint.is_compressed(), bytes));
    let weights = CompressedWeights::new(checkpoint, dtype, options)
        .with_device(&device, args.layout)
        .with_progress(progress.clone());
    let llama = CompressedLlama::load(&weights, &config)?;
    progress.finish();
    Ok(Box::new(llama))
}

/// The model's tokenizer.
pub fn tokenizer(args: &GenerateArgs, place: &Path, config: &Config) -> Result<ModelTokenizer> {
    Ok(match &args.gguf {
        Some(file) => ModelTokenizer::from_gguf(&gguf::open(file)?, config)?,
        None => ModelTokenizer::from_pretrained(place, config)?,
    })
}

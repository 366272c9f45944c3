//! Models as they are loaded to be timed.

use std::cell::Cell;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use candle_taper::Checkpoint;
use candle_taper::matrix::GpuLayout;
use candle_taper::models::{
    Cache, CheckpointBackend, CompressedWeights, Config, DenseLlama, KQuantLlama, Llama, Weights, config, gguf,
};
use candle_taper::nn::{CompressedEmbedding, CompressedLinear, LinearLayer};
use candle_transformers::models::llama as stock;
use candle_transformers::models::quantized_llama::ModelWeights;

use super::args::{Coding, Stock};

/// How a directory becomes a model.
#[derive(Clone, Debug)]
pub enum How {
    /// Ours; matrices that are not compressed yet are compressed so while they are loaded.
    Compressed(Coding),
    /// Ours over uncompressed weights, in the dtype of the activations.
    Dense,
    /// candle's own, weights and activations in this dtype.
    Stock(DType),
    /// Ours over the blocks of a GGUF file.
    Gguf,
    /// candle's own over the blocks of a GGUF file.
    StockGguf,
}

/// A model that is to be loaded.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What it is called in tables.
    pub name: String,
    /// Where it is.
    pub dir: PathBuf,
    /// What becomes of it.
    pub how: How,
}

/// How a new process is told to load candle's own model: this and a dtype.
const STOCK: &str = "candle-";

impl Plan {
    /// As [`Plan::code`] tells a new process.
    pub fn new(dir: &Path, code: &str) -> Result<Plan> {
        if let Some(how) = [How::Gguf, How::StockGguf].into_iter().find(|how| how.gguf_code() == Some(code)) {
            return Ok(Plan { name: code.into(), dir: dir.into(), how });
        }
        let how = match code.strip_prefix(STOCK).map(str::parse) {
            None => How::ours(code.parse().map_err(anyhow::Error::msg)?),
            Some(Ok(Stock::Float(dtype))) => How::Stock(dtype),
            Some(_) => bail!("no such model: {code}"),
        };
        Ok(Plan { name: code.into(), dir: dir.into(), how })
    }

    /// What `--probe` takes.
    pub fn code(&self) -> String {
        match &self.how {
            How::Compressed(coding) => coding.name.clone(),
            How::Dense => "dense".into(),
            How::Stock(dtype) => format!("{STOCK}{}", dtype.as_str()),
            How::Gguf | How::StockGguf => self.how.gguf_code().unwrap_or_default().into(),
        }
    }

    /// True for candle's own model.
    pub fn stock(&self) -> bool {
        matches!(self.how, How::Stock(_) | How::StockGguf)
    }

    /// The name, with whose it is.
    pub fn label(&self) -> String {
        if self.stock() { format!("candle {}", self.name) } else { self.name.clone() }
    }

    /// Loads the model for activations of `dtype`.
    pub fn load(&self, dtype: DType, device: &Device, layout: GpuLayout) -> Result<Loaded> {
        if self.how.gguf_code().is_some() {
            return self.load_gguf(dtype, device);
        }
        let config = config::read(&self.dir)?;
        let checkpoint = Arc::new(Checkpoint::open(&self.dir)?);
        let (model, bytes, weights): (Box<dyn Model>, u64, u64) = match &self.how {
            How::Compressed(coding) => {
                let options = coding.options.clone().unwrap_or_default();
                let counted =
                    Counted::new(CompressedWeights::new(checkpoint, dtype, options).with_device(device, layout));
                let llama = Llama::load(&counted, &config)?;
                let cache = llama.new_cache(true)?;
                (Box::new(Ours { llama, cache }), counted.bytes.get(), counted.weights.get())
            }
            How::Dense => {
                let llama = DenseLlama::from_pretrained(&self.dir, dtype, device)?;
                let (cache, weights) = (llama.new_cache(true)?, needed(&checkpoint, &config));
                (Box::new(Ours { llama, cache }), weights * dtype.size_in_bytes() as u64, weights)
            }
            How::Stock(dtype) => {
                let weights = needed(&checkpoint, &config);
                let model = Theirs::load(&checkpoint, &config, *dtype, device)?;
                (Box::new(model), weights * dtype.size_in_bytes() as u64, weights)
            }
            How::Gguf | How::StockGguf => bail!("{}: a GGUF file is no directory", self.dir.display()),
        };
        Ok(Loaded { model, config, device: device.clone(), bytes, weights })
    }

    /// Loads a GGUF file. Bytes are those of the file's tensors.
    fn load_gguf(&self, dtype: DType, device: &Device) -> Result<Loaded> {
        let file = gguf::open(&self.dir)?;
        let config = gguf::config(&file)?;
        let needed = |name: &str| config.tie_word_embeddings || name != "token_embd.weight";
        let tensors = || file.tensors().filter(|tensor| needed(tensor.name));
        let bytes = tensors().map(|tensor| tensor.data().len() as u64).sum();
        let weights = tensors().map(|tensor| (tensor.rows() * tensor.cols()) as u64).sum();
        let model: Box<dyn Model> = match self.how {
            How::StockGguf => {
                let mut reader = BufReader::new(File::open(&self.dir)?);
                let content = gguf_file::Content::read(&mut reader)?;
                Box::new(ModelWeights::from_gguf(content, &mut reader, device)?)
            }
            _ => {
                let llama = KQuantLlama::from_gguf_on(&file, dtype, device)?;
                let cache = llama.new_cache(true)?;
                Box::new(Ours { llama, cache })
            }
        };
        Ok(Loaded { model, config, device: device.clone(), bytes, weights })
    }
}

impl How {
    /// How a new process is told to load a GGUF file.
    fn gguf_code(&self) -> Option<&'static str> {
        match self {
            How::Gguf => Some("gguf"),
            How::StockGguf => Some("candle-gguf"),
            _ => None,
        }
    }

    /// Ours, coded so.
    pub fn ours(coding: Coding) -> How {
        if coding.options.is_some() { How::Compressed(coding) } else { How::Dense }
    }
}

/// Weights that a token needs: all but an embedding that is not the output layer too.
fn needed(checkpoint: &Checkpoint, config: &Config) -> u64 {
    let untied = checkpoint.info("lm_head.weight").is_ok() && !config.tie_word_embeddings;
    let tensors = checkpoint.tensors().iter().filter(|info| !(untied && info.name == "model.embed_tokens.weight"));
    tensors.map(|info| info.shape.iter().product::<u64>()).sum()
}

/// A model that is ready.
pub struct Loaded {
    model: Box<dyn Model>,
    config: Config,
    device: Device,
    /// Bytes of the weights that a token needs.
    pub bytes: u64,
    /// How many there are.
    pub weights: u64,
}

impl Loaded {
    /// The model's sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Forgets all positions.
    pub fn reset(&mut self) -> Result<()> {
        self.model.reset()
    }

    /// Generates with a CUDA graph, or launches every kernel by itself. candle's own models do the latter.
    pub fn set_cuda_graph(&mut self, on: bool) {
        self.model.set_cuda_graph(on);
    }

    /// Runs `[1, n]` ids whose first stands at `position`, to the end.
    pub fn forward(&mut self, ids: &Tensor, position: usize) -> Result<()> {
        self.model.forward(ids, position)?;
        Ok(self.device.synchronize()?)
    }
}

/// Ours and candle's alike.
trait Model {
    fn reset(&mut self) -> Result<()>;
    fn set_cuda_graph(&mut self, _on: bool) {}
    fn forward(&mut self, ids: &Tensor, position: usize) -> candle_core::Result<Tensor>;
}

struct Ours<L, E> {
    llama: Llama<L, E>,
    cache: Cache,
}

impl<L: LinearLayer, E: Module> Model for Ours<L, E> {
    fn set_cuda_graph(&mut self, on: bool) {
        self.cache.set_cuda_graph(on);
    }

    fn reset(&mut self) -> Result<()> {
        self.cache.reset();
        Ok(())
    }

    fn forward(&mut self, ids: &Tensor, position: usize) -> candle_core::Result<Tensor> {
        self.llama.forward(ids, position, &mut self.cache)
    }
}

impl Model for ModelWeights {
    fn reset(&mut self) -> Result<()> {
        self.clear_kv_cache();
        Ok(())
    }

    fn forward(&mut self, ids: &Tensor, position: usize) -> candle_core::Result<Tensor> {
        ModelWeights::forward(self, ids, position)
    }
}

struct Theirs {
    llama: stock::Llama,
    empty: stock::Cache,
    cache: stock::Cache,
}

impl Theirs {
    fn load(checkpoint: &Arc<Checkpoint>, config: &Config, dtype: DType, device: &Device) -> Result<Theirs> {
        let own_head = checkpoint.info("lm_head.weight").is_ok();
        let config = Config { tie_word_embeddings: config.tie_word_embeddings || !own_head, ..config.clone() };
        let weights = CheckpointBackend::new(checkpoint.clone());
        let weights = VarBuilder::from_backend(Box::new(weights), dtype, device.clone());
        let llama = stock::Llama::load(weights, &config)?;
        let empty = stock::Cache::new(true, dtype, &config, device)?;
        Ok(Theirs { llama, cache: empty.clone(), empty })
    }
}

impl Model for Theirs {
    fn reset(&mut self) -> Result<()> {
        self.cache = self.empty.clone();
        Ok(())
    }

    fn forward(&mut self, ids: &Tensor, position: usize) -> candle_core::Result<Tensor> {
        self.llama.forward(ids, position, &mut self.cache)
    }
}

/// Compressed weights, counted as they are asked for.
struct Counted {
    weights_of: CompressedWeights,
    bytes: Cell<u64>,
    weights: Cell<u64>,
}

impl Counted {
    fn new(weights_of: CompressedWeights) -> Counted {
        Counted { weights_of, bytes: Cell::new(0), weights: Cell::new(0) }
    }

    fn count(&self, bytes: usize, weights: usize) {
        self.bytes.set(self.bytes.get() + bytes as u64);
        self.weights.set(self.weights.get() + weights as u64);
    }
}

impl Weights for Counted {
    type Linear = CompressedLinear;
    type Embedding = CompressedEmbedding;

    fn linear(&self, name: &str, out_dim: usize, in_dim: usize) -> candle_taper::Result<CompressedLinear> {
        let linear = self.weights_of.linear(name, out_dim, in_dim)?;
        let bytes = linear.in_use().map_or(linear.weight().stored_bytes(), |(_, bytes)| bytes);
        self.count(bytes, out_dim * in_dim);
        Ok(linear)
    }

    /// Not counted: a token needs one row of it.
    fn embedding(&self, name: &str, vocab: usize, dim: usize) -> candle_taper::Result<CompressedEmbedding> {
        self.weights_of.embedding(name, vocab, dim)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> candle_taper::Result<Tensor> {
        let tensor = self.weights_of.tensor(name, shape)?;
        self.count(tensor.elem_count() * tensor.dtype().size_in_bytes(), tensor.elem_count());
        Ok(tensor)
    }

    fn tied_lm_head(&self, embedding: &CompressedEmbedding) -> candle_taper::Result<CompressedLinear> {
        let geometry = embedding.weight().geometry();
        let bytes = embedding.in_use().map_or(embedding.weight().stored_bytes(), |(_, bytes)| bytes);
        self.count(bytes, geometry.rows * geometry.cols);
        self.weights_of.tied_lm_head(embedding)
    }

    fn tensors(&self) -> Vec<(&str, &[u64])> {
        self.weights_of.tensors()
    }

    fn contains(&self, name: &str) -> bool {
        self.weights_of.contains(name)
    }

    fn dtype(&self) -> DType {
        self.weights_of.dtype()
    }

    fn device(&self) -> &Device {
        self.weights_of.device()
    }
}

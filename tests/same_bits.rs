//! Logits from compressed weights are, to the last bit, those of the same model over dense weights decoded from the same
//! file, on every backend and with 1, 2 and 5 threads.
//!
//! candle's threads and our backend are chosen once a process, so each combination runs in one of its own.
#![cfg(feature = "candle")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::Embedding;
use candle_taper::convert::{self, ConvertOptions};
use candle_taper::cpu::dot::{LANES, reduce};
use candle_taper::cpu::gemm::{Gemm, gemm};
use candle_taper::models::{CompressedLlama, DenseWeights, Llama, Weights, config};
use candle_taper::nn::LinearLayer;
use candle_taper::{Checkpoint, Codec, Options, Stage};
use common::backends;
use xxhash_rust::xxh3::Xxh3;

const CPU: Device = Device::Cpu;
/// Where the process that is asked finds the models.
const MODELS: &str = "TAPER_TEST_MODELS";
/// Rows that are multiplied at a time, and columns whose products are added first.
const STRIP: usize = 64;
const TILE: usize = 256;

/// A dense layer that adds in the order that `cpu::dot` documents, for several rows as `cpu::gemm` does.
struct Defined {
    weight: Arc<Vec<f32>>,
    cols: usize,
}

impl Defined {
    fn new(weight: &Tensor) -> Result<Defined> {
        Ok(Defined { weight: Arc::new(weight.flatten_all()?.to_vec1()?), cols: weight.dim(1)? })
    }

    fn row(&self, w: &[f32], x: &[f32]) -> f32 {
        w.chunks(TILE).zip(x.chunks(TILE)).fold(0.0, |y, (w, x)| {
            let mut lanes = [0.0f32; LANES];
            for (k, (&w, &x)) in w.iter().zip(x).enumerate() {
                lanes[k % LANES] = w.mul_add(x, lanes[k % LANES]);
            }
            y + reduce(&lanes)
        })
    }
}

impl Module for Defined {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (cols, rows) = (self.cols, self.weight.len() / self.cols);
        let flat: Vec<f32> = x.flatten_all()?.to_vec1()?;
        let m = flat.len() / cols;
        let mut y = vec![0.0; m * rows];
        if m == 1 {
            y.iter_mut().zip(self.weight.chunks(cols)).for_each(|(y, w)| *y = self.row(w, &flat));
        } else {
            for (strip, weights) in self.weight.chunks(STRIP * cols).enumerate() {
                let n = weights.len() / cols;
                let shape = Gemm { m, n, k: cols, a: [cols, 1], b: [1, cols], c: [rows, 1], add: false };
                gemm(&shape, &flat, weights, &mut y[strip * STRIP..]);
            }
        }
        let leading = &x.dims()[..x.rank() - 1];
        Tensor::from_vec(y, [leading, &[rows]].concat(), &CPU)
    }
}

impl LinearLayer for Defined {}

/// Dense weights in such layers.
struct DefinedWeights<'a>(DenseWeights<'a>);

impl Weights for DefinedWeights<'_> {
    type Linear = Defined;
    type Embedding = Embedding;

    fn linear(&self, name: &str, out_dim: usize, in_dim: usize) -> candle_taper::Result<Defined> {
        Ok(Defined::new(&self.tensor(name, &[out_dim, in_dim])?).unwrap())
    }

    fn embedding(&self, name: &str, vocab: usize, dim: usize) -> candle_taper::Result<Embedding> {
        self.0.embedding(name, vocab, dim)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> candle_taper::Result<Tensor> {
        self.0.tensor(name, shape)
    }

    fn tied_lm_head(&self, embedding: &Embedding) -> candle_taper::Result<Defined> {
        Ok(Defined::new(embedding.embeddings()).unwrap())
    }

    fn tensors(&self) -> Vec<(&str, &[u64])> {
        self.0.tensors()
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    fn dtype(&self) -> DType {
        self.0.dtype()
    }

    fn device(&self) -> &Device {
        self.0.device()
    }
}

/// A hash of all bits of the logits of a prompt and of six tokens that follow one by one.
fn bits<L: LinearLayer, E: Module>(llama: &Llama<L, E>) -> String {
    let vocab = llama.config().vocab_size as u32;
    let ids: Vec<u32> = (0..43u32).map(|i| (i * 31 + i * i * 7) % vocab).collect();
    let mut cache = llama.new_cache(true).unwrap();
    let mut hash = Xxh3::new();
    let mut add = |ids: &[u32], position| {
        let input = Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap();
        let logits = llama.forward_all(&input, position, &mut cache).unwrap();
        let values = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|v| v.is_finite()) && logits.dim(D::Minus1).unwrap() == vocab as usize);
        values.iter().for_each(|v| hash.update(&v.to_le_bytes()));
    };
    add(&ids[..37], 0);
    (37..43).for_each(|position| add(&ids[position..=position], position));
    format!("{:016x}", hash.digest())
}

#[test]
#[ignore = "a process of the test below"]
fn print_bits() {
    let Some(models) = std::env::var_os(MODELS) else { return };
    for dir in std::env::split_paths(&models) {
        let llama = CompressedLlama::from_pretrained(&dir, DType::F32, &Options::default()).unwrap();
        println!("\nbits {} {}", dir.display(), bits(&llama));
    }
}

/// What [`print_bits`] prints in a process with this backend and so many threads, in the order of the models.
fn bits_elsewhere(models: &[PathBuf], backend: &str, threads: usize) -> Vec<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["print_bits", "--exact", "--ignored", "--nocapture"]);
    command.env(MODELS, std::env::join_paths(models).unwrap()).env("TAPER_CPU", backend);
    command.env("RAYON_NUM_THREADS", threads.to_string()).env("CANDLE_NUM_THREADS", threads.to_string());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter_map(|line| line.strip_prefix("bits ")?.rsplit_once(' '));
    lines.map(|(_, bits)| bits.to_string()).collect()
}

/// A model in every coding: those of the lossless ones, and INT8.
fn codings(model: &Path, out: &Path) -> [Vec<PathBuf>; 2] {
    let pack = |codec: Codec, stage: Stage| {
        let dir = out.join(format!("{} {}", codec.name(), stage.name()));
        let matrix = Options { codec, stage, ..Options::default() };
        convert::compress(model, &dir, &ConvertOptions { matrix, ..Default::default() }, &()).unwrap();
        dir
    };
    let stages = [Stage::Rans, Stage::Fixed12, Stage::Fixed11];
    let lossless = stages.iter().map(|&stage| pack(Codec::Lossless, stage)).collect();
    let int8 = [Stage::Rans, Stage::Fixed12].iter().map(|&stage| pack(Codec::Int8, stage)).collect();
    [lossless, int8]
}

fn the_same_everywhere(model: &Path) {
    let out = tempfile::tempdir().unwrap();
    let [lossless, int8] = codings(model, out.path());
    let checkpoint = Checkpoint::open(&lossless[0]).unwrap();
    let weights = DefinedWeights(DenseWeights::new(&checkpoint, DType::F32, &CPU));
    let dense = bits(&Llama::load(&weights, &config::read(model).unwrap()).unwrap());
    let models = [lossless, int8].concat();
    let mut quantised = None;
    for backend in backends() {
        for threads in [1, 2, 5] {
            let got = bits_elsewhere(&models, backend.name(), threads);
            let name = format!("{}, {threads} threads", backend.name());
            println!("{name}: {got:?}, dense {dense}");
            assert_eq!(got[..3], [&dense, &dense, &dense].map(String::clone), "{name}");
            let int8 = quantised.get_or_insert(got[3].clone());
            assert!(*int8 != dense && got[3..].iter().all(|bits| bits == int8), "{name}");
        }
    }
}

#[test]
fn logits_are_those_of_dense_weights_to_the_last_bit() {
    let restored = tempfile::tempdir().unwrap();
    let tales = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tales");
    convert::decompress(tales, restored.path(), true, &()).unwrap();
    the_same_everywhere(restored.path());
}

#[test]
fn logits_of_a_real_model_are_those_of_dense_weights_to_the_last_bit() {
    if let Some(data) = common::shared_data() {
        the_same_everywhere(&data.join("TinyStories-656K"));
    }
}

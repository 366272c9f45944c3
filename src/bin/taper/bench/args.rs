//! The arguments of `taper bench`.

use std::path::PathBuf;
use std::str::FromStr;

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use candle_taper::matrix::GpuLayout;
use candle_taper::{Codec, Options, Stage};
use clap::{Args, ValueEnum};

use crate::args::DtypeName;
use crate::device::DeviceName;

/// `taper bench`. Flags that llama-bench has too mean the same.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Time models instead of layers: directories of Llamas, compressed or not, or GGUF files
    ///
    /// A GGUF file runs as it is, in our model and in candle's own quantised one.
    /// A compressed one runs as it is. An uncompressed one runs in stock candle, and compressed while it is loaded as
    /// --codec says (by default only if no compressed directory is given).
    #[arg(short, long, value_name = "DIR", value_delimiter = ',')]
    pub model: Vec<PathBuf>,
    /// Shapes of the layers' weights, outputs x inputs
    #[arg(long, value_name = "OxI", value_delimiter = ',', default_value = "4096x4096,14336x4096")]
    #[arg(conflicts_with = "model")]
    pub shape: Vec<Shape>,
    /// Rows of activations: 1 as when text is generated, more as when a prompt is read [default: 1,128, on a GPU
    /// 1,8,16,64,512]
    #[arg(long, value_name = "M", value_delimiter = ',', conflicts_with = "model")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub rows: Vec<u32>,
    /// How the layers' weights are distributed
    #[arg(long, value_enum, default_value_t = Weights::Scaled, conflicts_with = "model")]
    pub weights: Weights,
    /// Codings to time: rans, fixed12, fixed11 (lossless), int8, int8-fixed12, int8-fixed11, rate-BITS, none; for layers
    /// also q4_k and the other formats of GGUF files, int4 (groups of 128, as in AWQ and GPTQ checkpoints) and int4-fp8 (the
    /// same; activations of 64 rows and more become FP8), for models dense (our model, weights not compressed)
    ///
    /// [default: rans,fixed12,fixed11,int8,int8-fixed12 for layers, fixed12,rans,int8-fixed12 for models]
    #[arg(long, value_name = "C", value_delimiter = ',')]
    pub codec: Vec<Coding>,
    /// Formats of candle to compare with: bf16, f16, f32 and for layers q8_0, q6_k, q5_k, q4_k and the like, or none
    ///
    /// [default: bf16,f16,f32,q8_0 for layers, bf16,f32 for models]
    #[arg(long, value_name = "F", value_delimiter = ',')]
    pub stock: Vec<Stock>,
    /// The dtype of our activations; stock layers take their own [default: f32, on a GPU bf16]
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Where to run: cpu, cuda or cuda:N (builds with --features cuda)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceName,
    /// What a GPU keeps matrices as: auto (the fastest, timed for each shape; TAPER_MEASURE=0: by rule), smallest, fixed,
    /// window, pair, fp8, integers, rans, dense; each coding in each layout
    #[arg(long, value_name = "LAYOUT", value_delimiter = ',', default_value = "auto", value_parser = crate::device::layout)]
    pub layout: Vec<GpuLayout>,
    /// On a GPU, let no kernel start before the one that it follows has ended; layers are timed both ways without it
    #[arg(long)]
    pub plain_launch: bool,
    /// On a GPU, launch every kernel of a model by itself; generation is timed both ways without it
    #[arg(long, requires = "model")]
    pub no_cuda_graph: bool,
    /// Also time each of our layers decoded to memory and then multiplied by candle; a column counts the bytes that
    /// either moves
    #[arg(long, conflicts_with = "model")]
    pub unfused: bool,
    /// On a GPU, also time decoding layers to memory: one alone, and five at once
    #[arg(long, conflicts_with = "model")]
    pub decode: bool,
    /// Also write a plot of how many times faster than the first of --stock our layers are, against the rows of
    /// activations, as SVG: a panel for each shape, a line for each layer. It wants many --rows, such as
    /// 1,2,4,8,16,32,64,128,256,512
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub plot: Option<PathBuf>,
    /// Tokens of the prompt that is read; 0 to time no prompt
    #[arg(short = 'p', long, value_name = "N", default_value_t = 128, requires = "model")]
    pub n_prompt: usize,
    /// Tokens that are generated; 0 to time no generation
    #[arg(short = 'n', long, value_name = "N", default_value_t = 32, requires = "model")]
    pub n_gen: usize,
    /// How often each thing is timed, in turns with all others [default: 20 for layers, 3 for models]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub repetitions: Option<u32>,
    /// Stop generating after this time; the speed is that of the tokens made until then
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, requires = "model")]
    pub max_time: f64,
    /// Bytes of weights that calls take turns with, so that no cache holds them, in MiB [default: 128, on a GPU 640]
    #[arg(long, value_name = "MIB", conflicts_with = "model")]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=1 << 20))]
    pub rotate: Option<u32>,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
    /// Load one model in this process, run it shortly and print what that took as JSON
    #[arg(long, value_name = "NAME", hide = true, requires = "model")]
    pub probe: Option<String>,
}

impl BenchArgs {
    /// The codings asked for, or these.
    pub fn codings(&self, default: &[&str]) -> Vec<Coding> {
        if self.codec.is_empty() {
            return default.iter().filter_map(|name| name.parse().ok()).collect();
        }
        self.codec.iter().filter(|coding| coding.name != "none").cloned().collect()
    }

    /// candle's formats asked for, or these.
    pub fn stocks(&self, default: &[&str]) -> Vec<Stock> {
        if self.stock.is_empty() {
            return default.iter().filter_map(|name| name.parse().ok()).collect();
        }
        self.stock.iter().filter(|stock| **stock != Stock::None).copied().collect()
    }

    /// The dtype of our activations.
    pub fn activations(&self) -> DType {
        match self.dtype {
            Some(dtype) => dtype.into(),
            None if self.on_gpu() => DType::BF16,
            None => DType::F32,
        }
    }

    /// True if a GPU is asked for.
    pub fn on_gpu(&self) -> bool {
        self.device != DeviceName::Cpu
    }

    /// Rows of activations.
    pub fn rows(&self) -> &[u32] {
        match self.on_gpu() {
            _ if !self.rows.is_empty() => &self.rows,
            true => &[1, 8, 16, 64, 512],
            false => &[1, 128],
        }
    }

    /// MiB of weights that calls take turns with.
    pub fn rotate(&self) -> u32 {
        self.rotate.unwrap_or(if self.on_gpu() { 640 } else { 128 })
    }
}

impl From<DtypeName> for DType {
    fn from(name: DtypeName) -> DType {
        match name {
            DtypeName::F16 => DType::F16,
            DtypeName::Bf16 => DType::BF16,
            DtypeName::F32 => DType::F32,
        }
    }
}

/// Outputs and inputs of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of the weight.
    pub out: usize,
    /// Columns of the weight.
    pub input: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Shape, String> {
        let sides = text.split_once(['x', 'X', '×']).and_then(|(o, i)| Some((o.parse().ok()?, i.parse().ok()?)));
        match sides {
            Some((out, input)) if (1..=1 << 24).contains(&out) && (1..=1 << 24).contains(&input) => {
                Ok(Shape { out, input })
            }
            _ => Err("a shape is outputs x inputs, each from 1 to 16777216, for instance 4096x4096".into()),
        }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.out, self.input)
    }
}

/// Distributions of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Weights {
    /// Gaussian with log-normal row and column scales, as trained matrices have
    Scaled,
    /// Gaussian
    Gaussian,
    /// Student-t with 5 degrees of freedom: heavy tails
    StudentT,
}

/// A way to code a weight, with the name that it has on the command line and in tables.
#[derive(Clone, Debug, PartialEq)]
pub struct Coding {
    /// `rans`, `int8-fixed12`, `rate-4.5`.
    pub name: String,
    /// The library's options; nothing for `none`, `dense` and blocks.
    pub options: Option<Options>,
    /// Blocks that are multiplied as they are.
    pub blocks: Option<BlockCoding>,
}

/// Weights in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockCoding {
    /// A format of GGUF files.
    Ggml(GgmlDType),
    /// 4-bit integers in groups of 128; whether many rows of activations are rounded to FP8.
    Int4 { fp8: bool },
}

impl FromStr for Coding {
    type Err = String;

    fn from_str(text: &str) -> Result<Coding, String> {
        let stage = |name: &str| [Stage::Rans, Stage::Fixed12, Stage::Fixed11].into_iter().find(|s| s.name() == name);
        let (first, rest) = text.split_once('-').map_or((text, None), |(first, rest)| (first, Some(rest)));
        let (codec, stage) = match (first, rest) {
            ("none" | "dense", None) => return Ok(Coding { name: text.into(), options: None, blocks: None }),
            ("int4", None | Some("fp8")) => {
                let blocks = Some(BlockCoding::Int4 { fp8: rest.is_some() });
                return Ok(Coding { name: text.into(), options: None, blocks });
            }
            (name, None) if block_format(name).is_some() => {
                let blocks = block_format(name).map(BlockCoding::Ggml);
                return Ok(Coding { name: text.into(), options: None, blocks });
            }
            ("rate", Some(bits)) => (bits.parse().ok().map(|bits| Codec::Rate { bits }), Some(Stage::Rans)),
            ("int8", rest) => (Some(Codec::Int8), stage(rest.unwrap_or("rans"))),
            ("lossless", rest) => (Some(Codec::Lossless), stage(rest.unwrap_or("rans"))),
            (name, None) => (Some(Codec::Lossless), stage(name)),
            _ => (None, None),
        };
        let Some((codec, stage)) = codec.zip(stage) else {
            let names = "rans, fixed12, fixed11, int8, int8-fixed12, int8-fixed11, rate-BITS, dense, none";
            let blocks = BLOCKS.map(|(name, _)| name).join(", ");
            return Err(format!("codings are {names}, {blocks}, int4, int4-fp8"));
        };
        let options = Options { codec, stage, ..Options::default() };
        options.validate().map_err(|error| error.to_string())?;
        Ok(Coding { name: text.into(), options: Some(options), blocks: None })
    }
}

/// A format that candle has on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stock {
    /// Nothing to compare with.
    None,
    /// A plain matrix.
    Float(DType),
    /// A GGUF block format.
    Blocks(GgmlDType),
}

/// Formats of GGUF blocks by their usual names.
const BLOCKS: [(&str, GgmlDType); 10] = [
    ("q4_0", GgmlDType::Q4_0),
    ("q4_1", GgmlDType::Q4_1),
    ("q5_0", GgmlDType::Q5_0),
    ("q5_1", GgmlDType::Q5_1),
    ("q8_0", GgmlDType::Q8_0),
    ("q2_k", GgmlDType::Q2K),
    ("q3_k", GgmlDType::Q3K),
    ("q4_k", GgmlDType::Q4K),
    ("q5_k", GgmlDType::Q5K),
    ("q6_k", GgmlDType::Q6K),
];

/// The format of GGUF blocks of that name.
fn block_format(name: &str) -> Option<GgmlDType> {
    BLOCKS.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype)
}

impl FromStr for Stock {
    type Err = String;

    fn from_str(text: &str) -> Result<Stock, String> {
        Ok(match text.to_lowercase().as_str() {
            "none" => Stock::None,
            "bf16" => Stock::Float(DType::BF16),
            "f16" => Stock::Float(DType::F16),
            "f32" => Stock::Float(DType::F32),
            name => match block_format(name) {
                Some(dtype) => Stock::Blocks(dtype),
                None => {
                    let names: Vec<&str> = BLOCKS.iter().map(|(name, _)| *name).collect();
                    return Err(format!("candle's formats are bf16, f16, f32, {}, or none", names.join(", ")));
                }
            },
        })
    }
}

impl std::fmt::Display for Stock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stock::None => f.write_str("none"),
            Stock::Float(dtype) => f.write_str(dtype.as_str()),
            Stock::Blocks(dtype) => {
                f.write_str(BLOCKS.iter().find(|(_, known)| known == dtype).map_or("?", |(name, _)| name))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        assert_eq!("14336x4096".parse(), Ok(Shape { out: 14336, input: 4096 }));
        for wrong in ["4096", "0x3", "3x", "axb", "3x99999999"] {
            assert!(wrong.parse::<Shape>().is_err(), "{wrong}");
        }
        let codec = |name: &str| name.parse::<Coding>().map(|coding| coding.options.map(|o| (o.codec, o.stage)));
        assert_eq!(codec("rans"), Ok(Some((Codec::Lossless, Stage::Rans))));
        assert_eq!(codec("lossless"), codec("rans"));
        assert_eq!(codec("lossless-fixed11"), codec("fixed11"));
        assert_eq!(codec("int8-fixed12"), Ok(Some((Codec::Int8, Stage::Fixed12))));
        assert_eq!(codec("rate-4.5"), Ok(Some((Codec::Rate { bits: 4.5 }, Stage::Rans))));
        assert_eq!(codec("none"), Ok(None));
        let blocks = |name: &str| name.parse::<Coding>().unwrap().blocks;
        assert_eq!(blocks("q4_k"), Some(BlockCoding::Ggml(GgmlDType::Q4K)));
        assert_eq!(blocks("int4"), Some(BlockCoding::Int4 { fp8: false }));
        assert_eq!(blocks("int4-fp8"), Some(BlockCoding::Int4 { fp8: true }));
        for wrong in [
            "",
            "zip",
            "rate",
            "rate-99",
            "rate-x",
            "int8-zip",
            "int8-",
            "rans-rans",
            "none-fixed12",
            "int4-",
            "int4-rans",
        ] {
            assert!(codec(wrong).is_err(), "{wrong}");
        }
        for name in ["none", "bf16", "f16", "f32"].into_iter().chain(BLOCKS.map(|(name, _)| name)) {
            assert_eq!(name.parse::<Stock>().unwrap().to_string(), name);
        }
        assert!("q9".parse::<Stock>().is_err());
    }
}

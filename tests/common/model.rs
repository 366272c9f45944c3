//! Model directories in the Hugging Face layout, made on the spot.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_taper::Dtype;
use safetensors::tensor::{Dtype as StDtype, TensorView};

use super::{Shape, weights};

/// A tensor of a test model.
pub struct TestTensor {
    pub name: String,
    pub dtype: StDtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

pub fn st_dtype(dtype: Dtype) -> StDtype {
    match dtype {
        Dtype::Bf16 => StDtype::BF16,
        Dtype::F16 => StDtype::F16,
        Dtype::F32 => StDtype::F32,
        Dtype::F8E4M3 => StDtype::F8_E4M3,
        Dtype::F8E5M2 => StDtype::F8_E5M2,
        Dtype::I8 => StDtype::I8,
    }
}

pub fn tensor(name: &str, shape: Shape, dtype: Dtype, dims: &[usize], seed: u64) -> TestTensor {
    let (cols, rows) = dims.split_last().unwrap();
    let data = weights(shape, dtype, rows.iter().product::<usize>(), *cols, seed);
    TestTensor { name: name.into(), dtype: st_dtype(dtype), shape: dims.to_vec(), data }
}

/// Writes one safetensors file.
pub fn write_shard(path: &Path, tensors: &[TestTensor]) {
    let views = tensors.iter().map(|t| {
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap();
        (t.name.clone(), view)
    });
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(views.collect::<BTreeMap<_, _>>(), Some(metadata)).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A directory with config, tokenizer, index and `shards` weight files; matrices are `size × size` and odd ones.
pub fn write_model(dir: &Path, shards: usize, size: usize) -> PathBuf {
    std::fs::create_dir_all(dir).unwrap();
    let mut map = serde_json::Map::new();
    for shard in 0..shards {
        let seed = shard as u64;
        let name = |part: &str| format!("model.layers.{shard}.{part}.weight");
        let tensors = [
            tensor(&name("self_attn.q_proj"), Shape::Scaled, Dtype::Bf16, &[size, size], seed),
            tensor(&name("mlp.up_proj"), Shape::StudentT, Dtype::Bf16, &[size + 44, size], seed + 1),
            tensor(&name("mlp.experts"), Shape::Gaussian, Dtype::F16, &[3, 41, 67], seed + 2),
            tensor(&name("mlp.wide"), Shape::Gaussian, Dtype::F32, &[70, 90], seed + 3),
            tensor(&name("mlp.f8"), Shape::Gaussian, Dtype::F8E4M3, &[80, 80], seed + 4),
            tensor(&name("mlp.i8"), Shape::Smooth, Dtype::I8, &[80, 80], seed + 5),
            tensor(&name("mlp.noise"), Shape::Noise, Dtype::Bf16, &[80, 80], seed + 6),
            tensor(&name("input_layernorm"), Shape::Gaussian, Dtype::Bf16, &[size], seed + 7),
            TestTensor { name: name("ids"), dtype: StDtype::I64, shape: vec![5, 3], data: vec![9; 120] },
            TestTensor { name: name("empty"), dtype: StDtype::F32, shape: vec![0, 3], data: vec![] },
        ];
        let file = if shards == 1 {
            "model.safetensors".to_string()
        } else {
            format!("model-{:05}-of-{shards:05}.safetensors", shard + 1)
        };
        tensors.iter().for_each(|t| drop(map.insert(t.name.clone(), file.clone().into())));
        write_shard(&dir.join(&file), &tensors);
    }
    if shards > 1 {
        let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
    std::fs::write(dir.join("config.json"), "{\"model_type\": \"llama\",\r\n \"rms_norm_eps\": 1e-06}").unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
    std::fs::write(dir.join("pytorch_model.bin"), "other weights").unwrap();
    dir.to_path_buf()
}

/// All files of a directory with their bytes.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let read = |e: std::fs::DirEntry| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap());
    entries.map(read).collect()
}

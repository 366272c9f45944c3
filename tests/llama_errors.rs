//! What a Llama refuses, and how it says so.
#![cfg(feature = "candle")]

mod common;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_taper::models::{CompressedLlama, DenseLlama, var_builder};
use candle_taper::{Checkpoint, Options, convert};
use common::llama::{Tiny, VOCAB};

const CPU: Device = Device::Cpu;

fn load(dir: &Path) -> DenseLlama {
    DenseLlama::from_pretrained(dir, DType::F32, &CPU).unwrap()
}

fn load_error(dir: &Path) -> String {
    DenseLlama::from_pretrained(dir, DType::F32, &CPU).unwrap_err().to_string()
}

fn ids(n: u32) -> Vec<u32> {
    (0..n).map(|i| i * i * 7 % VOCAB as u32).collect()
}

fn row(ids: &[u32]) -> Tensor {
    Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap()
}

#[test]
fn wrong_checkpoints_are_refused_with_names_and_shapes() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let with = |change: &dyn Fn(&mut Tiny), parts: &[&str]| {
        let mut tiny = Tiny::new();
        change(&mut tiny);
        tiny.write();
        let error = load_error(tiny.path());
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    with(&|tiny| drop(tiny.tensors.remove(name)), &[name, "[96, 64]"]);
    with(&|tiny| drop(tiny.tensors.insert(name.into(), vec![95, 64])), &[name, "[96, 64]", "[95, 64]"]);
    with(&|tiny| drop(tiny.tensors.insert("model.norm.weight".into(), vec![1, 64])), &["[1, 64]", "[64]"]);
    let bias = "model.layers.0.self_attn.q_proj.bias";
    with(&|tiny| drop(tiny.tensors.insert(bias.into(), vec![64])), &[bias, "[64]", "config.json"]);
    with(&|tiny| tiny.config["num_hidden_layers"] = 1.into(), &["model.layers.1.", "1 layers"]);
    with(&|tiny| tiny.config["num_hidden_layers"] = u64::MAX.into(), &["model.layers.2.", "[64]"]);
    with(&|tiny| tiny.config["vocab_size"] = u64::MAX.into(), &["model.embed_tokens.weight", "[97, 64]"]);
    with(&|tiny| drop(tiny.tensors.insert("score.weight".into(), vec![2, 64])), &["score.weight", "[2, 64]"]);
    with(&|tiny| drop(tiny.tensors.insert("model.layers.x.weight".into(), vec![2])), &["model.layers.x.weight"]);
    with(&|tiny| tiny.integers = Some(name.into()), &[name, "I64"]);
    with(&|tiny| tiny.config["num_attention_heads"] = 0.into(), &["num_attention_heads"]);
    with(&|tiny| tiny.config["num_key_value_heads"] = 3.into(), &["3 key and value heads"]);
    with(&|tiny| tiny.config["model_type"] = "gemma".into(), &["config.json", "gemma", "llama"]);
    with(&|tiny| tiny.config["head_dim"] = 32.into(), &["head_dim is 32"]);
    with(&|tiny| tiny.config["mlp_bias"] = true.into(), &["mlp_bias"]);
    with(&|tiny| tiny.config["rope_scaling"] = serde_json::json!({"type": "yarn", "factor": 2.0}), &["yarn"]);
    let tiny = Tiny::new();
    std::fs::remove_file(tiny.path().join("config.json")).unwrap();
    assert!(load_error(tiny.path()).contains("has no config.json"));
    assert!(load_error(&tiny.path().join("model.safetensors")).contains("is not a directory"));
    assert!(load_error(&tiny.path().join("nowhere")).contains("nowhere"));
}

/// Loaded in every way that there is.
fn load_errors(dir: &Path) -> [String; 3] {
    [
        load_error(dir),
        CompressedLlama::from_pretrained(dir, DType::F32, &Options::default()).unwrap_err().to_string(),
        var_builder(dir, DType::F32, &CPU).err().unwrap().to_string(),
    ]
}

#[test]
fn weights_that_others_quantised_are_refused() {
    let mut tiny = Tiny::new();
    for (settings, part) in [
        (serde_json::json!({"quant_method": "gptq", "bits": 4}), "quantised with \"gptq\""),
        (serde_json::json!({"quant_method": "awq"}), "\"awq\""),
        (serde_json::json!({"quant_method": "fp8", "fmt": "e4m3"}), "\"fp8\""),
        (serde_json::json!({"quant_method": "bitsandbytes"}), "\"bitsandbytes\""),
        (serde_json::json!({"load_in_4bit": true}), "a method that it does not name"),
        (serde_json::json!({"quant_method": "taper", "format": 2}), "written by a newer candle-taper"),
    ] {
        tiny.config["quantization_config"] = settings;
        tiny.write();
        for error in load_errors(tiny.path()) {
            assert!(error.contains("config.json") && error.contains(part), "{error}");
        }
    }
    // Compressing them makes them no weights.
    tiny.config["quantization_config"] = serde_json::json!({"quant_method": "fp8"});
    tiny.write();
    let out = tempfile::tempdir().unwrap();
    convert::compress(tiny.path(), out.path().join("c"), &Default::default(), &()).unwrap();
    for error in load_errors(&out.path().join("c")) {
        assert!(error.contains("\"fp8\""), "{error}");
    }
    tiny.config["quantization_config"] = serde_json::Value::Null;
    tiny.write();
    load(tiny.path());
}

/// The compressed form of a model; its weights' file.
fn compressed(tiny: &Tiny, out: &Path) -> (std::path::PathBuf, Vec<u8>) {
    let dir = out.join("compressed");
    convert::compress(tiny.path(), &dir, &Default::default(), &()).unwrap();
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    (dir, bytes)
}

#[test]
fn newer_formats_are_named_and_the_rest_stays_usable() {
    let mut tiny = Tiny::new();
    tiny.bf16 = true;
    tiny.write();
    let out = tempfile::tempdir().unwrap();
    let (dir, bytes) = compressed(&tiny, out.path());
    let file = dir.join("model.safetensors");

    // One tensor of a newer version: the others can be read.
    let name = "model.layers.1.mlp.up_proj.weight";
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let start = 8 + header + metadata.info(name).unwrap().data_offsets.0;
    let mut newer = bytes.clone();
    newer[start + 4] = 2;
    std::fs::write(&file, &newer).unwrap();
    for error in &load_errors_of_llama(&dir) {
        let parts = [name, "format version 2", "a newer candle-taper", "update candle-taper"];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    let checkpoint = Checkpoint::open(&dir).unwrap();
    for info in checkpoint.tensors() {
        assert_eq!(checkpoint.read(&info.name).is_ok(), info.name != name);
    }
    // A kind that this build does not know.
    let mut foreign = bytes.clone();
    foreign[start + 6] = 99;
    std::fs::write(&file, &foreign).unwrap();
    for error in &load_errors_of_llama(&dir) {
        assert!(error.contains(name) && error.contains("kind is 99"), "{error}");
    }

    // A newer file.
    let at = bytes.windows(15).position(|w| w == b"taper.version\":").unwrap() + 16;
    let mut newer = bytes;
    newer[at] = b'2';
    std::fs::write(&file, &newer).unwrap();
    for error in load_errors(&dir) {
        assert!(error.contains("model.safetensors") && error.contains("format version 2"), "{error}");
    }
}

fn load_errors_of_llama(dir: &Path) -> [String; 2] {
    let compressed = CompressedLlama::from_pretrained(dir, DType::F32, &Options::default());
    [load_error(dir), compressed.unwrap_err().to_string()]
}

/// What a compressed layer cannot hold as it is, is converted, and said.
#[test]
fn wide_weights_are_rounded_and_integers_refused() {
    let name = "model.layers.0.mlp.gate_proj.weight";
    let mut tiny = Tiny::new();
    let logits = |dir: &Path| {
        let llama = CompressedLlama::from_pretrained(dir, DType::F32, &Options::default()).unwrap();
        let logits = llama.forward(&row(&ids(9)), 0, &mut llama.new_cache(true).unwrap()).unwrap();
        (logits.to_vec2::<f32>().unwrap(), llama.notes().join(""))
    };
    let expected = logits(tiny.path());
    assert_eq!(expected.1, "");
    tiny.wide = Some(name.into());
    tiny.write();
    let (values, notes) = logits(tiny.path());
    assert_eq!(values, expected.0);
    assert!(notes.contains("1 tensors of F64 are rounded to F32") && notes.contains(name), "{notes}");
    tiny.wide = None;
    tiny.integers = Some(name.into());
    tiny.write();
    for error in load_errors_of_llama(tiny.path()) {
        assert!(error.contains(name) && error.contains("I64"), "{error}");
    }
}

#[cfg(not(feature = "hub"))]
#[test]
fn models_on_the_hub_are_explained() {
    let error = load_error(Path::new("meta-llama/Llama-3.2-1B"));
    for part in ["meta-llama/Llama-3.2-1B: ", "no such directory", "--features hub", "hf download"] {
        assert!(error.contains(part), "{error}");
    }
    // A path is not mistaken for one.
    assert!(!load_error(Path::new("./meta-llama/Llama-3.2-1B")).contains("hub"));
}

#[test]
fn wrong_inputs_are_refused_and_harm_nothing() {
    let mut tiny = Tiny::new();
    tiny.config["max_position_embeddings"] = 32.into();
    tiny.write();
    let llama = load(tiny.path());
    let mut cache = llama.new_cache(true).unwrap();
    let tokens = ids(32);
    let expected = llama.forward(&row(&tokens), 0, &mut llama.new_cache(true).unwrap()).unwrap();
    llama.forward(&row(&tokens[..30]), 0, &mut cache).unwrap();
    let mut refused = |ids: &[u32], position: usize, part: &str| {
        let error = llama.forward(&row(ids), position, &mut cache).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(&ids(33), 0, "33 tokens at position 0 do not fit into the model's context of 32");
    refused(&[1, 2, 3], 30, "context of 32");
    refused(&[1], usize::MAX, "context of 32");
    refused(&[1], 31, "gap");
    refused(&[1, VOCAB as u32], 30, "token id 97 is outside");
    refused(&[], 30, "no token");
    let difference = (llama.forward(&row(&tokens[30..]), 30, &mut cache).unwrap() - expected).unwrap();
    assert!(difference.to_vec2::<f32>().unwrap()[0].iter().all(|d| d.abs() < 1e-4), "{difference}");
    assert!(llama.forward(&Tensor::new(&[1u32], &CPU).unwrap(), 0, &mut cache).is_err(), "ids of one dimension");

    let mut other = Tiny::new();
    other.config["num_hidden_layers"] = 1.into();
    other.tensors.retain(|name, _| !name.contains("layers.1"));
    other.write();
    let mut small = load(other.path()).new_cache(true).unwrap();
    assert!(llama.forward(&row(&[1]), 0, &mut small).unwrap_err().to_string().contains("made for a model of 1 layers"));
}

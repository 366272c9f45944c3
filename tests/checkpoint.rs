//! Whole checkpoints: round trips, checksums over every byte, interrupted runs.

mod common;

use std::fs;
use std::path::Path;

use candle_taper::checkpoint::Tensor;
use candle_taper::convert::{self, ConvertOptions};
use candle_taper::{Checkpoint, Codec, Error, Options, Stage, inspect};
use common::model::{files, write_model};

fn options(codec: Codec, stage: Stage) -> ConvertOptions {
    ConvertOptions { matrix: Options { codec, stage, ..Options::default() }, ..ConvertOptions::default() }
}

fn compress(from: &Path, to: &Path) {
    convert::compress(from, to, &ConvertOptions::default(), &()).unwrap();
}

/// The original files without the weights in other formats, which a compressed checkpoint leaves out.
fn expected(dir: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let mut files = files(dir);
    files.remove("pytorch_model.bin");
    files
}

#[test]
fn lossless_directories_are_restored_byte_for_byte() {
    for stage in [Stage::Rans, Stage::Fixed12, Stage::Fixed11] {
        for shards in [1, 3] {
            let dir = tempfile::tempdir().unwrap();
            let model = write_model(&dir.path().join("model"), shards, 256);
            let (out, back) = (dir.path().join("out"), dir.path().join("back"));
            let summary = convert::compress(&model, &out, &options(Codec::Lossless, stage), &()).unwrap();
            assert_eq!(summary.tensors, 10 * shards as u64);
            assert_eq!(
                summary.incompressible,
                if stage == Stage::Fixed12 { 3 } else { 1 } * shards as u64,
                "{stage:?}"
            );
            let report = convert::verify(&out, &()).unwrap();
            assert_eq!(report.tensors, summary.tensors);
            convert::decompress(&out, &back, false, &()).unwrap();
            assert!(files(&back) == expected(&model), "{stage:?} {shards}");
            let leftovers: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(leftovers.len(), 3, "{leftovers:?}");
        }
    }
}

#[test]
fn single_files_are_restored_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_model(&dir.path().join("model"), 1, 100);
    let (out, back) = (dir.path().join("out.safetensors"), dir.path().join("back.safetensors"));
    compress(&model.join("model.safetensors"), &out);
    convert::verify(&out, &()).unwrap();
    convert::decompress(&out, &back, false, &()).unwrap();
    assert!(fs::read(back).unwrap() == fs::read(model.join("model.safetensors")).unwrap());
    // Into an existing directory it keeps its name.
    fs::create_dir(dir.path().join("into")).unwrap();
    compress(&model.join("model.safetensors"), &dir.path().join("into"));
    assert!(dir.path().join("into/model.safetensors").is_file());
}

#[test]
fn the_result_is_an_ordinary_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_model(&dir.path().join("model"), 2, 256);
    let out = dir.path().join("out");
    compress(&model, &out);
    let config: serde_json::Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["model_type"], "llama");
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["quant_method"], "taper");
    assert_eq!(quantization["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(quantization["tensors"]["model.layers.0.self_attn.q_proj.weight"], "bf16 rans");
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("model.safetensors.index.json")).unwrap()).unwrap();
    let mut bytes = 0;
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        let file = fs::read(out.join(shard)).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(parsed.len(), 10);
        bytes += parsed.iter().map(|(_, view)| view.data().len()).sum::<usize>();
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    }
    assert_eq!(index["metadata"]["total_size"], bytes);
    assert_eq!(fs::read(out.join("tokenizer.json")).unwrap(), fs::read(model.join("tokenizer.json")).unwrap());
}

#[test]
fn tensors_rows_and_tiles_are_read_alone() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_model(&dir.path().join("model"), 2, 300);
    let out = dir.path().join("out");
    compress(&model, &out);
    let (plain, packed) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&out).unwrap());
    assert!(packed.is_compressed() && !plain.is_compressed());
    assert_eq!(plain.tensors().len(), packed.tensors().len());
    for info in plain.tensors() {
        let other = packed.info(&info.name).unwrap();
        assert_eq!((&other.dtype, &other.shape), (&info.dtype, &info.shape));
        assert!(packed.read(&info.name).unwrap() == plain.read(&info.name).unwrap(), "{}", info.name);
    }
    let name = "model.layers.1.mlp.up_proj.weight";
    assert!(packed.read_rows(name, 60..70).unwrap() == plain.read_rows(name, 60..70).unwrap());
    let (rect, tile) = packed.read_tile(name, 3).unwrap();
    assert_eq!((rect.row, rect.col, rect.rows, rect.cols), (256, 256, 88, 44));
    let rows = plain.read_rows(name, 256..257).unwrap();
    assert!(tile[..88] == rows[512..600]);
    assert!(matches!(packed.tensor(name).unwrap(), Tensor::Compressed(_)));
    assert!(matches!(plain.tensor(name).unwrap(), Tensor::Plain(_)));
    for error in [
        packed.read("no such tensor").unwrap_err(),
        packed.read_rows(name, 0..345).unwrap_err(),
        plain.read_rows(name, 0..345).unwrap_err(),
        packed.read_tile(name, 4).unwrap_err(),
        plain.read_tile(name, 0).unwrap_err(),
    ] {
        assert!(!error.to_string().is_empty());
    }
}

#[test]
fn include_and_exclude_choose_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_model(&dir.path().join("model"), 1, 256);
    let count = |include: Option<&str>, exclude: Option<&str>, out: &str| {
        let regex = |r: Option<&str>| r.map(|r| regex::Regex::new(r).unwrap());
        let options = ConvertOptions { include: regex(include), exclude: regex(exclude), ..ConvertOptions::default() };
        let out = dir.path().join(out);
        let summary = convert::compress(&model, &out, &options, &()).unwrap();
        convert::verify(&out, &()).unwrap();
        summary.compressed
    };
    assert_eq!(count(None, None, "all"), 6);
    assert_eq!(count(Some("_proj"), None, "some"), 2);
    assert_eq!(count(None, Some("_proj|f8"), "others"), 3);
    assert_eq!(count(Some("layers.9"), None, "none"), 0);
}

#[test]
fn quantised_checkpoints_keep_names_shapes_and_dtypes() {
    for codec in [Codec::Int8, Codec::Rate { bits: 3.5 }] {
        let dir = tempfile::tempdir().unwrap();
        let model = write_model(&dir.path().join("model"), 1, 256);
        let (out, back) = (dir.path().join("out"), dir.path().join("back"));
        let summary = convert::compress(&model, &out, &options(codec, Stage::Rans), &()).unwrap();
        assert!(summary.noise > 0.0 && summary.signal > summary.noise);
        convert::verify(&out, &()).unwrap();
        convert::decompress(&out, &back, false, &()).unwrap();
        let (before, after) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&back).unwrap());
        for info in before.tensors() {
            let other = after.info(&info.name).unwrap();
            assert_eq!((&info.dtype, &info.shape), (&other.dtype, &other.shape));
        }
        // What the codec does not apply to is lossless.
        for exact in ["mlp.i8", "mlp.f8", "ids", "input_layernorm"] {
            let name = format!("model.layers.0.{exact}.weight");
            assert!(before.read(&name).unwrap() == after.read(&name).unwrap(), "{name}");
        }
    }
}

#[test]
fn verify_finds_every_changed_byte_of_every_file() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let matrix = |name: &str, seed| {
        common::model::tensor(name, common::Shape::Scaled, candle_taper::Dtype::Bf16, &[40, 120], seed)
    };
    let norm = common::model::tensor("norm", common::Shape::Gaussian, candle_taper::Dtype::Bf16, &[64], 3);
    common::model::write_shard(&model.join("model.safetensors"), &[matrix("a", 1), matrix("b", 1), norm]);
    fs::write(model.join("config.json"), "{}").unwrap();
    fs::write(model.join("tokenizer.json"), "{\"a\": 1}").unwrap();
    let out = dir.path().join("out");
    compress(&model, &out);
    assert!(Checkpoint::open(&out).unwrap().info("a").unwrap().compressed);
    for (name, bytes) in files(&out) {
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(out.join(&name), &damaged).unwrap();
            let found = convert::verify(&out, &());
            assert!(found.is_err(), "{name}: byte {at} of {}", bytes.len());
        }
        for shorter in [0, bytes.len() / 2, bytes.len() - 1] {
            fs::write(out.join(&name), &bytes[..shorter]).unwrap();
            assert!(convert::verify(&out, &()).is_err(), "{name}: {shorter} of {} bytes", bytes.len());
        }
        fs::write(out.join(&name), [&bytes[..], b" "].concat()).unwrap();
        assert!(convert::verify(&out, &()).is_err(), "{name}: one byte more");
        fs::remove_file(out.join(&name)).unwrap();
        // Without the manifest the weights alone are checked, and found right.
        assert!(convert::verify(&out, &()).is_err() || name == "taper.json", "{name}: removed");
        fs::write(out.join(&name), &bytes).unwrap();
    }
    // Two tensors of one size that change places.
    let path = out.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (a, b) = (parsed.tensor("a").unwrap().data().to_vec(), parsed.tensor("b").unwrap().data().to_vec());
    assert_eq!(a.len(), b.len());
    let start = bytes.windows(a.len()).position(|w| w == a).unwrap();
    let mut swapped = bytes.clone();
    swapped[start..start + a.len()].copy_from_slice(&b);
    if a != b {
        fs::write(&path, swapped).unwrap();
        assert!(convert::verify(&out, &()).is_err());
        fs::write(&path, &bytes).unwrap();
    }
    convert::verify(&out, &()).unwrap();
}

#[test]
fn errors_name_file_tensor_and_tile() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_model(&dir.path().join("model"), 1, 300);
    let out = dir.path().join("out");
    compress(&model, &out);
    let path = out.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let data = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let blob = data.tensor(name).unwrap().data().to_vec();
    let start = bytes.windows(blob.len()).position(|w| w == blob).unwrap();
    let at = start + blob.len() - 100;
    bytes[at] ^= 4;
    fs::write(&path, &bytes).unwrap();
    for error in [
        convert::verify(&out, &()).unwrap_err(),
        convert::decompress(&out, dir.path().join("back"), false, &()).unwrap_err(),
        Checkpoint::open(&out).unwrap().read(name).unwrap_err(),
    ] {
        let text = error.to_string();
        for part in ["model.safetensors", name, "tile 3", "checksum mismatch"] {
            assert!(text.contains(part), "{text}");
        }
    }
    assert!(!dir.path().join("back").exists());
    assert_eq!(files(&model).len(), 4);
}

#[test]
fn existing_output_and_wrong_input_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_model(&dir.path().join("model"), 1, 100);
    let out = dir.path().join("out");
    compress(&model, &out);
    let fail = |from: &Path, to: &Path, force: bool| {
        let options = ConvertOptions { force, ..ConvertOptions::default() };
        convert::compress(from, to, &options, &()).unwrap_err().to_string()
    };
    assert!(fail(&model, &out, false).contains("--force"));
    assert!(fail(&out, &dir.path().join("again"), false).contains("already compressed"));
    assert!(fail(&model, &model, true).contains("is the input"));
    assert!(fail(&dir.path().join("nothing"), &out, true).contains("nothing"));
    fs::create_dir(dir.path().join("empty")).unwrap();
    assert!(fail(&dir.path().join("empty"), &dir.path().join("x"), false).contains("no .safetensors file"));
    let error = convert::decompress(&model, dir.path().join("x"), false, &()).unwrap_err().to_string();
    assert!(error.contains("not compressed"), "{error}");
    // With force the new result takes the old one's place, with nothing left beside it.
    let forced = ConvertOptions { force: true, ..options(Codec::Int8, Stage::Rans) };
    convert::compress(&model, &out, &forced, &()).unwrap();
    convert::verify(&out, &()).unwrap();
    assert_eq!(inspect::inspect(&out, true, &()).unwrap().codec.as_deref(), Some("int8 rans"));
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn a_newer_version_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_model(&dir.path().join("model"), 1, 100);
    let out = dir.path().join("out");
    compress(&model, &out);
    let path = out.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let at = bytes.windows(20).position(|w| w == b"\"taper.version\":\"1\",").unwrap();
    let mut newer = bytes.clone();
    newer[at + 17] = b'2';
    fs::write(&path, &newer).unwrap();
    let error = Checkpoint::open(&out).unwrap_err().to_string();
    assert!(error.contains("version 2") && error.contains("update candle-taper"), "{error}");
}

#[test]
fn inspection_accounts_for_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_model(&dir.path().join("model"), 2, 256);
    for (out, codec) in [("a", Codec::Lossless), ("b", Codec::Int8), ("c", Codec::Rate { bits: 4.0 })] {
        let out = dir.path().join(out);
        convert::compress(&model, &out, &options(codec, Stage::Rans), &()).unwrap();
        let (quick, exact) = (inspect::inspect(&out, false, &()).unwrap(), inspect::inspect(&out, true, &()).unwrap());
        for (quick, exact) in quick.tensors.iter().zip(&exact.tensors) {
            assert_eq!(exact.parts.total(), exact.stored_bytes, "{}", exact.name);
            assert_eq!(exact.parts, quick.parts);
            assert_eq!(exact.ideal_bits.is_some(), exact.compressed());
            let close = |a: f64, b: f64| (a - b).abs() < 0.15;
            assert!(exact.ideal_bits.zip(quick.ideal_bits).is_none_or(|(a, b)| close(a, b)), "{exact:?} {quick:?}");
        }
        let total: u64 = exact.tensors.iter().map(|t| t.original_bytes).sum();
        let plain = inspect::inspect(&model, false, &()).unwrap();
        assert_eq!(total, plain.tensors.iter().map(|t| t.stored_bytes).sum::<u64>());
    }
}

/// The real checkpoint that the design was measured on, where it is at hand.
#[test]
fn tiny_stories_survives() {
    let Some(data) = common::shared_data() else { return };
    let model = data.join("TinyStories-656K");
    let dir = tempfile::tempdir().unwrap();
    let (out, back) = (dir.path().join("out"), dir.path().join("back"));
    compress(&model, &out);
    convert::verify(&out, &()).unwrap();
    let inspection = inspect::inspect(&out, true, &()).unwrap();
    assert!(inspection.tensors.iter().filter(|t| t.compressed()).count() == 15);
    convert::decompress(&out, &back, false, &()).unwrap();
    assert!(files(&back) == files(&model));
}

#[test]
fn cancelled_runs_leave_no_result_and_go_on_later() {
    struct CancelAfter(std::sync::atomic::AtomicI64);
    impl convert::Progress for CancelAfter {
        fn cancelled(&self) -> bool {
            self.0.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) <= 0
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let model = write_model(&dir.path().join("model"), 3, 256);
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    compress(&model, &whole);
    let error = convert::compress(&model, &out, &ConvertOptions::default(), &CancelAfter(20.into())).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(!out.exists());
    let changed = convert::compress(&model, &out, &options(Codec::Int8, Stage::Rans), &()).unwrap_err().to_string();
    assert!(changed.contains("other options"), "{changed}");
    let summary = convert::compress(&model, &out, &ConvertOptions::default(), &()).unwrap();
    assert!(summary.resumed > 0, "{summary:?}");
    assert!(files(&out) == files(&whole));
}

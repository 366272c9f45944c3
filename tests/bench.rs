//! `taper bench` as a user meets it. Times are not judged, only that they are there.
#![cfg(feature = "candle")]

mod common;

use std::process::{Command, Output, Stdio};

use common::llama::Tiny;
use serde_json::Value;

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_taper")).arg("bench").args(args).stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn json(output: &Output) -> Value {
    serde_json::from_str(&text(output)).unwrap()
}

/// The first words of a table's lines.
fn names(text: &str) -> Vec<&str> {
    text.lines().map(|line| line.split("  ").next().unwrap().trim()).filter(|name| !name.is_empty()).collect()
}

#[test]
fn layers_are_timed_beside_stock_ones() {
    let tiny = ["--shape", "64x96,32x32", "--rows", "1,3", "--rotate", "0", "-r", "2"];
    let run = bench(&tiny);
    let table = text(&run);
    let group = |title| {
        let codings = ["rans", "fixed12", "fixed11", "int8", "int8-fixed12"];
        let stock = ["candle bf16", "candle f16", "candle f32", "candle q8_0"];
        [vec![title], codings.to_vec(), stock.to_vec()].concat()
    };
    let titles = ["64x96, 1 row", "64x96, 3 rows", "32x32, 1 row", "32x32, 3 rows"];
    assert_eq!(names(&table)[1..], titles.map(group).concat(), "{table}");
    for column in ["bits/w", "MB", "ms", "spread", "GB/s", "x bf16", "x f16", "x f32", "x q8_0"] {
        assert_eq!(table.matches(column).count(), 4, "{column} in {table}");
    }
    let notes = String::from_utf8(run.stderr).unwrap();
    assert!(notes.contains("64x96: making rans") && notes.contains("32x32, 3 rows"), "{notes}");
    assert!(!notes.contains('\r') && !notes.contains('\u{1b}'), "no terminal control in a redirected run: {notes:?}");

    let some =
        ["--codec", "rate-4.5,fixed12", "--stock", "q4_0", "--weights", "student-t", "--dtype", "bf16", "--json"];
    let run = bench(&[&tiny[..], &some, &["-q"]].concat());
    assert!(run.stderr.is_empty(), "{run:?}");
    let json = json(&run);
    let rows = json["groups"][0]["rows"].as_array().unwrap();
    assert_eq!(
        rows.iter().map(|row| row["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["rate-4.5", "fixed12", "q4_0"]
    );
    for row in rows {
        assert_eq!(row["samples_s"].as_array().unwrap().len(), 2);
        assert_eq!(row["weights"], 64 * 96);
        assert!(row["median_s"].as_f64().unwrap() > 0.0 && row["speed_relative_to"]["q4_0"].as_f64().unwrap() > 0.0);
    }
    // A block of 32 weights takes 18 bytes.
    assert_eq!((rows[2]["bytes"].as_u64(), rows[2]["bits_per_weight"].as_f64()), (Some(64 * 3 * 18), Some(4.5)));
    assert_eq!((&rows[2]["stock"], &rows[1]["stock"]), (&true.into(), &false.into()));
    assert_eq!(json["machine"]["activations"], "bf16");

    // What the default list cannot do is left out, and said.
    let run = bench(&["--shape", "8x20", "--rows", "1", "-r", "1", "--rotate", "0"]);
    assert!(!text(&run).contains("q8_0"));
    assert!(String::from_utf8_lossy(&run.stderr).contains("q8_0 needs a multiple of 32 inputs"), "{run:?}");
}

#[test]
fn ratios_are_plotted() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ratios.svg");
    let plot = file.to_str().unwrap();
    let tiny = ["--shape", "64x96,32x32", "--rows", "1,3,8", "--rotate", "0", "-r", "1", "--codec", "rans,int8", "-q"];
    text(&bench(&[&tiny[..], &["--stock", "bf16", "--plot", plot]].concat()));
    let svg = std::fs::read_to_string(&file).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
    for text in ["64x96: times faster than candle bf16", "32x32: times faster", "rans", "int8", "rows of activations"] {
        assert!(svg.contains(text), "{text} in {svg}");
    }
    // A point for each coding, shape and number of rows.
    assert!(svg.matches("<circle").count() == 2 * 2 * 3, "{svg}");
    for (args, cause) in [
        (&["--stock", "none", "--plot", plot][..], "no ratios"),
        (&["--plot", dir.path().to_str().unwrap()], "os error"),
        (&["--decode"], "--device"),
    ] {
        let run = bench(&[&tiny[..], args].concat());
        assert!(!run.status.success() && String::from_utf8_lossy(&run.stderr).contains(cause), "{run:?}");
        // What was measured is not lost with the plot; what cannot have one is not measured at all.
        assert_eq!(String::from_utf8_lossy(&run.stdout).contains("rans"), cause == "os error", "{run:?}");
    }
}

#[test]
fn formats_of_gguf_files_are_timed_beside_candle_s() {
    let shape =
        ["--rows", "1,3", "--rotate", "0", "-r", "1", "--codec", "q4_k,q8_0", "--stock", "q4_k,f32", "--json", "-q"];
    let json = json(&bench(&[&["--shape", "64x256"][..], &shape].concat()));
    let rows = json["groups"][1]["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["q4_k", "q8_0", "q4_k", "f32"]);
    // Scales and minima take 8 bits instead of 6.
    assert_eq!(rows[0]["bits_per_weight"].as_f64(), Some(4.625));
    assert_eq!((&rows[0]["stock"], &rows[2]["stock"]), (&false.into(), &true.into()));
    let run = bench(&[&["--shape", "8x96"][..], &shape].concat());
    assert!(!run.status.success());
    assert!(String::from_utf8_lossy(&run.stderr).contains("8x96: q4_k needs a multiple of 256 inputs"), "{run:?}");
}

#[test]
fn models_are_timed_beside_stock_ones() {
    let mut tiny = Tiny::new();
    tiny.bf16 = true;
    tiny.write();
    let out = tempfile::tempdir().unwrap();
    let packed = out.path().join("packed");
    candle_taper::convert::compress(tiny.path(), &packed, &Default::default(), &()).unwrap();
    let [plain, packed] = [tiny.path(), &packed].map(|path| path.to_str().unwrap());
    let short = ["-p", "7", "-n", "3", "-r", "2"];
    let run = |args: &[&str]| bench(&[&short[..], args].concat());
    let table = text(&run(&["--model", plain]));
    let ours = ["fixed12", "rans", "int8-fixed12", "candle bf16", "candle f32"];
    let titles = ["loading, each in a new process", "pp7: a prompt of 7 tokens", "tg3: 3 tokens generated one by one"];
    let expected: Vec<&str> = titles.iter().flat_map(|title| [&[*title][..], &ours].concat()).collect();
    assert_eq!(names(&table)[1..], expected, "{table}");

    // Both directories: the compressed one is ours, the other candle's.
    let both = format!("{plain},{packed}");
    let value = json(&run(&["--model", &both, "--json", "--stock", "f16", "--dtype", "f16"]));
    let list = |rows: &Value| -> Vec<String> {
        rows.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(list(&value["loads"]), ["packed", "f16"]);
    let weights: usize = tiny.tensors.values().map(|shape| shape.iter().product::<usize>()).sum();
    // A token needs one row of the embedding, which is not the output layer here.
    let needed = weights - tiny.tensors["model.embed_tokens.weight"].iter().product::<usize>();
    for group in value["groups"].as_array().unwrap() {
        assert_eq!(list(&group["rows"]), ["packed", "f16"]);
        for row in group["rows"].as_array().unwrap() {
            assert_eq!(row["weights"].as_u64(), Some(needed as u64));
            assert!(row["tokens_per_s"].as_f64().unwrap() > 0.0);
        }
    }
    assert_eq!(value["groups"][0]["rows"][1]["bytes"].as_u64(), Some(2 * needed as u64));
    for load in value["loads"].as_array().unwrap() {
        assert!(load["load_s"].as_f64().unwrap() > 0.0);
        assert!(!cfg!(target_os = "linux") || load["peak_bytes"].as_u64().unwrap() > 1 << 20);
    }
    // Alone, the compressed one also gives candle its weights; nothing else is loaded if not asked for.
    let names = |args: &[&str]| list(&json(&run(&[args, &["--json"]].concat()))["loads"]);
    assert_eq!(names(&["--model", packed]), ["packed", "bf16", "f32"]);
    assert_eq!(names(&["--model", packed, "--stock", "none"]), ["packed"]);
    assert_eq!(names(&["--model", plain, "--stock", "none", "--codec", "dense,rate-5"]), ["dense", "rate-5"]);
}

#[test]
fn the_number_of_threads_is_candles_too() {
    let args = ["--shape", "8x32", "--rows", "1", "-r", "1", "--rotate", "0", "--json", "--threads"];
    for threads in ["1", "3"] {
        let value = json(&bench(&[&args[..], &[threads]].concat()));
        assert_eq!(value["machine"]["threads"].to_string(), threads);
    }
}

#[test]
fn wrong_usage_is_told_from_failure() {
    let code = |args: &[&str]| bench(args).status.code();
    for wrong in [
        &["--shape", "4096"][..],
        &["--shape", "0x32"],
        &["--shape", "32x"],
        &["--shape", "999999999x32"],
        &["--rows", "0"],
        &["--codec", "zip"],
        &["--codec", "rate-99"],
        &["--stock", "q9"],
        &["-r", "0"],
        &["-p", "8"],
        &["--model", "x", "--shape", "8x32"],
    ] {
        assert_eq!(code(wrong), Some(2), "{wrong:?}");
    }
    let fails = |args: &[&str], part: &str| {
        let run = bench(args);
        let message = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.code() == Some(1) && message.contains(part), "{run:?}");
    };
    fails(&["--model", "no such directory"], "No such file");
    fails(&["--codec", "none", "--stock", "none"], "nothing to time");
    fails(&["--codec", "dense", "--shape", "8x32"], "--codec dense is for models");
    fails(&["--shape", "8x20", "--stock", "q8_0", "--codec", "none"], "multiple of 32 inputs");
    let tiny = Tiny::new();
    let model = tiny.path().to_str().unwrap();
    fails(&["--model", model, "-p", "601"], "context of 600");
    fails(&["--model", model, "-p", "0", "-n", "0"], "nothing to time");
    fails(&["--model", model, "--stock", "q8_0"], "bf16, f16 and f32");
    fails(&["--model", model, "--max-time=0"], "--max-time");
}

#[test]
fn what_fusing_saves_is_counted() {
    let args = ["--shape", "512x256", "--rows", "2", "--rotate", "0", "-r", "2", "--unfused", "--stock", "f32"];
    let args = [&args[..], &["--codec", "q4_k,fixed12", "--json", "-q"]].concat();
    let json = json(&bench(&args));
    let rows = json["groups"][0]["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["q4_k", "q4_k, unfused", "fixed12", "fixed12, unfused", "f32"]);
    let number = |row: usize, key: &str| rows[row][key].as_u64().unwrap();
    let (dense, activations) = (512 * 256 * 4, 2 * (512 + 256) * 4);
    for row in [0, 2, 4] {
        assert_eq!(number(row, "moved_bytes"), number(row, "bytes") + activations);
    }
    for row in [1, 3] {
        assert_eq!(number(row, "moved_bytes"), number(row - 1, "bytes") + 2 * dense + activations);
    }
    assert_eq!(number(4, "bytes"), dense);
}

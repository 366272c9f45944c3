//! The `taper` command as a user or a script meets it: output, exit codes, kills, full disks.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::model::{files, write_model};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const TAPER: &str = env!("CARGO_BIN_EXE_taper");

fn taper<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(args: I) -> Output {
    Command::new(TAPER).args(args).stdin(Stdio::null()).output().unwrap()
}

fn paths(dir: &Path) -> [String; 3] {
    ["model", "out", "back"].map(|name| dir.join(name).to_str().unwrap().to_string())
}

#[test]
fn the_commands_work_together() {
    let dir = tempfile::tempdir().unwrap();
    let [model, out, back] = paths(dir.path());
    write_model(model.as_ref(), 2, 256);
    let run = taper(["compress", &model, &out]);
    assert!(run.status.success(), "{run:?}");
    let text = String::from_utf8(run.stdout).unwrap();
    assert!(
        text.contains("20 tensors (12 compressed, 2 would not shrink)") && text.contains("every tile verified"),
        "{text}"
    );
    let notes = String::from_utf8(run.stderr).unwrap();
    assert!(notes.contains("pytorch_model.bin is left out"), "{notes}");
    assert!(!notes.contains('\r') && !notes.contains('\u{1b}'), "no terminal control in a redirected run: {notes:?}");

    let run = taper(["verify", &out]);
    assert!(
        run.status.success() && String::from_utf8_lossy(&run.stdout).starts_with("ok: 6 files, 20 tensors"),
        "{run:?}"
    );
    let run = taper(["inspect", &out, "--json", "--html", &format!("{back}.html")]);
    let json: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(json["tensors"].as_array().unwrap().len(), 20);
    assert!(fs::read_to_string(format!("{back}.html")).unwrap().contains("<svg"));
    let run = taper(["inspect", &out]);
    assert!(String::from_utf8_lossy(&run.stdout).contains("model.layers.0.self_attn.q_proj"), "{run:?}");

    let run = taper(["-q", "decompress", &out, &back]);
    assert!(run.status.success() && run.stdout.is_empty() && run.stderr.is_empty(), "{run:?}");
    let mut expected = files(model.as_ref());
    expected.remove("pytorch_model.bin");
    assert!(files(back.as_ref()) == expected);
}

#[test]
fn exit_codes_tell_usage_failure_and_damage_apart() {
    let dir = tempfile::tempdir().unwrap();
    let [model, out, _] = paths(dir.path());
    write_model(model.as_ref(), 1, 256);
    let code = |args: &[&str]| taper(args).status.code().unwrap();
    assert_eq!(code(&["compress", &model]), 2);
    assert_eq!(code(&["compress", &model, &out, "--codec", "zip"]), 2);
    assert_eq!(code(&["compress", &model, &out, "--include", "("]), 2);
    assert_eq!(code(&["compress", &model, &out, "--codec", "rate"]), 1);
    assert_eq!(code(&["compress", &model, &out, "--codec", "int8", "--bits", "4"]), 1);
    assert_eq!(code(&["compress", &model, &out, "--bits", "99"]), 1);
    assert_eq!(code(&["compress", "no such file", &out]), 1);
    let missing = String::from_utf8(taper(["verify", "no such file"]).stderr).unwrap();
    assert_eq!(missing.matches("No such file").count(), 1, "{missing}");
    assert!(!Path::new(&out).exists());
    assert_eq!(code(&["compress", &model, &out, "--bits", "4.5", "--threads", "1"]), 0);
    assert_eq!(code(&["compress", &model, &out]), 1);
    assert_eq!(code(&["compress", &model, &out, "--force", "--no-verify", "--stage", "fixed11"]), 0);
    assert_eq!(code(&["verify", &model]), 1);
    let weights = Path::new(&out).join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    assert_eq!(code(&["verify", &out]), 3);
    fs::write(&weights, &bytes[..last]).unwrap();
    assert_eq!(code(&["verify", &out]), 3);
    assert_eq!(code(&["inspect", &out]), 3);
    let wrong = Command::new(TAPER).args(["verify", &out]).env("TAPER_CPU", "mmx").output().unwrap();
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("TAPER_CPU=mmx"), "{wrong:?}");
}

/// What a GPU does with a checkpoint is told by one; here only what is refused.
#[cfg(feature = "candle")]
#[test]
fn layouts_are_told_for_compressed_checkpoints_on_a_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let [model, out, _] = paths(dir.path());
    write_model(model.as_ref(), 1, 256);
    assert!(taper(["compress", &model, &out]).status.success());
    let refused = |args: &[&str], cause: &str| {
        let run = taper([&["inspect"][..], args].concat());
        assert_eq!(run.status.code(), Some(if cause == "usage" { 2 } else { 1 }), "{run:?}");
        assert!(cause == "usage" || String::from_utf8_lossy(&run.stderr).contains(cause), "{run:?}");
    };
    refused(&[&out, "--device", "cpu"], "on the CPU weights stay as they are");
    refused(&[&model, "--device", "cuda"], "taper compress");
    refused(&[&out, "--layout", "pair"], "usage");
    refused(&[&out, "--device", "cuda", "--layout", "zip"], "usage");
    refused(&[&out, "--device", "cuda", "--exact"], "usage");
    #[cfg(not(feature = "cuda"))]
    refused(&[&out, "--device", "cuda"], "--features cuda");
}

#[test]
fn forced_backends_give_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let [model, out, back] = paths(dir.path());
    write_model(model.as_ref(), 1, 256);
    assert!(taper(["compress", &model, &out]).status.success());
    for backend in candle_taper::Backend::ALL {
        if !backend.available() {
            println!("skipped: backend {} is not available here", backend.name());
            continue;
        }
        let args = ["decompress", &out, &back, "--force"];
        let run = Command::new(TAPER).args(args).env("TAPER_CPU", backend.name()).output().unwrap();
        assert!(run.status.success(), "{run:?}");
        let mut expected = files(model.as_ref());
        expected.remove("pytorch_model.bin");
        assert!(files(back.as_ref()) == expected, "{}", backend.name());
    }
}

/// Kills 200 conversions at random moments: what is there afterwards is nothing or the whole result, and what a later
/// run makes of the rest is the same as if nothing had happened.
#[test]
fn killed_runs_leave_nothing_or_everything() {
    let dir = tempfile::tempdir().unwrap();
    let [model, out, whole] = paths(dir.path());
    write_model(model.as_ref(), 4, 512);
    let start = Instant::now();
    assert!(taper(["-q", "compress", &model, &whole]).status.success());
    let takes = start.elapsed();
    let expected = files(whole.as_ref());
    let mut rng = SmallRng::seed_from_u64(1);
    let (mut killed, mut resumed, mut finished) = (0, 0, 0);
    while killed < 200 {
        let mut child = Command::new(TAPER)
            .args(["compress", &model, &out])
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(takes.mul_f64(rng.random_range(0.0..1.1)).min(Duration::from_secs(5)));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        resumed += usize::from(String::from_utf8_lossy(&output.stderr).contains("interrupted run"));
        killed += usize::from(!output.status.success());
        if Path::new(&out).exists() {
            assert!(files(out.as_ref()) == expected, "after {killed} kills");
            fs::remove_dir_all(&out).unwrap();
            finished += 1;
        }
    }
    assert!(resumed > 20 && finished > 0, "the kills came too early or too late: {resumed} {finished}");
    let last = taper(["compress", &model, &out]);
    assert!(last.status.success(), "{last:?}");
    assert!(files(out.as_ref()) == expected);
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

/// A file size limit makes writes fail midway, wherever the test runs.
#[test]
fn a_write_that_fails_midway_leaves_nothing_that_loads() {
    let dir = tempfile::tempdir().unwrap();
    let [model, out, back] = paths(dir.path());
    write_model(model.as_ref(), 1, 512);
    let whole = dir.path().join("whole");
    assert!(taper(["-q", "compress", &model, whole.to_str().unwrap()]).status.success());
    for (command, from, to) in [("compress", &model, &out), ("decompress", &whole.to_str().unwrap().to_string(), &back)]
    {
        for blocks in [0, 1, 100, 500, 1000] {
            let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec {TAPER} {command} {from} {to}");
            let run = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(run.status.code(), Some(1), "{run:?}");
            let message = String::from_utf8_lossy(&run.stderr).into_owned();
            assert!(message.contains("too large") || message.contains("os error"), "{message}");
            assert!(!Path::new(to).exists());
        }
    }
    assert!(taper(["compress", &model, &out]).status.success());
    assert!(files(out.as_ref()) == files(&whole));
}

/// A file system that is really full, where the test may mount one.
#[test]
fn a_full_disk_is_an_error_and_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let [model, ..] = paths(dir.path());
    write_model(model.as_ref(), 2, 512);
    let disk = dir.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let disk = disk.to_str().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).output();
    if !mounted.as_ref().is_ok_and(|m| m.status.success()) {
        println!("skipped: a small file system cannot be mounted here");
        return;
    }
    let out = format!("{disk}/out");
    let run = taper(["compress", &model, &out]);
    let exists = Path::new(&out).exists();
    let unmounted = Command::new("umount").arg(disk).status().unwrap();
    assert!(unmounted.success());
    assert_eq!(run.status.code(), Some(1), "{run:?}");
    assert!(String::from_utf8_lossy(&run.stderr).contains("No space left"), "{run:?}");
    assert!(!exists);
}

//! The `taper` command.

mod args;
#[cfg(feature = "candle")]
mod bench;
#[cfg(feature = "candle")]
mod device;
#[cfg(feature = "candle")]
mod generate;
#[cfg(feature = "candle")]
mod placed;
mod progress;
mod render;
#[cfg(feature = "candle")]
mod threads;
#[cfg(feature = "candle")]
mod trace;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use candle_taper::convert::{self, ConvertOptions, Summary};
use candle_taper::{Error, inspect};
use clap::Parser;
use indicatif::{HumanBytes, HumanCount};

use args::{Cli, Command};
use progress::Reporter;

/// It keeps for a while what tensors give back, so that the next ones do not wait until the system has cleared pages for them:
/// a seventh of the time of a long prompt.
#[cfg(feature = "candle")]
#[global_allocator]
static HEAP: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A reader that stopped listening, as `head` does, is no failure of ours.
            if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
                return ExitCode::SUCCESS;
            }
            eprintln!("taper: {}", message(&error));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// An error with its causes. The library's own errors spell theirs out already.
fn message(error: &anyhow::Error) -> String {
    let own = error.chain().position(|cause| cause.is::<Error>()).unwrap_or(usize::MAX);
    let causes: Vec<String> = error.chain().take(own.saturating_add(1)).map(|cause| cause.to_string()).collect();
    causes.join(": ")
}

/// 3 for damaged or malformed data, 1 for everything else; clap exits with 2 on wrong usage.
fn exit_code(error: &anyhow::Error) -> u8 {
    fn damaged(error: &Error) -> bool {
        match error {
            Error::File { source, .. } | Error::Tensor { source, .. } | Error::Tile { source, .. } => damaged(source),
            Error::Truncated { .. } | Error::Field { .. } | Error::Checksum { .. } => true,
            Error::Stream(_) | Error::Malformed(_) => true,
            _ => false,
        }
    }
    if error.downcast_ref::<Error>().is_some_and(damaged) { 3 } else { 1 }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    // An unusable TAPER_CPU is an error before any work, not in the middle of it.
    candle_taper::Backend::current()?;
    if let Some(threads) = cli.threads {
        #[cfg(feature = "candle")]
        if matches!(cli.command, Command::Generate(_) | Command::Bench(_)) {
            threads::set(threads)?;
        }
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.into())
            .build_global()
            .context("cannot start the threads")?;
    }
    match &cli.command {
        Command::Compress(args) => {
            let options = args.options()?;
            let progress = Reporter::new(cli.quiet, total_bytes(&args.input));
            let start = Instant::now();
            let summary = convert::compress(&args.input, &args.output, &options, &progress)?;
            progress.finish();
            print_compressed(cli.quiet, &summary, &options, start);
        }
        Command::Decompress(args) => {
            let progress = Reporter::new(cli.quiet, 0);
            let start = Instant::now();
            let summary = convert::decompress(&args.input, &args.output, args.force, &progress)?;
            progress.finish();
            if !cli.quiet {
                let (bytes, speed) = (HumanBytes(summary.bytes_out), rate(summary.bytes_out, start));
                println!("{} tensors, {bytes} restored in {}", HumanCount(summary.tensors), speed);
            }
        }
        Command::Verify(args) => {
            let progress = Reporter::new(cli.quiet, total_bytes(&args.path));
            let start = Instant::now();
            let report = convert::verify(&args.path, &progress)?;
            progress.finish();
            if !cli.quiet {
                let (tensors, tiles) = (HumanCount(report.tensors), HumanCount(report.tiles));
                let speed = rate(report.bytes, start);
                println!(
                    "ok: {} files, {tensors} tensors, {tiles} tiles, {} in {speed}",
                    report.files,
                    HumanBytes(report.bytes)
                );
            }
        }
        #[cfg(feature = "candle")]
        Command::Generate(args) => generate::run(args, cli.quiet)?,
        #[cfg(feature = "candle")]
        Command::Bench(args) => bench::run(args, cli.quiet)?,
        #[cfg(feature = "candle")]
        Command::Inspect(args) if args.device.is_some() => {
            let progress = Reporter::new(cli.quiet, total_bytes(&args.path));
            placed::run(&args.path, args.device.unwrap_or(device::DeviceName::Cpu), args.layout, args.json, &progress)?;
            progress.finish();
        }
        Command::Inspect(args) => {
            let progress = Reporter::new(cli.quiet || !args.exact, total_bytes(&args.path));
            let inspection = inspect::inspect(&args.path, args.exact, &progress)?;
            progress.finish();
            if let Some(path) = &args.html {
                std::fs::write(path, render::html(&inspection)).with_context(|| path.display().to_string())?;
            }
            let text = if args.json { render::json(&inspection)? } else { render::table(&inspection) };
            if args.json || args.html.is_none() || !cli.quiet {
                use std::io::Write;
                writeln!(std::io::stdout(), "{}", text.trim_end())?;
            }
        }
    }
    Ok(())
}

fn print_compressed(quiet: bool, summary: &Summary, options: &ConvertOptions, start: Instant) {
    if quiet {
        return;
    }
    let Summary { bytes_in, bytes_out, .. } = *summary;
    let percent = 100.0 * bytes_out as f64 / bytes_in.max(1) as f64;
    println!(
        "{} tensors ({} compressed, {} would not shrink): {} -> {} ({percent:.1}%) in {}{}",
        HumanCount(summary.tensors),
        HumanCount(summary.compressed),
        summary.incompressible,
        HumanBytes(bytes_in),
        HumanBytes(bytes_out),
        rate(bytes_in, start),
        if options.matrix.verify { ", every tile verified" } else { "" },
    );
    if summary.noise > 0.0 {
        println!("signal to noise of the quantised weights: {:.2} dB", 10.0 * (summary.signal / summary.noise).log10());
    }
}

/// Time and speed.
fn rate(bytes: u64, start: Instant) -> String {
    let seconds = start.elapsed().as_secs_f64();
    format!("{seconds:.1} s ({:.0} MB/s)", bytes as f64 / 1e6 / seconds.max(1e-9))
}

/// Bytes of the weights at a path, for the progress bar; 0 if that cannot be told.
fn total_bytes(path: &Path) -> u64 {
    let files = candle_taper::checkpoint::weight_files(path).unwrap_or_default();
    files.iter().filter_map(|file| std::fs::metadata(file).ok()).map(|info| info.len()).sum()
}

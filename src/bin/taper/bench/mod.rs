//! `taper bench`: how fast our layers and models are beside candle's own, in one run.
//!
//! Everything is timed in turns, so that whatever else the machine does meets all alike; tables show medians, the distance
//! between the quartiles, and medians of the ratios of each turn.

mod args;
mod decode;
mod int4;
mod layers;
mod load;
mod machine;
mod models;
mod plot;
mod progress;
mod report;
mod timing;

pub use args::BenchArgs;

use std::io::Write;

use machine::Machine;
use progress::Steps;
use report::Report;

/// Runs the command.
pub fn run(args: &BenchArgs, quiet: bool) -> anyhow::Result<()> {
    let device = args.device.open()?;
    #[cfg(feature = "cuda")]
    candle_taper::cuda::set_programmatic_launch(!args.plain_launch);
    if let Some(code) = &args.probe {
        writeln!(std::io::stdout(), "{}", models::run_probe(args, code, &device)?)?;
        return Ok(());
    }
    anyhow::ensure!(!args.decode || args.on_gpu(), "--decode: decoding to memory is timed on a GPU, see --device");
    anyhow::ensure!(
        args.plot.is_none() || !args.stocks(&["bf16"]).is_empty(),
        "--plot: there are no ratios without --stock"
    );
    let steps = Steps::new(quiet);
    let machine = Machine::here(args.activations().as_str(), &device)?;
    let (loads, groups) = if args.model.is_empty() {
        (Vec::new(), layers::run(args, &device, &steps)?)
    } else {
        models::run(args, &device, &steps)?
    };
    steps.finish();
    let report = Report { machine, loads, groups };
    // First what took long: a plot that cannot be written must not lose it.
    let text = if args.json { report.json()? } else { report.table() };
    writeln!(std::io::stdout(), "{text}")?;
    args.plot.as_ref().map_or(Ok(()), |file| plot::write(&report, file))
}

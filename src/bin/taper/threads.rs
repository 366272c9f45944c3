//! The number of candle's threads.

use std::process::Command;

/// What candle and rayon take it from when their threads are first needed.
const VARIABLE: &str = "RAYON_NUM_THREADS";
/// candle's own, which goes before it.
const CANDLE_VARIABLE: &str = "CANDLE_NUM_THREADS";

/// Makes candle use so many threads. It asks the environment only, which a running program cannot safely change: unless it
/// is right already, this starts the program again with it and does not return.
///
/// # Errors
/// If the program cannot be started again.
pub fn set(threads: u16) -> anyhow::Result<()> {
    let threads = threads.to_string();
    let right = |variable| std::env::var(variable).is_ok_and(|value| value == threads);
    if right(VARIABLE) && right(CANDLE_VARIABLE) {
        return Ok(());
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).env(VARIABLE, &threads).env(CANDLE_VARIABLE, &threads);
    #[cfg(unix)]
    return Err(std::os::unix::process::CommandExt::exec(&mut command).into());
    #[cfg(not(unix))]
    std::process::exit(command.status()?.code().unwrap_or(1));
}

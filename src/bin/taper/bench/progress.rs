//! What is being timed, on standard error.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar on a terminal, elsewhere a line for each thing that begins.
pub struct Steps {
    bar: ProgressBar,
    lines: bool,
}

impl Steps {
    /// Says nothing if `quiet`.
    pub fn new(quiet: bool) -> Steps {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal && !quiet { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left  {wide_msg}") {
            bar.set_style(style);
        }
        Steps { bar, lines: !quiet && !terminal }
    }

    /// So many more steps will come.
    pub fn expect(&self, steps: u64) {
        self.bar.inc_length(steps);
    }

    /// What comes next.
    pub fn begin(&self, what: &str) {
        self.bar.set_message(what.to_string());
        if self.lines {
            eprintln!("{what}");
        }
    }

    /// Something that the user should know.
    pub fn note(&self, text: &str) {
        if self.lines {
            eprintln!("note: {text}");
        }
        self.bar.println(format!("note: {text}"));
    }

    /// One is done.
    pub fn step(&self) {
        self.bar.inc(1);
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

//! Progress on a terminal as a bar, elsewhere as plain lines.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_taper::convert::Progress;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Shows how far a conversion is.
pub struct Reporter {
    bar: ProgressBar,
    style: Style,
    /// For plain lines: bytes of all files, done, and tenths already reported.
    total: AtomicU64,
    done: AtomicU64,
    tenths: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Quiet,
    Lines,
    Bar,
}

impl Reporter {
    /// For work on `total` bytes; with 0 they are added up as files begin.
    pub fn new(quiet: bool, total: u64) -> Reporter {
        let style = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Style::Quiet,
            (_, true) => Style::Bar,
            _ => Style::Lines,
        };
        let bar = if style == Style::Bar { ProgressBar::new(total) } else { ProgressBar::hidden() };
        let template = "{bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec}, {eta} left  {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Reporter { bar, style, total: total.into(), done: 0.into(), tenths: 0.into() }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Progress for Reporter {
    fn file(&self, name: &str, bytes: u64) {
        if self.total.load(Ordering::Relaxed) == 0 || self.bar.length() == Some(0) {
            self.bar.inc_length(bytes);
        }
        self.total.fetch_max(self.done.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
        if self.style == Style::Lines {
            eprintln!("{name}: {}", HumanBytes(bytes));
        }
    }

    fn tensor(&self, name: &str) {
        self.bar.set_message(name.to_string());
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let total = self.total.load(Ordering::Relaxed).max(1);
        let tenths = (10 * done / total).min(10);
        // Work that ends in an instant needs no lines on the way.
        let long = self.style == Style::Lines && total >= 256 << 20;
        if long && self.tenths.fetch_max(tenths, Ordering::Relaxed) < tenths {
            eprintln!("{}% of {}", 10 * tenths, HumanBytes(total));
        }
    }

    fn note(&self, text: &str) {
        match self.style {
            Style::Quiet => {}
            Style::Lines => eprintln!("note: {text}"),
            Style::Bar => self.bar.println(format!("note: {text}")),
        }
    }
}

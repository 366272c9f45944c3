//! Spans to a file that chrome://tracing and Perfetto show.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Writes when each span was entered and left.
pub struct Trace {
    start: Instant,
    state: Mutex<State>,
}

struct State {
    out: BufWriter<File>,
    /// The names of spans; a span's id is its name's place here, from 1.
    names: Vec<&'static str>,
    written: std::io::Result<()>,
}

impl Trace {
    /// Creates `trace-TIME.json` in the current directory and writes this process's spans to it from now on.
    pub fn start() -> anyhow::Result<Arc<Trace>> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let path = format!("trace-{}.json", time.as_micros());
        let mut out = BufWriter::new(File::create(&path).with_context(|| path.clone())?);
        write!(out, "[{{\"ph\":\"M\",\"pid\":1,\"name\":\"process_name\",\"args\":{{\"name\":\"taper\"}}}}")?;
        let state = Mutex::new(State { out, names: Vec::new(), written: Ok(()) });
        let trace = Arc::new(Trace { start: Instant::now(), state });
        tracing::subscriber::set_global_default(trace.clone())?;
        Ok(trace)
    }

    /// Completes the file.
    pub fn finish(&self) -> anyhow::Result<()> {
        let mut state = self.state();
        std::mem::replace(&mut state.written, Ok(())).context("the trace is incomplete")?;
        writeln!(state.out, "]")?;
        Ok(state.out.flush()?)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, phase: char, span: &Id) {
        let micros = self.start.elapsed().as_secs_f64() * 1e6;
        let mut state = self.state();
        let name = state.names.get(span.into_u64() as usize - 1).copied().unwrap_or("?");
        if state.written.is_ok() {
            state.written =
                write!(state.out, ",\n{{\"ph\":\"{phase}\",\"pid\":1,\"tid\":1,\"ts\":{micros:.1},\"name\":{name:?}}}");
        }
    }
}

impl Subscriber for Trace {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span()
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let name = span.metadata().name();
        let mut state = self.state();
        let place = state.names.iter().position(|known| *known == name).unwrap_or_else(|| {
            state.names.push(name);
            state.names.len() - 1
        });
        Id::from_u64(place as u64 + 1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, span: &Id) {
        self.write('B', span);
    }

    fn exit(&self, span: &Id) {
        self.write('E', span);
    }
}

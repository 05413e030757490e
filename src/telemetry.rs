//! The log: one line for each event, on standard error. Standard output belongs to
//! what a command was asked for.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{LogConfig, LogFormat};

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter can't be parsed. `LogConfig` from `config` is checked.
    #[error("the log filter can't be parsed: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// `init` was called before in this process.
    #[error("the log was set up before: {0}")]
    SetUpBefore(#[from] tracing_subscriber::util::TryInitError),
}

/// Sends the process's events to standard error, for as long as it lives. Once in a
/// process.
pub fn init(log: &LogConfig) -> Result<(), TelemetryError> {
    let filter = EnvFilter::builder().parse(&log.filter)?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => lines
            .with_ansi(std::io::stderr().is_terminal())
            .finish()
            .try_init()?,
        // The event's fields stand beside level and time, and the span's own once,
        // under `span`.
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .finish()
            .try_init()?,
    }
    Ok(())
}

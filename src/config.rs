//! Flags and `REMIT_*` variables, and what they mean once they have been checked.
//!
//! Each setting is a flag `--name-of-it` and a variable `REMIT_NAME_OF_IT`; the flag
//! counts first. clap only collects the texts: `resolve` parses all of them, so that
//! one run reports every mistake. No text that can hold a secret is ever repeated.

mod args;
mod database_url;
mod read;

#[cfg(test)]
mod tests;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use http::Uri;

pub use args::{ClientArgs, DatabaseArgs, LogArgs, ServeArgs};
pub use database_url::DatabaseUrl;

/// Variable with the API key itself. There is no flag for it: other users of the
/// machine can read a command line.
pub const API_KEY_VARIABLE: &str = "REMIT_API_KEY";

/// What `remit serve` runs with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeConfig {
    /// Where gRPC is served over TCP. At least one of this and `socket` is there.
    pub listen: Option<SocketAddr>,
    /// Where gRPC is served on a Unix socket.
    pub socket: Option<PathBuf>,
    /// Gets the bound TCP address. Only there with `listen`.
    pub port_file: Option<PathBuf>,
    /// Where the Cycles protocol is served to agents.
    pub cycles_listen: Option<SocketAddr>,
    /// Gets the bound address of it.
    pub cycles_port_file: Option<PathBuf>,
    /// Where its admin plane is served.
    pub cycles_admin_listen: Option<SocketAddr>,
    /// Gets the bound address of it.
    pub cycles_admin_port_file: Option<PathBuf>,
    /// Where metrics and probes are served over HTTP.
    pub metrics_listen: Option<SocketAddr>,
    /// Gets the bound address of them.
    pub metrics_port_file: Option<PathBuf>,
    /// Where the data is.
    pub database: Database,
    /// File of the first operator's key.
    pub bootstrap_key_file: Option<PathBuf>,
    /// Whether to migrate at the start.
    pub migrate: bool,
    /// Whether to serve reflection.
    pub reflection: bool,
    /// Whether webhooks may go into private networks, and by plain HTTP.
    pub webhooks_allow_private: bool,
    /// TLS on TCP. None: plaintext, on a loopback address or because the operator
    /// says so.
    pub tls: Option<TlsFiles>,
    /// Bounds on single requests and on connections.
    pub limits: Limits,
    /// Bounds of the engine.
    pub engine: EngineLimits,
    /// How the server stops.
    pub drain: Drain,
    /// What is logged.
    pub log: LogConfig,
}

/// Where the data is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Database {
    /// A PostgreSQL that somebody else runs.
    Url(DatabaseUrl),
    /// One that Remit runs itself.
    Embedded {
        /// Its folder. None: `store::embedded::default_data_dir`.
        data_dir: Option<PathBuf>,
        /// The folder with its programs. None: the usual places.
        postgres_bin: Option<PathBuf>,
    },
}

/// PEM files for TLS on TCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Who must have signed a client's certificate. None: clients need none.
    pub client_ca: Option<PathBuf>,
}

/// Bounds on single requests and on connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// For requests whose client names no deadline.
    pub default_deadline: Duration,
    /// For the deadlines that clients name.
    pub max_deadline: Duration,
    /// Largest request message.
    pub max_message_bytes: usize,
    /// Largest Provision request.
    pub max_provision_bytes: usize,
    /// Most requests in work in the process.
    pub max_concurrent_requests: usize,
    /// Most requests in work on one connection.
    pub max_streams_per_connection: u32,
}

/// Bounds of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineLimits {
    /// Batches that may be decided at the same time.
    pub lanes: usize,
    /// Most requests in a batch.
    pub max_batch: usize,
    /// Most requests that wait in a lane.
    pub max_waiting: usize,
    /// Most requests of one tenant that wait.
    pub max_waiting_per_tenant: usize,
    /// Time between two sweeps for expired reservations.
    pub sweep_interval: Duration,
}

/// How the server stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drain {
    /// How long NOT_SERVING is reported before new requests are refused.
    pub delay: Duration,
    /// How long requests in work are then waited for.
    pub timeout: Duration,
}

/// What is logged and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// The form of a line.
    pub format: LogFormat,
    /// In the syntax of `tracing_subscriber::EnvFilter`, checked.
    pub filter: String,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// A JSON object on each line.
    Json,
}

/// How to reach a running server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientConfig {
    /// The server.
    pub target: Target,
    /// The key to send as `authorization: Bearer …`.
    pub api_key: Option<ApiKeyText>,
    /// Certificates (PEM) to trust in place of the system's. Only there with https.
    pub ca_cert: Option<PathBuf>,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `http://` or `https://` with host and, where it is not the scheme's, a port.
    Tcp(Uri),
    /// A Unix socket.
    Unix(PathBuf),
}

/// An API key with its secret. Debug does not show it; there is no Display.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKeyText(String);

impl ApiKeyText {
    /// The key, for nothing but sending it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKeyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKeyText(***)")
    }
}

/// Every mistake in the settings of one run. Display gives each its own line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigErrors(Vec<String>);

impl ConfigErrors {
    /// The lines, at least one.
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

impl Target {
    /// Whether the connection is made over TLS.
    pub fn is_tls(&self) -> bool {
        match self {
            Self::Tcp(uri) => uri.scheme_str() == Some("https"),
            Self::Unix(_) => false,
        }
    }
}

/// Joins the results of two groups of settings, so that the mistakes of both are
/// reported.
pub fn both<A, B>(
    a: Result<A, ConfigErrors>,
    b: Result<B, ConfigErrors>,
) -> Result<(A, B), ConfigErrors> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (Err(mut a), Err(b)) => {
            a.0.extend(b.0);
            Err(a)
        }
        (Err(errors), Ok(_)) | (Ok(_), Err(errors)) => Err(errors),
    }
}

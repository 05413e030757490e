//! The flags as clap collects them, and how they are resolved.

use std::ffi::OsString;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::Args;

use super::read::{self, Flag, Reader};
use super::{
    API_KEY_VARIABLE, ClientConfig, ConfigErrors, Database, Drain, EngineLimits, Limits, LogConfig,
    ServeConfig, TlsFiles,
};

const LISTEN: Flag = Flag("listen");
const SOCKET: Flag = Flag("socket");
const PORT_FILE: Flag = Flag("port-file");
const CYCLES_LISTEN: Flag = Flag("cycles-listen");
const CYCLES_PORT_FILE: Flag = Flag("cycles-port-file");
const CYCLES_ADMIN_LISTEN: Flag = Flag("cycles-admin-listen");
const CYCLES_ADMIN_PORT_FILE: Flag = Flag("cycles-admin-port-file");
const METRICS_LISTEN: Flag = Flag("metrics-listen");
const METRICS_PORT_FILE: Flag = Flag("metrics-port-file");
const INSECURE: Flag = Flag("insecure");
const TLS_CERT: Flag = Flag("tls-cert");
const TLS_KEY: Flag = Flag("tls-key");
const TLS_CLIENT_CA: Flag = Flag("tls-client-ca");
const DATABASE_URL: Flag = Flag("database-url");
const DATA_DIR: Flag = Flag("data-dir");
const POSTGRES_BIN: Flag = Flag("postgres-bin");
const DEFAULT_DEADLINE: Flag = Flag("default-deadline");
const MAX_DEADLINE: Flag = Flag("max-deadline");
const CA_CERT: Flag = Flag("ca-cert");

const HOUR: Duration = Duration::from_secs(3_600);
const DEADLINES: RangeInclusive<Duration> = Duration::from_millis(1)..=HOUR;
const DRAINS: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(600);
const MESSAGE_SIZES: RangeInclusive<usize> = 1_024..=64 * 1_024 * 1_024;

/// Settings of `remit serve`, as given.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address and port for gRPC over TCP, for example `0.0.0.0:50051` or `[::1]:0`
    /// (port 0: any free one). `none`: no TCP, then --socket is needed.
    #[arg(
        long,
        env = "REMIT_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:50051"
    )]
    listen: OsString,

    /// Also serve gRPC on this Unix socket, for example `/run/remit/remit.sock`. At
    /// most 103 bytes. Default: none.
    #[arg(long, env = "REMIT_SOCKET", value_name = "PATH")]
    socket: Option<OsString>,

    /// Write the TCP address that was bound into this file, once the server is
    /// ready. Default: none.
    #[arg(long, env = "REMIT_PORT_FILE", value_name = "PATH")]
    port_file: Option<OsString>,

    /// Address and port for the Cycles protocol over HTTP/JSON, as agents call it; `none`:
    /// not served. With --tls-cert over HTTPS.
    #[arg(
        long,
        env = "REMIT_CYCLES_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:7878"
    )]
    cycles_listen: OsString,

    /// Write the address that was bound for it into this file. Default: none.
    #[arg(long, env = "REMIT_CYCLES_PORT_FILE", value_name = "PATH")]
    cycles_port_file: Option<OsString>,

    /// Address and port for the admin plane of the Cycles protocol; `none`: not served.
    #[arg(
        long,
        env = "REMIT_CYCLES_ADMIN_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:7979"
    )]
    cycles_admin_listen: OsString,

    /// Write the address that was bound for it into this file. Default: none.
    #[arg(long, env = "REMIT_CYCLES_ADMIN_PORT_FILE", value_name = "PATH")]
    cycles_admin_port_file: Option<OsString>,

    /// Serve metrics for Prometheus (`/metrics`) and probes (`/livez`, `/readyz`) over
    /// HTTP on this address, for example `127.0.0.1:9464`. They name no tenant and need
    /// no key. Default: none.
    #[arg(long, env = "REMIT_METRICS_LISTEN", value_name = "ADDRESS")]
    metrics_listen: Option<OsString>,

    /// Write the metrics address that was bound into this file. Default: none.
    #[arg(long, env = "REMIT_METRICS_PORT_FILE", value_name = "PATH")]
    metrics_port_file: Option<OsString>,

    #[command(flatten)]
    database: DatabaseArgs,

    /// File of the first operator's API key, for example `/etc/remit/operator.key`:
    /// read if it is there, else written (mode 0600) at the first start with a key
    /// that is made then. Default: that key is printed once.
    #[arg(long, env = "REMIT_BOOTSTRAP_KEY_FILE", value_name = "PATH")]
    bootstrap_key_file: Option<OsString>,

    /// Don't bring the database's tables up to date at the start; refuse to start
    /// if they are not. Run `remit migrate` instead.
    #[arg(long, env = "REMIT_NO_MIGRATE", value_name = "true|false",
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_migrate: Option<OsString>,

    /// Don't serve gRPC reflection, by which tools such as grpcurl learn the API.
    #[arg(long, env = "REMIT_NO_REFLECTION", value_name = "true|false",
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_reflection: Option<OsString>,

    /// Let webhooks go to this host and private networks too, and by plain HTTP. Tenants
    /// choose where theirs go: only where those networks trust every tenant.
    #[arg(long, env = "REMIT_WEBHOOKS_ALLOW_PRIVATE", value_name = "true|false",
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    webhooks_allow_private: Option<OsString>,

    /// Certificate chain of the server (PEM). Turns TLS on for TCP; needs --tls-key.
    #[arg(long, env = "REMIT_TLS_CERT", value_name = "PATH")]
    tls_cert: Option<OsString>,

    /// Private key of the server's certificate (PEM). Needs --tls-cert.
    #[arg(long, env = "REMIT_TLS_KEY", value_name = "PATH")]
    tls_key: Option<OsString>,

    /// Certificates (PEM) of which one must have signed each client's (mutual TLS).
    /// Needs --tls-cert. Default: clients need no certificate.
    #[arg(long, env = "REMIT_TLS_CLIENT_CA", value_name = "PATH")]
    tls_client_ca: Option<OsString>,

    /// Allow TCP without TLS on an address that other machines can reach: API keys
    /// then cross the network in the clear.
    #[arg(long, env = "REMIT_INSECURE", value_name = "true|false",
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    insecure: Option<OsString>,

    /// How many batches may be decided at the same time, 1 to 64. A tenant always
    /// keeps to one lane.
    #[arg(long, env = "REMIT_LANES", value_name = "COUNT", default_value = "2")]
    lanes: OsString,

    /// Most requests that are decided in one transaction, 1 to 1024.
    #[arg(
        long,
        env = "REMIT_MAX_BATCH",
        value_name = "COUNT",
        default_value = "512"
    )]
    max_batch: OsString,

    /// Most requests that wait in one lane, 1 to 1000000; more are refused with
    /// RESOURCE_EXHAUSTED.
    #[arg(
        long,
        env = "REMIT_MAX_WAITING",
        value_name = "COUNT",
        default_value = "8192"
    )]
    max_waiting: OsString,

    /// Most requests of one tenant that wait, 1 to 1000000; more are refused with
    /// RESOURCE_EXHAUSTED.
    #[arg(
        long,
        env = "REMIT_MAX_WAITING_PER_TENANT",
        value_name = "COUNT",
        default_value = "4096"
    )]
    max_waiting_per_tenant: OsString,

    /// How long a request may take whose client names no deadline, for example
    /// `500ms`. At most --max-deadline.
    #[arg(
        long,
        env = "REMIT_DEFAULT_DEADLINE",
        value_name = "DURATION",
        default_value = "10s"
    )]
    default_deadline: OsString,

    /// Longest deadline that a client may name, 1ms to 1h; a longer one is
    /// shortened to it.
    #[arg(
        long,
        env = "REMIT_MAX_DEADLINE",
        value_name = "DURATION",
        default_value = "30s"
    )]
    max_deadline: OsString,

    /// Largest request message, 1KiB to 64MiB, after inflating. Provision has a
    /// limit of its own.
    #[arg(
        long,
        env = "REMIT_MAX_MESSAGE_BYTES",
        value_name = "SIZE",
        default_value = "1MiB"
    )]
    max_message_bytes: OsString,

    /// Largest Provision request, 1KiB to 64MiB, after inflating.
    #[arg(
        long,
        env = "REMIT_MAX_PROVISION_BYTES",
        value_name = "SIZE",
        default_value = "8MiB"
    )]
    max_provision_bytes: OsString,

    /// Most requests in work in this process, 1 to 1000000; an open stream counts.
    /// More are refused with RESOURCE_EXHAUSTED.
    #[arg(
        long,
        env = "REMIT_MAX_CONCURRENT_REQUESTS",
        value_name = "COUNT",
        default_value = "4096"
    )]
    max_concurrent_requests: OsString,

    /// Most requests in work on one connection, 1 to 65536; HTTP/2 makes the client
    /// wait beyond.
    #[arg(
        long,
        env = "REMIT_MAX_STREAMS_PER_CONNECTION",
        value_name = "COUNT",
        default_value = "1024"
    )]
    max_streams_per_connection: OsString,

    /// How long a stopping server waits for requests in work, 0s to 10m; what is
    /// left then is cut off.
    #[arg(
        long,
        env = "REMIT_DRAIN_TIMEOUT",
        value_name = "DURATION",
        default_value = "10s"
    )]
    drain_timeout: OsString,

    /// How long a stopping server reports NOT_SERVING before it refuses new
    /// requests, 0s to 10m. Behind a load balancer: a little more than the time
    /// between its health checks.
    #[arg(
        long,
        env = "REMIT_DRAIN_DELAY",
        value_name = "DURATION",
        default_value = "0s"
    )]
    drain_delay: OsString,

    /// How often what expired reservations hold is given back, 10ms to 1h. They
    /// count as expired at once, whatever this says.
    #[arg(
        long,
        env = "REMIT_SWEEP_INTERVAL",
        value_name = "DURATION",
        default_value = "1s"
    )]
    sweep_interval: OsString,

    #[command(flatten)]
    log: LogArgs,
}

/// Where the data is, as given. Shared by `serve`, `migrate` and `verify`.
#[derive(Debug, Args)]
pub struct DatabaseArgs {
    /// PostgreSQL to use, for example `postgres://remit:secret@db:5432/remit`.
    /// Default: Remit starts a PostgreSQL of its own in --data-dir.
    #[arg(
        long,
        env = "REMIT_DATABASE_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    database_url: Option<Hidden>,

    /// Folder of Remit's own PostgreSQL. Default: `/var/lib/remit` as root, else
    /// `$XDG_DATA_HOME/remit` or `~/.local/share/remit`. Not with --database-url.
    #[arg(long, env = "REMIT_DATA_DIR", value_name = "PATH")]
    data_dir: Option<OsString>,

    /// Folder with the programs `postgres` and `initdb`, for example
    /// `/usr/lib/postgresql/15/bin`. Default: the usual places. Not with
    /// --database-url.
    #[arg(long, env = "REMIT_POSTGRES_BIN", value_name = "DIR")]
    postgres_bin: Option<OsString>,
}

/// What is logged and how, as given. Logs go to standard error.
#[derive(Debug, Args)]
pub struct LogArgs {
    /// `text` for people, `json` for programs: one object on each line.
    #[arg(
        long,
        env = "REMIT_LOG_FORMAT",
        value_name = "text|json",
        default_value = "text"
    )]
    log_format: OsString,

    /// Least important level that is logged (error, warn, info, debug, trace, off),
    /// also for each part, for example `info,remit::request=warn,sqlx=debug`.
    #[arg(long, env = "REMIT_LOG", value_name = "FILTER", default_value = "info")]
    log: OsString,
}

/// How to reach a running server, as given. Shared by `provision` and `healthcheck`.
///
/// The key comes from --key-file, else from the variable REMIT_API_KEY.
#[derive(Debug, Clone, Args)]
pub struct ClientArgs {
    /// Server to call: `http://HOST:PORT`, `https://HOST:PORT` or `unix:PATH`.
    #[arg(
        long,
        env = "REMIT_TARGET",
        value_name = "TARGET",
        default_value = "http://127.0.0.1:50051"
    )]
    target: OsString,

    /// File with the API key. Default: the key itself from the variable
    /// REMIT_API_KEY; it can't be given on the command line, which others can read.
    #[arg(long, env = "REMIT_KEY_FILE", value_name = "PATH")]
    key_file: Option<OsString>,

    /// Certificates (PEM) of which one must have signed the server's; only with
    /// https. Default: those that the system trusts.
    #[arg(long, env = "REMIT_CA_CERT", value_name = "PATH")]
    ca_cert: Option<OsString>,
}

/// A text that may hold a secret. Its Debug form does not show it.
#[derive(Clone)]
pub(super) struct Hidden(pub(super) OsString);

impl From<OsString> for Hidden {
    fn from(text: OsString) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hidden(***)")
    }
}

impl ServeArgs {
    /// Checks all settings, and that files which must be there are.
    pub fn resolve(self) -> Result<ServeConfig, ConfigErrors> {
        let mut reader = Reader::default();
        let r = &mut reader;
        let config = ServeConfig {
            listen: r.listen(LISTEN, &self.listen),
            socket: r.socket(SOCKET, self.socket),
            port_file: r.path(PORT_FILE, self.port_file),
            cycles_listen: r.listen(CYCLES_LISTEN, &self.cycles_listen),
            cycles_port_file: r.path(CYCLES_PORT_FILE, self.cycles_port_file),
            cycles_admin_listen: r.listen(CYCLES_ADMIN_LISTEN, &self.cycles_admin_listen),
            cycles_admin_port_file: r.path(CYCLES_ADMIN_PORT_FILE, self.cycles_admin_port_file),
            metrics_listen: self
                .metrics_listen
                .and_then(|given| r.listen(METRICS_LISTEN, &given)),
            metrics_port_file: r.path(METRICS_PORT_FILE, self.metrics_port_file),
            database: self.database.read(r),
            bootstrap_key_file: r.path(Flag("bootstrap-key-file"), self.bootstrap_key_file),
            migrate: !r.switch(Flag("no-migrate"), self.no_migrate),
            reflection: !r.switch(Flag("no-reflection"), self.no_reflection),
            webhooks_allow_private: r
                .switch(Flag("webhooks-allow-private"), self.webhooks_allow_private),
            tls: read_tls(r, self.tls_cert, self.tls_key, self.tls_client_ca),
            limits: Limits {
                default_deadline: r.duration(DEFAULT_DEADLINE, &self.default_deadline, DEADLINES),
                max_deadline: r.duration(MAX_DEADLINE, &self.max_deadline, DEADLINES),
                max_message_bytes: r.size(
                    Flag("max-message-bytes"),
                    &self.max_message_bytes,
                    MESSAGE_SIZES,
                ),
                max_provision_bytes: r.size(
                    Flag("max-provision-bytes"),
                    &self.max_provision_bytes,
                    MESSAGE_SIZES,
                ),
                max_concurrent_requests: r.count(
                    Flag("max-concurrent-requests"),
                    &self.max_concurrent_requests,
                    1..=1_000_000,
                ),
                max_streams_per_connection: r.count(
                    Flag("max-streams-per-connection"),
                    &self.max_streams_per_connection,
                    1..=65_536,
                ),
            },
            engine: EngineLimits {
                lanes: r.count(Flag("lanes"), &self.lanes, 1..=64),
                max_batch: r.count(Flag("max-batch"), &self.max_batch, 1..=1_024),
                max_waiting: r.count(Flag("max-waiting"), &self.max_waiting, 1..=1_000_000),
                max_waiting_per_tenant: r.count(
                    Flag("max-waiting-per-tenant"),
                    &self.max_waiting_per_tenant,
                    1..=1_000_000,
                ),
                sweep_interval: r.duration(
                    Flag("sweep-interval"),
                    &self.sweep_interval,
                    Duration::from_millis(10)..=HOUR,
                ),
            },
            drain: Drain {
                delay: r.duration(Flag("drain-delay"), &self.drain_delay, DRAINS),
                timeout: r.duration(Flag("drain-timeout"), &self.drain_timeout, DRAINS),
            },
            log: self.log.read(r),
        };
        let insecure = r.switch(INSECURE, self.insecure);
        config.check_together(insecure, r);
        reader.finish(config)
    }
}

impl ServeConfig {
    /// Finds what is right by itself and wrong beside another setting.
    fn check_together(&self, insecure: bool, r: &mut Reader) {
        if self.listen.is_none() {
            if self.socket.is_none() {
                r.wrong(
                    SOCKET,
                    "is needed with --listen none: nothing would be served",
                );
            }
            if self.port_file.is_some() {
                r.wrong(PORT_FILE, "means nothing with --listen none: leave one out");
            }
            let others = [self.cycles_listen, self.cycles_admin_listen];
            if self.tls.is_some() && others.iter().all(Option::is_none) {
                r.wrong(TLS_CERT, "means nothing with --listen none: leave one out");
            }
        }
        for (flag, address) in [
            (LISTEN, self.listen),
            (CYCLES_LISTEN, self.cycles_listen),
            (CYCLES_ADMIN_LISTEN, self.cycles_admin_listen),
        ] {
            let reached = address.filter(|at| !at.ip().to_canonical().is_loopback());
            if let Some(address) = reached.filter(|_| self.tls.is_none() && !insecure) {
                r.wrong(
                    flag,
                    &format!(
                        "{address} can be reached from other machines and there is no TLS: give \
                         --tls-cert and --tls-key, or --insecure if the network is safe, or \
                         listen on 127.0.0.1"
                    ),
                );
            }
        }
        for (file, flag, listen) in [
            (
                (CYCLES_PORT_FILE, self.cycles_port_file.is_some()),
                "--cycles-listen",
                self.cycles_listen,
            ),
            (
                (
                    CYCLES_ADMIN_PORT_FILE,
                    self.cycles_admin_port_file.is_some(),
                ),
                "--cycles-admin-listen",
                self.cycles_admin_listen,
            ),
        ] {
            if file.1 && listen.is_none() {
                r.wrong(
                    file.0,
                    &format!("means nothing with {flag} none: leave one out"),
                );
            }
        }
        if self.metrics_port_file.is_some() && self.metrics_listen.is_none() {
            r.wrong(METRICS_PORT_FILE, "means nothing without --metrics-listen");
        }
        let limits = &self.limits;
        if r.is_right(DEFAULT_DEADLINE)
            && r.is_right(MAX_DEADLINE)
            && limits.default_deadline > limits.max_deadline
        {
            r.wrong(
                DEFAULT_DEADLINE,
                &format!(
                    "{} is longer than --max-deadline, {}: it can be at most that",
                    read::written(limits.default_deadline),
                    read::written(limits.max_deadline)
                ),
            );
        }
    }
}

fn read_tls(
    r: &mut Reader,
    cert: Option<OsString>,
    key: Option<OsString>,
    client_ca: Option<OsString>,
) -> Option<TlsFiles> {
    let cert = r.file(TLS_CERT, cert);
    let key = r.file(TLS_KEY, key);
    let client_ca = r.file(TLS_CLIENT_CA, client_ca);
    match (cert, key) {
        (Some(cert), Some(key)) => {
            return Some(TlsFiles {
                cert,
                key,
                client_ca,
            });
        }
        (Some(_), None) => r.wrong(TLS_KEY, "is needed with --tls-cert"),
        (None, Some(_)) => r.wrong(TLS_CERT, "is needed with --tls-key"),
        (None, None) if client_ca.is_some() => {
            r.wrong(TLS_CLIENT_CA, "needs --tls-cert and --tls-key");
        }
        (None, None) => {}
    }
    None
}

impl DatabaseArgs {
    /// Checks the settings.
    pub fn resolve(self) -> Result<Database, ConfigErrors> {
        let mut reader = Reader::default();
        let database = self.read(&mut reader);
        reader.finish(database)
    }

    fn read(self, r: &mut Reader) -> Database {
        let url = r.database_url(DATABASE_URL, self.database_url);
        let data_dir = r.path(DATA_DIR, self.data_dir);
        let postgres_bin = r.folder(POSTGRES_BIN, self.postgres_bin);
        let Some(url) = url else {
            return Database::Embedded {
                data_dir,
                postgres_bin,
            };
        };
        for (flag, given) in [
            (DATA_DIR, data_dir.is_some()),
            (POSTGRES_BIN, postgres_bin.is_some()),
        ] {
            if given {
                r.wrong(
                    flag,
                    "is for Remit's own PostgreSQL and means nothing with --database-url: leave \
                     one out",
                );
            }
        }
        Database::Url(url)
    }
}

impl LogArgs {
    /// Checks the settings.
    pub fn resolve(self) -> Result<LogConfig, ConfigErrors> {
        let mut reader = Reader::default();
        let log = self.read(&mut reader);
        reader.finish(log)
    }

    fn read(self, r: &mut Reader) -> LogConfig {
        LogConfig {
            format: r.log_format(Flag("log-format"), &self.log_format),
            filter: r.log_filter(Flag("log"), &self.log),
        }
    }
}

impl ClientArgs {
    /// Settings that come from elsewhere than these flags.
    pub fn new(target: OsString, key_file: Option<OsString>, ca_cert: Option<OsString>) -> Self {
        Self {
            target,
            key_file,
            ca_cert,
        }
    }

    /// Checks the settings, and reads the key from its file or from
    /// [`API_KEY_VARIABLE`].
    pub fn resolve(self) -> Result<ClientConfig, ConfigErrors> {
        self.resolve_with(std::env::var_os(API_KEY_VARIABLE))
    }

    pub(super) fn resolve_with(
        self,
        key_variable: Option<OsString>,
    ) -> Result<ClientConfig, ConfigErrors> {
        let mut reader = Reader::default();
        let r = &mut reader;
        let config = ClientConfig {
            target: r.target(Flag("target"), &self.target),
            api_key: match self.key_file {
                Some(file) => r.key_file(Flag("key-file"), file),
                None => r.key_variable(key_variable),
            },
            ca_cert: r.file(CA_CERT, self.ca_cert),
        };
        if config.ca_cert.is_some() && !config.target.is_tls() && r.is_right(Flag("target")) {
            r.wrong(
                CA_CERT,
                "means nothing without a --target that begins with https://",
            );
        }
        reader.finish(config)
    }
}

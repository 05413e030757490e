//! What is measured: a PostgreSQL and server processes on it, started for the
//! measurement.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

use super::usage::{self, Usage};
use crate::config::Database;
use crate::server::Opened;
use crate::store::Store;

/// How long a server may take to start.
const START: Duration = Duration::from_secs(60);

/// How a server is started.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) max_batch: u32,
    pub(super) lanes: u32,
}

/// A server process.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    pub(super) pid: u32,
    pub(super) address: String,
    /// Where the gateway listens.
    pub(super) gateway: String,
    metrics: String,
}

/// A database with servers on it. Ends with them when it is dropped; `close` also
/// stops PostgreSQL in order.
#[derive(Debug)]
pub(super) struct Rig {
    pub(super) servers: Vec<Server>,
    pub(super) operator_key: String,
    opened: Opened,
    folder: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl Rig {
    /// Starts PostgreSQL in a folder, by default a new one here: the folder for
    /// temporary files can be in memory, where nothing is durable.
    pub(super) async fn start(folder: Option<&Path>) -> anyhow::Result<Self> {
        let temporary = match folder {
            Some(_) => None,
            None => Some(
                tempfile::Builder::new()
                    .prefix(".remit-bench-")
                    .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o711))
                    .tempdir_in(std::env::current_dir()?)
                    .context("making a folder for the database here")?,
            ),
        };
        let folder = match (&temporary, folder) {
            (Some(temporary), _) => temporary.path().to_owned(),
            (None, given) => given.unwrap_or(Path::new(".")).to_owned(),
        };
        let opened = Opened::open(&Database::Embedded {
            data_dir: Some(folder.join("data")),
            postgres_bin: None,
        })
        .await?;
        opened.migrate().await?;
        Ok(Self {
            servers: Vec::new(),
            operator_key: String::new(),
            opened,
            folder,
            _temporary: temporary,
        })
    }

    /// Brings the database to where one is that has run for a while.
    pub(super) async fn settle_in(&self) -> anyhow::Result<()> {
        Ok(self.store()?.settle_in().await?)
    }

    /// Adds a server process.
    pub(super) async fn add(&mut self, settings: Settings) -> anyhow::Result<()> {
        let number = self.servers.len();
        let file = |name: &str| self.folder.join(format!("{name}-{number}"));
        let (address, metrics) = (file("address"), file("metrics"));
        let gateway = file("gateway");
        // Of an earlier run in the same folder.
        let _ = std::fs::remove_file(&address);
        let _ = std::fs::remove_file(&metrics);
        let _ = std::fs::remove_file(&gateway);
        let key = self.folder.join("operator.key");
        let mut command = Command::new(std::env::current_exe()?);
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"REMIT_") {
                command.env_remove(name);
            }
        }
        let child = command
            .args(["serve", "--no-migrate", "--log", "warn"])
            .args(["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"])
            .arg("--port-file")
            .arg(&address)
            .arg("--metrics-port-file")
            .arg(&metrics)
            .args([
                "--cycles-listen",
                "127.0.0.1:0",
                "--cycles-admin-listen",
                "none",
            ])
            .arg("--cycles-port-file")
            .arg(&gateway)
            .arg("--bootstrap-key-file")
            .arg(&key)
            .args(["--database-url", &self.opened.service_url])
            .args(["--max-batch", &settings.max_batch.to_string()])
            .args(["--lanes", &settings.lanes.to_string()])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("starting a server")?;
        let pid = child.id().context("the server ended at once")?;
        let address = written(&address).await?;
        let metrics = written(&metrics).await?;
        let gateway = written(&gateway).await?;
        self.servers.push(Server {
            child,
            pid,
            address,
            gateway,
            metrics,
        });
        let key = std::fs::read_to_string(key).context("the operator's key")?;
        key.trim().clone_into(&mut self.operator_key);
        Ok(())
    }

    /// The way to the database beside the servers, as its owner.
    pub(super) fn store(&self) -> anyhow::Result<Store> {
        Ok(Store::new(&self.opened.owner_url, 2)?)
    }

    /// Processor time up to now.
    pub(super) fn usage(&self) -> Usage {
        let pids: Vec<u32> = self.servers.iter().map(|server| server.pid).collect();
        usage::read(&pids, self.postmaster())
    }

    fn postmaster(&self) -> Option<i32> {
        let file = self.folder.join("data/pg/postmaster.pid");
        let text = std::fs::read_to_string(file).ok()?;
        text.lines().next()?.trim().parse().ok()
    }

    /// Stops the servers and PostgreSQL, in order.
    pub(super) async fn close(mut self) -> anyhow::Result<()> {
        for server in &mut self.servers {
            server.child.kill().await?;
        }
        self.opened.close().await
    }
}

impl Server {
    /// A counter of the server's, summed over its labels.
    pub(super) async fn counter(&self, name: &str) -> anyhow::Result<u64> {
        let mut stream = tokio::net::TcpStream::connect(&self.metrics).await?;
        stream
            .write_all(b"GET /metrics HTTP/1.0\r\nConnection: close\r\n\r\n")
            .await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let values = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let own = series.split('{').next()? == name;
            own.then(|| value.parse::<u64>().ok()).flatten()
        });
        Ok(values.sum())
    }
}

/// What a server writes into a file once it is ready.
async fn written(file: &Path) -> anyhow::Result<String> {
    let begun = Instant::now();
    loop {
        if let Ok(text) = std::fs::read_to_string(file)
            && !text.is_empty()
        {
            return Ok(text);
        }
        if begun.elapsed() > START {
            bail!("a server did not start within {} s", START.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

//! The PostgreSQL that Remit runs itself when no `--database-url` is given.
//!
//! Start: choose the account that PostgreSQL runs as (`account`), prepare the folder and
//! take its lock (`layout`), find the programs (`binaries`), create the cluster or stop
//! what an earlier process left behind (`cluster`), then start and watch the server
//! (`supervisor`).
//!
//! ```text
//! DATA_DIR/remit.lock     locked by the process that owns the folder
//! DATA_DIR/pg/            the cluster
//! DATA_DIR/run/           the socket; 0700, and that is the authentication
//! DATA_DIR/postgres.log   what the server says
//! ```
//!
//! Invariants: one process owns the folder (a lock that the kernel frees with the
//! process); a cluster under its final name is complete; PostgreSQL never runs as root;
//! nobody but its account (and root) reaches the socket.

mod account;
mod binaries;
mod cluster;
mod error;
mod layout;
mod supervisor;

#[cfg(test)]
mod tests;

use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use account::Account;
use binaries::Binaries;
use cluster::PidFile;
use layout::Layout;
use supervisor::Supervisor;

pub use error::EmbeddedError;

/// Superuser and owner of the database; migrations run as this role.
const OWNER: &str = "remit";
/// What the service runs as. It gets its rights from the migrations.
const SERVICE: &str = "remit_service";
/// The one database.
const DATABASE: &str = "remit";
/// No TCP port: only part of the socket's name.
const PORT: u16 = 5432;

/// Where the embedded PostgreSQL lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedOptions {
    /// The folder for everything it keeps; made if missing.
    pub data_dir: PathBuf,
    /// The folder with `postgres`, `initdb` and `pg_ctl`. None: the usual places and
    /// `PATH`.
    pub postgres_bin: Option<PathBuf>,
}

/// A PostgreSQL that runs, is restarted when it dies, and is stopped with this.
///
/// Dropping it without [`Embedded::stop`] also asks the server to stop, but waits for
/// nothing.
#[derive(Debug)]
pub struct Embedded {
    socket_dir: PathBuf,
    stop: oneshot::Sender<()>,
    watch: JoinHandle<Result<(), EmbeddedError>>,
}

impl Embedded {
    /// Starts PostgreSQL on the folder and returns once it accepts connections. The
    /// first start creates the cluster, the database and the roles.
    ///
    /// Can take minutes after a crash, while the server replays its log. Dropping the
    /// future stops what was started.
    ///
    /// # Errors
    /// Says what is wrong and what to do; nothing is left running.
    pub async fn start(options: EmbeddedOptions) -> Result<Self, EmbeddedError> {
        let account = Account::choose(&options.data_dir)?;
        let layout = Layout::prepare(&options.data_dir, &account).await?;
        let lock = layout.lock()?;

        let major = cluster::major(&layout)?;
        let binaries =
            Binaries::find(options.postgres_bin.as_deref(), major, &layout, &account).await?;
        cluster::remove_unfinished(&layout);
        if major.is_none() {
            cluster::create(&layout, &binaries, &account).await?;
        }
        cluster::check_owner(&layout, &account)?;
        let not_ours = cluster::stop_left_behind(&layout, &binaries, &account).await?;
        layout.make_socket_dir(&account)?;

        let socket_dir = layout.socket_dir().to_path_buf();
        let mut supervisor = Supervisor::new(binaries, account, layout, lock);
        supervisor.start(not_ours).await?;
        let (stop, stopped) = oneshot::channel();
        let watch = tokio::spawn(supervisor.watch(stopped));
        Ok(Self {
            socket_dir,
            stop,
            watch,
        })
    }

    /// URL for the superuser and owner `remit`: migrations and `verify`.
    pub fn owner_url(&self) -> String {
        url(OWNER, &self.socket_dir)
    }

    /// URL for `remit_service`, which has only the rights that migrations give it.
    pub fn service_url(&self) -> String {
        url(SERVICE, &self.socket_dir)
    }

    /// The folder of the server's socket. It stays the same when the server is
    /// restarted.
    pub fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    /// Stops PostgreSQL: open transactions are rolled back, and the server has 30 s to
    /// write what it holds before it is stopped without.
    ///
    /// # Errors
    /// When the server can't be stopped.
    pub async fn stop(self) -> Result<(), EmbeddedError> {
        // A send fails only when the task has ended, and then its result is there.
        let _ = self.stop.send(());
        self.watch.await.map_err(EmbeddedError::Watch)?
    }
}

/// The socket folder of a server that runs on this data directory, whoever started it;
/// None when none runs or the caller can't reach it. For tools beside a running Remit;
/// the URLs are those of [`Embedded`].
pub fn running_socket_dir(data_dir: &Path) -> Option<PathBuf> {
    let file = PidFile::read(&data_dir.join(layout::CLUSTER))?;
    let dir = file.socket_dir?;
    // The file outlives a killed server; its socket then refuses.
    UnixStream::connect(dir.join(format!(".s.PGSQL.{PORT}"))).ok()?;
    Some(dir)
}

/// Where the data is unless `--data-dir` says otherwise: `/var/lib/remit` for root,
/// else `$XDG_DATA_HOME/remit`, else `~/.local/share/remit`.
pub fn default_data_dir() -> PathBuf {
    if account::is_root() {
        return PathBuf::from("/var/lib/remit");
    }
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path: &PathBuf| path.is_absolute())
    };
    absolute("XDG_DATA_HOME")
        .or_else(|| {
            absolute("HOME")
                .or_else(account::home)
                .map(|home| home.join(".local/share"))
        })
        .map_or_else(|| PathBuf::from("remit-data"), |dir| dir.join("remit"))
}

/// A URL that libpq and sqlx read alike. Port and TLS are named because both would
/// otherwise take them from `PGPORT` and `PGSSLMODE`.
/// URL for the cluster's owner at a socket, for tools that find a server running.
pub fn owner_url_at(socket_dir: &Path) -> String {
    url(OWNER, socket_dir)
}

fn url(role: &str, socket_dir: &Path) -> String {
    let mut host = String::new();
    for &byte in socket_dir.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            host.push(char::from(byte));
        } else {
            host.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("postgres://{role}@localhost:{PORT}/{DATABASE}?host={host}&sslmode=disable")
}

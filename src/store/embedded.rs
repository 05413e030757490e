//! The embedded PostgreSQL: started, supervised and stopped by this program, from
//! the machine's own binaries, in a data directory, on a Unix socket.
//!
//! Layout of the data directory: `remit.lock` (held while in use), `pg/` (the
//! cluster), `run/` (the socket, closed to other users: being let in is the
//! authentication), `postgres.log`.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Where, and from which binaries.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// Made if it does not exist.
    pub data_dir: PathBuf,
    /// The folder of `postgres` and `initdb`; nothing to look for them.
    pub postgres_bin: Option<PathBuf>,
}

/// Why the embedded PostgreSQL does not run.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// No binaries.
    #[error(
        "no PostgreSQL (14 or newer) was found; tried {tried}. Install it ({install}), name its folder with --postgres-bin, or use an existing server with --database-url"
    )]
    NoBinaries {
        /// Folders that were looked into.
        tried: String,
        /// The command for this system.
        install: &'static str,
    },
    /// The cluster needs binaries of its own version.
    #[error(
        "{} was made by PostgreSQL {version}, whose binaries were not found; tried {tried}", .data_dir.display()
    )]
    WrongVersion {
        /// The data directory.
        data_dir: PathBuf,
        /// Of the cluster.
        version: String,
        /// Folders that were looked into.
        tried: String,
    },
    /// Another process holds the directory.
    #[error("{} is in use by another remit: stop that one, or choose another --data-dir", .0.display())]
    InUse(PathBuf),
    /// PostgreSQL refuses to run as root, and its user can't get there.
    #[error("the user {user}, whom PostgreSQL runs as, can't reach {}: choose a --data-dir whose parents it may enter", .path.display())]
    Unreachable {
        /// The unprivileged user.
        user: String,
        /// The data directory.
        path: PathBuf,
    },
    /// A program of PostgreSQL failed.
    #[error("{program} failed: {detail}")]
    Failed {
        /// Its name.
        program: &'static str,
        /// What it said.
        detail: String,
    },
    /// The server did not come up.
    #[error("PostgreSQL did not accept connections within {seconds} s; see {}", .log.display())]
    NotReady {
        /// How long was waited.
        seconds: u64,
        /// Its log.
        log: PathBuf,
    },
    /// A file could not be read or made.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, EmbeddedError> {
    result.map_err(|source| EmbeddedError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Where data goes when nothing is said.
pub fn default_data_dir() -> PathBuf {
    if geteuid().is_root() {
        return "/var/lib/remit".into();
    }
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share"));
    std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(home)
        .unwrap_or_else(|| ".".into())
        .join("remit")
}

/// The socket's folder of a data directory that a running remit holds.
pub fn running_socket_dir(data_dir: &Path) -> Option<PathBuf> {
    let lock = File::open(data_dir.join("remit.lock")).ok()?;
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => Some(socket_dir(&fs::canonicalize(data_dir).ok()?)),
        _ => None,
    }
}

/// The URL of the cluster's owner at a socket.
pub fn owner_url_at(socket_dir: &Path) -> String {
    url("remit", socket_dir)
}

fn url(role: &str, socket_dir: &Path) -> String {
    let mut host = String::new();
    for byte in socket_dir.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) {
            host.push(char::from(*byte));
        } else {
            host.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("postgres://{role}@localhost/remit?host={host}")
}

/// A socket's whole path may have 107 bytes; deep directories get a short one.
fn socket_dir(data_dir: &Path) -> PathBuf {
    const LONGEST: usize = 80;
    let inside = data_dir.join("run");
    if inside.as_os_str().len() <= LONGEST {
        return inside;
    }
    let digest = crate::domain::request::Digest::of(data_dir.as_os_str().as_encoded_bytes());
    PathBuf::from(format!("/tmp/remit-{}", hex::encode(&digest.0[..8])))
}

/// Whom PostgreSQL runs as: ourselves, or, started by root, somebody who is not.
#[derive(Debug, Clone)]
struct RunAs(Option<User>);

impl RunAs {
    fn choose() -> Self {
        if !geteuid().is_root() {
            return Self(None);
        }
        let found = ["remit", "postgres", "nobody"]
            .into_iter()
            .find_map(|name| User::from_name(name).ok().flatten());
        if let Some(user) = &found
            && user.name == "nobody"
        {
            tracing::warn!("PostgreSQL runs as nobody, whom other programs may share: make a user `remit`");
        }
        Self(found)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().current_dir("/").stdin(Stdio::null());
        if let Some(user) = &self.0 {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }

    fn own(&self, path: &Path) -> Result<(), EmbeddedError> {
        match &self.0 {
            Some(user) => at(
                path,
                chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())),
            ),
            None => Ok(()),
        }
    }
}

/// Folders that may hold the binaries, newest version first.
fn candidates(named: Option<&Path>) -> Vec<PathBuf> {
    if let Some(named) = named {
        return vec![named.to_owned()];
    }
    let mut versioned: Vec<(u32, PathBuf)> = Vec::new();
    for (root, prefix) in [("/usr/lib/postgresql", ""), ("/usr", "pgsql-"), ("/opt/homebrew/opt", "postgresql@")] {
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let version = name
                .to_str()
                .and_then(|name| name.strip_prefix(prefix))
                .and_then(|version| version.parse().ok());
            if let Some(version) = version {
                versioned.push((version, entry.path().join("bin")));
            }
        }
    }
    versioned.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    let path = std::env::var_os("PATH").unwrap_or_default();
    versioned
        .into_iter()
        .map(|(_, folder)| folder)
        .chain(std::env::split_paths(&path))
        .collect()
}

/// The major version of the `postgres` in a folder.
fn version_of(folder: &Path) -> Option<u32> {
    let output = Command::new(folder.join("postgres"))
        .arg("--version")
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = text.split_whitespace().nth(2)?;
    number.split(['.', 'd', 'b', 'r']).next()?.parse().ok()
}

fn install_command() -> &'static str {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if release.contains("debian") || release.contains("ubuntu") {
        "apt-get install -y --no-install-recommends postgresql"
    } else if release.contains("fedora") || release.contains("rhel") {
        "dnf install -y postgresql-server"
    } else {
        "brew install postgresql, or your system's package"
    }
}

fn find_binaries(options: &EmbeddedOptions, cluster: &Path) -> Result<PathBuf, EmbeddedError> {
    const OLDEST: u32 = 14;
    let folders = candidates(options.postgres_bin.as_deref());
    let tried = || {
        let names: Vec<_> = folders.iter().map(|f| f.display().to_string()).collect();
        names.join(", ")
    };
    let wanted = fs::read_to_string(cluster.join("PG_VERSION"))
        .ok()
        .map(|text| text.trim().to_owned());
    for folder in &folders {
        let Some(version) = version_of(folder).filter(|_| folder.join("initdb").exists()) else {
            continue;
        };
        let fits = match &wanted {
            Some(wanted) => *wanted == version.to_string(),
            None => version >= OLDEST,
        };
        if fits {
            return at(folder, fs::canonicalize(folder));
        }
    }
    Err(match wanted {
        Some(version) => EmbeddedError::WrongVersion {
            data_dir: options.data_dir.clone(),
            version,
            tried: tried(),
        },
        None => EmbeddedError::NoBinaries {
            tried: tried(),
            install: install_command(),
        },
    })
}

/// A cluster that can be started.
#[derive(Debug, Clone)]
struct Cluster {
    binaries: PathBuf,
    data: PathBuf,
    socket_dir: PathBuf,
    log: PathBuf,
    run_as: RunAs,
}

impl Cluster {
    fn run(&self, program: &'static str, args: &[&OsStr], input: &str) -> Result<(), EmbeddedError> {
        let failed = |detail: String| EmbeddedError::Failed { program, detail };
        let mut command = self.run_as.command(&self.binaries.join(program));
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(Stdio::piped());
        let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
        if let Some(mut stdin) = child.stdin.take() {
            io::Write::write_all(&mut stdin, input.as_bytes())
                .map_err(|error| failed(error.to_string()))?;
        }
        let output = child
            .wait_with_output()
            .map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(failed(said.trim().to_owned()));
        }
        Ok(())
    }

    /// Makes the cluster under another name and renames it when it is whole: what
    /// was cut off half-way is never taken for a cluster.
    fn initialise(&self) -> Result<(), EmbeddedError> {
        if self.data.join("PG_VERSION").exists() {
            return Ok(());
        }
        let half = self.data.with_extension("new");
        if half.exists() {
            at(&half, fs::remove_dir_all(&half))?;
        }
        at(&half, fs::DirBuilder::new().mode(0o700).create(&half))?;
        self.run_as.own(&half)?;
        self.run(
            "initdb",
            &[
                "-D".as_ref(),
                half.as_os_str(),
                "--username=remit".as_ref(),
                "--encoding=UTF8".as_ref(),
                "--locale=C".as_ref(),
                "--data-checksums".as_ref(),
                "--auth-local=trust".as_ref(),
                "--auth-host=reject".as_ref(),
            ],
            "",
        )?;
        self.run(
            "postgres",
            &["--single".as_ref(), "-D".as_ref(), half.as_os_str(), "postgres".as_ref()],
            "CREATE DATABASE remit\nCREATE ROLE remit_service LOGIN NOSUPERUSER\n",
        )?;
        at(&self.data, fs::rename(&half, &self.data))
    }

    /// Stops a server that a killed remit has left behind. A process is only
    /// signalled where it works in our cluster: its number may be another's now.
    fn stop_orphan(&self) {
        let Some(pid) = self.pid_on_file() else {
            return;
        };
        let cwd = fs::read_link(format!("/proc/{pid}/cwd"));
        if cwd.ok().as_deref() != Some(&*self.data) {
            return;
        }
        tracing::info!(pid, "stopping the PostgreSQL that a killed remit left behind");
        let pid = Pid::from_raw(pid);
        // Gone already is as good as stopped.
        let _ = kill(pid, Signal::SIGINT);
        let begun = Instant::now();
        while kill(pid, None).is_ok() && begun.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn pid_on_file(&self) -> Option<i32> {
        let text = fs::read_to_string(self.data.join("postmaster.pid")).ok()?;
        text.lines().next()?.trim().parse().ok()
    }

    /// Starts the server itself, not through pg_ctl: it stays our child.
    fn spawn(&self) -> Result<tokio::process::Child, EmbeddedError> {
        let log = at(
            &self.log,
            OpenOptions::new().create(true).append(true).open(&self.log),
        )?;
        let errors = at(&self.log, log.try_clone())?;
        let mut command = self.run_as.command(&self.binaries.join("postgres"));
        command.arg("-D").arg(&self.data).arg("-k").arg(&self.socket_dir);
        for setting in [
            "listen_addresses=",
            "unix_socket_permissions=0700",
            "max_connections=64",
            "shared_buffers=256MB",
            // What "durable before answered" rests on.
            "fsync=on",
            "synchronous_commit=on",
            "full_page_writes=on",
            // A new WAL segment is zero-filled within somebody's commit: keep
            // enough of them for reuse.
            "min_wal_size=512MB",
            "max_wal_size=4GB",
            "checkpoint_timeout=15min",
            "autovacuum_naptime=10s",
            "jit=off",
        ] {
            command.arg("-c").arg(setting);
        }
        // A group of its own: the terminal's Ctrl-C is for us, who stop it last.
        command.process_group(0).stdout(log).stderr(errors);
        let mut command = tokio::process::Command::from(command);
        command.spawn().map_err(|error| EmbeddedError::Failed {
            program: "postgres",
            detail: error.to_string(),
        })
    }

    fn is_ready(&self) -> bool {
        let text = fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        text.lines().nth(7).is_some_and(|line| line.trim() == "ready")
    }
}

/// A running PostgreSQL of our own.
#[derive(Debug)]
pub struct Embedded {
    socket_dir: PathBuf,
    stopping: CancellationToken,
    supervisor: JoinHandle<()>,
    /// Held by the kernel for as long as we live.
    _lock: File,
}

impl Embedded {
    /// Starts it and waits until it accepts connections.
    pub async fn start(options: EmbeddedOptions) -> Result<Self, EmbeddedError> {
        const READY_WITHIN: Duration = Duration::from_secs(60);

        let (cluster, lock) = tokio::task::spawn_blocking(move || prepare(&options))
            .await
            .map_err(|error| EmbeddedError::Failed {
                program: "initdb",
                detail: error.to_string(),
            })??;
        let mut child = cluster.spawn()?;
        let begun = Instant::now();
        while !cluster.is_ready() {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(EmbeddedError::Failed {
                    program: "postgres",
                    detail: format!("{status}; see {}", cluster.log.display()),
                });
            }
            if begun.elapsed() > READY_WITHIN {
                return Err(EmbeddedError::NotReady {
                    seconds: READY_WITHIN.as_secs(),
                    log: cluster.log,
                });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let stopping = CancellationToken::new();
        let socket_dir = cluster.socket_dir.clone();
        let supervisor = tokio::spawn(supervise(cluster, child, stopping.clone()));
        Ok(Self {
            socket_dir,
            stopping,
            supervisor,
            _lock: lock,
        })
    }

    /// For the owner of the cluster, who may change the schema.
    pub fn owner_url(&self) -> String {
        owner_url_at(&self.socket_dir)
    }

    /// For the server, who may not change the ledger.
    pub fn service_url(&self) -> String {
        url("remit_service", &self.socket_dir)
    }

    /// Stops it and waits until it has.
    pub async fn stop(self) {
        self.stopping.cancel();
        // It ends by itself, in bounded time.
        let _ = self.supervisor.await;
    }
}

fn prepare(options: &EmbeddedOptions) -> Result<(Cluster, File), EmbeddedError> {
    let run_as = RunAs::choose();
    let given = &options.data_dir;
    if !given.exists() {
        // Others may pass through, not look: the cluster's own user must get to
        // its folder.
        let mode = if geteuid().is_root() { 0o711 } else { 0o700 };
        at(
            given,
            fs::DirBuilder::new().recursive(true).mode(mode).create(given),
        )?;
    }
    let data_dir = at(given, fs::canonicalize(given))?;
    let lock_path = data_dir.join("remit.lock");
    let lock = at(
        &lock_path,
        OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path),
    )?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(EmbeddedError::InUse(data_dir)),
        Err(TryLockError::Error(source)) => {
            return Err(EmbeddedError::Io {
                path: lock_path,
                source,
            });
        }
    }
    check_reachable(&run_as, &data_dir)?;
    let data = data_dir.join("pg");
    let cluster = Cluster {
        binaries: find_binaries(options, &data)?,
        socket_dir: socket_dir(&data_dir),
        log: data_dir.join("postgres.log"),
        data,
        run_as,
    };
    if !cluster.data.join("PG_VERSION").exists() && cluster.data.exists() {
        at(&cluster.data, fs::remove_dir(&cluster.data))?;
    }
    for folder in [&cluster.socket_dir] {
        if !folder.exists() {
            at(folder, fs::DirBuilder::new().mode(0o700).create(folder))?;
        }
        at(folder, fs::set_permissions(folder, fs::Permissions::from_mode(0o700)))?;
        cluster.run_as.own(folder)?;
    }
    cluster.initialise()?;
    cluster.stop_orphan();
    Ok((cluster, lock))
}

/// As root: whether the other user gets to the directory.
fn check_reachable(run_as: &RunAs, data_dir: &Path) -> Result<(), EmbeddedError> {
    let Some(user) = &run_as.0 else {
        return Ok(());
    };
    let reached = run_as
        .command(Path::new("/usr/bin/test"))
        .arg("-x")
        .arg(data_dir)
        .status();
    match reached {
        Ok(status) if !status.success() => Err(EmbeddedError::Unreachable {
            user: user.name.clone(),
            path: data_dir.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Starts the server again when it ends unasked, and ends it when asked.
async fn supervise(
    cluster: Cluster,
    mut child: tokio::process::Child,
    stopping: CancellationToken,
) {
    const SHORTEST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);
    /// A server that ran this long was no part of a series of failures.
    const STABLE: Duration = Duration::from_secs(60);

    let mut pause = SHORTEST;
    loop {
        let begun = Instant::now();
        tokio::select! {
            status = child.wait() => {
                tracing::error!(?status, log = %cluster.log.display(), "PostgreSQL ended unasked");
            }
            () = stopping.cancelled() => {
                end(&mut child).await;
                return;
            }
        }
        if begun.elapsed() > STABLE {
            pause = SHORTEST;
        }
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stopping.cancelled() => return,
            }
            pause = (pause * 2).min(LONGEST);
            match cluster.spawn() {
                Ok(restarted) => {
                    child = restarted;
                    break;
                }
                Err(error) => tracing::error!(%error, "PostgreSQL can't be started"),
            }
        }
    }
}

/// Asks a server to end, then makes it.
async fn end(child: &mut tokio::process::Child) {
    const PATIENCE: Duration = Duration::from_secs(30);
    let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) else {
        return;
    };
    for signal in [Signal::SIGINT, Signal::SIGQUIT] {
        // Gone already is as good as ended.
        let _ = kill(Pid::from_raw(pid), signal);
        if tokio::time::timeout(PATIENCE, child.wait()).await.is_ok() {
            return;
        }
    }
}

//! The server process: started, watched, restarted, stopped.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::PORT;
use super::account::Account;
use super::binaries::Binaries;
use super::cluster::PidFile;
use super::error::EmbeddedError;
use super::layout::Layout;

/// What the server runs with, over whatever its configuration files say.
const SETTINGS: [(&str, &str); 23] = [
    // The socket is the only way in.
    ("listen_addresses", ""),
    ("unix_socket_permissions", "0700"),
    ("unix_socket_group", ""),
    // The pools of a few processes and an operator's tools; each connection costs memory.
    ("max_connections", "64"),
    // The hot rows and indexes of a large installation; small enough for a laptop.
    ("shared_buffers", "256MB"),
    // An answer that was given survives a crash of the server, the system, the power.
    ("fsync", "on"),
    ("synchronous_commit", "on"),
    ("full_page_writes", "on"),
    // Enough for a standby or a base backup.
    ("wal_level", "replica"),
    // Segments are used again instead of being made anew in the middle of load.
    ("min_wal_size", "512MB"),
    // Checkpoints seldom and spread out: each stalls commits for a moment and has every
    // page written whole once more. The price is a longer recovery.
    ("max_wal_size", "4GB"),
    ("checkpoint_timeout", "15min"),
    ("checkpoint_completion_target", "0.9"),
    // Compiling costs more than our short statements take.
    ("jit", "off"),
    // Head rows and balances are updated all the time; their dead versions slow reads.
    ("autovacuum_naptime", "10s"),
    // Standard error is our log file.
    ("log_destination", "stderr"),
    ("logging_collector", "off"),
    // Read by `lingers`, so not to be translated.
    ("lc_messages", "C"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    // Nothing foreign in the server.
    ("shared_preload_libraries", ""),
    // After a backend's crash the server recovers by itself.
    ("restart_after_crash", "on"),
    ("cluster_name", "remit"),
];

/// Recovery after a crash replays at most `max_wal_size`; on a slow disk that is minutes.
const READY: Duration = Duration::from_secs(600);
/// How often the server's state is looked at while it starts, and told when it is slow.
const LOOK: Duration = Duration::from_millis(10);
const SLOW: Duration = Duration::from_secs(10);

/// Bounds on stopping: rolled back and written, then at once, then by the kernel.
const FAST: Duration = Duration::from_secs(30);
const IMMEDIATE: Duration = Duration::from_secs(10);
const KILLED: Duration = Duration::from_secs(5);

/// Backends of a killed server end when they next wait, which a long statement puts
/// off; until then no new server can start. Not a failure within this bound.
const LINGER: Duration = Duration::from_secs(120);
const LINGER_LOOK: Duration = Duration::from_millis(100);

/// Between restarts, doubling.
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// So many failures in so long, and it will not get better by itself.
const FAILURES_MAX: usize = 10;
const FAILURES_WITHIN: Duration = Duration::from_secs(60);
/// A server that ended sooner than this after it was ready was little better than a
/// failed start: it counts for the back-off, but alone never leads to giving up.
const SERVED: Duration = Duration::from_millis(200);

/// Starts the server and keeps it running. Holds the directory's lock until no server
/// of ours runs.
#[derive(Debug)]
pub(super) struct Supervisor {
    binaries: Binaries,
    account: Account,
    layout: Layout,
    server: Option<Server>,
    failures: Failures,
    _lock: File,
}

impl Supervisor {
    pub(super) fn new(binaries: Binaries, account: Account, layout: Layout, lock: File) -> Self {
        Self {
            binaries,
            account,
            layout,
            server: None,
            failures: Failures::default(),
            _lock: lock,
        }
    }

    /// Starts the server and waits until it accepts connections. `not_ours` is a process
    /// that a stale `postmaster.pid` may name and that is certainly no server of ours.
    pub(super) async fn start(&mut self, not_ours: Option<i32>) -> Result<(), EmbeddedError> {
        let begin = Instant::now();
        loop {
            let (log, from) = self.layout.open_log()?;
            self.server = Some(Server::spawn(self, not_ours, &log)?);
            match self.until_ready(from).await {
                Err(EmbeddedError::Exited { tail, .. })
                    if lingers(&tail) && begin.elapsed() < LINGER =>
                {
                    sleep(LINGER_LOOK).await;
                }
                Err(error) => {
                    self.stop_server().await?;
                    return Err(error);
                }
                Ok(()) => {
                    let took_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
                    let socket_dir = self.layout.socket_dir();
                    tracing::info!(took_ms, socket_dir = %socket_dir.display(), "PostgreSQL is ready");
                    return Ok(());
                }
            }
        }
    }

    async fn until_ready(&mut self, from: u64) -> Result<(), EmbeddedError> {
        let begin = Instant::now();
        let mut told = begin;
        loop {
            let Some(server) = &mut self.server else {
                // Nothing was started, so there is nothing to wait for.
                return Ok(());
            };
            if let Some(status) = server.ended()? {
                self.server = None;
                return Err(EmbeddedError::Exited {
                    status,
                    log: self.layout.log().to_path_buf(),
                    tail: self.layout.log_tail(from),
                });
            }
            let file = PidFile::read(self.layout.cluster());
            if file.is_some_and(|file| file.ready && file.pid == server.pid.as_raw()) {
                return Ok(());
            }
            if begin.elapsed() > READY {
                return Err(EmbeddedError::NotReady {
                    limit: READY,
                    log: self.layout.log().to_path_buf(),
                });
            }
            if told.elapsed() > SLOW {
                told = Instant::now();
                tracing::info!(log = %self.layout.log().display(), "PostgreSQL is still starting");
            }
            sleep(LOOK).await;
        }
    }

    /// Keeps the server running until `stop` is sent or dropped, then stops it.
    pub(super) async fn watch(
        mut self,
        mut stop: oneshot::Receiver<()>,
    ) -> Result<(), EmbeddedError> {
        tokio::select! {
            // Both ways it is time to stop.
            _ = &mut stop => {}
            () = self.keep_running() => {
                // Given up: the directory stays ours until somebody says stop.
                let _ = stop.await;
            }
        }
        let stopped = self.stop_server().await;
        self.layout.clear_socket_dir();
        stopped
    }

    /// Returns when restarting was given up.
    async fn keep_running(&mut self) {
        loop {
            let mut not_ours = None;
            if let Some(server) = &mut self.server {
                let since = Instant::now();
                let status = server.wait().await;
                not_ours = Some(server.pid.as_raw());
                self.server = None;
                let status = status.map_or_else(|error| error.to_string(), |s| s.to_string());
                tracing::warn!(status, "PostgreSQL ended unexpectedly and is restarted");
                if since.elapsed() < SERVED {
                    self.failures.add(Instant::now());
                }
            }
            sleep(self.failures.back_off(Instant::now())).await;
            if let Err(error) = self.start(not_ours).await {
                tracing::warn!(%error, "PostgreSQL could not be restarted");
                self.failures.add(Instant::now());
                if self.failures.too_many(Instant::now()) {
                    tracing::error!(
                        log = %self.layout.log().display(),
                        "PostgreSQL failed {FAILURES_MAX} times within {} s and is not started again: \
                         the database is unavailable. See its log, then restart remit",
                        FAILURES_WITHIN.as_secs()
                    );
                    return;
                }
            }
        }
    }

    async fn stop_server(&mut self) -> Result<(), EmbeddedError> {
        let Some(server) = &mut self.server else {
            return Ok(());
        };
        let pid = server.pid.as_raw();
        for (signal, limit) in [
            (Signal::SIGINT, FAST),
            (Signal::SIGQUIT, IMMEDIATE),
            (Signal::SIGKILL, KILLED),
        ] {
            server.signal(signal);
            if timeout(limit, server.wait()).await.is_ok() {
                self.server = None;
                return Ok(());
            }
            tracing::warn!(pid, %signal, "PostgreSQL did not stop within {} s", limit.as_secs());
        }
        Err(EmbeddedError::NotStopped { pid })
    }
}

/// Whether the server did not start because backends of the one before still run.
fn lingers(log: &str) -> bool {
    log.contains("pre-existing shared memory block")
}

/// A running server. Dropped while it runs, it is asked to stop.
#[derive(Debug)]
struct Server {
    child: Child,
    pid: Pid,
    ended: bool,
}

impl Server {
    fn spawn(
        supervisor: &Supervisor,
        not_ours: Option<i32>,
        log: &File,
    ) -> Result<Self, EmbeddedError> {
        let Supervisor {
            binaries,
            account,
            layout,
            ..
        } = supervisor;
        let postgres = binaries.postgres();
        let mut command = account.command(&postgres);
        command
            .arg("-D")
            .arg(layout.cluster())
            .arg("-k")
            .arg(layout.socket_dir())
            .args(["-p", &PORT.to_string()]);
        for (name, value) in SETTINGS {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        if let Some(pid) = not_ours {
            // PostgreSQL takes a live process of that number for a server, except its
            // own ancestors; this variable names one. What the file says of shared
            // memory it still checks.
            command.env("PG_GRANDPARENT_PID", pid.to_string());
        }
        let mut start = || -> io::Result<Self> {
            let child = command
                .stdout(log.try_clone()?)
                .stderr(log.try_clone()?)
                .spawn()?;
            let pid = child
                .id()
                .and_then(|pid| i32::try_from(pid).ok())
                .ok_or_else(|| io::Error::other("it ended at once"))?;
            Ok(Self {
                child,
                pid: Pid::from_raw(pid),
                ended: false,
            })
        };
        start().map_err(EmbeddedError::io("run", postgres))
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>, EmbeddedError> {
        let status = self
            .child
            .try_wait()
            .map_err(EmbeddedError::io("wait for", "postgres"))?;
        self.ended = status.is_some();
        Ok(status)
    }

    async fn wait(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await;
        self.ended = true;
        status
    }

    /// The process was not waited for yet, so its number is its own.
    fn signal(&self, signal: Signal) {
        if !self.ended
            && let Err(error) = kill(self.pid, signal)
        {
            tracing::warn!(pid = self.pid.as_raw(), %signal, %error, "cannot signal PostgreSQL");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.signal(Signal::SIGINT);
    }
}

/// The failed starts of the last minute.
#[derive(Debug, Default)]
struct Failures(VecDeque<Instant>);

impl Failures {
    fn add(&mut self, now: Instant) {
        self.0.push_back(now);
        if self.0.len() > FAILURES_MAX {
            self.0.pop_front();
        }
    }

    fn recent(&self, now: Instant) -> usize {
        self.0
            .iter()
            .filter(|at| now.duration_since(**at) < FAILURES_WITHIN)
            .count()
    }

    fn too_many(&self, now: Instant) -> bool {
        self.recent(now) >= FAILURES_MAX
    }

    fn back_off(&self, now: Instant) -> Duration {
        let doublings = u32::try_from(self.recent(now).saturating_sub(1)).unwrap_or(u32::MAX);
        BACK_OFF
            .saturating_mul(2_u32.saturating_pow(doublings))
            .min(BACK_OFF_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_doubles_to_its_bound_and_the_tenth_failure_in_a_minute_is_the_last() {
        let mut now = Instant::now();
        let mut failures = Failures::default();
        assert_eq!(failures.back_off(now), BACK_OFF, "a server that had served");
        let mut waited = Vec::new();
        while !failures.too_many(now) {
            failures.add(now);
            waited.push(failures.back_off(now).as_millis());
            now += failures.back_off(now);
        }
        assert_eq!(waited[..6], [100, 200, 400, 800, 1_600, 3_200]);
        assert_eq!(waited[6..], [5_000; 4]);
    }

    #[test]
    fn failures_are_forgotten_after_a_minute() {
        let now = Instant::now();
        let mut failures = Failures::default();
        for _ in 0..FAILURES_MAX {
            failures.add(now);
        }
        assert!(failures.too_many(now));
        let later = now + FAILURES_WITHIN;
        assert!(!failures.too_many(later));
        assert_eq!(failures.back_off(later), BACK_OFF);
    }
}

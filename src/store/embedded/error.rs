//! What can go wrong with the embedded PostgreSQL, in words for the operator.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use super::binaries::OLDEST_MAJOR;

/// Why the embedded PostgreSQL can't be started or stopped. Each message says what
/// happened and what to do.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// No PostgreSQL on this machine that can be used.
    #[error(
        "no PostgreSQL {OLDEST_MAJOR} or newer was found on this machine.\n\
         Looked in: {tried}\n{unusable}\
         Install it with: {install}\n\
         Or name its folder with --postgres-bin, or a server of your own with --database-url."
    )]
    NoBinaries {
        /// The places, separated by commas.
        tried: String,
        /// Lines on what was found but can't be used; may be empty.
        unusable: String,
        /// The command for this system.
        install: String,
    },

    /// `--postgres-bin` names a folder without usable programs.
    #[error(
        "--postgres-bin {}: {problem}. Name the folder that holds postgres, initdb and pg_ctl \
         of PostgreSQL {OLDEST_MAJOR} or newer, for example /usr/lib/postgresql/15/bin, or leave it out.",
        dir.display()
    )]
    GivenBinaries {
        /// The folder.
        dir: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// The data was written by a major version whose programs are not here.
    #[error(
        "the data in {} was written by PostgreSQL {major}, and only that version can read it; \
         usable here: {found}. Install it with: {install}. Or name its folder with --postgres-bin.",
        data_dir.display()
    )]
    OtherMajor {
        /// The data directory.
        data_dir: PathBuf,
        /// Version of the data.
        major: u32,
        /// Versions that were found.
        found: String,
        /// The command for this system.
        install: String,
    },

    /// Another Remit holds the directory.
    #[error(
        "the data directory {} is in use by another remit{holder}. Stop that one, or give this \
         one a directory of its own with --data-dir.",
        data_dir.display()
    )]
    DataDirInUse {
        /// The data directory.
        data_dir: PathBuf,
        /// ` (process N)` where known.
        holder: String,
    },

    /// PostgreSQL's account can't get to the data directory.
    #[error(
        "PostgreSQL does not run as root, so remit runs it as the user `{user}`, and that user \
         can't reach {}: {} does not let it pass. Choose another place with --data-dir, for \
         example /var/lib/remit, or let it pass with: chmod o+x {}",
        data_dir.display(), blocked_at.display(), blocked_at.display()
    )]
    Unreachable {
        /// The account.
        user: String,
        /// The data directory.
        data_dir: PathBuf,
        /// The folder on the way that stops it.
        blocked_at: PathBuf,
    },

    /// Started by root on a machine with nobody to run PostgreSQL as.
    #[error(
        "PostgreSQL does not run as root, and this machine has none of the users remit, postgres \
         and nobody to run it as. Create one: useradd --system --shell /usr/sbin/nologin remit"
    )]
    NoAccount,

    /// The cluster belongs to somebody else.
    #[error(
        "{} belongs to the user with id {owner}, and PostgreSQL would run as `{user}` (id {uid}). \
         Start remit as its owner or as root; if it was copied, hand it over with: \
         chown -R {user} {}",
        path.display(), path.display()
    )]
    OtherOwner {
        /// The cluster.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// The account that PostgreSQL would run as.
        user: String,
        /// Its id.
        uid: u32,
    },

    /// The folder holds something that is not ours.
    #[error("{} {problem}. Give remit a directory of its own with --data-dir.", path.display())]
    Foreign {
        /// What was found.
        path: PathBuf,
        /// What it is.
        problem: &'static str,
    },

    /// The socket's folder is open to others.
    #[error(
        "the socket folder {} must belong to `{user}` alone, because whoever can enter it has \
         full access to the database. Remove it and start again.",
        path.display()
    )]
    NotPrivate {
        /// The folder.
        path: PathBuf,
        /// The account that PostgreSQL runs as.
        user: String,
    },

    /// The cluster could not be created. Nothing half-made is used later.
    #[error("the database could not be created: {program} ended with {status}.\n{output}")]
    Create {
        /// What failed.
        program: &'static str,
        /// How.
        status: ExitStatus,
        /// What it said.
        output: String,
    },

    /// A PostgreSQL that an earlier process left behind does not stop.
    #[error(
        "a PostgreSQL that an earlier remit left behind (process {pid}) still runs on {} and did \
         not stop. Stop it with: kill -QUIT {pid}",
        data_dir.display()
    )]
    LeftBehind {
        /// Its process.
        pid: i32,
        /// The data directory.
        data_dir: PathBuf,
    },

    /// PostgreSQL ended before it accepted connections.
    #[error("PostgreSQL did not start: it ended with {status}. Its log, {}, says:\n{tail}", log.display())]
    Exited {
        /// How it ended.
        status: ExitStatus,
        /// The log file.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },

    /// PostgreSQL runs but does not come to accept connections.
    #[error(
        "PostgreSQL did not accept connections within {} s. See its log, {}",
        limit.as_secs(), log.display()
    )]
    NotReady {
        /// The bound on waiting.
        limit: Duration,
        /// The log file.
        log: PathBuf,
    },

    /// PostgreSQL does not stop.
    #[error("PostgreSQL (process {pid}) did not stop. Stop it with: kill -QUIT {pid}")]
    NotStopped {
        /// Its process.
        pid: i32,
    },

    /// A program did not answer in time.
    #[error("{} did not end within {} s", program.display(), limit.as_secs())]
    Slow {
        /// The program.
        program: PathBuf,
        /// The bound on waiting.
        limit: Duration,
    },

    /// A file or a process that the system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },

    /// Users could not be looked up.
    #[error("cannot look up the user {user}: {source}")]
    Lookup {
        /// Name or id.
        user: String,
        /// Why not.
        source: nix::Error,
    },

    /// The task that watches the server ended early.
    #[error("the task that watches PostgreSQL ended early; PostgreSQL was asked to stop")]
    Watch(#[source] tokio::task::JoinError),
}

impl EmbeddedError {
    /// For `map_err` on a file operation.
    pub(super) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

//! The cluster's files: creating them, and what an earlier process left in them.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use super::account::{Account, finish, is_missing};
use super::binaries::Binaries;
use super::error::EmbeddedError;
use super::layout::{Layout, last_lines, make_private};
use super::{DATABASE, OWNER, SERVICE};

/// Names that a cluster has until it is complete begin so.
const UNFINISHED: &str = "pg.new-";

/// Takes about a second; slow disks take longer to sync.
const CREATE: Duration = Duration::from_secs(300);

/// Bounds for a server that was left behind: to stop in order, then at once.
const FAST: Duration = Duration::from_secs(30);
const IMMEDIATE: Duration = Duration::from_secs(10);

/// Version of the cluster that is there; None when there is none yet.
pub(super) fn major(layout: &Layout) -> Result<Option<u32>, EmbeddedError> {
    let cluster = layout.cluster();
    let foreign = |problem| {
        Err(EmbeddedError::Foreign {
            path: cluster.to_path_buf(),
            problem,
        })
    };
    let file = cluster.join("PG_VERSION");
    match fs::read_to_string(&file) {
        Ok(text) => match text.trim().parse() {
            Ok(major) => Ok(Some(major)),
            Err(_) => foreign("has a PG_VERSION that names no version"),
        },
        Err(error) if is_missing(&error) => match fs::read_dir(cluster) {
            Ok(mut entries) => match entries.next() {
                Some(_) => foreign("holds files but no PostgreSQL data (PG_VERSION is missing)"),
                None => Ok(None),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(EmbeddedError::io("read", cluster)(error)),
        },
        Err(error) => Err(EmbeddedError::io("read", file)(error)),
    }
}

/// PostgreSQL insists on owning its files.
pub(super) fn check_owner(layout: &Layout, account: &Account) -> Result<(), EmbeddedError> {
    let cluster = layout.cluster();
    let owner = fs::metadata(cluster)
        .map_err(EmbeddedError::io("read", cluster))?
        .uid();
    if owner == account.uid().as_raw() {
        return Ok(());
    }
    Err(EmbeddedError::OtherOwner {
        path: cluster.to_path_buf(),
        owner,
        user: account.name().to_owned(),
        uid: account.uid().as_raw(),
    })
}

/// Removes what a creation that was killed left behind.
pub(super) fn remove_unfinished(layout: &Layout) {
    let Ok(entries) = fs::read_dir(layout.data_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let unfinished = entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(UNFINISHED.as_bytes());
        if unfinished && let Err(error) = fs::remove_dir_all(entry.path()) {
            let path = entry.path();
            tracing::warn!(path = %path.display(), %error, "cannot remove an unfinished database");
        }
    }
}

/// Creates the cluster with its database and roles under another name and renames it
/// when it is complete and on disk: a killed creation never counts.
pub(super) async fn create(
    layout: &Layout,
    binaries: &Binaries,
    account: &Account,
) -> Result<(), EmbeddedError> {
    let name = format!("{UNFINISHED}{}", std::process::id());
    let unfinished = layout.data_dir().join(name);
    make_private(&unfinished, account)?;
    let made = fill(&unfinished, binaries, account).await;
    if let Err(error) = made {
        // The error is what counts; the next start tries again.
        let _ = fs::remove_dir_all(&unfinished);
        return Err(error);
    }
    fs::rename(&unfinished, layout.cluster())
        .and_then(|()| fs::File::open(layout.data_dir())?.sync_all())
        .map_err(EmbeddedError::io("rename", &unfinished))?;
    tracing::info!(path = %layout.cluster().display(), "database created");
    Ok(())
}

async fn fill(dir: &Path, binaries: &Binaries, account: &Account) -> Result<(), EmbeddedError> {
    let mut initdb = account.command(&binaries.initdb());
    initdb
        .arg("-D")
        .arg(dir)
        .args(["-U", OWNER])
        // One order of text on every machine, and checksums to notice a bad disk.
        .args(["--encoding=UTF8", "--locale=C", "--data-checksums"])
        // Who may enter the socket's folder is let in; nobody comes by network.
        .args(["--auth-local=trust", "--auth-host=reject"])
        .arg("--no-instructions");
    let output = finish(initdb, &binaries.initdb(), CREATE).await?;
    check("initdb", output)?;

    // Single-user mode needs no other program and ends with everything written.
    let mut single = account.command(&binaries.postgres());
    single
        .arg("--single")
        .arg("-D")
        .arg(dir)
        // Else the session goes on after an error and ends well.
        .args(["-c", "exit_on_error=on"])
        .arg("postgres");
    // In this mode a statement ends with its line.
    let script = format!(
        "CREATE ROLE {SERVICE} NOSUPERUSER LOGIN;\nCREATE DATABASE {DATABASE} OWNER {OWNER};\n"
    );
    let output = feed(single, &binaries.postgres(), script.as_bytes()).await?;
    check("postgres --single", output)
}

fn check(program: &'static str, output: std::process::Output) -> Result<(), EmbeddedError> {
    if output.status.success() {
        return Ok(());
    }
    Err(EmbeddedError::Create {
        program,
        status: output.status,
        output: last_lines(&[output.stdout, output.stderr].concat()),
    })
}

async fn feed(
    mut command: Command,
    program: &Path,
    input: &[u8],
) -> Result<std::process::Output, EmbeddedError> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(EmbeddedError::io("run", program))?;
    let stdin = child.stdin.take();
    let work = async {
        if let Some(mut stdin) = stdin {
            // A program that has failed doesn't read on; its exit code tells more.
            let _ = stdin.write_all(input).await;
        }
        child.wait_with_output().await
    };
    match timeout(CREATE, work).await {
        Ok(output) => output.map_err(EmbeddedError::io("run", program)),
        Err(_) => Err(EmbeddedError::Slow {
            program: program.to_path_buf(),
            limit: CREATE,
        }),
    }
}

/// What `postmaster.pid` says. PostgreSQL writes it line by line as it starts and leaves
/// it behind when it is killed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PidFile {
    pub(super) pid: i32,
    pub(super) socket_dir: Option<PathBuf>,
    /// Whether it says that connections are accepted.
    pub(super) ready: bool,
}

impl PidFile {
    /// None when the file is missing, unreadable, or not yet written.
    pub(super) fn read(cluster: &Path) -> Option<Self> {
        Self::parse(&fs::read(cluster.join("postmaster.pid")).ok()?)
    }

    /// Lines: process, data, start, port, socket folder, address, shared memory, state.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let lines: Vec<&[u8]> = bytes
            .split(|&byte| byte == b'\n')
            .map(<[u8]>::trim_ascii)
            .collect();
        let pid: i32 = std::str::from_utf8(lines.first()?).ok()?.parse().ok()?;
        let socket_dir = lines
            .get(4)
            .filter(|line| !line.is_empty())
            .map(|line| PathBuf::from(std::ffi::OsStr::from_bytes(line)));
        (pid > 0).then_some(Self {
            pid,
            socket_dir,
            ready: lines.get(7) == Some(&b"ready".as_slice()),
        })
    }
}

/// Stops a server that outlived the process which started it. Our lock is held, so
/// nobody uses it.
///
/// Returns the process that `postmaster.pid` names when it is certainly not a server on
/// this cluster: numbers are used again, and PostgreSQL itself can't tell.
pub(super) async fn stop_left_behind(
    layout: &Layout,
    binaries: &Binaries,
    account: &Account,
) -> Result<Option<i32>, EmbeddedError> {
    let cluster = layout.cluster();
    let Some(PidFile { pid, .. }) = PidFile::read(cluster) else {
        return Ok(None);
    };
    match works_in(pid, cluster, account).await? {
        Some(true) => {}
        Some(false) => return Ok(Some(pid)),
        // PostgreSQL judges the file and refuses to start when in doubt.
        None => return Ok(None),
    }
    tracing::info!(
        pid,
        "stopping the PostgreSQL that an earlier remit left behind"
    );
    let program = binaries.pg_ctl();
    for (mode, limit) in [("fast", FAST), ("immediate", IMMEDIATE)] {
        let mut stop = account.command(&program);
        stop.arg("stop")
            .arg("-D")
            .arg(cluster)
            .args(["-m", mode, "-w", "-t"])
            .arg(limit.as_secs().to_string());
        // pg_ctl keeps its own time; the second bound is for a pg_ctl that hangs.
        let output = finish(stop, &program, limit * 2).await?;
        if output.status.success() || works_in(pid, cluster, account).await? == Some(false) {
            return Ok(None);
        }
    }
    Err(EmbeddedError::LeftBehind {
        pid,
        data_dir: layout.data_dir().to_path_buf(),
    })
}

/// Whether the process works in the cluster's folder, as every server does; None when
/// that can't be seen.
#[cfg(target_os = "linux")]
async fn works_in(
    pid: i32,
    cluster: &Path,
    account: &Account,
) -> Result<Option<bool>, EmbeddedError> {
    let place = PathBuf::from(format!("/proc/{pid}/cwd"));
    let home = fs::metadata(cluster).map_err(EmbeddedError::io("read", cluster))?;
    match fs::metadata(&place) {
        Ok(place) => Ok(Some((place.dev(), place.ino()) == (home.dev(), home.ino()))),
        Err(error) if is_missing(&error) => Ok(Some(false)),
        // Dead and not yet collected by its parent; PostgreSQL would take it for alive.
        Err(_) if is_dead(pid) => Ok(Some(false)),
        // In a container root may not look at others' processes; their own account may.
        Err(_) => {
            let line = r#"test -e "$1/." || exit 2; test "$1" -ef "$2""#;
            let code = account.shell(line, &[&place, cluster]).await?;
            Ok(match code {
                Some(0) => Some(true),
                Some(1) => Some(false),
                _ => None,
            })
        }
    }
}

/// Whether the process has ended and only its entry is left.
#[cfg(target_os = "linux")]
fn is_dead(pid: i32) -> bool {
    // The state follows the name, which stands in brackets and may hold some itself.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
    })
}

/// As on Linux, by the command line: every server of ours is started with the folder.
#[cfg(not(target_os = "linux"))]
async fn works_in(
    pid: i32,
    cluster: &Path,
    account: &Account,
) -> Result<Option<bool>, EmbeddedError> {
    let line = r#"command=$(ps -o command= -p "$1") || exit 1
        case $command in *"$2"*) exit 0;; *) exit 1;; esac"#;
    let pid = PathBuf::from(pid.to_string());
    let code = account.shell(line, &[&pid, cluster]).await?;
    Ok(match code {
        Some(0) => Some(true),
        Some(1) => Some(false),
        _ => None,
    })
}

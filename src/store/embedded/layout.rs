//! The data directory: what lies where, who may enter, who holds it.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::PORT;
use super::account::{Account, is_missing};
use super::error::EmbeddedError;

/// The cluster's folder in the data directory.
pub(super) const CLUSTER: &str = "pg";

/// The shorter of the systems' limits on a socket's path (macOS: 104 with the final
/// zero; Linux: 108).
const SOCKET_PATH_BYTES_MAX: usize = 103;

/// Past this the log is put aside at the next start; with the one put aside before, the
/// logs hold twice this plus what one run writes.
const LOG_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// How much of the log an error repeats.
const TAIL_BYTES_MAX: u64 = 4 * 1024;
const TAIL_LINES_MAX: usize = 8;

/// A data directory with links resolved, and what lies in it.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    data_dir: PathBuf,
    cluster: PathBuf,
    socket_dir: PathBuf,
    log: PathBuf,
}

impl Layout {
    /// Makes the directory if it is missing and checks that the account can reach it.
    pub(super) async fn prepare(data_dir: &Path, account: &Account) -> Result<Self, EmbeddedError> {
        let data_dir =
            std::path::absolute(data_dir).map_err(EmbeddedError::io("resolve", data_dir))?;
        let mut missing = Vec::new();
        for folder in data_dir.ancestors() {
            match fs::metadata(folder) {
                Ok(_) => break,
                Err(error) if is_missing(&error) => missing.push(folder),
                Err(error) => return Err(EmbeddedError::io("reach", folder)(error)),
            }
        }
        // Checked before anything is made, so that a refusal leaves nothing behind.
        let present = missing.last().and_then(|folder| folder.parent());
        check_reach(present.unwrap_or(&data_dir), &data_dir, account).await?;
        for folder in missing.iter().rev() {
            make_folder(folder, account).map_err(EmbeddedError::io("create", *folder))?;
        }
        let data_dir =
            fs::canonicalize(&data_dir).map_err(EmbeddedError::io("resolve", &data_dir))?;
        check_reach(&data_dir, &data_dir, account).await?;
        check_ours(&data_dir)?;
        Ok(Self {
            cluster: data_dir.join(CLUSTER),
            socket_dir: socket_dir(&data_dir, account)?,
            log: data_dir.join("postgres.log"),
            data_dir,
        })
    }

    pub(super) fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub(super) fn cluster(&self) -> &Path {
        &self.cluster
    }

    pub(super) fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Takes the directory for this process. The kernel frees the lock when the file is
    /// closed, however the process ends.
    pub(super) fn lock(&self) -> Result<File, EmbeddedError> {
        let path = self.data_dir.join("remit.lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(&path)
            .map_err(EmbeddedError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // Only to say more: who holds it is not known without.
                let _ = file.read_to_string(&mut text);
                let holder = text
                    .trim()
                    .parse::<u32>()
                    .map_or_else(|_| String::new(), |pid| format!(" (process {pid})"));
                return Err(EmbeddedError::DataDirInUse {
                    data_dir: self.data_dir.clone(),
                    holder,
                });
            }
            Err(TryLockError::Error(error)) => {
                return Err(EmbeddedError::io("lock", path)(error));
            }
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(EmbeddedError::io("write", path))?;
        Ok(file)
    }

    /// Makes the socket's folder, for the account alone.
    pub(super) fn make_socket_dir(&self, account: &Account) -> Result<(), EmbeddedError> {
        make_private(&self.socket_dir, account)
    }

    /// Removes the socket's folder where it lies outside the data directory.
    pub(super) fn clear_socket_dir(&self) {
        if !self.socket_dir.starts_with(&self.data_dir) {
            // What can't be removed now is used again by the next start.
            let _ = fs::remove_dir(&self.socket_dir);
        }
    }

    /// Opens the log for appending, after putting a long one aside, and tells its size.
    pub(super) fn open_log(&self) -> Result<(File, u64), EmbeddedError> {
        if fs::symlink_metadata(&self.log).is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
            let aside = self.log.with_extension("log.1");
            fs::rename(&self.log, &aside).map_err(EmbeddedError::io("rename", &self.log))?;
        }
        let open = || {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .custom_flags(OFlag::O_NOFOLLOW.bits())
                .open(&self.log)?;
            let size = file.metadata()?.len();
            Ok((file, size))
        };
        open().map_err(EmbeddedError::io("open", &self.log))
    }

    /// The last lines of the log, at most those after `from`.
    pub(super) fn log_tail(&self, from: u64) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(&self.log)?;
            let size = file.metadata()?.len();
            file.seek(SeekFrom::Start(
                from.max(size.saturating_sub(TAIL_BYTES_MAX)),
            ))?;
            let mut bytes = Vec::new();
            file.take(TAIL_BYTES_MAX).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        last_lines(&read().unwrap_or_default())
    }
}

/// The last lines of what a program said.
pub(super) fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES_MAX)..].join("\n")
}

/// A folder for the account alone; one that is there must be its own already.
pub(super) fn make_private(path: &Path, account: &Account) -> Result<(), EmbeddedError> {
    let made = match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(EmbeddedError::io("create", path)(error)),
    };
    // Everything below goes by the open folder: a link put in its place would have root
    // give away something else.
    let own = || -> io::Result<bool> {
        let folder = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).bits())
            .open(path)?;
        let owner = folder.metadata()?.uid();
        if account.switches() && (made || owner == 0) {
            fchown(
                &folder,
                Some(account.uid().as_raw()),
                Some(account.gid().as_raw()),
            )?;
        }
        if folder.metadata()?.uid() != account.uid().as_raw() {
            return Ok(false);
        }
        folder.set_permissions(Permissions::from_mode(0o700))?;
        Ok(true)
    };
    if own().map_err(EmbeddedError::io("take over", path))? {
        Ok(())
    } else {
        Err(EmbeddedError::NotPrivate {
            path: path.to_path_buf(),
            user: account.name().to_owned(),
        })
    }
}

/// Makes one missing folder on the way. Root's are passable, but not listable, for the
/// account that PostgreSQL runs as.
fn make_folder(path: &Path, account: &Account) -> io::Result<()> {
    let mode = if account.switches() { 0o711 } else { 0o700 };
    DirBuilder::new().mode(mode).create(path)?;
    // The mode above was cut by the umask.
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Checks that the account can pass through `folder`, and finds the one in the way.
async fn check_reach(
    folder: &Path,
    data_dir: &Path,
    account: &Account,
) -> Result<(), EmbeddedError> {
    if !account.switches() {
        return Ok(());
    }
    let folders: Vec<&Path> = folder.ancestors().collect();
    for folder in folders.into_iter().rev() {
        if account.shell(r#"test -x "$1""#, &[folder]).await? != Some(0) {
            return Err(EmbeddedError::Unreachable {
                user: account.name().to_owned(),
                data_dir: data_dir.to_path_buf(),
                blocked_at: folder.to_path_buf(),
            });
        }
    }
    Ok(())
}

/// Refuses folders that hold another's data, and warns of those that anybody can change.
fn check_ours(data_dir: &Path) -> Result<(), EmbeddedError> {
    let foreign = |path: &Path, problem| {
        Err(EmbeddedError::Foreign {
            path: path.to_path_buf(),
            problem,
        })
    };
    if data_dir.join("PG_VERSION").exists() {
        return foreign(data_dir, "is itself the data of a PostgreSQL");
    }
    let metadata = fs::metadata(data_dir).map_err(EmbeddedError::io("read", data_dir))?;
    if !metadata.is_dir() {
        return foreign(data_dir, "is not a folder");
    }
    if metadata.mode() & 0o002 != 0 {
        tracing::warn!(
            data_dir = %data_dir.display(),
            "every user of this machine may write to the data directory: chmod o-w it"
        );
    }
    Ok(())
}

/// `run` in the data directory, or, where PostgreSQL or a URL can't take that path, a
/// folder named after the directory's identity in a place for such things.
fn socket_dir(data_dir: &Path, account: &Account) -> Result<PathBuf, EmbeddedError> {
    let usual = data_dir.join("run");
    if fits(&usual) {
        return Ok(usual);
    }
    let metadata = fs::metadata(data_dir).map_err(EmbeddedError::io("read", data_dir))?;
    let name = format!("remit-{:x}-{:x}", metadata.dev(), metadata.ino());
    // Root's own runtime folder is closed to the account.
    let runtime = (!account.switches())
        .then(|| std::env::var_os("XDG_RUNTIME_DIR"))
        .flatten()
        .map(|dir| Path::new(&dir).join(&name))
        .filter(|dir| dir.is_absolute() && dir.parent().is_some_and(Path::is_dir) && fits(dir));
    Ok(runtime.unwrap_or_else(|| Path::new("/tmp").join(name)))
}

/// Whether a socket in the folder has a path that the system takes, and that PostgreSQL
/// reads as one folder.
pub(super) fn fits(dir: &Path) -> bool {
    let socket = dir.join(format!(".s.PGSQL.{PORT}"));
    let plain = |text: &OsStr| {
        text.to_str()
            .is_some_and(|text| !text.contains(|c: char| c.is_control() || c == ',' || c == '"'))
    };
    socket.as_os_str().len() <= SOCKET_PATH_BYTES_MAX && plain(dir.as_os_str())
}

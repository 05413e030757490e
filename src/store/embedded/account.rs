//! Who PostgreSQL runs as, and how its programs are called.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use nix::unistd::{Gid, Uid, User, geteuid};
use tokio::process::Command;
use tokio::time::timeout;

use super::error::EmbeddedError;
use super::layout;

/// In this order: an account of our own, PostgreSQL's, the one that every system has.
const CANDIDATES: [&str; 3] = ["remit", "postgres", SHARED];
const SHARED: &str = "nobody";

/// Small programs that only look something up.
const QUICK: Duration = Duration::from_secs(10);

/// The account that PostgreSQL runs as: our own, or, because PostgreSQL refuses root,
/// an unprivileged one when ours is root.
#[derive(Debug, Clone)]
pub(super) struct Account {
    name: String,
    uid: Uid,
    gid: Gid,
    /// Whether it is another than our own.
    switch: bool,
}

pub(super) fn is_root() -> bool {
    geteuid().is_root()
}

/// Home of our own account, as the system knows it.
pub(super) fn home() -> Option<PathBuf> {
    let user = User::from_uid(geteuid()).ok().flatten()?;
    Some(user.dir).filter(|dir| dir.is_absolute())
}

impl Account {
    /// Our own account; for root the owner of the cluster that is there, else the first
    /// candidate that this machine knows.
    pub(super) fn choose(data_dir: &Path) -> Result<Self, EmbeddedError> {
        let own = geteuid();
        if !own.is_root() {
            return Self::of_uid(own, nix::unistd::getegid(), false);
        }
        if let Ok(cluster) = std::fs::symlink_metadata(data_dir.join(layout::CLUSTER))
            && cluster.uid() != 0
        {
            return Self::of_uid(
                Uid::from_raw(cluster.uid()),
                Gid::from_raw(cluster.gid()),
                true,
            );
        }
        for name in CANDIDATES {
            let user = User::from_name(name).map_err(|source| EmbeddedError::Lookup {
                user: name.to_owned(),
                source,
            })?;
            let Some(user) = user.filter(|user| !user.uid.is_root()) else {
                continue;
            };
            if name == SHARED {
                tracing::warn!(
                    "PostgreSQL runs as the user nobody, which other programs may share: they \
                     could read the data. Create an account of its own with: useradd --system \
                     --shell /usr/sbin/nologin remit"
                );
            }
            return Ok(Self {
                name: user.name,
                uid: user.uid,
                gid: user.gid,
                switch: true,
            });
        }
        Err(EmbeddedError::NoAccount)
    }

    fn of_uid(uid: Uid, gid: Gid, switch: bool) -> Result<Self, EmbeddedError> {
        let user = User::from_uid(uid).map_err(|source| EmbeddedError::Lookup {
            user: uid.to_string(),
            source,
        })?;
        let (name, gid) = match user {
            Some(user) if switch => (user.name, user.gid),
            Some(user) => (user.name, gid),
            // Containers run under ids that have no name.
            None => (uid.to_string(), gid),
        };
        Ok(Self {
            name,
            uid,
            gid,
            switch,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn uid(&self) -> Uid {
        self.uid
    }

    pub(super) fn gid(&self) -> Gid {
        self.gid
    }

    /// Whether root hands over to this account.
    pub(super) fn switches(&self) -> bool {
        self.switch
    }

    /// A program run as this account. The environment is empty because `PGPORT`,
    /// `PGDATA` and their like would change what the programs do, and the folder is `/`
    /// because the account may not be able to enter ours.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::null())
            // A terminal's Ctrl-C is for us to act on, in our order.
            .process_group(0);
        if self.switch {
            // Also drops root's supplementary groups.
            command.uid(self.uid.as_raw()).gid(self.gid.as_raw());
        }
        command
    }

    /// Runs a shell line as this account and returns its exit code; None when it was
    /// killed by a signal.
    pub(super) async fn shell(
        &self,
        line: &str,
        arguments: &[&Path],
    ) -> Result<Option<i32>, EmbeddedError> {
        let sh = Path::new("/bin/sh");
        let mut command = self.command(sh);
        command.arg("-c").arg(line).arg("sh").args(arguments);
        Ok(finish(command, sh, QUICK).await?.status.code())
    }

    /// What a program prints when it is asked something.
    pub(super) async fn ask(
        &self,
        program: &Path,
        argument: &str,
    ) -> Result<Output, EmbeddedError> {
        let mut command = self.command(program);
        command.arg(argument);
        finish(command, program, QUICK).await
    }
}

/// Runs a program to its end and collects what it says; past the limit it is killed.
pub(super) async fn finish(
    mut command: Command,
    program: &Path,
    limit: Duration,
) -> Result<Output, EmbeddedError> {
    command.kill_on_drop(true);
    match timeout(limit, command.output()).await {
        Ok(output) => output.map_err(EmbeddedError::io("run", program)),
        Err(_) => Err(EmbeddedError::Slow {
            program: program.to_path_buf(),
            limit,
        }),
    }
}

/// Whether the error says that the thing is not there.
pub(super) fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

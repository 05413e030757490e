//! PostgreSQL's programs on this machine.

use std::fs;
use std::path::{Path, PathBuf};

use super::account::Account;
use super::error::EmbeddedError;
use super::layout::Layout;

/// The oldest version that is still maintained and that the schema is tested on.
pub(super) const OLDEST_MAJOR: u32 = 14;

/// Folders that systems install versions into: every entry of the first that begins
/// with the second, and the third inside it.
const PLACES: [(&str, &str, &str); 9] = [
    ("/usr/lib/postgresql", "", "bin"),
    ("/usr", "pgsql-", "bin"),
    ("/usr/lib", "postgresql", "bin"),
    ("/usr/libexec", "postgresql", ""),
    ("/usr/local", "pgsql", "bin"),
    ("/opt/homebrew/opt", "postgresql", "bin"),
    ("/usr/local/opt", "postgresql", "bin"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql", "bin"),
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
];

const NEEDED: [&str; 3] = ["postgres", "initdb", "pg_ctl"];

/// One installation: a folder, with links resolved, and its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binaries {
    dir: PathBuf,
    major: u32,
}

/// What a search brought.
#[derive(Debug, Default)]
struct Found {
    usable: Vec<Binaries>,
    /// Why the others are not, a line each.
    unusable: Vec<String>,
}

impl Binaries {
    pub(super) fn postgres(&self) -> PathBuf {
        self.dir.join("postgres")
    }

    pub(super) fn initdb(&self) -> PathBuf {
        self.dir.join("initdb")
    }

    pub(super) fn pg_ctl(&self) -> PathBuf {
        self.dir.join("pg_ctl")
    }

    /// The programs to use: from the given folder, else from the usual places and
    /// `PATH`. `major` is the version of the data that is there and then the only one
    /// that will do; else the newest is taken.
    pub(super) async fn find(
        given: Option<&Path>,
        major: Option<u32>,
        layout: &Layout,
        account: &Account,
    ) -> Result<Self, EmbeddedError> {
        let other_major = |major, found: &Found| EmbeddedError::OtherMajor {
            data_dir: layout.data_dir().to_path_buf(),
            major,
            found: list(&found.usable),
            install: install_command(&os_release(), Some(major)),
        };

        if let Some(dir) = given {
            let found = probe_all(vec![dir.to_path_buf()], account).await;
            let Some(binaries) = found.usable.first().cloned() else {
                return Err(EmbeddedError::GivenBinaries {
                    dir: dir.to_path_buf(),
                    problem: found.unusable.join("; "),
                });
            };
            return match major {
                Some(major) if major != binaries.major => Err(other_major(major, &found)),
                _ => Ok(binaries),
            };
        }

        let found = probe_all(folders(), account).await;
        match (major, newest(&found.usable, major)) {
            (_, Some(binaries)) => Ok(binaries.clone()),
            (Some(major), None) => Err(other_major(major, &found)),
            (None, None) => Err(EmbeddedError::NoBinaries {
                tried: places(),
                unusable: found
                    .unusable
                    .iter()
                    .map(|line| format!("Not usable: {line}\n"))
                    .collect(),
                install: install_command(&os_release(), None),
            }),
        }
    }
}

fn newest(usable: &[Binaries], major: Option<u32>) -> Option<&Binaries> {
    usable
        .iter()
        .filter(|binaries| major.is_none_or(|major| binaries.major == major))
        .max_by_key(|binaries| binaries.major)
}

fn list(usable: &[Binaries]) -> String {
    if usable.is_empty() {
        return "none".to_owned();
    }
    usable
        .iter()
        .map(|binaries| format!("{} ({})", binaries.major, binaries.dir.display()))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Every folder that has a `postgres`, in the order of `PLACES`, then `PATH`.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for (parent, prefix, inside) in PLACES {
        let Ok(entries) = fs::read_dir(parent) else {
            continue;
        };
        folders.extend(
            entries
                .flatten()
                .filter(|entry| {
                    entry
                        .file_name()
                        .as_encoded_bytes()
                        .starts_with(prefix.as_bytes())
                })
                .map(|entry| entry.path().join(inside)),
        );
    }
    if let Some(path) = std::env::var_os("PATH") {
        folders.extend(std::env::split_paths(&path).filter(|dir| dir.is_absolute()));
    }
    folders.retain(|dir| dir.join("postgres").exists());
    folders
}

fn places() -> String {
    let mut places: Vec<_> = PLACES
        .iter()
        .map(|(parent, prefix, inside)| {
            let end = if inside.is_empty() { "" } else { "/" };
            format!("{parent}/{prefix}*{end}{inside}")
        })
        .collect();
    places.push("PATH".to_owned());
    places.join(", ")
}

async fn probe_all(folders: Vec<PathBuf>, account: &Account) -> Found {
    let mut found = Found::default();
    for folder in folders {
        match probe(&folder, account).await {
            Ok(binaries) if found.usable.contains(&binaries) => {}
            Ok(binaries) => found.usable.push(binaries),
            Err(problem) => found
                .unusable
                .push(format!("{}: {problem}", folder.display())),
        }
    }
    found
}

/// Asks `postgres` for its version, as the account that will run it: that also shows
/// whether the account can reach it.
async fn probe(folder: &Path, account: &Account) -> Result<Binaries, String> {
    // PostgreSQL finds its other files relative to where it really lies.
    let postgres = fs::canonicalize(folder.join("postgres"))
        .map_err(|error| format!("there is no postgres in it ({error})"))?;
    let dir = postgres
        .parent()
        .ok_or_else(|| "it has no folder".to_owned())?
        .to_path_buf();
    for name in NEEDED {
        if !dir.join(name).exists() {
            return Err(format!("there is no {name} in it"));
        }
    }
    let output = account
        .ask(&postgres, "--version")
        .await
        .map_err(|error| format!("as the user `{}`: {error}", account.name()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    match major_of(&said) {
        Some(major) if major >= OLDEST_MAJOR => Ok(Binaries { dir, major }),
        Some(major) => Err(format!(
            "it is PostgreSQL {major}, and {OLDEST_MAJOR} is the oldest that will do"
        )),
        None => Err("postgres --version did not name a version".to_owned()),
    }
}

/// From `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)` or `… 18beta1`.
pub(super) fn major_of(version: &str) -> Option<u32> {
    let rest = version.split_once("(PostgreSQL)")?.1.trim_start();
    let end = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

fn os_release() -> String {
    // Absent on macOS, and then nothing is known.
    fs::read_to_string("/etc/os-release").unwrap_or_default()
}

/// The one command that installs PostgreSQL (of that version) on the system that
/// `/etc/os-release` describes.
pub(super) fn install_command(os_release: &str, major: Option<u32>) -> String {
    let version =
        |separator: &str| major.map_or_else(String::new, |major| format!("{separator}{major}"));
    if cfg!(target_os = "macos") {
        return format!("brew install postgresql{}", version("@"));
    }
    let value = |key: &str| {
        os_release
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .unwrap_or("")
            .trim_matches('"')
    };
    let families: Vec<&str> = [value("ID"), value("ID_LIKE")]
        .iter()
        .flat_map(|value| value.split_whitespace())
        .collect();
    let is = |names: &[&str]| families.iter().any(|family| names.contains(family));
    if is(&["debian", "ubuntu"]) {
        let version = version("-");
        format!("apt-get install -y --no-install-recommends postgresql{version}")
    } else if is(&["fedora", "rhel", "centos"]) {
        format!("dnf install postgresql{}-server", version(""))
    } else if is(&["alpine"]) {
        format!("apk add postgresql{}", version(""))
    } else if is(&["suse", "opensuse"]) {
        format!("zypper install postgresql{}-server", version(""))
    } else if is(&["arch"]) {
        "pacman -S postgresql".to_owned()
    } else {
        format!(
            "your system's package for the PostgreSQL server{}",
            version(" ")
        )
    }
}

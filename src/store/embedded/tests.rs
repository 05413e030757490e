//! What needs no server: texts read and written. The rest is in `tests/embedded.rs`.

use std::path::{Path, PathBuf};

use super::binaries::{install_command, major_of};
use super::cluster::PidFile;
use super::layout::fits;
use super::*;

#[test]
fn the_version_is_read_from_every_distribution_s_wording() {
    for (said, major) in [
        (
            "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)",
            Some(15),
        ),
        ("postgres (PostgreSQL) 18beta1", Some(18)),
        ("postgres (PostgreSQL) 17.2\n", Some(17)),
        ("postgres (PostgreSQL) devel", None),
        ("something else 15.1", None),
    ] {
        assert_eq!(major_of(said), major, "{said}");
    }
}

#[cfg(not(target_os = "macos"))]
#[test]
fn the_command_to_install_is_the_system_s() {
    for (os_release, major, command) in [
        (
            "PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\n",
            None,
            "apt-get install -y --no-install-recommends postgresql",
        ),
        (
            "ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n",
            Some(16),
            "apt-get install -y --no-install-recommends postgresql-16",
        ),
        ("ID=fedora\n", None, "dnf install postgresql-server"),
        (
            "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n",
            Some(16),
            "dnf install postgresql16-server",
        ),
        ("ID=alpine\n", Some(17), "apk add postgresql17"),
        ("", None, "your system's package for the PostgreSQL server"),
    ] {
        assert_eq!(install_command(os_release, major), command);
    }
}

#[test]
fn the_message_without_binaries_names_places_command_and_flags() {
    let text = EmbeddedError::NoBinaries {
        tried: "/usr/lib/postgresql/*/bin, PATH".to_owned(),
        unusable: "Not usable: /usr/lib/postgresql/12/bin: too old\n".to_owned(),
        install: "dnf install postgresql-server".to_owned(),
    }
    .to_string();
    for part in [
        "/usr/lib/postgresql/*/bin, PATH\n",
        "/12/bin: too old\n",
        "with: dnf install postgresql-server\n",
        "--postgres-bin",
        "--database-url",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_pid_file_is_ready_only_with_its_last_line() {
    let full = b"4711\n/d/pg\n1700000000\n5432\n/d/run\n\n  1234567   98304\nready   \n";
    let file = PidFile {
        pid: 4711,
        socket_dir: Some(PathBuf::from("/d/run")),
        ready: true,
    };
    assert_eq!(PidFile::parse(full), Some(file));
    for end in 0..full.len() {
        let ready = PidFile::parse(&full[..end]).is_some_and(|file| file.ready);
        assert!(!ready || end >= full.len() - 4, "{end} bytes are not ready");
    }
    assert_eq!(
        PidFile::parse(b"-5\n"),
        None,
        "a negative number is a group"
    );
    assert_eq!(PidFile::parse(b""), None);
}

#[test]
fn urls_name_role_port_and_the_encoded_folder() {
    assert_eq!(
        url("remit", Path::new("/var/lib/my data/50%/é/run")),
        "postgres://remit@localhost:5432/remit\
         ?host=/var/lib/my%20data/50%25/%C3%A9/run&sslmode=disable"
    );
}

#[test]
fn a_socket_folder_must_fit_the_system_and_be_one_name() {
    assert!(fits(Path::new("/var/lib/remit/run")));
    assert!(fits(Path::new("/home/a user/remit/run")));
    assert!(!fits(Path::new("/a,b/run")));
    assert!(!fits(Path::new("/a\nb/run")));
    let longest = format!("/{}", "x".repeat(103 - 1 - "/.s.PGSQL.5432".len()));
    assert!(fits(Path::new(&longest)));
    assert!(!fits(Path::new(&format!("{longest}x"))));
}

//! Old months leave the database and still verify.

use std::path::Path;
use std::process::{Command, Output};

use crate::support::remit;

fn said(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[test]
fn months_are_archived_and_the_rest_verifies_with_them_and_without() {
    let folder = tempfile::Builder::new()
        .prefix("remit-it")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o711))
        .tempdir()
        .expect("a folder");
    let bench = folder.path().join("bench");
    std::fs::create_dir(&bench).expect("a folder");
    // A year of history, then load on it: its sums and chains are checked by the way.
    let loaded = remit(&[
        "bench",
        "--unprepared",
        "--data-dir",
        text(&bench),
        "--fill-entries=3000",
        "--fill-tenants=3",
        "--clients=4",
        "--tenants=3",
        "--seconds=1",
        "--warmup=0",
    ]);
    assert!(loaded.status.success(), "{}", said(&loaded));

    let data = bench.join("data");
    let archives = folder.path().join("archives");
    let verify = |more: &[&str]| {
        let mut args = vec!["verify", "--data-dir", text(&data)];
        args.extend(more);
        remit(&args)
    };
    let with_archives = ["--archive", text(&archives)];
    let before = verify(&[]);
    assert!(before.status.success(), "{}", said(&before));

    let months = |back: i64| {
        let now = jiff::Zoned::now().with_time_zone(jiff::tz::TimeZone::UTC);
        let month = now.date().first_of_month() - jiff::Span::new().months(back);
        month.strftime("%Y-%m").to_string()
    };
    let archive = |before: &str, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_remit"));
        command.args(["archive", "--before", before]).args(more);
        command.arg("--data-dir").arg(&data);
        command.arg("--out").arg(&archives);
        command.output().expect("remit runs")
    };
    let refused = archive(&months(0), &[]);
    assert!(!refused.status.success());
    assert!(said(&refused).contains("the last whole month stays"));

    let first = archive(&months(6), &[]);
    assert!(first.status.success(), "{}", said(&first));
    assert!(
        said(&first).contains("entries of 4 chains"),
        "{}",
        said(&first)
    );
    let second = archive(&months(3), &["--drop"]);
    assert!(second.status.success(), "{}", said(&second));
    assert_eq!(
        said(&second).matches(" dropped").count(),
        3,
        "{}",
        said(&second)
    );
    let nothing = archive(&months(3), &[]);
    assert!(said(&nothing).contains("nothing to archive"));

    let alone = verify(&[]);
    assert!(alone.status.success(), "{}", said(&alone));
    assert!(
        said(&alone).contains("archived and not read"),
        "{}",
        said(&alone)
    );
    let whole = verify(&with_archives);
    assert!(whole.status.success(), "{}", said(&whole));
    // The same chains, to the last hash.
    let hashes = |output: &Output| -> Vec<String> {
        let lines = said(output);
        let ends = lines
            .lines()
            .filter_map(|line| line.split("last hash ").nth(1));
        ends.map(str::to_owned).collect()
    };
    assert_eq!(hashes(&before), hashes(&whole));
    assert_eq!(hashes(&before), hashes(&alone));

    // One byte of one archive.
    let mut files: Vec<_> = std::fs::read_dir(&archives)
        .expect("archives")
        .map(|file| file.expect("a file").path())
        .collect();
    files.sort();
    let original = std::fs::read_to_string(&files[1]).expect("an archive");
    let altered = original.replacen("RISK_POINTS\\\":3", "RISK_POINTS\\\":1", 1);
    assert_ne!(original, altered);
    std::fs::write(&files[1], altered).expect("a write");
    let broken = verify(&with_archives);
    assert!(!broken.status.success());
    assert!(
        said(&broken).contains("BROKEN at entry"),
        "{}",
        said(&broken)
    );
    std::fs::write(&files[1], original).expect("a write");

    // A whole archive.
    std::fs::remove_file(files.last().expect("archives")).expect("a removal");
    let short = verify(&with_archives);
    assert!(!short.status.success());
    assert!(
        said(&short).contains("does not end where the database begins"),
        "{}",
        said(&short)
    );
}

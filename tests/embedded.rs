//! The embedded PostgreSQL as the server uses it: real programs, real kills. Runs as
//! root (PostgreSQL then under another account) and as an ordinary user alike.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use remit::store::embedded::{Embedded, EmbeddedError, EmbeddedOptions, running_socket_dir};
use sqlx::{Connection, PgConnection};
use tempfile::TempDir;

/// Far more than any step takes; a test that reaches it has failed.
const LIMIT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);
/// Tells `hold_until_killed` that it runs as the process to be killed, and on what.
const HOLD: &str = "REMIT_TEST_HOLD";

/// A folder that the account PostgreSQL runs as can pass through.
fn folder() -> TempDir {
    folder_of_mode(0o711)
}

fn folder_of_mode(mode: u32) -> TempDir {
    tempfile::Builder::new()
        .permissions(Permissions::from_mode(mode))
        .tempdir()
        .expect("the system's folder for temporary files can be written")
}

fn options(data_dir: &Path) -> EmbeddedOptions {
    EmbeddedOptions {
        data_dir: data_dir.to_path_buf(),
        postgres_bin: None,
    }
}

async fn start(data_dir: &Path) -> Embedded {
    match Embedded::start(options(data_dir)).await {
        Ok(embedded) => embedded,
        Err(error) => panic!("{error}"),
    }
}

async fn refusal(options: EmbeddedOptions) -> EmbeddedError {
    match Embedded::start(options).await {
        Ok(_) => panic!("it started"),
        Err(error) => error,
    }
}

async fn connect(url: &str) -> PgConnection {
    let begin = Instant::now();
    loop {
        match PgConnection::connect(url).await {
            Ok(connection) => return connection,
            Err(error) => assert!(begin.elapsed() < LIMIT, "{error}"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn run(connection: &mut PgConnection, statement: &'static str) {
    sqlx::query(statement)
        .execute(connection)
        .await
        .expect(statement);
}

async fn read<T>(connection: &mut PgConnection, statement: &'static str) -> T
where
    T: Send + Unpin + sqlx::Type<sqlx::Postgres> + for<'r> sqlx::Decode<'r, sqlx::Postgres>,
{
    sqlx::query_scalar(statement)
        .fetch_one(connection)
        .await
        .expect(statement)
}

/// Writes rows that later reads look for.
async fn write_rows(url: &str) {
    let mut connection = connect(url).await;
    run(&mut connection, "CREATE TABLE kept (n bigint PRIMARY KEY)").await;
    run(
        &mut connection,
        "INSERT INTO kept SELECT generate_series(1, 1000)",
    )
    .await;
}

async fn rows(url: &str) -> i64 {
    read(&mut connect(url).await, "SELECT count(*) FROM kept").await
}

fn pid_file(data_dir: &Path) -> PathBuf {
    data_dir.join("pg/postmaster.pid")
}

fn server_pid(data_dir: &Path) -> Option<Pid> {
    let text = fs::read_to_string(pid_file(data_dir)).ok()?;
    text.lines().next()?.parse().ok().map(Pid::from_raw)
}

fn is_gone(pid: Pid) -> bool {
    kill(pid, None).is_err()
}

/// Sleeps in the runtime, on which the server is watched too.
async fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < LIMIT, "waited in vain: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// This test program once more, as a process that holds the folder until it is killed.
struct Holder(Child);

impl Holder {
    async fn start(data_dir: &Path) -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let child = Command::new(program)
            .args(["--exact", "hold_until_killed", "--nocapture"])
            .env(HOLD, data_dir)
            .stdout(Stdio::null())
            .spawn()
            .expect("this program can be started");
        let holder = Self(child);
        wait_until("the other process serves", || {
            running_socket_dir(data_dir).is_some()
                && fs::read_to_string(pid_file(data_dir))
                    .is_ok_and(|text| text.trim_end().ends_with("ready"))
        })
        .await;
        holder
    }

    /// As `kill -9`: it gets no chance to stop anything.
    fn kill(mut self) {
        self.0.kill().expect("our own child can be killed");
        self.0.wait().expect("our own child can be waited for");
    }
}

/// Not a test of its own: what `Holder` runs.
#[tokio::test]
async fn hold_until_killed() {
    if let Some(data_dir) = std::env::var_os(HOLD) {
        let _embedded = start(Path::new(&data_dir)).await;
        std::future::pending::<()>().await;
    }
}

#[tokio::test]
async fn the_first_start_creates_database_and_roles_and_stop_leaves_no_process() {
    let folder = folder();
    let data_dir = folder.path().join("not/there/yet");
    let embedded = start(&data_dir).await;
    assert_eq!(
        running_socket_dir(&data_dir).as_deref(),
        Some(embedded.socket_dir())
    );

    let mut owner = connect(&embedded.owner_url()).await;
    let superuser: String = read(&mut owner, "SHOW is_superuser").await;
    let database: String = read(&mut owner, "SELECT current_database()::text").await;
    assert_eq!((superuser.as_str(), database.as_str()), ("on", "remit"));

    let mut service = connect(&embedded.service_url()).await;
    let user: String = read(&mut service, "SELECT current_user::text").await;
    let superuser: String = read(&mut service, "SHOW is_superuser").await;
    assert_eq!(
        (user.as_str(), superuser.as_str()),
        ("remit_service", "off")
    );
    run(&mut service, "BEGIN").await;

    let pid = server_pid(&data_dir).expect("the server runs");
    embedded
        .stop()
        .await
        .expect("it stops with clients connected");
    assert!(is_gone(pid));
    assert_eq!(running_socket_dir(&data_dir), None);

    let again = start(&data_dir).await;
    again.stop().await.expect("it stops");
}

#[tokio::test]
async fn it_is_durable_and_open_to_nobody_else() {
    let folder = folder();
    let embedded = start(folder.path()).await;
    let mut owner = connect(&embedded.owner_url()).await;
    for (name, value) in [
        ("fsync", "on"),
        ("synchronous_commit", "on"),
        ("full_page_writes", "on"),
        ("data_checksums", "on"),
        ("listen_addresses", ""),
    ] {
        let set: String = sqlx::query_scalar("SELECT current_setting($1)")
            .bind(name)
            .fetch_one(&mut owner)
            .await
            .expect("the setting is known");
        assert_eq!(set, value, "{name}");
    }

    let mode = |path: &Path| fs::metadata(path).expect("it is there").mode() & 0o777;
    let cluster = folder.path().join("pg");
    assert_eq!(mode(embedded.socket_dir()), 0o700);
    assert_eq!(mode(&cluster), 0o700);
    assert_eq!(mode(&folder.path().join("postgres.log")), 0o600);
    assert_eq!(mode(&folder.path().join("remit.lock")), 0o600);
    let server = fs::metadata(cluster).expect("it is there").uid();
    assert_ne!(server, 0, "PostgreSQL does not run as root");
    embedded.stop().await.expect("it stops");
}

#[tokio::test]
async fn a_second_instance_on_the_same_folder_is_refused() {
    let folder = folder();
    let embedded = start(folder.path()).await;
    let error = refusal(options(folder.path())).await;
    assert!(
        matches!(error, EmbeddedError::DataDirInUse { .. }),
        "{error}"
    );
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    connect(&embedded.owner_url()).await;
    embedded.stop().await.expect("it stops");
}

#[tokio::test]
async fn after_a_kill_of_remit_the_next_start_takes_over_with_all_data() {
    let folder = folder();
    let holder = Holder::start(folder.path()).await;
    let error = refusal(options(folder.path())).await;
    assert!(
        matches!(error, EmbeddedError::DataDirInUse { .. }),
        "{error}"
    );
    let dir = running_socket_dir(folder.path()).expect("it runs");
    write_rows(&format!(
        "postgres://remit@localhost:5432/remit?host={}",
        dir.display()
    ))
    .await;
    let left_behind = server_pid(folder.path()).expect("it runs");
    holder.kill();
    assert!(!is_gone(left_behind), "PostgreSQL outlives the process");

    let embedded = start(folder.path()).await;
    wait_until("the server that was left behind is gone", || {
        is_gone(left_behind)
    })
    .await;
    assert_eq!(rows(&embedded.owner_url()).await, 1000);
    embedded.stop().await.expect("it stops");
}

#[tokio::test]
async fn after_a_kill_of_postgresql_it_is_back_with_all_data_on_the_same_socket() {
    let folder = folder();
    let embedded = start(folder.path()).await;
    let url = embedded.owner_url();
    write_rows(&url).await;
    for _ in 0..3 {
        // A backend in the middle of a statement outlives its server for a while.
        let busy = connect(&url).await;
        let statement = tokio::spawn(async move {
            let mut busy = busy;
            sqlx::query("SELECT count(*) FROM generate_series(1, 2000000)")
                .execute(&mut busy)
                .await
        });
        let killed = server_pid(folder.path()).expect("it runs");
        kill(killed, Signal::SIGKILL).expect("it can be killed");
        wait_until("a new server has started", || {
            server_pid(folder.path()).is_some_and(|pid| pid != killed)
        })
        .await;
        assert_eq!(rows(&url).await, 1000);
        let _ = statement.await;
    }
    embedded.stop().await.expect("it stops");
}

#[tokio::test]
async fn after_a_kill_of_both_the_next_start_recovers_all_data() {
    let folder = folder();
    let holder = Holder::start(folder.path()).await;
    let dir = running_socket_dir(folder.path()).expect("it runs");
    write_rows(&format!(
        "postgres://remit@localhost:5432/remit?host={}",
        dir.display()
    ))
    .await;
    let server = server_pid(folder.path()).expect("it runs");
    holder.kill();
    kill(server, Signal::SIGKILL).expect("it can be killed");

    let embedded = start(folder.path()).await;
    assert_eq!(rows(&embedded.owner_url()).await, 1000);
    embedded.stop().await.expect("it stops");
}

#[tokio::test]
async fn a_stale_pid_file_that_names_another_process_does_not_stop_the_start() {
    let folder = folder();
    let embedded = start(folder.path()).await;
    write_rows(&embedded.owner_url()).await;
    let before = fs::read_to_string(pid_file(folder.path())).expect("it runs");
    embedded.stop().await.expect("it stops");

    // After a power cut the number can belong to any process of the same user.
    let mut command = Command::new("sleep");
    command.arg("600");
    if geteuid().is_root() {
        use std::os::unix::process::CommandExt;
        let cluster = fs::metadata(folder.path().join("pg")).expect("it is there");
        command.uid(cluster.uid()).gid(cluster.gid());
    }
    let mut other = command.spawn().expect("sleep can be started");
    let (_, rest) = before.split_once('\n').expect("it has lines");
    fs::write(pid_file(folder.path()), format!("{}\n{rest}", other.id())).expect("we may write");
    fs::set_permissions(pid_file(folder.path()), Permissions::from_mode(0o600)).expect("ours");
    let cluster = fs::metadata(folder.path().join("pg")).expect("it is there");
    std::os::unix::fs::chown(
        pid_file(folder.path()),
        Some(cluster.uid()),
        Some(cluster.gid()),
    )
    .expect("it is given to its owner");

    let embedded = start(folder.path()).await;
    assert_eq!(rows(&embedded.owner_url()).await, 1000);
    assert!(
        other.try_wait().expect("our own child").is_none(),
        "the other process was left alone"
    );
    embedded.stop().await.expect("it stops");
    other.kill().expect("our own child can be killed");
    other.wait().expect("our own child can be waited for");
}

#[tokio::test]
async fn an_unfinished_creation_does_not_count() {
    let folder = folder();
    let unfinished = folder.path().join("pg.new-4711");
    fs::create_dir(&unfinished).expect("we may write");
    fs::write(unfinished.join("PG_VERSION"), "15\n").expect("we may write");
    let embedded = start(folder.path()).await;
    assert!(!unfinished.exists());
    connect(&embedded.owner_url()).await;
    embedded.stop().await.expect("it stops");
}

#[tokio::test]
async fn dropping_it_stops_the_server() {
    let folder = folder();
    let embedded = start(folder.path()).await;
    let pid = server_pid(folder.path()).expect("it runs");
    drop(embedded);
    wait_until("the server is gone", || is_gone(pid)).await;
}

#[tokio::test]
async fn a_long_path_gets_a_socket_elsewhere_that_is_as_private() {
    let folder = folder();
    let data_dir = folder.path().join("x".repeat(120));
    let embedded = start(&data_dir).await;
    let socket_dir = embedded.socket_dir().to_path_buf();
    assert!(!socket_dir.starts_with(&data_dir));
    let mode = fs::metadata(&socket_dir).expect("it is there").mode();
    assert_eq!(mode & 0o777, 0o700);
    connect(&embedded.owner_url()).await;
    assert_eq!(running_socket_dir(&data_dir).as_deref(), Some(&*socket_dir));
    embedded.stop().await.expect("it stops");
    assert!(!socket_dir.exists());
}

#[tokio::test]
async fn a_path_with_odd_characters_works() {
    let folder = folder();
    let embedded = start(&folder.path().join("a b'%é")).await;
    connect(&embedded.service_url()).await;
    embedded.stop().await.expect("it stops");
}

#[tokio::test]
async fn a_given_folder_without_programs_is_refused_by_name() {
    let folder = folder();
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).expect("we may write");
    let error = refusal(EmbeddedOptions {
        data_dir: folder.path().join("data"),
        postgres_bin: Some(empty.clone()),
    })
    .await
    .to_string();
    assert!(error.contains("--postgres-bin"), "{error}");
    assert!(error.contains(&empty.display().to_string()), "{error}");
    assert!(error.contains("there is no postgres in it"), "{error}");
}

#[tokio::test]
async fn data_of_a_version_that_is_not_here_is_refused_by_version() {
    let folder = folder();
    let cluster = folder.path().join("pg");
    fs::create_dir(&cluster).expect("we may write");
    fs::write(cluster.join("PG_VERSION"), "9000\n").expect("we may write");
    let error = refusal(options(folder.path())).await.to_string();
    assert!(error.contains("written by PostgreSQL 9000"), "{error}");
    assert!(error.contains("--postgres-bin"), "{error}");
}

#[tokio::test]
async fn folders_with_other_data_are_refused() {
    let folder = folder();
    fs::create_dir(folder.path().join("pg")).expect("we may write");
    fs::write(folder.path().join("pg/letter"), "dear").expect("we may write");
    let error = refusal(options(folder.path())).await;
    assert!(matches!(error, EmbeddedError::Foreign { .. }), "{error}");
    fs::write(folder.path().join("PG_VERSION"), "15\n").expect("we may write");
    let error = refusal(options(folder.path())).await;
    assert!(matches!(error, EmbeddedError::Foreign { .. }), "{error}");
    assert!(folder.path().join("pg/letter").exists());
}

#[tokio::test]
async fn a_server_that_cannot_start_is_reported_with_its_log() {
    let folder = folder();
    start(folder.path()).await.stop().await.expect("it stops");
    fs::remove_file(folder.path().join("pg/global/pg_control")).expect("we may write");
    let error = refusal(options(folder.path())).await;
    assert!(matches!(error, EmbeddedError::Exited { .. }), "{error}");
    assert!(error.to_string().contains("pg_control"), "{error}");
}

/// Only root hands over to another account.
#[tokio::test]
async fn root_is_told_which_folder_the_account_cannot_pass() {
    if !geteuid().is_root() {
        return;
    }
    let closed = folder_of_mode(0o700);
    let data_dir = closed.path().join("deep/data");
    let error = refusal(options(&data_dir)).await;
    assert!(
        matches!(&error, EmbeddedError::Unreachable { blocked_at, .. } if blocked_at == closed.path()),
        "{error}"
    );
    assert!(!closed.path().join("deep").exists(), "nothing was made");
}

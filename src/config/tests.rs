use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser};

use super::*;

#[derive(Debug, Parser)]
#[command(name = "remit")]
struct Serve {
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Debug, Parser)]
#[command(name = "remit")]
struct Client {
    #[command(flatten)]
    client: ClientArgs,
}

/// Parses flags alone: the variables of whoever runs the tests don't count.
fn parsed<T: Parser>(flags: &[&str]) -> T {
    let all = std::iter::once("remit").chain(flags.iter().copied());
    T::command()
        .mut_args(|arg| arg.env(None::<&str>))
        .try_get_matches_from(all)
        .and_then(|mut matches| T::from_arg_matches_mut(&mut matches))
        .expect("clap takes any text")
}

fn serve(flags: &[&str]) -> Result<ServeConfig, ConfigErrors> {
    parsed::<Serve>(flags).serve.resolve()
}

fn client(flags: &[&str], key_variable: Option<&str>) -> Result<ClientConfig, ConfigErrors> {
    parsed::<Client>(flags)
        .client
        .resolve_with(key_variable.map(Into::into))
}

fn mistakes<T: fmt::Debug>(result: Result<T, ConfigErrors>) -> String {
    result.expect_err("a mistake").to_string()
}

/// The path of an empty file.
fn file(folder: &tempfile::TempDir, name: &str, content: &str) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, content).expect("a file");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn without_settings_everything_has_its_default() {
    let config = serve(&[]).expect("defaults");
    let expected = ServeConfig {
        listen: Some(([127, 0, 0, 1], 50_051).into()),
        socket: None,
        port_file: None,
        cycles_listen: Some("127.0.0.1:7878".parse().expect("an address")),
        cycles_port_file: None,
        cycles_admin_listen: Some("127.0.0.1:7979".parse().expect("an address")),
        cycles_admin_port_file: None,
        metrics_listen: None,
        metrics_port_file: None,
        database: Database::Embedded {
            data_dir: None,
            postgres_bin: None,
        },
        bootstrap_key_file: None,
        migrate: true,
        reflection: true,
        webhooks_allow_private: false,
        tls: None,
        limits: Limits {
            default_deadline: Duration::from_secs(10),
            max_deadline: Duration::from_secs(30),
            max_message_bytes: 1_048_576,
            max_provision_bytes: 8_388_608,
            max_concurrent_requests: 4_096,
            max_streams_per_connection: 1_024,
        },
        engine: EngineLimits {
            lanes: 2,
            max_batch: 512,
            max_waiting: 8_192,
            max_waiting_per_tenant: 4_096,
            sweep_interval: Duration::from_secs(1),
        },
        drain: Drain {
            delay: Duration::ZERO,
            timeout: Duration::from_secs(10),
        },
        log: LogConfig {
            format: LogFormat::Text,
            filter: "info".to_owned(),
        },
    };
    assert_eq!(config, expected);
}

#[test]
fn one_run_reports_every_mistake_with_flag_variable_and_what_is_wanted() {
    let text = mistakes(serve(&[
        "--listen=localhost:50051",
        "--socket=",
        "--database-url=mysql://root:hunter2@db/remit",
        "--data-dir=/var/lib/remit",
        "--tls-key=/does/not/exist.pem",
        "--insecure=perhaps",
        "--lanes=65",
        "--max-batch=-1",
        "--max-waiting=many",
        "--default-deadline=10",
        "--max-message-bytes=1MB",
        "--drain-timeout=11m",
        "--log-format=xml",
        "--log=inof",
    ]));
    let expected = [
        "--listen (REMIT_LISTEN) is \"localhost:50051\", want a numeric address with a port, such \
         as 127.0.0.1:50051 or [::]:50051, or `none`",
        "--socket (REMIT_SOCKET) is empty, want a path; without one, leave the setting out",
        "--database-url (REMIT_DATABASE_URL) is not a URL such as \
         postgres://remit:secret@db:5432/remit",
        "--data-dir (REMIT_DATA_DIR) is for Remit's own PostgreSQL and means nothing with \
         --database-url: leave one out",
        "--tls-key (REMIT_TLS_KEY) is \"/does/not/exist.pem\", want a file that can be read: No \
         such file or directory (os error 2)",
        "--tls-cert (REMIT_TLS_CERT) is needed with --tls-key",
        "--default-deadline (REMIT_DEFAULT_DEADLINE) is \"10\", want a duration with its unit such \
         as 500ms, 10s or 2m, from 1ms to 1h",
        "--max-message-bytes (REMIT_MAX_MESSAGE_BYTES) is \"1MB\", want a size such as 1048576, \
         512KiB or 8MiB, from 1024 to 67108864 bytes",
        "--lanes (REMIT_LANES) is \"65\", want a whole number from 1 to 64",
        "--max-batch (REMIT_MAX_BATCH) is \"-1\", want a whole number from 1 to 1024",
        "--max-waiting (REMIT_MAX_WAITING) is \"many\", want a whole number from 1 to 1000000",
        "--drain-timeout (REMIT_DRAIN_TIMEOUT) is \"11m\", want a duration with its unit such as \
         500ms, 10s or 2m, from 0s to 10m",
        "--log-format (REMIT_LOG_FORMAT) is \"xml\", want text or json",
        "--log (REMIT_LOG) is \"inof\", want a level (error, warn, info, debug, trace, off), or a \
         list such as `info,remit::request=warn`",
        "--insecure (REMIT_INSECURE) is \"perhaps\", want true or false",
    ];
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn no_secret_is_ever_displayed() {
    let secret = "hunter2";
    for url in [
        "postgres://remit:hunter2@db:5432/remit",
        "postgres://remit:hunter2@db",
        "postgresql://hunter2:hunter2@db/remit?password=hunter2",
        "postgres://remit:hunter2/x@db/remit",
        "postgres://remit:1?hunter2@db/remit",
        "postgres://remit:1/hunter2@db/remit",
        "postgres://remit:1/2?hunter2@db/remit",
        "postgres://remit:1#hunter2@db/remit",
        "postgres://remit:1@hunter2@db/remit",
        "postgres://remit:hunter2 @db/remit",
        "postgres:remit:hunter2@db/remit",
        "mysql://remit:hunter2@db/remit",
        "user=remit password=hunter2",
        "remit:hunter2",
    ] {
        let flag = format!("--database-url={url}");
        let flags = parsed::<Serve>(&[&flag]);
        assert!(!format!("{flags:?}").contains(secret), "{url}");
        match serve(&[&flag]) {
            Ok(config) => {
                let Database::Url(parsed) = &config.database else {
                    panic!("{url} was lost");
                };
                assert_eq!(parsed.expose(), url);
                // As a user's name it may be shown.
                let shown = format!("{parsed} {config:?}").replace("://hunter2:***", "");
                assert!(!shown.contains(secret), "{shown}");
            }
            Err(e) => assert!(!format!("{e} {e:?}").contains(secret), "{e}"),
        }
    }

    // Put into the wrong place.
    for flag in [
        "--listen=postgres://remit:hunter2@db/remit",
        "--port-file=",
        "--postgres-bin=rmt_id_hunter2",
        "--log=password=hunter2,=",
        "--tls-cert=rmt_id_hunter2",
    ] {
        assert!(!mistakes(serve(&[flag])).contains(secret), "{flag}");
    }
    for flag in [
        "--key-file=rmt_id_hunter2",
        "--target=http://remit:hunter2@localhost:50051",
    ] {
        assert!(!mistakes(client(&[flag], None)).contains(secret), "{flag}");
    }
    let config = client(&[], Some("rmt_id_hunter2")).expect("a key");
    assert!(!format!("{config:?}").contains(secret));
    assert!(!mistakes(client(&[], Some("hunter2"))).contains(secret));
}

#[test]
fn the_help_names_each_variable_and_shows_no_secret_of_the_environment() {
    for mut command in [Serve::command(), Client::command()] {
        for arg in command.get_arguments().filter(|a| a.get_id() != "help") {
            let name = arg.get_long().expect("a flag");
            let variable = format!("REMIT_{}", name.replace('-', "_").to_uppercase());
            assert_eq!(arg.get_env().and_then(|v| v.to_str()), Some(&*variable));
            assert!(arg.get_help().is_some(), "--{name} has no help");
        }
        let hidden = |a: &&clap::Arg| a.get_long() == Some("database-url");
        if let Some(url) = command.get_arguments().find(hidden) {
            assert!(url.is_hide_env_values_set());
        }
        command.build();
    }
    let help = Serve::try_parse_from(["remit", "--help"]).expect_err("the help");
    assert_eq!(help.kind(), ErrorKind::DisplayHelp);
}

#[test]
fn a_database_urls_host_and_name_are_shown() {
    for (url, shown) in [
        (
            "postgres://remit:pw@db:5432/remit?sslmode=require",
            "postgres://remit:***@db:5432/remit",
        ),
        (
            "postgres://remit@[::1]:5432/remit",
            "postgres://remit@[::1]:5432/remit",
        ),
        (
            "postgresql:///remit?host=/run/postgresql",
            "postgresql:///remit",
        ),
        ("postgres://db", "postgres://db"),
    ] {
        let parsed = DatabaseUrl::parse(url).expect(url);
        assert_eq!(parsed.to_string(), shown);
        assert_eq!(parsed.expose(), url);
    }
    for bad in [
        "",
        "db",
        "postgres://",
        "postgres://db:port/remit",
        "http://db/remit",
    ] {
        // An empty location leaves everything to the system's defaults.
        assert_eq!(
            DatabaseUrl::parse(bad).is_ok(),
            bad == "postgres://",
            "{bad}"
        );
    }
}

#[test]
fn plaintext_beyond_loopback_has_to_be_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let cert = format!("--tls-cert={}", file(&folder, "cert.pem", ""));
    let key = format!("--tls-key={}", file(&folder, "key.pem", ""));

    for open in [
        "0.0.0.0:0",
        "[::]:0",
        "10.0.0.1:50051",
        "[::ffff:10.0.0.1]:1",
    ] {
        let listen = format!("--listen={open}");
        assert!(mistakes(serve(&[&listen])).contains("there is no TLS"));
        serve(&[&listen, "--insecure"]).expect("asked for");
        let config = serve(&[&listen, &cert, &key]).expect("TLS");
        assert!(config.tls.is_some());
    }
    for closed in ["127.0.0.2:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
        serve(&[&format!("--listen={closed}")]).expect("loopback");
    }
    assert!(serve(&["--listen=0.0.0.0:0", "--insecure=false"]).is_err());
}

#[test]
fn settings_that_need_each_other_are_checked_together() {
    let folder = tempfile::tempdir().expect("a folder");
    let pem = file(&folder, "some.pem", "");
    for (flags, said) in [
        (
            vec!["--listen=none".to_owned()],
            "--socket (REMIT_SOCKET) is needed",
        ),
        (
            vec![format!("--tls-cert={pem}")],
            "--tls-key (REMIT_TLS_KEY) is needed",
        ),
        (
            vec![format!("--tls-key={pem}")],
            "--tls-cert (REMIT_TLS_CERT) is needed",
        ),
        (
            vec![format!("--tls-client-ca={pem}")],
            "needs --tls-cert and --tls-key",
        ),
        (
            vec![
                "--listen=none".into(),
                "--socket=/s".into(),
                "--port-file=/p".into(),
            ],
            "--port-file (REMIT_PORT_FILE) means nothing",
        ),
        (
            vec!["--max-deadline=5s".to_owned()],
            "--default-deadline (REMIT_DEFAULT_DEADLINE) 10s is longer than --max-deadline, 5s",
        ),
        (
            vec![
                "--database-url=postgres://db/x".into(),
                "--postgres-bin=/usr".into(),
            ],
            "--postgres-bin (REMIT_POSTGRES_BIN) is for Remit's own PostgreSQL",
        ),
        (
            vec![format!("--socket=/{}", "x".repeat(103))],
            "is a path of 104 bytes",
        ),
    ] {
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let text = mistakes(serve(&flags));
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains(said), "{text}");
    }
    let config = serve(&["--listen=none", "--socket=/run/remit.sock"]).expect("a socket");
    assert_eq!((config.listen, config.tls), (None, None));
}

#[test]
fn durations_sizes_and_switches_are_read_with_their_units() {
    let config = serve(&[
        "--default-deadline=500ms",
        "--max-deadline=2m",
        "--max-message-bytes=512KiB",
        "--max-provision-bytes=65536",
        "--no-migrate",
        "--no-reflection=false",
        "--log=info,remit::request=warn",
    ])
    .expect("settings");
    assert_eq!(config.limits.default_deadline, Duration::from_millis(500));
    assert_eq!(config.limits.max_deadline, Duration::from_secs(120));
    assert_eq!(config.limits.max_message_bytes, 524_288);
    assert_eq!(config.limits.max_provision_bytes, 65_536);
    assert!(!config.migrate);
    assert!(config.reflection);
    for wrong in [
        "+5s",
        "1.5s",
        "5 s",
        "s",
        "",
        "99999999999999999999h",
        "-1s",
    ] {
        assert!(
            serve(&[&format!("--drain-delay={wrong}")]).is_err(),
            "{wrong}"
        );
    }
    for wrong in ["+1024", "1mib", "1 MiB", "99999999999999999MiB", "", "1023"] {
        assert!(
            serve(&[&format!("--max-message-bytes={wrong}")]).is_err(),
            "{wrong}"
        );
    }
}

#[test]
fn targets_are_tcp_addresses_or_unix_sockets() {
    let target = |text: &str| client(&[&format!("--target={text}")], None).map(|c| c.target);
    for good in [
        "http://127.0.0.1:50051",
        "https://remit.example:443/",
        "http://[::1]:1",
    ] {
        let uri = good.parse().expect("a URI");
        assert_eq!(target(good).expect(good), Target::Tcp(uri));
    }
    for good in ["unix:/run/remit.sock", "unix:///run/remit.sock"] {
        assert_eq!(
            target(good).expect(good),
            Target::Unix("/run/remit.sock".into())
        );
    }
    for bad in [
        "",
        "localhost:50051",
        "ftp://x",
        "http://",
        "http://x/path",
        "http://x?q",
        "unix:",
    ] {
        assert!(target(bad).is_err(), "{bad}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let ca = format!("--ca-cert={}", file(&folder, "ca.pem", ""));
    assert!(mistakes(client(&[&ca], None)).contains("means nothing without"));
    client(&[&ca, "--target=https://localhost:1"], None).expect("a CA");
}

#[test]
fn the_key_comes_from_its_file_before_the_variable() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = format!("--key-file={}", file(&folder, "good", "rmt_a_b\n"));
    let config = client(&[&good], Some("rmt_c_d")).expect("a key");
    assert_eq!(config.api_key.expect("a key").expose(), "rmt_a_b");
    let config = client(&[], Some("rmt_c_d")).expect("a key");
    assert_eq!(config.api_key.expect("a key").expose(), "rmt_c_d");
    assert_eq!(client(&[], None).expect("no key").api_key, None);

    let empty = format!("--key-file={}", file(&folder, "empty", ""));
    assert!(mistakes(client(&[&empty], None)).contains("without a key in it"));
    let missing = "--key-file=/does/not/exist";
    assert!(mistakes(client(&[missing], None)).contains("No such file"));
}

#[test]
fn mistakes_of_two_groups_are_joined() {
    let wrong = |flag| Err::<(), _>(client(&[flag], None).expect_err("a mistake"));
    let joined = both(wrong("--target=x"), wrong("--target=y")).expect_err("both");
    assert_eq!(joined.lines().len(), 2);
    assert!(both(Ok(1), wrong("--target=y")).is_err());
    assert_eq!(both(Ok(1), Ok(2)), Ok((1, 2)));
}

//! The commands of `remit`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

use crate::approvals::{self, ApprovalsCommand};
use crate::archive;
use crate::bench::{self, BenchArgs};
use crate::client::{self, Bearer, failed};
use crate::config::{
    ClientArgs, ClientConfig, ConfigErrors, Database, DatabaseArgs, LogArgs, ServeArgs, both,
};
use crate::domain::id::TenantId;
use crate::proto;
use crate::proto::provisioning_client::ProvisioningClient;
use crate::server::{self, Opened};
use crate::store::embedded::{default_data_dir, owner_url_at, running_socket_dir};
use crate::store::{Month, Store};
use crate::subscriptions::{self, WebhooksCommand};
use crate::{explain, policy, telemetry};

/// A mistake in flags or variables (`EX_USAGE` of sysexits).
const EXIT_USAGE: u8 = 64;

/// Decides, before it happens, whether an agent's action may happen now.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Starts the server. Without --database-url it runs its own PostgreSQL in --data-dir.
    Serve(Box<ServeArgs>),
    /// Brings a database to the schema that this version needs. Safe to run again.
    Migrate(MigrateArgs),
    /// Applies a file of tenants, budgets, tools and policies to a running server: all of it,
    /// or nothing.
    Provision(ProvisionArgs),
    /// Tries a policy: on cases of its own, or on what a server has recorded.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Shows what waits for a person, and decides it.
    #[command(subcommand)]
    Approvals(ApprovalsCommand),
    /// Tells other systems what happens.
    #[command(subcommand)]
    Webhooks(WebhooksCommand),
    /// Prints a decision for a person: what it went by, why, and what would have been needed.
    Explain(ExplainArgs),
    /// Recomputes every ledger's hash chain and balances, and names the first difference.
    ///
    /// Exits with 1 when something differs. Reads the database itself, so that it needs no
    /// trust in the server.
    Verify(VerifyArgs),
    /// Moves old months of the ledger into files that verify by themselves and with what is
    /// left. For the owner of the schema.
    Archive(ArchiveArgs),
    /// Asks a server whether it is ready. Exits with 0 when it is, else with 1.
    Healthcheck(HealthcheckArgs),
    /// Measures a server under load, its own or a running one, and checks its books after.
    Bench(Box<BenchArgs>),
}

#[derive(Debug, clap::Args)]
struct MigrateArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, clap::Args)]
struct ProvisionArgs {
    /// The document: YAML (or JSON) with the fields of remit.v1.ProvisionRequest.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Only print what would change.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Decides a file of cases offline, and compares with what each wants.
    ///
    /// Exits with 1 when one is decided otherwise. Asks no server.
    Test(PolicyTestArgs),
    /// Lists which recorded decisions a document's policies would have changed, and why.
    /// Writes nothing.
    Replay(PolicyReplayArgs),
}

#[derive(Debug, clap::Args)]
struct PolicyTestArgs {
    /// The cases: YAML with `document`, the file that they are decided under, and `cases`.
    file: PathBuf,
}

#[derive(Debug, clap::Args)]
struct PolicyReplayArgs {
    /// The document, as for `remit provision`; only its policies are taken.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// From this time on, or from so long ago: `2026-08-01T00:00:00Z`, `24h`, `7d`.
    #[arg(long, value_name = "TIME")]
    since: String,
    /// Before this time, or so long ago. Default: now.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Whose decisions. Needed for the policy for all tenants.
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
struct ExplainArgs {
    /// The decision: `<tenant>/<ledger sequence>`, as answers call it.
    decision_id: String,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
struct VerifyArgs {
    /// Only this tenant's ledger. Default: every one, and the operators' own (_remit).
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    /// Folder with all archives, to verify every chain from its first entry on. Default:
    /// from where it was archived up to.
    #[arg(long, value_name = "PATH")]
    archive: Option<PathBuf>,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, clap::Args)]
struct ArchiveArgs {
    /// Archive the months before this one. It has to be a month before the current one that
    /// began at least 30 days ago: what is younger stays, for retries of its requests.
    #[arg(long, value_name = "YYYY-MM")]
    before: String,
    /// Folder for the files, one a month.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Drop the tables of archived months in place of leaving them detached.
    #[arg(long)]
    drop: bool,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, clap::Args)]
struct HealthcheckArgs {
    #[command(flatten)]
    client: ClientArgs,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            if let Some(errors) = error.downcast_ref::<ConfigErrors>() {
                eprintln!("{errors}");
                return ExitCode::from(EXIT_USAGE);
            }
            eprintln!("remit: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    match command {
        Command::Serve(args) => {
            let config = args.resolve()?;
            telemetry::init(&config.log)?;
            let served = runtime.block_on(async {
                let signals = Signals::listen()?;
                server::serve(config, signals.first_then_exit()).await
            });
            served.map(|()| ExitCode::SUCCESS)
        }
        Command::Migrate(args) => {
            let (database, log) = both(args.database.resolve(), args.log.resolve())?;
            telemetry::init(&log)?;
            runtime.block_on(migrate(&database))
        }
        Command::Provision(args) => {
            let client = args.client.resolve()?;
            runtime.block_on(provision(&args.file, args.dry_run, client))
        }
        Command::Policy(PolicyCommand::Test(args)) => policy::test(&args.file),
        Command::Policy(PolicyCommand::Replay(args)) => {
            let client = args.client.resolve()?;
            let what = policy::Since {
                tenant: args.tenant,
                since: args.since,
                until: args.until,
            };
            runtime.block_on(policy::replay(&args.file, what, client))
        }
        Command::Approvals(command) => runtime.block_on(approvals::run(command)),
        Command::Webhooks(command) => runtime.block_on(subscriptions::run(command)),
        Command::Explain(args) => {
            let client = args.client.resolve()?;
            runtime.block_on(explain::explain(&args.decision_id, client))
        }
        Command::Verify(args) => {
            let (database, log) = both(args.database.resolve(), args.log.resolve())?;
            telemetry::init(&log)?;
            let (tenant, archive) = (args.tenant.as_deref(), args.archive.as_deref());
            runtime.block_on(at_owner_url(&database, async |url| {
                verify_at(&url, tenant, archive).await
            }))
        }
        Command::Archive(args) => {
            let (database, log) = both(args.database.resolve(), args.log.resolve())?;
            telemetry::init(&log)?;
            let before = month_to_archive(&args.before, jiff::Timestamp::now())?;
            runtime.block_on(at_owner_url(&database, async |url| {
                let store = Store::new(&url, 1)?;
                store.check().await?;
                archive::archive(&store, before, &args.out, args.drop).await?;
                store.close().await;
                Ok(ExitCode::SUCCESS)
            }))
        }
        Command::Healthcheck(args) => {
            let client = args.client.resolve()?;
            runtime.block_on(healthcheck(client))
        }
        Command::Bench(args) => runtime.block_on(async {
            tokio::select! {
                done = bench::run(*args) => done,
                _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
            }
        }),
    }
}

/// The signals that ask a server to stop.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Returns at the first signal; the second one ends the process at once.
    async fn first_then_exit(mut self) {
        self.next().await;
        tokio::spawn(async move {
            self.next().await;
            eprintln!("remit: second signal: ending at once");
            std::process::exit(130);
        });
    }
}

async fn migrate(database: &Database) -> anyhow::Result<ExitCode> {
    let opened = Opened::open(database).await?;
    let migrated = opened.migrate().await;
    opened.close().await?;
    match migrated?.as_slice() {
        [] => println!("the schema is up to date"),
        applied => println!("applied migrations: {applied:?}"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Does something as the database's owner. An embedded database is started for it, unless
/// a server has it running.
async fn at_owner_url(
    database: &Database,
    work: impl AsyncFnOnce(String) -> anyhow::Result<ExitCode>,
) -> anyhow::Result<ExitCode> {
    let running = match database {
        Database::Embedded { data_dir, .. } => {
            running_socket_dir(&data_dir.clone().unwrap_or_else(default_data_dir))
        }
        Database::Url(_) => None,
    };
    if let Some(socket_dir) = running {
        return work(owner_url_at(&socket_dir)).await;
    }
    let opened = Opened::open(database).await?;
    let done = work(opened.owner_url.clone()).await;
    opened.close().await?;
    done
}

/// For so long answers are kept where a repeated key finds them.
const KEPT: jiff::SignedDuration = jiff::SignedDuration::from_hours(30 * 24);

/// The month up to which may be archived.
fn month_to_archive(text: &str, now: jiff::Timestamp) -> anyhow::Result<Month> {
    let before = Month::parse(text).context("--before must be a month, such as 2026-08")?;
    anyhow::ensure!(
        before < Month::of(now.as_microsecond())?,
        "--before must be a month before the current one: the last whole month stays"
    );
    let kept_from = now.checked_sub(KEPT)?;
    anyhow::ensure!(
        before.start()? <= kept_from.as_microsecond(),
        "--before {text} would archive entries of the last 30 days, which requests may still \
         repeat: that month has to have begun 30 days ago"
    );
    Ok(before)
}

async fn verify_at(
    url: &str,
    tenant: Option<&str>,
    archive: Option<&Path>,
) -> anyhow::Result<ExitCode> {
    let archived = archive.map(archive::read).transpose()?;
    let store = Store::new(url, 1)?;
    let chains = match tenant {
        Some(name) => vec![TenantId::from_stored(name).context("--tenant")?],
        None => store.chains().await?,
    };
    let mut intact = true;
    for chain in chains {
        if let Some(archived) = &archived
            && archived.get(&chain) != store.checkpoint(&chain).await?.as_ref()
        {
            intact = false;
            println!("{chain}: BROKEN: the archive does not end where the database begins");
            continue;
        }
        let report = store
            .verify(&chain)
            .await?
            .with_context(|| format!("no such tenant: {chain}"))?;
        let before = match (report.archived, &archived) {
            (0, _) => String::new(),
            (before, Some(_)) => format!(" ({before} of them archived)"),
            (before, None) => format!(" ({before} of them archived and not read)"),
        };
        match report.problem {
            None => println!(
                "{chain}: intact, {} entries{before}, last hash {}",
                report.entries,
                hex::encode(report.last.hash.0)
            ),
            Some(problem) => {
                intact = false;
                match problem.seq {
                    Some(seq) => println!("{chain}: BROKEN at entry {seq}: {}", problem.text),
                    None => println!("{chain}: BROKEN: {}", problem.text),
                }
            }
        }
    }
    store.close().await;
    Ok(if intact {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn provision(
    file: &std::path::Path,
    dry_run: bool,
    client: ClientConfig,
) -> anyhow::Result<ExitCode> {
    let mut document = policy::read_document(file)?;
    document.validate_only |= dry_run;
    if document.idempotency_key.is_empty() {
        document.idempotency_key = uuid::Uuid::now_v7().to_string();
    }
    let key = client
        .api_key
        .as_ref()
        .context("an operator's key is needed: --key-file, or REMIT_API_KEY")?;
    let channel = client::connect(&client).await?;
    let mut provisioning = ProvisioningClient::with_interceptor(channel, Bearer::new(key)?);
    let answer = provisioning.provision(document).await.map_err(failed)?;
    let answer = answer.into_inner();
    print_plan(&answer);
    Ok(ExitCode::SUCCESS)
}

fn print_plan(answer: &proto::ProvisionResponse) {
    for change in &answer.changes {
        let mark = match change.kind() {
            proto::ChangeKind::Created => '+',
            proto::ChangeKind::Changed => '~',
            proto::ChangeKind::Removed => '-',
            proto::ChangeKind::Unchanged | proto::ChangeKind::Unspecified => '=',
        };
        println!("{mark} {}", change.target);
        for detail in &change.details {
            println!("    {detail}");
        }
    }
    let count = |kind| answer.changes.iter().filter(|c| c.kind() == kind).count();
    println!(
        "{}: {} created, {} changed, {} removed, {} unchanged",
        if answer.applied { "applied" } else { "plan" },
        count(proto::ChangeKind::Created),
        count(proto::ChangeKind::Changed),
        count(proto::ChangeKind::Removed),
        count(proto::ChangeKind::Unchanged),
    );
}

async fn healthcheck(client: ClientConfig) -> anyhow::Result<ExitCode> {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    let check = async {
        let channel = client::connect(&client).await?;
        let request = HealthCheckRequest {
            service: String::new(),
        };
        let answer = HealthClient::new(channel).check(request).await;
        anyhow::Ok(answer.map_err(failed)?.into_inner().status())
    };
    let status = tokio::time::timeout(std::time::Duration::from_secs(3), check)
        .await
        .context("no answer within 3 s")??;
    println!("{}", status.as_str_name());
    Ok(if status == ServingStatus::Serving {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_younger_than_thirty_days_is_archived() {
        let at = |now: &str| now.parse::<jiff::Timestamp>().expect("a time");
        let allowed = |before, now| month_to_archive(before, at(now)).is_ok();
        assert!(allowed("2027-01", "2027-03-01T00:00:00Z"));
        assert!(!allowed("2027-02", "2027-03-01T00:00:00Z"), "28 days");
        assert!(!allowed("2027-02", "2027-03-02T23:59:59Z"));
        assert!(allowed("2027-02", "2027-03-03T00:00:00Z"));
        assert!(allowed("2026-12", "2027-01-01T00:00:00Z"), "31 days");
        assert!(
            !allowed("2027-01", "2027-01-31T12:00:00Z"),
            "the current one"
        );
        let refused = month_to_archive("2027-02", at("2027-03-01T00:00:00Z"));
        let text = refused.expect_err("28 days").to_string();
        assert!(text.contains("the last 30 days"), "{text}");
    }
}

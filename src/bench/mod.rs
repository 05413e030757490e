//! `remit bench`: a closed-loop load program, by gRPC and through the gateway. It measures a server as its
//! callers see it, counts the processor time of all who take part, and afterwards
//! checks that every balance and every chain agrees with the answers it was given.
//!
//! Without `--target` it starts a PostgreSQL and servers of its own, as processes,
//! with `remit serve`. How the figures are meant stands in `docs/performance.md`.

#![expect(
    clippy::float_arithmetic,
    reason = "figures for people; no amount of any budget is computed here"
)]

mod fill;
mod gateway;
mod load;
mod remote;
mod report;
mod rig;
mod scenario;
mod usage;
mod world;

use std::process::ExitCode;

use crate::config::{LogConfig, LogFormat};
use crate::telemetry;

pub(crate) use args::BenchArgs;

/// Measures what the settings say. Fails on any sum or chain that is not as the
/// answers say.
pub(crate) async fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    telemetry::init(&LogConfig {
        format: LogFormat::Text,
        filter: "warn".into(),
    })?;
    scenario::run(&args).await?;
    Ok(ExitCode::SUCCESS)
}

mod args {
    use std::path::PathBuf;

    use anyhow::ensure;

    use super::load::Mix;
    use super::scenario::Scenario;
    use crate::config::{ClientArgs, ClientConfig};

    /// Settings of `remit bench`.
    #[derive(Debug, Clone, clap::Args)]
    pub(crate) struct BenchArgs {
        /// What to measure.
        #[arg(long, value_enum, default_value = "run")]
        pub(super) scenario: Scenario,
        /// A running server to measure in place of one's own: `http://HOST:PORT`,
        /// `https://HOST:PORT` or `unix:PATH`. Makes tenants there, named bench-*, and
        /// leaves them.
        #[arg(long, value_name = "TARGET")]
        pub(super) target: Option<String>,
        /// With --target: file with an operator's key. Default: the key itself from the
        /// variable REMIT_API_KEY.
        #[arg(long, value_name = "PATH", requires = "target")]
        pub(super) key_file: Option<PathBuf>,
        /// With --target: certificates (PEM) of which one must have signed the server's.
        #[arg(long, value_name = "PATH", requires = "target")]
        pub(super) ca_cert: Option<PathBuf>,
        /// Callers at the same time, each with one call in work.
        #[arg(long, default_value = "64", value_parser = clap::value_parser!(u32).range(1..=100_000))]
        pub(super) clients: u32,
        /// Tenants that the callers choose from at random. 1: one hot chain.
        #[arg(long, default_value = "1", value_parser = clap::value_parser!(u32).range(1..=100_000))]
        pub(super) tenants: u32,
        /// Budgets that each action is held on.
        #[arg(long, default_value = "6", value_parser = clap::value_parser!(u8).range(1..=6))]
        pub(super) depth: u8,
        /// What a caller does over and over.
        #[arg(long, value_enum, default_value = "reserve-commit")]
        pub(super) mix: Mix,
        /// How long to measure.
        #[arg(long, default_value = "10", value_parser = clap::value_parser!(u64).range(1..=86_400))]
        pub(super) seconds: u64,
        /// How long to run before that.
        #[arg(long, default_value = "2", value_parser = clap::value_parser!(u64).range(0..=3_600))]
        pub(super) warmup: u64,
        /// HTTP/2 connections that the callers share.
        #[arg(long, default_value = "8", value_parser = clap::value_parser!(u32).range(1..=1_000))]
        pub(super) connections: u32,
        /// Begin this many pairs a second whatever the answers, instead of one after
        /// the other. Default: closed loop.
        #[arg(long)]
        pub(super) rate: Option<u32>,
        /// Server processes on the one database.
        #[arg(long, default_value = "1", value_parser = clap::value_parser!(u32).range(1..=16))]
        pub(super) processes: u32,
        /// Most commands of one batch; 1 is what a server without batches does.
        #[arg(long, default_value = "512", value_parser = clap::value_parser!(u32).range(1..=1_024))]
        pub(super) max_batch: u32,
        /// Lanes of each server.
        #[arg(long, default_value = "2", value_parser = clap::value_parser!(u32).range(1..=64))]
        pub(super) lanes: u32,
        /// How often each row of a scenario is measured; the median is shown.
        #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..=100))]
        pub(super) rounds: u32,
        /// Ledger entries to put into the database first.
        #[arg(long, default_value = "0")]
        pub(super) fill_entries: u64,
        /// Tenants to spread them over, beside the hot one, which gets half.
        #[arg(long, default_value = "0")]
        pub(super) fill_tenants: u32,
        /// Measure a new database as it is: its first files of write-ahead log and pages of
        /// shared memory are then made inside somebody's commit.
        #[arg(long)]
        pub(super) unprepared: bool,
        /// Print a JSON object for each row.
        #[arg(long)]
        pub(super) json: bool,
        /// Folder for the database. Default: one in this folder, removed at the end.
        #[arg(long)]
        pub(super) data_dir: Option<PathBuf>,
    }
    impl BenchArgs {
        /// The server to measure, if it is not to be one's own.
        pub(super) fn client(&self) -> anyhow::Result<Option<ClientConfig>> {
            let Some(target) = &self.target else {
                return Ok(None);
            };
            ensure!(
                self.scenario == Scenario::Run,
                "--scenario needs servers of its own: leave --target out"
            );
            let path = |path: &Option<PathBuf>| path.clone().map(PathBuf::into_os_string);
            let args = ClientArgs::new(target.into(), path(&self.key_file), path(&self.ca_cert));
            Ok(Some(args.resolve()?))
        }
    }
}

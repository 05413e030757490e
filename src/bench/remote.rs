//! Load on a server that runs already, seen from outside alone.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;

use super::args::BenchArgs;
use super::load::{self, Door};
use super::report::{Printer, Row};
use super::usage;
use super::world::{self, Chains};
use crate::client::{connect, failed};
use crate::config::ClientConfig;
use crate::proto::VerifyLedgerRequest;
use crate::proto::ledger_client::LedgerClient;

/// Chains as their server verifies them.
struct Asked {
    channel: Channel,
    operator: MetadataValue<Ascii>,
}

impl Chains for Asked {
    async fn entries(&self, tenant: &str) -> anyhow::Result<u64> {
        let asked = VerifyLedgerRequest {
            tenant: tenant.to_owned(),
        };
        let mut ledger = LedgerClient::new(self.channel.clone());
        let verified = ledger.verify_ledger(world::request(&self.operator, asked));
        let report = verified.await.map_err(failed)?.into_inner();
        ensure!(report.intact, "{tenant}: {}", report.problem);
        Ok(u64::try_from(report.entries)?)
    }
}

/// One row. The tenants that are made for it stay behind, under names of their own.
pub(super) async fn run(args: &BenchArgs, client: &ClientConfig) -> anyhow::Result<()> {
    let key = client.api_key.as_ref().context(
        "an operator's key is needed to provision tenants: --key-file or the variable REMIT_API_KEY",
    )?;
    let operator = world::bearer(key.expose())?;
    let mut channels = Vec::new();
    for _ in 0..args.connections.min(args.clients) {
        channels.push(connect(client).await?);
    }
    let channel = channels.first().context("a connection")?.clone();
    let run = uuid::Uuid::now_v7().simple().to_string();
    let names: Vec<String> = (0..args.tenants)
        .map(|number| format!("bench-{run}-{}", world::name(number)))
        .collect();
    let denied = args.mix == load::Mix::Denied;
    let mut tenants = world::prepare(&channel, &operator, &names, args.depth, denied).await?;
    let chains = Asked {
        channel: channel.clone(),
        operator,
    };
    for tenant in &mut tenants {
        tenant.note(&channel, &chains).await?;
    }
    let tenants: Vec<_> = tenants.into_iter().map(Arc::new).collect();

    let printer = Printer { json: args.json };
    printer.heading();
    let load = load::Load {
        rate: args.rate,
        ..args.load(args.clients as usize)
    };
    let begun = async || (usage::read(&[], None), Instant::now());
    let ended = async |(before, at): (usage::Usage, Instant)| {
        (usage::read(&[], None).since(before), at.elapsed())
    };
    let (tally, (used, took)) =
        load::run(load, Door::Grpc(channels), tenants.clone(), begun, ended).await?;
    let mut row = Row::of(args.what(), &load, tenants.len(), took, &tally)?;
    row.cpu_load = used.load.as_secs_f64();
    row.cpu_others = used.others().as_secs_f64();
    for tenant in &tenants {
        tenant.check(&channel, &chains).await?;
    }
    printer.row(&row)?;
    printer.say(&row.details());
    printer.say(&format!(
        "checked: sums and {} chains, as the server verifies them. The tenants bench-{run}-* stay behind.",
        tenants.len()
    ));
    Ok(())
}

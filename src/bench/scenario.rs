//! What is measured, in which order.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::ValueEnum as _;
use tonic::transport::Channel;

use super::args::BenchArgs;
use super::fill;
use super::gateway::Gateway;
use super::load::{self, Door, Load, Mix, REFUSED};
use super::remote;
use super::report::{Printer, Row};
use super::rig::{Rig, Settings};
use super::usage::resident_mib;
use super::world::{self, Chains, Loaded};
use crate::domain::id::TenantId;
use crate::store::Store;

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Scenario {
    /// One row, as the other settings say.
    Run,
    /// The standard table: 1, 8, 64 and 256 callers, on one hot chain and on 1,000
    /// tenants, with batches and limited to batches of one, interleaved; and the hot chain
    /// through the gateway beside gRPC.
    Table,
    /// 1, 2 and 4 server processes on one database, one hot chain and 1,000 tenants.
    Processes,
    /// Twice the load that one server can take, then none.
    Overload,
    /// One hot chain without rules, with a catalogue and 20 rules, and with counts of what
    /// agents did of late, interleaved.
    Policy,
    /// The hot chain by gRPC and over HTTP through the gateway, interleaved.
    Gateway,
    /// 10⁵, 10⁶ and 10⁷ ledger entries, 10⁵ tenants. Needs 40 GB and half an hour.
    Growth,
}

/// Chains as the database has them.
struct Stored(Store);

impl Chains for Stored {
    async fn entries(&self, tenant: &str) -> anyhow::Result<u64> {
        let tenant = TenantId::parse(tenant)?;
        let last = self.0.last_sequence(&tenant).await?;
        let last = last.context("a tenant without a chain")?;
        Ok(u64::try_from(last.0)?)
    }
}

/// A rig with its tenants, ready to be loaded.
struct Bench {
    rig: Rig,
    chains: Stored,
    hot: Arc<Loaded>,
    many: Vec<Arc<Loaded>>,
    connections: usize,
}

/// Which tenants a row loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Hot,
    Many,
    /// One of the many by itself.
    One(usize),
}

/// Which servers.
#[derive(Debug, Clone, Copy)]
struct Servers {
    from: usize,
    count: usize,
}

impl Bench {
    async fn start(
        folder: Option<&Path>,
        args: &BenchArgs,
        servers: &[Settings],
        many: u32,
    ) -> anyhow::Result<Self> {
        let mut rig = Rig::start(folder).await?;
        if !args.unprepared {
            rig.settle_in().await?;
        }
        if args.fill_entries > 0 || args.fill_tenants > 0 {
            fill::fill(
                &rig.store()?,
                args.fill_entries,
                args.fill_tenants,
                args.depth,
            )
            .await?;
        }
        for settings in servers {
            rig.add(*settings).await?;
        }
        let chains = Stored(rig.store()?);
        let channel = connect(&rig.servers[0].address).await?;
        let operator = world::bearer(&rig.operator_key)?;
        let mut names = vec!["hot".to_owned()];
        names.extend((0..many).map(world::name));
        let denied = args.mix == Mix::Denied;
        let mut loaded = world::prepare(&channel, &operator, &names, args.depth, denied).await?;
        for tenant in &mut loaded {
            tenant.note(&channel, &chains).await?;
        }
        let mut loaded = loaded.into_iter().map(Arc::new);
        let hot = loaded.next().context("a tenant")?;
        Ok(Self {
            rig,
            chains,
            hot,
            many: loaded.collect(),
            connections: args.connections as usize,
        })
    }

    fn tenants(&self, on: On) -> Vec<Arc<Loaded>> {
        match on {
            On::Hot => vec![self.hot.clone()],
            On::Many => self.many.clone(),
            On::One(at) => self.many.get(at).cloned().into_iter().collect(),
        }
    }

    /// Measures one row, and checks the sums after it.
    async fn measure(
        &self,
        what: String,
        on: On,
        servers: Servers,
        load: Load,
    ) -> anyhow::Result<Row> {
        let own = &self.rig.servers[servers.from..servers.from + servers.count];
        let mut channels = Vec::new();
        for number in 0..self.connections.min(load.clients).max(own.len()) {
            channels.push(connect(&own[number % own.len()].address).await?);
        }
        let door = Door::Grpc(channels);
        self.measure_by(door, what, on, servers, load).await
    }

    /// The same through the gateway of the first server.
    async fn measure_http(&self, what: String, on: On, load: Load) -> anyhow::Result<Row> {
        let door = Door::Http(Gateway::new(&self.rig.servers[0].gateway)?);
        self.measure_by(door, what, on, alone(0), load).await
    }

    async fn measure_by(
        &self,
        door: Door,
        what: String,
        on: On,
        servers: Servers,
        load: Load,
    ) -> anyhow::Result<Row> {
        let servers = &self.rig.servers[servers.from..servers.from + servers.count];
        let tenants = self.tenants(on);
        let counters = async || {
            let (mut batches, mut commands, mut redone) = (0, 0, 0);
            for server in servers {
                batches += server.counter("remit_batches_total").await?;
                commands += server.counter("remit_batch_commands_total").await?;
                redone += server.counter("remit_batch_redone_total").await?;
            }
            anyhow::Ok((batches, commands, redone))
        };
        let begun = async || {
            let counted = counters().await?;
            anyhow::Ok((counted, self.rig.usage(), std::time::Instant::now()))
        };
        let pids: Vec<u32> = servers.iter().map(|server| server.pid).collect();
        let ended = async |before: anyhow::Result<_>| {
            let (counted, usage, at): ((u64, u64, u64), _, std::time::Instant) = before?;
            let took = at.elapsed();
            let used = self.rig.usage().since(usage);
            let resident = resident_mib(&pids);
            let now = counters().await?;
            let counted = (now.0 - counted.0, now.1 - counted.1, now.2 - counted.2);
            anyhow::Ok((counted, used, took, resident))
        };
        let (tally, ended) = load::run(load, door, tenants.clone(), begun, ended).await?;
        let (counted, used, took, resident_mib) = ended?;
        let row = Row::of(what, &load, tenants.len(), took, &tally)?;
        let channel = connect(&servers[0].address).await?;
        for tenant in &tenants {
            tenant.check(&channel, &self.chains).await?;
        }
        let cpu = (used.server + used.postgres + used.load).as_secs_f64();
        Ok(Row {
            cpu_server: used.server.as_secs_f64(),
            cpu_postgres: used.postgres.as_secs_f64(),
            cpu_load: used.load.as_secs_f64(),
            cpu_others: used.others().as_secs_f64(),
            cpu_us_per_pair: cpu * 1e6 / tally.pairs.max(1) as f64,
            resident_mib,
            average_batch: counted.1 as f64 / counted.0.max(1) as f64,
            redone: counted.2,
            ..row
        })
    }

    /// Recomputes the chains of all who were loaded, then stops everything.
    async fn finish(self, printer: &Printer) -> anyhow::Result<()> {
        let mut entries = 0;
        for tenant in std::iter::once(&self.hot).chain(&self.many) {
            let id = TenantId::parse(&tenant.name)?;
            let report = self.chains.0.verify(&id).await?;
            let report = report.context("a tenant without a chain")?;
            if let Some(problem) = report.problem {
                bail!("{id}: the ledger is broken: {}", problem.text);
            }
            entries += report.entries;
        }
        printer.say(&format!(
            "checked: the sums after every row; {} chains intact, {entries} entries",
            1 + self.many.len()
        ));
        self.chains.0.close().await;
        self.rig.close().await
    }
}

async fn connect(address: &str) -> anyhow::Result<Channel> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?;
    Ok(endpoint.tcp_nodelay(true).connect().await?)
}

impl BenchArgs {
    fn settings(&self) -> Settings {
        Settings {
            max_batch: self.max_batch,
            lanes: self.lanes,
        }
    }

    /// What the one row of a run is called.
    pub(super) fn what(&self) -> String {
        let mix = self.mix.to_possible_value();
        let mix = mix.as_ref().map_or("", |mix| mix.get_name());
        format!("{mix}, {} budgets", self.depth)
    }

    pub(super) fn load(&self, clients: usize) -> Load {
        Load {
            mix: self.mix,
            clients,
            warmup: Duration::from_secs(self.warmup),
            measured: Duration::from_secs(self.seconds),
            rate: None,
        }
    }
}

pub(super) async fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let printer = Printer { json: args.json };
    if let Some(client) = args.client()? {
        return remote::run(args, &client).await;
    }
    match args.scenario {
        Scenario::Run => one(args, &printer).await,
        Scenario::Table => table(args, &printer).await,
        Scenario::Processes => processes(args, &printer).await,
        Scenario::Overload => overload(args, &printer).await,
        Scenario::Policy => policy(args, &printer).await,
        Scenario::Gateway => gateway(args, &printer).await,
        Scenario::Growth => growth(args, &printer).await,
    }
}

async fn one(args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    let servers = vec![args.settings(); args.processes as usize];
    let many = if args.tenants > 1 { args.tenants } else { 0 };
    let bench = Bench::start(args.data_dir.as_deref(), args, &servers, many).await?;
    let on = if many > 0 { On::Many } else { On::Hot };
    let load = Load {
        rate: args.rate,
        ..args.load(args.clients as usize)
    };
    let all = Servers {
        from: 0,
        count: servers.len(),
    };
    printer.heading();
    let row = bench.measure(args.what(), on, all, load).await?;
    printer.row(&row)?;
    printer.say(&row.details());
    bench.finish(printer).await
}

/// Where a server stands in a rig by itself.
fn alone(from: usize) -> Servers {
    Servers { from, count: 1 }
}

async fn table(args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    const MANY: u32 = 1_000;

    let batched = args.settings();
    let single = Settings {
        max_batch: 1,
        ..batched
    };
    let bench = Bench::start(args.data_dir.as_deref(), args, &[batched, single], MANY).await?;
    printer.heading();
    let mut ratios = Vec::new();
    for (on, name) in [(On::Hot, "hot chain"), (On::Many, "1,000 tenants")] {
        for clients in [1, 8, 64, 256] {
            let mut rows = [Vec::new(), Vec::new()];
            for _ in 0..args.rounds {
                for (server, kind) in ["batches", "batches of one"].into_iter().enumerate() {
                    let what = format!("{name}, {clients} clients, {kind}");
                    let load = args.load(clients);
                    let row = bench.measure(what, on, alone(server), load).await?;
                    rows[server].push(row);
                }
            }
            let [batches, ones] = rows.map(Row::median);
            let (batches, ones) = batches.zip(ones).context("at least one round")?;
            printer.row(&batches)?;
            printer.row(&ones)?;
            ratios.push(format!(
                "{name}, {clients} clients: {:.1} times batches of one",
                batches.pairs_per_second / ones.pairs_per_second
            ));
        }
        if on == On::Hot {
            doors(&bench, args, printer).await?;
        }
    }
    printer.say(&ratios.join("\n"));
    bench.finish(printer).await
}

/// The hot chain by gRPC and through the gateway, in turns.
async fn doors(bench: &Bench, args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    for clients in [1, 64] {
        let (mut grpc, mut http) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            let what = format!("hot chain, {clients} clients, gRPC");
            let load = args.load(clients);
            grpc.push(bench.measure(what, On::Hot, alone(0), load).await?);
            let what = format!("hot chain, {clients} clients, HTTP");
            http.push(bench.measure_http(what, On::Hot, load).await?);
        }
        for rows in [grpc, http] {
            printer.row(&Row::median(rows).context("at least one round")?)?;
        }
    }
    Ok(())
}

async fn gateway(args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    let bench = Bench::start(args.data_dir.as_deref(), args, &[args.settings()], 0).await?;
    printer.heading();
    doors(&bench, args, printer).await?;
    bench.finish(printer).await
}

async fn policy(args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    const KINDS: [(On, &str); 3] = [
        (On::Hot, "no rules"),
        (On::One(0), "catalogue, 20 rules, 5 match"),
        (On::One(1), "the same, and counts of late"),
    ];

    let bench = Bench::start(args.data_dir.as_deref(), args, &[args.settings()], 2).await?;
    let channel = connect(&bench.rig.servers[0].address).await?;
    let operator = world::bearer(&bench.rig.operator_key)?;
    for (tenant, counts) in bench.many.iter().zip([false, true]) {
        world::provision_rules(&channel, &operator, &tenant.name, counts).await?;
        tenant.entries.fetch_add(1, Ordering::Relaxed);
    }
    printer.heading();
    for clients in [1, args.clients as usize] {
        let mut rows = KINDS.map(|_| Vec::new());
        for _ in 0..args.rounds {
            for (at, (on, kind)) in KINDS.into_iter().enumerate() {
                let what = format!("{clients} clients, {kind}");
                let row = bench
                    .measure(what, on, alone(0), args.load(clients))
                    .await?;
                rows[at].push(row);
            }
        }
        for rows in rows {
            printer.row(&Row::median(rows).context("at least one round")?)?;
        }
    }
    bench.finish(printer).await
}

async fn processes(args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    const COUNTS: [usize; 3] = [1, 2, 4];
    const MANY: u32 = 1_000;

    let servers = vec![args.settings(); COUNTS[2]];
    let bench = Bench::start(args.data_dir.as_deref(), args, &servers, MANY).await?;
    printer.heading();
    for (on, name) in [(On::Hot, "hot chain"), (On::Many, "1,000 tenants")] {
        let mut rows = COUNTS.map(|_| Vec::new());
        for _ in 0..args.rounds {
            for (at, count) in COUNTS.into_iter().enumerate() {
                let what = format!("{name}, {} clients, {count} processes", args.clients);
                let load = args.load(args.clients as usize);
                let servers = Servers { from: 0, count };
                let row = bench.measure(what, on, servers, load).await?;
                rows[at].push(row);
            }
        }
        for rows in rows {
            printer.row(&Row::median(rows).context("at least one round")?)?;
        }
    }
    bench.finish(printer).await
}

/// Full load by a closed loop, twice as much by an open one, and a single caller
/// right after it.
async fn overload(args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    let servers = [args.settings()];
    let bench = Bench::start(args.data_dir.as_deref(), args, &servers, 0).await?;
    printer.heading();
    let full = args.load(args.clients as usize);
    let full = bench
        .measure("full load, closed loop".into(), On::Hot, alone(0), full)
        .await?;
    printer.row(&full)?;
    let rate = (2.0 * full.pairs_per_second).round();
    let twice = Load {
        rate: Some(rate as u32),
        ..args.load(args.connections as usize)
    };
    let twice = bench
        .measure("twice as much".into(), On::Hot, alone(0), twice)
        .await?;
    printer.row(&twice)?;
    let after = Load {
        warmup: Duration::ZERO,
        measured: Duration::from_secs(1),
        ..args.load(1)
    };
    let after = bench
        .measure("the second after it".into(), On::Hot, alone(0), after)
        .await?;
    printer.row(&after)?;
    printer.say(&twice.details());
    if let Some(refused) = twice.latency_ms.get(REFUSED) {
        printer.say(&format!(
            "sent {rate:.0} pairs/s: {:.0} a second were done, {} calls refused, p99 of a refusal {:.1} ms, {} pairs not sent",
            twice.pairs_per_second, refused.count, refused.p99, twice.unsent
        ));
    }
    bench.finish(printer).await
}

async fn growth(args: &BenchArgs, printer: &Printer) -> anyhow::Result<()> {
    const SIZES: [u64; 3] = [100_000, 1_000_000, 10_000_000];
    const TENANTS: u32 = 100_000;
    const MANY: u32 = 1_000;

    let mut benches = Vec::new();
    for entries in SIZES {
        let filled = BenchArgs {
            fill_entries: entries,
            fill_tenants: TENANTS,
            ..args.clone()
        };
        let folder = args
            .data_dir
            .as_ref()
            .map(|dir| dir.join(entries.to_string()));
        if let Some(folder) = &folder {
            std::fs::create_dir_all(folder)?;
        }
        let settings = [args.settings()];
        benches.push(Bench::start(folder.as_deref(), &filled, &settings, MANY).await?);
    }
    printer.heading();
    for (on, name, clients) in [
        (On::Hot, "hot chain", 64),
        (On::Many, "1,000 of 100,000 tenants", 256),
    ] {
        let mut rows = SIZES.map(|_| Vec::new());
        for _ in 0..args.rounds {
            for (at, bench) in benches.iter().enumerate() {
                let what = format!("{name}, {clients} clients, {} entries", SIZES[at]);
                let row = bench
                    .measure(what, on, alone(0), args.load(clients))
                    .await?;
                rows[at].push(row);
            }
        }
        for rows in rows {
            printer.row(&Row::median(rows).context("at least one round")?)?;
        }
    }
    for bench in benches {
        bench.finish(printer).await?;
    }
    Ok(())
}

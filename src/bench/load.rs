//! The callers: each waits for an answer before its next call (a closed loop), or,
//! with a rate, calls begin on a schedule whatever the answers (an open loop).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::gateway::{Failed, Gateway};
use super::world::{ACTUAL, ESTIMATE, Loaded, action, points, request};
use crate::proto::authority_client::AuthorityClient;
use crate::proto::{CommitRequest, DecideRequest, Decision, ReleaseRequest, ReserveRequest};

/// What a caller does over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Mix {
    /// Reserve, then commit two thirds of it.
    ReserveCommit,
    /// Reserve, then release.
    ReserveRelease,
    /// Decide, without a record.
    Decide,
    /// Reserve on budgets in which nothing has room.
    Denied,
}

/// How hard.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) mix: Mix,
    pub(super) clients: usize,
    pub(super) warmup: Duration,
    pub(super) measured: Duration,
    /// Pairs a second; nothing for a closed loop.
    pub(super) rate: Option<u32>,
}

/// By which door the callers come.
#[derive(Debug, Clone)]
pub(super) enum Door {
    /// On these connections.
    Grpc(Vec<Channel>),
    /// Reserve and settle alone.
    Http(Gateway),
}

/// Phases of a measurement, in an [`AtomicU8`].
const WARMUP: u8 = 0;
const MEASURED: u8 = 1;
const OVER: u8 = 2;

/// Most calls in work with a rate: what comes beyond is not sent, and counted.
const IN_FLIGHT_MAX: usize = 20_000;

/// How long a caller waits who was refused and not told for how long.
const PATIENCE: Duration = Duration::from_millis(250);

/// The name under which refusals for want of room are counted.
pub(super) const REFUSED: &str = "refused";

/// What one caller saw.
#[derive(Debug, Default)]
struct Part {
    pairs: u64,
    /// RPC and latency in microseconds of every answer in the measured time.
    latencies: Vec<(&'static str, u64)>,
    errors: u64,
    first_error: Option<String>,
}

impl Part {
    fn fail(&mut self, error: String) {
        self.errors += 1;
        self.first_error.get_or_insert(error);
    }
}

/// What all callers saw.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Units of work that were done in the measured time.
    pub(super) pairs: u64,
    /// Latencies in microseconds, by RPC, and of refusals.
    pub(super) latency: BTreeMap<&'static str, Histogram<u64>>,
    /// With a rate: what could not be sent.
    pub(super) unsent: u64,
    /// Anything that is neither an answer nor a refusal for want of room.
    pub(super) errors: u64,
    pub(super) first_error: Option<String>,
}

impl Tally {
    fn add(&mut self, part: Part) {
        self.pairs += part.pairs;
        self.errors += part.errors;
        self.first_error = self.first_error.take().or(part.first_error);
        for (rpc, latency) in part.latencies {
            let own = self.latency.entry(rpc).or_insert_with(histogram);
            own.saturating_record(latency);
        }
    }

    fn join(&mut self, part: Result<Part, tokio::task::JoinError>) {
        self.add(part.unwrap_or_else(|error| {
            let mut part = Part::default();
            part.fail(error.to_string());
            part
        }));
    }
}

/// Up to ten minutes, to three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).expect("constant bounds that fit")
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// What all callers of one measurement share.
#[derive(Debug)]
struct Field {
    door: Door,
    tenants: Vec<Arc<Loaded>>,
    mix: Mix,
    phase: AtomicU8,
    in_flight: AtomicUsize,
    run: String,
}

/// Runs a load; `begun` and `ended` are called around the measured time.
pub(super) async fn run<B, E, T>(
    load: Load,
    door: Door,
    tenants: Vec<Arc<Loaded>>,
    begun: impl FnOnce() -> B,
    ended: impl FnOnce(B::Output) -> E,
) -> anyhow::Result<(Tally, T)>
where
    B: Future,
    E: Future<Output = T>,
{
    let field = Arc::new(Field {
        door,
        tenants,
        mix: load.mix,
        phase: AtomicU8::new(WARMUP),
        in_flight: AtomicUsize::new(0),
        run: uuid::Uuid::now_v7().simple().to_string(),
    });
    let mut callers = JoinSet::new();
    let mut schedule = None;
    match load.rate {
        None => {
            for number in 0..load.clients {
                callers.spawn(Caller::new(field.clone(), number).repeat());
            }
        }
        Some(rate) => schedule = Some(tokio::spawn(on_schedule(field.clone(), rate))),
    }
    tokio::time::sleep(load.warmup).await;
    let before = begun().await;
    field.phase.store(MEASURED, Ordering::Relaxed);
    tokio::time::sleep(load.measured).await;
    field.phase.store(OVER, Ordering::Relaxed);
    let after = ended(before).await;
    let mut tally = match schedule {
        Some(schedule) => schedule.await?,
        None => Tally::default(),
    };
    while let Some(done) = callers.join_next().await {
        tally.join(done);
    }
    Ok((tally, after))
}

/// Begins calls on a schedule, a few every millisecond.
async fn on_schedule(field: Arc<Field>, rate: u32) -> Tally {
    let mut tally = Tally::default();
    let mut callers = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let started = Instant::now();
    let mut sent = 0_u64;
    while field.phase.load(Ordering::Relaxed) != OVER {
        ticks.tick().await;
        let due = u128::from(rate) * started.elapsed().as_micros() / 1_000_000;
        let due = u64::try_from(due).unwrap_or(u64::MAX);
        for number in sent..due {
            if field.in_flight.load(Ordering::Relaxed) >= IN_FLIGHT_MAX {
                tally.unsent += 1;
                continue;
            }
            field.in_flight.fetch_add(1, Ordering::Relaxed);
            let number = usize::try_from(number).unwrap_or(0);
            callers.spawn(Caller::new(field.clone(), number).once());
        }
        sent = due;
        while let Some(done) = callers.try_join_next() {
            tally.join(done);
        }
    }
    while let Some(done) = callers.join_next().await {
        tally.join(done);
    }
    tally
}

/// How one caller speaks.
#[derive(Clone)]
enum Client {
    Grpc(AuthorityClient<Channel>),
    Http(Gateway),
}

/// One caller.
struct Caller {
    field: Arc<Field>,
    client: Client,
    number: usize,
    turn: u64,
    /// Of splitmix64.
    random: u64,
    part: Part,
}

/// What a call that got no answer means for the caller.
enum Unanswered {
    /// Come back then.
    Refused(Duration),
    /// Nothing that load explains.
    Failed,
}

impl Caller {
    fn new(field: Arc<Field>, number: usize) -> Self {
        let client = match &field.door {
            Door::Grpc(channels) => {
                let channel = channels[number % channels.len()].clone();
                Client::Grpc(AuthorityClient::new(channel))
            }
            Door::Http(gateway) => Client::Http(gateway.clone()),
        };
        Self {
            client,
            number,
            turn: 0,
            random: number as u64,
            part: Part::default(),
            field,
        }
    }

    async fn repeat(mut self) -> Part {
        while self.field.phase.load(Ordering::Relaxed) != OVER {
            if let Err(Unanswered::Refused(wait)) = self.turn().await {
                tokio::time::sleep(wait).await;
            }
            if self.part.errors > 100 {
                break;
            }
        }
        self.part
    }

    async fn once(mut self) -> Part {
        // A refusal is counted, and an agent would come back much later.
        let _ = self.turn().await;
        self.field.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.part
    }

    fn tenant(&mut self) -> Arc<Loaded> {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let tenants = &self.field.tenants;
        let at = (z ^ (z >> 31)) % tenants.len() as u64;
        tenants[usize::try_from(at).unwrap_or(0)].clone()
    }

    fn key(&self, what: &str) -> String {
        format!("{}-{}-{}-{what}", self.field.run, self.number, self.turn)
    }

    /// One unit of work.
    async fn turn(&mut self) -> Result<(), Unanswered> {
        self.turn += 1;
        let tenant = self.tenant();
        match self.field.mix {
            Mix::Decide => self.decide(&tenant).await?,
            Mix::Denied => {
                self.reserve(&tenant, Decision::Deny).await?;
            }
            Mix::ReserveCommit => {
                let reservation = self.reserve(&tenant, Decision::Allow).await?;
                self.settle(&tenant, &reservation, true).await?;
            }
            Mix::ReserveRelease => {
                let reservation = self.reserve(&tenant, Decision::Allow).await?;
                self.settle(&tenant, &reservation, false).await?;
            }
        }
        if self.field.phase.load(Ordering::Relaxed) == MEASURED {
            self.part.pairs += 1;
        }
        Ok(())
    }

    async fn decide(&mut self, tenant: &Loaded) -> Result<(), Unanswered> {
        let message = DecideRequest {
            subject: Some(tenant.subject.clone()),
            action: Some(action()),
            estimates: points(ESTIMATE),
            ..DecideRequest::default()
        };
        let Client::Grpc(client) = &mut self.client else {
            self.part.fail("the gateway records every decision".into());
            return Err(Unanswered::Failed);
        };
        let begun = Instant::now();
        let answer = client.decide(request(&tenant.bearer, message)).await;
        let answer = self.took("Decide", begun, answer)?;
        self.expect(answer.decision(), Decision::Allow)
    }

    async fn reserve(&mut self, tenant: &Loaded, wanted: Decision) -> Result<String, Unanswered> {
        let mut client = match &self.client {
            Client::Grpc(client) => client.clone(),
            Client::Http(gateway) => {
                let gateway = gateway.clone();
                let begun = Instant::now();
                let held = gateway.reserve(tenant, &self.key("reserve")).await;
                let held = self.heard("Reserve", begun, held)?;
                tenant.entries.fetch_add(1, Ordering::Relaxed);
                return Ok(held);
            }
        };
        let message = ReserveRequest {
            idempotency_key: self.key("reserve"),
            subject: Some(tenant.subject.clone()),
            action: Some(action()),
            estimates: points(ESTIMATE),
            ..ReserveRequest::default()
        };
        let begun = Instant::now();
        let answer = client.reserve(request(&tenant.bearer, message)).await;
        let answer = self.took("Reserve", begun, answer)?;
        tenant.entries.fetch_add(1, Ordering::Relaxed);
        self.expect(answer.decision(), wanted)?;
        Ok(answer.reservation_id)
    }

    /// Settles what is held, again after a refusal: the agent has acted.
    async fn settle(
        &mut self,
        tenant: &Loaded,
        reservation: &str,
        commit: bool,
    ) -> Result<(), Unanswered> {
        loop {
            let settled = if let Client::Http(gateway) = &self.client {
                let gateway = gateway.clone();
                self.settle_over_http(&gateway, tenant, reservation, commit)
                    .await
            } else if commit {
                self.commit(tenant, reservation).await
            } else {
                self.release(tenant, reservation).await
            };
            match settled {
                Err(Unanswered::Refused(wait)) => tokio::time::sleep(wait).await,
                settled => return settled,
            }
        }
    }

    async fn settle_over_http(
        &mut self,
        gateway: &Gateway,
        tenant: &Loaded,
        reservation: &str,
        commit: bool,
    ) -> Result<(), Unanswered> {
        let begun = Instant::now();
        let key = self.key("settle");
        let settled = gateway.settle(tenant, reservation, &key, commit).await;
        self.heard(if commit { "Commit" } else { "Release" }, begun, settled)?;
        tenant.entries.fetch_add(1, Ordering::Relaxed);
        let committed = i64::from(commit);
        tenant.committed.fetch_add(committed, Ordering::Relaxed);
        Ok(())
    }

    async fn commit(&mut self, tenant: &Loaded, reservation: &str) -> Result<(), Unanswered> {
        let Client::Grpc(mut client) = self.client.clone() else {
            return Err(Unanswered::Failed);
        };
        let message = CommitRequest {
            idempotency_key: self.key("commit"),
            reservation_id: reservation.to_owned(),
            actual: points(ACTUAL),
            ..CommitRequest::default()
        };
        let begun = Instant::now();
        let answer = client.commit(request(&tenant.bearer, message)).await;
        self.took("Commit", begun, answer)?;
        tenant.entries.fetch_add(1, Ordering::Relaxed);
        tenant.committed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn release(&mut self, tenant: &Loaded, reservation: &str) -> Result<(), Unanswered> {
        let Client::Grpc(mut client) = self.client.clone() else {
            return Err(Unanswered::Failed);
        };
        let message = ReleaseRequest {
            idempotency_key: self.key("release"),
            reservation_id: reservation.to_owned(),
            ..ReleaseRequest::default()
        };
        let begun = Instant::now();
        let answer = client.release(request(&tenant.bearer, message)).await;
        self.took("Release", begun, answer)?;
        tenant.entries.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn expect(&mut self, decision: Decision, wanted: Decision) -> Result<(), Unanswered> {
        if decision == wanted {
            return Ok(());
        }
        let (decision, wanted) = (decision.as_str_name(), wanted.as_str_name());
        self.part.fail(format!("{decision} where {wanted} was due"));
        Err(Unanswered::Failed)
    }

    /// Notes how long an answer of the gateway took.
    fn heard<T>(
        &mut self,
        rpc: &'static str,
        begun: Instant,
        answer: Result<T, Failed>,
    ) -> Result<T, Unanswered> {
        let measured = self.field.phase.load(Ordering::Relaxed) == MEASURED;
        match answer {
            Ok(answer) => {
                if measured {
                    self.part.latencies.push((rpc, micros(begun)));
                }
                Ok(answer)
            }
            Err(Failed::Refused) => {
                if measured {
                    self.part.latencies.push((REFUSED, micros(begun)));
                }
                Err(Unanswered::Refused(PATIENCE))
            }
            Err(Failed::Otherwise(error)) => {
                self.part.fail(format!("{rpc}: {error}"));
                Err(Unanswered::Failed)
            }
        }
    }

    /// Notes how long an answer took.
    fn took<T>(
        &mut self,
        rpc: &'static str,
        begun: Instant,
        answer: Result<tonic::Response<T>, Status>,
    ) -> Result<T, Unanswered> {
        let measured = self.field.phase.load(Ordering::Relaxed) == MEASURED;
        match answer {
            Ok(answer) => {
                if measured {
                    self.part.latencies.push((rpc, micros(begun)));
                }
                Ok(answer.into_inner())
            }
            Err(status) if status.code() == Code::ResourceExhausted => {
                if measured {
                    self.part.latencies.push((REFUSED, micros(begun)));
                }
                let retry = status.get_details_retry_info();
                let wait = retry.and_then(|info| info.retry_delay);
                Err(Unanswered::Refused(wait.unwrap_or(PATIENCE)))
            }
            Err(status) => {
                let (code, text) = (status.code(), status.message());
                self.part.fail(format!("{rpc}: {code:?}: {text}"));
                Err(Unanswered::Failed)
            }
        }
    }
}

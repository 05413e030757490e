//! A lane's worker: takes what is waiting, decides it, writes it, answers.
//!
//! An attempt decides the batch on cached state and writes it behind the fence.
//! When the fence was missed, a key turned out to be used, or the connection was
//! lost, nothing of the attempt is answered: the batch is decided anew on fresh
//! state, with the heads locked, so that it makes progress against any number of
//! other writers.
//!
//! Tenants share a batch, not their faults: where a row can't be read, the batch is
//! decided in halves until the fault stands alone. Whose it was is decided by itself
//! from then on, until it has gone well for long. The same after a panic, which costs the
//! batch that it happened in.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cache::{Bounds, Cache, ROWS_KEPT};
use super::queue::{Job, Queue};
use super::wait::Waits;
use super::{EngineError, RETRY_AFTER, Written, now};
use crate::domain::answer::Answer;
use crate::domain::id::{ReservationId, TenantId};
use crate::domain::ledger::Tip;
use crate::domain::refusal::Refusal;
use crate::domain::state::{Applied, Needs, TenantState};
use crate::domain::time::Timestamp;
use crate::metrics::{Metrics, Redone};
use crate::panics::caught;
use crate::store::{Head, HeadWrite, Store, StoreError, TenantWrite, batch, hot};

/// Most turns that are left to others before a batch is taken, as long as each brings
/// something.
const YIELDS: u32 = 16;
/// Attempts at one batch before it is given up as ABORTED.
const ATTEMPTS: u32 = 8;
/// How long a batch is tried again while the database can't be reached.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long one attempt may take before its connection counts as lost.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// Batches that lock their heads first after the fence was missed: where there
/// was another writer there will be one again.
const LOCKED_BATCHES: u32 = 64;
/// How often what was taken at once is halved to find out whose fault it is. What is wrong
/// with everybody's rows, or with the database, is not searched for longer.
const HALVINGS: u32 = 64;
/// Most tenants that are decided by themselves, ...
const APART: usize = 4_096;
/// ... and how many of their commands must go well before they share batches again.
const APART_FOR: u32 = 10_000;

type Outcome = Result<Answer, Refusal>;

/// An attempt that went through.
struct Done {
    outcomes: Vec<Outcome>,
    /// Where it left each chain that it wrote to.
    tips: Vec<(TenantId, Tip)>,
    /// Reservations that people decided on, or that ended while they waited.
    decided: Vec<(TenantId, ReservationId)>,
}

/// One lane's worker.
#[derive(Debug)]
pub(super) struct Worker {
    store: Store,
    queue: Arc<Queue>,
    written: broadcast::Sender<Written>,
    waits: Arc<Waits>,
    max_batch: usize,
    metrics: Metrics,
    conn: Option<PgConnection>,
    cache: Cache,
    /// Batches that still lock first.
    locked_batches: u32,
    /// Attempts at the batch of which the outcome is unknown.
    open: Vec<Open>,
    /// Tenants that are decided by themselves, for the fault of which others failed too, and
    /// for how many commands more: not everything that is asked of them meets the fault.
    apart: HashMap<TenantId, u32>,
}

/// An attempt of which it is not known whether it was committed.
#[derive(Debug)]
struct Open {
    /// What it would have left as tips.
    tips: Vec<(TenantId, Tip)>,
    outcomes: Vec<Outcome>,
}

/// Jobs that are decided at once.
type Group = Vec<(TenantId, Job)>;

impl Worker {
    pub(super) fn new(
        store: Store,
        queue: Arc<Queue>,
        written: broadcast::Sender<Written>,
        waits: Arc<Waits>,
        max_batch: usize,
        metrics: Metrics,
    ) -> Self {
        Self {
            store,
            queue,
            written,
            waits,
            max_batch: max_batch.max(1),
            metrics,
            conn: None,
            cache: Cache::new(Bounds::LANE),
            locked_batches: 0,
            open: Vec::new(),
            apart: HashMap::new(),
        }
    }

    /// Works until `drained` and nothing is waiting any more.
    pub(super) async fn run(mut self, drained: CancellationToken) {
        loop {
            // Lets those who were just answered ask again before the queue is
            // taken: larger batches, without a timer.
            let (mut waiting, mut in_vain) = (self.queue.len(), 0);
            for _ in 0..YIELDS {
                tokio::task::yield_now().await;
                let before = std::mem::replace(&mut waiting, self.queue.len());
                in_vain = if waiting > before { 0 } else { in_vain + 1 };
                if in_vain == 3 {
                    break;
                }
            }
            let jobs = self.queue.take(self.max_batch);
            if jobs.is_empty() {
                if drained.is_cancelled() {
                    return;
                }
                tokio::select! {
                    () = self.queue.arrived() => {}
                    () = drained.cancelled() => {}
                }
                continue;
            }
            self.metrics
                .waiting(-i64::try_from(jobs.len()).unwrap_or(0));
            self.batch(jobs).await;
        }
    }

    async fn batch(&mut self, jobs: Group) {
        let started = Instant::now();
        let mut live = Vec::with_capacity(jobs.len());
        for (tenant, job) in jobs {
            if job.reply.is_closed() {
                // Nobody is waiting any more.
                continue;
            }
            if job.deadline.is_some_and(|deadline| deadline <= started) {
                self.metrics.refused("deadline");
                let _ = job.reply.send(Err(EngineError::DeadlineExceeded));
                continue;
            }
            live.push((tenant, job));
        }
        let mut groups = groups(live, &self.apart);
        let mut halvings = HALVINGS;
        while let Some(group) = groups.pop() {
            let started = Instant::now();
            match caught(self.decide(&group, started)).await {
                Ok(Ok(done)) => self.answer(group, done, started),
                // What may stand already is not tried again in parts.
                Ok(Err(EngineError::Internal)) if self.open.is_empty() && halvings > 0 => {
                    halvings -= 1;
                    match halves(group) {
                        Ok((first, second)) => groups.extend([second, first]),
                        Err(group) => {
                            self.set_apart(&group);
                            refuse(group, &EngineError::Internal);
                        }
                    }
                }
                Ok(Err(error @ EngineError::Unavailable { .. })) => {
                    // Nor can the others be decided; each would wait as long.
                    groups.push(group);
                    for group in groups.drain(..) {
                        refuse(group, &error);
                    }
                }
                Ok(Err(error)) => refuse(group, &error),
                Err(panic) => {
                    tracing::error!(panic, "a batch panicked");
                    // What it left half changed is thrown away.
                    self.conn = None;
                    for (tenant, _) in &group {
                        self.cache.remove(tenant);
                    }
                    self.set_apart(&group);
                    refuse(group, &EngineError::Internal);
                }
            }
        }
    }

    /// Answers jobs that were decided.
    fn answer(&mut self, group: Group, done: Done, started: Instant) {
        self.metrics.batch(group.len(), started.elapsed());
        for (tenant, reservation) in done.decided {
            self.waits.changed(&tenant, reservation);
        }
        for (tenant, tip) in done.tips {
            // Nobody has to be listening.
            let _ = self.written.send((tenant, tip.seq));
        }
        for ((tenant, job), outcome) in group.into_iter().zip(done.outcomes) {
            if let Some(more) = self.apart.get_mut(&tenant) {
                *more -= 1;
                if *more == 0 {
                    self.apart.remove(&tenant);
                }
            }
            let _ = job.reply.send(outcome.map_err(EngineError::from));
        }
    }

    /// From now on these tenants are decided each by itself.
    fn set_apart(&mut self, group: &Group) {
        if self.apart.len() >= APART {
            self.apart.clear();
        }
        let tenants = group.iter().map(|(tenant, _)| (tenant.clone(), APART_FOR));
        self.apart.extend(tenants);
    }

    /// Tries a batch until it is through or must be given up.
    async fn decide(
        &mut self,
        jobs: &[(TenantId, Job)],
        started: Instant,
    ) -> Result<Done, EngineError> {
        let mut conflicts = 0;
        let mut pause = Duration::from_millis(5);
        self.open.clear();
        loop {
            let fresh = conflicts > 0 || !self.open.is_empty();
            let attempt = tokio::time::timeout(ATTEMPT_TIMEOUT, self.attempt(jobs, fresh)).await;
            let error = match attempt {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(error)) => error,
                Err(_) => StoreError::UnknownOutcome(sqlx::Error::PoolTimedOut),
            };
            for (tenant, _) in jobs {
                self.cache.remove(tenant);
            }
            match error {
                StoreError::Conflict => {
                    self.metrics.redone(Redone::Conflict);
                    conflicts += 1;
                    self.locked_batches = LOCKED_BATCHES;
                    if conflicts >= ATTEMPTS {
                        return Err(EngineError::Aborted);
                    }
                }
                StoreError::Unavailable(_) | StoreError::UnknownOutcome(_) => {
                    self.metrics.redone(Redone::Disconnected);
                    self.conn = None;
                    if started.elapsed() + pause > PATIENCE {
                        tracing::warn!(%error, "a batch was given up");
                        return Err(EngineError::Unavailable {
                            retry_after: RETRY_AFTER,
                        });
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(250));
                }
                StoreError::Corrupt(_) | StoreError::Database(_) | StoreError::Schema { .. } => {
                    tracing::error!(%error, "a batch failed");
                    self.conn = None;
                    return Err(EngineError::Internal);
                }
            }
        }
    }

    /// One attempt. `fresh`: on state read anew under locked heads, with every
    /// key looked up.
    async fn attempt(&mut self, jobs: &[(TenantId, Job)], fresh: bool) -> Result<Done, StoreError> {
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => self.store.connect().await?,
        };
        let locked = fresh || self.locked_batches > 0;
        let result = if locked {
            self.locked_batches = self.locked_batches.saturating_sub(1);
            self.locked_attempt(&mut conn, jobs, fresh).await
        } else {
            self.run_batch(&mut conn, jobs, false, None).await
        };
        if !matches!(
            result,
            Err(StoreError::Unavailable(_) | StoreError::UnknownOutcome(_))
        ) {
            self.conn = Some(conn);
        }
        result
    }

    async fn locked_attempt(
        &mut self,
        conn: &mut PgConnection,
        jobs: &[(TenantId, Job)],
        fresh: bool,
    ) -> Result<Done, StoreError> {
        let mut tx = hot::begin(conn).await?;
        let tenants: BTreeSet<TenantId> = jobs.iter().map(|(tenant, _)| tenant.clone()).collect();
        let heads = hot::read_heads(&mut tx, &tenants, true).await?;
        // With the heads locked nobody writes any more: what an attempt of
        // unknown outcome has left stands, or never will.
        // It is remembered until the batch is through: this attempt may be lost too.
        for at in 0..self.open.len() {
            let tips = &self.open[at].tips;
            let standing = hot::standing(&mut tx, tips).await?;
            if !tips.is_empty() && standing.len() == tips.len() {
                hot::commit(tx).await?;
                let open = self.open.swap_remove(at);
                return Ok(Done {
                    tips: open.tips,
                    outcomes: open.outcomes,
                    // Who waits finds out within a second.
                    decided: Vec::new(),
                });
            }
        }
        let done = self.run_batch(&mut tx, jobs, fresh, Some(heads)).await?;
        if let Err(error) = hot::commit(tx).await {
            self.open.push(Open {
                tips: done.tips,
                outcomes: done.outcomes,
            });
            return Err(error);
        }
        Ok(done)
    }

    async fn run_batch(
        &mut self,
        conn: &mut PgConnection,
        jobs: &[(TenantId, Job)],
        look_up_keys: bool,
        locked: Option<BTreeMap<TenantId, Head>>,
    ) -> Result<Done, StoreError> {
        let is_locked = locked.is_some();
        self.load_tenants(conn, jobs, locked).await?;
        self.load_needs(conn, jobs, look_up_keys).await?;

        let now = now();
        let mut outcomes = Vec::with_capacity(jobs.len());
        for (at, (tenant, job)) in jobs.iter().enumerate() {
            let mut outcome = self.apply(tenant, job, now);
            if outcome.is_none() {
                // Once a batch: the rest of it is looked up too.
                self.load_needs(conn, &jobs[at..], true).await?;
                outcome = self.apply(tenant, job, now);
            }
            let missing = || StoreError::Corrupt("a key was looked up and is not known".into());
            outcomes.push(outcome.ok_or_else(missing)?);
        }

        let mut writes = Vec::new();
        let mut read_only = BTreeMap::new();
        let tenants: BTreeSet<&TenantId> = jobs.iter().map(|(tenant, _)| tenant).collect();
        for tenant in &tenants {
            let tenant = *tenant;
            let Some(cached) = self.cache.get_mut(tenant) else {
                continue;
            };
            let changes = cached.state.take_changes();
            if changes.entries.is_empty() {
                read_only.insert(tenant.clone(), cached.head.fence);
                continue;
            }
            writes.push(TenantWrite {
                tenant: tenant.clone(),
                head: HeadWrite {
                    fence: cached.head.fence,
                    tip: cached.state.tip,
                    next_balance: cached.state.next_balance,
                },
                changes,
            });
        }
        // Before anything is written: a batch that is redone must have left
        // nothing behind.
        if !is_locked && !read_only.is_empty() {
            self.confirm(conn, &read_only).await?;
        }
        let tips: Vec<(TenantId, Tip)> = writes
            .iter()
            .map(|write| (write.tenant.clone(), write.head.tip))
            .collect();
        if !writes.is_empty()
            && let Err(error) = batch::write(conn, &writes).await
        {
            if matches!(error, StoreError::UnknownOutcome(_)) && !is_locked {
                self.open.push(Open { tips, outcomes });
            }
            return Err(error);
        }
        self.settle_heads(&writes);
        self.cache.settle(tenants.into_iter());
        let resolved = writes.iter().flat_map(|write| {
            let approvals = write.changes.approvals.iter();
            approvals.map(|record| (write.tenant.clone(), record.reservation))
        });
        Ok(Done {
            decided: resolved.collect(),
            outcomes,
            tips,
        })
    }

    /// One command; nothing where its key has to be looked up first.
    fn apply(&mut self, tenant: &TenantId, job: &Job, now: Timestamp) -> Option<Outcome> {
        let Some(cached) = self.cache.get_mut(tenant) else {
            return Some(Err(Refusal::TenantNotFound));
        };
        match cached.state.apply(&job.command, &job.origin, now) {
            Applied::Done(outcome) => Some(outcome),
            Applied::KeyNeeded => None,
        }
    }

    /// No answer leaves on state that was not current: where nothing is written,
    /// the fence is looked at instead of moved.
    async fn confirm(
        &mut self,
        conn: &mut PgConnection,
        read_only: &BTreeMap<TenantId, i64>,
    ) -> Result<(), StoreError> {
        let tenants = read_only.keys().cloned().collect();
        let heads = hot::read_heads(conn, &tenants, false).await?;
        for (tenant, fence) in read_only {
            if heads.get(tenant).map(|head| head.fence) != Some(*fence) {
                return Err(StoreError::Conflict);
            }
        }
        Ok(())
    }

    /// Moves cached heads to where the write has put them.
    fn settle_heads(&mut self, writes: &[TenantWrite]) {
        for write in writes {
            if let Some(cached) = self.cache.get_mut(&write.tenant) {
                cached.head.fence += 1;
                cached.head.tip = write.head.tip;
                cached.head.next_balance = write.head.next_balance;
                let settled: Vec<ReservationId> = write
                    .changes
                    .reservations
                    .iter()
                    .filter(|reservation| !reservation.is_open())
                    .map(|reservation| reservation.id)
                    .collect();
                cached.state.trim(&settled, ROWS_KEPT);
            }
        }
    }

    /// Sees to it that every tenant's head and configuration are there. With
    /// locked heads the cache is only kept where it is current.
    async fn load_tenants(
        &mut self,
        conn: &mut PgConnection,
        jobs: &[(TenantId, Job)],
        locked: Option<BTreeMap<TenantId, Head>>,
    ) -> Result<(), StoreError> {
        let tenants: BTreeSet<TenantId> = jobs.iter().map(|(tenant, _)| tenant.clone()).collect();
        let heads = match locked {
            Some(heads) => {
                for tenant in &tenants {
                    let cached = self.cache.get(tenant).map(|cached| cached.head.fence);
                    if cached != heads.get(tenant).map(|head| head.fence) {
                        self.cache.remove(tenant);
                    }
                }
                heads
            }
            None => {
                let missing: BTreeSet<TenantId> = tenants
                    .iter()
                    .filter(|tenant| !self.cache.contains(tenant))
                    .cloned()
                    .collect();
                if missing.is_empty() {
                    return Ok(());
                }
                hot::read_heads(conn, &missing, false).await?
            }
        };
        let missing: BTreeSet<TenantId> = heads
            .keys()
            .filter(|tenant| !self.cache.contains(tenant))
            .cloned()
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let configs = hot::read_configs(conn, &missing, self.store.compiled()).await?;
        for (tenant, config) in configs {
            if let Some(head) = heads.get(&tenant) {
                let state = TenantState::new(config, head.tip, head.next_balance);
                self.cache.insert(tenant, *head, state);
            }
        }
        Ok(())
    }

    /// Reads what the batch's commands need, until nothing is missing.
    async fn load_needs(
        &mut self,
        conn: &mut PgConnection,
        jobs: &[(TenantId, Job)],
        look_up_keys: bool,
    ) -> Result<(), StoreError> {
        // A key names an entry, an entry or a reservation names balances: three
        // steps at the most, and one that finds nothing missing.
        const STEPS: usize = 5;
        for _ in 0..STEPS {
            let mut needs: BTreeMap<TenantId, Needs> = BTreeMap::new();
            for (tenant, job) in jobs {
                if let Some(cached) = self.cache.get(tenant) {
                    let needs = needs.entry(tenant.clone()).or_default();
                    cached.state.needs(&job.command, look_up_keys, needs);
                }
            }
            needs.retain(|_, needs| !needs.is_empty());
            if needs.is_empty() {
                return Ok(());
            }
            let mut loaded = hot::read_needs(conn, &needs).await?;
            for (tenant, needs) in &needs {
                if let (Some(cached), Some(loaded)) =
                    (self.cache.get_mut(tenant), loaded.remove(tenant))
                {
                    cached.state.load(needs, loaded);
                }
            }
        }
        Err(StoreError::Corrupt(
            "rows name others that do not exist".into(),
        ))
    }
}

/// Splits what was taken: those decided together last, each that stays apart before them,
/// as they are to be taken from the end.
fn groups(jobs: Group, apart: &HashMap<TenantId, u32>) -> Vec<Group> {
    if jobs.is_empty() {
        return Vec::new();
    }
    if apart.is_empty() {
        return vec![jobs];
    }
    let mut alone: BTreeMap<TenantId, Group> = BTreeMap::new();
    let mut together = Vec::with_capacity(jobs.len());
    for (tenant, job) in jobs {
        if apart.contains_key(&tenant) {
            let own = alone.entry(tenant.clone()).or_default();
            own.push((tenant, job));
        } else {
            together.push((tenant, job));
        }
    }
    let mut groups: Vec<Group> = alone.into_values().collect();
    if !together.is_empty() {
        groups.push(together);
    }
    groups
}

/// Two halves by tenants, each in its order; the group again where it is of one tenant.
fn halves(group: Group) -> Result<(Group, Group), Group> {
    let tenants: BTreeSet<&TenantId> = group.iter().map(|(tenant, _)| tenant).collect();
    let middle = tenants.len() / 2;
    let middle = tenants.into_iter().nth(middle).cloned();
    match middle {
        Some(middle) if group.iter().any(|(tenant, _)| *tenant < middle) => {
            Ok(group.into_iter().partition(|(tenant, _)| *tenant < middle))
        }
        _ => Err(group),
    }
}

fn refuse(group: Group, error: &EngineError) {
    for (_, job) in group {
        let _ = job.reply.send(Err(error.clone()));
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::domain::request::{Command, Origin};

    fn tenant(name: &str) -> TenantId {
        TenantId::parse(name).expect("a tenant")
    }

    /// Jobs of these tenants; their request ids say in which order they came.
    fn jobs(tenants: &str) -> Group {
        let id = ReservationId::parse("00000000-0000-8000-8000-000000000000").expect("an id");
        let job = |(at, name): (usize, char)| {
            let job = Job {
                command: Command::Expire(id),
                origin: Origin {
                    key: None,
                    confinement: None,
                    request_id: at.to_string().into(),
                    trace_id: "".into(),
                },
                deadline: None,
                reply: oneshot::channel().0,
                put: Instant::now(),
            };
            (tenant(&name.to_string()), job)
        };
        tenants.chars().enumerate().map(job).collect()
    }

    fn said(group: &Group) -> String {
        let job = |(tenant, job): &(TenantId, Job)| format!("{tenant}{}", job.origin.request_id);
        group.iter().map(job).collect::<Vec<_>>().join(" ")
    }

    #[tokio::test]
    async fn a_batch_is_halved_by_tenants_down_to_one() {
        let (one, other) = halves(jobs("cabbac")).expect("three tenants");
        assert_eq!(said(&one), "a1 a4");
        assert_eq!(said(&other), "c0 b2 b3 c5");
        let (one, other) = halves(other).expect("two tenants");
        assert_eq!(
            (said(&one).as_str(), said(&other).as_str()),
            ("b2 b3", "c0 c5")
        );
        assert_eq!(said(&halves(one).expect_err("one tenant")), "b2 b3");
    }

    #[tokio::test]
    async fn whose_fault_it_was_is_decided_alone_and_after_the_others() {
        let apart = HashMap::from(["b", "d", "z"].map(|name| (tenant(name), 1)));
        let mut groups = groups(jobs("abcdb"), &apart);
        let taken: Vec<String> = std::iter::from_fn(|| Some(said(&groups.pop()?))).collect();
        assert_eq!(taken, ["a0 c2", "d3", "b1 b4"]);
    }
}

//! Between callers and the database: queues, batches, the fence's retries, the
//! clock and the randomness.
//!
//! The path of a command: [`Engine::execute`] puts it into its tenant's lane
//! ([`queue`]), the lane's worker takes what is waiting ([`lane`]), has the core
//! decide it in order, writes all of it in one statement, and only then answers.
//! Operators' documents and keys, which can be about several tenants at once, go
//! their own way under the same locks ([`provision`], [`keys`]). The sweeper
//! ([`sweep`]) sends its commands through the lanes like any caller. What runs for as
//! long as the process does begins anew after a panic ([`supervise`]).

mod cache;
mod clock;
mod keys;
mod lane;
mod provision;
mod queue;
mod replay;
mod shedding;
mod subscriptions;
mod supervise;
mod sweep;
mod wait;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{broadcast, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::domain::amount::Unit;
use crate::domain::answer::{Answer, BalanceView};
use crate::domain::approve::ApprovalRecord;
use crate::domain::budget::Budget;
use crate::domain::id::{BalanceNo, BudgetNo, ReservationId, Sequence, TenantId};
use crate::domain::ledger::{Tip, Versioned};
use crate::domain::period::Period;
use crate::domain::policy::PolicyDocument;
use crate::domain::query::{
    ApprovalQuery, BalanceQuery, EntryQuery, ReservationQuery, StoredEntry,
};
use crate::domain::refusal::Refusal;
use crate::domain::request::{Command, Origin};
use crate::domain::reservation::Reservation;
use crate::domain::scope::Scope;
use crate::domain::state::{Needs, TenantState};
use crate::domain::tenant::{Tenant, TenantConfig};
use crate::domain::time::Timestamp;
use crate::domain::verify::Report;
use crate::metrics::Metrics;
use crate::store::{Store, StoreError};
use queue::{Job, Queue};
use supervise::supervised;

pub use clock::{ClockOff, Unready};
pub use provision::{Provisioned, Provisioning};

/// How much may wait, and how much is decided at once.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Workers, each with a connection of its own. A tenant has one lane.
    pub lanes: usize,
    /// Most commands of one batch.
    pub max_batch: usize,
    /// Most commands that wait in a lane.
    pub max_waiting: usize,
    /// Most commands of one tenant that wait.
    pub max_waiting_per_tenant: usize,
    /// How often overdue reservations are looked for.
    pub sweep_interval: Duration,
}

/// One request as it passes through.
#[derive(Debug, Clone)]
pub struct Call {
    /// Who asks.
    pub origin: Origin,
    /// When the caller stops waiting. What has not been begun by then is not
    /// begun.
    pub deadline: Option<Instant>,
}

/// No answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// The core refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Too much is waiting. Nothing was decided.
    #[error("too many requests are waiting")]
    QueueFull {
        /// When to try again at the earliest.
        retry_after: Duration,
    },
    /// The caller's time was over before the batch began. Nothing was decided.
    #[error("the deadline passed before the request was decided")]
    DeadlineExceeded,
    /// The database can't be reached, or it is not known whether the write was
    /// committed.
    #[error("the database can't be reached")]
    Unavailable {
        /// When to try again at the earliest.
        retry_after: Duration,
    },
    /// Other writers were first too often.
    #[error("too many writers at once")]
    Aborted,
    /// Our fault. The detail is in the log.
    #[error("internal error")]
    Internal,
}

/// What callers are told to wait after a failure that may pass.
const RETRY_AFTER: Duration = Duration::from_millis(250);

impl From<StoreError> for EngineError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict => Self::Aborted,
            StoreError::Unavailable(_) | StoreError::UnknownOutcome(_) => {
                tracing::warn!(%error, "database unavailable");
                Self::Unavailable {
                    retry_after: RETRY_AFTER,
                }
            }
            StoreError::Corrupt(_) | StoreError::Database(_) | StoreError::Schema { .. } => {
                tracing::error!(%error, "database error");
                Self::Internal
            }
        }
    }
}

/// What lanes tell about what they wrote.
type Written = (TenantId, Sequence);

#[derive(Debug)]
struct Shared {
    store: Store,
    lanes: Vec<Arc<Queue>>,
    written: broadcast::Sender<Written>,
    keys: keys::Cache,
    waits: Arc<wait::Waits>,
    metrics: Metrics,
    tasks: TaskTracker,
    stopping: CancellationToken,
    drained: CancellationToken,
}

/// The way in. Clones share everything.
#[derive(Debug, Clone)]
pub struct Engine(Arc<Shared>);

impl Engine {
    /// Starts the lanes and the sweeper.
    pub fn start(store: Store, limits: Limits, metrics: Metrics) -> Self {
        /// Writes that a slow watcher may fall behind before it looks for itself.
        const WRITTEN_KEPT: usize = 1_024;

        let lanes = (0..limits.lanes.max(1))
            .map(|_| {
                Arc::new(Queue::new(
                    limits.max_waiting,
                    limits.max_waiting_per_tenant,
                ))
            })
            .collect();
        let engine = Self(Arc::new(Shared {
            store,
            lanes,
            written: broadcast::Sender::new(WRITTEN_KEPT),
            keys: keys::Cache::default(),
            waits: Arc::default(),
            metrics: metrics.clone(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            drained: CancellationToken::new(),
        }));
        for queue in &engine.0.lanes {
            let (own, queue, metrics) = (engine.clone(), queue.clone(), metrics.clone());
            let work = move || {
                let shared = &own.0;
                let worker = lane::Worker::new(
                    shared.store.clone(),
                    queue.clone(),
                    shared.written.clone(),
                    shared.waits.clone(),
                    limits.max_batch,
                    metrics.clone(),
                );
                worker.run(shared.drained.clone())
            };
            engine.0.tasks.spawn(supervised("lane", work));
        }
        let own = engine.clone();
        let sweeping = move || sweep::run(own.clone(), limits.sweep_interval);
        engine.0.tasks.spawn(supervised("sweeper", sweeping));
        let own = engine.clone();
        let looking = move || wait::look(own.clone());
        engine.0.tasks.spawn(supervised("waits", looking));
        engine
    }

    /// Has a command decided, in the tenant's order. The answer was committed.
    pub async fn execute(
        &self,
        tenant: &TenantId,
        command: Command,
        call: &Call,
    ) -> Result<Answer, EngineError> {
        let (reply, answer) = oneshot::channel();
        let job = Job {
            command,
            origin: call.origin.clone(),
            deadline: call.deadline,
            reply,
            put: Instant::now(),
        };
        if let Err(full) = self.lane(tenant).push(tenant, job) {
            self.0.metrics.refused(full.as_str());
            return Err(EngineError::QueueFull {
                retry_after: RETRY_AFTER,
            });
        }
        self.0.metrics.waiting(1);
        // A worker answers every job that it takes. It is gone only when the process
        // stops, or in the middle of a panic.
        answer.await.unwrap_or_else(|_| {
            if self.0.drained.is_cancelled() {
                return Err(EngineError::Unavailable {
                    retry_after: RETRY_AFTER,
                });
            }
            Err(EngineError::Internal)
        })
    }

    fn lane(&self, tenant: &TenantId) -> &Queue {
        let mut hasher = DefaultHasher::new();
        tenant.hash(&mut hasher);
        let lanes = &self.0.lanes;
        let at = hasher.finish() % u64::try_from(lanes.len()).unwrap_or(1);
        &lanes[usize::try_from(at).unwrap_or(0)]
    }

    /// The time as every decision takes it.
    pub fn now(&self) -> Timestamp {
        now()
    }

    /// Ends when the server begins to stop: long-lived answers end with it.
    pub fn stopping(&self) -> CancellationToken {
        self.0.stopping.clone()
    }

    /// Ends long-lived answers. What is waiting is still decided.
    pub fn begin_stop(&self) {
        self.0.stopping.cancel();
    }

    /// Ends the lanes, once what is waiting has been decided, and the sweeper.
    pub async fn stop(&self) {
        self.begin_stop();
        self.0.drained.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
        self.0.store.close().await;
    }

    /// Whether the database can be used, and the clock agrees with its clock.
    pub async fn check(&self) -> Result<(), Unready> {
        self.0.store.check().await?;
        self.check_clock().await
    }

    /// One reservation.
    pub async fn reservation(
        &self,
        tenant: &TenantId,
        id: ReservationId,
    ) -> Result<Option<Reservation>, EngineError> {
        Ok(self.0.store.reservation(tenant, id).await?)
    }

    /// One approval.
    pub async fn approval(
        &self,
        tenant: &TenantId,
        id: ReservationId,
    ) -> Result<Option<ApprovalRecord>, EngineError> {
        Ok(self.0.store.approval(tenant, id).await?)
    }

    /// Approvals, soonest deadline first.
    pub async fn approvals(
        &self,
        tenant: &TenantId,
        query: &ApprovalQuery,
    ) -> Result<Vec<ApprovalRecord>, EngineError> {
        self.must_exist(tenant).await?;
        Ok(self.0.store.approvals(tenant, query).await?)
    }

    /// Every balance that applies to a reservation's action, as of now.
    pub async fn applicable(
        &self,
        tenant: &TenantId,
        reservation: &Reservation,
    ) -> Result<Vec<BalanceView>, EngineError> {
        let config = self.config(tenant).await?;
        let mut state = TenantState::new(config, Tip::EMPTY, BalanceNo(0));
        let (subject, action) = (&reservation.subject, &reservation.action);
        // An account, then its balance: the third time nothing is missing.
        for _ in 0..3 {
            let mut needs = Needs::default();
            state.need_accounts(subject, action, &mut needs);
            if needs.is_empty() {
                break;
            }
            let of_tenant = BTreeMap::from([(tenant.clone(), needs)]);
            let mut loaded = self.0.store.needed(&of_tenant).await?;
            if let (Some(loaded), Some(needs)) = (loaded.remove(tenant), of_tenant.get(tenant)) {
                state.load(needs, loaded);
            }
        }
        Ok(state.outlook(subject, action, now()))
    }

    /// Reservations, newest first.
    pub async fn reservations(
        &self,
        tenant: &TenantId,
        query: ReservationQuery,
    ) -> Result<Vec<Reservation>, EngineError> {
        self.must_exist(tenant).await?;
        Ok(self.0.store.reservations(tenant, &query).await?)
    }

    /// Balances by number.
    pub async fn balances(
        &self,
        tenant: &TenantId,
        query: BalanceQuery,
    ) -> Result<Vec<(BalanceNo, BalanceView)>, EngineError> {
        self.must_exist(tenant).await?;
        Ok(self.0.store.balances(tenant, &query).await?)
    }

    /// The scopes of balances by number.
    pub async fn scopes(
        &self,
        tenant: &TenantId,
        balances: BTreeSet<BalanceNo>,
    ) -> Result<BTreeMap<BalanceNo, String>, EngineError> {
        Ok(self.0.store.scopes(tenant, balances).await?)
    }

    /// One tenant.
    pub async fn tenant(&self, tenant: &TenantId) -> Result<Option<Tenant>, EngineError> {
        Ok(self.0.store.tenant(tenant).await?)
    }

    /// A tenant with all that decides on its actions.
    pub async fn config(&self, tenant: &TenantId) -> Result<Arc<TenantConfig>, EngineError> {
        let found = self.0.store.config(tenant).await?;
        Ok(found.ok_or(Refusal::TenantNotFound)?)
    }

    /// A tenant's policy, or, of the operators' chain, the one for all tenants.
    pub async fn policy(
        &self,
        tenant: &TenantId,
    ) -> Result<Versioned<PolicyDocument>, EngineError> {
        Ok(self.0.store.policy(tenant).await?)
    }

    /// Tenants by name.
    pub async fn tenants(
        &self,
        after: Option<TenantId>,
        limit: i64,
    ) -> Result<Vec<Tenant>, EngineError> {
        Ok(self.0.store.tenants(after, limit).await?)
    }

    /// One present budget.
    pub async fn budget(
        &self,
        tenant: &TenantId,
        scope: &Scope,
        unit: Unit,
        period: Period,
    ) -> Result<Option<Budget>, EngineError> {
        let found = self
            .0
            .store
            .budget(tenant, scope, unit.as_str(), period.as_str());
        Ok(found.await?)
    }

    /// Present budgets by number.
    pub async fn budgets(
        &self,
        tenant: &TenantId,
        after: Option<BudgetNo>,
        limit: i64,
    ) -> Result<Vec<Budget>, EngineError> {
        self.must_exist(tenant).await?;
        Ok(self.0.store.budgets(tenant, after, limit).await?)
    }

    /// One entry.
    pub async fn entry(
        &self,
        tenant: &TenantId,
        seq: Sequence,
    ) -> Result<Option<StoredEntry>, EngineError> {
        Ok(self.0.store.entry(tenant, seq).await?)
    }

    /// Entries by sequence.
    pub async fn entries(
        &self,
        tenant: &TenantId,
        query: EntryQuery,
    ) -> Result<Vec<StoredEntry>, EngineError> {
        Ok(self.0.store.entries(tenant, &query).await?)
    }

    /// The last entry's sequence; nothing where there is no such chain.
    pub async fn last_sequence(&self, tenant: &TenantId) -> Result<Option<Sequence>, EngineError> {
        Ok(self.0.store.last_sequence(tenant).await?)
    }

    /// Recomputes a chain and its balances.
    pub async fn verify(&self, tenant: &TenantId) -> Result<Report, EngineError> {
        let report = self.0.store.verify(tenant).await?;
        Ok(report.ok_or(Refusal::TenantNotFound)?)
    }

    /// What this process writes from now on, by tenant.
    pub fn written(&self) -> Watch {
        Watch(self.0.written.subscribe())
    }

    async fn must_exist(&self, tenant: &TenantId) -> Result<(), EngineError> {
        match self.0.store.tenant(tenant).await? {
            Some(_) => Ok(()),
            None => Err(Refusal::TenantNotFound.into()),
        }
    }
}

/// Tells when something may have been written.
#[derive(Debug)]
pub struct Watch(broadcast::Receiver<Written>);

impl Watch {
    /// Returns when the tenant's chain may have grown beyond `after`: at once
    /// when this process wrote it, within a second when another did.
    pub async fn wait(&mut self, tenant: &TenantId, after: Sequence) {
        const OTHERS: Duration = Duration::from_secs(1);

        let grown = async {
            loop {
                match self.0.recv().await {
                    Ok((of, seq)) if of == *tenant && seq > after => return,
                    Ok(_) => {}
                    // Too much was missed to tell: have a look.
                    Err(broadcast::error::RecvError::Lagged(_)) => return,
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        let _ = tokio::time::timeout(OTHERS, grown).await;
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

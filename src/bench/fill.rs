//! Fills a database as a year of use would: chains that the core has made, with all
//! that is kept beside them, loaded by COPY.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use tokio::sync::mpsc;

use super::world::{self, ACTUAL, ALLOCATION, ESTIMATE};
use crate::domain::amount::{Amount, Amounts, Unit};
use crate::domain::budget::{BudgetState, CarryOver, Limit, OnExceeded, Terms};
use crate::domain::id::{
    BalanceNo, IdempotencyKey, KeyHash, Method, Name, ReservationId, Sequence, TenantId,
};
use crate::domain::ledger::{Body, EntryKind, Tip};
use crate::domain::period::Calendar;
use crate::domain::provision::{BudgetKey, BudgetSpec, Document, Plan, TenantSpec};
use crate::domain::request::{
    Action, Ask, Command, Commit, Context, Metadata, Metrics, Origin, Reserve,
};
use crate::domain::scope::{Levels, Scope, Subject};
use crate::domain::state::{Applied, Loaded, Needs, TenantState};
use crate::domain::tenant::{Settings, TenantConfig};
use crate::domain::time::Timestamp;
use crate::store::{CopyRows, HeadWrite, Store};

/// How long ago it began.
const SPAN: Duration = Duration::from_secs(330 * 86_400);
/// Loaded at once.
const CHUNK_BYTES: usize = 64 << 20;
/// Pairs between two looks at how much was gathered.
const PAIRS: u64 = 500;
/// Entries of a tenant that has never acted.
const PROVISIONED: u64 = 1;

/// Loads about `entries` ledger entries: half of them of the tenant `hot`, the others
/// spread evenly over `tenants` more, each with its budgets.
pub(super) async fn fill(
    store: &Store,
    entries: u64,
    tenants: u32,
    depth: u8,
) -> anyhow::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let end = Timestamp::from_micros(i64::try_from(now.as_micros())?);
    let start = Timestamp::from_micros(i64::try_from((now - SPAN).as_micros())?);
    store.make_months(start, end).await?;
    let (send, mut receive) = mpsc::channel(1);
    let filling = tokio::task::spawn_blocking(move || {
        let mut out = Out {
            rows: CopyRows::new(),
            send,
        };
        let hot = entries / 2;
        let each = (entries - hot) / u64::from(tenants.max(1));
        tenant_history("hot", depth, hot, start, &mut out)?;
        for number in 0..tenants {
            tenant_history(&world::name(number), depth, each, start, &mut out)?;
        }
        out.flush()
    });
    while let Some(rows) = receive.recv().await {
        store.copy_in(&rows).await?;
    }
    filling.await??;
    store.vacuum().await?;
    Ok(())
}

/// Rows on their way to the database.
struct Out {
    rows: CopyRows,
    send: mpsc::Sender<CopyRows>,
}

impl Out {
    fn flush_if_full(&mut self) -> anyhow::Result<()> {
        if self.rows.len() < CHUNK_BYTES {
            return Ok(());
        }
        self.flush()
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        let rows = std::mem::replace(&mut self.rows, CopyRows::new());
        let sent = self.send.blocking_send(rows);
        sent.ok().context("the database took no more")
    }
}

fn amount(value: i64) -> anyhow::Result<Amounts> {
    Ok(Amounts::NONE.with(Unit::RiskPoints, Amount::new(value)?))
}

/// The subject that callers will name too.
fn subject(tenant: &TenantId, depth: u8) -> anyhow::Result<Subject> {
    let named = world::subject(tenant.as_str(), depth);
    let level = |value: String| match value.as_str() {
        "" => anyhow::Ok(None),
        value => Ok(Some(Name::parse(value)?)),
    };
    let levels = Levels {
        workspace: level(named.workspace)?,
        app: level(named.app)?,
        workflow: level(named.workflow)?,
        agent: level(named.agent)?,
        toolset: level(named.toolset)?,
    };
    Ok(Subject::new(tenant.clone(), levels, BTreeMap::new())?)
}

/// One tenant from its first day on, in about so many entries.
fn tenant_history(
    name: &str,
    depth: u8,
    entries: u64,
    start: Timestamp,
    out: &mut Out,
) -> anyhow::Result<()> {
    let id = TenantId::parse(name)?;
    let document = Document {
        tenants: vec![TenantSpec {
            id: id.clone(),
            settings: Settings::default(),
        }],
        budgets: world::scopes(name, depth)
            .iter()
            .map(|scope| {
                Ok(BudgetSpec {
                    key: BudgetKey {
                        scope: Scope::parse(scope)?,
                        unit: Unit::RiskPoints,
                        period: Calendar::total().period(),
                    },
                    calendar: Calendar::total(),
                    thresholds: Arc::default(),
                    on_exceeded: OnExceeded::Deny,
                    terms: Terms {
                        limit: Limit::Allocation(Amount::new(ALLOCATION)?),
                        overdraft_limit: Amount::ZERO,
                        carry_over: CarryOver::None,
                        state: BudgetState::Active,
                    },
                })
            })
            .collect::<anyhow::Result<_>>()?,
        ..Document::default()
    };
    let mut tip = Tip::EMPTY;
    let plan = Plan::new(&document, &BTreeMap::new(), true, start, |_| Sequence(1))?;
    let own = plan.tenants.get(&id).context("a plan for the tenant")?;
    let tenant = own.tenant.clone().context("a new tenant")?;
    let mut body = Body::new(id.clone(), EntryKind::Provision);
    body.changes = own.changes.clone();
    body.settings = Some(tenant.settings.clone());
    body.budgets = own.provisioned();
    out.rows.tenant(&tenant);
    for budget in &own.budgets {
        out.rows.budget(&id, budget);
    }
    out.rows.entry(&id, &tip.append(body, start));

    let config = Arc::new(TenantConfig::new(tenant, own.budgets.clone()));
    let mut past = Past {
        state: TenantState::new(config, tip, BalanceNo(1)),
        ask: Ask {
            subject: Arc::new(subject(&id, depth)?),
            action: Arc::new(Action {
                name: "refund_customer".into(),
                kind: Some("tool.payment".into()),
                arguments_sha256: None,
            }),
            estimates: amount(ESTIMATE)?,
            context: Context::default(),
            arguments: None,
            explain: false,
        },
        origin: Origin {
            key: None,
            confinement: None,
            request_id: "".into(),
            trace_id: "".into(),
        },
        number: 0,
        id,
    };
    let pairs = entries.saturating_sub(PROVISIONED) / 2;
    let step = SPAN.as_micros() / u128::from(pairs.max(1) + 1);
    let mut fence = 1;
    let mut balances = BTreeMap::new();
    for first in (0..pairs).step_by(usize::try_from(PAIRS)?) {
        for pair in first..pairs.min(first + PAIRS) {
            let at = i64::try_from(step * u128::from(pair))?;
            past.pair(Timestamp::from_micros(start.as_micros() + at))?;
            // Each pair by itself: a reservation is then stored as settled at once.
            let changes = past.state.take_changes();
            for balance in changes.balances {
                balances.insert(balance.no, balance);
            }
            let mut settled = Vec::new();
            for reservation in &changes.reservations {
                out.rows.reservation(&past.id, reservation)?;
                settled.push(reservation.id);
            }
            for (key, seq) in &changes.keys {
                out.rows.key(&past.id, key, *seq);
            }
            for entry in &changes.entries {
                out.rows.entry(&past.id, entry);
            }
            past.state.trim(&settled, 1_000);
            fence += 1;
        }
        out.flush_if_full()?;
    }
    for balance in balances.values() {
        out.rows.balance(&past.id, balance)?;
    }
    let head = HeadWrite {
        fence,
        tip: past.state.tip,
        next_balance: past.state.next_balance,
    };
    out.rows.head(&past.id, &head);
    out.flush_if_full()
}

/// One tenant's life so far.
struct Past {
    id: TenantId,
    state: TenantState,
    ask: Ask,
    origin: Origin,
    number: u64,
}

impl Past {
    /// An action that was reserved and committed.
    fn pair(&mut self, now: Timestamp) -> anyhow::Result<()> {
        self.number += 1;
        let key = IdempotencyKey::parse(&format!("past-{}-reserve", self.number))?;
        let reservation = ReservationId::of(KeyHash::of(&self.id, Method::Reserve, &key));
        let reserve = Reserve {
            ask: self.ask.clone(),
            key: Some(key),
            ttl: None,
            grace: None,
            overage_policy: None,
            metadata: Metadata::default(),
        };
        self.apply(Command::Reserve(Box::new(reserve)), now)?;
        let commit = Commit {
            key: IdempotencyKey::parse(&format!("past-{}-commit", self.number))?,
            reservation,
            actual: amount(ACTUAL)?,
            metrics: Metrics::default(),
            metadata: Metadata::default(),
        };
        self.apply(Command::Commit(Box::new(commit)), now)
    }

    fn apply(&mut self, command: Command, now: Timestamp) -> anyhow::Result<()> {
        // Nothing is stored yet: what is needed and not there does not exist.
        let mut needs = Needs::default();
        self.state.needs(&command, false, &mut needs);
        self.state.load(&needs, Loaded::default());
        match self.state.apply(&command, &self.origin, now) {
            Applied::Done(answer) => {
                answer?;
                Ok(())
            }
            Applied::KeyNeeded => anyhow::bail!("a pair of the past was not allowed"),
        }
    }
}

//! The path of every decision: what a batch reads, and the one statement that
//! writes it.
//!
//! All statements take arrays: a batch costs as many round trips as a single
//! request. Each table is changed once in a statement.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sqlx::{Connection as _, PgConnection};

use super::documents::{Compiled, read_documents};
use super::rows::{self, column, scope_key, time};
use super::{StoreError, sort, sort_write};
use crate::domain::activity::{Activity, ActivityKey};
use crate::domain::approve::{ApprovalRecord, ApprovalState};
use crate::domain::budget::Balance;
use crate::domain::id::{BalanceNo, KeyHash, KeyId, ReservationId, Sequence, TenantId};
use crate::domain::ledger::{Body, ChainHash, Entry, Tip};
use crate::domain::provision::DocumentKind;
use crate::domain::reservation::{Reservation, Status};
use crate::domain::state::{Changes, Loaded, Needs};
use crate::domain::tenant::TenantConfig;

/// A tenant's head row: the end of its chain, and the fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Counts writes.
    pub fence: i64,
    /// The end of the chain.
    pub tip: Tip,
    /// The number that the next balance gets.
    pub next_balance: BalanceNo,
    /// Counts changes of configuration.
    pub config_version: i64,
}

/// Where a write moves a head to.
#[derive(Debug, Clone, Copy)]
pub struct HeadWrite {
    /// The fence that was decided upon.
    pub fence: i64,
    /// The end of the chain after it.
    pub tip: Tip,
    /// The number that the next balance gets after it.
    pub next_balance: BalanceNo,
}

/// What a batch writes for one tenant.
#[derive(Debug)]
pub struct TenantWrite {
    /// Whose.
    pub tenant: TenantId,
    /// Where its head moves to.
    pub head: HeadWrite,
    /// What else.
    pub changes: Changes,
}

fn names<'a>(tenants: impl IntoIterator<Item = &'a TenantId>) -> Vec<String> {
    tenants.into_iter().map(|t| t.as_str().to_owned()).collect()
}

/// Reads heads; with `lock` so that they stay as they are until the transaction
/// ends. Tenants that do not exist are not among the answer.
pub(crate) async fn read_heads(
    conn: &mut PgConnection,
    tenants: &BTreeSet<TenantId>,
    lock: bool,
) -> Result<BTreeMap<TenantId, Head>, StoreError> {
    const READ: &str = "/* read_heads */
        SELECT tenant_id, fence, seq, hash, time_us, next_balance, config_version
        FROM heads WHERE tenant_id = ANY($1)";
    // In the order of names: see the lock order in `store`.
    const LOCK: &str = "/* lock_heads */
        SELECT tenant_id, fence, seq, hash, time_us, next_balance, config_version
        FROM heads WHERE tenant_id = ANY($1) ORDER BY tenant_id FOR UPDATE";
    let rows = sqlx::query(if lock { LOCK } else { READ })
        .bind(names(tenants))
        .fetch_all(conn)
        .await
        .map_err(sort)?;
    let mut heads = BTreeMap::new();
    for row in rows {
        let tenant = TenantId::from_stored(column(&row, "tenant_id")?)?;
        let hash = ChainHash::from_stored(column(&row, "hash")?)
            .ok_or_else(|| StoreError::Corrupt("a head's hash has not 32 bytes".into()))?;
        let head = Head {
            fence: column(&row, "fence")?,
            tip: Tip {
                seq: Sequence(column(&row, "seq")?),
                hash,
                time: time(&row, "time_us")?,
            },
            next_balance: BalanceNo(column(&row, "next_balance")?),
            config_version: column(&row, "config_version")?,
        };
        heads.insert(tenant, head);
    }
    Ok(heads)
}

/// Reads configuration. To be read after the heads that guard it.
pub(crate) async fn read_configs(
    conn: &mut PgConnection,
    tenants: &BTreeSet<TenantId>,
    compiled: &Compiled,
) -> Result<BTreeMap<TenantId, Arc<TenantConfig>>, StoreError> {
    let names = names(tenants);
    let tenant_rows =
        sqlx::query("/* read_tenants */ SELECT * FROM tenants WHERE tenant_id = ANY($1)")
            .bind(&names)
            .fetch_all(&mut *conn)
            .await
            .map_err(sort)?;
    let budget_rows =
        sqlx::query("/* read_budgets */ SELECT * FROM budgets WHERE tenant_id = ANY($1)")
            .bind(&names)
            .fetch_all(&mut *conn)
            .await
            .map_err(sort)?;
    let documents = read_documents(conn, tenants).await?;
    let mut budgets: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for row in budget_rows {
        let tenant: String = column(&row, "tenant_id")?;
        budgets.entry(tenant).or_default().push(rows::budget(&row)?);
    }
    let mut configs = BTreeMap::new();
    for row in tenant_rows {
        let tenant = rows::tenant(&row)?;
        let own = budgets.remove(tenant.id.as_str()).unwrap_or_default();
        let rules = compiled.rules(&documents, &tenant.id)?;
        let config = TenantConfig::new(tenant, own).with_rules(rules);
        configs.insert(config.tenant.id.clone(), Arc::new(config));
    }
    Ok(configs)
}

/// Two arrays of the same length: the form in which sets of keys travel.
struct Pairs<T> {
    tenants: Vec<String>,
    values: Vec<T>,
}

impl<T> Pairs<T> {
    fn of<'a, S>(
        needs: &'a BTreeMap<TenantId, Needs>,
        set: impl Fn(&'a Needs) -> &'a BTreeSet<S>,
        value: impl Fn(&'a S) -> T,
    ) -> Self
    where
        S: 'a,
    {
        let mut pairs = Self {
            tenants: Vec::new(),
            values: Vec::new(),
        };
        for (tenant, needs) in needs {
            for item in set(needs) {
                pairs.tenants.push(tenant.as_str().to_owned());
                pairs.values.push(value(item));
            }
        }
        pairs
    }

    fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// Reads what some tenants' commands need.
pub(crate) async fn read_needs(
    conn: &mut PgConnection,
    needs: &BTreeMap<TenantId, Needs>,
) -> Result<BTreeMap<TenantId, Loaded>, StoreError> {
    let mut loaded: BTreeMap<TenantId, Loaded> = needs
        .keys()
        .map(|tenant| (tenant.clone(), Loaded::default()))
        .collect();
    let mut into = |row: &sqlx::postgres::PgRow,
                    put: &mut dyn FnMut(&mut Loaded) -> Result<(), StoreError>| {
        let tenant = TenantId::from_stored(column(row, "tenant_id")?)?;
        loaded.get_mut(&tenant).map_or(Ok(()), put)
    };

    let keys = Pairs::of(needs, |n| &n.keys, |key| key.as_bytes().to_vec());
    if !keys.is_empty() {
        let rows = sqlx::query(
            "/* read_keys */
             SELECT k.tenant_id, k.key_hash, k.seq
             FROM unnest($1::text[], $2::bytea[]) AS u (tenant_id, key_hash)
             JOIN idempotency_keys k ON k.tenant_id = u.tenant_id AND k.key_hash = u.key_hash
             UNION ALL
             SELECT r.tenant_id, r.reservation_id, r.reserve_seq
             FROM unnest($1::text[], $2::bytea[]) AS u (tenant_id, key_hash)
             JOIN reservations r ON r.tenant_id = u.tenant_id AND r.reservation_id = u.key_hash",
        )
        .bind(&keys.tenants)
        .bind(&keys.values)
        .fetch_all(&mut *conn)
        .await
        .map_err(sort)?;
        for row in rows {
            let key = KeyHash::from_stored(column(&row, "key_hash")?)?;
            let seq = Sequence(column(&row, "seq")?);
            into(&row, &mut |loaded| {
                loaded.keys.push((key, seq));
                Ok(())
            })?;
        }
    }

    let entries = Pairs::of(needs, |n| &n.entries, |entry| entry.1.0);
    if !entries.is_empty() {
        let hashes: Vec<KeyHash> = needs
            .values()
            .flat_map(|needs| needs.entries.iter().map(|entry| entry.0))
            .collect();
        let rows = sqlx::query(
            "/* read_entries */
             SELECT l.tenant_id, l.body, u.at
             FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS u (tenant_id, seq, at)
             JOIN ledger l ON l.tenant_id = u.tenant_id AND l.seq = u.seq",
        )
        .bind(&entries.tenants)
        .bind(&entries.values)
        .fetch_all(&mut *conn)
        .await
        .map_err(sort)?;
        for row in rows {
            let body: Body = serde_json::from_str(column(&row, "body")?)?;
            let at: i64 = column(&row, "at")?;
            let key = usize::try_from(at - 1)
                .ok()
                .and_then(|at| hashes.get(at).copied())
                .ok_or_else(|| StoreError::Corrupt("an ordinal is out of range".into()))?;
            into(&row, &mut |loaded| {
                loaded.bodies.push((key, body.clone()));
                Ok(())
            })?;
        }
    }

    let ids = Pairs::of(
        needs,
        |n| &n.reservations,
        |id: &ReservationId| id.as_bytes().to_vec(),
    );
    if !ids.is_empty() {
        let rows = sqlx::query(
            "/* read_reservations */
             SELECT r.*
             FROM unnest($1::text[], $2::bytea[]) AS u (tenant_id, reservation_id)
             JOIN reservations r ON r.tenant_id = u.tenant_id AND r.reservation_id = u.reservation_id",
        )
        .bind(&ids.tenants)
        .bind(&ids.values)
        .fetch_all(&mut *conn)
        .await
        .map_err(sort)?;
        for row in rows {
            let reservation = rows::reservation(&row)?;
            into(&row, &mut |loaded| {
                loaded.reservations.push(reservation.clone());
                Ok(())
            })?;
        }
    }

    let numbers = Pairs::of(needs, |n| &n.balances, |no| no.0);
    if !numbers.is_empty() {
        let rows = sqlx::query(
            "/* read_balances */
             SELECT b.*
             FROM unnest($1::text[], $2::bigint[]) AS u (tenant_id, balance_no)
             JOIN balances b ON b.tenant_id = u.tenant_id AND b.balance_no = u.balance_no",
        )
        .bind(&numbers.tenants)
        .bind(&numbers.values)
        .fetch_all(&mut *conn)
        .await
        .map_err(sort)?;
        for row in rows {
            let balance = rows::balance(&row)?;
            into(&row, &mut |loaded| {
                loaded.balances.push(balance.clone());
                Ok(())
            })?;
        }
    }

    let accounts = Pairs::of(needs, |n| &n.accounts, |a| (a.0.0, scope_key(&a.1)));
    if !accounts.is_empty() {
        let (budgets, scopes): (Vec<i32>, Vec<Vec<u8>>) = accounts.values.into_iter().unzip();
        let rows = sqlx::query(
            "/* read_accounts */
             SELECT b.*
             FROM unnest($1::text[], $2::int[], $3::bytea[]) AS u (tenant_id, budget_no, scope_key)
             CROSS JOIN LATERAL (
                 SELECT * FROM balances b
                 WHERE b.tenant_id = u.tenant_id AND b.budget_no = u.budget_no
                   AND b.scope_key = u.scope_key
                 ORDER BY b.period_start_us DESC LIMIT 1
             ) b",
        )
        .bind(&accounts.tenants)
        .bind(budgets)
        .bind(scopes)
        .fetch_all(&mut *conn)
        .await
        .map_err(sort)?;
        for row in rows {
            let balance = rows::balance(&row)?;
            into(&row, &mut |loaded| {
                loaded.balances.push(balance.clone());
                Ok(())
            })?;
        }
    }

    let activity = Pairs::of(needs, |n| &n.activity, |key| key.as_bytes().to_vec());
    if !activity.is_empty() {
        let rows = sqlx::query(
            "/* read_activity */
             SELECT a.tenant_id, a.activity_key, a.body
             FROM unnest($1::text[], $2::bytea[]) AS u (tenant_id, activity_key)
             JOIN activity a ON a.tenant_id = u.tenant_id AND a.activity_key = u.activity_key",
        )
        .bind(&activity.tenants)
        .bind(&activity.values)
        .fetch_all(&mut *conn)
        .await
        .map_err(sort)?;
        for row in rows {
            let key = ActivityKey::from_stored(column(&row, "activity_key")?)?;
            let activity: Activity = serde_json::from_str(column(&row, "body")?)?;
            into(&row, &mut |loaded| {
                loaded.activity.push((key, activity.clone()));
                Ok(())
            })?;
        }
    }

    let ids = Pairs::of(needs, |n| &n.approvals, |id| id.as_bytes().to_vec());
    if !ids.is_empty() {
        let rows = sqlx::query(
            "/* read_approvals */
             SELECT a.*
             FROM unnest($1::text[], $2::bytea[]) AS u (tenant_id, reservation_id)
             JOIN approvals a ON a.tenant_id = u.tenant_id AND a.reservation_id = u.reservation_id",
        )
        .bind(&ids.tenants)
        .bind(&ids.values)
        .fetch_all(&mut *conn)
        .await
        .map_err(sort)?;
        for row in rows {
            let record = super::approvals::record(&row)?;
            into(&row, &mut |loaded| {
                loaded.approvals.push(record.clone());
                Ok(())
            })?;
        }
    }
    Ok(loaded)
}

/// The columns of a write, as arrays. They borrow what they can: what is written is
/// copied once, into the message.
#[derive(Default)]
struct Columns<'a> {
    heads: HeadColumns<'a>,
    balances: BalanceColumns<'a>,
    reservations: ReservationColumns<'a>,
    keys: KeyColumns<'a>,
    ledger: LedgerColumns<'a>,
    activity: ActivityColumns<'a>,
    documents: DocumentColumns<'a>,
    approvals: ApprovalColumns<'a>,
}

#[derive(Default)]
struct HeadColumns<'a> {
    tenant: Vec<&'a str>,
    fence: Vec<i64>,
    seq: Vec<i64>,
    hash: Vec<&'a [u8]>,
    time: Vec<i64>,
    next_balance: Vec<i64>,
}

#[derive(Default)]
struct BalanceColumns<'a> {
    tenant: Vec<&'a str>,
    no: Vec<i64>,
    budget: Vec<i32>,
    scope: Vec<&'a str>,
    scope_key: Vec<Vec<u8>>,
    start: Vec<i64>,
    end: Vec<Option<i64>>,
    granted: Vec<i64>,
    reserved: Vec<i64>,
    spent: Vec<i64>,
    debt: Vec<i64>,
    over_limit: Vec<Option<i64>>,
    credits: Vec<Option<String>>,
    next_lapse: Vec<Option<i64>>,
}

#[derive(Default)]
struct ReservationColumns<'a> {
    tenant: Vec<&'a str>,
    id: Vec<&'a [u8]>,
    version: Vec<i32>,
    state: Vec<&'static str>,
    scope: Vec<String>,
    body: Vec<String>,
    holds: Vec<String>,
    created: Vec<i64>,
    reserve_seq: Vec<i64>,
    expires: Vec<i64>,
    lapses: Vec<i64>,
    settled: Vec<Option<i64>>,
    settle_seq: Vec<Option<i64>>,
    charged: Vec<Option<String>>,
}

#[derive(Default)]
struct KeyColumns<'a> {
    tenant: Vec<&'a str>,
    hash: Vec<&'a [u8]>,
    seq: Vec<i64>,
}

#[derive(Default)]
struct LedgerColumns<'a> {
    tenant: Vec<&'a str>,
    seq: Vec<i64>,
    time: Vec<i64>,
    kind: Vec<&'static str>,
    decision: Vec<Option<&'static str>>,
    reservation: Vec<Option<&'a [u8]>>,
    body: Vec<&'a str>,
    prev_hash: Vec<&'a [u8]>,
    hash: Vec<&'a [u8]>,
}

#[derive(Default)]
struct ActivityColumns<'a> {
    tenant: Vec<&'a str>,
    key: Vec<&'a [u8]>,
    last: Vec<i64>,
    body: Vec<String>,
}

#[derive(Default)]
struct DocumentColumns<'a> {
    tenant: Vec<&'a str>,
    kind: Vec<&'static str>,
    version: Vec<i64>,
    body: Vec<String>,
}

#[derive(Default)]
struct ApprovalColumns<'a> {
    tenant: Vec<&'a str>,
    id: Vec<&'a [u8]>,
    state: Vec<&'static str>,
    deadline: Vec<i64>,
    requested: Vec<i64>,
    reserve_seq: Vec<i64>,
    body: Vec<String>,
    resolved: Vec<Option<i64>>,
    resolved_by: Vec<Option<&'a str>>,
    approver: Vec<Option<&'a str>>,
    note: Vec<Option<&'a str>>,
    resolve_seq: Vec<Option<i64>>,
}

impl<'a> ApprovalColumns<'a> {
    fn push(&mut self, tenant: &'a str, record: &'a ApprovalRecord) -> Result<(), StoreError> {
        let resolution = record.resolution.as_ref();
        self.tenant.push(tenant);
        self.id.push(record.reservation.as_bytes());
        let state = resolution.map_or(ApprovalState::Pending, |resolution| resolution.state);
        self.state.push(state.as_str());
        self.deadline.push(record.approval.deadline.as_micros());
        self.requested.push(record.requested_at.as_micros());
        self.reserve_seq.push(record.reserve_seq.0);
        self.body.push(serde_json::to_string(&record.approval)?);
        self.resolved.push(resolution.map(|of| of.at.as_micros()));
        self.resolved_by
            .push(resolution.and_then(|of| of.by.as_ref().map(KeyId::as_str)));
        self.approver.push(resolution.map(|of| &*of.approver));
        self.note.push(resolution.map(|of| &*of.note));
        self.resolve_seq.push(resolution.map(|of| of.seq.0));
        Ok(())
    }
}

impl<'a> Columns<'a> {
    fn of(writes: &'a [TenantWrite]) -> Result<Self, StoreError> {
        let mut columns = Self::default();
        for write in writes {
            let tenant = write.tenant.as_str();
            columns.heads.push(tenant, &write.head);
            for balance in &write.changes.balances {
                columns.balances.push(tenant, balance)?;
            }
            for reservation in &write.changes.reservations {
                columns.reservations.push(tenant, reservation)?;
            }
            for (key, seq) in &write.changes.keys {
                columns.keys.tenant.push(tenant);
                columns.keys.hash.push(key.as_bytes());
                columns.keys.seq.push(seq.0);
            }
            for entry in &write.changes.entries {
                columns.ledger.push(tenant, entry);
            }
            for (key, activity) in &write.changes.activity {
                columns.activity.tenant.push(tenant);
                columns.activity.key.push(key.as_bytes());
                columns.activity.last.push(activity.last.as_micros());
                columns.activity.body.push(serde_json::to_string(activity)?);
            }
            for record in &write.changes.approvals {
                columns.approvals.push(tenant, record)?;
            }
            if let Some(freezes) = &write.changes.freezes {
                columns.documents.tenant.push(tenant);
                columns.documents.kind.push(DocumentKind::Freezes.as_str());
                columns.documents.version.push(freezes.version);
                let body = serde_json::to_string(&freezes.document)?;
                columns.documents.body.push(body);
            }
        }
        Ok(columns)
    }
}

impl<'a> HeadColumns<'a> {
    fn push(&mut self, tenant: &'a str, head: &'a HeadWrite) {
        self.tenant.push(tenant);
        self.fence.push(head.fence + 1);
        self.seq.push(head.tip.seq.0);
        self.hash.push(&head.tip.hash.0);
        self.time.push(head.tip.time.as_micros());
        self.next_balance.push(head.next_balance.0);
    }
}

impl<'a> BalanceColumns<'a> {
    fn push(&mut self, tenant: &'a str, balance: &'a Balance) -> Result<(), StoreError> {
        self.tenant.push(tenant);
        self.no.push(balance.no.0);
        self.budget.push(balance.budget.0);
        self.scope.push(&balance.scope);
        self.scope_key.push(scope_key(&balance.scope));
        self.start.push(balance.window.start.as_micros());
        self.end.push(balance.window.end.map(|at| at.as_micros()));
        self.granted.push(balance.granted);
        self.reserved.push(balance.reserved.get());
        self.spent.push(balance.spent.get());
        self.debt.push(balance.debt.get());
        self.over_limit.push(balance.over_limit.map(|seq| seq.0));
        self.credits.push(rows::credits_text(balance)?);
        self.next_lapse
            .push(balance.next_lapse.map(|at| at.as_micros()));
        Ok(())
    }
}

impl<'a> ReservationColumns<'a> {
    fn push(&mut self, tenant: &'a str, reservation: &'a Reservation) -> Result<(), StoreError> {
        let (state, settlement) = match &reservation.status {
            Status::Pending => ("PENDING_APPROVAL", None),
            Status::Active => ("ACTIVE", None),
            Status::Settled(settlement) => (settlement.kind.as_str(), Some(settlement)),
        };
        // A row that exists keeps what never changes, so that a settlement need not
        // write it again.
        let is_new = reservation.version == 1;
        self.tenant.push(tenant);
        self.id.push(reservation.id.as_bytes());
        self.version.push(reservation.version);
        self.state.push(state);
        self.scope.push(if is_new {
            reservation.subject.scope_text()
        } else {
            String::new()
        });
        self.body.push(if is_new {
            rows::reservation_body(reservation)?
        } else {
            String::new()
        });
        self.holds
            .push(serde_json::to_string(&reservation.tranches)?);
        self.created.push(reservation.created_at.as_micros());
        self.reserve_seq.push(reservation.reserve_seq.0);
        self.expires.push(reservation.expires_at.as_micros());
        self.lapses.push(reservation.settles_until().as_micros());
        self.settled.push(settlement.map(|s| s.at.as_micros()));
        self.settle_seq.push(settlement.map(|s| s.seq.0));
        let charged = settlement.filter(|s| !s.charged.is_empty());
        self.charged.push(match charged {
            Some(settlement) => Some(serde_json::to_string(&settlement.charged)?),
            None => None,
        });
        Ok(())
    }
}

impl<'a> LedgerColumns<'a> {
    fn push(&mut self, tenant: &'a str, entry: &'a Entry) {
        self.tenant.push(tenant);
        self.seq.push(entry.body.seq.0);
        self.time.push(entry.body.time.as_micros());
        self.kind.push(entry.body.kind.as_str());
        self.decision.push(entry.body.decision.map(|d| d.as_str()));
        let reservation = entry.body.reservation.as_ref();
        self.reservation
            .push(reservation.map(|id| id.as_bytes().as_slice()));
        self.body.push(&entry.text);
        self.prev_hash.push(&entry.prev_hash.0);
        self.hash.push(&entry.hash.0);
    }
}

/// The statement that writes a batch, with further tables in the same one.
macro_rules! write_batch {
    ($name:literal, $more:literal) => {
        concat!(
            $name,
            "
        WITH fence AS (
            INSERT INTO heads AS h (tenant_id, fence, seq, hash, time_us, next_balance, config_version)
            SELECT *, 0 FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bytea[], $5::bigint[], $6::bigint[])
            ON CONFLICT (tenant_id) DO UPDATE SET
                fence = excluded.fence, seq = excluded.seq, hash = excluded.hash,
                time_us = excluded.time_us, next_balance = excluded.next_balance
            WHERE h.fence = excluded.fence - 1
            RETURNING 1
        ), passed AS (
            SELECT count(*) = cardinality($1::text[]) AS ok FROM fence
        ), balances_put AS (
            INSERT INTO balances (tenant_id, balance_no, budget_no, scope, scope_key, period_start_us,
                period_end_us, granted, reserved, spent, debt, over_limit_seq, credits, next_lapse_us)
            SELECT u.* FROM unnest($7::text[], $8::bigint[], $9::int[], $10::text[], $11::bytea[], $12::bigint[],
                $13::bigint[], $14::bigint[], $15::bigint[], $16::bigint[], $17::bigint[], $18::bigint[],
                $19::text[], $20::bigint[]) AS u
            WHERE (SELECT ok FROM passed)
            ON CONFLICT (tenant_id, balance_no) DO UPDATE SET
                granted = excluded.granted, reserved = excluded.reserved, spent = excluded.spent,
                debt = excluded.debt, over_limit_seq = excluded.over_limit_seq,
                credits = excluded.credits, next_lapse_us = excluded.next_lapse_us
        ), reservations_put AS (
            INSERT INTO reservations AS r (tenant_id, reservation_id, version, state, scope, body, holds,
                created_us, reserve_seq, expires_us, lapses_us, settled_us, settle_seq, charged)
            SELECT u.* FROM unnest($21::text[], $22::bytea[], $23::int[], $24::text[], $25::text[], $26::text[],
                $27::text[], $28::bigint[], $29::bigint[], $30::bigint[], $31::bigint[], $32::bigint[],
                $33::bigint[], $34::text[]) AS u
            WHERE (SELECT ok FROM passed)
            ON CONFLICT (tenant_id, reservation_id) DO UPDATE SET
                version = excluded.version, state = excluded.state, holds = excluded.holds,
                expires_us = excluded.expires_us, lapses_us = excluded.lapses_us,
                settled_us = excluded.settled_us, settle_seq = excluded.settle_seq,
                charged = excluded.charged
            WHERE r.version = excluded.version - 1
            RETURNING 1
        ), keys_put AS (
            INSERT INTO idempotency_keys (tenant_id, key_hash, seq)
            SELECT u.* FROM unnest($35::text[], $36::bytea[], $37::bigint[]) AS u
            WHERE (SELECT ok FROM passed)
        ), ledger_put AS (
            INSERT INTO ledger (tenant_id, seq, time_us, kind, decision, reservation_id, body, prev_hash, hash)
            SELECT u.* FROM unnest($38::text[], $39::bigint[], $40::bigint[], $41::text[], $42::text[],
                $43::bytea[], $44::text[], $45::bytea[], $46::bytea[]) AS u
            WHERE (SELECT ok FROM passed)
        )",
            $more,
            "
        SELECT 1 / (
            (SELECT ok FROM passed)
            AND (SELECT count(*) FROM reservations_put) = cardinality($21::text[])
        )::int"
        )
    };
}

/// Writes a batch: every tenant's changes with its head, or nothing. `writes` is
/// in the order of tenants.
///
/// A row that exists is changed only from the version before it: a reservation
/// whose id is taken (a repeated Reserve) or that was settled meanwhile makes the
/// counts at the end differ. Then, as after a missed fence, the last line divides
/// by zero, which undoes the statement.
pub(crate) async fn write(
    conn: &mut PgConnection,
    writes: &[TenantWrite],
) -> Result<(), StoreError> {
    const WRITE: &str = write_batch!("/* write_batch */", "");
    // Only where rules or people have a say: a table more in the statement costs every
    // batch.
    const WRITE_MORE: &str = write_batch!(
        "/* write_batch_more */",
        ", activity_put AS (
            INSERT INTO activity (tenant_id, activity_key, last_us, body)
            SELECT u.* FROM unnest($47::text[], $48::bytea[], $49::bigint[], $50::text[]) AS u
            WHERE (SELECT ok FROM passed)
            ON CONFLICT (tenant_id, activity_key) DO UPDATE SET
                last_us = excluded.last_us, body = excluded.body
        ), documents_put AS (
            INSERT INTO documents (tenant_id, kind, version, body)
            SELECT u.* FROM unnest($51::text[], $52::text[], $53::bigint[], $54::text[]) AS u
            WHERE (SELECT ok FROM passed)
            ON CONFLICT (tenant_id, kind) DO UPDATE SET
                version = excluded.version, body = excluded.body
        ), approvals_put AS (
            INSERT INTO approvals (tenant_id, reservation_id, state, deadline_us, requested_us,
                reserve_seq, body, resolved_us, resolved_by, approver, note, resolve_seq)
            SELECT u.* FROM unnest($55::text[], $56::bytea[], $57::text[], $58::bigint[], $59::bigint[],
                $60::bigint[], $61::text[], $62::bigint[], $63::text[], $64::text[], $65::text[],
                $66::bigint[]) AS u
            WHERE (SELECT ok FROM passed)
            ON CONFLICT (tenant_id, reservation_id) DO UPDATE SET
                state = excluded.state, resolved_us = excluded.resolved_us,
                resolved_by = excluded.resolved_by, approver = excluded.approver,
                note = excluded.note, resolve_seq = excluded.resolve_seq
        )"
    );
    let Columns {
        heads,
        balances,
        reservations,
        keys,
        ledger,
        activity,
        documents,
        approvals,
    } = Columns::of(writes)?;
    let more = [&activity.tenant, &documents.tenant, &approvals.tenant];
    let more = more.into_iter().any(|tenants| !tenants.is_empty());
    let mut query = sqlx::query(if more { WRITE_MORE } else { WRITE })
        .bind(heads.tenant)
        .bind(heads.fence)
        .bind(heads.seq)
        .bind(heads.hash)
        .bind(heads.time)
        .bind(heads.next_balance)
        .bind(balances.tenant)
        .bind(balances.no)
        .bind(balances.budget)
        .bind(balances.scope)
        .bind(balances.scope_key)
        .bind(balances.start)
        .bind(balances.end)
        .bind(balances.granted)
        .bind(balances.reserved)
        .bind(balances.spent)
        .bind(balances.debt)
        .bind(balances.over_limit)
        .bind(balances.credits)
        .bind(balances.next_lapse)
        .bind(reservations.tenant)
        .bind(reservations.id)
        .bind(reservations.version)
        .bind(reservations.state)
        .bind(reservations.scope)
        .bind(reservations.body)
        .bind(reservations.holds)
        .bind(reservations.created)
        .bind(reservations.reserve_seq)
        .bind(reservations.expires)
        .bind(reservations.lapses)
        .bind(reservations.settled)
        .bind(reservations.settle_seq)
        .bind(reservations.charged)
        .bind(keys.tenant)
        .bind(keys.hash)
        .bind(keys.seq)
        .bind(ledger.tenant)
        .bind(ledger.seq)
        .bind(ledger.time)
        .bind(ledger.kind)
        .bind(ledger.decision)
        .bind(ledger.reservation)
        .bind(ledger.body)
        .bind(ledger.prev_hash)
        .bind(ledger.hash);
    if more {
        query = query
            .bind(activity.tenant)
            .bind(activity.key)
            .bind(activity.last)
            .bind(activity.body)
            .bind(documents.tenant)
            .bind(documents.kind)
            .bind(documents.version)
            .bind(documents.body)
            .bind(approvals.tenant)
            .bind(approvals.id)
            .bind(approvals.state)
            .bind(approvals.deadline)
            .bind(approvals.requested)
            .bind(approvals.reserve_seq)
            .bind(approvals.body)
            .bind(approvals.resolved)
            .bind(approvals.resolved_by)
            .bind(approvals.approver)
            .bind(approvals.note)
            .bind(approvals.resolve_seq);
    }
    query.execute(conn).await.map_err(sort_write)?;
    Ok(())
}

/// Which of these entries stand in the ledger with these hashes: how the outcome
/// of an unknown commit is found out.
pub(crate) async fn standing(
    conn: &mut PgConnection,
    tips: &[(TenantId, Tip)],
) -> Result<BTreeSet<TenantId>, StoreError> {
    let tenants: Vec<_> = tips.iter().map(|(t, _)| t.as_str().to_owned()).collect();
    let seqs: Vec<_> = tips.iter().map(|(_, tip)| tip.seq.0).collect();
    let times: Vec<_> = tips.iter().map(|(_, t)| t.time.as_micros()).collect();
    let hashes: Vec<_> = tips.iter().map(|(_, tip)| tip.hash.0.to_vec()).collect();
    let found: Vec<String> = sqlx::query_scalar(
        "/* standing */
         SELECT l.tenant_id
         FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bytea[]) AS u (tenant_id, seq, time_us, hash)
         JOIN ledger l ON l.tenant_id = u.tenant_id AND l.seq = u.seq AND l.time_us = u.time_us
             AND l.hash = u.hash",
    )
    .bind(tenants)
    .bind(seqs)
    .bind(times)
    .bind(hashes)
    .fetch_all(conn)
    .await
    .map_err(sort)?;
    found
        .iter()
        .map(|tenant| Ok(TenantId::from_stored(tenant)?))
        .collect()
}

/// Begins a transaction on a connection.
pub(crate) async fn begin(
    conn: &mut PgConnection,
) -> Result<sqlx::Transaction<'_, sqlx::Postgres>, StoreError> {
    conn.begin().await.map_err(sort)
}

/// Commits one.
pub(crate) async fn commit(tx: sqlx::Transaction<'_, sqlx::Postgres>) -> Result<(), StoreError> {
    tx.commit().await.map_err(sort_write)
}

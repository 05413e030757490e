//! The one statement that writes a batch.
//!
//! It takes arrays: a batch costs as many round trips as a single request. Each table is
//! changed once in it.

use sqlx::PgConnection;

use super::rows::{self, scope_key};
use super::{StoreError, sort_write};
use crate::domain::approve::{ApprovalRecord, ApprovalState};
use crate::domain::budget::Balance;
use crate::domain::id::{BalanceNo, KeyId, TenantId};
use crate::domain::ledger::{Entry, Tip};
use crate::domain::provision::DocumentKind;
use crate::domain::reservation::{Reservation, Status};
use crate::domain::state::Changes;

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

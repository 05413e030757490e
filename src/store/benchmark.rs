//! What only `remit bench` asks of a database.

use std::fmt::Write as _;

use sqlx::Connection as _;

use super::batch::HeadWrite;
use super::partitions::{self, Month};
use super::rows::{self, scope_key};
use super::{Store, StoreError, sort};
use crate::domain::budget::{Balance, Budget, Limit};
use crate::domain::id::{KeyHash, Sequence, TenantId};
use crate::domain::ledger::Entry;
use crate::domain::reservation::{Reservation, Status};
use crate::domain::tenant::Tenant;
use crate::domain::time::Timestamp;

impl Store {
    /// Brings a new database to where one is that has run for a while: its files of
    /// write-ahead log exist and its shared memory was touched. Otherwise both would
    /// be made inside somebody's commit. For superusers.
    pub(crate) async fn settle_in(&self) -> Result<(), StoreError> {
        let mut conn = self.connect().await?;
        // A row fills a page: 256 MB. Then files of 16 MB, for some minutes of load.
        for statement in [
            "CREATE TABLE settling_in (filler text) WITH (autovacuum_enabled = off);
             ALTER TABLE settling_in ALTER filler SET STORAGE PLAIN",
            "INSERT INTO settling_in SELECT repeat('x', 8000) FROM generate_series(1, 32768)",
            "DROP TABLE settling_in",
            "DO $$ BEGIN
                 FOR file IN 1..100 LOOP
                     PERFORM pg_logical_emit_message(false, 'settling in', '');
                     PERFORM pg_switch_wal();
                 END LOOP;
             END $$",
            "CHECKPOINT",
        ] {
            sqlx::raw_sql(statement)
                .execute(&mut conn)
                .await
                .map_err(sort)?;
        }
        Ok(())
    }

    /// Makes the months from a time in the past to now.
    pub(crate) async fn make_months(
        &self,
        from: Timestamp,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut conn = self.connect().await?;
        let (from, now) = (Month::of(from.as_micros())?, Month::of(now.as_micros())?);
        partitions::make(&mut conn, from, now).await?;
        Ok(())
    }

    /// Loads rows by COPY, all or none.
    pub(crate) async fn copy_in(&self, rows: &CopyRows) -> Result<(), StoreError> {
        let mut conn = self.connect().await?;
        let mut tx = conn.begin().await.map_err(sort)?;
        for table in &rows.0 {
            if table.rows.is_empty() {
                continue;
            }
            let mut copy = tx.copy_in_raw(table.statement).await.map_err(sort)?;
            copy.send(table.rows.as_bytes()).await.map_err(sort)?;
            copy.finish().await.map_err(sort)?;
        }
        tx.commit().await.map_err(sort)
    }

    /// Renews what the planner knows and what vacuum leaves behind, after a load.
    pub(crate) async fn vacuum(&self) -> Result<(), StoreError> {
        let mut conn = self.connect().await?;
        for statement in ["VACUUM (ANALYZE)", "CHECKPOINT"] {
            sqlx::raw_sql(statement)
                .execute(&mut conn)
                .await
                .map_err(sort)?;
        }
        Ok(())
    }
}

/// The tables, in the order in which they are loaded.
#[derive(Debug, Clone, Copy)]
enum Table {
    Tenants,
    Budgets,
    Heads,
    Balances,
    Reservations,
    Keys,
    Ledger,
}

#[derive(Debug)]
struct TableRows {
    statement: &'static str,
    /// In the text format of COPY.
    rows: String,
}

/// Rows to be loaded by COPY.
#[derive(Debug)]
pub(crate) struct CopyRows([TableRows; 7]);

/// One value in the text format of COPY.
enum Field<'a> {
    Null,
    Int(i64),
    Bool(bool),
    Text(&'a str),
    Bytes(&'a [u8]),
}

impl Field<'_> {
    fn int(value: Option<i64>) -> Self {
        value.map_or(Self::Null, Self::Int)
    }
}

impl CopyRows {
    pub(crate) fn new() -> Self {
        let table = |statement| TableRows {
            statement,
            rows: String::new(),
        };
        Self(
            [
                "COPY tenants (tenant_id, display_name, state, unprovisioned_rule,
                     default_overage_policy, created_us) FROM STDIN",
                "COPY budgets (tenant_id, budget_no, scope, unit, period, time_zone, allocation,
                     overdraft_limit, carry_over, state, present, limit_seq, created_us) FROM STDIN",
                "COPY heads (tenant_id, fence, seq, hash, time_us, next_balance, config_version)
                     FROM STDIN",
                "COPY balances (tenant_id, balance_no, budget_no, scope, scope_key, period_start_us,
                     period_end_us, granted, reserved, spent, debt, over_limit_seq, credits,
                     next_lapse_us) FROM STDIN",
                "COPY reservations (tenant_id, reservation_id, scope, body, created_us, reserve_seq,
                     version, state, holds, expires_us, lapses_us, settled_us, settle_seq, charged)
                     FROM STDIN",
                "COPY idempotency_keys (tenant_id, key_hash, seq) FROM STDIN",
                "COPY ledger (tenant_id, seq, time_us, kind, decision, reservation_id, body,
                     prev_hash, hash) FROM STDIN",
            ]
            .map(table),
        )
    }

    /// How much there is to load, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(|table| table.rows.len()).sum()
    }

    fn put<const N: usize>(&mut self, table: Table, fields: [Field<'_>; N]) {
        let to = &mut self.0[table as usize].rows;
        for (at, field) in fields.into_iter().enumerate() {
            if at > 0 {
                to.push('\t');
            }
            match field {
                Field::Null => to.push_str("\\N"),
                Field::Int(value) => {
                    let _ = write!(to, "{value}");
                }
                Field::Bool(value) => to.push(if value { 't' } else { 'f' }),
                Field::Text(value) => {
                    for character in value.chars() {
                        if matches!(character, '\\' | '\t' | '\n' | '\r') {
                            to.push('\\');
                        }
                        to.push(character);
                    }
                }
                Field::Bytes(value) => {
                    to.push_str("\\\\x");
                    to.push_str(&hex::encode(value));
                }
            }
        }
        to.push('\n');
    }

    pub(crate) fn tenant(&mut self, tenant: &Tenant) {
        let settings = &tenant.settings;
        self.put(
            Table::Tenants,
            [
                Field::Text(tenant.id.as_str()),
                Field::Text(&settings.display_name),
                Field::Text(settings.state.as_str()),
                Field::Text(settings.unprovisioned_rule.as_str()),
                Field::Text(settings.default_overage_policy.as_str()),
                Field::Int(tenant.created_at.as_micros()),
            ],
        );
    }

    pub(crate) fn budget(&mut self, tenant: &TenantId, budget: &Budget) {
        let terms = &budget.terms;
        self.put(
            Table::Budgets,
            [
                Field::Text(tenant.as_str()),
                Field::Int(budget.no.0.into()),
                Field::Text(budget.scope.as_str()),
                Field::Text(budget.unit.as_str()),
                Field::Text(budget.calendar.period().as_str()),
                Field::Text(budget.calendar.zone_name()),
                match terms.limit {
                    Limit::Allocation(amount) => Field::Int(amount.get()),
                    Limit::Unlimited => Field::Null,
                },
                Field::Int(terms.overdraft_limit.get()),
                Field::Text(terms.carry_over.as_str()),
                Field::Text(terms.state.as_str()),
                Field::Bool(budget.present),
                Field::Int(budget.limit_seq.0),
                Field::Int(budget.created_at.as_micros()),
            ],
        );
    }

    pub(crate) fn head(&mut self, tenant: &TenantId, head: &HeadWrite) {
        self.put(
            Table::Heads,
            [
                Field::Text(tenant.as_str()),
                Field::Int(head.fence),
                Field::Int(head.tip.seq.0),
                Field::Bytes(&head.tip.hash.0),
                Field::Int(head.tip.time.as_micros()),
                Field::Int(head.next_balance.0),
                Field::Int(1),
            ],
        );
    }

    pub(crate) fn balance(
        &mut self,
        tenant: &TenantId,
        balance: &Balance,
    ) -> Result<(), StoreError> {
        let credits = rows::credits_text(balance)?;
        self.put(
            Table::Balances,
            [
                Field::Text(tenant.as_str()),
                Field::Int(balance.no.0),
                Field::Int(balance.budget.0.into()),
                Field::Text(&balance.scope),
                Field::Bytes(&scope_key(&balance.scope)),
                Field::Int(balance.window.start.as_micros()),
                Field::int(balance.window.end.map(Timestamp::as_micros)),
                Field::Int(balance.granted),
                Field::Int(balance.reserved.get()),
                Field::Int(balance.spent.get()),
                Field::Int(balance.debt.get()),
                Field::int(balance.over_limit.map(|seq| seq.0)),
                credits.as_deref().map_or(Field::Null, Field::Text),
                Field::int(balance.next_lapse.map(Timestamp::as_micros)),
            ],
        );
        Ok(())
    }

    pub(crate) fn reservation(
        &mut self,
        tenant: &TenantId,
        reservation: &Reservation,
    ) -> Result<(), StoreError> {
        let (state, settlement) = match &reservation.status {
            Status::Pending => ("PENDING_APPROVAL", None),
            Status::Active => ("ACTIVE", None),
            Status::Settled(settlement) => (settlement.kind.as_str(), Some(settlement)),
        };
        let body = rows::reservation_body(reservation)?;
        let holds = serde_json::to_string(&reservation.tranches)?;
        let charged = match settlement.filter(|s| !s.charged.is_empty()) {
            Some(settlement) => Some(serde_json::to_string(&settlement.charged)?),
            None => None,
        };
        self.put(
            Table::Reservations,
            [
                Field::Text(tenant.as_str()),
                Field::Bytes(reservation.id.as_bytes()),
                Field::Text(&reservation.subject.scope_text()),
                Field::Text(&body),
                Field::Int(reservation.created_at.as_micros()),
                Field::Int(reservation.reserve_seq.0),
                Field::Int(reservation.version.into()),
                Field::Text(state),
                Field::Text(&holds),
                Field::Int(reservation.expires_at.as_micros()),
                Field::Int(reservation.settles_until().as_micros()),
                Field::int(settlement.map(|s| s.at.as_micros())),
                Field::int(settlement.map(|s| s.seq.0)),
                charged.as_deref().map_or(Field::Null, Field::Text),
            ],
        );
        Ok(())
    }

    pub(crate) fn key(&mut self, tenant: &TenantId, key: &KeyHash, seq: Sequence) {
        self.put(
            Table::Keys,
            [
                Field::Text(tenant.as_str()),
                Field::Bytes(key.as_bytes()),
                Field::Int(seq.0),
            ],
        );
    }

    pub(crate) fn entry(&mut self, tenant: &TenantId, entry: &Entry) {
        let body = &entry.body;
        let reservation = body.reservation.as_ref().map(|id| id.as_bytes().as_slice());
        self.put(
            Table::Ledger,
            [
                Field::Text(tenant.as_str()),
                Field::Int(body.seq.0),
                Field::Int(body.time.as_micros()),
                Field::Text(body.kind.as_str()),
                body.decision
                    .map_or(Field::Null, |decision| Field::Text(decision.as_str())),
                reservation.map_or(Field::Null, Field::Bytes),
                Field::Text(&entry.text),
                Field::Bytes(&entry.prev_hash.0),
                Field::Bytes(&entry.hash.0),
            ],
        );
    }
}

//! Reads for people and auditors: outside the lanes, on connections of the pool.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use sqlx::PgConnection;

use super::hot::{read_configs, read_heads};
use super::rows::{self, column, time};
use super::{Store, StoreError, sort};
use crate::domain::answer::BalanceView;
use crate::domain::budget::{Balance, Budget};
use crate::domain::id::{BalanceNo, BudgetNo, ReservationId, Sequence, TenantId};
use crate::domain::ledger::{ChainHash, Decision, EntryKind};
use crate::domain::query::{BalanceQuery, EntryQuery, ReservationQuery, StateFilter, StoredEntry};
use crate::domain::reservation::Reservation;
use crate::domain::scope::{Scope, ScopeFilter};
use crate::domain::tenant::{Tenant, TenantConfig};
use crate::domain::time::Timestamp;

/// A pattern for LIKE that finds a `level:value` pair in a canonical scope. Of
/// the characters of a name only `_` means something to LIKE.
fn patterns(filters: &[ScopeFilter]) -> Vec<String> {
    filters
        .iter()
        .flat_map(ScopeFilter::pairs)
        .map(|pair| format!("%/{}/%", pair.replace('_', "\\_")))
        .collect()
}

impl Store {
    /// A tenant's head tip, if the tenant or its chain exists.
    pub async fn last_sequence(&self, tenant: &TenantId) -> Result<Option<Sequence>, StoreError> {
        let mut conn = self.pool.acquire().await.map_err(sort)?;
        let heads = read_heads(&mut conn, &BTreeSet::from([tenant.clone()]), false).await?;
        Ok(heads.get(tenant).map(|head| head.tip.seq))
    }

    /// One tenant.
    pub async fn tenant(&self, tenant: &TenantId) -> Result<Option<Tenant>, StoreError> {
        let row = sqlx::query("/* tenant */ SELECT * FROM tenants WHERE tenant_id = $1")
            .bind(tenant.as_str())
            .fetch_optional(&self.pool)
            .await
            .map_err(sort)?;
        row.as_ref().map(rows::tenant).transpose()
    }

    /// Tenants by name.
    pub async fn tenants(
        &self,
        after: Option<TenantId>,
        limit: i64,
    ) -> Result<Vec<Tenant>, StoreError> {
        let rows = sqlx::query(
            "/* tenants */ SELECT * FROM tenants WHERE tenant_id > $1 ORDER BY tenant_id LIMIT $2",
        )
        .bind(after.as_ref().map_or("", TenantId::as_str))
        .bind(limit)
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        rows.iter().map(rows::tenant).collect()
    }

    /// Present budgets by number.
    pub async fn budgets(
        &self,
        tenant: &TenantId,
        after: Option<BudgetNo>,
        limit: i64,
    ) -> Result<Vec<Budget>, StoreError> {
        let rows = sqlx::query(
            "/* budgets */ SELECT * FROM budgets
             WHERE tenant_id = $1 AND budget_no > $2 AND present ORDER BY budget_no LIMIT $3",
        )
        .bind(tenant.as_str())
        .bind(after.map_or(0, |no| no.0))
        .bind(limit)
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        rows.iter().map(rows::budget).collect()
    }

    /// The present budget of that scope, unit and period.
    pub async fn budget(
        &self,
        tenant: &TenantId,
        scope: &Scope,
        unit: &str,
        period: &str,
    ) -> Result<Option<Budget>, StoreError> {
        let row = sqlx::query(
            "/* budget */ SELECT * FROM budgets
             WHERE tenant_id = $1 AND scope = $2 AND unit = $3 AND period = $4 AND present",
        )
        .bind(tenant.as_str())
        .bind(scope.as_str())
        .bind(unit)
        .bind(period)
        .fetch_optional(&self.pool)
        .await
        .map_err(sort)?;
        row.as_ref().map(rows::budget).transpose()
    }

    /// One reservation.
    pub async fn reservation(
        &self,
        tenant: &TenantId,
        id: ReservationId,
    ) -> Result<Option<Reservation>, StoreError> {
        let row = sqlx::query(
            "/* reservation */ SELECT * FROM reservations WHERE tenant_id = $1 AND reservation_id = $2",
        )
        .bind(tenant.as_str())
        .bind(id.as_bytes().to_vec())
        .fetch_optional(&self.pool)
        .await
        .map_err(sort)?;
        row.as_ref().map(rows::reservation).transpose()
    }

    /// Reservations, newest first. They are found through the ledger, which is
    /// in their order already: an index for this list would be paid by every
    /// decision.
    pub async fn reservations(
        &self,
        tenant: &TenantId,
        query: &ReservationQuery,
    ) -> Result<Vec<Reservation>, StoreError> {
        let state = query.state.map(|state| match state {
            StateFilter::Active => "ACTIVE",
            StateFilter::Committed => "COMMITTED",
            StateFilter::Released => "RELEASED",
            StateFilter::Expired => "EXPIRED",
            StateFilter::Pending => "PENDING_APPROVAL",
            StateFilter::Rejected => "REJECTED",
        });
        let before = match query.before {
            Some((_, id)) => self.reservation(tenant, id).await?.map(|r| r.reserve_seq.0),
            None => None,
        };
        // Row by row, whatever the planner knows of a tenant that is new: OFFSET keeps it from
        // reading all of a tenant's reservations for each of its entries.
        let rows = sqlx::query(
            "/* reservations */
             SELECT r.* FROM ledger l
             CROSS JOIN LATERAL (SELECT * FROM reservations of
                 WHERE of.tenant_id = $1 AND of.reservation_id = l.reservation_id OFFSET 0) r
             WHERE l.tenant_id = $1 AND l.kind = 'RESERVE' AND l.decision <> 'DENY' AND l.seq < $2
               AND ($3::text IS NULL
                    OR CASE WHEN r.state IN ('ACTIVE', 'PENDING_APPROVAL') AND r.lapses_us < $5
                        THEN 'EXPIRED' ELSE r.state END = $3)
               AND '/' || r.scope || '/' LIKE ALL ($4::text[])
             ORDER BY l.seq DESC LIMIT $6",
        )
        .bind(tenant.as_str())
        .bind(before.unwrap_or(i64::MAX))
        .bind(state)
        .bind(patterns(&query.scope))
        .bind(query.now.as_micros())
        .bind(query.limit)
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        rows.iter().map(rows::reservation).collect()
    }

    /// Balances by number, each with what its budget says.
    pub async fn balances(
        &self,
        tenant: &TenantId,
        query: &BalanceQuery,
    ) -> Result<Vec<(BalanceNo, BalanceView)>, StoreError> {
        let mut conn = self.pool.acquire().await.map_err(sort)?;
        let configs =
            read_configs(&mut conn, &BTreeSet::from([tenant.clone()]), &self.compiled).await?;
        let Some(config) = configs.get(tenant) else {
            return Ok(Vec::new());
        };
        const ALL: &str = "/* balances */
            SELECT * FROM balances
            WHERE tenant_id = $1 AND balance_no > $2
              AND ($3 OR period_end_us IS NULL OR period_end_us > $4)
              AND '/' || scope || '/' LIKE ALL ($5::text[])
            ORDER BY balance_no LIMIT $6";
        const OF_SCOPE: &str = "/* balances_of_scope */
            SELECT * FROM balances
            WHERE tenant_id = $1 AND balance_no > $2
              AND ($3 OR period_end_us IS NULL OR period_end_us > $4)
              AND '/' || scope || '/' LIKE ALL ($5::text[])
              AND budget_no = ANY ($7) AND scope_key = $8
            ORDER BY balance_no LIMIT $6";
        let mut statement = sqlx::query(match query.exact {
            None => ALL,
            Some(_) => OF_SCOPE,
        })
        .bind(tenant.as_str())
        .bind(query.after.map_or(0, |no| no.0))
        .bind(query.include_past)
        .bind(query.now.as_micros())
        .bind(patterns(&query.scope))
        .bind(query.limit);
        if let Some(scope) = &query.exact {
            let budgets = config.budgets().filter(|b| b.scope.covers(scope));
            let budgets: Vec<_> = budgets.map(|b| b.no.0).collect();
            statement = statement
                .bind(budgets)
                .bind(rows::scope_key(scope.as_str()));
        }
        let rows = statement.fetch_all(&mut *conn).await.map_err(sort)?;
        let mut views = Vec::with_capacity(rows.len());
        for row in &rows {
            let balance = rows::balance(row)?;
            if let Some(budget) = config.budget(balance.budget) {
                views.push((balance.no, BalanceView::of(&balance, budget)));
            }
        }
        let room = usize::try_from(query.limit).unwrap_or(0);
        let room = room.saturating_sub(rows.len());
        if query.include_unopened && room > 0 {
            views.extend(unopened(&mut conn, config, query, room).await?);
        }
        Ok(views)
    }

    /// The scopes of balances by number, also of budgets that are gone.
    pub async fn scopes(
        &self,
        tenant: &TenantId,
        balances: BTreeSet<BalanceNo>,
    ) -> Result<BTreeMap<BalanceNo, String>, StoreError> {
        let numbers: Vec<_> = balances.into_iter().map(|no| no.0).collect();
        let rows = sqlx::query(
            "/* scopes */ SELECT balance_no, scope FROM balances
             WHERE tenant_id = $1 AND balance_no = ANY ($2)",
        )
        .bind(tenant.as_str())
        .bind(numbers)
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        let named = rows
            .iter()
            .map(|row| Ok((BalanceNo(column(row, "balance_no")?), column(row, "scope")?)));
        named.collect()
    }

    /// Entries by sequence.
    pub async fn entries(
        &self,
        tenant: &TenantId,
        query: &EntryQuery,
    ) -> Result<Vec<StoredEntry>, StoreError> {
        const ASCENDING: &str = "/* entries */
            SELECT * FROM ledger
            WHERE tenant_id = $1 AND seq > $2
              AND (cardinality($3::text[]) = 0 OR kind = ANY($3)) AND ($4::text IS NULL OR decision = $4)
              AND ($5::bytea IS NULL OR reservation_id = $5)
              AND time_us >= $6 AND time_us < $7
            ORDER BY seq LIMIT $8";
        const DESCENDING: &str = "/* entries */
            SELECT * FROM ledger
            WHERE tenant_id = $1 AND seq < $2
              AND (cardinality($3::text[]) = 0 OR kind = ANY($3)) AND ($4::text IS NULL OR decision = $4)
              AND ($5::bytea IS NULL OR reservation_id = $5)
              AND time_us >= $6 AND time_us < $7
            ORDER BY seq DESC LIMIT $8";
        let (sql, start) = match query.descending {
            false => (ASCENDING, 0),
            true => (DESCENDING, i64::MAX),
        };
        let kinds: Vec<_> = query.kinds.iter().map(|kind| kind.as_str()).collect();
        let rows = sqlx::query(sql)
            .bind(tenant.as_str())
            .bind(query.after.map_or(start, |seq| seq.0))
            .bind(kinds)
            .bind(query.decision.map(Decision::as_str))
            .bind(query.reservation.map(|id| id.as_bytes().to_vec()))
            .bind(query.from.map_or(i64::MIN, Timestamp::as_micros))
            .bind(query.until.map_or(i64::MAX, Timestamp::as_micros))
            .bind(query.limit)
            .fetch_all(&self.pool)
            .await
            .map_err(sort)?;
        rows.iter().map(stored_entry).collect()
    }

    /// One entry.
    pub async fn entry(
        &self,
        tenant: &TenantId,
        seq: Sequence,
    ) -> Result<Option<StoredEntry>, StoreError> {
        let row = sqlx::query("/* entry */ SELECT * FROM ledger WHERE tenant_id = $1 AND seq = $2")
            .bind(tenant.as_str())
            .bind(seq.0)
            .fetch_optional(&self.pool)
            .await
            .map_err(sort)?;
        row.as_ref().map(stored_entry).transpose()
    }

    /// Until when every reservation that lapsed was looked at; 1970 where none was.
    pub async fn swept_until(&self) -> Result<Timestamp, StoreError> {
        let until: Option<i64> = sqlx::query_scalar(
            "/* swept_until */ SELECT until_us FROM sweeps WHERE name = 'lapsed'",
        )
        .fetch_optional(&self.pool)
        .await
        .map_err(sort)?;
        Ok(Timestamp::from_micros(until.unwrap_or(0)))
    }

    /// Stores that, unless another process came further. What is stored beyond `possible`
    /// came from a wrong clock and is replaced.
    pub async fn set_swept_until(
        &self,
        until: Timestamp,
        possible: Timestamp,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "/* set_swept_until */ INSERT INTO sweeps AS s (name, until_us) VALUES ('lapsed', $1)
             ON CONFLICT (name) DO UPDATE SET until_us =
                 CASE WHEN s.until_us > $2 THEN excluded.until_us
                      ELSE greatest(s.until_us, excluded.until_us) END",
        )
        .bind(until.as_micros())
        .bind(possible.as_micros())
        .execute(&self.pool)
        .await
        .map_err(sort)?;
        Ok(())
    }

    /// Open reservations whose time with grace ended in a window, oldest first, from `after`
    /// on: the sweeper's work.
    pub async fn overdue(
        &self,
        from: Timestamp,
        after: Option<&Lapsed>,
        until: Timestamp,
        limit: usize,
    ) -> Result<Vec<Lapsed>, StoreError> {
        let rows = sqlx::query(
            "/* overdue */ SELECT tenant_id, reservation_id, lapses_us FROM reservations
             WHERE lapses_us >= $1 AND lapses_us < $2 AND state IN ('ACTIVE', 'PENDING_APPROVAL')
               AND (lapses_us, tenant_id, reservation_id) > ($1, $3, $4)
             ORDER BY lapses_us, tenant_id, reservation_id LIMIT $5",
        )
        .bind(after.map_or(from, |after| after.at).as_micros())
        .bind(until.as_micros())
        .bind(after.map_or("", |after| after.tenant.as_str()))
        .bind(after.map_or(&[][..], |after| after.id.as_bytes().as_slice()))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        rows.iter()
            .map(|row| {
                let id = crate::domain::id::KeyHash::from_stored(column(row, "reservation_id")?)?;
                Ok(Lapsed {
                    at: time(row, "lapses_us")?,
                    tenant: TenantId::from_stored(column(row, "tenant_id")?)?,
                    id: ReservationId::of(id),
                })
            })
            .collect()
    }
}

/// A reservation whose time with grace is over.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lapsed {
    /// When it lapsed.
    pub at: Timestamp,
    /// Whose it is.
    pub tenant: TenantId,
    /// Which.
    pub id: ReservationId,
}

fn stored_entry(row: &sqlx::postgres::PgRow) -> Result<StoredEntry, StoreError> {
    let hash = |name| -> Result<ChainHash, StoreError> {
        ChainHash::from_stored(column(row, name)?)
            .ok_or_else(|| StoreError::Corrupt("an entry's hash has not 32 bytes".into()))
    };
    let decision: Option<&str> = column(row, "decision")?;
    Ok(StoredEntry {
        seq: Sequence(column(row, "seq")?),
        time: time(row, "time_us")?,
        kind: EntryKind::parse(column(row, "kind")?)?,
        decision: decision.map(Decision::parse).transpose()?,
        text: column(row, "body")?,
        prev_hash: hash("prev_hash")?,
        hash: hash("hash")?,
    })
}

/// Balances of budgets without wildcards that have none in this period, by budget.
async fn unopened(
    conn: &mut PgConnection,
    config: &TenantConfig,
    query: &BalanceQuery,
    room: usize,
) -> Result<Vec<(BalanceNo, BalanceView)>, StoreError> {
    let number = |budget: &Budget| BalanceNo(BalanceQuery::UNOPENED + i64::from(budget.no.0));
    let asked = |budget: &Budget| {
        let scope = budget.scope.text();
        let exact = query
            .exact
            .as_ref()
            .is_none_or(|exact| exact.text() == scope);
        let named = query
            .scope
            .iter()
            .all(|filter| filter.matches_scope(&budget.scope));
        let after = query.after.is_none_or(|after| number(budget) > after);
        exact && named && after && budget.present && !budget.scope.is_template()
    };
    let mut budgets: Vec<_> = config.budgets().filter(|b| asked(b)).collect();
    budgets.sort_unstable_by_key(|budget| budget.no.0);
    let numbers: Vec<_> = budgets.iter().map(|budget| budget.no.0).collect();
    let opened: HashSet<i32> = sqlx::query_scalar(
        "/* opened */
         SELECT budget_no FROM balances
         WHERE tenant_id = $1 AND budget_no = ANY ($2)
           AND (period_end_us IS NULL OR period_end_us > $3)",
    )
    .bind(config.tenant.id.as_str())
    .bind(numbers)
    .bind(query.now.as_micros())
    .fetch_all(conn)
    .await
    .map_err(sort)?
    .into_iter()
    .collect();
    let fresh = budgets.into_iter().filter(|b| !opened.contains(&b.no.0));
    Ok(fresh
        .take(room)
        .map(|budget| {
            let scope = budget.scope.text().clone();
            let window = budget.calendar.window(query.now);
            let balance = Balance::new(number(budget), budget.no, scope, window);
            (balance.no, BalanceView::of(&balance, budget))
        })
        .collect())
}

//! Reads a whole chain, and what is kept beside it, for `remit verify`.

use std::collections::{BTreeMap, BTreeSet};

use super::documents::{Compiled, document, read_documents};
use super::hot::{begin, read_configs, read_heads};
use super::rows::{self, column, time};
use super::{Store, StoreError, sort};
use crate::domain::id::{BalanceNo, Sequence, TenantId};
use crate::domain::ledger::{ProvisionedBudget, Tip};
use crate::domain::provision::DocumentKind;
use crate::domain::verify::{Computed, FoundBy, Problem, RawEntry, Report, Verifier};

/// Entries read at once.
const PAGE: i64 = 1_000;

impl Store {
    /// Every chain there is, by name.
    pub async fn chains(&self) -> Result<Vec<TenantId>, StoreError> {
        let names: Vec<String> =
            sqlx::query_scalar("/* chains */ SELECT tenant_id FROM heads ORDER BY tenant_id")
                .fetch_all(&self.pool)
                .await
                .map_err(sort)?;
        names
            .iter()
            .map(|name| Ok(TenantId::from_stored(name)?))
            .collect()
    }

    /// Recomputes one chain, on one snapshot of the database. Nothing where
    /// there is no such chain.
    pub async fn verify(&self, tenant: &TenantId) -> Result<Option<Report>, StoreError> {
        let mut conn = self.acquire().await?;
        let mut tx = begin(&mut conn).await?;
        sqlx::query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            .execute(&mut *tx)
            .await
            .map_err(sort)?;
        let only = BTreeSet::from([tenant.clone()]);
        let Some(head) = read_heads(&mut tx, &only, false).await?.remove(tenant) else {
            return Ok(None);
        };
        let checkpoint = super::archive::last_checkpoint(&mut tx, tenant).await?;
        let archived = checkpoint.as_ref().map_or(0, |c| c.tip.seq.0);
        let mut verifier = match checkpoint {
            Some(checkpoint) => Verifier::resume(tenant.clone(), checkpoint),
            None => Verifier::new(tenant.clone()),
        };
        let problem = loop {
            let page = read_page(&mut tx, tenant, verifier.tip().seq).await?;
            if page.is_empty() {
                break check_rest(&mut tx, &self.compiled, &verifier, tenant, head.tip).await?;
            }
            if let Some(problem) = page.iter().find_map(|entry| verifier.read(entry).err()) {
                break Some(problem);
            }
        };
        Ok(Some(Report {
            entries: verifier.entries(),
            archived,
            last: verifier.tip(),
            problem,
        }))
    }
}

async fn read_page(
    conn: &mut sqlx::PgConnection,
    tenant: &TenantId,
    after: Sequence,
) -> Result<Vec<RawEntry>, StoreError> {
    let rows = sqlx::query(
        "/* read_page */ SELECT * FROM ledger WHERE tenant_id = $1 AND seq > $2 ORDER BY seq LIMIT $3",
    )
    .bind(tenant.as_str())
    .bind(after.0)
    .bind(PAGE)
    .fetch_all(conn)
    .await
    .map_err(sort)?;
    rows.iter().map(raw_entry).collect()
}

pub(super) fn raw_entry(row: &sqlx::postgres::PgRow) -> Result<RawEntry, StoreError> {
    Ok(RawEntry {
        seq: Sequence(column(row, "seq")?),
        time: time(row, "time_us")?,
        kind: column(row, "kind")?,
        found_by: Some(FoundBy {
            decision: column(row, "decision")?,
            reservation: column(row, "reservation_id")?,
        }),
        text: column(row, "body")?,
        prev_hash: column(row, "prev_hash")?,
        hash: column(row, "hash")?,
    })
}

async fn check_rest(
    conn: &mut sqlx::PgConnection,
    compiled: &Compiled,
    verifier: &Verifier,
    tenant: &TenantId,
    head: Tip,
) -> Result<Option<Problem>, StoreError> {
    if let Err(problem) = verifier.check_head(head) {
        return Ok(Some(problem));
    }
    let only = BTreeSet::from([tenant.clone()]);
    let configs = read_configs(conn, &only, compiled).await?;
    let config = configs.get(tenant);
    let mut budgets: Vec<ProvisionedBudget> = config
        .into_iter()
        .flat_map(|config| config.budgets())
        .map(|budget| ProvisionedBudget::from(&**budget))
        .collect();
    budgets.sort_by_key(|budget| budget.no);
    let settings = config.map(|config| &config.tenant.settings);
    if let Err(problem) = verifier.check_configuration(settings, &budgets) {
        return Ok(Some(problem));
    }
    let documents = read_documents(conn, &only).await?;
    let checked = verifier.check_documents(
        &document(&documents, tenant, DocumentKind::Catalogue)?,
        &document(&documents, tenant, DocumentKind::Policy)?,
        &document(&documents, tenant, DocumentKind::Freezes)?,
    );
    if let Err(problem) = checked {
        return Ok(Some(problem));
    }
    let rows = sqlx::query("/* stored_balances */ SELECT * FROM balances WHERE tenant_id = $1")
        .bind(tenant.as_str())
        .fetch_all(conn)
        .await
        .map_err(sort)?;
    let mut stored: BTreeMap<BalanceNo, Computed> = BTreeMap::new();
    for row in &rows {
        let balance = rows::balance(row)?;
        let computed = Computed {
            budget: balance.budget,
            scope: balance.scope.clone(),
            granted: balance.granted,
            reserved: balance.reserved.get(),
            spent: balance.spent.get(),
            debt: balance.debt.get(),
            over_limit: balance.over_limit.is_some(),
        };
        stored.insert(balance.no, computed);
    }
    Ok(verifier.check_balances(&stored).err())
}

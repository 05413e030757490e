//! What a batch reads: heads, configuration, and what its commands need.
//!
//! All statements take arrays: a batch costs as many round trips as a single request.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sqlx::{Connection as _, PgConnection};

use super::documents::{Compiled, read_documents};
use super::rows::{self, column, scope_key, time};
use super::{StoreError, sort, sort_write};
use crate::domain::activity::{Activity, ActivityKey};
use crate::domain::id::{BalanceNo, KeyHash, ReservationId, Sequence, TenantId};
use crate::domain::ledger::{Body, ChainHash, Tip};
use crate::domain::state::{Loaded, Needs};
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
    // In the order of writes, which is that of bytes: see the lock order in `store`.
    const LOCK: &str = "/* lock_heads */
        SELECT tenant_id, fence, seq, hash, time_us, next_balance, config_version
        FROM heads WHERE tenant_id = ANY($1) ORDER BY tenant_id COLLATE \"C\" FOR UPDATE";
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

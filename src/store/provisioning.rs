//! What operators' changes read and write, beside what every write does.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::PgConnection;

use super::documents::{document, read_documents};
use super::rows::{self, column};
use super::{StoreError, sort};
use crate::domain::budget::{Budget, Limit};
use crate::domain::id::TenantId;
use crate::domain::provision::{Current, DocumentKind};
use crate::domain::tenant::Tenant;

/// Makes sure that heads exist, so that they can be locked. A head without a
/// tenant is a chain that has not begun.
pub(crate) async fn ensure_heads(
    conn: &mut PgConnection,
    tenants: &BTreeSet<TenantId>,
) -> Result<(), StoreError> {
    let names: Vec<_> = tenants.iter().map(|t| t.as_str().to_owned()).collect();
    sqlx::query(
        "/* ensure_heads */
         INSERT INTO heads (tenant_id, fence, seq, hash, time_us, next_balance, config_version)
         SELECT u.tenant_id, 1, 0, decode(repeat('00', 32), 'hex'), 0, 1, 0
         FROM unnest($1::text[]) AS u (tenant_id)
         ON CONFLICT (tenant_id) DO NOTHING",
    )
    .bind(names)
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(())
}

/// Reads tenants with all their budgets, for a plan.
pub(crate) async fn read_current(
    conn: &mut PgConnection,
    tenants: &BTreeSet<TenantId>,
) -> Result<BTreeMap<TenantId, Current>, StoreError> {
    let names: Vec<_> = tenants.iter().map(|t| t.as_str().to_owned()).collect();
    let documents = read_documents(&mut *conn, tenants).await?;
    let mut current: BTreeMap<TenantId, Current> = BTreeMap::new();
    for tenant in tenants {
        let stands = Current {
            tools: document(&documents, tenant, DocumentKind::Catalogue)?,
            policy: document(&documents, tenant, DocumentKind::Policy)?,
            freezes: document(&documents, tenant, DocumentKind::Freezes)?,
            ..Current::default()
        };
        current.insert(tenant.clone(), stands);
    }
    let tenant_rows =
        sqlx::query("/* read_current */ SELECT * FROM tenants WHERE tenant_id = ANY($1)")
            .bind(&names)
            .fetch_all(&mut *conn)
            .await
            .map_err(sort)?;
    for row in tenant_rows {
        let tenant = rows::tenant(&row)?;
        if let Some(current) = current.get_mut(&tenant.id) {
            current.tenant = Some(tenant);
        }
    }
    let budget_rows =
        sqlx::query("/* read_current */ SELECT * FROM budgets WHERE tenant_id = ANY($1)")
            .bind(&names)
            .fetch_all(conn)
            .await
            .map_err(sort)?;
    for row in budget_rows {
        let tenant = TenantId::from_stored(column(&row, "tenant_id")?)?;
        if let Some(current) = current.get_mut(&tenant) {
            current.budgets.push(rows::budget(&row)?);
        }
    }
    Ok(current)
}

/// Stores a tenant as it shall be.
pub(crate) async fn put_tenant(conn: &mut PgConnection, tenant: &Tenant) -> Result<(), StoreError> {
    let settings = &tenant.settings;
    sqlx::query(
        "/* put_tenant */
         INSERT INTO tenants (tenant_id, display_name, state, unprovisioned_rule,
             default_overage_policy, created_us, unknown_action, activity_window_s, keep_arguments,
             cycles)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
         ON CONFLICT (tenant_id) DO UPDATE SET display_name = excluded.display_name,
             state = excluded.state, unprovisioned_rule = excluded.unprovisioned_rule,
             default_overage_policy = excluded.default_overage_policy,
             unknown_action = excluded.unknown_action,
             activity_window_s = excluded.activity_window_s,
             keep_arguments = excluded.keep_arguments,
             cycles = excluded.cycles",
    )
    .bind(tenant.id.as_str())
    .bind(&*settings.display_name)
    .bind(settings.state.as_str())
    .bind(settings.unprovisioned_rule.as_str())
    .bind(settings.default_overage_policy.as_str())
    .bind(tenant.created_at.as_micros())
    .bind(rows::json(settings.unknown_action.as_ref())?)
    .bind(i32::try_from(settings.activity_window.get().as_secs()).unwrap_or(i32::MAX))
    .bind(rows::json(settings.keep_arguments.as_ref())?)
    .bind(rows::json(settings.cycles.as_ref())?)
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(())
}

/// Stores budgets as they shall be.
pub(crate) async fn put_budgets(
    conn: &mut PgConnection,
    tenant: &TenantId,
    budgets: &[Budget],
) -> Result<(), StoreError> {
    let allocation = |budget: &Budget| match budget.terms.limit {
        Limit::Allocation(amount) => Some(amount.get()),
        Limit::Unlimited => None,
    };
    let thresholds = budgets
        .iter()
        .map(|budget| rows::json(Some(&budget.thresholds).filter(|all| !all.is_empty())))
        .collect::<Result<Vec<_>, _>>()?;
    let on_exceeded = budgets
        .iter()
        .map(|budget| rows::json(Some(&budget.on_exceeded).filter(|of| !of.is_deny())))
        .collect::<Result<Vec<_>, _>>()?;
    fn each<T>(budgets: &[Budget], value: impl Fn(&Budget) -> T) -> Vec<T> {
        budgets.iter().map(value).collect()
    }
    sqlx::query(
        "/* put_budgets */
         INSERT INTO budgets (tenant_id, budget_no, scope, unit, period, time_zone, allocation,
             overdraft_limit, carry_over, state, present, limit_seq, created_us, thresholds, on_exceeded)
         SELECT $1, u.* FROM unnest($2::int[], $3::text[], $4::text[], $5::text[], $6::text[],
             $7::bigint[], $8::bigint[], $9::text[], $10::text[], $11::boolean[], $12::bigint[],
             $13::bigint[], $14::text[], $15::text[]) AS u
         ON CONFLICT (tenant_id, budget_no) DO UPDATE SET time_zone = excluded.time_zone,
             allocation = excluded.allocation, overdraft_limit = excluded.overdraft_limit,
             carry_over = excluded.carry_over, state = excluded.state,
             present = excluded.present, limit_seq = excluded.limit_seq,
             thresholds = excluded.thresholds, on_exceeded = excluded.on_exceeded",
    )
    .bind(tenant.as_str())
    .bind(each(budgets, |b| b.no.0))
    .bind(each(budgets, |b| b.scope.as_str().to_owned()))
    .bind(each(budgets, |b| b.unit.as_str()))
    .bind(each(budgets, |b| b.calendar.period().as_str()))
    .bind(each(budgets, |b| b.calendar.zone_name().to_owned()))
    .bind(each(budgets, allocation))
    .bind(each(budgets, |b| b.terms.overdraft_limit.get()))
    .bind(each(budgets, |b| b.terms.carry_over.as_str()))
    .bind(each(budgets, |b| b.terms.state.as_str()))
    .bind(each(budgets, |b| b.present))
    .bind(each(budgets, |b| b.limit_seq.0))
    .bind(each(budgets, |b| b.created_at.as_micros()))
    .bind(thresholds)
    .bind(on_exceeded)
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(())
}

/// Locks every head there is, in the order of names: before a change that holds for all
/// tenants locks those that it names.
pub(crate) async fn lock_all_heads(conn: &mut PgConnection) -> Result<(), StoreError> {
    sqlx::query(
        "/* lock_all_heads */ SELECT 1 FROM heads ORDER BY tenant_id COLLATE \"C\" FOR UPDATE",
    )
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(())
}

/// Moves the fence of every tenant but some, whose own write does so: decisions upon what
/// held before are not written any more.
pub(crate) async fn move_fences(
    conn: &mut PgConnection,
    but: &[&TenantId],
) -> Result<(), StoreError> {
    let but: Vec<_> = but.iter().map(|tenant| tenant.as_str()).collect();
    sqlx::query(
        "/* move_fences */ UPDATE heads SET fence = fence + 1, config_version = config_version + 1
         WHERE tenant_id <> ALL($1)",
    )
    .bind(but)
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(())
}

/// Counts a change of configuration, so that every cache of it is given up.
pub(crate) async fn bump_config(
    conn: &mut PgConnection,
    tenant: &TenantId,
) -> Result<(), StoreError> {
    sqlx::query(
        "/* bump_config */ UPDATE heads SET config_version = config_version + 1 WHERE tenant_id = $1",
    )
    .bind(tenant.as_str())
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(())
}

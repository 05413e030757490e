//! Subscriptions, how far each was told, and what failed.

use sqlx::PgConnection;
use sqlx::postgres::PgRow;

use super::rows::{column, time};
use super::{Store, StoreError, sort};
use crate::domain::event::EventType;
use crate::domain::id::{Name, Sequence, TenantId};
use crate::domain::subscription::{Subscription, Target};
use crate::domain::time::Timestamp;

/// A subscription whose turn a process has.
#[derive(Debug, Clone)]
pub struct Turn {
    /// Which.
    pub subscription: Subscription,
    /// Signs what is sent.
    pub secret: String,
    /// Names the turn; another one begins when it is over.
    pub lease: Timestamp,
}

/// A delivery that failed before.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Of which subscription.
    pub subscription: Subscription,
    /// Signs what is sent.
    pub secret: String,
    /// The entry that it is about.
    pub seq: Sequence,
    /// How often it was tried.
    pub attempts: i32,
}

fn subscription(row: &PgRow) -> Result<Subscription, StoreError> {
    let types: &str = column(row, "event_types")?;
    Ok(Subscription {
        tenant: TenantId::from_stored(column(row, "tenant_id")?)?,
        id: Name::parse(column(row, "subscription_id")?)?,
        // Whether plain HTTP is allowed is asked again when something is sent.
        target: Target::parse(column(row, "url")?, true)?,
        types: types
            .split(',')
            .map(EventType::parse)
            .collect::<Result<_, _>>()?,
        created_at: time(row, "created_us")?,
        cursor: Sequence(column(row, "cursor_seq")?),
        retrying: column(row, "retrying")?,
        dead: column(row, "dead")?,
        last_error: column::<Option<&str>>(row, "error")?.map(Into::into),
    })
}

/// What can be read of rows of several tenants: one that can't keeps no other back.
fn readable<T>(row: Result<T, StoreError>) -> Option<T> {
    row.inspect_err(|error| tracing::error!(%error, "a subscription can't be read"))
        .ok()
}

fn types_text(types: &[EventType]) -> String {
    let names: Vec<_> = types.iter().map(|of| of.as_str()).collect();
    names.join(",")
}

/// Inserts a subscription. False where there is one of that name.
pub(crate) async fn insert(
    conn: &mut PgConnection,
    subscription: &Subscription,
    secret: &str,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "/* insert_subscription */
         INSERT INTO subscriptions (tenant_id, subscription_id, url, event_types, secret,
             cursor_seq, created_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
    )
    .bind(subscription.tenant.as_str())
    .bind(subscription.id.canonical())
    .bind(subscription.target.as_str())
    .bind(types_text(&subscription.types))
    .bind(secret)
    .bind(subscription.cursor.0)
    .bind(subscription.created_at.as_micros())
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(done.rows_affected() == 1)
}

/// Deletes a subscription with what it had to deliver. False where there is none.
pub(crate) async fn delete(
    conn: &mut PgConnection,
    tenant: &TenantId,
    id: &Name,
) -> Result<bool, StoreError> {
    let gone = sqlx::query(
        "/* delete_subscription */
         DELETE FROM subscriptions WHERE tenant_id = $1 AND subscription_id = $2",
    )
    .bind(tenant.as_str())
    .bind(id.canonical())
    .execute(&mut *conn)
    .await
    .map_err(sort)?;
    sqlx::query(
        "/* delete_deliveries */
         DELETE FROM deliveries WHERE tenant_id = $1 AND subscription_id = $2",
    )
    .bind(tenant.as_str())
    .bind(id.canonical())
    .execute(conn)
    .await
    .map_err(sort)?;
    Ok(gone.rows_affected() == 1)
}

impl Store {
    /// A tenant's subscriptions, by name.
    pub async fn subscriptions(&self, tenant: &TenantId) -> Result<Vec<Subscription>, StoreError> {
        let rows = sqlx::query(
            "/* subscriptions */
             SELECT s.*,
                 (SELECT count(*) FROM deliveries d WHERE d.tenant_id = s.tenant_id
                     AND d.subscription_id = s.subscription_id AND d.state = 'RETRY') AS retrying,
                 (SELECT count(*) FROM deliveries d WHERE d.tenant_id = s.tenant_id
                     AND d.subscription_id = s.subscription_id AND d.state = 'DEAD') AS dead,
                 (SELECT last_error FROM deliveries d WHERE d.tenant_id = s.tenant_id
                     AND d.subscription_id = s.subscription_id
                     ORDER BY d.seq DESC LIMIT 1) AS error
             FROM subscriptions s WHERE s.tenant_id = $1 ORDER BY s.subscription_id",
        )
        .bind(tenant.as_str())
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        rows.iter().map(subscription).collect()
    }

    /// Takes a turn at every subscription that has something to be told and is nobody's
    /// now.
    pub async fn take_turns(
        &self,
        now: Timestamp,
        lease: Timestamp,
    ) -> Result<Vec<Turn>, StoreError> {
        let rows = sqlx::query(
            "/* take_turns */
             UPDATE subscriptions s SET lease_us = $2
             WHERE s.lease_us < $1
               AND s.cursor_seq < (SELECT seq FROM heads h WHERE h.tenant_id = s.tenant_id)
             RETURNING s.*, 0::bigint AS retrying, 0::bigint AS dead,
                 NULL::text AS error",
        )
        .bind(now.as_micros())
        .bind(lease.as_micros())
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        let turn = |row| {
            Ok(Turn {
                subscription: subscription(row)?,
                secret: column(row, "secret")?,
                lease,
            })
        };
        Ok(rows.iter().map(turn).filter_map(readable).collect())
    }

    /// Says how far a turn has come, and how long it goes on. False where it is over.
    pub async fn keep_turn(
        &self,
        turn: &Turn,
        cursor: Sequence,
        lease: Timestamp,
    ) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "/* keep_turn */ UPDATE subscriptions SET cursor_seq = $4, lease_us = $5
             WHERE tenant_id = $1 AND subscription_id = $2 AND lease_us = $3",
        )
        .bind(turn.subscription.tenant.as_str())
        .bind(turn.subscription.id.canonical())
        .bind(turn.lease.as_micros())
        .bind(cursor.0)
        .bind(lease.as_micros())
        .execute(&self.pool)
        .await
        .map_err(sort)?;
        Ok(done.rows_affected() == 1)
    }

    /// Notes a delivery that failed; dead ones are not tried again by themselves.
    pub async fn put_failed(
        &self,
        subscription: &Subscription,
        seq: Sequence,
        attempts: i32,
        next: Option<Timestamp>,
        error: &str,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "/* put_failed */
             INSERT INTO deliveries (tenant_id, subscription_id, seq, state, attempts, next_us, last_error)
             SELECT s.tenant_id, s.subscription_id, $3, $4, $5, $6, $7
             FROM subscriptions s WHERE s.tenant_id = $1 AND s.subscription_id = $2
             ON CONFLICT (tenant_id, subscription_id, seq) DO UPDATE SET state = excluded.state,
                 attempts = excluded.attempts, next_us = excluded.next_us,
                 last_error = excluded.last_error",
        )
        .bind(subscription.tenant.as_str())
        .bind(subscription.id.canonical())
        .bind(seq.0)
        .bind(if next.is_some() { "RETRY" } else { "DEAD" })
        .bind(attempts)
        .bind(next.map_or(0, Timestamp::as_micros))
        .bind(error)
        .execute(&self.pool)
        .await
        .map_err(sort)?;
        Ok(())
    }

    /// Forgets a delivery that went through in the end.
    pub async fn delivered(
        &self,
        subscription: &Subscription,
        seq: Sequence,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "/* delivered */ DELETE FROM deliveries
             WHERE tenant_id = $1 AND subscription_id = $2 AND seq = $3",
        )
        .bind(subscription.tenant.as_str())
        .bind(subscription.id.canonical())
        .bind(seq.0)
        .execute(&self.pool)
        .await
        .map_err(sort)?;
        Ok(())
    }

    /// Takes deliveries whose time has come, so that no other process does until `until`.
    pub async fn take_deliveries(
        &self,
        now: Timestamp,
        until: Timestamp,
        limit: i64,
    ) -> Result<Vec<Delivery>, StoreError> {
        let rows = sqlx::query(
            "/* take_deliveries */
             WITH due AS (
                 SELECT tenant_id, subscription_id, seq FROM deliveries
                 WHERE state = 'RETRY' AND next_us <= $1
                 ORDER BY next_us LIMIT $3 FOR UPDATE SKIP LOCKED
             ), taken AS (
                 UPDATE deliveries d SET next_us = $2 FROM due
                 WHERE d.tenant_id = due.tenant_id AND d.subscription_id = due.subscription_id
                   AND d.seq = due.seq
                 RETURNING d.*
             )
             SELECT s.*, t.seq AS delivery_seq, t.attempts, 0::bigint AS retrying, 0::bigint AS dead,
                 NULL::text AS error
             FROM taken t JOIN subscriptions s
               ON s.tenant_id = t.tenant_id AND s.subscription_id = t.subscription_id
             ORDER BY t.seq",
        )
        .bind(now.as_micros())
        .bind(until.as_micros())
        .bind(limit)
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        let delivery = |row| {
            Ok(Delivery {
                subscription: subscription(row)?,
                secret: column(row, "secret")?,
                seq: Sequence(column(row, "delivery_seq")?),
                attempts: column(row, "attempts")?,
            })
        };
        Ok(rows.iter().map(delivery).filter_map(readable).collect())
    }

    /// Tries again what was given up, or all from a sequence on. Answers how many were
    /// given up; nothing where there is no such subscription.
    pub async fn redeliver(
        &self,
        tenant: &TenantId,
        id: &Name,
        from: Option<Sequence>,
        now: Timestamp,
    ) -> Result<Option<i64>, StoreError> {
        let found = sqlx::query(
            "/* rewind */ UPDATE subscriptions SET cursor_seq = least(cursor_seq, $3), lease_us = 0
             WHERE tenant_id = $1 AND subscription_id = $2",
        )
        .bind(tenant.as_str())
        .bind(id.canonical())
        .bind(from.map_or(i64::MAX, |from| from.0 - 1))
        .execute(&self.pool)
        .await
        .map_err(sort)?;
        if found.rows_affected() == 0 {
            return Ok(None);
        }
        let revived = sqlx::query(
            "/* revive */ UPDATE deliveries SET state = 'RETRY', attempts = 0, next_us = $3
             WHERE tenant_id = $1 AND subscription_id = $2 AND state = 'DEAD'",
        )
        .bind(tenant.as_str())
        .bind(id.canonical())
        .bind(now.as_micros())
        .execute(&self.pool)
        .await
        .map_err(sort)?;
        Ok(Some(
            i64::try_from(revived.rows_affected()).unwrap_or(i64::MAX),
        ))
    }
}

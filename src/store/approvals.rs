//! Approvals as people look for them.

use std::sync::Arc;

use sqlx::postgres::PgRow;

use super::rows::{column, time, time_or_none};
use super::{Store, StoreError, sort};
use crate::domain::approve::{ApprovalRecord, ApprovalState, Resolution};
use crate::domain::id::{KeyHash, KeyId, ReservationId, Sequence, TenantId};
use crate::domain::query::ApprovalQuery;

pub(super) fn record(row: &PgRow) -> Result<ApprovalRecord, StoreError> {
    let state = ApprovalState::parse(column(row, "state")?)?;
    let resolved_at = time_or_none(row, "resolved_us")?;
    let resolution = match resolved_at {
        None => None,
        Some(at) => {
            let by: Option<&str> = column(row, "resolved_by")?;
            Some(Resolution {
                state,
                at,
                by: by.map(KeyId::parse).transpose()?,
                approver: column::<&str>(row, "approver")?.into(),
                note: column::<&str>(row, "note")?.into(),
                seq: Sequence(column(row, "resolve_seq")?),
            })
        }
    };
    Ok(ApprovalRecord {
        reservation: ReservationId::of(KeyHash::from_stored(column(row, "reservation_id")?)?),
        approval: Arc::new(serde_json::from_str(column(row, "body")?)?),
        requested_at: time(row, "requested_us")?,
        reserve_seq: Sequence(column(row, "reserve_seq")?),
        resolution,
    })
}

impl Store {
    /// One approval.
    pub async fn approval(
        &self,
        tenant: &TenantId,
        id: ReservationId,
    ) -> Result<Option<ApprovalRecord>, StoreError> {
        let row = sqlx::query(
            "/* approval */ SELECT * FROM approvals WHERE tenant_id = $1 AND reservation_id = $2",
        )
        .bind(tenant.as_str())
        .bind(id.as_bytes().as_slice())
        .fetch_optional(&self.pool)
        .await
        .map_err(sort)?;
        row.as_ref().map(record).transpose()
    }

    /// Approvals in one state, soonest deadline first.
    pub async fn approvals(
        &self,
        tenant: &TenantId,
        query: &ApprovalQuery,
    ) -> Result<Vec<ApprovalRecord>, StoreError> {
        let (deadline, id) = match &query.after {
            Some((deadline, id)) => (deadline.as_micros(), id.as_bytes().to_vec()),
            None => (i64::MIN, Vec::new()),
        };
        let rows = sqlx::query(
            "/* approvals */ SELECT * FROM approvals
             WHERE tenant_id = $1 AND state = $2 AND (deadline_us, reservation_id) > ($3, $4)
               AND (NOT $5 OR deadline_us >= $6)
             ORDER BY deadline_us, reservation_id LIMIT $7",
        )
        .bind(tenant.as_str())
        .bind(query.state.as_str())
        .bind(deadline)
        .bind(id)
        // What is over counts as expired, whether or not the sweeper has come by.
        .bind(query.state == ApprovalState::Pending)
        .bind(query.now.as_micros())
        .bind(query.limit)
        .fetch_all(&self.pool)
        .await
        .map_err(sort)?;
        rows.iter().map(record).collect()
    }
}

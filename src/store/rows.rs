//! Rows to domain types and back. A row that can't be read is an error of its
//! own, never a guess.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::StoreError;
use crate::domain::amount::{Amount, Amounts, Unit};
use crate::domain::approve::Approval;
use crate::domain::budget::{Balance, Budget, BudgetState, CarryOver, Credit, Limit, Terms};
use crate::domain::id::{
    BalanceNo, BudgetNo, KeyHash, Malformed, ReservationId, Sequence, TenantId,
};
use crate::domain::narrowing::Threshold;
use crate::domain::period::{Calendar, Period, Window};
use crate::domain::request::{Action, Context, Metadata, OveragePolicy};
use crate::domain::reservation::{Reservation, Settlement, SettlementKind, Status, Tranche};
use crate::domain::scope::{Scope, Subject};
use crate::domain::tenant::{ActivityWindow, Settings, Tenant, TenantState, UnprovisionedRule};
use crate::domain::time::Timestamp;

impl From<Malformed> for StoreError {
    fn from(malformed: Malformed) -> Self {
        Self::Corrupt(malformed.to_string())
    }
}

impl From<serde_json::Error> for StoreError {
    fn from(error: serde_json::Error) -> Self {
        Self::Corrupt(error.to_string())
    }
}

/// One column.
pub(super) fn column<'r, T>(row: &'r PgRow, name: &'static str) -> Result<T, StoreError>
where
    T: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    row.try_get(name)
        .map_err(|error| StoreError::Corrupt(error.to_string()))
}

pub(super) fn time(row: &PgRow, name: &'static str) -> Result<Timestamp, StoreError> {
    column(row, name).map(Timestamp::from_micros)
}

pub(super) fn time_or_none(
    row: &PgRow,
    name: &'static str,
) -> Result<Option<Timestamp>, StoreError> {
    let micros: Option<i64> = column(row, name)?;
    Ok(micros.map(Timestamp::from_micros))
}

/// A column of JSON.
fn json_or_none<T: serde::de::DeserializeOwned>(
    row: &PgRow,
    name: &'static str,
) -> Result<Option<T>, StoreError> {
    let text: Option<&str> = column(row, name)?;
    Ok(text.map(serde_json::from_str).transpose()?)
}

/// A value as JSON; nothing where it is empty.
pub(super) fn json<T: Serialize>(value: Option<&T>) -> Result<Option<String>, StoreError> {
    Ok(value.map(serde_json::to_string).transpose()?)
}

fn amount(row: &PgRow, name: &'static str) -> Result<Amount, StoreError> {
    Ok(Amount::new(column(row, name)?)?)
}

pub(super) fn tenant(row: &PgRow) -> Result<Tenant, StoreError> {
    Ok(Tenant {
        id: TenantId::from_stored(column(row, "tenant_id")?)?,
        settings: Settings {
            display_name: column::<String>(row, "display_name")?.into(),
            state: TenantState::parse(column(row, "state")?)?,
            unprovisioned_rule: UnprovisionedRule::parse(column(row, "unprovisioned_rule")?)?,
            default_overage_policy: OveragePolicy::parse(column(row, "default_overage_policy")?)?,
            unknown_action: json_or_none(row, "unknown_action")?,
            activity_window: ActivityWindow::new(Duration::from_secs(
                u64::try_from(column::<i32>(row, "activity_window_s")?).unwrap_or(0),
            ))?,
            keep_arguments: json_or_none(row, "keep_arguments")?,
            cycles: json_or_none(row, "cycles")?,
        },
        created_at: time(row, "created_us")?,
    })
}

pub(super) fn budget(row: &PgRow) -> Result<Budget, StoreError> {
    let allocation: Option<i64> = column(row, "allocation")?;
    let period = Period::parse(column(row, "period")?)?;
    Ok(Budget {
        no: BudgetNo(column(row, "budget_no")?),
        scope: Scope::parse(column(row, "scope")?)?,
        unit: Unit::parse(column(row, "unit")?)?,
        calendar: Calendar::new(period, column(row, "time_zone")?)?,
        terms: Terms {
            limit: match allocation {
                Some(amount) => Limit::Allocation(Amount::new(amount)?),
                None => Limit::Unlimited,
            },
            overdraft_limit: amount(row, "overdraft_limit")?,
            carry_over: CarryOver::parse(column(row, "carry_over")?)?,
            state: BudgetState::parse(column(row, "state")?)?,
        },
        thresholds: json_or_none::<Vec<Threshold>>(row, "thresholds")?
            .unwrap_or_default()
            .into(),
        on_exceeded: json_or_none(row, "on_exceeded")?.unwrap_or_default(),
        present: column(row, "present")?,
        limit_seq: Sequence(column(row, "limit_seq")?),
        created_at: time(row, "created_us")?,
    })
}

/// The bounded stand-in for a scope in an index.
pub(super) fn scope_key(scope: &str) -> Vec<u8> {
    Sha256::digest(scope)[..16].to_vec()
}

pub(super) fn balance(row: &PgRow) -> Result<Balance, StoreError> {
    let credits: Option<String> = column(row, "credits")?;
    let credits: Vec<Credit> = match credits {
        Some(text) => serde_json::from_str(&text)?,
        None => Vec::new(),
    };
    let over_limit: Option<i64> = column(row, "over_limit_seq")?;
    Ok(Balance {
        no: BalanceNo(column(row, "balance_no")?),
        budget: BudgetNo(column(row, "budget_no")?),
        scope: Arc::from(column::<&str>(row, "scope")?),
        window: Window {
            start: time(row, "period_start_us")?,
            end: time_or_none(row, "period_end_us")?,
        },
        granted: column(row, "granted")?,
        reserved: amount(row, "reserved")?,
        spent: amount(row, "spent")?,
        debt: amount(row, "debt")?,
        over_limit: over_limit.map(Sequence),
        credits,
        next_lapse: time_or_none(row, "next_lapse_us")?,
    })
}

pub(super) fn credits_text(balance: &Balance) -> Result<Option<String>, StoreError> {
    if balance.credits.is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::to_string(&balance.credits)?))
}

/// What of a reservation never changes.
#[derive(Serialize, Deserialize)]
struct ReservationBody {
    subject: Arc<Subject>,
    action: Arc<Action>,
    #[serde(default)]
    context: Context,
    overage_policy: OveragePolicy,
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    metadata: Metadata,
    grace_us: u64,
    #[serde(default)]
    approval: Option<Arc<Approval>>,
}

/// The same, borrowed.
#[derive(Serialize)]
struct ReservationBodyRef<'a> {
    subject: &'a Subject,
    action: &'a Action,
    #[serde(skip_serializing_if = "Context::is_empty")]
    context: &'a Context,
    overage_policy: OveragePolicy,
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    metadata: &'a Metadata,
    grace_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    approval: Option<&'a Approval>,
}

pub(super) fn reservation_body(reservation: &Reservation) -> Result<String, StoreError> {
    Ok(serde_json::to_string(&ReservationBodyRef {
        subject: &reservation.subject,
        action: &reservation.action,
        context: &reservation.context,
        overage_policy: reservation.overage_policy,
        metadata: &reservation.metadata,
        grace_us: u64::try_from(reservation.grace.as_micros()).unwrap_or(u64::MAX),
        approval: reservation.approval.as_deref(),
    })?)
}

pub(super) fn reservation(row: &PgRow) -> Result<Reservation, StoreError> {
    let body: ReservationBody = serde_json::from_str(column(row, "body")?)?;
    let tranches: Vec<Tranche> = serde_json::from_str(column(row, "holds")?)?;
    let status = match column::<&str>(row, "state")? {
        "ACTIVE" => Status::Active,
        "PENDING_APPROVAL" => Status::Pending,
        settled => {
            let charged: Option<&str> = column(row, "charged")?;
            Status::Settled(Settlement {
                kind: SettlementKind::parse(settled)?,
                at: time(row, "settled_us")?,
                seq: Sequence(column(row, "settle_seq")?),
                charged: match charged {
                    Some(text) => serde_json::from_str(text)?,
                    None => Amounts::NONE,
                },
            })
        }
    };
    Ok(Reservation {
        id: ReservationId::of(KeyHash::from_stored(column(row, "reservation_id")?)?),
        version: column(row, "version")?,
        subject: body.subject,
        action: body.action,
        context: body.context,
        overage_policy: body.overage_policy,
        metadata: body.metadata,
        created_at: time(row, "created_us")?,
        reserve_seq: Sequence(column(row, "reserve_seq")?),
        expires_at: time(row, "expires_us")?,
        grace: Duration::from_micros(body.grace_us),
        tranches,
        status,
        approval: body.approval,
    })
}

//! Messages to domain types and back. Every field of a message is taken apart by
//! name, so that a new one does not compile until somebody has decided about it.

pub mod answers;
pub mod api_keys;
pub mod approvals;
pub mod authority;
pub mod budgets;
pub mod catalogue;
pub mod events;
pub mod ledger;
pub mod provisioning;
pub mod rules;
pub mod tenants;

use std::time::Duration;

use pbjson_types as wkt;

use super::fields::Fields;
use crate::domain::amount::{Amounts, Unit};
use crate::domain::answer::BalanceView;
use crate::domain::budget::BudgetState;
use crate::domain::ledger::After;
use crate::domain::period::Period;
use crate::domain::request::OveragePolicy;
use crate::domain::time::Timestamp;
use crate::proto;

pub(super) fn unit(unit: Unit) -> proto::Unit {
    match unit {
        Unit::RiskPoints => proto::Unit::RiskPoints,
        Unit::UsdMicrocents => proto::Unit::UsdMicrocents,
        Unit::Tokens => proto::Unit::Tokens,
        Unit::Credits => proto::Unit::Credits,
        Unit::Calls => proto::Unit::Calls,
    }
}

pub(super) fn amounts(amounts: &Amounts) -> Vec<proto::Amount> {
    amounts
        .iter()
        .map(|(of, amount)| proto::Amount {
            unit: unit(of).into(),
            value: amount.get(),
        })
        .collect()
}

pub(super) fn time(at: Timestamp) -> wkt::Timestamp {
    let micros = at.as_micros();
    wkt::Timestamp {
        seconds: micros.div_euclid(1_000_000),
        nanos: i32::try_from(micros.rem_euclid(1_000_000) * 1_000).unwrap_or(0),
    }
}

pub(super) fn duration(duration: Duration) -> wkt::Duration {
    wkt::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

pub(super) fn period(of: Period) -> proto::Period {
    match of {
        Period::Total => proto::Period::Total,
        Period::Hourly => proto::Period::Hourly,
        Period::Daily => proto::Period::Daily,
        Period::Weekly => proto::Period::Weekly,
        Period::Monthly => proto::Period::Monthly,
    }
}

/// A period; TOTAL where nothing is said.
pub(super) fn parse_period(fields: &mut Fields, field: &str, value: i32) -> Option<Period> {
    match proto::Period::try_from(value) {
        Ok(proto::Period::Unspecified | proto::Period::Total) => Some(Period::Total),
        Ok(proto::Period::Hourly) => Some(Period::Hourly),
        Ok(proto::Period::Daily) => Some(Period::Daily),
        Ok(proto::Period::Weekly) => Some(Period::Weekly),
        Ok(proto::Period::Monthly) => Some(Period::Monthly),
        Err(_) => {
            fields.bad(field, "a known Period");
            None
        }
    }
}

pub(super) fn budget_state(state: BudgetState) -> proto::BudgetState {
    match state {
        BudgetState::Active => proto::BudgetState::Active,
        BudgetState::Frozen => proto::BudgetState::Frozen,
        BudgetState::Closed => proto::BudgetState::Closed,
    }
}

pub(super) fn overage_policy(policy: OveragePolicy) -> proto::OveragePolicy {
    match policy {
        OveragePolicy::Reject => proto::OveragePolicy::Reject,
        OveragePolicy::AllowIfAvailable => proto::OveragePolicy::AllowIfAvailable,
        OveragePolicy::AllowWithOverdraft => proto::OveragePolicy::AllowWithOverdraft,
    }
}

/// An overage policy; nothing for the default.
pub(super) fn parse_overage_policy(
    fields: &mut Fields,
    field: &str,
    value: i32,
) -> Option<OveragePolicy> {
    match proto::OveragePolicy::try_from(value) {
        Ok(proto::OveragePolicy::Unspecified) => None,
        Ok(proto::OveragePolicy::Reject) => Some(OveragePolicy::Reject),
        Ok(proto::OveragePolicy::AllowIfAvailable) => Some(OveragePolicy::AllowIfAvailable),
        Ok(proto::OveragePolicy::AllowWithOverdraft) => Some(OveragePolicy::AllowWithOverdraft),
        Err(_) => {
            fields.bad(field, "a known OveragePolicy");
            None
        }
    }
}

pub(super) fn balance(view: &BalanceView) -> proto::Balance {
    let After(allocated, reserved, spent, debt) = view.amounts;
    let periodic = view.period != Period::Total;
    proto::Balance {
        scope: view.scope.to_string(),
        unit: unit(view.unit).into(),
        period: period(view.period).into(),
        period_start_time: periodic.then(|| time(view.window.start)),
        period_end_time: view.window.end.map(time),
        allocated: allocated.map(|amount| amount.get()),
        reserved: reserved.get(),
        spent: spent.get(),
        debt: debt.get(),
        remaining: view.remaining(),
        overdraft_limit: view.overdraft_limit.get(),
        over_limit: view.over_limit,
        budget_scope: view.budget_scope.to_string(),
        state: budget_state(view.state).into(),
    }
}

//! What a document says about budgets, their funding, and budgets in answers.

use std::collections::HashSet;

use tonic::Status;

use super::{budget_state, parse_period, period, rules, time, unit};
use crate::api::fields::Fields;
use crate::domain::amount::Amount;
use crate::domain::budget::{Budget, BudgetState, CarryOver, Limit, Terms};
use crate::domain::period::{Calendar, Period};
use crate::domain::provision::{BudgetKey, BudgetSpec};
use crate::domain::request::{Fund, FundOperation, Funding};
use crate::domain::scope::Scope;
use crate::proto;

/// Takes what names a budget in a message.
pub(super) fn budget_key(
    fields: &mut Fields,
    at: &str,
    scope: &str,
    unit: i32,
    period: i32,
) -> Option<BudgetKey> {
    let prefix = if at.is_empty() {
        String::new()
    } else {
        format!("{at}.")
    };
    let parsed = Scope::parse(scope).and_then(|scope| scope.tenant().map(|_| scope));
    let scope = fields.take(&format!("{prefix}scope"), parsed);
    let unit = fields.unit(&format!("{prefix}unit"), unit, true);
    let period = parse_period(fields, &format!("{prefix}period"), period);
    Some(BudgetKey {
        scope: scope?,
        unit: unit?,
        period: period?,
    })
}

/// Notes a budget that stands in the document already, present or absent.
pub(super) fn budget_once(
    fields: &mut Fields,
    at: &str,
    key: Option<&BudgetKey>,
    seen: &mut HashSet<BudgetKey>,
) {
    if key.is_some_and(|key| !seen.insert(key.clone())) {
        let once = "named once in a document with its unit and period";
        fields.bad(format!("{at}.scope"), once);
    }
}

/// Takes a document's budget.
pub(super) fn budget_spec(
    fields: &mut Fields,
    at: &str,
    message: proto::Budget,
    seen: &mut HashSet<BudgetKey>,
) -> Option<BudgetSpec> {
    let proto::Budget {
        scope,
        unit,
        period,
        time_zone,
        limit,
        overdraft_limit,
        carry_over,
        state,
        create_time: _,
        thresholds,
        on_exceeded,
    } = message;
    let on_exceeded = rules::on_exceeded(fields, &format!("{at}.on_exceeded"), on_exceeded);
    let thresholds = rules::thresholds(fields, &format!("{at}.thresholds"), thresholds);
    let key = budget_key(fields, at, &scope, unit, period);
    budget_once(fields, at, key.as_ref(), seen);
    // Its mistake, if any, was noted with the key's.
    let of = parse_period(&mut Fields::default(), "period", period).unwrap_or(Period::Daily);
    let calendar = fields.take(&format!("{at}.time_zone"), Calendar::new(of, &time_zone));
    let limit = match limit {
        Some(proto::budget::Limit::Allocation(amount)) => fields
            .take(&format!("{at}.allocation"), Amount::new(amount))
            .map(Limit::Allocation),
        Some(proto::budget::Limit::Unlimited(true)) => Some(Limit::Unlimited),
        Some(proto::budget::Limit::Unlimited(false)) => {
            fields.bad(format!("{at}.unlimited"), "true, or an allocation instead");
            None
        }
        None => {
            fields.bad(
                format!("{at}.allocation"),
                "given, or unlimited: true instead",
            );
            None
        }
    };
    let overdraft = fields.take(
        &format!("{at}.overdraft_limit"),
        Amount::new(overdraft_limit),
    );
    let carry_over = match proto::CarryOver::try_from(carry_over) {
        Ok(proto::CarryOver::Unspecified | proto::CarryOver::None) => Some(CarryOver::None),
        Ok(proto::CarryOver::Forward) => Some(CarryOver::Forward),
        Ok(proto::CarryOver::CapAtAllocated) => Some(CarryOver::CapAtAllocated),
        Err(_) => {
            fields.bad(format!("{at}.carry_over"), "a known CarryOver");
            None
        }
    };
    if of == Period::Total && carry_over.is_some_and(|c| c != CarryOver::None) {
        fields.bad(
            format!("{at}.carry_over"),
            "empty for a budget without a period",
        );
    }
    let state = match proto::BudgetState::try_from(state) {
        Ok(proto::BudgetState::Unspecified | proto::BudgetState::Active) => {
            Some(BudgetState::Active)
        }
        Ok(proto::BudgetState::Frozen) => Some(BudgetState::Frozen),
        Ok(proto::BudgetState::Closed) => Some(BudgetState::Closed),
        Err(_) => {
            fields.bad(format!("{at}.state"), "a known BudgetState");
            None
        }
    };
    Some(BudgetSpec {
        key: key?,
        calendar: calendar?,
        terms: Terms {
            limit: limit?,
            overdraft_limit: overdraft?,
            carry_over: carry_over?,
            state: state?,
        },
        thresholds: thresholds?,
        on_exceeded,
    })
}

/// Takes what names a budget.
pub fn named_budget(scope: &str, unit: i32, period: i32) -> Result<BudgetKey, Status> {
    let mut fields = Fields::default();
    let key = budget_key(&mut fields, "", scope, unit, period);
    fields.finish(key)
}

/// Takes a FundBudgetRequest.
pub fn fund(message: proto::FundBudgetRequest) -> Result<Fund, Status> {
    let proto::FundBudgetRequest {
        idempotency_key,
        scope,
        unit,
        period,
        operation,
        amount,
        expire_time,
        reason,
        allocated,
        credit_surplus,
    } = message;
    let mut fields = Fields::default();
    let key = fields.key(&idempotency_key);
    let parsed = Scope::parse_concrete(&scope).and_then(|scope| scope.tenant().map(|_| scope));
    let scope = fields.take("scope", parsed);
    let unit = fields.unit("unit", unit, true);
    let period = parse_period(&mut fields, "period", period);
    let amount = fields.take("amount", Amount::new(amount));
    let expires_at = fields.time("expire_time", expire_time);
    let reason = fields.text("reason", reason, 1_024);
    let operation = match proto::FundOperation::try_from(operation) {
        Ok(proto::FundOperation::Credit) => Some(FundOperation::Credit),
        Ok(proto::FundOperation::Debit) => Some(FundOperation::Debit),
        Ok(proto::FundOperation::Reset) => Some(FundOperation::Reset),
        Ok(proto::FundOperation::ResetSpent) => Some(FundOperation::ResetSpent),
        Ok(proto::FundOperation::RepayDebt) => Some(FundOperation::RepayDebt),
        Ok(proto::FundOperation::Unspecified) | Err(_) => {
            fields.bad("operation", "a known FundOperation");
            None
        }
    };
    if expires_at.is_some() && operation != Some(FundOperation::Credit) {
        fields.bad("expire_time", "empty but for FUND_OPERATION_CREDIT");
    }
    let allocated = match allocated {
        Some(_) if operation != Some(FundOperation::ResetSpent) => {
            fields.bad("allocated", "absent but for FUND_OPERATION_RESET_SPENT");
            None
        }
        Some(amount) => fields.take("allocated", Amount::new(amount)).map(Some),
        None => Some(None),
    };
    if credit_surplus && operation != Some(FundOperation::RepayDebt) {
        fields.bad("credit_surplus", "false but for FUND_OPERATION_REPAY_DEBT");
    }
    let made = (|| {
        Some(Fund {
            key: key?,
            funding: Funding {
                scope: scope?,
                unit: unit?,
                period: period?,
                operation: operation?,
                amount: amount?,
                expires_at,
                allocated: allocated?,
                credit_surplus,
                reason,
            },
        })
    })();
    fields.finish(made)
}

/// Words a budget.
pub fn budget(budget: &Budget) -> proto::Budget {
    let Terms {
        limit,
        overdraft_limit,
        carry_over,
        state,
    } = budget.terms;
    let limit = match limit {
        Limit::Allocation(amount) => proto::budget::Limit::Allocation(amount.get()),
        Limit::Unlimited => proto::budget::Limit::Unlimited(true),
    };
    let carry_over = match carry_over {
        CarryOver::None => proto::CarryOver::None,
        CarryOver::Forward => proto::CarryOver::Forward,
        CarryOver::CapAtAllocated => proto::CarryOver::CapAtAllocated,
    };
    let periodic = budget.calendar.period() != Period::Total;
    proto::Budget {
        scope: budget.scope.to_string(),
        unit: unit(budget.unit).into(),
        period: period(budget.calendar.period()).into(),
        time_zone: if periodic {
            budget.calendar.zone_name().to_owned()
        } else {
            String::new()
        },
        limit: Some(limit),
        overdraft_limit: overdraft_limit.get(),
        carry_over: carry_over.into(),
        state: budget_state(state).into(),
        create_time: Some(time(budget.created_at)),
        thresholds: rules::threshold_messages(&budget.thresholds),
        on_exceeded: rules::on_exceeded_message(&budget.on_exceeded),
    }
}

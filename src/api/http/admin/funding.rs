//! Funding: Remit's operations on one balance, one or two for each of the protocol's.

use axum::body::Body;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::super::call::{Answer, Asker, Call};
use super::super::problem::Fault;
use super::super::runtime::fresh_key;
use super::super::strict::{object, object_or_none, word};
use super::super::{Gateway, translate, wire};
use super::budgets::{Named, Which, not_found, worded};
use super::{Done, Params};
use crate::domain::id::IdempotencyKey;
use crate::domain::permission::Permission;
use crate::domain::request::Digest;
use crate::proto;
use crate::proto::provisioning_server::Provisioning as _;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fund {
    #[serde(deserialize_with = "word")]
    operation: Operation,
    #[serde(deserialize_with = "object")]
    amount: wire::Amount,
    #[serde(default, deserialize_with = "object_or_none")]
    spent: Option<wire::Amount>,
    reason: Option<String>,
    idempotency_key: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Operation {
    Credit,
    Debit,
    Reset,
    ResetSpent,
    RepayDebt,
}

#[derive(Debug, Serialize)]
struct Funded {
    operation: Operation,
    previous_allocated: wire::Amount,
    new_allocated: wire::Amount,
    previous_remaining: wire::Amount,
    new_remaining: wire::Amount,
    previous_debt: wire::Amount,
    new_debt: wire::Amount,
    previous_spent: wire::Amount,
    new_spent: wire::Amount,
    timestamp: String,
}

/// One step of a funding.
struct Step<'a> {
    key: String,
    operation: proto::FundOperation,
    amount: i64,
    reason: &'a str,
}

async fn step(
    gateway: &Gateway,
    asker: &Asker,
    named: &Named,
    step: Step<'_>,
) -> Result<proto::FundBudgetResponse, Fault> {
    let message = proto::FundBudgetRequest {
        idempotency_key: step.key,
        scope: named.scope.clone(),
        unit: translate::unit(named.unit).into(),
        operation: step.operation.into(),
        amount: step.amount,
        reason: step.reason.to_owned(),
        ..proto::FundBudgetRequest::default()
    };
    let funded = gateway.services.fund_budget(asker.request(message)).await;
    Ok(funded.map_err(not_found)?.into_inner())
}

pub(super) async fn fund(
    State(gateway): State<Gateway>,
    call: Call,
    which: Params<Which>,
    body: Body,
) -> Done {
    let asker = gateway.either(&call, Permission::Fund).await?;
    let given: Fund = gateway.json(&call, body).await?;
    let named = Named::read(which)?;
    if let Some(key) = &given.idempotency_key {
        call.must_agree(key)?;
    }
    for amount in [Some(given.amount), given.spent].into_iter().flatten() {
        if amount.unit != named.unit {
            return Err(Fault::other_unit("amount and spent"));
        }
    }
    if given.spent.is_some() && given.operation != Operation::ResetSpent {
        return Err(Fault::field("spent", "absent, but for RESET_SPENT"));
    }
    let key = call.key_or(given.idempotency_key, fresh_key);
    let reason = given.reason.unwrap_or_default();
    let amount = given.amount.amount;
    IdempotencyKey::parse(&key)
        .map_err(|error| Fault::field("idempotency_key", &error.to_string()))?;
    let one = |operation, amount, part: &str| Step {
        key: match part {
            "" => key.clone(),
            part => Digest::of(format!("{key}\0{part}").as_bytes()).to_string(),
        },
        operation,
        amount,
        reason: &reason,
    };
    use proto::FundOperation as To;
    let (first, last) = match given.operation {
        Operation::Credit | Operation::Debit | Operation::Reset => {
            let to = match given.operation {
                Operation::Credit => To::Credit,
                Operation::Debit => To::Debit,
                _ => To::Reset,
            };
            let done = step(&gateway, &asker, &named, one(to, amount, "")).await?;
            (done.clone(), done)
        }
        // Two changes of Remit's. Each is pinned to a key of its own, so that a retry ends
        // what was begun; what tightens comes first.
        Operation::ResetSpent => {
            let spent = given.spent.map_or(0, |spent| spent.amount);
            let before = named.find(&gateway, &asker).await?;
            let allocate = one(To::Reset, amount, "");
            let spend = one(To::ResetSpent, spent, "spent");
            let (one, other) = match spent > before.spent.amount {
                true => (spend, allocate),
                false => (allocate, spend),
            };
            let first = step(&gateway, &asker, &named, one).await?;
            let last = step(&gateway, &asker, &named, other).await?;
            (first, last)
        }
        // What is paid beyond the debt is credited.
        Operation::RepayDebt => {
            let first = step(&gateway, &asker, &named, one(To::RepayDebt, amount, "")).await?;
            let owed = first.previous.as_ref().map_or(0, |previous| previous.debt);
            let surplus = amount.saturating_sub(owed);
            let last = match surplus > 0 {
                true => {
                    step(
                        &gateway,
                        &asker,
                        &named,
                        one(To::Credit, surplus, "surplus"),
                    )
                    .await?
                }
                false => first.clone(),
            };
            (first, last)
        }
    };
    let before = first.previous.as_ref().and_then(worded);
    let after = last.balance.as_ref().and_then(worded);
    let (Some(before), Some(after)) = (before, after) else {
        return Err(Fault::internal());
    };
    let said = Answer::new(&Funded {
        operation: given.operation,
        previous_allocated: before.allocated,
        new_allocated: after.allocated,
        previous_remaining: before.remaining,
        new_remaining: after.remaining,
        previous_debt: before.debt,
        new_debt: after.debt,
        previous_spent: before.spent,
        new_spent: after.spent,
        timestamp: format!("{:.3}", jiff::Timestamp::now()),
    })?;
    Ok(said.recorded(last.ledger_sequence, last.replayed))
}

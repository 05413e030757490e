//! Funding: an operator's change of one balance.

use axum::body::Body;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::super::call::{Answer, Call};
use super::super::problem::Fault;
use super::super::runtime::fresh_key;
use super::super::strict::{object, object_or_none, word};
use super::super::{Gateway, translate, wire};
use super::budgets::{Named, Which, not_found, worded};
use super::{Done, Params};
use crate::domain::amount::Amount;
use crate::domain::permission::Permission;
use crate::proto;
use crate::proto::provisioning_server::Provisioning as _;

/// The longest reason.
const REASON_CHARS_MAX: usize = 512;

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

impl Fund {
    /// In Remit's words: RESET_SPENT is first about what is spent, and what is repaid beyond
    /// the debt is a credit only where that is said.
    fn message(self, named: &Named, key: String) -> proto::FundBudgetRequest {
        use proto::FundOperation as To;
        let given = self.amount.amount;
        let (operation, amount, allocated) = match self.operation {
            Operation::Credit => (To::Credit, given, None),
            Operation::Debit => (To::Debit, given, None),
            Operation::Reset => (To::Reset, given, None),
            Operation::ResetSpent => {
                let spent = self.spent.map_or(0, |spent| spent.amount);
                (To::ResetSpent, spent, Some(given))
            }
            Operation::RepayDebt => (To::RepayDebt, given, None),
        };
        proto::FundBudgetRequest {
            idempotency_key: key,
            scope: named.scope.clone(),
            unit: translate::unit(named.unit).into(),
            operation: operation.into(),
            amount,
            allocated,
            credit_surplus: operation == To::RepayDebt,
            reason: self.reason.unwrap_or_default(),
            ..proto::FundBudgetRequest::default()
        }
    }
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
    let key = call.key_or(given.idempotency_key.clone(), fresh_key)?;
    let reason = given.reason.as_deref().unwrap_or("");
    if reason.chars().count() > REASON_CHARS_MAX {
        let wants = format!("at most {REASON_CHARS_MAX} characters");
        return Err(Fault::field("reason", &wants));
    }
    // Here, because the message has other names for them.
    for (field, amount) in [("amount", Some(given.amount)), ("spent", given.spent)] {
        let Some(amount) = amount else { continue };
        if amount.unit != named.unit {
            return Err(Fault::other_unit(field));
        }
        Amount::new(amount.amount).map_err(|error| Fault::field(field, &error.to_string()))?;
    }
    if given.spent.is_some() && given.operation != Operation::ResetSpent {
        return Err(Fault::field("spent", "absent, but for RESET_SPENT"));
    }
    let operation = given.operation;
    let message = given.message(&named, key);
    let funded = gateway.services.fund_budget(asker.request(message)).await;
    let funded = funded.map_err(not_found)?.into_inner();
    let before = funded.previous.as_ref().and_then(worded);
    let after = funded.balance.as_ref().and_then(worded);
    let (Some(before), Some(after)) = (before, after) else {
        return Err(Fault::internal());
    };
    let said = Answer::new(&Funded {
        operation,
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
    Ok(said.recorded(funded.ledger_sequence, funded.replayed))
}

//! Events: what of an entry people or systems want to be told.

use std::sync::Arc;

use super::budget::{Budget, named};
use super::id::BalanceNo;
use super::ledger::{After, Body, Change, Decision, EntryKind, Movement};
use super::narrowing::BasisPoints;

named! {
    /// What happened.
    #[derive(PartialOrd, Ord)]
    EventType {
        /// Something waits for a person.
        ApprovalRequested = "approval.requested",
        /// A person decided.
        ApprovalResolved = "approval.resolved",
        /// Nobody decided in time.
        ApprovalExpired = "approval.expired",
        /// An action was denied.
        ActionDenied = "action.denied",
        /// A rule called for attention.
        IncidentRaised = "incident.raised",
        /// Something was stopped or let go again.
        FreezeChanged = "freeze.changed",
        /// A budget's use reached one of its thresholds.
        BudgetThreshold = "budget.threshold",
        /// Nothing is left of a budget.
        BudgetExhausted = "budget.exhausted",
    }
}

/// What an entry is about; `budget` knows whose account a balance is.
pub fn types_of(body: &Body, budget: impl Fn(BalanceNo) -> Option<Arc<Budget>>) -> Vec<EventType> {
    let mut types = Vec::new();
    match body.kind {
        EntryKind::Reserve if body.approval.is_some() => types.push(EventType::ApprovalRequested),
        EntryKind::Resolve => types.push(EventType::ApprovalResolved),
        EntryKind::Expire if body.approval.is_some() => types.push(EventType::ApprovalExpired),
        EntryKind::Incident => types.push(EventType::IncidentRaised),
        _ => {}
    }
    if body.decision == Some(Decision::Deny) {
        types.push(EventType::ActionDenied);
    }
    if body.freezes.is_some() || body.changes.iter().any(Change::is_of_state) {
        types.push(EventType::FreezeChanged);
    }
    for movement in &body.movements {
        let Some((before, after)) = used(movement).filter(|(before, after)| before < after) else {
            continue;
        };
        let crossed = |at: BasisPoints| before < at && at <= after;
        if crossed(BasisPoints::ALL) {
            types.push(EventType::BudgetExhausted);
        }
        let budget = budget(movement.balance);
        let mut thresholds = budget.iter().flat_map(|budget| budget.thresholds.iter());
        if thresholds.any(|threshold| crossed(threshold.from)) {
            types.push(EventType::BudgetThreshold);
        }
    }
    types.sort_unstable();
    types.dedup();
    types
}

/// How much of a balance was used before and after a movement.
fn used(movement: &Movement) -> Option<(BasisPoints, BasisPoints)> {
    let After(allocated, reserved, spent, debt) = movement.after;
    let allocated = i128::from(allocated?.get());
    let after = [reserved, spent, debt]
        .iter()
        .map(|amount| i128::from(amount.get()))
        .sum::<i128>();
    let moved = [movement.reserved, movement.spent, movement.debt];
    let before = after - moved.iter().map(|moved| i128::from(*moved)).sum::<i128>();
    let granted = i128::from(movement.granted);
    let before = BasisPoints::share(before, allocated - granted);
    Some((before, BasisPoints::share(after, allocated)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::amount::Amount;
    use crate::domain::id::TenantId;
    use crate::domain::ledger::ChangeKind;

    fn amount(value: i64) -> Amount {
        Amount::new(value).expect("an amount")
    }

    fn hold(reserved: i64, after: i64) -> Body {
        let mut body = Body::new(
            TenantId::parse("acme").expect("a tenant"),
            EntryKind::Reserve,
        );
        body.movements.push(Movement {
            balance: BalanceNo(1),
            granted: 0,
            reserved,
            spent: 0,
            debt: 0,
            over_limit: None,
            after: After(Some(amount(100)), amount(after), Amount::ZERO, Amount::ZERO),
        });
        body
    }

    #[test]
    fn a_budget_is_exhausted_when_the_last_of_it_goes() {
        assert_eq!(types_of(&hold(10, 99), |_| None), []);
        assert_eq!(
            types_of(&hold(10, 100), |_| None),
            [EventType::BudgetExhausted]
        );
        assert_eq!(types_of(&hold(0, 100), |_| None), [], "it was before");
    }

    #[test]
    fn only_a_change_of_state_stops_or_lets_go() {
        let told = |detail: &str| {
            let mut body = hold(0, 0);
            body.changes.push(Change {
                kind: ChangeKind::Changed,
                target: "tenant:acme TOKENS".into(),
                details: vec![detail.into()],
                loosens: true,
            });
            types_of(&body, |_| None)
        };
        assert_eq!(told("state: FROZEN -> ACTIVE"), [EventType::FreezeChanged]);
        assert_eq!(told("rule deploys: removed"), []);
    }
}

//! What a command is answered with.
//!
//! A success is pinned to its idempotency key by its ledger entry, and a replay
//! is rebuilt from that entry: the same answer, with `replayed` set.

use std::sync::Arc;
use std::time::Duration;

use super::amount::{Amount, Amounts, Unit};
use super::approve::Approval;
use super::budget::{Balance, Budget, BudgetState};
use super::caps::Caps;
use super::id::{ReservationId, Sequence};
use super::ledger::{After, Body, Decision, Explanation};
use super::period::{Period, Window};
use super::refusal::{Denial, Reason};
use super::time::Timestamp;

/// A balance as callers see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalanceView {
    /// The balance's own scope.
    pub scope: Arc<str>,
    /// The budget's scope, with wildcards.
    pub budget_scope: Arc<str>,
    /// Of every amount.
    pub unit: Unit,
    /// Of the budget.
    pub period: Period,
    /// The balance's own window.
    pub window: Window,
    /// Allocated, reserved, spent, debt.
    pub amounts: After,
    /// Of the budget.
    pub overdraft_limit: Amount,
    /// The mark of a capped use stands.
    pub over_limit: bool,
    /// Of the budget.
    pub state: BudgetState,
}

impl BalanceView {
    /// A balance as it is.
    pub fn of(balance: &Balance, budget: &Budget) -> Self {
        Self::at(balance, budget, After::of(balance, budget.terms.limit))
    }

    /// A balance as it was after an entry.
    pub fn at(balance: &Balance, budget: &Budget, amounts: After) -> Self {
        let limit = budget.terms.overdraft_limit;
        let indebted = limit > Amount::ZERO && amounts.3 > limit;
        Self {
            scope: balance.scope.clone(),
            budget_scope: budget.scope.text().clone(),
            unit: budget.unit,
            period: budget.calendar.period(),
            window: balance.window,
            amounts,
            overdraft_limit: budget.terms.overdraft_limit,
            over_limit: balance.is_over_limit(budget) || indebted,
            state: budget.terms.state,
        }
    }

    /// What remains; nothing where there is no limit.
    pub fn remaining(&self) -> Option<i64> {
        let After(allocated, reserved, spent, debt) = self.amounts;
        let used = i128::from(reserved.get()) + i128::from(spent.get()) + i128::from(debt.get());
        let remaining = i128::from(allocated?.get()) - used;
        // A sum of amounts is at most 2⁶³−1, so the difference fits.
        Some(i64::try_from(remaining).unwrap_or(i64::MIN))
    }
}

/// Whether an action may happen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Verdict {
    /// It may.
    #[default]
    Allow,
    /// It may, within caps.
    AllowWithCaps(Caps),
    /// It may once a person has approved it, and then within these caps.
    RequireApproval(Denial, Caps),
    /// It may not.
    Deny(Denial),
}

impl Verdict {
    /// What an entry recorded; `Allow` where nothing had to be decided.
    pub fn recorded(body: &Body) -> Self {
        let denial = || Denial {
            reasons: body.reasons.clone(),
            retry_after: body.retry_after_us.map(Duration::from_micros),
        };
        let caps = || body.caps.clone().unwrap_or_default();
        match body.decision {
            Some(Decision::Deny) => Self::Deny(denial()),
            Some(Decision::RequireApproval) => Self::RequireApproval(denial(), caps()),
            Some(Decision::AllowWithCaps) => Self::AllowWithCaps(caps()),
            Some(Decision::Allow) | None => Self::Allow,
        }
    }

    /// The word for it.
    pub fn decision(&self) -> Decision {
        match self {
            Self::Allow => Decision::Allow,
            Self::AllowWithCaps(_) => Decision::AllowWithCaps,
            Self::RequireApproval(..) => Decision::RequireApproval,
            Self::Deny(_) => Decision::Deny,
        }
    }

    /// Whether the action may happen now.
    pub fn permits(&self) -> bool {
        matches!(self, Self::Allow | Self::AllowWithCaps(_))
    }

    /// What the agent must keep.
    pub fn caps(&self) -> Option<&Caps> {
        match self {
            Self::AllowWithCaps(caps) => Some(caps),
            Self::RequireApproval(_, caps) => Some(caps).filter(|caps| !caps.is_empty()),
            Self::Allow | Self::Deny(_) => None,
        }
    }

    /// Why not.
    pub fn reasons(&self) -> &[Reason] {
        match self {
            Self::Allow | Self::AllowWithCaps(_) => &[],
            Self::RequireApproval(denial, _) | Self::Deny(denial) => &denial.reasons,
        }
    }

    /// When it can pass at the earliest, if it can.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Allow | Self::AllowWithCaps(_) => None,
            Self::RequireApproval(denial, _) | Self::Deny(denial) => denial.retry_after,
        }
    }
}

/// A hold as its holder sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Names it.
    pub reservation: ReservationId,
    /// What is held.
    pub reserved: Amounts,
    /// When it ends.
    pub expires_at: Timestamp,
    /// How much of it is left.
    pub remaining: Duration,
}

/// What a command is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What was decided; `Allow` where nothing had to be.
    pub verdict: Verdict,
    /// Reserve, Extend and an approval: the hold.
    pub lease: Option<Lease>,
    /// Reserve without effect: what it would hold.
    pub would_hold: Amounts,
    /// Reserve: the approval that it waits for, named as the reservation.
    pub waits: Option<(ReservationId, Arc<Approval>)>,
    /// Commit and Record: what was charged.
    pub charged: Amounts,
    /// Commit, Release, Expire: what was given back.
    pub released: Amounts,
    /// Commit and Record: what was used and not charged.
    pub uncovered: Amounts,
    /// The balances that it is about, after it.
    pub balances: Vec<BalanceView>,
    /// Fund: the balance as it was before.
    pub funded_from: Option<Box<BalanceView>>,
    /// The entry that records it; nothing where nothing was recorded.
    pub seq: Option<Sequence>,
    /// It is the first answer to the same key again.
    pub replayed: bool,
    /// What else was found out on the way to the decision, where the caller asked for it.
    pub explanation: Option<Box<Explanation>>,
}

impl Answer {
    /// An answer that says no more than yes.
    pub fn new(verdict: Verdict) -> Self {
        Self {
            verdict,
            lease: None,
            would_hold: Amounts::NONE,
            waits: None,
            charged: Amounts::NONE,
            released: Amounts::NONE,
            uncovered: Amounts::NONE,
            balances: Vec::new(),
            funded_from: None,
            seq: None,
            replayed: false,
            explanation: None,
        }
    }
}

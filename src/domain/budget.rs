//! Budgets: what an operator provisions, and the account that each one keeps.
//!
//! A budget says how much; a [`Balance`] counts what became of it, one for each
//! value of the budget's wildcards and each period. A balance stores what was
//! granted beside the allocation, not the allocation itself: changing a budget's
//! allocation therefore changes all its balances at once and writes none.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::amount::{Amount, Unit};
use super::id::{BalanceNo, BudgetNo, Malformed, Sequence};
use super::narrowing::Threshold;
use super::period::{Calendar, Window};
use super::scope::Scope;
use super::time::Timestamp;

/// How much a budget allows in each period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// This much; zero means nothing.
    Allocation(Amount),
    /// Any amount; use is counted all the same.
    Unlimited,
}

/// Names of an enum in the protocol, the ledger and the database.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, Hash, ::serde::Serialize, ::serde::Deserialize,
        )]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $text)] $variant),+
        }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its name in the protocol, the ledger and the database.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// The value of that name.
            pub fn parse(text: &str) -> Result<Self, $crate::domain::id::Malformed> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err($crate::domain::id::Malformed::new(concat!("one of", $(" ", $text),+))),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use named;

named! {
    /// Whether a budget lets new actions pass.
    BudgetState {
        /// Decided by what remains.
        Active = "ACTIVE",
        /// Emergency stop.
        Frozen = "FROZEN",
        /// Retired.
        Closed = "CLOSED",
    }
}

named! {
    /// What a new period takes over from the one before.
    CarryOver {
        /// Nothing.
        None = "NONE",
        /// All that was not used.
        Forward = "FORWARD",
        /// What was not used, at most one allocation.
        CapAtAllocated = "CAP_AT_ALLOCATED",
    }
}

/// What of a budget can be changed without making it another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// How much in each period.
    pub limit: Limit,
    /// How much debt settlements may make.
    pub overdraft_limit: Amount,
    /// What a new period takes over.
    pub carry_over: CarryOver,
    /// Whether it lets new actions pass.
    pub state: BudgetState,
}

/// What happens to an action that a budget has not enough for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnExceeded {
    /// It is denied.
    #[default]
    Deny,
    /// A person can grant exactly what is short, once.
    RequireApproval {
        /// Groups of which the person must be in one; none for anybody who may approve.
        #[serde(default, skip_serializing_if = "<[_]>::is_empty")]
        approvers: Arc<[Box<str>]>,
    },
}

impl OnExceeded {
    /// Whether it says nothing.
    pub fn is_deny(&self) -> bool {
        *self == Self::Deny
    }
}

/// What an operator provisioned. Scope, unit and period identify it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// Its number within the tenant.
    pub no: BudgetNo,
    /// What it applies to.
    pub scope: Scope,
    /// What it counts.
    pub unit: Unit,
    /// When it is renewed.
    pub calendar: Calendar,
    /// What it allows.
    pub terms: Terms,
    /// What it leaves to agents the more of it is used, in rising order.
    pub thresholds: Arc<[Threshold]>,
    /// What happens to an action that it has not enough for.
    pub on_exceeded: OnExceeded,
    /// False once it was taken away: it applies to nothing any more, and is kept
    /// for what was reserved on it, and for when it comes back.
    pub present: bool,
    /// The entry that last changed limit or overdraft limit: it lifts marks of
    /// "over limit" that are older.
    pub limit_seq: Sequence,
    /// When it was first provisioned.
    pub created_at: Timestamp,
}

/// Part of what was granted, until it lapses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// What of it was not used yet.
    pub left: Amount,
    /// When that lapses.
    pub expires_at: Timestamp,
}

/// Most expiring credits of one balance.
pub const CREDITS_MAX: usize = 16;

/// The account of a budget, for one value of its wildcards, in one period.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Balance {
    /// Its number within the tenant.
    pub no: BalanceNo,
    /// Whose account.
    pub budget: BudgetNo,
    /// The budget's scope with wildcards filled in.
    pub scope: Arc<str>,
    /// The period.
    pub window: Window,
    /// What was granted beside the budget's allocation: credits, debits,
    /// carry-over. May be negative.
    pub granted: i64,
    /// What open reservations hold.
    pub reserved: Amount,
    /// What was used.
    pub spent: Amount,
    /// What was used beyond the allocation and is owed.
    pub debt: Amount,
    /// The entry by which a use was capped here for want of budget.
    pub over_limit: Option<Sequence>,
    /// Expiring credits, soonest first.
    pub credits: Vec<Credit>,
    /// A lower bound for when the next hold lapses; nothing while none is held.
    pub next_lapse: Option<Timestamp>,
}

/// An operation that 64 bits can't hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overflow;

impl Balance {
    /// An account on which nothing has happened yet.
    pub fn new(no: BalanceNo, budget: BudgetNo, scope: Arc<str>, window: Window) -> Self {
        Self {
            no,
            budget,
            scope,
            window,
            granted: 0,
            reserved: Amount::ZERO,
            spent: Amount::ZERO,
            debt: Amount::ZERO,
            over_limit: None,
            credits: Vec::new(),
            next_lapse: None,
        }
    }

    /// What may be used in all; nothing where there is no limit.
    pub fn allocated(&self, limit: Limit) -> Option<Amount> {
        match limit {
            Limit::Allocation(amount) => Some(Amount::clamp(
                i128::from(amount.get()) + i128::from(self.granted),
            )),
            Limit::Unlimited => None,
        }
    }

    /// What is held, used and owed. Fits, since every operation that adds to it
    /// is checked.
    pub fn used(&self) -> i128 {
        i128::from(self.reserved.get()) + i128::from(self.spent.get()) + i128::from(self.debt.get())
    }

    /// `allocated − reserved − spent − debt`, which is negative after an
    /// allocation was lowered or an overdraft used; nothing where there is no
    /// limit.
    pub fn remaining(&self, limit: Limit) -> Option<i128> {
        let allocated = self.allocated(limit)?;
        Some(i128::from(allocated.get()) - self.used())
    }

    /// What remains as an amount: zero where it is negative, the largest amount
    /// where there is no limit.
    pub fn available(&self, limit: Limit) -> Amount {
        Amount::clamp(self.remaining(limit).unwrap_or(i128::MAX))
    }

    /// How much of an amount does not remain; nothing where all of it does.
    pub fn missing(&self, limit: Limit, asked: Amount) -> Option<i128> {
        let missing = i128::from(asked.get()) - self.remaining(limit)?;
        (missing > 0).then_some(missing)
    }

    /// Whether the mark of a capped use still stands.
    pub fn is_over_limit(&self, budget: &Budget) -> bool {
        self.over_limit.is_some_and(|seq| seq > budget.limit_seq)
    }

    fn check_total(&self) -> Result<(), Overflow> {
        if self.used() > i128::from(i64::MAX) {
            return Err(Overflow);
        }
        Ok(())
    }

    /// Holds an amount until `lapses_at`. The caller has checked what remains.
    pub fn hold(&mut self, amount: Amount, lapses_at: Timestamp) -> Result<(), Overflow> {
        let mut after = self.clone();
        after.reserved = self.reserved.checked_add(amount).ok_or(Overflow)?;
        after.check_total()?;
        if amount > Amount::ZERO {
            after.next_lapse = Some(self.next_lapse.map_or(lapses_at, |at| at.min(lapses_at)));
        }
        *self = after;
        Ok(())
    }

    /// Says that what is held lapses by then at the latest.
    pub fn lapses_by(&mut self, at: Timestamp) {
        if self.reserved > Amount::ZERO {
            self.next_lapse = Some(self.next_lapse.map_or(at, |other| other.min(at)));
        }
    }

    /// Gives a hold back.
    pub fn unhold(&mut self, amount: Amount) -> Result<(), Overflow> {
        self.reserved = self.reserved.checked_sub(amount).ok_or(Overflow)?;
        if self.reserved == Amount::ZERO {
            self.next_lapse = None;
        }
        Ok(())
    }

    /// Charges a use, part of it as debt. Expiring credits are used before what
    /// does not expire.
    pub fn charge(&mut self, spent: Amount, debt: Amount) -> Result<(), Overflow> {
        self.spent = self.spent.checked_add(spent).ok_or(Overflow)?;
        self.debt = self.debt.checked_add(debt).ok_or(Overflow)?;
        self.check_total()?;
        let mut to_draw = spent;
        for credit in &mut self.credits {
            let drawn = credit.left.min(to_draw);
            credit.left = credit.left.saturating_sub(drawn);
            to_draw = to_draw.saturating_sub(drawn);
        }
        self.credits.retain(|credit| credit.left > Amount::ZERO);
        Ok(())
    }

    /// Adds to, or takes from, what is granted.
    pub fn grant(&mut self, amount: i64) -> Result<(), Overflow> {
        self.set_granted(i128::from(self.granted) + i128::from(amount))
    }

    /// Sets what is granted. The ledger tells the difference, which has to fit too.
    pub fn set_granted(&mut self, granted: i128) -> Result<(), Overflow> {
        let granted = i64::try_from(granted).map_err(|_| Overflow)?;
        granted.checked_sub(self.granted).ok_or(Overflow)?;
        self.granted = granted;
        Ok(())
    }

    /// Keeps track of a credit that is part of what was granted.
    pub fn add_credit(&mut self, credit: Credit) -> Result<(), Malformed> {
        if self.credits.len() >= CREDITS_MAX {
            return Err(Malformed::new(format!(
                "at most {CREDITS_MAX} expiring credits"
            )));
        }
        let at = self
            .credits
            .partition_point(|other| other.expires_at <= credit.expires_at);
        self.credits.insert(at, credit);
        Ok(())
    }

    /// Takes away what is left of credits that have expired, as far as nothing
    /// holds it. Answers how much.
    pub fn lapse_credits(&mut self, limit: Limit, now: Timestamp) -> Amount {
        let mut lapsed = Amount::ZERO;
        while let Some(credit) = self.credits.first().copied()
            && credit.expires_at <= now
        {
            self.credits.remove(0);
            let gone = credit.left.min(self.available(limit));
            // What is granted is at least what was credited, so this can't fail;
            // if it did, the credit would stay, which harms nobody.
            if self.grant(-gone.get()).is_ok() {
                lapsed = lapsed.checked_add(gone).unwrap_or(lapsed);
            }
        }
        lapsed
    }

    /// How long to wait, at the least, until `asked` could fit: nothing where
    /// waiting does not help.
    pub fn retry_after(&self, limit: Limit, asked: Amount, now: Timestamp) -> Option<Duration> {
        /// Shortest wait that is told: a hold's end is only known as a bound.
        const SOONEST: Duration = Duration::from_secs(1);

        let allocated = self.allocated(limit)?;
        let without_holds = i128::from(allocated.get())
            - i128::from(self.spent.get())
            - i128::from(self.debt.get());
        let at = if i128::from(asked.get()) <= without_holds {
            self.next_lapse
        } else {
            let Limit::Allocation(renewed) = limit else {
                return None;
            };
            let renews = asked
                .checked_add(self.debt)
                .is_some_and(|need| need <= renewed);
            if !renews {
                return None;
            }
            Some(self.window.end?)
        };
        Some(at.map_or(SOONEST, |at| at.since(now)).max(SOONEST))
    }

    /// Opens the account of the period that `now` falls into. `previous` is the
    /// last one of the same budget and scope: debt and unexpired credits move
    /// on, and what was not used as far as the budget says.
    pub fn open(
        no: BalanceNo,
        budget: &Budget,
        scope: Arc<str>,
        now: Timestamp,
        previous: Option<&Self>,
    ) -> Opening {
        let mut window = budget.calendar.window(now);
        let Some(previous) = previous else {
            return Opening {
                balance: Self::new(no, budget.no, scope, window),
                previous: None,
            };
        };
        // A new time zone can put the window's start before the last one's end.
        window.start = window
            .start
            .max(previous.window.end.unwrap_or(window.start));
        let mut balance = Self::new(no, budget.no, scope, window);
        let mut closed = previous.clone();
        balance.debt = closed.debt;
        closed.debt = Amount::ZERO;
        let expiring = closed
            .credits
            .iter()
            .fold(0, |sum: i128, credit| sum + i128::from(credit.left.get()));
        let unused = Amount::clamp(previous.remaining(budget.terms.limit).unwrap_or(0));
        let credits = Amount::clamp(expiring).min(unused);
        balance.credits = std::mem::take(&mut closed.credits);
        // What carries over is what was not used and does not move on by itself.
        let lasting = i128::from(unused.get()) - i128::from(credits.get());
        let carried: i128 = match (budget.terms.carry_over, budget.terms.limit) {
            (CarryOver::None, _) | (_, Limit::Unlimited) => 0,
            (CarryOver::Forward, Limit::Allocation(each)) => {
                let skipped = budget.calendar.windows_between(previous.window, window);
                lasting + i128::from(skipped) * i128::from(each.get())
            }
            (CarryOver::CapAtAllocated, Limit::Allocation(each)) => {
                let skipped = budget.calendar.windows_between(previous.window, window);
                let each = i128::from(each.get());
                (lasting + i128::from(skipped) * each).min(each)
            }
        };
        let granted = carried + i128::from(credits.get());
        balance.granted = Amount::clamp(granted).get();
        // What has moved on is not there any more: what still settles here can't use it too.
        let moved = Amount::clamp(carried.min(lasting) + i128::from(credits.get()));
        closed.granted = closed.granted.saturating_sub(moved.get());
        Opening {
            balance,
            previous: Some(closed),
        }
    }
}

/// A new account, and the one before it as it is from then on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// The new account.
    pub balance: Balance,
    /// The account of the period before.
    pub previous: Option<Balance>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balance(spent: i64, reserved: i64) -> Balance {
        let amount = |value| Amount::new(value).expect("an amount");
        let calendar = Calendar::new(crate::domain::period::Period::Total, "").expect("a calendar");
        let window = calendar.window(Timestamp::default());
        let mut balance = Balance::new(BalanceNo(1), BudgetNo(1), "tenant:acme".into(), window);
        balance.spent = amount(spent);
        balance.reserved = amount(reserved);
        balance
    }

    fn limit(value: i64) -> Limit {
        Limit::Allocation(Amount::new(value).expect("an amount"))
    }

    #[test]
    fn waiting_helps_only_where_holds_are_in_the_way() {
        let now = Timestamp::default();
        let waits = |balance: &Balance, asked| {
            let asked = Amount::new(asked).expect("an amount");
            balance.retry_after(limit(100), asked, now).is_some()
        };
        assert!(waits(&balance(80, 20), 20));
        assert!(!waits(&balance(80, 20), 21));
        // More is used than is allocated: not even nothing fits, whoever gives back.
        assert!(waits(&balance(100, 20), 0));
        assert!(!waits(&balance(150, 20), 0));
    }

    #[test]
    fn every_amount_can_be_granted_and_taken_again() {
        let mut balance = balance(0, 0);
        balance.grant(i64::MAX).expect("a credit");
        assert_eq!(balance.allocated(limit(0)), Amount::new(i64::MAX).ok());
        assert_eq!(balance.grant(1), Err(Overflow));
        balance.grant(-i64::MAX).expect("a debit");
        assert_eq!(balance.allocated(limit(5)), Amount::new(5).ok());
        balance.grant(-i64::MAX).expect("a debit");
        assert_eq!(
            balance.set_granted(i128::from(i64::MAX)),
            Err(Overflow),
            "the ledger could not tell the difference"
        );
    }
}

//! A budget that applies to an action, with its balance as of now.

use std::sync::Arc;

use super::amount::{Amount, Amounts};
use super::answer::BalanceView;
use super::budget::{Balance, Budget};
use super::id::BalanceNo;
use super::ledger::{Body, EntryKind, Movement, Opened};
use super::narrowing::BasisPoints;
use super::period::Period;
use super::policy::facts::BudgetFacts;
use super::refusal::{Reason, ReasonCode, Shortage};
use super::reservation::{Hold, Tranche};
use super::scope::Subject;
use super::state::TenantState;
use super::time::Timestamp;

/// A budget that applies, with its balance as of now: expired credits lapsed,
/// the current period opened. Nothing of it is written unless it is kept.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) budget: Arc<Budget>,
    pub(super) balance: Balance,
    pub(super) since: Since,
}

/// What time alone did to a balance since it was stored.
#[derive(Debug, Clone)]
pub(super) enum Since {
    /// Expired credits: this much lapsed.
    Stored { lapsed: Amount },
    /// It has to be opened; the one before it, as it is from then on.
    Opened { previous: Option<Box<Balance>> },
}

impl Line {
    /// Whether keeping it appends an entry of its own.
    pub(super) fn writes(&self) -> bool {
        !matches!(
            self.since,
            Since::Stored {
                lapsed: Amount::ZERO
            }
        )
    }

    pub(super) fn view(&self) -> BalanceView {
        BalanceView::of(&self.balance, &self.budget)
    }

    /// How much of what is asked is not left; nothing where it is, or where its unit is
    /// not asked for. More than is asked where an allocation was lowered.
    pub(super) fn missing(&self, asked: &Amounts) -> Option<i128> {
        let asked = asked.get(self.budget.unit)?;
        self.balance.missing(self.budget.terms.limit, asked)
    }

    pub(super) fn reason(&self, code: ReasonCode, shortage: Option<Shortage>) -> Reason {
        Reason {
            code,
            scope: Some(self.balance.scope.clone()),
            unit: Some(self.budget.unit),
            shortage,
            ..Reason::of_tenant(code)
        }
    }

    /// What rules can read of it.
    pub(super) fn facts(&self) -> BudgetFacts {
        let limit = self.budget.terms.limit;
        let remaining = self.balance.remaining(limit);
        BudgetFacts {
            scope: self.balance.scope.clone(),
            budget_scope: self.budget.scope.text().clone(),
            unit: self.budget.unit,
            period: self.budget.calendar.period().as_str(),
            remaining: remaining.map(|left| i64::try_from(left).unwrap_or(i64::MIN)),
            used: BasisPoints::used(&self.balance, limit),
        }
    }
}

impl TenantState {
    /// Every budget that applies to a subject, from the root down.
    pub(super) fn lines(&self, subject: &Subject, now: Timestamp) -> Vec<Line> {
        let mut next = self.next_balance;
        self.config
            .applicable(subject)
            .into_iter()
            .map(|(budget, scope)| self.line(budget, scope, now, &mut next))
            .collect()
    }

    /// One budget's balance as of now; `next` is the number it gets if it has to
    /// be opened.
    pub(super) fn line(
        &self,
        budget: &Arc<Budget>,
        scope: Arc<str>,
        now: Timestamp,
        next: &mut BalanceNo,
    ) -> Line {
        let last = self.last_balance(&(budget.no, scope.clone()));
        let (mut balance, since) = match last {
            Some(balance) if !balance.window.is_over(now) => (
                balance.clone(),
                Since::Stored {
                    lapsed: Amount::ZERO,
                },
            ),
            previous => {
                let no = *next;
                next.0 += 1;
                let opening = Balance::open(no, budget, scope, now, previous);
                let previous = opening.previous.map(Box::new);
                (opening.balance, Since::Opened { previous })
            }
        };
        let lapsed = balance.lapse_credits(budget.terms.limit, now);
        let since = match since {
            Since::Stored { .. } => Since::Stored { lapsed },
            opened @ Since::Opened { .. } => opened,
        };
        Line {
            budget: budget.clone(),
            balance,
            since,
        }
    }

    /// Writes down what time did to a balance: its opening, or credits lapsed.
    pub(super) fn keep(&mut self, line: &Line, now: Timestamp) {
        let limit = line.budget.terms.limit;
        let tenant = self.config.tenant.id.clone();
        match &line.since {
            Since::Stored { lapsed } if *lapsed == Amount::ZERO => {}
            Since::Stored { .. } => {
                let mut body = Body::new(tenant, EntryKind::CreditExpired);
                if let Some(before) = self.balance(line.balance.no) {
                    body.movements = vec![Movement::between(before, &line.balance, limit)];
                }
                self.append(body, now);
                self.put_balance(line.balance.clone());
            }
            Since::Opened { previous } => {
                let balance = &line.balance;
                let period = line.budget.calendar.period();
                let mut body = Body::new(tenant, EntryKind::BalanceOpened);
                body.opened = Some(Opened {
                    balance: balance.no,
                    budget: balance.budget,
                    scope: balance.scope.clone(),
                    unit: line.budget.unit,
                    period,
                    start: (period != Period::Total).then_some(balance.window.start),
                    end: balance.window.end,
                });
                let nothing = Balance::new(
                    balance.no,
                    balance.budget,
                    balance.scope.clone(),
                    balance.window,
                );
                body.movements = vec![Movement::between(&nothing, balance, limit)];
                if let Some(previous) = previous {
                    if let Some(before) = self.balance(previous.no) {
                        body.movements
                            .push(Movement::between(before, previous, limit));
                    }
                    self.put_balance((**previous).clone());
                }
                self.append(body, now);
                self.put_opened(balance.clone());
            }
        }
    }

    /// Movements without changes: which balances a decision looked at, as far as
    /// they have a number.
    pub(super) fn looked_at(&self, lines: &[Line]) -> Vec<Movement> {
        lines
            .iter()
            .filter_map(|line| {
                let stored = self.balance(line.balance.no)?;
                Some(Movement::between(stored, stored, line.budget.terms.limit))
            })
            .collect()
    }

    /// Keeps balances with holds on them, and says in the entry what moved.
    pub(super) fn keep_holds(&mut self, held: &[Line], body: &mut Body, now: Timestamp) -> Tranche {
        let mut tranche = Tranche {
            amounts: Amounts::NONE,
            holds: Vec::with_capacity(held.len()),
            extensions: 0,
        };
        for line in held {
            let amount = line.balance.reserved;
            // First what time did, as an entry of its own, then the hold.
            let before = {
                let mut unheld = line.clone();
                unheld.balance.reserved = self
                    .balance(line.balance.no)
                    .map_or(Amount::ZERO, |stored| stored.reserved);
                self.keep(&unheld, now);
                unheld.balance
            };
            let limit = line.budget.terms.limit;
            body.movements
                .push(Movement::between(&before, &line.balance, limit));
            self.put_balance(line.balance.clone());
            tranche
                .amounts
                .set(line.budget.unit, amount.saturating_sub(before.reserved));
            tranche.holds.push(Hold(line.balance.no, line.budget.unit));
        }
        tranche
    }
}

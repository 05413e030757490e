//! Record: a use that was never held, or whose hold expired before it was known.

use super::amount::{Amount, Amounts, Unit};
use super::answer::{Answer, Verdict};
use super::budget::BudgetState;
use super::id::{KeyHash, Method, Sequence};
use super::ledger::{Body, EntryKind, Request};
use super::line::Line;
use super::refusal::Refusal;
use super::request::{Origin, OveragePolicy, Record, RecordOf};
use super::reservation::{Reservation, SettlementKind, Tranche};
use super::scope::Subject;
use super::settle::{Account, charge_overage};
use super::state::TenantState;
use super::tenant::TenantState as State;
use super::time::Timestamp;

impl TenantState {
    pub(super) fn record(
        &mut self,
        request: &Record,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let expired = match &request.of {
            RecordOf::Action(_) => None,
            RecordOf::Expired(id) => Some(self.reservation(*id, origin)?.clone()),
        };
        let key = KeyHash::of(&self.config.tenant.id, Method::Record, &request.key);
        let mut body = self.body_of_record(request, expired.as_ref(), origin);
        self.must_not_be_suspended()?;
        if let Some(answer) = self.replay(Some(key), &body, now) {
            return answer;
        }
        if self.config.tenant.settings.state == State::Closed {
            return Err(Refusal::TenantClosed);
        }
        if let Some(reservation) = &expired {
            let state = reservation.state(now);
            if state != SettlementKind::Expired.as_str() {
                return Err(Refusal::ReservationNotExpired { state });
            }
        }
        let mut amounts = request.amounts;
        if !amounts.is_empty() {
            amounts.set(Unit::Calls, Amount::ONE);
        }
        let policy = request
            .overage_policy
            .or(expired.as_ref().map(|r| r.overage_policy))
            .unwrap_or(self.config.tenant.settings.default_overage_policy);
        let (lines, mut accounts) = match (&request.of, &expired) {
            (RecordOf::Action(of), _) => {
                let subject = self.placed_for(&of.0, &of.1, origin)?;
                self.accounts_of(&subject, &amounts, now)?
            }
            (RecordOf::Expired(_), Some(reservation)) => {
                // What the sweeper has not given back yet must not stand in the
                // way of charging it.
                self.expire(reservation.id, now)?;
                let numbers = reservation.holds().map(|hold| hold.0);
                (Vec::new(), self.accounts(numbers, now))
            }
            (RecordOf::Expired(id), None) => return Err(Refusal::ReservationNotFound(*id)),
        };
        check_recorded_units(&amounts, &accounts)?;
        if self.config.tenant.settings.cycles.is_some() {
            must_take(&lines, &amounts, policy)?;
        }
        let seq = Sequence(self.next_seq().0 + lines.iter().filter(|l| l.writes()).count() as i64);
        for (unit, amount) in amounts.iter() {
            let (mut charged, mut uncovered) = (Amount::ZERO, Amount::ZERO);
            let mut is_counted = false;
            for (part, held_by) in parts(expired.as_ref(), unit, amount) {
                let mut of_unit: Vec<_> = accounts
                    .iter_mut()
                    .filter(|account| account.budget.unit == unit)
                    .filter(|account| {
                        held_by.is_none_or(|tranche| tranche.is_on(account.before.no))
                    })
                    .collect();
                if of_unit.is_empty() {
                    continue;
                }
                is_counted = true;
                if policy == OveragePolicy::Reject {
                    must_cover(&of_unit, unit, part)?;
                }
                let overage = charge_overage(&mut of_unit, unit, part, policy, seq)?;
                // What one part owes counts against the limit of the next.
                self.move_debt_on(&mut accounts)?;
                charged = charged
                    .checked_add(overage.charged)
                    .ok_or(Refusal::AmountOverflow)?;
                uncovered = uncovered
                    .checked_add(overage.uncovered)
                    .ok_or(Refusal::AmountOverflow)?;
            }
            if is_counted {
                body.charged.set(unit, charged);
            }
            if uncovered > Amount::ZERO {
                body.uncovered.set(unit, uncovered);
            }
        }
        // From here on nothing can fail.
        for line in &lines {
            self.keep(line, now);
        }
        self.keep_accounts(accounts, &mut body);
        let (charged, uncovered) = (body.charged, body.uncovered);
        let movements = body.movements.clone();
        let seq = self.append(body, now);
        self.pin(Some(key));
        Ok(Answer {
            charged,
            uncovered,
            balances: self.views(&movements),
            seq: Some(seq),
            ..Answer::new(Verdict::Allow)
        })
    }

    fn body_of_record(
        &self,
        request: &Record,
        expired: Option<&Reservation>,
        origin: &Origin,
    ) -> Body {
        let mut body = match (expired, &request.of) {
            (Some(reservation), _) => {
                self.body_of_settlement(EntryKind::Record, reservation, Some(origin))
            }
            (None, RecordOf::Action(of)) => {
                let tenant = self.config.tenant.id.clone();
                let mut body = Body::new(tenant, EntryKind::Record).from_origin(origin);
                body.subject = Some(of.0.clone().into());
                body.action = Some(of.1.clone().into());
                body
            }
            (None, RecordOf::Expired(_)) => {
                Body::new(self.config.tenant.id.clone(), EntryKind::Record).from_origin(origin)
            }
        };
        body.idempotency_key = Some(request.key.clone());
        body.context = request.context.clone();
        body.request = Some(Request {
            amounts: request.amounts,
            overage_policy: request.overage_policy,
            metrics: request.metrics.clone(),
            metadata: request.metadata.clone(),
            ..Request::default()
        });
        body
    }

    /// The balances that an unreserved use falls on.
    fn accounts_of(
        &self,
        subject: &Subject,
        amounts: &Amounts,
        now: Timestamp,
    ) -> Result<(Vec<Line>, Vec<Account>), Refusal> {
        if amounts.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let mut next = self.next_balance;
        let applicable = self.config.applicable(subject);
        if applicable.is_empty() {
            return Err(Refusal::BudgetNotProvisioned {
                scope: subject.scope_text().into(),
            });
        }
        // A unit that was used must be counted by some balance. CALLS need not be.
        for (unit, _) in amounts.iter().filter(|(unit, _)| *unit != Unit::Calls) {
            if !applicable.iter().any(|(budget, _)| budget.unit == unit) {
                let counted = applicable.iter().map(|(b, scope)| (b.unit, scope));
                return Err(self.unit_mismatch("amounts", unit, counted));
            }
        }
        let lines: Vec<_> = applicable
            .into_iter()
            .filter(|(budget, _)| amounts.get(budget.unit).is_some())
            .map(|(budget, scope)| self.line(budget, scope, now, &mut next))
            .collect();
        let accounts = lines
            .iter()
            .map(|line| Account {
                before: line.balance.clone(),
                after: line.balance.clone(),
                budget: line.budget.clone(),
                later: None,
            })
            .collect();
        Ok((lines, accounts))
    }
}

/// What of a use falls on which balances: of an expired reservation, as if it had been
/// committed, each tranche's up to what it held, and the rest on the last one.
fn parts(
    expired: Option<&Reservation>,
    unit: Unit,
    amount: Amount,
) -> Vec<(Amount, Option<&Tranche>)> {
    let tranches = expired.into_iter().flat_map(|of| &of.tranches);
    let mut holding = tranches
        .filter_map(|tranche| Some((tranche.amounts.get(unit)?, tranche)))
        .peekable();
    if holding.peek().is_none() {
        return vec![(amount, None)];
    }
    let (mut left, mut parts) = (amount, Vec::new());
    while let Some((held, tranche)) = holding.next() {
        let is_last = holding.peek().is_none();
        let part = if is_last { left } else { held.min(left) };
        left = left.saturating_sub(part);
        parts.push((part, Some(tranche)));
    }
    parts
}

/// With Cycles' rules a budget that is stopped takes no use either; scope by scope from
/// the root, what remains in between.
fn must_take(lines: &[Line], amounts: &Amounts, policy: OveragePolicy) -> Result<(), Refusal> {
    for line in lines {
        let unit = line.budget.unit;
        match line.budget.terms.state {
            BudgetState::Active => {}
            BudgetState::Frozen => {
                return Err(Refusal::BudgetFrozen {
                    scope: line.balance.scope.clone(),
                });
            }
            BudgetState::Closed => return Err(Refusal::BudgetClosed),
        }
        let actual = amounts.get(unit).unwrap_or_default();
        let remaining = line.balance.remaining(line.budget.terms.limit);
        let short = remaining.is_some_and(|left| left < i128::from(actual.get()));
        if policy == OveragePolicy::Reject && short {
            return Err(Refusal::OverageRejected {
                unit,
                actual,
                reserved: Amount::ZERO,
            });
        }
    }
    Ok(())
}

/// The same of what an expired reservation held.
fn check_recorded_units(amounts: &Amounts, accounts: &[Account]) -> Result<(), Refusal> {
    for (unit, _) in amounts.iter().filter(|(unit, _)| *unit != Unit::Calls) {
        if !accounts.iter().any(|account| account.budget.unit == unit) {
            let mut counted: Vec<_> = accounts.iter().map(|a| a.budget.unit).collect();
            counted.sort_unstable();
            counted.dedup();
            return Err(Refusal::UnitMismatch {
                field: "amounts",
                unit,
                counted,
                scope: None,
            });
        }
    }
    Ok(())
}

/// Refuses a use that does not remain everywhere.
fn must_cover(accounts: &[&mut Account], unit: Unit, amount: Amount) -> Result<(), Refusal> {
    let least = accounts
        .iter()
        .map(|a| a.after.available(a.budget.terms.limit))
        .min();
    match least {
        Some(available) if available < amount => Err(Refusal::OverageRejected {
            unit,
            actual: amount,
            reserved: Amount::ZERO,
        }),
        _ => Ok(()),
    }
}

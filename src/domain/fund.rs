//! Funding: what an operator changes on one balance outside the document.

use super::amount::Amount;
use super::answer::{Answer, Verdict};
use super::budget::{Balance, BudgetState, Credit, Limit};
use super::id::{KeyHash, Method};
use super::ledger::{Body, EntryKind, Movement, Request};
use super::refusal::Refusal;
use super::request::{Fund, FundOperation, Funding, Origin};
use super::state::TenantState;
use super::tenant::TenantState as State;
use super::time::Timestamp;

impl TenantState {
    pub(super) fn fund(
        &mut self,
        request: &Fund,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let funding = &request.funding;
        let tenant = self.config.tenant.id.clone();
        let key = KeyHash::of(&tenant, Method::FundBudget, &request.key);
        let mut body = Body::new(tenant, EntryKind::Fund).from_origin(origin);
        body.idempotency_key = Some(request.key.clone());
        body.request = Some(Request {
            funding: Some(funding.clone()),
            ..Request::default()
        });
        if let Some(answer) = self.replay(Some(key), &body, now) {
            return answer;
        }
        let budget = self
            .config
            .budget_for(&funding.scope, funding.unit, funding.period)
            .cloned()
            .ok_or_else(|| Refusal::BudgetNotFound {
                scope: funding.scope.clone(),
                unit: funding.unit,
                period: funding.period,
            })?;
        if self.config.tenant.settings.state == State::Closed {
            return Err(Refusal::TenantClosed);
        }
        if budget.terms.state == BudgetState::Closed {
            return Err(Refusal::BudgetClosed);
        }
        let stopped = budget.terms.state == BudgetState::Frozen;
        if stopped && self.config.tenant.settings.cycles.is_some() {
            let scope = funding.scope.text().clone();
            return Err(Refusal::BudgetFrozen { scope });
        }
        if funding.expires_at.is_some_and(|at| at <= now) {
            return Err(Refusal::CreditExpired);
        }
        let mut next = self.next_balance;
        let line = self.line(&budget, funding.scope.text().clone(), now, &mut next);
        let mut after = line.balance.clone();
        change(&mut after, budget.terms.limit, funding)?;
        after.over_limit = None;
        // From here on nothing can fail.
        self.keep(&line, now);
        body.movements = vec![Movement::between(&line.balance, &after, budget.terms.limit)];
        self.put_balance(after);
        let movements = body.movements.clone();
        let seq = self.append(body, now);
        self.pin(Some(key));
        Ok(Answer {
            balances: self.views(&movements),
            funded_from: self.funded_from(EntryKind::Fund, &movements),
            seq: Some(seq),
            ..Answer::new(Verdict::Allow)
        })
    }
}

fn change(balance: &mut Balance, limit: Limit, funding: &Funding) -> Result<(), Refusal> {
    let amount = funding.amount;
    match funding.operation {
        FundOperation::Credit => {
            credit(balance, limit, amount)?;
            if let Some(expires_at) = funding.expires_at {
                let credit = Credit {
                    left: amount,
                    expires_at,
                };
                balance
                    .add_credit(credit)
                    .map_err(Refusal::TooManyCredits)?;
            }
        }
        FundOperation::Debit => {
            let remaining = balance.remaining(limit).ok_or(Refusal::BudgetUnlimited)?;
            if remaining < i128::from(amount.get()) {
                return Err(Refusal::InsufficientRemaining {
                    asked: amount,
                    remaining: i64::try_from(remaining).unwrap_or(i64::MIN),
                });
            }
            balance.grant(-amount.get())?;
        }
        FundOperation::Reset => allocate(balance, limit, amount)?,
        FundOperation::ResetSpent => {
            if let Some(allocated) = funding.allocated {
                allocate(balance, limit, allocated)?;
            }
            let without = balance.used() - i128::from(balance.spent.get());
            if without + i128::from(amount.get()) > i128::from(i64::MAX) {
                return Err(Refusal::AmountOverflow);
            }
            balance.spent = amount;
        }
        FundOperation::RepayDebt => {
            let surplus = Amount::saturating_sub(amount, balance.debt);
            balance.debt = Amount::saturating_sub(balance.debt, amount);
            if funding.credit_surplus && surplus > Amount::ZERO {
                credit(balance, limit, surplus)?;
            }
        }
    }
    Ok(())
}

fn credit(balance: &mut Balance, limit: Limit, amount: Amount) -> Result<(), Refusal> {
    let Limit::Allocation(allocation) = limit else {
        return Err(Refusal::BudgetUnlimited);
    };
    balance.grant(amount.get())?;
    let allocated = i128::from(allocation.get()) + i128::from(balance.granted);
    if allocated > i128::from(i64::MAX) {
        return Err(Refusal::AmountOverflow);
    }
    Ok(())
}

fn allocate(balance: &mut Balance, limit: Limit, amount: Amount) -> Result<(), Refusal> {
    let Limit::Allocation(allocation) = limit else {
        return Err(Refusal::BudgetUnlimited);
    };
    balance.set_granted(i128::from(amount.get()) - i128::from(allocation.get()))?;
    balance.credits.clear();
    Ok(())
}

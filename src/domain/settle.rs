//! How a hold ends: Commit, Release and expiry.
//!
//! Overage is charged by the formulas of the Cycles protocol: with
//! `ALLOW_IF_AVAILABLE` the extra use is cut to what remains everywhere, with
//! `ALLOW_WITH_OVERDRAFT` a balance that allows debt takes what does not remain
//! as debt, and one that allows none cuts it.

use std::sync::Arc;

use super::amount::{Amount, Amounts, Unit};
use super::answer::{Answer, Verdict};
use super::approve::{ApprovalState, Resolution};
use super::budget::{Balance, Budget};
use super::id::{BalanceNo, KeyHash, KeyId, Method, Sequence};
use super::ledger::{Body, EntryKind, Movement, Request};
use super::refusal::Refusal;
use super::request::{Commit, Origin, OveragePolicy, Release};
use super::reservation::{Reservation, Settlement, SettlementKind, Status, Tranche};
use super::state::TenantState;
use super::time::Timestamp;

/// A balance that is being settled on: as stored, and as it becomes.
pub(super) struct Account {
    pub(super) before: Balance,
    pub(super) after: Balance,
    pub(super) budget: Arc<Budget>,
    /// The balance of a later period, where there is one: debt is owed there.
    pub(super) later: Option<Later>,
}

/// The last balance of an account that an older one is settled on.
#[derive(Clone, Copy)]
pub(super) struct Later {
    no: BalanceNo,
    debt: Amount,
}

impl Account {
    /// What is owed, wherever it stands.
    fn debt(&self) -> Option<Amount> {
        let later = self.later.map_or(Amount::ZERO, |later| later.debt);
        self.after.debt.checked_add(later)
    }
}

/// What became of a use.
#[derive(Default)]
struct Charged {
    charged: Amounts,
    released: Amounts,
    uncovered: Amounts,
}

/// What an extra use comes to on some balances at once.
pub(super) struct Overage {
    /// Charged on every balance.
    pub(super) charged: Amount,
    /// Not charged: nothing was left.
    pub(super) uncovered: Amount,
}

/// Charges a use that nothing holds on every account of its unit.
pub(super) fn charge_overage(
    accounts: &mut [&mut Account],
    unit: Unit,
    extra: Amount,
    policy: OveragePolicy,
    seq: Sequence,
) -> Result<Overage, Refusal> {
    let available = |a: &Account| a.after.available(a.budget.terms.limit);
    let takes_debt = |a: &Account| {
        policy == OveragePolicy::AllowWithOverdraft && a.budget.terms.overdraft_limit > Amount::ZERO
    };
    // What the balances that take no debt can bear.
    let charged = accounts
        .iter()
        .filter(|a| !takes_debt(a))
        .map(|a| available(a))
        .fold(extra, Amount::min);
    for account in accounts.iter().filter(|a| takes_debt(a)) {
        let deficit = charged.saturating_sub(available(account));
        if deficit == Amount::ZERO {
            continue;
        }
        let limit = account.budget.terms.overdraft_limit;
        let debt = account
            .debt()
            .and_then(|debt| debt.checked_add(deficit))
            .ok_or(Refusal::AmountOverflow)?;
        if debt > limit {
            return Err(Refusal::OverdraftLimitExceeded {
                scope: account.after.scope.clone(),
                unit,
                debt,
                limit,
            });
        }
    }
    let capped = charged < extra;
    for account in accounts.iter_mut() {
        let left = available(account);
        let debt = charged.saturating_sub(left);
        if capped && !takes_debt(account) && left < extra {
            account.after.over_limit = Some(seq);
        }
        account.after.charge(charged.saturating_sub(debt), debt)?;
    }
    Ok(Overage {
        charged,
        uncovered: extra.saturating_sub(charged),
    })
}

impl TenantState {
    /// The balances with these numbers, credits lapsed by now. They are loaded:
    /// `needs` has asked for them.
    pub(super) fn accounts(
        &self,
        numbers: impl Iterator<Item = BalanceNo>,
        now: Timestamp,
    ) -> Vec<Account> {
        let mut accounts: Vec<Account> = Vec::new();
        for no in numbers {
            let known = accounts.iter().any(|account| account.before.no == no);
            let Some(balance) = self.balance(no).filter(|_| !known) else {
                continue;
            };
            let Some(budget) = self.budget_of(balance).cloned() else {
                continue;
            };
            let mut after = balance.clone();
            after.lapse_credits(budget.terms.limit, now);
            let last = self.last_balance(&(budget.no, balance.scope.clone()));
            let later = last.filter(|last| last.no > no).map(|last| Later {
                no: last.no,
                debt: last.debt,
            });
            accounts.push(Account {
                before: balance.clone(),
                after,
                budget,
                later,
            });
        }
        accounts
    }

    /// Puts debt that was made on the balance of a period that is over where debt moves to
    /// when a period opens: on the account's last balance.
    pub(super) fn move_debt_on(&self, accounts: &mut Vec<Account>) -> Result<(), Refusal> {
        let mut owing = Vec::new();
        for account in accounts.iter_mut() {
            let Some(later) = account.later.filter(|_| account.after.debt > Amount::ZERO) else {
                continue;
            };
            let debt = std::mem::take(&mut account.after.debt);
            owing.push((later.no, debt, account.budget.clone()));
        }
        for (no, debt, budget) in owing {
            let at = match accounts.iter().position(|account| account.before.no == no) {
                Some(at) => at,
                None => {
                    let last = self.balance(no).ok_or(Refusal::AmountOverflow)?;
                    accounts.push(Account {
                        before: last.clone(),
                        after: last.clone(),
                        budget,
                        later: None,
                    });
                    accounts.len() - 1
                }
            };
            accounts[at].after.charge(Amount::ZERO, debt)?;
            let owed = accounts[at].after.debt;
            for later in accounts.iter_mut().filter_map(|a| a.later.as_mut()) {
                if later.no == no {
                    later.debt = owed;
                }
            }
        }
        Ok(())
    }

    /// Writes settled balances and says in the entry what moved.
    pub(super) fn keep_accounts(&mut self, accounts: Vec<Account>, body: &mut Body) {
        for account in accounts {
            let limit = account.budget.terms.limit;
            body.movements
                .push(Movement::between(&account.before, &account.after, limit));
            self.put_balance(account.after);
        }
    }

    /// The sequence that the next appended entry gets.
    pub(super) fn next_seq(&self) -> Sequence {
        Sequence(self.tip.seq.0 + 1)
    }

    pub(super) fn body_of_settlement(
        &self,
        kind: EntryKind,
        reservation: &Reservation,
        origin: Option<&Origin>,
    ) -> Body {
        let mut body = Body::new(self.config.tenant.id.clone(), kind);
        if let Some(origin) = origin {
            body = body.from_origin(origin);
        }
        body.subject = Some(reservation.subject.clone());
        body.action = Some(reservation.action.clone());
        body.reservation = Some(reservation.id);
        body
    }

    /// With Cycles' rules a suspended tenant reports nothing new either.
    pub(super) fn must_not_be_suspended(&self) -> Result<(), Refusal> {
        let settings = &self.config.tenant.settings;
        if settings.cycles.is_some() && settings.state == super::tenant::TenantState::Suspended {
            return Err(Refusal::TenantSuspended);
        }
        Ok(())
    }

    /// With Cycles' rules a closed tenant settles nothing: what it holds lapses.
    pub(super) fn may_still_settle(&self) -> Result<(), Refusal> {
        let settings = &self.config.tenant.settings;
        if settings.cycles.is_some() && settings.state == super::tenant::TenantState::Closed {
            return Err(Refusal::TenantClosed);
        }
        Ok(())
    }

    pub(super) fn commit(
        &mut self,
        request: &Commit,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let reservation = self.reservation(request.reservation, origin)?.clone();
        let key = KeyHash::of(&self.config.tenant.id, Method::Commit, &request.key);
        let mut body = self.body_of_settlement(EntryKind::Commit, &reservation, Some(origin));
        body.idempotency_key = Some(request.key.clone());
        body.request = Some(Request {
            amounts: request.actual,
            metrics: request.metrics.clone(),
            metadata: request.metadata.clone(),
            ..Request::default()
        });
        if let Some(answer) = self.replay(Some(key), &body, now) {
            return answer;
        }
        self.may_still_settle()?;
        must_settle(&reservation, now)?;
        let reserved = reservation.reserved();
        for (unit, _) in request.actual.iter() {
            if reserved.get(unit).is_none() {
                return Err(Refusal::UnitMismatch {
                    field: "actual",
                    unit,
                    counted: reserved.iter().map(|(unit, _)| unit).collect(),
                    scope: None,
                });
            }
        }
        let least = self.least_use(&reservation, &reserved);
        let actual: Amounts = reserved
            .iter()
            .map(|(unit, held)| {
                let said = request.actual.get(unit).unwrap_or(held);
                (unit, said.max(least.get(unit).unwrap_or_default()))
            })
            .collect();
        let numbers = reservation.holds().map(|hold| hold.0);
        let mut accounts = self.accounts(numbers, now);
        let seq = self.next_seq();
        let charged = settle_use(&reservation, &actual, &mut accounts, seq)?;
        self.move_debt_on(&mut accounts)?;
        // From here on nothing can fail.
        body.charged = charged.charged;
        body.released = charged.released;
        body.uncovered = charged.uncovered;
        self.keep_accounts(accounts, &mut body);
        Ok(self.settled(reservation, SettlementKind::Committed, body, key, now))
    }

    /// What an action uses whatever its agent says: the catalogue's risk points, as far as
    /// they were reserved. What else it costs is an estimate until it is known.
    fn least_use(&self, reservation: &Reservation, reserved: &Amounts) -> Amounts {
        let unit = Unit::RiskPoints;
        let resolved = self.config.resolve(&reservation.action);
        let cost = resolved.and_then(|resolved| resolved.costs.get(unit));
        let least = cost.zip(reserved.get(unit));
        least
            .map(|(cost, held)| (unit, cost.min(held)))
            .into_iter()
            .collect()
    }

    pub(super) fn release(
        &mut self,
        request: &Release,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let reservation = self.reservation(request.reservation, origin)?.clone();
        let key = KeyHash::of(&self.config.tenant.id, Method::Release, &request.key);
        let mut body = self.body_of_settlement(EntryKind::Release, &reservation, Some(origin));
        body.idempotency_key = Some(request.key.clone());
        body.request = Some(Request {
            reason: request.reason.clone(),
            ..Request::default()
        });
        if let Some(answer) = self.replay(Some(key), &body, now) {
            return answer;
        }
        self.may_still_settle()?;
        if !reservation.is_pending() || reservation.is_overdue(now) {
            must_settle(&reservation, now)?;
        }
        let (id, waited) = (reservation.id, reservation.is_pending());
        let approval = reservation.approval.clone().filter(|_| waited);
        self.give_back(&reservation, &mut body, now)?;
        let answer = self.settled(reservation, SettlementKind::Released, body, key, now);
        if let Some(approval) = approval {
            let resolution = self.ended(ApprovalState::Withdrawn, origin.key.clone(), now);
            self.put_approval(id, &approval, Some(resolution));
        }
        Ok(answer)
    }

    /// Ends a reservation whose time is over. One that is not overdue, or ended
    /// already, is left as it is.
    pub(super) fn expire(
        &mut self,
        id: super::id::ReservationId,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let nobody = Origin {
            key: None,
            confinement: None,
            request_id: "".into(),
            trace_id: "".into(),
        };
        let reservation = self.reservation(id, &nobody)?.clone();
        if !reservation.is_open() || !reservation.is_overdue(now) {
            return Ok(Answer::new(Verdict::Allow));
        }
        let approval = reservation
            .approval
            .clone()
            .filter(|_| reservation.is_pending());
        let mut body = self.body_of_settlement(EntryKind::Expire, &reservation, None);
        body.approval = approval.clone();
        self.give_back(&reservation, &mut body, now)?;
        let movements = body.movements.clone();
        let released = body.released;
        let seq = self.append(body, now);
        self.put_settled(
            reservation,
            SettlementKind::Expired,
            Amounts::NONE,
            seq,
            now,
        );
        if let Some(approval) = approval {
            let resolution = self.ended(ApprovalState::Expired, None, now);
            self.put_approval(id, &approval, Some(resolution));
        }
        Ok(Answer {
            released,
            balances: self.views(&movements),
            seq: Some(seq),
            ..Answer::new(Verdict::Allow)
        })
    }

    /// How an approval ended that nobody decided; the entry is the last one.
    fn ended(&self, state: ApprovalState, by: Option<KeyId>, now: Timestamp) -> Resolution {
        Resolution {
            state,
            at: now,
            by,
            approver: "".into(),
            note: "".into(),
            seq: self.tip.seq,
        }
    }

    pub(super) fn give_back(
        &mut self,
        reservation: &Reservation,
        body: &mut Body,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        let mut accounts = self.accounts(reservation.holds().map(|hold| hold.0), now);
        for tranche in &reservation.tranches {
            unhold(tranche, &mut accounts)?;
        }
        body.released = reservation.reserved();
        self.keep_accounts(accounts, body);
        Ok(())
    }

    pub(super) fn settled(
        &mut self,
        reservation: Reservation,
        kind: SettlementKind,
        body: Body,
        key: KeyHash,
        now: Timestamp,
    ) -> Answer {
        let (charged, released, uncovered) = (body.charged, body.released, body.uncovered);
        let movements = body.movements.clone();
        let seq = self.append(body, now);
        self.pin(Some(key));
        self.put_settled(reservation, kind, charged, seq, now);
        Answer {
            charged,
            released,
            uncovered,
            balances: self.views(&movements),
            seq: Some(seq),
            ..Answer::new(Verdict::Allow)
        }
    }

    fn put_settled(
        &mut self,
        mut reservation: Reservation,
        kind: SettlementKind,
        charged: Amounts,
        seq: Sequence,
        now: Timestamp,
    ) {
        reservation.status = Status::Settled(Settlement {
            kind,
            at: now,
            seq,
            charged,
        });
        self.put_reservation(reservation);
    }
}

/// Refuses to settle what is settled, or too late.
pub(super) fn must_settle(reservation: &Reservation, now: Timestamp) -> Result<(), Refusal> {
    match reservation.status {
        Status::Settled(settlement) => match settlement.kind {
            SettlementKind::Expired => Err(Refusal::ReservationExpired {
                at: reservation.expires_at,
            }),
            kind => Err(Refusal::ReservationFinalized {
                state: kind.as_str(),
            }),
        },
        _ if reservation.is_overdue(now) => Err(Refusal::ReservationExpired {
            at: reservation.expires_at,
        }),
        Status::Pending => Err(Refusal::ApprovalPending),
        Status::Active => Ok(()),
    }
}

fn unhold(tranche: &Tranche, accounts: &mut [Account]) -> Result<(), Refusal> {
    for hold in &tranche.holds {
        let amount = tranche.amounts.get(hold.1).unwrap_or_default();
        if let Some(account) = accounts.iter_mut().find(|a| a.before.no == hold.0) {
            account.after.unhold(amount)?;
        }
    }
    Ok(())
}

/// Settles the actual use: each tranche up to what it holds, in order, and what
/// is left over on the last tranche that holds the unit.
fn settle_use(
    reservation: &Reservation,
    actual: &Amounts,
    accounts: &mut [Account],
    seq: Sequence,
) -> Result<Charged, Refusal> {
    let reserved = reservation.reserved();
    let mut result = Charged::default();
    for (unit, actual) in actual.iter() {
        let held = reserved.get(unit).unwrap_or_default();
        let over = actual.saturating_sub(held);
        if over > Amount::ZERO && reservation.overage_policy == OveragePolicy::Reject {
            return Err(Refusal::OverageRejected {
                unit,
                actual,
                reserved: held,
            });
        }
        let mut left = actual.min(held);
        let mut last = None;
        for tranche in &reservation.tranches {
            let Some(amount) = tranche.amounts.get(unit) else {
                continue;
            };
            last = Some(tranche);
            let used = amount.min(left);
            left = left.saturating_sub(used);
            for account in accounts_of_tranche(tranche, unit, accounts) {
                account.after.unhold(amount)?;
                account.after.charge(used, Amount::ZERO)?;
            }
        }
        let mut charged = actual.min(held);
        if let Some(tranche) = last
            && over > Amount::ZERO
        {
            let mut of_unit: Vec<_> = accounts_of_tranche(tranche, unit, accounts).collect();
            let overage =
                charge_overage(&mut of_unit, unit, over, reservation.overage_policy, seq)?;
            charged = charged
                .checked_add(overage.charged)
                .ok_or(Refusal::AmountOverflow)?;
            if overage.uncovered > Amount::ZERO {
                result.uncovered.set(unit, overage.uncovered);
            }
        }
        result.charged.set(unit, charged);
        let released = held.saturating_sub(actual);
        if released > Amount::ZERO {
            result.released.set(unit, released);
        }
    }
    Ok(result)
}

fn accounts_of_tranche<'a>(
    tranche: &'a Tranche,
    unit: Unit,
    accounts: &'a mut [Account],
) -> impl Iterator<Item = &'a mut Account> {
    accounts.iter_mut().filter(move |account| {
        tranche
            .holds
            .iter()
            .any(|hold| hold.1 == unit && hold.0 == account.before.no)
    })
}

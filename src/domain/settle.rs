//! What comes after a hold: Commit, Release, Extend, expiry, and Record for a
//! use that was never held.
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
use super::decide::{extended, lease, micros, said};
use super::id::{BalanceNo, KeyHash, KeyId, Method, Sequence};
use super::ledger::{Body, EntryKind, Movement, Request};
use super::line::Line;
use super::refusal::Refusal;
use super::request::{Commit, Extend, Origin, OveragePolicy, Record, RecordOf, Release};
use super::reservation::{Reservation, Settlement, SettlementKind, Status, TRANCHES_MAX, Tranche};
use super::scope::Subject;
use super::state::TenantState;
use super::tenant::TenantState as State;
use super::time::Timestamp;

/// A balance that is being settled on: as stored, and as it becomes.
pub(super) struct Account {
    pub(super) before: Balance,
    pub(super) after: Balance,
    pub(super) budget: Arc<Budget>,
}

/// What became of a use.
#[derive(Default)]
struct Charged {
    charged: Amounts,
    released: Amounts,
    uncovered: Amounts,
}

/// What an extra use comes to on some balances at once.
struct Overage {
    /// Charged on every balance.
    charged: Amount,
    /// Not charged: nothing was left.
    uncovered: Amount,
}

/// Charges a use that nothing holds on every account of its unit.
fn charge_overage(
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
            .after
            .debt
            .checked_add(deficit)
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
            accounts.push(Account {
                before: balance.clone(),
                after,
                budget,
            });
        }
        accounts
    }

    /// Writes settled balances and says in the entry what moved.
    fn keep_accounts(&mut self, accounts: Vec<Account>, body: &mut Body) {
        for account in accounts {
            let limit = account.budget.terms.limit;
            body.movements
                .push(Movement::between(&account.before, &account.after, limit));
            self.put_balance(account.after);
        }
    }

    /// The sequence that the next appended entry gets.
    fn next_seq(&self) -> Sequence {
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
        must_settle(&reservation, now)?;
        let reserved = reservation.reserved();
        for (unit, _) in request.actual.iter() {
            if reserved.get(unit).is_none() {
                return Err(Refusal::UnitMismatch {
                    field: "actual",
                    unit,
                    counted: reserved.iter().map(|(unit, _)| unit).collect(),
                });
            }
        }
        let actual: Amounts = reserved
            .iter()
            .map(|(unit, held)| (unit, request.actual.get(unit).unwrap_or(held)))
            .collect();
        let numbers = reservation.holds().map(|hold| hold.0);
        let mut accounts = self.accounts(numbers, now);
        let seq = self.next_seq();
        let charged = settle_use(&reservation, &actual, &mut accounts, seq)?;
        // From here on nothing can fail.
        body.charged = charged.charged;
        body.released = charged.released;
        body.uncovered = charged.uncovered;
        self.keep_accounts(accounts, &mut body);
        Ok(self.settled(reservation, SettlementKind::Committed, body, key, now))
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

    pub(super) fn extend(
        &mut self,
        request: &Extend,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let mut reservation = self.reservation(request.reservation, origin)?.clone();
        let key = KeyHash::of(&self.config.tenant.id, Method::Extend, &request.key);
        let mut body = self.body_of_settlement(EntryKind::Extend, &reservation, Some(origin));
        body.idempotency_key = Some(request.key.clone());
        body.request = Some(Request {
            amounts: request.additional,
            extend_by_us: Some(micros(request.by.get())),
            ..Request::default()
        });
        if let Some(answer) = self.replay(Some(key), &body, now) {
            return answer;
        }
        must_settle(&reservation, now)?;
        if now > reservation.expires_at {
            return Err(Refusal::ReservationExpired {
                at: reservation.expires_at,
            });
        }
        let expires_at = extended(&reservation, request.by, now)?;
        let lapses_at = expires_at.saturating_add(reservation.grace);

        let mut verdict = Verdict::Allow;
        if !request.additional.is_empty() {
            let (decided, lines, held) =
                self.decide_more(&reservation, &request.additional, lapses_at, now)?;
            if !decided.permits() {
                self.must_know(Some(key))?;
                body = said(body, &decided);
                body.movements = self.looked_at(&lines);
                let movements = body.movements.clone();
                let seq = self.append(body, now);
                return Ok(Answer {
                    lease: Some(lease(&reservation, now)),
                    balances: self.views(&movements),
                    seq: Some(seq),
                    ..Answer::new(decided)
                });
            }
            verdict = decided;
            check_tranches(&reservation, &request.additional, &held)?;
            // From here on nothing can fail.
            let tranche = self.keep_holds(&held, &mut body, now);
            add_tranche(&mut reservation, tranche);
        } else {
            let accounts = self.accounts(reservation.holds().map(|hold| hold.0), now);
            self.keep_accounts(accounts, &mut body);
        }
        reservation.expires_at = expires_at;
        body = said(body, &verdict);
        body.reserved = reservation.reserved();
        body.expires_at = Some(expires_at);
        let movements = body.movements.clone();
        let seq = self.append(body, now);
        self.pin(Some(key));
        let answer = Answer {
            lease: Some(lease(&reservation, now)),
            balances: self.views(&movements),
            seq: Some(seq),
            ..Answer::new(verdict)
        };
        self.put_reservation(reservation);
        Ok(answer)
    }

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
        let seq = Sequence(self.next_seq().0 + lines.iter().filter(|l| l.writes()).count() as i64);
        for (unit, amount) in amounts.iter() {
            let mut of_unit: Vec<_> = accounts
                .iter_mut()
                .filter(|account| account.budget.unit == unit)
                .collect();
            if of_unit.is_empty() {
                continue;
            }
            if policy == OveragePolicy::Reject {
                must_cover(&of_unit, unit, amount)?;
            }
            let overage = charge_overage(&mut of_unit, unit, amount, policy, seq)?;
            body.charged.set(unit, overage.charged);
            if overage.uncovered > Amount::ZERO {
                body.uncovered.set(unit, overage.uncovered);
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
        let lines: Vec<_> = self
            .config
            .applicable(subject)
            .into_iter()
            .filter(|(budget, _)| amounts.get(budget.unit).is_some())
            .map(|(budget, scope)| self.line(budget, scope, now, &mut next))
            .collect();
        if lines.is_empty() {
            return Err(Refusal::BudgetNotProvisioned {
                scope: subject.scope_text().into(),
            });
        }
        let accounts = lines
            .iter()
            .map(|line| Account {
                before: line.balance.clone(),
                after: line.balance.clone(),
                budget: line.budget.clone(),
            })
            .collect();
        Ok((lines, accounts))
    }
}

/// A unit that was used must be counted by some balance. CALLS need not be.
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

/// Refuses to settle what is settled, or too late.
fn must_settle(reservation: &Reservation, now: Timestamp) -> Result<(), Refusal> {
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

/// Refuses an extension that would make more tranches than a reservation may
/// have, or more of a unit than fits.
fn check_tranches(
    reservation: &Reservation,
    additional: &Amounts,
    held: &[Line],
) -> Result<(), Refusal> {
    reservation
        .reserved()
        .checked_add(additional)
        .ok_or(Refusal::AmountOverflow)?;
    let merges = reservation
        .tranches
        .last()
        .is_some_and(|last| merges(last, held.iter().map(|line| line.balance.no)));
    if !merges && reservation.tranches.len() >= TRANCHES_MAX {
        return Err(Refusal::TooManyExtensions);
    }
    Ok(())
}

/// Whether a further hold on these balances can be added to a tranche.
fn merges(tranche: &Tranche, further: impl Iterator<Item = BalanceNo>) -> bool {
    let further: Vec<_> = further.collect();
    // Every balance of the units that are added, and no other one.
    let units: Vec<_> = tranche
        .holds
        .iter()
        .filter(|hold| further.contains(&hold.0))
        .map(|hold| hold.1)
        .collect();
    let of_units = tranche
        .holds
        .iter()
        .filter(|hold| units.contains(&hold.1))
        .count();
    of_units == further.len() && units.len() == further.len()
}

fn add_tranche(reservation: &mut Reservation, tranche: Tranche) {
    if let Some(last) = reservation.tranches.last_mut()
        && merges(last, tranche.holds.iter().map(|hold| hold.0))
        && let Some(amounts) = last.amounts.checked_add(&tranche.amounts)
    {
        last.amounts = amounts;
        return;
    }
    reservation.tranches.push(tranche);
}

//! The ladder: whether an action may happen now, and the hold if it may.
//!
//! Each step is one check with one named answer; the order of the steps is the
//! precedence of the answers and stands in the proto. Nothing changes before the
//! last step has passed, and past that point nothing can fail.

use std::sync::Arc;
use std::time::Duration;

use super::amount::{Amount, Amounts, Unit};
use super::answer::{Answer, BalanceView, Lease, Verdict};
use super::budget::{Balance, Budget, BudgetState};
use super::id::{BalanceNo, IdempotencyKey, KeyHash, Method, ReservationId};
use super::ledger::{Body, Decision, EntryKind, Movement, Opened, Request};
use super::period::Period;
use super::refusal::{Denial, Reason, ReasonCode, Refusal, Shortage};
use super::request::{Ask, Decide, ExtendBy, Grace, Origin, Reserve, Ttl};
use super::reservation::{Hold, Reservation, Status, Tranche};
use super::scope::Subject;
use super::state::TenantState;
use super::tenant::{TenantState as State, UnprovisionedRule};
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

    fn view(&self) -> BalanceView {
        BalanceView::of(&self.balance, &self.budget)
    }

    fn reason(&self, code: ReasonCode, shortage: Option<Shortage>) -> Reason {
        Reason {
            code,
            scope: Some(self.balance.scope.clone()),
            unit: Some(self.budget.unit),
            shortage,
        }
    }
}

impl TenantState {
    /// Every budget that applies to a subject, from the root down.
    fn lines(&self, subject: &Subject, now: Timestamp) -> Vec<Line> {
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

    /// Steps 1 to 8.
    fn ladder(
        &self,
        subject: &Subject,
        asked: &Amounts,
        lines: &[Line],
        now: Timestamp,
        field: &'static str,
    ) -> Result<Verdict, Refusal> {
        // 1. The tenant.
        match self.config.tenant.settings.state {
            State::Active => {}
            State::Suspended => return Ok(deny(Reason::of_tenant(ReasonCode::TenantSuspended))),
            State::Closed => return Ok(deny(Reason::of_tenant(ReasonCode::TenantClosed))),
        }
        // 2. The action catalogue, which adds what the server says an action
        // costs. CALLS, the cost that every action has, is in `asked` already.
        // 3. and 4. Budgets that apply.
        let toolset_uncovered = || {
            subject.toolset().is_some()
                && self.config.tenant.settings.unprovisioned_rule
                    == UnprovisionedRule::RequireToolsetBudget
                && !lines.iter().any(|line| line.budget.scope.names_toolset())
        };
        if lines.is_empty() || toolset_uncovered() {
            return Ok(deny(Reason {
                scope: Some(subject.scope_text().into()),
                ..Reason::of_tenant(ReasonCode::BudgetNotProvisioned)
            }));
        }
        self.check_units(asked, lines, field)?;
        // 5. Their state.
        let reasons = stopped(lines);
        if !reasons.is_empty() {
            return Ok(Verdict::Deny(Denial {
                reasons,
                retry_after: None,
            }));
        }
        // 6. Policy and 7. narrowing stand here.
        // 8. What remains.
        Ok(sufficient(asked, lines, now))
    }

    /// A unit that is asked for must be counted by some budget that applies.
    /// CALLS need not be: the caller did not ask for it.
    fn check_units(
        &self,
        asked: &Amounts,
        lines: &[Line],
        field: &'static str,
    ) -> Result<(), Refusal> {
        for (unit, _) in asked.iter().filter(|(unit, _)| *unit != Unit::Calls) {
            if !lines.iter().any(|line| line.budget.unit == unit) {
                let mut counted: Vec<_> = lines.iter().map(|line| line.budget.unit).collect();
                counted.sort_unstable();
                counted.dedup();
                return Err(Refusal::UnitMismatch {
                    field,
                    unit,
                    counted,
                });
            }
        }
        Ok(())
    }

    pub(super) fn decide(
        &mut self,
        request: &Decide,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let ask = &request.ask;
        let lines = self.lines(&ask.subject, now);
        let asked = ask.amounts();
        let verdict = self.ladder(&ask.subject, &asked, &lines, now, "estimates")?;
        let mut answer = Answer::new(verdict);
        answer.balances = lines.iter().map(Line::view).collect();
        if let Some(key) = &request.record {
            let mut body = self.body_of_ask(EntryKind::Decide, Some(key), ask, origin);
            body.request = Some(Request {
                amounts: ask.estimates,
                ..Request::default()
            });
            body = said(body, &answer.verdict);
            body.movements = self.looked_at(&lines);
            answer.seq = Some(self.append(body, now));
        }
        Ok(answer)
    }

    pub(super) fn reserve(
        &mut self,
        request: &Reserve,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let ask = &request.ask;
        let tenant = &self.config.tenant.id;
        let pinned_key = request
            .key
            .as_ref()
            .map(|key| KeyHash::of(tenant, Method::Reserve, key));
        let mut body = self.body_of_ask(EntryKind::Reserve, request.key.as_ref(), ask, origin);
        body.request = Some(Request {
            amounts: ask.estimates,
            ttl_us: request.ttl.map(|ttl| micros(ttl.get())),
            grace_us: request.grace.map(|grace| micros(grace.get())),
            overage_policy: request.overage_policy,
            metadata: request.metadata.clone(),
            ..Request::default()
        });
        if let Some(answer) = self.replay(pinned_key, &body, now) {
            return answer;
        }

        let lines = self.lines(&ask.subject, now);
        let asked = ask.amounts();
        let verdict = self.ladder(&ask.subject, &asked, &lines, now, "estimates")?;
        let mut answer = Answer::new(verdict);
        let Some(key) = pinned_key else {
            answer.balances = lines.iter().map(Line::view).collect();
            return Ok(answer);
        };
        body = said(body, &answer.verdict);
        if answer.verdict != Verdict::Allow {
            self.must_know(pinned_key)?;
            answer.balances = lines.iter().map(Line::view).collect();
            body.movements = self.looked_at(&lines);
            answer.seq = Some(self.append(body, now));
            return Ok(answer);
        }

        // 9. Hold.
        let id = ReservationId::of(key);
        let ttl = request.ttl.unwrap_or(Ttl::DEFAULT).get();
        let grace = request.grace.unwrap_or(Grace::DEFAULT).get();
        let expires_at = now.saturating_add(ttl);
        let held = hold(lines, &asked, expires_at.saturating_add(grace))?;
        // From here on nothing can fail.
        let tranche = self.keep_holds(&held, &mut body, now);
        body.reservation = Some(id);
        body.reserved = tranche.amounts;
        body.expires_at = Some(expires_at);
        let movements = body.movements.clone();
        let seq = self.append(body, now);
        let settings = &self.config.tenant.settings;
        let reservation = Reservation {
            id,
            version: 0,
            subject: ask.subject.clone(),
            action: ask.action.clone(),
            overage_policy: request
                .overage_policy
                .unwrap_or(settings.default_overage_policy),
            metadata: request.metadata.clone(),
            created_at: now,
            reserve_seq: seq,
            expires_at,
            grace,
            tranches: vec![tranche],
            status: Status::Active,
        };
        answer.lease = Some(lease(&reservation, now));
        self.put_reservation(reservation);
        self.pin(pinned_key);
        answer.balances = self.views(&movements);
        answer.seq = Some(seq);
        Ok(answer)
    }

    /// The ladder for what an Extend asks for more. Answers the verdict and, if
    /// it allows, the lines with the hold on them.
    pub(super) fn decide_more(
        &self,
        subject: &Subject,
        additional: &Amounts,
        lapses_at: Timestamp,
        now: Timestamp,
    ) -> Result<(Verdict, Vec<Line>, Vec<Line>), Refusal> {
        let lines = self.lines(subject, now);
        let verdict = self.ladder(subject, additional, &lines, now, "additional")?;
        if verdict != Verdict::Allow {
            return Ok((verdict, lines, Vec::new()));
        }
        let held = hold(lines.clone(), additional, lapses_at)?;
        Ok((verdict, lines, held))
    }

    /// Keeps balances with holds on them, and says in the entry what moved.
    pub(super) fn keep_holds(&mut self, held: &[Line], body: &mut Body, now: Timestamp) -> Tranche {
        let mut tranche = Tranche {
            amounts: Amounts::NONE,
            holds: Vec::with_capacity(held.len()),
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

    fn body_of_ask(
        &self,
        kind: EntryKind,
        key: Option<&IdempotencyKey>,
        ask: &Ask,
        origin: &Origin,
    ) -> Body {
        let mut body = Body::new(self.config.tenant.id.clone(), kind).from_origin(origin);
        body.idempotency_key = key.cloned();
        body.subject = Some(ask.subject.clone());
        body.action = Some(ask.action.clone());
        body.context = ask.context.clone();
        body
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
}

/// Says in an entry what was decided.
pub(super) fn said(mut body: Body, verdict: &Verdict) -> Body {
    body.decision = Some(match verdict {
        Verdict::Allow => Decision::Allow,
        Verdict::Deny(_) => Decision::Deny,
    });
    body.reasons = verdict.reasons().to_vec();
    body.retry_after_us = verdict.retry_after().map(micros);
    body
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn lease(reservation: &Reservation, now: Timestamp) -> Lease {
    Lease {
        reservation: reservation.id,
        reserved: reservation.reserved(),
        expires_at: reservation.expires_at,
        remaining: reservation.expires_at.since(now),
    }
}

/// How far an Extend may move the end of a lease.
pub(super) fn extended(
    reservation: &Reservation,
    by: ExtendBy,
    now: Timestamp,
) -> Result<Timestamp, Refusal> {
    let expires_at = reservation.expires_at.saturating_add(by.get());
    if expires_at.since(now) > Ttl::MAX {
        return Err(Refusal::LeaseTooLong);
    }
    Ok(expires_at)
}

fn deny(reason: Reason) -> Verdict {
    Verdict::Deny(Denial {
        reasons: vec![reason],
        retry_after: None,
    })
}

/// Step 5: every budget that lets nothing pass, strictest first, from the root
/// down.
fn stopped(lines: &[Line]) -> Vec<Reason> {
    let code = |line: &Line| {
        let (budget, balance) = (&line.budget, &line.balance);
        let overdraft = budget.terms.overdraft_limit;
        match budget.terms.state {
            BudgetState::Frozen => Some(ReasonCode::BudgetFrozen),
            BudgetState::Closed => Some(ReasonCode::BudgetClosed),
            BudgetState::Active if balance.is_over_limit(budget) => {
                Some(ReasonCode::OverdraftLimitExceeded)
            }
            BudgetState::Active if overdraft > Amount::ZERO && balance.debt > overdraft => {
                Some(ReasonCode::OverdraftLimitExceeded)
            }
            BudgetState::Active if overdraft == Amount::ZERO && balance.debt > Amount::ZERO => {
                Some(ReasonCode::DebtOutstanding)
            }
            BudgetState::Active => None,
        }
    };
    let mut reasons: Vec<_> = lines
        .iter()
        .filter_map(|line| code(line).map(|code| line.reason(code, None)))
        .collect();
    reasons.sort_by_key(|reason| reason.code);
    reasons
}

/// Step 8: every balance that is short.
fn sufficient(asked: &Amounts, lines: &[Line], now: Timestamp) -> Verdict {
    let mut reasons = Vec::new();
    let mut wait = Some(Duration::ZERO);
    for line in lines {
        let Some(amount) = asked.get(line.budget.unit) else {
            continue;
        };
        let limit = line.budget.terms.limit;
        let Some(remaining) = line.balance.remaining(limit) else {
            continue;
        };
        let missing = i128::from(amount.get()) - remaining;
        if missing <= 0 {
            continue;
        }
        let shortage = Shortage {
            asked: amount,
            remaining: i64::try_from(remaining).unwrap_or(i64::MIN),
            held_by_others: Amount::clamp(missing).min(line.balance.reserved),
        };
        reasons.push(line.reason(ReasonCode::BudgetExceeded, Some(shortage)));
        let own = line.balance.retry_after(limit, amount, now);
        wait = wait.zip(own).map(|(all, own)| all.max(own));
    }
    if reasons.is_empty() {
        return Verdict::Allow;
    }
    Verdict::Deny(Denial {
        reasons,
        retry_after: wait,
    })
}

/// Step 9, still without effect: the lines whose unit is asked for, with the
/// hold on them.
fn hold(lines: Vec<Line>, asked: &Amounts, lapses_at: Timestamp) -> Result<Vec<Line>, Refusal> {
    let mut held = Vec::with_capacity(lines.len());
    for mut line in lines {
        if let Some(amount) = asked.get(line.budget.unit) {
            line.balance.hold(amount, lapses_at)?;
            held.push(line);
        }
    }
    Ok(held)
}

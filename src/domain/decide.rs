//! Decide and Reserve: the ladder's answer, and what follows from it.
//!
//! Nothing changes before the ladder has answered, and past that point nothing can fail:
//! the hold, the approval that it waits for, the entry, what is counted and the incidents
//! that rules call for.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use super::activity::ActivityKey;
use super::amount::Amounts;
use super::answer::{Answer, BalanceView, Lease, Verdict};
use super::approve::{Approval, Approvers};
use super::budget::OnExceeded;
use super::id::{IdempotencyKey, KeyHash, Method, ReservationId};
use super::ladder::{Case, Demand, Judged};
use super::ledger::{Body, EntryKind, Incident, Request};
use super::line::Line;
use super::policy::facts::Asked;
use super::refusal::{Denial, Reason, ReasonCode, Refusal};
use super::request::{Action, Ask, Decide, ExtendBy, Grace, Origin, Reserve, Ttl};
use super::reservation::{Hold, Reservation, Status};
use super::scope::{Scope, Subject};
use super::state::TenantState;
use super::tenant::{FREEZES_MAX, Freeze};
use super::time::Timestamp;

impl Judged {
    /// What a reservation waits for that needs approval.
    fn approval(&self, ttl: Duration, origin: &Origin, now: Timestamp) -> Arc<Approval> {
        let timeouts = self.approving.iter();
        let timeout = timeouts
            .map(|by| by.rule.approval_timeout.unwrap_or_default())
            .min()
            .unwrap_or_default();
        let rules = self.approving.iter().map(|by| by.rule.approvers.clone());
        let short: Vec<&Line> = self
            .lines
            .iter()
            .filter(|line| line.missing(&self.asked).is_some())
            .collect();
        let budgets = short.iter().map(|line| match &line.budget.on_exceeded {
            OnExceeded::RequireApproval { approvers } => approvers.to_vec(),
            OnExceeded::Deny => Vec::new(),
        });
        let mut approvers: Approvers = rules.chain(budgets).filter(|set| !set.is_empty()).collect();
        approvers.dedup();
        Arc::new(Approval {
            approvers,
            deadline: now.saturating_add(timeout.get()),
            ttl_us: micros(ttl),
            requested_by: origin.key.clone(),
            short: short
                .iter()
                .map(|line| Hold(line.balance.no, line.budget.unit))
                .collect(),
        })
    }
}

impl TenantState {
    /// Every balance that applies to an action as of now, once the accounts of its subject
    /// are there.
    pub fn outlook(&self, subject: &Subject, action: &Action, now: Timestamp) -> Vec<BalanceView> {
        let subject = self.config.placed(subject, action);
        self.lines(&subject, now).iter().map(Line::view).collect()
    }

    pub(super) fn decide(
        &mut self,
        request: &Decide,
        origin: &Origin,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        let ask = &request.ask;
        let judged = self.judge_ask(ask, origin, now)?;
        let mut answer = Answer::new(judged.verdict.clone());
        answer.balances = judged.lines.iter().map(Line::view).collect();
        if let Some(key) = &request.record {
            let mut body = self.body_of_ask(EntryKind::Decide, Some(key), ask, origin);
            body.request = Some(Request {
                amounts: ask.estimates,
                ..Request::default()
            });
            body = self.told(body, ask, &judged);
            body.movements = self.looked_at(&judged.lines);
            answer.seq = Some(self.append(body, now));
            self.follow_up(ask, &judged, origin, now);
        }
        answer.explanation = judged.explanation.filter(|_| ask.explain);
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
            if let Err(Refusal::IdempotencyMismatch { .. }) = &answer {
                self.note_mismatch(pinned_key, body, now);
            }
            // With Cycles' rules not even what was answered before is told again.
            self.must_not_be_suspended()?;
            return answer.map(|mut answer| {
                answer.explanation = answer.explanation.filter(|_| ask.explain);
                answer
            });
        }

        let judged = self.judge_ask(ask, origin, now)?;
        let mut answer = Answer::new(judged.verdict.clone());
        answer.explanation = judged.explanation.clone().filter(|_| ask.explain);
        let Some(key) = pinned_key else {
            answer.balances = judged.lines.iter().map(Line::view).collect();
            if judged.verdict.permits() {
                answer.would_hold = held_of(&judged.lines, &judged.asked);
            }
            return Ok(answer);
        };
        body = self.told(body, ask, &judged);
        let waits = matches!(judged.verdict, Verdict::RequireApproval(..));
        if !judged.verdict.permits() && !waits {
            self.must_know(pinned_key)?;
            answer.balances = judged.lines.iter().map(Line::view).collect();
            body.movements = self.looked_at(&judged.lines);
            answer.seq = Some(self.append(body, now));
            self.follow_up(ask, &judged, origin, now);
            return Ok(answer);
        }

        // 9. Hold.
        let id = ReservationId::of(key);
        let ttl = self.config.tenant.settings.ttl(request.ttl);
        let grace = request.grace.unwrap_or(Grace::DEFAULT).get();
        let approval = waits.then(|| judged.approval(ttl, origin, now));
        let (expires_at, lapses_at) = match &approval {
            Some(approval) => (approval.deadline, approval.deadline),
            None => {
                let expires_at = now.saturating_add(ttl);
                (expires_at, expires_at.saturating_add(grace))
            }
        };
        // A balance that is short holds nothing until a person has granted what it lacks.
        let (short, lines): (Vec<Line>, Vec<Line>) = match approval {
            Some(_) => judged
                .lines
                .iter()
                .cloned()
                .partition(|line| line.missing(&judged.asked).is_some()),
            None => (Vec::new(), judged.lines.clone()),
        };
        let held = hold(&lines, &judged.asked, lapses_at)?;
        // From here on nothing can fail.
        let mut tranche = self.keep_holds(&held, &mut body, now);
        for line in &short {
            self.keep(line, now);
            let asked = judged.asked.get(line.budget.unit).unwrap_or_default();
            tranche.amounts.set(line.budget.unit, asked);
        }
        body.movements.extend(self.looked_at(&short));
        if self.config.reads_budgets() {
            // What its rules could read, beside what was held.
            let asked = |line: &&Line| judged.asked.get(line.budget.unit).is_none();
            let others: Vec<Line> = judged.lines.iter().filter(asked).cloned().collect();
            body.movements.extend(self.looked_at(&others));
        }
        body.reservation = Some(id);
        body.reserved = tranche.amounts;
        body.expires_at = Some(expires_at).filter(|_| !waits);
        body.approval = approval.clone();
        let movements = body.movements.clone();
        let seq = self.append(body, now);
        let settings = &self.config.tenant.settings;
        let reservation = Reservation {
            id,
            version: 0,
            subject: ask.subject.clone(),
            action: ask.action.clone(),
            context: ask.context.clone(),
            overage_policy: request
                .overage_policy
                .unwrap_or(settings.default_overage_policy),
            metadata: request.metadata.clone(),
            created_at: now,
            reserve_seq: seq,
            expires_at,
            grace,
            tranches: vec![tranche],
            status: if waits {
                Status::Pending
            } else {
                Status::Active
            },
            approval: approval.clone(),
        };
        match &approval {
            Some(approval) => answer.waits = Some((id, approval.clone())),
            None => answer.lease = Some(lease(&reservation, now)),
        }
        self.put_reservation(reservation);
        if let Some(approval) = &approval {
            self.put_approval(id, approval, None);
        }
        self.pin(pinned_key);
        answer.balances = self.views(&movements);
        answer.seq = Some(seq);
        self.follow_up(ask, &judged, origin, now);
        Ok(answer)
    }

    /// The subject in the catalogue's toolset, in which the caller must be allowed to act
    /// too.
    pub(super) fn placed_for<'a>(
        &self,
        subject: &'a Subject,
        action: &Action,
        origin: &Origin,
    ) -> Result<Cow<'a, Subject>, Refusal> {
        let placed = self.config.placed(subject, action);
        let confinement = origin.confinement.as_ref();
        if confinement.is_some_and(|confinement| !confinement.matches(&placed)) {
            return Err(Refusal::ScopeNotPermitted {
                scope: placed.scope_text(),
            });
        }
        Ok(placed)
    }

    fn judge_ask(&self, ask: &Ask, origin: &Origin, now: Timestamp) -> Result<Judged, Refusal> {
        let subject = self.placed_for(&ask.subject, &ask.action, origin)?;
        let case = Case {
            subject: &subject,
            action: &ask.action,
            context: &ask.context,
            demand: Demand::Action(ask.estimates),
            arguments: Asked::With(ask.arguments.as_deref()),
        };
        self.judge(case, now)
    }

    /// Records that an approval was asked to serve for something else.
    fn note_mismatch(&mut self, key: Option<KeyHash>, body: Body, now: Timestamp) {
        let Some(approval) = self.approval_under(key) else {
            return;
        };
        let denial = Denial {
            reasons: vec![Reason::of_tenant(ReasonCode::ApprovalMismatch)],
            retry_after: None,
        };
        let mut body = said(body, &Verdict::Deny(denial));
        body.reservation = Some(approval);
        self.append(body, now);
    }

    /// Says in an entry what was decided, and by what.
    fn told(&self, body: Body, ask: &Ask, judged: &Judged) -> Body {
        let mut body = said(body, &judged.verdict);
        body.explanation = judged.explanation.clone();
        let keep = self.config.tenant.settings.keep_arguments.as_ref();
        body.arguments = keep
            .zip(ask.arguments.as_deref())
            .map(|(keep, arguments)| keep.keep(arguments));
        body
    }

    /// After a recorded decision: counts it, and raises the incidents that rules call for.
    fn follow_up(&mut self, ask: &Ask, judged: &Judged, origin: &Origin, now: Timestamp) {
        if !self.config.reads_activity() {
            return;
        }
        let subject = self.config.placed(&ask.subject, &ask.action).into_owned();
        let key = ActivityKey::of(&subject, &ask.action.name);
        let window = self.config.tenant.settings.activity_window.get();
        self.activity_mut(key)
            .note(judged.verdict.decision(), now, window);
        self.escalate(&ask.subject, &ask.action, judged, origin, now);
    }

    /// After a recorded decision: raises the incidents that rules call for.
    pub(super) fn escalate(
        &mut self,
        of: &Arc<Subject>,
        action: &Arc<Action>,
        judged: &Judged,
        origin: &Origin,
        now: Timestamp,
    ) {
        let subject = self.config.placed(of, action).into_owned();
        let key = ActivityKey::of(&subject, &action.name);
        let window = self.config.tenant.settings.activity_window.get();
        let decision = self.tip.seq;
        for by in &judged.escalating {
            let activity = self.activity_mut(key);
            if !activity.raise(&by.name(), now, window) {
                continue;
            }
            let recent = activity.counts(now, window);
            let agent = subject.agent_scope();
            let scope = Scope::parse_concrete(&agent).ok();
            // A scope that is frozen already needs no second freeze, which would have to be
            // lifted too.
            let freezes = &self.freezes.document;
            let stands = freezes
                .iter()
                .any(|freeze| scope.as_ref() == Some(&freeze.scope));
            let scope = scope.filter(|_| by.rule.freeze && !stands && freezes.len() < FREEZES_MAX);
            let tenant = self.config.tenant.id.clone();
            let mut body = Body::new(tenant, EntryKind::Incident).from_origin(origin);
            body.subject = Some(of.clone());
            body.action = Some(action.clone());
            body.incident = Some(Incident {
                rule: by.reference(),
                decision,
                agent: agent.into(),
                recent,
                frozen: scope.is_some() || (by.rule.freeze && stands),
            });
            if let Some(scope) = scope {
                body.freezes = Some(self.freeze(Freeze {
                    scope,
                    reason: by.rule.reason.clone(),
                    rule: Some(by.reference()),
                    since: now,
                }));
            }
            self.append(body, now);
        }
    }

    /// The ladder for what an Extend asks for more. Answers what was decided and, if it
    /// permits, the lines with the hold on them.
    pub(super) fn decide_more(
        &self,
        reservation: &Reservation,
        additional: &Amounts,
        lapses_at: Timestamp,
        now: Timestamp,
    ) -> Result<(Judged, Vec<Line>), Refusal> {
        let case = Case {
            subject: &self
                .config
                .placed(&reservation.subject, &reservation.action),
            action: &reservation.action,
            context: &reservation.context,
            demand: Demand::More {
                additional: *additional,
                in_all: reservation
                    .reserved()
                    .checked_add(additional)
                    .ok_or(Refusal::AmountOverflow)?,
            },
            arguments: Asked::Unknown,
        };
        let judged = self.judge(case, now)?;
        let held = match judged.verdict.permits() {
            true => hold(&judged.lines, additional, lapses_at)?,
            false => Vec::new(),
        };
        Ok((judged, held))
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
}

/// Says in an entry what was decided.
pub(super) fn said(mut body: Body, verdict: &Verdict) -> Body {
    body.decision = Some(verdict.decision());
    body.caps = verdict.caps().cloned();
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
    bounded: bool,
    now: Timestamp,
) -> Result<Timestamp, Refusal> {
    let expires_at = reservation.expires_at.saturating_add(by.get());
    if bounded && expires_at.since(now) > Ttl::MAX {
        return Err(Refusal::LeaseTooLong);
    }
    Ok(expires_at)
}

/// What step 9 holds of what is asked for: units that a budget counts.
fn held_of(lines: &[Line], asked: &Amounts) -> Amounts {
    asked
        .iter()
        .filter(|(unit, _)| lines.iter().any(|line| line.budget.unit == *unit))
        .collect()
}

/// Step 9, still without effect: the lines whose unit is asked for, with the
/// hold on them.
fn hold(lines: &[Line], asked: &Amounts, lapses_at: Timestamp) -> Result<Vec<Line>, Refusal> {
    let mut held = Vec::with_capacity(lines.len());
    for line in lines {
        if let Some(amount) = asked.get(line.budget.unit) {
            let mut line = line.clone();
            line.balance.hold(amount, lapses_at)?;
            held.push(line);
        }
    }
    Ok(held)
}

//! The ladder: whether an action may happen now, and the hold if it may.
//!
//! Each step is one check with one named answer; the order of the steps is the
//! precedence of the answers and stands in the proto. Nothing changes before the
//! last step has passed, and past that point nothing can fail.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use super::activity::{ActivityKey, Counts};
use super::amount::{Amount, Amounts, Unit};
use super::answer::{Answer, BalanceView, Lease, Verdict};
use super::approve::{Approval, Approvers};
use super::budget::{Balance, Budget, BudgetState, OnExceeded};
use super::caps::Caps;
use super::catalogue::{Resolved, Tier};
use super::id::{BalanceNo, IdempotencyKey, KeyHash, Method, ReservationId};
use super::ledger::{Binding, Body, EntryKind, Explanation, Incident, Movement, Opened, Request};
use super::narrowing::{BasisPoints, Highest, reached};
use super::period::Period;
use super::policy;
use super::policy::facts::{Asked, BudgetFacts, Facts};
use super::policy::ruling::{Deciding, Ruling};
use super::refusal::{Denial, Narrowed, Reason, ReasonCode, Refusal, RuleRef, Shortage};
use super::request::{Action, Ask, Context, Decide, ExtendBy, Grace, Origin, Reserve, Ttl};
use super::reservation::{Hold, Reservation, Status, Tranche};
use super::scope::{Scope, Subject};
use super::state::TenantState;
use super::tenant::{FREEZES_MAX, Freeze, TenantState as State, UnprovisionedRule};
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

    /// Whether it has not enough left.
    fn is_short(&self, asked: &Amounts) -> bool {
        let asked = asked.get(self.budget.unit).unwrap_or_default();
        asked > self.balance.available(self.budget.terms.limit)
    }

    fn reason(&self, code: ReasonCode, shortage: Option<Shortage>) -> Reason {
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

/// What is decided upon.
struct Case<'a> {
    /// Who acts, in the catalogue's toolset.
    subject: &'a Subject,
    action: &'a Action,
    context: &'a Context,
    demand: Demand,
    arguments: Asked<'a>,
}

/// What is asked of the budgets.
enum Demand {
    /// What the caller estimates of an action.
    Action(Amounts),
    /// More for one that was let in.
    More(Amounts),
}

impl Demand {
    /// What the caller named.
    fn named(&self) -> &Amounts {
        match self {
            Self::Action(amounts) | Self::More(amounts) => amounts,
        }
    }

    /// The request's field.
    fn field(&self) -> &'static str {
        match self {
            Self::Action(_) => "estimates",
            Self::More(_) => "additional",
        }
    }
}

/// What was decided, and all that it came from.
struct Judged {
    verdict: Verdict,
    lines: Vec<Line>,
    asked: Amounts,
    explanation: Option<Box<Explanation>>,
    escalating: Vec<Deciding>,
    approving: Vec<Deciding>,
}

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
            .filter(|line| line.is_short(&self.asked))
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

    /// Decides on one action, without effect.
    fn judge(&self, case: Case, now: Timestamp) -> Result<Judged, Refusal> {
        let resolved = self.config.resolve(case.action);
        let asked = match &case.demand {
            Demand::Action(estimates) => demanded(estimates, resolved.as_ref()),
            Demand::More(additional) => *additional,
        };
        let lines = self.lines(case.subject, now);
        let recent = self.recent(case.subject, case.action, now);
        let ruling = if self.config.rules.policies.is_empty() {
            Ruling::default()
        } else {
            let facts = Facts {
                action: case.action,
                resolved: resolved.as_ref(),
                subject: case.subject,
                context: case.context,
                amounts: asked,
                arguments: case.arguments,
                budgets: lines.iter().map(Line::facts).collect(),
                recent: recent.unwrap_or_default(),
            };
            policy::ruling::rule(&self.config.rules.policies, &facts)
        };
        let mut binding = None;
        let verdict = self.ladder(
            &case,
            resolved.as_ref(),
            &asked,
            &lines,
            &ruling,
            &mut binding,
            now,
        )?;
        let explains = self.config.has_rules() || binding.is_some();
        let explanation = explains.then(|| {
            Box::new(Explanation {
                versions: self.config.versions(),
                resolved,
                recent,
                matched: ruling.matched,
                binding,
            })
        });
        Ok(Judged {
            verdict,
            lines,
            asked,
            explanation,
            escalating: ruling.escalating,
            approving: ruling.approving,
        })
    }

    /// What the agent did with this tool of late; nothing where no rule reads it.
    fn recent(&self, subject: &Subject, action: &Action, now: Timestamp) -> Option<Counts> {
        if !self.config.reads_activity() {
            return None;
        }
        let window = self.config.tenant.settings.activity_window.get();
        let activity = self.activity(ActivityKey::of(subject, &action.name));
        Some(activity.map_or(Counts::default(), |activity| activity.counts(now, window)))
    }

    /// Steps 1 to 8.
    #[expect(clippy::too_many_arguments, reason = "all that a decision goes by")]
    fn ladder(
        &self,
        case: &Case,
        resolved: Option<&Resolved>,
        asked: &Amounts,
        lines: &[Line],
        ruling: &Ruling,
        binding: &mut Option<Binding>,
        now: Timestamp,
    ) -> Result<Verdict, Refusal> {
        // 1. The tenant, and scopes that are stopped.
        match self.config.tenant.settings.state {
            State::Active => {}
            State::Suspended => return Ok(deny(Reason::of_tenant(ReasonCode::TenantSuspended))),
            State::Closed => return Ok(deny(Reason::of_tenant(ReasonCode::TenantClosed))),
        }
        let frozen = self.frozen(case.subject, ruling);
        if !frozen.is_empty() {
            return Ok(deny_for(frozen, None));
        }
        // 2. The action catalogue.
        let Some(resolved) = resolved else {
            return Ok(deny(Reason::of_tenant(ReasonCode::UnknownAction)));
        };
        // 3. and 4. Budgets that apply.
        let unprovisioned = self.unprovisioned(case.subject, resolved, lines);
        if !unprovisioned.is_empty() {
            return Ok(deny_for(unprovisioned, None));
        }
        self.check_units(case.demand.named(), lines, case.demand.field())?;
        // 5. Their state.
        let reasons = stopped(lines);
        if !reasons.is_empty() {
            return Ok(deny_for(reasons, None));
        }
        // 6. Policy.
        if !ruling.denying.is_empty() {
            let reasons = ruling.denying.iter();
            let reasons = reasons
                .map(|by| by.reason(ReasonCode::PolicyDenied))
                .collect();
            return Ok(deny_for(reasons, None));
        }
        // 7. Narrowing.
        let narrowing = narrow(lines, resolved, now);
        *binding = narrowing.binding;
        if let Some(denial) = narrowing.denial {
            return Ok(Verdict::Deny(denial));
        }
        // 8. What remains.
        let mut waits = Vec::new();
        if let Some(denial) = short(asked, lines, now) {
            if !can_be_granted(asked, lines) {
                return Ok(Verdict::Deny(denial));
            }
            waits = denial.reasons;
        }
        let approving = ruling.approving.iter();
        waits.extend(approving.map(|by| by.reason(ReasonCode::ApprovalRequired)));
        if !waits.is_empty() {
            return Ok(Verdict::RequireApproval(Denial {
                reasons: waits,
                retry_after: None,
            }));
        }
        let mut caps = ruling.caps.clone();
        caps.tighten(&narrowing.caps);
        if let Some(binding) = binding {
            self.config.tighten(&mut caps, binding);
        }
        Ok(if caps.is_empty() {
            Verdict::Allow
        } else {
            Verdict::AllowWithCaps(caps)
        })
    }

    /// Every freeze that applies to a subject, and the one that a rule makes now.
    fn frozen(&self, subject: &Subject, ruling: &Ruling) -> Vec<Reason> {
        let standing = self.freezes.document.iter();
        let mut reasons: Vec<_> = standing
            .filter(|freeze| freeze.scope.applied_to(subject).is_some())
            .map(|freeze| Reason {
                scope: Some(freeze.scope.text().clone()),
                rule: freeze.rule.clone(),
                ..Reason::of_tenant(ReasonCode::ScopeFrozen)
            })
            .collect();
        if reasons.is_empty() {
            let freezing = ruling.escalating.iter().filter(|by| by.rule.freeze);
            reasons.extend(freezing.map(|by| Reason {
                scope: Some(subject.agent_scope().into()),
                ..Reason::of_rule(ReasonCode::ScopeFrozen, by.reference())
            }));
        }
        reasons
    }

    /// No budget at all, none that names the toolset, or none in a unit that the
    /// catalogue says the action costs.
    fn unprovisioned(&self, subject: &Subject, resolved: &Resolved, lines: &[Line]) -> Vec<Reason> {
        let toolset_uncovered = || {
            subject.toolset().is_some()
                && self.config.tenant.settings.unprovisioned_rule
                    == UnprovisionedRule::RequireToolsetBudget
                && !lines.iter().any(|line| line.budget.scope.names_toolset())
        };
        let reason = |unit| Reason {
            scope: Some(subject.scope_text().into()),
            unit,
            ..Reason::of_tenant(ReasonCode::BudgetNotProvisioned)
        };
        if lines.is_empty() || toolset_uncovered() {
            return vec![reason(None)];
        }
        let costs = resolved
            .costs
            .iter()
            .filter(|(_, cost)| *cost > Amount::ZERO);
        costs
            .filter(|(unit, _)| !lines.iter().any(|line| line.budget.unit == *unit))
            .map(|(unit, _)| reason(Some(unit)))
            .collect()
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
            return Ok(answer);
        };
        body = self.told(body, ask, &judged);
        let waits = matches!(judged.verdict, Verdict::RequireApproval(_));
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
        let ttl = request.ttl.unwrap_or(Ttl::DEFAULT).get();
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
                .partition(|line| line.is_short(&judged.asked)),
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
        let decision = self.tip.seq;
        self.activity_mut(key)
            .note(judged.verdict.decision(), now, window);
        for by in &judged.escalating {
            let activity = self.activity_mut(key);
            if !activity.raise(&by.name(), now, window) {
                continue;
            }
            let recent = activity.counts(now, window);
            let agent = subject.agent_scope();
            let scope = Scope::parse_concrete(&agent).ok();
            let scope =
                scope.filter(|_| by.rule.freeze && self.freezes.document.len() < FREEZES_MAX);
            let tenant = self.config.tenant.id.clone();
            let mut body = Body::new(tenant, EntryKind::Incident).from_origin(origin);
            body.subject = Some(ask.subject.clone());
            body.action = Some(ask.action.clone());
            body.incident = Some(Incident {
                rule: by.reference(),
                decision,
                agent: agent.into(),
                recent,
                frozen: scope.is_some(),
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

    /// The ladder for what an Extend asks for more. Answers the verdict and, if
    /// it permits, the lines with the hold on them.
    pub(super) fn decide_more(
        &self,
        reservation: &Reservation,
        additional: &Amounts,
        lapses_at: Timestamp,
        now: Timestamp,
    ) -> Result<(Verdict, Vec<Line>, Vec<Line>), Refusal> {
        let case = Case {
            subject: &self
                .config
                .placed(&reservation.subject, &reservation.action),
            action: &reservation.action,
            context: &Context::default(),
            demand: Demand::More(*additional),
            arguments: Asked::Before,
        };
        let judged = self.judge(case, now)?;
        if !judged.verdict.permits() {
            return Ok((judged.verdict, judged.lines, Vec::new()));
        }
        let held = hold(&judged.lines, additional, lapses_at)?;
        Ok((judged.verdict, judged.lines, held))
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
    now: Timestamp,
) -> Result<Timestamp, Refusal> {
    let expires_at = reservation.expires_at.saturating_add(by.get());
    if expires_at.since(now) > Ttl::MAX {
        return Err(Refusal::LeaseTooLong);
    }
    Ok(expires_at)
}

fn deny(reason: Reason) -> Verdict {
    deny_for(vec![reason], None)
}

pub(super) fn deny_for(reasons: Vec<Reason>, retry_after: Option<Duration>) -> Verdict {
    Verdict::Deny(Denial {
        reasons,
        retry_after,
    })
}

impl Deciding {
    /// How reasons and records name it.
    pub(super) fn reference(&self) -> RuleRef {
        RuleRef {
            id: self.rule.id.clone(),
            all_tenants: self.all_tenants,
            text: self.rule.reason.clone(),
        }
    }

    /// Tells it from a rule of the other document.
    fn name(&self) -> String {
        let whose = if self.all_tenants { "all" } else { "own" };
        format!("{whose}/{}", self.rule.id)
    }

    pub(super) fn reason(&self, code: ReasonCode) -> Reason {
        let code = match code {
            ReasonCode::PolicyDenied if self.failed => ReasonCode::PolicyError,
            code => code,
        };
        Reason::of_rule(code, self.reference())
    }
}

/// What is asked of the budgets for an action: the caller's estimates, but not less than
/// the catalogue's costs, and one call.
pub(super) fn demanded(estimates: &Amounts, resolved: Option<&Resolved>) -> Amounts {
    let mut asked = estimates.with(Unit::Calls, Amount::ONE);
    for (unit, cost) in resolved
        .into_iter()
        .flat_map(|resolved| resolved.costs.iter())
    {
        asked.set(
            unit,
            asked.get(unit).map_or(cost, |estimate| estimate.max(cost)),
        );
    }
    asked
}

/// What narrowing makes of an action.
pub(super) struct Narrowing {
    pub(super) denial: Option<Denial>,
    pub(super) binding: Option<Binding>,
    pub(super) caps: Caps,
}

/// Step 7: thresholds that were reached, on every balance that applies.
pub(super) fn narrow(lines: &[Line], resolved: &Resolved, now: Timestamp) -> Narrowing {
    let mut narrowing = Narrowing {
        denial: None,
        binding: None,
        caps: Caps::default(),
    };
    let mut reasons = Vec::new();
    let mut wait = Some(Duration::ZERO);
    for line in lines
        .iter()
        .filter(|line| !line.budget.thresholds.is_empty())
    {
        let used = BasisPoints::used(&line.balance, line.budget.terms.limit);
        let Some(threshold) = reached(&line.budget.thresholds, used) else {
            continue;
        };
        narrowing.caps.tighten(&threshold.caps);
        let rank = |highest: Option<Highest>| match highest {
            None => u8::MAX,
            Some(highest) => highest.tier().map_or(0, Tier::get),
        };
        let tightest = narrowing
            .binding
            .as_ref()
            .map(|binding| rank(binding.highest));
        if tightest.is_none_or(|tightest| rank(threshold.highest) < tightest) {
            narrowing.binding = Some(Binding {
                scope: line.balance.scope.clone(),
                unit: line.budget.unit,
                used,
                from: threshold.from,
                highest: threshold.highest,
            });
        }
        let Some(highest) = threshold.highest else {
            continue;
        };
        if highest
            .tier()
            .is_some_and(|highest| resolved.tier <= highest)
        {
            continue;
        }
        let narrowed = Narrowed {
            used,
            from: threshold.from,
            highest,
            tier: resolved.tier,
        };
        reasons.push(Reason {
            narrowed: Some(narrowed),
            ..line.reason(ReasonCode::CapabilityNarrowed, None)
        });
        let at = line.balance.next_lapse.or(line.balance.window.end);
        let own = at.map(|at| at.since(now).max(Duration::from_secs(1)));
        wait = wait.zip(own).map(|(all, own)| all.max(own));
    }
    if !reasons.is_empty() {
        narrowing.denial = Some(Denial {
            reasons,
            retry_after: wait,
        });
    }
    narrowing
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
pub(super) fn short(asked: &Amounts, lines: &[Line], now: Timestamp) -> Option<Denial> {
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
    (!reasons.is_empty()).then_some(Denial {
        reasons,
        retry_after: wait,
    })
}

/// Whether a person can grant all that is short.
pub(super) fn can_be_granted(asked: &Amounts, lines: &[Line]) -> bool {
    let mut short = lines.iter().filter(|line| line.is_short(asked));
    short.all(|line| !line.budget.on_exceeded.is_deny())
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

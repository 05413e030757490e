//! The ladder: whether an action may happen now, without effect.
//!
//! Each step is one check with one named answer; the order of the steps is the
//! precedence of the answers and stands in the proto.

use std::sync::Arc;
use std::time::Duration;

use super::activity::{ActivityKey, Counts};
use super::amount::{Amount, Amounts, Unit};
use super::answer::Verdict;
use super::budget::BudgetState;
use super::caps::Caps;
use super::catalogue::{Resolved, Tier};
use super::ledger::{Binding, Explanation};
use super::line::Line;
use super::narrowing::{BasisPoints, Highest, reached};
use super::policy;
use super::policy::facts::{Asked, Facts};
use super::policy::ruling::{Deciding, Ruling};
use super::refusal::{Denial, Narrowed, Reason, ReasonCode, Refusal, RuleRef, Shortage};
use super::request::{Action, Context};
use super::scope::Subject;
use super::state::TenantState;
use super::tenant::{TenantState as State, UnprovisionedRule};
use super::time::Timestamp;

/// What is decided upon.
pub(super) struct Case<'a> {
    /// Who acts, in the catalogue's toolset.
    pub(super) subject: &'a Subject,
    pub(super) action: &'a Action,
    pub(super) context: &'a Context,
    pub(super) demand: Demand,
    pub(super) arguments: Asked<'a>,
}

/// What is asked of the budgets.
pub(super) enum Demand {
    /// What the caller estimates of an action.
    Action(Amounts),
    /// More for one that was let in.
    More {
        additional: Amounts,
        /// With what is held already.
        in_all: Amounts,
    },
}

impl Demand {
    /// What the caller named.
    fn named(&self) -> &Amounts {
        match self {
            Self::Action(estimates) => estimates,
            Self::More { additional, .. } => additional,
        }
    }

    /// The request's field.
    fn field(&self) -> &'static str {
        match self {
            Self::Action(_) => "estimates",
            Self::More { .. } => "additional",
        }
    }
}

/// What was decided, and all that it came from.
pub(super) struct Judged {
    pub(super) verdict: Verdict,
    pub(super) lines: Vec<Line>,
    pub(super) asked: Amounts,
    pub(super) explanation: Option<Box<Explanation>>,
    pub(super) escalating: Vec<Deciding>,
    pub(super) approving: Vec<Deciding>,
}

impl TenantState {
    /// Decides on one action, without effect.
    pub(super) fn judge(&self, case: Case, now: Timestamp) -> Result<Judged, Refusal> {
        let resolved = self.config.resolve(case.action);
        let asked = match &case.demand {
            Demand::Action(estimates) => demanded(estimates, resolved.as_ref()),
            Demand::More { additional, .. } => *additional,
        };
        // To a rule, many small requests are one large one.
        let amounts = match &case.demand {
            Demand::Action(_) => asked,
            Demand::More { in_all, .. } => *in_all,
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
                amounts,
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
        // 5. Their state; with Cycles' rules also what remains, scope by scope.
        if self.config.tenant.settings.cycles.is_some() {
            if let Some(denial) = first_failing(asked, lines, now) {
                return Ok(Verdict::Deny(denial));
            }
        } else {
            let reasons = stopped(lines);
            if !reasons.is_empty() {
                return Ok(deny_for(reasons, None));
            }
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
        let mut caps = ruling.caps.clone();
        caps.tighten(&narrowing.caps);
        if let Some(binding) = binding {
            self.config.tighten(&mut caps, binding);
        }
        if !waits.is_empty() {
            let denial = Denial {
                reasons: waits,
                retry_after: None,
            };
            return Ok(Verdict::RequireApproval(denial, caps));
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
        if lines.is_empty() {
            return vec![reason(None)];
        }
        if self.config.tenant.settings.cycles.is_some() {
            return Vec::new();
        }
        if toolset_uncovered() {
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
                let counted = lines.iter().map(|l| (l.budget.unit, &l.balance.scope));
                return Err(self.unit_mismatch(field, unit, counted));
            }
        }
        Ok(())
    }

    /// That a unit is not counted by the budgets that apply, given from the root down. With
    /// Cycles' rules told of the first scope alone.
    pub(super) fn unit_mismatch<'a>(
        &self,
        field: &'static str,
        unit: Unit,
        applicable: impl Iterator<Item = (Unit, &'a Arc<str>)>,
    ) -> Refusal {
        let (mut counted, mut first) = (Vec::new(), None);
        for (unit, scope) in applicable {
            let first = first.get_or_insert(scope);
            if self.config.tenant.settings.cycles.is_none() || *first == scope {
                counted.push(unit);
            }
        }
        counted.sort_unstable();
        counted.dedup();
        Refusal::UnitMismatch {
            field,
            unit,
            counted,
            scope: first.cloned(),
        }
    }
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
    pub(super) fn name(&self) -> String {
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

/// Why a budget lets nothing pass.
fn stop_of(line: &Line) -> Option<ReasonCode> {
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
}

/// Step 5 with Cycles' rules: the first scope, from the root down, that does not let it
/// pass, by its state or by what remains. Only budgets in a unit that is asked for count.
fn first_failing(asked: &Amounts, lines: &[Line], now: Timestamp) -> Option<Denial> {
    let counted = || {
        lines
            .iter()
            .filter(|line| asked.get(line.budget.unit).is_some())
    };
    let denial = counted().find_map(|line| {
        if let Some(code) = stop_of(line) {
            return Some(Denial {
                reasons: vec![line.reason(code, None)],
                retry_after: None,
            });
        }
        let asks = !line.budget.on_exceeded.is_deny();
        short(asked, std::slice::from_ref(line), now).filter(|_| !asks)
    })?;
    // Told of the first scope alone; when it can pass is a matter of all of them.
    let stopped = counted().any(|line| stop_of(line).is_some());
    let wait = short(asked, lines, now).and_then(|denial| denial.retry_after);
    Some(Denial {
        retry_after: wait.filter(|_| !stopped),
        ..denial
    })
}

/// Step 5: every budget that lets nothing pass, strictest first, from the root
/// down.
pub(super) fn stopped<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Vec<Reason> {
    let mut reasons: Vec<_> = lines
        .into_iter()
        .filter_map(|line| stop_of(line).map(|code| line.reason(code, None)))
        .collect();
    reasons.sort_by_key(|reason| reason.code);
    reasons
}

/// Step 8: every balance that is short.
pub(super) fn short(asked: &Amounts, lines: &[Line], now: Timestamp) -> Option<Denial> {
    let mut reasons = Vec::new();
    let mut wait = Some(Duration::ZERO);
    for line in lines {
        let (Some(amount), Some(missing)) = (asked.get(line.budget.unit), line.missing(asked))
        else {
            continue;
        };
        let limit = line.budget.terms.limit;
        let remaining = line.balance.remaining(limit).unwrap_or(i128::MAX);
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
    let mut short = lines.iter().filter(|line| line.missing(asked).is_some());
    short.all(|line| !line.budget.on_exceeded.is_deny())
}

//! What-if: decides a recorded request again under other policies, on what its entry
//! recorded. Nothing is changed by it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::amount::Amount;
use super::answer::Verdict;
use super::budget::{Balance, Limit};
use super::id::BalanceNo;
use super::ladder::{can_be_granted, demanded, deny_for, narrow, short};
use super::ledger::{After, Body, Decision, Movement};
use super::line::{Line, Since};
use super::policy::Policy;
use super::policy::facts::{Asked, Facts};
use super::policy::ruling::rule;
use super::refusal::{Denial, Reason, ReasonCode};
use super::request::Arguments;
use super::tenant::TenantConfig;

/// What would have been decided.
#[derive(Debug)]
pub struct Redecided {
    /// Under the other policies.
    pub verdict: Verdict,
    /// A rule reads arguments that were not kept, and could change the verdict.
    pub unknown: bool,
}

impl Redecided {
    /// Whether it is known to be another decision than the one that was recorded.
    pub fn differs(&self, body: &Body) -> bool {
        if self.unknown {
            return false;
        }
        Some(self.verdict.decision()) != body.decision || self.caps_differ(body)
    }

    /// Whether it is the same decision with other limits.
    pub fn caps_differ(&self, body: &Body) -> bool {
        Some(self.verdict.decision()) == body.decision && self.verdict.caps() != body.caps.as_ref()
    }
}

/// Decides a recorded Decide or Reserve again; nothing for other entries. `balances` are
/// those that its movements name, for their scopes and budgets.
pub fn redecide(
    body: &Body,
    config: &TenantConfig,
    balances: &BTreeMap<BalanceNo, Balance>,
    policies: &[Arc<Policy>],
) -> Option<Redecided> {
    let (subject, action) = (body.subject.as_deref()?, body.action.as_deref()?);
    let was = body.decision?;
    let explanation = body.explanation.as_deref();
    let as_it_was = || Redecided {
        verdict: Verdict::recorded(body),
        unknown: false,
    };
    // What an earlier step denied, policy is not asked about.
    let denied_by = body.reasons.first().map(|reason| reason.code);
    if was == Decision::Deny && denied_by.is_some_and(|code| code < ReasonCode::PolicyDenied) {
        return Some(as_it_was());
    }
    let resolved = match explanation {
        Some(explanation) => explanation.resolved.clone(),
        None => config.resolve(action),
    };
    let Some(resolved) = resolved else {
        return Some(as_it_was());
    };
    let subject = config.placed(subject, action);
    let lines: Vec<Line> = body
        .movements
        .iter()
        .filter_map(|movement| line(movement, config, balances))
        .collect();
    let estimates = body
        .request
        .as_ref()
        .map(|request| request.amounts)
        .unwrap_or_default();
    let asked = demanded(&estimates, Some(&resolved));
    let kept = body.arguments.as_ref().filter(|kept| kept.complete);
    let kept = kept.map(|kept| Arguments::of(kept.value.clone()));
    let arguments = match (&action.arguments_sha256, &kept) {
        (None, _) => Asked::With(None),
        (Some(_), Some(kept)) => Asked::With(Some(kept)),
        (Some(_), None) => Asked::Incomplete,
    };
    let facts = Facts {
        action,
        resolved: Some(&resolved),
        subject: &subject,
        context: &body.context,
        amounts: asked,
        arguments,
        budgets: lines.iter().map(Line::facts).collect(),
        recent: explanation
            .and_then(|explanation| explanation.recent)
            .unwrap_or_default(),
    };
    let ruling = rule(policies, &facts);
    // A rule that denies does so whatever the others would have said.
    let unknown = ruling.uncertain && ruling.denying.is_empty();
    let verdict = (|| {
        if !ruling.denying.is_empty() {
            let reasons = ruling.denying.iter();
            let reasons = reasons
                .map(|by| by.reason(ReasonCode::PolicyDenied))
                .collect();
            return deny_for(reasons, None);
        }
        if let Some(by) = ruling.escalating.iter().find(|by| by.rule.freeze) {
            let frozen = Reason::of_rule(ReasonCode::ScopeFrozen, by.reference());
            return deny_for(vec![frozen], None);
        }
        let by_policy = matches!(
            denied_by,
            Some(ReasonCode::PolicyDenied | ReasonCode::PolicyError)
        );
        if was == Decision::Deny && !by_policy {
            return Verdict::recorded(body);
        }
        // Budgets that a person could fill up waited then as they would now.
        let recorded_waits = body.reasons.iter().filter(|reason| {
            was == Decision::RequireApproval && reason.code == ReasonCode::BudgetExceeded
        });
        let mut waits: Vec<Reason> = recorded_waits.cloned().collect();
        let mut caps = ruling.caps.clone();
        let mut binding = explanation.and_then(|explanation| explanation.binding.clone());
        if by_policy {
            // The steps after policy were not taken then.
            let narrowing = narrow(&lines, &resolved, body.time);
            binding = narrowing.binding;
            caps.tighten(&narrowing.caps);
            if let Some(denial) = narrowing.denial {
                return Verdict::Deny(denial);
            }
            if let Some(denial) = short(&asked, &lines, body.time) {
                if !can_be_granted(&asked, &lines) {
                    return Verdict::Deny(denial);
                }
                waits = denial.reasons;
            }
        }
        let approving = ruling.approving.iter();
        waits.extend(approving.map(|by| by.reason(ReasonCode::ApprovalRequired)));
        if let Some(binding) = &binding {
            let thresholds = lines
                .iter()
                .filter(|line| line.balance.scope == binding.scope);
            for line in thresholds {
                let reached = line.budget.thresholds.iter();
                for threshold in reached.filter(|threshold| threshold.from == binding.from) {
                    caps.tighten(&threshold.caps);
                }
            }
            config.tighten(&mut caps, binding);
        }
        if !waits.is_empty() {
            let denial = Denial {
                reasons: waits,
                retry_after: None,
            };
            return Verdict::RequireApproval(denial, caps);
        }
        if caps.is_empty() {
            Verdict::Allow
        } else {
            Verdict::AllowWithCaps(caps)
        }
    })();
    Some(Redecided { verdict, unknown })
}

/// A balance as it was before an entry.
fn line(
    movement: &Movement,
    config: &TenantConfig,
    balances: &BTreeMap<BalanceNo, Balance>,
) -> Option<Line> {
    let stored = balances.get(&movement.balance)?;
    let mut budget = (**config.budget(stored.budget)?).clone();
    let After(allocated, reserved, spent, debt) = movement.after;
    let before =
        |after: Amount, moved: i64| Amount::clamp(i128::from(after.get()) - i128::from(moved));
    budget.terms.limit = allocated.map_or(Limit::Unlimited, Limit::Allocation);
    let balance = Balance {
        granted: 0,
        reserved: before(reserved, movement.reserved),
        spent: before(spent, movement.spent),
        debt: before(debt, movement.debt),
        ..stored.clone()
    };
    Some(Line {
        budget: Arc::new(budget),
        balance,
        since: Since::Stored {
            lapsed: Amount::ZERO,
        },
    })
}

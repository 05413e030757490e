//! One input of the fuzzer: a condition, a line of `---`, arguments as JSON. Whatever it
//! says, it is refused or evaluated, within bounds, without a panic.

use std::collections::BTreeMap;
use std::sync::Arc;

use remit::domain::activity::Counts;
use remit::domain::amount::{Amounts, Unit};
use remit::domain::caps::Caps;
use remit::domain::catalogue::{ActionLevel, Resolved, Tier};
use remit::domain::id::TenantId;
use remit::domain::narrowing::BasisPoints;
use remit::domain::policy::facts::{Asked, BudgetFacts, Facts};
use remit::domain::policy::ruling::rule;
use remit::domain::policy::{Effect, Match, Mode, Policy, PolicyDocument, Rule};
use remit::domain::request::{Action, Arguments, Context};
use remit::domain::scope::{Levels, Subject};

/// What became of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Became {
    /// The condition was refused.
    Refused,
    /// It was evaluated, and held or not.
    Evaluated(bool),
    /// It could not be evaluated.
    Failed,
}

/// The largest arguments that the server takes.
const ARGUMENTS_MAX: usize = 64 * 1_024;

pub(crate) fn exercise(text: &str) -> Became {
    let (when, arguments) = text.split_once("\n---\n").unwrap_or((text, "{}"));
    let deny = Rule {
        id: "fuzzed".into(),
        description: "".into(),
        matches: Match::default(),
        when: when.into(),
        effect: Effect::Deny,
        mode: Mode::Enforce,
        reason: "".into(),
        caps: Caps::default(),
        approvers: Vec::new(),
        approval_timeout: None,
        freeze: false,
    };
    let document = Arc::new(PolicyDocument {
        rules: vec![Arc::new(deny)],
    });
    let policy = match Policy::compile(document, 1, false) {
        Ok(policy) => Arc::new(policy),
        Err(faults) => {
            assert!(faults.iter().all(|fault| fault.to_string().len() < 1_000));
            return Became::Refused;
        }
    };
    // Its own bound on depth is wider than the server's.
    let Ok(value) = serde_json::from_str::<serde_json::Value>(arguments) else {
        return Became::Refused;
    };
    if !value.is_object() || value.to_string().len() > ARGUMENTS_MAX {
        return Became::Refused;
    }
    let arguments = Arguments::of(value);
    let tenant = TenantId::parse("acme").expect("a tenant");
    let subject = Subject::new(tenant, Levels::default(), BTreeMap::new()).expect("a subject");
    let action = Action {
        name: "send_email".into(),
        kind: None,
        arguments_sha256: None,
    };
    let resolved = Resolved {
        listed_as: None,
        level: ActionLevel::Execute,
        tier: Tier::HIGHEST,
        kind: None,
        toolset: None,
        costs: Amounts::NONE,
    };
    let budget = BudgetFacts {
        scope: "tenant:acme".into(),
        budget_scope: "tenant:acme".into(),
        unit: Unit::RiskPoints,
        period: "TOTAL",
        remaining: Some(i64::MIN),
        used: BasisPoints::ALL,
    };
    let facts = Facts {
        action: &action,
        resolved: Some(&resolved),
        subject: &subject,
        context: &Context::default(),
        amounts: Amounts::NONE,
        arguments: Asked::With(Some(&arguments)),
        budgets: vec![budget],
        recent: Counts::default(),
    };
    let ruling = rule(&[policy], &facts);
    match ruling.matched.first() {
        Some(matched) if matched.error.is_some() => {
            assert!(ruling.denying[0].failed, "what can't be told is denied");
            Became::Failed
        }
        matched => Became::Evaluated(matched.is_some()),
    }
}

//! Policy: versioned rules that deny, cap, ask for a person or raise an incident.
//!
//! A document is checked and compiled when it is provisioned ([`Policy::compile`]); every
//! decision evaluates it on what it knows ([`facts`]) and gets a [`ruling`]. Of all rules
//! that match the strictest effect wins, whatever their order, and a document for all
//! tenants is evaluated beside a tenant's own: nothing can loosen it.

mod check;
mod condition;
pub mod facts;
pub mod ruling;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::approve::ApprovalTimeout;
use super::budget::named;
use super::caps::Caps;
use super::catalogue::{ActionLevel, Pattern, Tier};
use super::id::Malformed;
use super::scope::ScopeFilter;
pub use check::{FUNCTIONS, VARIABLES};
use condition::Condition;

/// Most rules of one document.
pub const RULES_MAX: usize = 100;

named! {
    /// What a rule does, laxest first.
    #[derive(PartialOrd, Ord)]
    Effect {
        /// Nothing but being named in the record: a stricter rule still wins.
        Allow = "ALLOW",
        /// Raises an incident, and freezes the agent where it says so.
        Escalate = "ESCALATE",
        /// The agent must keep caps.
        AllowWithCaps = "ALLOW_WITH_CAPS",
        /// A person has to approve the action.
        RequireApproval = "REQUIRE_APPROVAL",
        /// The action may not happen.
        Deny = "DENY",
    }
}

named! {
    /// Whether a rule counts.
    Mode {
        /// It does.
        Enforce = "ENFORCE",
        /// It is evaluated and recorded, and decides nothing.
        Shadow = "SHADOW",
    }
}

/// Which actions a rule is about. What is empty matches all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Match {
    /// Any of these names or globs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Pattern>,
    /// Any of these kinds or globs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<Pattern>,
    /// Any of these levels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub levels: Vec<ActionLevel>,
    /// This tier or a higher one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_tier: Option<Tier>,
    /// This tier or a lower one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tier: Option<Tier>,
    /// Subjects that have each of these `level:value` pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<ScopeFilter>,
    /// Any of these environments or globs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environments: Vec<Pattern>,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Names it in reasons and records.
    pub id: Box<str>,
    /// For people.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub description: Box<str>,
    /// Which actions it is about.
    #[serde(default)]
    pub matches: Match,
    /// A CEL expression; empty for always.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub when: Box<str>,
    /// What it does.
    pub effect: Effect,
    /// Whether it counts.
    pub mode: Mode,
    /// What a caller is told.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub reason: Box<str>,
    /// ALLOW_WITH_CAPS: which.
    #[serde(default, skip_serializing_if = "Caps::is_empty")]
    pub caps: Caps,
    /// REQUIRE_APPROVAL: groups of which the person must be in one; none for anybody who may
    /// approve.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approvers: Vec<Box<str>>,
    /// REQUIRE_APPROVAL: how long it can be approved; nothing for the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval_timeout: Option<ApprovalTimeout>,
    /// ESCALATE: denies this action and stops the agent until an operator lifts it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freeze: bool,
}

/// A document, as it was provisioned.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyDocument {
    /// Its rules.
    pub rules: Vec<Arc<Rule>>,
}

/// A rule's mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Which rule, from 0.
    pub rule: usize,
    /// Its field.
    pub field: &'static str,
    /// Where in `when`: line and column, from 1.
    pub at: Option<(usize, usize)>,
    /// What is wrong, and how to mend it.
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            Some((line, column)) => {
                write!(f, "line {line}, column {column}: {}", self.text)
            }
            None => f.write_str(&self.text),
        }
    }
}

/// A rule that is ready to be evaluated.
#[derive(Debug)]
struct Compiled {
    rule: Arc<Rule>,
    condition: Option<Condition>,
}

/// A document that is ready to be evaluated.
#[derive(Debug)]
pub struct Policy {
    /// Counts its changes.
    pub version: i64,
    /// It is the one for all tenants.
    pub all_tenants: bool,
    /// As it was provisioned.
    pub document: Arc<PolicyDocument>,
    rules: Vec<Compiled>,
    /// Some rule raises incidents or reads what happened of late.
    pub(super) reads_activity: bool,
    /// Some rule reads what is left of budgets.
    pub(super) reads_budgets: bool,
}

/// Parses the id of a rule.
pub fn rule_id(text: &str) -> Result<Box<str>, Malformed> {
    super::id::Name::parse(text).map(|name| name.display().into())
}

impl Policy {
    /// Checks and compiles a document; every mistake at once.
    pub fn compile(
        document: Arc<PolicyDocument>,
        version: i64,
        all_tenants: bool,
    ) -> Result<Self, Vec<Fault>> {
        let mut faults = Vec::new();
        let mut rules = Vec::with_capacity(document.rules.len());
        for (at, rule) in document.rules.iter().enumerate() {
            match compile_rule(at, rule) {
                Ok(compiled) => rules.push(compiled),
                Err(mut found) => faults.append(&mut found),
            }
        }
        faults.extend(contradictions(&document));
        if !faults.is_empty() {
            faults.sort_by_key(|fault| fault.rule);
            return Err(faults);
        }
        let reads_activity = rules.iter().any(|compiled| {
            let condition = compiled.condition.as_ref();
            compiled.rule.effect == Effect::Escalate
                || condition.is_some_and(Condition::reads_activity)
        });
        let reads_budgets = rules.iter().any(|compiled| {
            let condition = compiled.condition.as_ref();
            condition.is_some_and(|condition| {
                ["remaining", "utilization", "budgets"]
                    .into_iter()
                    .any(|variable| condition.reads(variable))
            })
        });
        Ok(Self {
            version,
            all_tenants,
            document,
            rules,
            reads_activity,
            reads_budgets,
        })
    }
}

fn compile_rule(at: usize, rule: &Arc<Rule>) -> Result<Compiled, Vec<Fault>> {
    let mut faults = Vec::new();
    let mut bad = |field, text: &str| {
        faults.push(Fault {
            rule: at,
            field,
            at: None,
            text: text.to_owned(),
        });
    };
    let matches = &rule.matches;
    if let (Some(min), Some(max)) = (matches.min_tier, matches.max_tier)
        && min > max
    {
        bad("match.max_tier", "matches nothing: it is below min_tier");
    }
    match (rule.effect, rule.caps.is_empty()) {
        (Effect::AllowWithCaps, true) => bad("caps", "needed with EFFECT_ALLOW_WITH_CAPS"),
        (Effect::AllowWithCaps, false) | (_, true) => {}
        (_, false) => bad("caps", "only with EFFECT_ALLOW_WITH_CAPS"),
    }
    let approves = !rule.approvers.is_empty() || rule.approval_timeout.is_some();
    if approves && rule.effect != Effect::RequireApproval {
        bad("approvers", "only with RULE_EFFECT_REQUIRE_APPROVAL");
    }
    if rule.freeze && rule.effect != Effect::Escalate {
        bad("freeze", "only with EFFECT_ESCALATE");
    }
    let condition = match &*rule.when {
        "" => None,
        text => match Condition::compile(text) {
            Ok(condition) => {
                match condition.constant() {
                    Some(false) => bad("when", "is never true: the rule can't be reached"),
                    Some(true) => bad("when", "is always true: leave it out"),
                    None => {}
                }
                Some(condition)
            }
            Err((place, text)) => {
                faults.push(Fault {
                    rule: at,
                    field: "when",
                    at: place,
                    text,
                });
                None
            }
        },
    };
    if faults.is_empty() {
        Ok(Compiled {
            rule: rule.clone(),
            condition,
        })
    } else {
        Err(faults)
    }
}

/// Rules that can't have an effect beside another one.
fn contradictions(document: &PolicyDocument) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (at, rule) in document.rules.iter().enumerate() {
        let mut bad = |field, text: String| {
            faults.push(Fault {
                rule: at,
                field,
                at: None,
                text,
            });
        };
        let before = &document.rules[..at];
        if before.iter().any(|other| other.id == rule.id) {
            bad("id", format!("{:?} names another rule already", rule.id));
        }
        if rule.mode == Mode::Shadow {
            continue;
        }
        let others = document.rules.iter().enumerate();
        let enforced = others.filter(|(_, other)| other.mode == Mode::Enforce);
        for (other_at, other) in enforced {
            if other_at == at {
                continue;
            }
            let same = other.matches == rule.matches && other.when == rule.when;
            if same && other_at < at && other.effect != rule.effect && decides(rule, other) {
                bad(
                    "effect",
                    format!(
                        "{} contradicts rule {:?}, which says {} of the same actions",
                        rule.effect, other.id, other.effect
                    ),
                );
                break;
            }
            let denies_all = other.effect == Effect::Deny && other.when.is_empty();
            if denies_all
                && !same
                && rule.effect != Effect::Escalate
                && other.matches.covers(&rule.matches)
            {
                bad(
                    "match",
                    format!(
                        "can't be reached: rule {:?} denies all that it matches",
                        other.id
                    ),
                );
                break;
            }
        }
    }
    faults
}

/// Whether both rules decide: an incident can be raised beside any decision.
fn decides(rule: &Rule, other: &Rule) -> bool {
    rule.effect != Effect::Escalate && other.effect != Effect::Escalate
}

impl Match {
    /// Whether everything that the other one matches is matched by this one too, as far
    /// as their texts tell.
    fn covers(&self, other: &Self) -> bool {
        fn any_of<T: PartialEq>(own: &[T], other: &[T]) -> bool {
            own.is_empty() || (!other.is_empty() && other.iter().all(|item| own.contains(item)))
        }
        fn globs(own: &[Pattern], other: &[Pattern]) -> bool {
            let covered = |item: &Pattern| {
                own.iter()
                    .any(|glob| glob == item || (!item.is_glob() && glob.matches(item.as_str())))
            };
            own.is_empty() || (!other.is_empty() && other.iter().all(covered))
        }
        globs(&self.tools, &other.tools)
            && globs(&self.kinds, &other.kinds)
            && any_of(&self.levels, &other.levels)
            && globs(&self.environments, &other.environments)
            && self
                .min_tier
                .is_none_or(|min| other.min_tier.is_some_and(|tier| tier >= min))
            && self
                .max_tier
                .is_none_or(|max| other.max_tier.is_some_and(|tier| tier <= max))
            && (self.scope.is_none() || self.scope == other.scope)
    }
}

/// Whether a rule's change can let through what it stopped: it is gone, counts no more,
/// does less, or is about other actions. A condition that differs counts as looser, since
/// nothing can tell.
pub fn loosens(before: &PolicyDocument, after: &PolicyDocument) -> Option<Box<str>> {
    let stops = |rule: &&Arc<Rule>| rule.mode == Mode::Enforce && rule.effect != Effect::Allow;
    before
        .rules
        .iter()
        .filter(stops)
        .find(|old| {
            let kept = after.rules.iter().find(|new| new.id == old.id);
            kept.is_none_or(|new| {
                new.mode != Mode::Enforce
                    || new.effect < old.effect
                    || (old.effect == Effect::Escalate && new.effect != Effect::Escalate)
                    || new.when != old.when
                    || !new.matches.covers(&old.matches)
                    || (old.freeze && !new.freeze)
                    || (new.effect == old.effect && new.caps != old.caps)
                    || (new.effect == old.effect && new.approvers != old.approvers)
            })
        })
        .map(|rule| rule.id.clone())
}

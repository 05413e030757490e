//! What the rules say of one action: every rule that matches, and what follows from them.

use std::sync::Arc;

use cel::Context;
use serde::{Deserialize, Serialize};

use super::condition::{self, COSTS_MAX, Condition};
use super::facts::{Asked, Facts};
use super::{Compiled, Effect, Match, Mode, Policy, Rule};
use crate::domain::caps::Caps;

/// A rule that matched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matched {
    /// Its id.
    pub rule: Box<str>,
    /// It is one of those for all tenants.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub all_tenants: bool,
    /// What it does.
    pub effect: Effect,
    /// Whether it counted.
    pub mode: Mode,
    /// Its condition could not be evaluated, and so counted as true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Box<str>>,
}

/// A rule that decides.
#[derive(Debug, Clone)]
pub struct Deciding {
    /// It.
    pub rule: Arc<Rule>,
    /// It is one of those for all tenants.
    pub all_tenants: bool,
    /// Its condition could not be evaluated.
    pub failed: bool,
}

/// What the rules say together.
#[derive(Debug, Clone, Default)]
pub struct Ruling {
    /// Every rule that matched, in the order of documents: first those for all tenants.
    pub matched: Vec<Matched>,
    /// Enforced rules that deny.
    pub denying: Vec<Deciding>,
    /// Enforced rules that want a person.
    pub approving: Vec<Deciding>,
    /// Enforced rules that raise an incident.
    pub escalating: Vec<Deciding>,
    /// The tightest of all caps.
    pub caps: Caps,
    /// Some rule reads arguments that are not known.
    pub uncertain: bool,
}

impl Match {
    /// Whether an action is one of those that the rule is about.
    fn includes(&self, facts: &Facts) -> bool {
        fn any(patterns: &[super::Pattern], text: &str) -> bool {
            patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(text))
        }
        let resolved = facts.resolved;
        let kind = match resolved {
            Some(resolved) => resolved.kind.as_deref(),
            None => facts.action.kind.as_deref(),
        };
        // An unknown action counts as everything that it could be.
        let level = |level| resolved.is_none_or(|resolved| resolved.level == level);
        let tier = |fits: &dyn Fn(super::Tier) -> bool| resolved.is_none_or(|r| fits(r.tier));
        any(&self.tools, &facts.action.name)
            && any(&self.kinds, kind.unwrap_or_default())
            && any(&self.environments, &facts.context.environment)
            && (self.levels.is_empty() || self.levels.iter().any(|of| level(*of)))
            && self.min_tier.is_none_or(|min| tier(&|tier| tier >= min))
            && self.max_tier.is_none_or(|max| tier(&|tier| tier <= max))
            && self
                .scope
                .as_ref()
                .is_none_or(|scope| scope.matches(facts.subject))
    }
}

/// Evaluates every rule of some policies.
pub fn rule(policies: &[Arc<Policy>], facts: &Facts) -> Ruling {
    let mut ruling = Ruling::default();
    let included = || {
        let rules = policies
            .iter()
            .flat_map(|policy| policy.rules.iter().map(move |rule| (policy, rule)));
        rules.filter(|(_, compiled)| compiled.rule.matches.includes(facts))
    };
    let mut context: Option<Context> = None;
    let size = facts.size();
    let mut left = COSTS_MAX;
    for (policy, compiled) in included() {
        let holds = match &compiled.condition {
            None => Ok(true),
            Some(condition) if condition.reads("args") => match facts.arguments {
                Asked::With(_) => {
                    let context =
                        context.get_or_insert_with(|| prepared(included().map(|(_, c)| c), facts));
                    condition.holds(context, size, &mut left)
                }
                Asked::Unknown => Err("the arguments are not known any more".to_owned()),
                Asked::Incomplete => {
                    ruling.uncertain = true;
                    Ok(false)
                }
            },
            Some(condition) => {
                let context =
                    context.get_or_insert_with(|| prepared(included().map(|(_, c)| c), facts));
                condition.holds(context, size, &mut left)
            }
        };
        if holds != Ok(false) {
            ruling.take(policy, compiled, holds.err());
        }
    }
    ruling
}

/// A context with all that some rules read.
fn prepared<'a>(
    rules: impl Iterator<Item = &'a Compiled> + Clone,
    facts: &Facts,
) -> Context<'static, 'static> {
    let conditions = || {
        rules
            .clone()
            .filter_map(|compiled| compiled.condition.as_ref())
    };
    let mut context = condition::context(conditions().flat_map(Condition::patterns));
    for (variable, _) in super::VARIABLES {
        if conditions().any(|condition| condition.reads(variable)) {
            context.add_variable_from_value(variable, facts.value(variable));
        }
    }
    context
}

impl Ruling {
    fn take(&mut self, policy: &Policy, compiled: &Compiled, error: Option<String>) {
        let rule = &compiled.rule;
        let failed = error.is_some();
        self.matched.push(Matched {
            rule: rule.id.clone(),
            all_tenants: policy.all_tenants,
            effect: rule.effect,
            mode: rule.mode,
            error: error.map(Into::into),
        });
        if rule.mode == Mode::Shadow {
            return;
        }
        let deciding = Deciding {
            rule: rule.clone(),
            all_tenants: policy.all_tenants,
            failed,
        };
        match rule.effect {
            Effect::Deny => self.denying.push(deciding),
            Effect::RequireApproval => self.approving.push(deciding),
            Effect::AllowWithCaps => self.caps.tighten(&rule.caps),
            // Nobody is reported, or stopped, over a condition that says nothing.
            Effect::Escalate if failed => {}
            Effect::Escalate => self.escalating.push(deciding),
            Effect::Allow => {}
        }
    }
}

//! Messages about what beside budgets decides: policies, thresholds, freezes, caps, and what
//! a decision went by.

use std::collections::HashSet;
use std::sync::Arc;

use super::catalogue::{level, level_message};
use super::{duration, time, unit};
use crate::api::fields::Fields;
use crate::domain::amount::Amount;
use crate::domain::approve::{ApprovalTimeout, GROUPS_MAX};
use crate::domain::budget::OnExceeded;
use crate::domain::caps::Caps;
use crate::domain::catalogue::{Pattern, Tier};
use crate::domain::id::{Name, TenantId};
use crate::domain::ledger::{Explanation, Versioned};
use crate::domain::narrowing::{BasisPoints, Highest, Threshold, rising};
use crate::domain::policy::ruling::Matched;
use crate::domain::policy::{
    Effect, Match, Mode, Policy, PolicyDocument, RULES_MAX, Rule, rule_id,
};
use crate::domain::provision::FreezeSpec;
use crate::domain::scope::{Scope, ScopeFilter};
use crate::domain::tenant::{Freeze, KEPT_BYTES_MAX, KeepArguments};
use crate::proto;

/// Most values of one list of a rule.
const LIST_MAX: usize = 100;

/// What is kept of arguments.
pub(super) fn keep_arguments(
    fields: &mut Fields,
    at: &str,
    message: proto::KeepArguments,
) -> Option<KeepArguments> {
    let proto::KeepArguments {
        hidden_fields,
        max_bytes,
    } = message;
    if hidden_fields.len() > LIST_MAX {
        fields.bad(format!("{at}.hidden_fields"), format!("at most {LIST_MAX}"));
    }
    let hidden_fields = hidden_fields
        .into_iter()
        .enumerate()
        .map(|(n, field)| fields.text(&format!("{at}.hidden_fields[{n}]"), field, 128))
        .collect();
    let most = u32::try_from(max_bytes).ok();
    let Some(max_bytes) = most.filter(|most| (1..=KEPT_BYTES_MAX).contains(most)) else {
        fields.bad(format!("{at}.max_bytes"), format!("1 to {KEPT_BYTES_MAX}"));
        return None;
    };
    Some(KeepArguments {
        hidden_fields,
        max_bytes,
    })
}

/// Words what is kept of arguments.
pub(super) fn keep_arguments_message(keep: &KeepArguments) -> proto::KeepArguments {
    proto::KeepArguments {
        hidden_fields: keep.hidden_fields.iter().map(ToString::to_string).collect(),
        max_bytes: i32::try_from(keep.max_bytes).unwrap_or(i32::MAX),
    }
}

fn caps(fields: &mut Fields, at: &str, message: Option<proto::Caps>, lists: bool) -> Caps {
    let proto::Caps {
        max_tokens,
        max_steps_remaining,
        tool_allowlist,
        tool_denylist,
        cooldown_ms,
    } = message.unwrap_or_default();
    let names_tools = !tool_allowlist.is_empty() || !tool_denylist.is_empty();
    if names_tools && !lists {
        fields.bad(at, "without lists of tools: they follow from the catalogue");
    }
    let mut count = |field: &str, value: Option<i64>| {
        value.and_then(|value| fields.take(&format!("{at}.{field}"), Amount::new(value)))
    };
    let max_tokens = count("max_tokens", max_tokens);
    let max_steps_remaining = count("max_steps_remaining", max_steps_remaining);
    let cooldown_ms = count("cooldown_ms", cooldown_ms);
    let mut tools = |field: &str, tools: Vec<String>| -> Arc<[Box<str>]> {
        let tools = patterns(fields, &format!("{at}.{field}"), tools);
        tools.iter().map(|tool| tool.as_str().into()).collect()
    };
    let allowed = tools("tool_allowlist", tool_allowlist);
    Caps {
        max_tokens,
        max_steps_remaining,
        tool_allowlist: (!allowed.is_empty()).then_some(allowed),
        tool_denylist: tools("tool_denylist", tool_denylist),
        cooldown_ms,
    }
}

/// Words caps.
pub(super) fn caps_message(caps: &Caps) -> proto::Caps {
    let count = |amount: Option<Amount>| amount.map(Amount::get);
    let names = |tools: &[Box<str>]| tools.iter().map(ToString::to_string).collect();
    // On the wire an empty list leaves every tool: the empty name stands for none.
    let only = |tools: &[Box<str>]| match tools {
        [] => vec![String::new()],
        tools => names(tools),
    };
    proto::Caps {
        max_tokens: count(caps.max_tokens),
        max_steps_remaining: count(caps.max_steps_remaining),
        tool_allowlist: caps.tool_allowlist.as_deref().map_or_else(Vec::new, only),
        tool_denylist: names(&caps.tool_denylist),
        cooldown_ms: count(caps.cooldown_ms),
    }
}

/// A budget's thresholds.
pub(super) fn thresholds(
    fields: &mut Fields,
    at: &str,
    messages: Vec<proto::Threshold>,
) -> Option<Arc<[Threshold]>> {
    let mut parsed = Vec::new();
    for (n, message) in messages.into_iter().enumerate() {
        let at = format!("{at}[{n}]");
        let proto::Threshold {
            from_basis_points,
            max_tier,
            caps: caps_of,
        } = message;
        let from = fields.take(
            &format!("{at}.from_basis_points"),
            BasisPoints::new(from_basis_points),
        );
        let highest = match max_tier {
            None => None,
            Some(0) => Some(Highest::Nothing),
            Some(tier) => {
                let tier = Tier::new(tier).map_err(|_| crate::domain::id::Malformed::new("0 to 5"));
                fields
                    .take(&format!("{at}.max_tier"), tier)
                    .map(Highest::Tier)
            }
        };
        let caps = caps(fields, &format!("{at}.caps"), caps_of, false);
        parsed.extend(from.map(|from| Threshold {
            from,
            highest,
            caps,
        }));
    }
    fields.take(at, rising(parsed)).map(Into::into)
}

/// Words a budget's thresholds.
pub(super) fn threshold_messages(thresholds: &[Threshold]) -> Vec<proto::Threshold> {
    let word = |threshold: &Threshold| proto::Threshold {
        from_basis_points: i32::try_from(threshold.from.get()).unwrap_or(i32::MAX),
        max_tier: threshold.highest.map(highest_number),
        caps: (!threshold.caps.is_empty()).then(|| caps_message(&threshold.caps)),
    };
    thresholds.iter().map(word).collect()
}

fn highest_number(highest: Highest) -> i32 {
    highest.tier().map_or(0, |tier| tier.get().into())
}

fn patterns(fields: &mut Fields, at: &str, texts: Vec<String>) -> Vec<Pattern> {
    if texts.len() > LIST_MAX {
        fields.bad(at, format!("at most {LIST_MAX}"));
        return Vec::new();
    }
    let texts = texts.into_iter().enumerate();
    texts
        .filter_map(|(n, text)| fields.take(&format!("{at}[{n}]"), Pattern::parse(&text)))
        .collect()
}

/// A policy, checked as a whole, and whose it is: that of the operators for all tenants.
pub fn policy(
    fields: &mut Fields,
    at: &str,
    message: proto::Policy,
) -> Option<(TenantId, Arc<PolicyDocument>)> {
    let proto::Policy {
        tenant,
        all_tenants,
        rules,
        version: _,
    } = message;
    let prefix = |field: &str| format!("{at}{}{field}", if at.is_empty() { "" } else { "." });
    let tenant = match (tenant.as_str(), all_tenants) {
        ("", true) => Some(TenantId::system()),
        (_, true) => {
            fields.bad(prefix("tenant"), "empty with all_tenants");
            None
        }
        (tenant, false) => fields.take(&prefix("tenant"), TenantId::parse(tenant)),
    };
    if rules.len() > RULES_MAX {
        fields.bad(prefix("rules"), format!("at most {RULES_MAX}"));
        return None;
    }
    let wanted = rules.len();
    let mut parsed = Vec::with_capacity(wanted);
    for (n, rule_message) in rules.into_iter().enumerate() {
        let at = prefix(&format!("rules[{n}]"));
        parsed.extend(rule(fields, &at, rule_message).map(Arc::new));
    }
    if parsed.len() < wanted {
        // Numbers of rules would not be those of the message.
        return None;
    }
    let document = Arc::new(PolicyDocument { rules: parsed });
    if let Err(faults) = Policy::compile(document.clone(), 0, all_tenants) {
        for fault in faults {
            let at = prefix(&format!("rules[{}].{}", fault.rule, fault.field));
            fields.fault(at, fault.to_string());
        }
    }
    Some((tenant?, document))
}

fn rule(fields: &mut Fields, at: &str, message: proto::Rule) -> Option<Rule> {
    let proto::Rule {
        id,
        description,
        r#match,
        when,
        effect,
        mode,
        reason,
        caps: caps_of,
        freeze,
        approvers,
        approval_timeout,
    } = message;
    let id = fields.take(&format!("{at}.id"), rule_id(&id));
    let description = fields.text(&format!("{at}.description"), description, 1_024);
    let matches = matches(fields, &format!("{at}.match"), r#match.unwrap_or_default());
    let when = fields.text(&format!("{at}.when"), when.trim_end().to_owned(), 1_024);
    let effect = match proto::RuleEffect::try_from(effect) {
        Ok(proto::RuleEffect::Deny) => Some(Effect::Deny),
        Ok(proto::RuleEffect::RequireApproval) => Some(Effect::RequireApproval),
        Ok(proto::RuleEffect::AllowWithCaps) => Some(Effect::AllowWithCaps),
        Ok(proto::RuleEffect::Escalate) => Some(Effect::Escalate),
        Ok(proto::RuleEffect::Allow) => Some(Effect::Allow),
        Ok(proto::RuleEffect::Unspecified) | Err(_) => {
            fields.bad(
                format!("{at}.effect"),
                "a RuleEffect, for example RULE_EFFECT_DENY",
            );
            None
        }
    };
    let mode = match proto::RuleMode::try_from(mode) {
        Ok(proto::RuleMode::Unspecified | proto::RuleMode::Enforce) => Some(Mode::Enforce),
        Ok(proto::RuleMode::Shadow) => Some(Mode::Shadow),
        Err(_) => {
            fields.bad(format!("{at}.mode"), "a known RuleMode");
            None
        }
    };
    let reason = fields.text(&format!("{at}.reason"), reason, 1_024);
    let caps = caps(fields, &format!("{at}.caps"), caps_of, true);
    let approvers = groups(fields, &format!("{at}.approvers"), approvers);
    let field = format!("{at}.approval_timeout");
    let timeout = fields.duration(&field, approval_timeout);
    let approval_timeout =
        timeout.and_then(|timeout| fields.take(&field, ApprovalTimeout::new(timeout)));
    Some(Rule {
        id: id?,
        description,
        matches: matches?,
        when,
        effect: effect?,
        mode: mode?,
        reason,
        caps,
        approvers,
        approval_timeout,
        freeze,
    })
}

/// Names of groups.
pub(super) fn groups(fields: &mut Fields, at: &str, names: Vec<String>) -> Vec<Box<str>> {
    if names.len() > GROUPS_MAX {
        fields.bad(at, format!("at most {GROUPS_MAX}"));
        return Vec::new();
    }
    let names = names.into_iter().enumerate();
    names
        .filter_map(|(n, name)| {
            let name = fields.take(&format!("{at}[{n}]"), Name::parse(&name))?;
            Some(name.canonical().into())
        })
        .collect()
}

/// What happens to an action that a budget has not enough for.
pub(super) fn on_exceeded(
    fields: &mut Fields,
    at: &str,
    message: Option<proto::OnExceeded>,
) -> OnExceeded {
    let proto::OnExceeded {
        require_approval,
        approvers,
    } = message.unwrap_or_default();
    let approvers = groups(fields, &format!("{at}.approvers"), approvers);
    if !require_approval {
        if !approvers.is_empty() {
            fields.bad(format!("{at}.approvers"), "empty without require_approval");
        }
        return OnExceeded::Deny;
    }
    OnExceeded::RequireApproval {
        approvers: approvers.into(),
    }
}

/// Words what happens to an action that a budget has not enough for.
pub(super) fn on_exceeded_message(on_exceeded: &OnExceeded) -> Option<proto::OnExceeded> {
    match on_exceeded {
        OnExceeded::Deny => None,
        OnExceeded::RequireApproval { approvers } => Some(proto::OnExceeded {
            require_approval: true,
            approvers: approvers.iter().map(ToString::to_string).collect(),
        }),
    }
}

fn matches(fields: &mut Fields, at: &str, message: proto::RuleMatch) -> Option<Match> {
    let proto::RuleMatch {
        tools,
        kinds,
        levels,
        min_tier,
        max_tier,
        scope,
        environments,
    } = message;
    let tools = patterns(fields, &format!("{at}.tools"), tools);
    let kinds = patterns(fields, &format!("{at}.kinds"), kinds);
    let environments = patterns(fields, &format!("{at}.environments"), environments);
    let levels = levels.into_iter().enumerate();
    let levels = levels
        .filter_map(|(n, value)| level(fields, &format!("{at}.levels[{n}]"), value))
        .collect();
    let mut tier = |field: &str, value: i32| match value {
        0 => None,
        value => fields.take(&format!("{at}.{field}"), Tier::new(value)),
    };
    let (min_tier, max_tier) = (tier("min_tier", min_tier), tier("max_tier", max_tier));
    let scope = match scope.as_str() {
        "" => None,
        text => Some(fields.take(&format!("{at}.scope"), ScopeFilter::parse(text))?),
    };
    Some(Match {
        tools,
        kinds,
        levels,
        min_tier,
        max_tier,
        scope,
        environments,
    })
}

/// Words a policy.
pub fn policy_message(tenant: &TenantId, policy: &Versioned<PolicyDocument>) -> proto::Policy {
    proto::Policy {
        tenant: if tenant.is_system() {
            String::new()
        } else {
            tenant.to_string()
        },
        all_tenants: tenant.is_system(),
        rules: policy
            .document
            .rules
            .iter()
            .map(|rule| rule_message(rule))
            .collect(),
        version: policy.version,
    }
}

fn rule_message(rule: &Rule) -> proto::Rule {
    let texts = |patterns: &[Pattern]| patterns.iter().map(Pattern::to_string).collect();
    let tier = |tier: Option<Tier>| tier.map_or(0, |tier| tier.get().into());
    let matches = &rule.matches;
    let match_message = proto::RuleMatch {
        tools: texts(&matches.tools),
        kinds: texts(&matches.kinds),
        levels: matches
            .levels
            .iter()
            .map(|of| level_message(*of).into())
            .collect(),
        min_tier: tier(matches.min_tier),
        max_tier: tier(matches.max_tier),
        scope: matches
            .scope
            .as_ref()
            .map_or_else(String::new, |scope| scope.as_str().to_owned()),
        environments: texts(&matches.environments),
    };
    proto::Rule {
        id: rule.id.to_string(),
        description: rule.description.to_string(),
        r#match: (*matches != Match::default()).then_some(match_message),
        when: rule.when.to_string(),
        effect: effect_message(rule.effect).into(),
        mode: mode_message(rule.mode).into(),
        reason: rule.reason.to_string(),
        caps: (!rule.caps.is_empty()).then(|| caps_message(&rule.caps)),
        freeze: rule.freeze,
        approvers: rule.approvers.iter().map(ToString::to_string).collect(),
        approval_timeout: rule.approval_timeout.map(|timeout| duration(timeout.get())),
    }
}

fn effect_message(effect: Effect) -> proto::RuleEffect {
    match effect {
        Effect::Deny => proto::RuleEffect::Deny,
        Effect::RequireApproval => proto::RuleEffect::RequireApproval,
        Effect::AllowWithCaps => proto::RuleEffect::AllowWithCaps,
        Effect::Escalate => proto::RuleEffect::Escalate,
        Effect::Allow => proto::RuleEffect::Allow,
    }
}

fn mode_message(mode: Mode) -> proto::RuleMode {
    match mode {
        Mode::Enforce => proto::RuleMode::Enforce,
        Mode::Shadow => proto::RuleMode::Shadow,
    }
}

/// What names a freeze, once in a document.
pub(super) fn frozen_scope(
    fields: &mut Fields,
    at: &str,
    scope: &str,
    seen: &mut HashSet<Scope>,
) -> Option<Scope> {
    let parsed = Scope::parse_concrete(scope).and_then(|scope| scope.tenant().map(|_| scope));
    let scope = fields.take(&format!("{at}.scope"), parsed)?;
    if !seen.insert(scope.clone()) {
        fields.bad(format!("{at}.scope"), "named once in a document");
    }
    Some(scope)
}

/// A freeze, as it shall be.
pub(super) fn freeze(
    fields: &mut Fields,
    at: &str,
    message: proto::Freeze,
    seen: &mut HashSet<Scope>,
) -> Option<FreezeSpec> {
    let proto::Freeze {
        scope,
        reason,
        rule_id: _,
        create_time: _,
    } = message;
    let scope = frozen_scope(fields, at, &scope, seen);
    let reason = fields.text(&format!("{at}.reason"), reason, 1_024);
    scope.map(|scope| FreezeSpec { scope, reason })
}

/// Words a freeze.
pub fn freeze_message(freeze: &Freeze) -> proto::Freeze {
    proto::Freeze {
        scope: freeze.scope.to_string(),
        reason: freeze.reason.to_string(),
        rule_id: freeze
            .rule
            .as_ref()
            .map_or_else(String::new, |rule| rule.id.to_string()),
        create_time: Some(time(freeze.since)),
    }
}

/// Words what a decision went by.
pub(super) fn explanation_message(explanation: &Explanation) -> proto::Explanation {
    let resolved = explanation.resolved.as_ref();
    let listed = resolved.and_then(|resolved| resolved.listed_as.as_ref());
    let recent = explanation.recent.unwrap_or_default();
    let binding = explanation.binding.as_ref();
    proto::Explanation {
        catalogue_version: explanation.versions.catalogue,
        policy_version: explanation.versions.policy,
        all_tenants_policy_version: explanation.versions.all_tenants,
        listed_as: listed.map_or_else(String::new, Pattern::to_string),
        level: resolved.map_or(0, |resolved| level_message(resolved.level).into()),
        tier: resolved.map_or(0, |resolved| resolved.tier.get().into()),
        matched: explanation.matched.iter().map(matched_message).collect(),
        recent_actions: recent.actions.into(),
        recent_denials: recent.denials.into(),
        narrowed_scope: binding.map_or_else(String::new, |b| b.scope.to_string()),
        narrowed_unit: binding.map_or(0, |b| unit(b.unit).into()),
        narrowed_utilization: binding.map_or(0, |b| b.used.get().into()),
        narrowed_from: binding.map_or(0, |b| b.from.get().into()),
        narrowed_max_tier: binding.and_then(|b| b.highest).map(highest_number),
    }
}

fn matched_message(matched: &Matched) -> proto::MatchedRule {
    proto::MatchedRule {
        rule_id: matched.rule.to_string(),
        of_all_tenants: matched.all_tenants,
        effect: effect_message(matched.effect).into(),
        mode: mode_message(matched.mode).into(),
        error: matched.error.as_deref().unwrap_or_default().to_owned(),
    }
}

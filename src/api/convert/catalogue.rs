//! Messages about the catalogue: tools, and what an action without one is taken for.

use std::collections::HashSet;

use super::amounts;
use crate::api::fields::Fields;
use crate::domain::catalogue::{ActionLevel, Pattern, Tier, Tool, UnknownAction};
use crate::domain::id::TenantId;
use crate::domain::request::action_name;
use crate::proto;

/// A level of an action.
pub(super) fn level(fields: &mut Fields, field: &str, value: i32) -> Option<ActionLevel> {
    match proto::ActionLevel::try_from(value) {
        Ok(proto::ActionLevel::Read) => Some(ActionLevel::Read),
        Ok(proto::ActionLevel::Write) => Some(ActionLevel::Write),
        Ok(proto::ActionLevel::Execute) => Some(ActionLevel::Execute),
        Ok(proto::ActionLevel::Delete) => Some(ActionLevel::Delete),
        Ok(proto::ActionLevel::Unspecified) | Err(_) => {
            fields.bad(
                field,
                "one of ACTION_LEVEL_READ, ACTION_LEVEL_WRITE, ACTION_LEVEL_EXECUTE, ACTION_LEVEL_DELETE",
            );
            None
        }
    }
}

/// Words a level.
pub(super) fn level_message(level: ActionLevel) -> proto::ActionLevel {
    match level {
        ActionLevel::Read => proto::ActionLevel::Read,
        ActionLevel::Write => proto::ActionLevel::Write,
        ActionLevel::Execute => proto::ActionLevel::Execute,
        ActionLevel::Delete => proto::ActionLevel::Delete,
    }
}

/// What unknown actions are taken for.
pub(super) fn unknown_action(
    fields: &mut Fields,
    at: &str,
    message: proto::UnknownAction,
) -> Option<UnknownAction> {
    let proto::UnknownAction {
        deny,
        level: level_value,
        tier,
        costs,
    } = message;
    if deny {
        if level_value != 0 || tier != 0 || !costs.is_empty() {
            fields.bad(at, "either deny: true, or a level, a tier and costs");
        }
        return Some(UnknownAction::Deny);
    }
    let level = level(fields, &format!("{at}.level"), level_value);
    let tier = fields.take(&format!("{at}.tier"), Tier::new(tier));
    let costs = fields.amounts(&format!("{at}.costs"), costs);
    Some(UnknownAction::As {
        level: level?,
        tier: tier?,
        costs,
    })
}

/// Words what unknown actions are taken for.
pub(super) fn unknown_action_message(unknown: &UnknownAction) -> proto::UnknownAction {
    match unknown {
        UnknownAction::Deny => proto::UnknownAction {
            deny: true,
            ..proto::UnknownAction::default()
        },
        UnknownAction::As { level, tier, costs } => proto::UnknownAction {
            deny: false,
            level: level_message(*level).into(),
            tier: tier.get().into(),
            costs: amounts(costs),
        },
    }
}

/// A tool, as it shall be.
pub(super) fn tool(
    fields: &mut Fields,
    at: &str,
    message: proto::Tool,
    seen: &mut HashSet<(TenantId, String)>,
) -> Option<(TenantId, Tool)> {
    let proto::Tool {
        tenant,
        name,
        level: level_value,
        tier,
        kind,
        toolset,
        costs,
    } = message;
    let named = tool_name(fields, at, &tenant, &name, seen);
    let level = level(fields, &format!("{at}.level"), level_value);
    let tier = fields.take(&format!("{at}.tier"), Tier::new(tier));
    let kind = match kind.as_str() {
        "" => None,
        kind => fields.take(&format!("{at}.kind"), action_name(kind)),
    };
    let toolset = fields.name(&format!("{at}.toolset"), &toolset);
    let costs = fields.amounts(&format!("{at}.costs"), costs);
    let (tenant, name) = named?;
    let tool = Tool {
        name,
        level: level?,
        tier: tier?,
        kind,
        toolset,
        costs,
    };
    Some((tenant, tool))
}

/// What names a tool, once in a document.
pub(super) fn tool_name(
    fields: &mut Fields,
    at: &str,
    tenant: &str,
    name: &str,
    seen: &mut HashSet<(TenantId, String)>,
) -> Option<(TenantId, Pattern)> {
    let tenant = fields.take(&format!("{at}.tenant"), TenantId::parse(tenant));
    let name = fields.take(&format!("{at}.name"), Pattern::parse(name));
    let (tenant, name) = tenant.zip(name)?;
    if !seen.insert((tenant.clone(), name.as_str().to_owned())) {
        fields.bad(
            format!("{at}.name"),
            "named once in a document with its tenant",
        );
    }
    Some((tenant, name))
}

/// Words a tool.
pub fn tool_message(tenant: &TenantId, tool: &Tool) -> proto::Tool {
    proto::Tool {
        tenant: tenant.to_string(),
        name: tool.name.to_string(),
        level: level_message(tool.level).into(),
        tier: tool.tier.get().into(),
        kind: tool.kind.as_deref().unwrap_or_default().to_owned(),
        toolset: tool
            .toolset
            .as_ref()
            .map_or_else(String::new, |name| name.display().to_owned()),
        costs: amounts(&tool.costs),
    }
}

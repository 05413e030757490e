//! What a document says about tenants, and tenants in answers.

use std::collections::HashSet;
use std::time::Duration;

use super::{catalogue, duration, overage_policy, parse_overage_policy, rules, time};
use crate::api::fields::Fields;
use crate::domain::id::TenantId;
use crate::domain::provision::TenantSpec;
use crate::domain::request::{OveragePolicy, Ttl};
use crate::domain::tenant::{
    ActivityWindow, CyclesRules, Settings, Tenant, TenantState, UnprovisionedRule,
};
use crate::proto;

/// Takes a document's tenant.
pub(super) fn tenant_spec(
    fields: &mut Fields,
    at: &str,
    message: proto::Tenant,
    seen: &mut HashSet<TenantId>,
) -> Option<TenantSpec> {
    let proto::Tenant {
        tenant,
        display_name,
        state,
        unprovisioned_rule,
        default_overage_policy,
        create_time: _,
        unknown_action,
        activity_window,
        keep_arguments,
        cycles_compatible,
    } = message;
    let id = fields.take(&format!("{at}.tenant"), TenantId::parse(&tenant));
    if id.as_ref().is_some_and(|id| !seen.insert(id.clone())) {
        fields.bad(format!("{at}.tenant"), "named once in a document");
    }
    let display_name = fields.title(&format!("{at}.display_name"), display_name);
    let state = match proto::TenantState::try_from(state) {
        Ok(proto::TenantState::Unspecified | proto::TenantState::Active) => {
            Some(TenantState::Active)
        }
        Ok(proto::TenantState::Suspended) => Some(TenantState::Suspended),
        Ok(proto::TenantState::Closed) => Some(TenantState::Closed),
        Err(_) => {
            fields.bad(format!("{at}.state"), "a known TenantState");
            None
        }
    };
    let rule = match proto::UnprovisionedRule::try_from(unprovisioned_rule) {
        Ok(
            proto::UnprovisionedRule::Unspecified | proto::UnprovisionedRule::RequireToolsetBudget,
        ) => Some(UnprovisionedRule::RequireToolsetBudget),
        Ok(proto::UnprovisionedRule::RequireAnyBudget) => Some(UnprovisionedRule::RequireAnyBudget),
        Err(_) => {
            fields.bad(
                format!("{at}.unprovisioned_rule"),
                "a known UnprovisionedRule",
            );
            None
        }
    };
    let field = format!("{at}.default_overage_policy");
    let default_overage_policy = parse_overage_policy(fields, &field, default_overage_policy);
    let unknown_action = match unknown_action {
        None => None,
        Some(unknown) => {
            let at = format!("{at}.unknown_action");
            Some(catalogue::unknown_action(fields, &at, unknown)?)
        }
    };
    let field = format!("{at}.activity_window");
    let window = fields.duration(&field, activity_window);
    let window = window.and_then(|window| fields.take(&field, ActivityWindow::new(window)));
    let keep_arguments = match keep_arguments {
        None => None,
        Some(keep) => {
            let at = format!("{at}.keep_arguments");
            Some(rules::keep_arguments(fields, &at, keep)?)
        }
    };
    let cycles = match cycles_compatible {
        None => None,
        Some(rules) => Some(cycles_rules(
            fields,
            &format!("{at}.cycles_compatible"),
            rules,
        )?),
    };
    Some(TenantSpec {
        id: id?,
        settings: Settings {
            display_name,
            state: state?,
            unprovisioned_rule: rule?,
            default_overage_policy: default_overage_policy
                .unwrap_or(OveragePolicy::AllowIfAvailable),
            unknown_action,
            activity_window: window.unwrap_or_default(),
            keep_arguments,
            cycles,
        },
    })
}

fn cycles_rules(fields: &mut Fields, at: &str, message: proto::CyclesRules) -> Option<CyclesRules> {
    let proto::CyclesRules {
        default_ttl,
        max_ttl,
        max_extensions,
    } = message;
    let default = CyclesRules::default();
    let mut ttl = |name, given, default| {
        let field = format!("{at}.{name}");
        let Some(given) = fields.duration(&field, given) else {
            return Some(default);
        };
        let ttl = fields.take(&field, Ttl::new(given))?;
        u32::try_from(ttl.get().as_millis()).ok()
    };
    let default_ttl = ttl("default_ttl", default_ttl, default.default_ttl_ms);
    let max_ttl = ttl("max_ttl", max_ttl, default.max_ttl_ms);
    let extensions = match max_extensions {
        None => Some(default.max_extensions),
        Some(count) => u32::try_from(count)
            .ok()
            .filter(|count| *count <= 1_000_000),
    };
    if extensions.is_none() {
        fields.bad(format!("{at}.max_extensions"), "0 to 1000000");
    }
    Some(CyclesRules {
        default_ttl_ms: default_ttl?,
        max_ttl_ms: max_ttl?,
        max_extensions: extensions?,
    })
}

/// Words a tenant.
pub fn tenant(tenant: &Tenant) -> proto::Tenant {
    let Settings {
        display_name,
        state,
        unprovisioned_rule,
        default_overage_policy,
        unknown_action,
        activity_window,
        keep_arguments,
        cycles,
    } = &tenant.settings;
    let state = match state {
        TenantState::Active => proto::TenantState::Active,
        TenantState::Suspended => proto::TenantState::Suspended,
        TenantState::Closed => proto::TenantState::Closed,
    };
    let rule = match unprovisioned_rule {
        UnprovisionedRule::RequireToolsetBudget => proto::UnprovisionedRule::RequireToolsetBudget,
        UnprovisionedRule::RequireAnyBudget => proto::UnprovisionedRule::RequireAnyBudget,
    };
    proto::Tenant {
        tenant: tenant.id.to_string(),
        display_name: display_name.to_string(),
        state: state.into(),
        unprovisioned_rule: rule.into(),
        default_overage_policy: overage_policy(*default_overage_policy).into(),
        create_time: Some(time(tenant.created_at)),
        unknown_action: unknown_action
            .as_ref()
            .map(catalogue::unknown_action_message),
        activity_window: Some(duration(activity_window.get())),
        keep_arguments: keep_arguments.as_ref().map(rules::keep_arguments_message),
        cycles_compatible: cycles.map(|rules| proto::CyclesRules {
            default_ttl: Some(duration(Duration::from_millis(rules.default_ttl_ms.into()))),
            max_ttl: Some(duration(Duration::from_millis(rules.max_ttl_ms.into()))),
            max_extensions: i32::try_from(rules.max_extensions).ok(),
        }),
    }
}

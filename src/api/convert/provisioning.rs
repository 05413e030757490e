//! Provision's document and its plan.

use std::collections::HashSet;

use tonic::Status;

use super::budgets::{budget_key, budget_once, budget_spec};
use super::tenants::tenant_spec;
use super::{catalogue, rules};
use crate::api::fields::Fields;
use crate::domain::id::IdempotencyKey;
use crate::domain::ledger::{Change, ChangeKind};
use crate::domain::provision::{Document, Field, Mode};
use crate::domain::request::Digest;
use crate::engine::Provisioned;
use crate::proto;

/// Most tenants and budgets of one document.
const TENANTS_MAX: usize = 1_000;
const BUDGETS_MAX: usize = 10_000;
/// Most tools and policies of one document.
const TOOLS_MAX: usize = 10_000;
const POLICIES_MAX: usize = 100;

/// A document as it was asked for.
#[derive(Debug)]
pub struct Asked {
    /// What shall be.
    pub document: Document,
    /// Nothing with `validate_only`.
    pub key: Option<IdempotencyKey>,
    /// Only the plan is wanted.
    pub validate_only: bool,
}

/// Takes a ProvisionRequest.
pub fn provision(message: proto::ProvisionRequest) -> Result<Asked, Status> {
    let digests = digests(&message);
    let proto::ProvisionRequest {
        idempotency_key,
        tenants,
        budgets,
        absent_budgets,
        validate_only,
        tools,
        absent_tools,
        policies,
        freezes,
        absent_freezes,
        create_only,
        update_mask,
    } = message;
    let mut fields = Fields::default();
    let key = match (validate_only, idempotency_key.is_empty()) {
        (true, true) => None,
        _ => fields.key(&idempotency_key),
    };
    if tenants.len() > TENANTS_MAX {
        fields.bad("tenants", format!("at most {TENANTS_MAX}"));
    }
    if budgets.len() + absent_budgets.len() > BUDGETS_MAX {
        fields.bad(
            "budgets",
            format!("at most {BUDGETS_MAX}, absent ones included"),
        );
    }
    let mut document = Document {
        digests,
        ..Document::default()
    };
    let mut seen = HashSet::new();
    for (at, tenant) in tenants.into_iter().enumerate() {
        let spec = tenant_spec(&mut fields, &format!("tenants[{at}]"), tenant, &mut seen);
        document.tenants.extend(spec);
    }
    let mut seen = HashSet::new();
    for (at, budget) in budgets.into_iter().enumerate() {
        let spec = budget_spec(&mut fields, &format!("budgets[{at}]"), budget, &mut seen);
        document.budgets.extend(spec);
    }
    for (at, budget) in absent_budgets.into_iter().enumerate() {
        let at = format!("absent_budgets[{at}]");
        let proto::BudgetRef {
            scope,
            unit,
            period,
        } = budget;
        let key = budget_key(&mut fields, &at, &scope, unit, period);
        budget_once(&mut fields, &at, key.as_ref(), &mut seen);
        document.absent_budgets.extend(key);
    }
    if tools.len() + absent_tools.len() > TOOLS_MAX {
        fields.bad(
            "tools",
            format!("at most {TOOLS_MAX}, absent ones included"),
        );
    }
    let mut seen = HashSet::new();
    for (at, tool) in tools.into_iter().enumerate() {
        let tool = catalogue::tool(&mut fields, &format!("tools[{at}]"), tool, &mut seen);
        document.tools.extend(tool);
    }
    for (at, tool) in absent_tools.into_iter().enumerate() {
        let proto::ToolRef { tenant, name } = tool;
        let at = format!("absent_tools[{at}]");
        let named = catalogue::tool_name(&mut fields, &at, &tenant, &name, &mut seen);
        document.absent_tools.extend(named);
    }
    if policies.len() > POLICIES_MAX {
        fields.bad("policies", format!("at most {POLICIES_MAX}"));
    }
    let mut seen = HashSet::new();
    for (at, policy) in policies.into_iter().take(POLICIES_MAX).enumerate() {
        let at = format!("policies[{at}]");
        let policy = rules::policy(&mut fields, &at, policy);
        if policy
            .as_ref()
            .is_some_and(|(tenant, _)| !seen.insert(tenant.clone()))
        {
            fields.bad(format!("{at}.tenant"), "named once in a document");
        }
        document.policies.extend(policy);
    }
    let mut seen = HashSet::new();
    for (at, freeze) in freezes.into_iter().enumerate() {
        let freeze = rules::freeze(&mut fields, &format!("freezes[{at}]"), freeze, &mut seen);
        document.freezes.extend(freeze);
    }
    for (at, freeze) in absent_freezes.into_iter().enumerate() {
        let at = format!("absent_freezes[{at}]");
        let scope = rules::frozen_scope(&mut fields, &at, &freeze.scope, &mut seen);
        document.absent_freezes.extend(scope);
    }
    document.mode = mode(&mut fields, create_only, update_mask);
    fields.finish(Some(Asked {
        document,
        key: key.filter(|_| !validate_only),
        validate_only,
    }))
}

/// What a retry must repeat. The messages have no maps, so that equal ones have
/// equal bytes.
fn digests(message: &proto::ProvisionRequest) -> Vec<(Box<str>, Digest)> {
    fn of<M: prost::Message>(parts: &[M]) -> Digest {
        let mut bytes = Vec::new();
        for part in parts {
            bytes.extend_from_slice(&part.encode_length_delimited_to_vec());
        }
        Digest::of(&bytes)
    }
    let mut digests = vec![
        ("tenants".into(), of(&message.tenants)),
        ("budgets".into(), of(&message.budgets)),
        ("absent_budgets".into(), of(&message.absent_budgets)),
        ("tools".into(), of(&message.tools)),
        ("absent_tools".into(), of(&message.absent_tools)),
        ("policies".into(), of(&message.policies)),
        ("freezes".into(), of(&message.freezes)),
        ("absent_freezes".into(), of(&message.absent_freezes)),
    ];
    // Said only where it is not the rule: entries from before it could be said agree.
    if message.create_only {
        digests.push(("create_only".into(), Digest::of(b"true")));
    }
    if let Some(mask) = &message.update_mask {
        let paths = mask.paths.join(",");
        digests.push(("update_mask".into(), Digest::of(paths.as_bytes())));
    }
    digests
}

fn mode(fields: &mut Fields, create_only: bool, mask: Option<pbjson_types::FieldMask>) -> Mode {
    let paths = mask.map_or_else(Vec::new, |mask| mask.paths);
    if paths.is_empty() {
        return if create_only {
            Mode::CreateOnly
        } else {
            Mode::Apply
        };
    }
    if create_only {
        fields.bad("update_mask", "empty together with create_only");
    }
    let mut mask: Vec<_> = paths
        .iter()
        .filter_map(|path| fields.take("update_mask", Field::parse(path)))
        .collect();
    mask.sort_unstable();
    mask.dedup();
    Mode::Update(mask)
}

/// Words a plan.
pub fn provisioned(provisioned: Provisioned) -> proto::ProvisionResponse {
    let Provisioned {
        changes,
        replayed,
        applied,
    } = provisioned;
    proto::ProvisionResponse {
        changes: changes.into_iter().map(change).collect(),
        replayed,
        applied,
    }
}

fn change(change: Change) -> proto::Change {
    let Change {
        kind,
        target,
        details,
        loosens,
    } = change;
    let kind = match kind {
        ChangeKind::Created => proto::ChangeKind::Created,
        ChangeKind::Changed => proto::ChangeKind::Changed,
        ChangeKind::Removed => proto::ChangeKind::Removed,
        ChangeKind::Unchanged => proto::ChangeKind::Unchanged,
    };
    proto::Change {
        kind: kind.into(),
        target: target.into(),
        details: details.into_iter().map(Into::into).collect(),
        loosens,
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    fn named(status: &Status) -> Vec<String> {
        let details = status.get_error_details();
        let violations = details.bad_request().map(|bad| &bad.field_violations);
        let fields = violations.into_iter().flatten();
        let mut named: Vec<_> = fields.map(|violation| violation.field.clone()).collect();
        named.sort_unstable();
        named
    }

    #[test]
    fn every_mistake_of_a_document_is_named_at_once() {
        let tenant = |display_name: &str, state| proto::Tenant {
            tenant: "Acme".into(),
            display_name: display_name.into(),
            state,
            unprovisioned_rule: state,
            ..proto::Tenant::default()
        };
        let budget = |unit, limit| proto::Budget {
            scope: "tenant:acme".into(),
            unit,
            limit,
            time_zone: "Europe/Berlin".into(),
            ..proto::Budget::default()
        };
        let status = provision(proto::ProvisionRequest {
            idempotency_key: "k".into(),
            tenants: vec![tenant("a", 0), tenant("\0", 9)],
            budgets: vec![budget(9, None)],
            ..proto::ProvisionRequest::default()
        });
        assert_eq!(
            named(&status.expect_err("a refusal")),
            [
                "budgets[0].allocation",
                "budgets[0].time_zone",
                "budgets[0].unit",
                "tenants[1].display_name",
                "tenants[1].state",
                "tenants[1].tenant",
                "tenants[1].unprovisioned_rule",
            ]
        );
    }

    #[test]
    fn a_budget_is_named_once_present_or_absent() {
        let budget = |scope: &str| proto::Budget {
            scope: scope.into(),
            unit: 1,
            limit: Some(proto::budget::Limit::Allocation(1)),
            ..proto::Budget::default()
        };
        let absent = proto::BudgetRef {
            scope: "toolset:mail/tenant:acme".into(),
            unit: 1,
            period: 1,
        };
        let status = provision(proto::ProvisionRequest {
            idempotency_key: "k".into(),
            budgets: vec![
                budget("tenant:acme"),
                budget("tenant:ACME"),
                budget("tenant:acme/toolset:mail"),
            ],
            absent_budgets: vec![absent],
            ..proto::ProvisionRequest::default()
        });
        assert_eq!(
            named(&status.expect_err("a refusal")),
            ["absent_budgets[0].scope", "budgets[1].scope"]
        );
    }
}

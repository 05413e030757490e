//! The messages of `Provisioning`.

use std::collections::HashSet;
use std::time::Duration;

use tonic::Status;

use super::{
    budget_state, duration, overage_policy, parse_overage_policy, parse_period, period, rules,
    time, unit,
};
use crate::api::fields::Fields;
use crate::domain::amount::Amount;
use crate::domain::budget::{Budget, BudgetState, CarryOver, Limit, Terms};
use crate::domain::id::{IdempotencyKey, KeyId, TenantId};
use crate::domain::key::StoredKey;
use crate::domain::ledger::{Change, ChangeKind};
use crate::domain::period::{Calendar, Period};
use crate::domain::permission::{Permission, Permissions};
use crate::domain::provision::{BudgetKey, BudgetSpec, Document, Field, Mode, TenantSpec};
use crate::domain::request::{Digest, Fund, FundOperation, Funding, OveragePolicy, Ttl};
use crate::domain::scope::{Scope, ScopeFilter};
use crate::domain::tenant::{
    ActivityWindow, CyclesRules, Settings, Tenant, TenantState, UnprovisionedRule,
};
use crate::domain::time::Timestamp;
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
        let tool = rules::tool(&mut fields, &format!("tools[{at}]"), tool, &mut seen);
        document.tools.extend(tool);
    }
    for (at, tool) in absent_tools.into_iter().enumerate() {
        let proto::ToolRef { tenant, name } = tool;
        let at = format!("absent_tools[{at}]");
        let named = rules::tool_name(&mut fields, &at, &tenant, &name, &mut seen);
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

fn tenant_spec(
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
    let display_name = fields.text(&format!("{at}.display_name"), display_name, 256);
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
            Some(rules::unknown_action(fields, &at, unknown)?)
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

fn budget_key(
    fields: &mut Fields,
    at: &str,
    scope: &str,
    unit: i32,
    period: i32,
) -> Option<BudgetKey> {
    let prefix = if at.is_empty() {
        String::new()
    } else {
        format!("{at}.")
    };
    let parsed = Scope::parse(scope).and_then(|scope| scope.tenant().map(|_| scope));
    let scope = fields.take(&format!("{prefix}scope"), parsed);
    let unit = fields.unit(&format!("{prefix}unit"), unit, true);
    let period = parse_period(fields, &format!("{prefix}period"), period);
    Some(BudgetKey {
        scope: scope?,
        unit: unit?,
        period: period?,
    })
}

/// Notes a budget that stands in the document already, present or absent.
fn budget_once(
    fields: &mut Fields,
    at: &str,
    key: Option<&BudgetKey>,
    seen: &mut HashSet<BudgetKey>,
) {
    if key.is_some_and(|key| !seen.insert(key.clone())) {
        let once = "named once in a document with its unit and period";
        fields.bad(format!("{at}.scope"), once);
    }
}

fn budget_spec(
    fields: &mut Fields,
    at: &str,
    message: proto::Budget,
    seen: &mut HashSet<BudgetKey>,
) -> Option<BudgetSpec> {
    let proto::Budget {
        scope,
        unit,
        period,
        time_zone,
        limit,
        overdraft_limit,
        carry_over,
        state,
        create_time: _,
        thresholds,
        on_exceeded,
    } = message;
    let on_exceeded = rules::on_exceeded(fields, &format!("{at}.on_exceeded"), on_exceeded);
    let thresholds = rules::thresholds(fields, &format!("{at}.thresholds"), thresholds);
    let key = budget_key(fields, at, &scope, unit, period);
    budget_once(fields, at, key.as_ref(), seen);
    // Its mistake, if any, was noted with the key's.
    let of = parse_period(&mut Fields::default(), "period", period).unwrap_or(Period::Daily);
    let calendar = fields.take(&format!("{at}.time_zone"), Calendar::new(of, &time_zone));
    let limit = match limit {
        Some(proto::budget::Limit::Allocation(amount)) => fields
            .take(&format!("{at}.allocation"), Amount::new(amount))
            .map(Limit::Allocation),
        Some(proto::budget::Limit::Unlimited(true)) => Some(Limit::Unlimited),
        Some(proto::budget::Limit::Unlimited(false)) => {
            fields.bad(format!("{at}.unlimited"), "true, or an allocation instead");
            None
        }
        None => {
            fields.bad(
                format!("{at}.allocation"),
                "given, or unlimited: true instead",
            );
            None
        }
    };
    let overdraft = fields.take(
        &format!("{at}.overdraft_limit"),
        Amount::new(overdraft_limit),
    );
    let carry_over = match proto::CarryOver::try_from(carry_over) {
        Ok(proto::CarryOver::Unspecified | proto::CarryOver::None) => Some(CarryOver::None),
        Ok(proto::CarryOver::Forward) => Some(CarryOver::Forward),
        Ok(proto::CarryOver::CapAtAllocated) => Some(CarryOver::CapAtAllocated),
        Err(_) => {
            fields.bad(format!("{at}.carry_over"), "a known CarryOver");
            None
        }
    };
    if of == Period::Total && carry_over.is_some_and(|c| c != CarryOver::None) {
        fields.bad(
            format!("{at}.carry_over"),
            "empty for a budget without a period",
        );
    }
    let state = match proto::BudgetState::try_from(state) {
        Ok(proto::BudgetState::Unspecified | proto::BudgetState::Active) => {
            Some(BudgetState::Active)
        }
        Ok(proto::BudgetState::Frozen) => Some(BudgetState::Frozen),
        Ok(proto::BudgetState::Closed) => Some(BudgetState::Closed),
        Err(_) => {
            fields.bad(format!("{at}.state"), "a known BudgetState");
            None
        }
    };
    Some(BudgetSpec {
        key: key?,
        calendar: calendar?,
        terms: Terms {
            limit: limit?,
            overdraft_limit: overdraft?,
            carry_over: carry_over?,
            state: state?,
        },
        thresholds: thresholds?,
        on_exceeded,
    })
}

/// Takes what names a budget.
pub fn named_budget(scope: &str, unit: i32, period: i32) -> Result<BudgetKey, Status> {
    let mut fields = Fields::default();
    let key = budget_key(&mut fields, "", scope, unit, period);
    fields.finish(key)
}

/// Takes a FundBudgetRequest.
pub fn fund(message: proto::FundBudgetRequest) -> Result<Fund, Status> {
    let proto::FundBudgetRequest {
        idempotency_key,
        scope,
        unit,
        period,
        operation,
        amount,
        expire_time,
        reason,
        allocated,
        credit_surplus,
    } = message;
    let mut fields = Fields::default();
    let key = fields.key(&idempotency_key);
    let parsed = Scope::parse_concrete(&scope).and_then(|scope| scope.tenant().map(|_| scope));
    let scope = fields.take("scope", parsed);
    let unit = fields.unit("unit", unit, true);
    let period = parse_period(&mut fields, "period", period);
    let amount = fields.take("amount", Amount::new(amount));
    let expires_at = fields.time("expire_time", expire_time);
    let reason = fields.text("reason", reason, 1_024);
    let operation = match proto::FundOperation::try_from(operation) {
        Ok(proto::FundOperation::Credit) => Some(FundOperation::Credit),
        Ok(proto::FundOperation::Debit) => Some(FundOperation::Debit),
        Ok(proto::FundOperation::Reset) => Some(FundOperation::Reset),
        Ok(proto::FundOperation::ResetSpent) => Some(FundOperation::ResetSpent),
        Ok(proto::FundOperation::RepayDebt) => Some(FundOperation::RepayDebt),
        Ok(proto::FundOperation::Unspecified) | Err(_) => {
            fields.bad("operation", "a known FundOperation");
            None
        }
    };
    if expires_at.is_some() && operation != Some(FundOperation::Credit) {
        fields.bad("expire_time", "empty but for FUND_OPERATION_CREDIT");
    }
    let allocated = match allocated {
        Some(_) if operation != Some(FundOperation::ResetSpent) => {
            fields.bad("allocated", "absent but for FUND_OPERATION_RESET_SPENT");
            None
        }
        Some(amount) => fields.take("allocated", Amount::new(amount)).map(Some),
        None => Some(None),
    };
    if credit_surplus && operation != Some(FundOperation::RepayDebt) {
        fields.bad("credit_surplus", "false but for FUND_OPERATION_REPAY_DEBT");
    }
    let made = (|| {
        Some(Fund {
            key: key?,
            funding: Funding {
                scope: scope?,
                unit: unit?,
                period: period?,
                operation: operation?,
                amount: amount?,
                expires_at,
                allocated: allocated?,
                credit_surplus,
                reason,
            },
        })
    })();
    fields.finish(made)
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
        unknown_action: unknown_action.as_ref().map(rules::unknown_action_message),
        activity_window: Some(duration(activity_window.get())),
        keep_arguments: keep_arguments.as_ref().map(rules::keep_arguments_message),
        cycles_compatible: cycles.map(|rules| proto::CyclesRules {
            default_ttl: Some(duration(Duration::from_millis(rules.default_ttl_ms.into()))),
            max_ttl: Some(duration(Duration::from_millis(rules.max_ttl_ms.into()))),
            max_extensions: i32::try_from(rules.max_extensions).ok(),
        }),
    }
}

/// Words a budget.
pub fn budget(budget: &Budget) -> proto::Budget {
    let Terms {
        limit,
        overdraft_limit,
        carry_over,
        state,
    } = budget.terms;
    let limit = match limit {
        Limit::Allocation(amount) => proto::budget::Limit::Allocation(amount.get()),
        Limit::Unlimited => proto::budget::Limit::Unlimited(true),
    };
    let carry_over = match carry_over {
        CarryOver::None => proto::CarryOver::None,
        CarryOver::Forward => proto::CarryOver::Forward,
        CarryOver::CapAtAllocated => proto::CarryOver::CapAtAllocated,
    };
    let periodic = budget.calendar.period() != Period::Total;
    proto::Budget {
        scope: budget.scope.to_string(),
        unit: unit(budget.unit).into(),
        period: period(budget.calendar.period()).into(),
        time_zone: if periodic {
            budget.calendar.zone_name().to_owned()
        } else {
            String::new()
        },
        limit: Some(limit),
        overdraft_limit: overdraft_limit.get(),
        carry_over: carry_over.into(),
        state: budget_state(state).into(),
        create_time: Some(time(budget.created_at)),
        thresholds: rules::threshold_messages(&budget.thresholds),
        on_exceeded: rules::on_exceeded_message(&budget.on_exceeded),
    }
}

/// A key as it was asked for, but for its random parts.
#[derive(Debug)]
pub struct AskedKey {
    /// Nothing for an operator's.
    pub tenant: Option<TenantId>,
    /// Makes a retry safe.
    pub idempotency_key: IdempotencyKey,
    /// For people.
    pub display_name: Box<str>,
    /// What it may do.
    pub permissions: Permissions,
    /// Subjects that it is confined to.
    pub subject_prefix: Option<ScopeFilter>,
    /// Groups that it speaks for.
    pub approver_groups: Vec<Box<str>>,
    /// When it ends by itself.
    pub expires_at: Option<Timestamp>,
}

/// Takes a CreateApiKeyRequest. A caller without a tenant may make another
/// operator's key.
pub fn create_api_key(
    message: proto::CreateApiKeyRequest,
    own: Option<&TenantId>,
    now: Timestamp,
) -> Result<AskedKey, Status> {
    let proto::CreateApiKeyRequest {
        idempotency_key,
        api_key,
    } = message;
    let mut fields = Fields::default();
    let idempotency_key = fields.key(&idempotency_key);
    let Some(proto::ApiKey {
        key_id,
        tenant,
        display_name,
        permissions,
        subject_prefix,
        expire_time,
        create_time: _,
        revoke_time: _,
        approver_groups,
    }) = api_key
    else {
        fields.bad("api_key", "given");
        return fields.finish(None);
    };
    if !key_id.is_empty() {
        fields.bad("api_key.key_id", "empty: the server makes it");
    }
    let tenant = match (tenant.as_str(), own) {
        ("", None) => None,
        (named, _) => fields.tenant("api_key.tenant", named, own),
    };
    let display_name = fields.text("api_key.display_name", display_name, 256);
    let mut set = Vec::new();
    for (at, value) in permissions.iter().enumerate() {
        match parse_permission(*value) {
            Some(permission) => set.push(permission),
            None => fields.bad(format!("api_key.permissions[{at}]"), "a known Permission"),
        }
    }
    if permissions.is_empty() {
        fields.bad("api_key.permissions", "at least one Permission");
    }
    let prefix = match subject_prefix.as_str() {
        "" => None,
        text => fields.take("api_key.subject_prefix", ScopeFilter::parse(text)),
    };
    let confinable = |p: &Permission| matches!(p, Permission::Authority | Permission::Read);
    if prefix.is_some() && !set.iter().all(confinable) {
        fields.bad(
            "api_key.permissions",
            "only PERMISSION_AUTHORITY and PERMISSION_READ together with subject_prefix",
        );
    }
    let approver_groups = rules::groups(&mut fields, "api_key.approver_groups", approver_groups);
    if !approver_groups.is_empty() && !set.contains(&Permission::Approve) {
        fields.bad(
            "api_key.approver_groups",
            "empty without PERMISSION_APPROVE",
        );
    }
    let expires_at = fields.time("api_key.expire_time", expire_time);
    if expires_at.is_some_and(|at| at <= now) {
        fields.bad("api_key.expire_time", "in the future");
    }
    let made = idempotency_key.map(|idempotency_key| AskedKey {
        tenant,
        idempotency_key,
        display_name,
        permissions: set.into_iter().collect(),
        subject_prefix: prefix,
        approver_groups,
        expires_at,
    });
    fields.finish(made)
}

fn parse_permission(value: i32) -> Option<Permission> {
    match proto::Permission::try_from(value) {
        Ok(proto::Permission::Authority) => Some(Permission::Authority),
        Ok(proto::Permission::Read) => Some(Permission::Read),
        Ok(proto::Permission::Provision) => Some(Permission::Provision),
        Ok(proto::Permission::Loosen) => Some(Permission::Loosen),
        Ok(proto::Permission::Fund) => Some(Permission::Fund),
        Ok(proto::Permission::ManageKeys) => Some(Permission::ManageKeys),
        Ok(proto::Permission::Audit) => Some(Permission::Audit),
        Ok(proto::Permission::Approve) => Some(Permission::Approve),
        Ok(proto::Permission::Unspecified) | Err(_) => None,
    }
}

fn permission(permission: Permission) -> proto::Permission {
    match permission {
        Permission::Authority => proto::Permission::Authority,
        Permission::Read => proto::Permission::Read,
        Permission::Provision => proto::Permission::Provision,
        Permission::Loosen => proto::Permission::Loosen,
        Permission::Fund => proto::Permission::Fund,
        Permission::ManageKeys => proto::Permission::ManageKeys,
        Permission::Audit => proto::Permission::Audit,
        Permission::Approve => proto::Permission::Approve,
    }
}

/// Words a key, without its secret.
pub fn api_key(key: &StoredKey) -> proto::ApiKey {
    proto::ApiKey {
        key_id: key.id.to_string(),
        tenant: key
            .tenant
            .as_ref()
            .map_or_else(String::new, TenantId::to_string),
        display_name: key.display_name.to_string(),
        permissions: key
            .permissions
            .iter()
            .map(|p| permission(p).into())
            .collect(),
        subject_prefix: key
            .subject_prefix
            .as_ref()
            .map_or_else(String::new, |prefix| prefix.as_str().to_owned()),
        expire_time: key.expires_at.map(time),
        create_time: Some(time(key.created_at)),
        revoke_time: key.revoked_at.map(time),
        approver_groups: key
            .approver_groups
            .iter()
            .map(ToString::to_string)
            .collect(),
    }
}

/// Takes a key's id.
pub fn key_id(text: &str) -> Result<KeyId, Status> {
    let mut fields = Fields::default();
    let id = fields.take("key_id", KeyId::parse(text));
    fields.finish(id)
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

//! The operator's document: tenants, budgets, tools, policies and freezes as they shall
//! be, and the plan that brings them there.

mod mode;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use crate::domain::amount::{Amount, Unit};
use crate::domain::budget::{Budget, BudgetState, Limit, OnExceeded, Terms, named};
use crate::domain::catalogue::{Pattern, Tier, Tool, UnknownAction};
use crate::domain::id::{BudgetNo, Sequence, TenantId};
use crate::domain::ledger::{Change, ChangeKind, ProvisionedBudget, Versioned};
use crate::domain::narrowing::{self, Threshold};
use crate::domain::period::{Calendar, Period};
use crate::domain::policy::PolicyDocument;
use crate::domain::refusal::Refusal;
use crate::domain::request::Digest;
use crate::domain::scope::Scope;
use crate::domain::tenant::{Freeze, Settings, Tenant, TenantState, UnprovisionedRule};
use crate::domain::time::Timestamp;

pub use mode::{Field, Mode};

/// A tenant as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantSpec {
    /// Its name.
    pub id: TenantId,
    /// What shall be set for it.
    pub settings: Settings,
}

named! {
    /// What a document is about.
    #[derive(PartialOrd, Ord)]
    DocumentKind {
        /// Tools.
        Catalogue = "CATALOGUE",
        /// Rules.
        Policy = "POLICY",
        /// Scopes that are stopped.
        Freezes = "FREEZES",
    }
}

/// What identifies a budget.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BudgetKey {
    /// What it applies to.
    pub scope: Scope,
    /// What it counts.
    pub unit: Unit,
    /// When it is renewed.
    pub period: Period,
}

impl fmt::Display for BudgetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.scope, self.unit, self.period)
    }
}

/// A budget as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetSpec {
    /// Which.
    pub key: BudgetKey,
    /// Its period, in its time zone.
    pub calendar: Calendar,
    /// What it shall allow.
    pub terms: Terms,
    /// What it shall leave the more of it is used.
    pub thresholds: Arc<[Threshold]>,
    /// What shall happen to an action that it has not enough for.
    pub on_exceeded: OnExceeded,
}

/// A scope that shall be stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreezeSpec {
    /// Which.
    pub scope: Scope,
    /// Why.
    pub reason: Box<str>,
}

/// The parts of a document, as fields of its message.
pub const PARTS: [&str; 10] = [
    "tenants",
    "budgets",
    "absent_budgets",
    "tools",
    "absent_tools",
    "policies",
    "freezes",
    "absent_freezes",
    "create_only",
    "update_mask",
];

/// A document. Applied whole or not at all.
#[derive(Debug, Clone, Default)]
pub struct Document {
    /// To be present.
    pub tenants: Vec<TenantSpec>,
    /// To be present.
    pub budgets: Vec<BudgetSpec>,
    /// To be absent.
    pub absent_budgets: Vec<BudgetKey>,
    /// To be listed in a tenant's catalogue.
    pub tools: Vec<(TenantId, Tool)>,
    /// Not to be listed.
    pub absent_tools: Vec<(TenantId, Pattern)>,
    /// To be in force; that of [`TenantId::system`] for all tenants. Checked.
    pub policies: Vec<(TenantId, Arc<PolicyDocument>)>,
    /// To be stopped.
    pub freezes: Vec<FreezeSpec>,
    /// Not to be stopped.
    pub absent_freezes: Vec<Scope>,
    /// What it does where something stands already.
    pub mode: Mode,
    /// SHA-256 of the document's parts, by field: what a retry must repeat.
    pub digests: Vec<(Box<str>, Digest)>,
}

impl Document {
    /// Every tenant that it is about, in the order in which they are locked.
    pub fn tenants_touched(&self) -> Result<BTreeSet<TenantId>, super::id::Malformed> {
        let named = self.tenants.iter().map(|spec| Ok(spec.id.clone()));
        let present = self.budgets.iter().map(|spec| spec.key.scope.tenant());
        let absent = self.absent_budgets.iter().map(|key| key.scope.tenant());
        let freezes = self.freezes.iter().map(|spec| spec.scope.tenant());
        let lifted = self.absent_freezes.iter().map(Scope::tenant);
        let tools = self.tools.iter().map(|(tenant, _)| Ok(tenant.clone()));
        let unlisted = self
            .absent_tools
            .iter()
            .map(|(tenant, _)| Ok(tenant.clone()));
        let policies = self.policies.iter().map(|(tenant, _)| Ok(tenant.clone()));
        named
            .chain(present)
            .chain(absent)
            .chain(freezes)
            .chain(lifted)
            .chain(tools)
            .chain(unlisted)
            .chain(policies)
            .collect()
    }

    /// Whether it changes what holds for all tenants.
    pub fn is_for_all_tenants(&self) -> bool {
        self.policies.iter().any(|(tenant, _)| tenant.is_system())
    }
}

/// One tenant as it stands before a plan.
#[derive(Debug, Clone, Default)]
pub struct Current {
    /// Nothing where it does not exist.
    pub tenant: Option<Tenant>,
    /// Every budget it ever had.
    pub budgets: Vec<Budget>,
    /// Its catalogue.
    pub tools: Versioned<Vec<Tool>>,
    /// Its policy.
    pub policy: Versioned<PolicyDocument>,
    /// Its scopes that are stopped.
    pub freezes: Versioned<Vec<Freeze>>,
}

/// What a plan does to one tenant.
#[derive(Debug, Clone, Default)]
pub struct TenantPlan {
    /// The tenant as it shall be stored; nothing where it does not change.
    pub tenant: Option<Tenant>,
    /// Budgets to be stored.
    pub budgets: Vec<Budget>,
    /// The catalogue to be stored.
    pub tools: Option<Versioned<Vec<Tool>>>,
    /// The policy to be stored.
    pub policy: Option<Versioned<PolicyDocument>>,
    /// Freezes to be stored.
    pub freezes: Option<Versioned<Vec<Freeze>>>,
    /// What became of what the document says of this tenant.
    pub changes: Vec<Change>,
}

impl TenantPlan {
    /// Whether anything is to be stored.
    pub fn is_empty(&self) -> bool {
        self.tenant.is_none()
            && self.budgets.is_empty()
            && self.tools.is_none()
            && self.policy.is_none()
            && self.freezes.is_none()
    }

    /// Budgets as the ledger records them.
    pub fn provisioned(&self) -> Vec<ProvisionedBudget> {
        self.budgets.iter().map(ProvisionedBudget::from).collect()
    }
}

/// A whole document's plan.
#[derive(Debug, Clone)]
pub struct Plan {
    /// By tenant.
    pub tenants: BTreeMap<TenantId, TenantPlan>,
    /// Every change, in the order of the document.
    pub changes: Vec<Change>,
}

impl Plan {
    /// Makes a plan from what stands. `entry_of` is the sequence that the entry
    /// about a tenant will have.
    pub fn new(
        document: &Document,
        current: &BTreeMap<TenantId, Current>,
        may_loosen: bool,
        now: Timestamp,
        entry_of: impl Fn(&TenantId) -> Sequence,
    ) -> Result<Self, Refusal> {
        let mut plan = Self {
            tenants: BTreeMap::new(),
            changes: Vec::new(),
        };
        for spec in &document.tenants {
            let before = current.get(&spec.id).and_then(|c| c.tenant.as_ref());
            document.mode.admits(
                before.is_some(),
                || Refusal::TenantNotFound,
                || format!("tenant:{}", spec.id),
            )?;
            let spec = TenantSpec {
                id: spec.id.clone(),
                settings: document.mode.settings(spec, before),
            };
            let (tenant, change) = plan_tenant(&spec, before, now)?;
            plan.of(&spec.id).tenant = tenant;
            plan.note(&spec.id, change);
        }
        for spec in &document.budgets {
            let tenant = spec
                .key
                .scope
                .tenant()
                .map_err(|_| Refusal::TenantNotFound)?;
            let stands = plan.must_be_open(&tenant, current)?;
            let before = stands.and_then(|c| find(&c.budgets, &spec.key));
            let present = before.filter(|budget| budget.present);
            let missing = || Refusal::BudgetNotFound {
                scope: spec.key.scope.clone(),
                unit: spec.key.unit,
                period: spec.key.period,
            };
            document
                .mode
                .admits(present.is_some(), missing, || spec.key.to_string())?;
            let spec = &document.mode.budget(spec, present)?;
            let known = stands.map_or(0, |c| c.budgets.len());
            let added = plan
                .of(&tenant)
                .budgets
                .iter()
                .filter(|b| is_new(b, known))
                .count();
            let number = i32::try_from(known + added + 1).map_err(|_| Refusal::AmountOverflow)?;
            let seq = entry_of(&tenant);
            let (budget, change) = plan_budget(spec, before, BudgetNo(number), seq, now);
            plan.of(&tenant).budgets.extend(budget);
            plan.note(&tenant, change);
        }
        for key in &document.absent_budgets {
            let tenant = key.scope.tenant().map_err(|_| Refusal::TenantNotFound)?;
            let stands = plan.must_be_open(&tenant, current)?;
            let before = stands.and_then(|c| find(&c.budgets, key));
            let (budget, change) = plan_absence(key, before);
            plan.of(&tenant).budgets.extend(budget);
            plan.note(&tenant, change);
        }
        plan.plan_tools(document, current)?;
        plan.plan_policies(document, current)?;
        plan.plan_freezes(document, current, now)?;
        match plan.changes.iter().find(|change| change.loosens) {
            Some(change) if !may_loosen => Err(Refusal::LooseningNotPermitted {
                target: change.target.to_string(),
            }),
            _ => Ok(plan),
        }
    }

    fn of(&mut self, tenant: &TenantId) -> &mut TenantPlan {
        self.tenants.entry(tenant.clone()).or_default()
    }

    fn note(&mut self, tenant: &TenantId, change: Change) {
        self.of(tenant).changes.push(change.clone());
        self.changes.push(change);
    }

    /// A budget needs a tenant: one that stands, or that the document makes, and
    /// that is not over for good.
    fn must_be_open<'a>(
        &self,
        tenant: &TenantId,
        current: &'a BTreeMap<TenantId, Current>,
    ) -> Result<Option<&'a Current>, Refusal> {
        let stands = current.get(tenant);
        let state = stands
            .and_then(|c| c.tenant.as_ref())
            .map(|t| t.settings.state);
        let made = self.tenants.get(tenant).is_some_and(|p| p.tenant.is_some());
        match state {
            Some(TenantState::Closed) => Err(Refusal::TenantClosed),
            None if !made => Err(Refusal::TenantNotFound),
            _ => Ok(stands),
        }
    }
}

fn is_new(budget: &Budget, known: usize) -> bool {
    usize::try_from(budget.no.0).is_ok_and(|no| no > known)
}

fn find<'a>(budgets: &'a [Budget], key: &BudgetKey) -> Option<&'a Budget> {
    budgets.iter().find(|budget| {
        budget.scope == key.scope
            && budget.unit == key.unit
            && budget.calendar.period() == key.period
    })
}

fn change(kind: ChangeKind, target: String, details: Vec<Box<str>>, loosens: bool) -> Change {
    Change {
        kind,
        target: target.into(),
        details,
        loosens,
    }
}

/// Gathers `field: old -> new`.
struct Differences(Vec<Box<str>>);

impl Differences {
    fn note<T: PartialEq + fmt::Display>(&mut self, field: &str, old: T, new: T) {
        if old != new {
            self.0.push(format!("{field}: {old} -> {new}").into());
        }
    }
}

fn plan_tenant(
    spec: &TenantSpec,
    before: Option<&Tenant>,
    now: Timestamp,
) -> Result<(Option<Tenant>, Change), Refusal> {
    let target = format!("tenant:{}", spec.id);
    let Some(before) = before else {
        let tenant = Tenant {
            id: spec.id.clone(),
            settings: spec.settings.clone(),
            created_at: now,
        };
        let change = change(ChangeKind::Created, target, Vec::new(), false);
        return Ok((Some(tenant), change));
    };
    let (old, new) = (&before.settings, &spec.settings);
    if old == new {
        let change = change(ChangeKind::Unchanged, target, Vec::new(), false);
        return Ok((None, change));
    }
    if old.state == TenantState::Closed && new.state != TenantState::Closed {
        return Err(Refusal::TenantClosed);
    }
    let mut differences = Differences(Vec::new());
    differences.note("display_name", &old.display_name, &new.display_name);
    differences.note("state", old.state, new.state);
    differences.note(
        "unprovisioned_rule",
        old.unprovisioned_rule,
        new.unprovisioned_rule,
    );
    differences.note(
        "default_overage_policy",
        old.default_overage_policy,
        new.default_overage_policy,
    );
    let shown = |action: &Option<UnknownAction>| match action {
        None => "default".to_owned(),
        Some(UnknownAction::Deny) => "DENY".to_owned(),
        Some(UnknownAction::As { level, tier, .. }) => format!("{level} tier {tier}"),
    };
    differences.note(
        "unknown_action",
        shown(&old.unknown_action),
        shown(&new.unknown_action),
    );
    differences.note(
        "activity_window",
        format!("{}s", old.activity_window.get().as_secs()),
        format!("{}s", new.activity_window.get().as_secs()),
    );
    if old.keep_arguments != new.keep_arguments {
        differences.0.push("keep_arguments: changed".into());
    }
    if old.cycles != new.cycles {
        differences.0.push("cycles_compatible: changed".into());
    }
    // Missing budgets are skipped from then on.
    let opens = old.cycles.is_none() && new.cycles.is_some();
    let unsuspends = old.state == TenantState::Suspended && new.state == TenantState::Active;
    let takes = takes_unknown_for_less(old.unknown_action.as_ref(), new.unknown_action.as_ref());
    // Rules that count what agents did of late then forget sooner.
    let forgets = new.activity_window.get() < old.activity_window.get();
    let laxer = old.unprovisioned_rule == UnprovisionedRule::RequireToolsetBudget
        && new.unprovisioned_rule == UnprovisionedRule::RequireAnyBudget;
    let tenant = Tenant {
        settings: new.clone(),
        ..before.clone()
    };
    let change = change(
        ChangeKind::Changed,
        target,
        differences.0,
        unsuspends || laxer || takes || opens || forgets,
    );
    Ok((Some(tenant), change))
}

/// Whether unknown actions get further than before. What is not said counts as denied, as
/// it is once a tool is listed.
fn takes_unknown_for_less(old: Option<&UnknownAction>, new: Option<&UnknownAction>) -> bool {
    let taken = |unknown: Option<&UnknownAction>| match unknown {
        None | Some(UnknownAction::Deny) => None,
        Some(UnknownAction::As { level, tier, costs }) => Some((*level, *tier, *costs)),
    };
    match (taken(old), taken(new)) {
        (_, None) => false,
        (None, Some((_, tier, costs))) => tier < Tier::HIGHEST || old.is_some() || costs.is_empty(),
        (Some(old), Some(new)) => {
            let cost = |of: &Amount, unit| new.2.get(unit).unwrap_or_default() < *of;
            new.0 < old.0 || new.1 < old.1 || old.2.iter().any(|(unit, of)| cost(&of, unit))
        }
    }
}

/// How a limit is shown.
struct ShownLimit(Limit);

impl PartialEq for ShownLimit {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl fmt::Display for ShownLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Limit::Allocation(amount) => amount.fmt(f),
            Limit::Unlimited => f.write_str("unlimited"),
        }
    }
}

fn plan_budget(
    spec: &BudgetSpec,
    before: Option<&Budget>,
    number: BudgetNo,
    seq: Sequence,
    now: Timestamp,
) -> (Option<Budget>, Change) {
    let target = spec.key.to_string();
    let Some(before) = before else {
        let budget = Budget {
            no: number,
            scope: spec.key.scope.clone(),
            unit: spec.key.unit,
            calendar: spec.calendar.clone(),
            terms: spec.terms,
            thresholds: spec.thresholds.clone(),
            on_exceeded: spec.on_exceeded.clone(),
            present: true,
            limit_seq: seq,
            created_at: now,
        };
        let change = change(ChangeKind::Created, target, Vec::new(), false);
        return (Some(budget), change);
    };
    let (old, new) = (&before.terms, &spec.terms);
    let same_thresholds = before.thresholds == spec.thresholds;
    let same_beyond = before.on_exceeded == spec.on_exceeded;
    let same = old == new && same_thresholds && same_beyond;
    if before.present && same && before.calendar == spec.calendar {
        return (
            None,
            change(ChangeKind::Unchanged, target, Vec::new(), false),
        );
    }
    let mut differences = Differences(Vec::new());
    let zones = (before.calendar.zone_name(), spec.calendar.zone_name());
    differences.note("time_zone", zones.0, zones.1);
    differences.note("allocation", ShownLimit(old.limit), ShownLimit(new.limit));
    differences.note("overdraft_limit", old.overdraft_limit, new.overdraft_limit);
    differences.note("carry_over", old.carry_over, new.carry_over);
    differences.note("state", old.state, new.state);
    if !same_thresholds {
        differences.0.push("thresholds: changed".into());
    }
    if !same_beyond {
        differences.0.push("on_exceeded: changed".into());
    }
    // Then people can grant what the allocation does not; also of a budget that comes back.
    let asks = !same_beyond && !spec.on_exceeded.is_deny();
    let narrows_less = narrowing::loosens(&before.thresholds, &spec.thresholds);
    let relimited = old.limit != new.limit || old.overdraft_limit != new.overdraft_limit;
    let unfreezes = old.state != BudgetState::Active && new.state == BudgetState::Active;
    let budget = Budget {
        calendar: spec.calendar.clone(),
        terms: *new,
        thresholds: spec.thresholds.clone(),
        on_exceeded: spec.on_exceeded.clone(),
        present: true,
        limit_seq: if relimited { seq } else { before.limit_seq },
        ..before.clone()
    };
    let kind = if before.present {
        ChangeKind::Changed
    } else {
        ChangeKind::Created
    };
    let loosens = unfreezes || asks || (before.present && narrows_less);
    (Some(budget), change(kind, target, differences.0, loosens))
}

fn plan_absence(key: &BudgetKey, before: Option<&Budget>) -> (Option<Budget>, Change) {
    let target = key.to_string();
    let Some(before) = before.filter(|budget| budget.present) else {
        return (
            None,
            change(ChangeKind::Unchanged, target, Vec::new(), false),
        );
    };
    // Taking a stopped or narrowed budget away would let through what it stopped.
    let lifts = before.terms.state != BudgetState::Active || !before.thresholds.is_empty();
    let budget = Budget {
        present: false,
        ..before.clone()
    };
    (
        Some(budget),
        change(ChangeKind::Removed, target, Vec::new(), lifts),
    )
}

/// A budget without an overdraft, carry-over or stop: what most documents say.
pub fn plain_terms(allocation: Amount) -> Terms {
    Terms {
        limit: Limit::Allocation(allocation),
        overdraft_limit: Amount::ZERO,
        carry_over: super::budget::CarryOver::None,
        state: BudgetState::Active,
    }
}

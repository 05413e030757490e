//! The operator's document: tenants and budgets as they shall be, and the plan
//! that brings them there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::amount::{Amount, Unit};
use super::budget::{Budget, BudgetState, Limit, Terms};
use super::id::{BudgetNo, Sequence, TenantId};
use super::ledger::{Change, ChangeKind, ProvisionedBudget};
use super::period::{Calendar, Period};
use super::refusal::Refusal;
use super::request::Digest;
use super::scope::Scope;
use super::tenant::{Settings, Tenant, TenantState, UnprovisionedRule};
use super::time::Timestamp;

/// A tenant as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantSpec {
    /// Its name.
    pub id: TenantId,
    /// What shall be set for it.
    pub settings: Settings,
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
}

/// A document. Applied whole or not at all.
#[derive(Debug, Clone, Default)]
pub struct Document {
    /// To be present.
    pub tenants: Vec<TenantSpec>,
    /// To be present.
    pub budgets: Vec<BudgetSpec>,
    /// To be absent.
    pub absent_budgets: Vec<BudgetKey>,
    /// SHA-256 of the document's parts, by field: what a retry must repeat.
    pub digests: Vec<(Box<str>, Digest)>,
}

impl Document {
    /// Every tenant that it is about, in the order in which they are locked.
    pub fn tenants_touched(&self) -> Result<BTreeSet<TenantId>, super::id::Malformed> {
        let named = self.tenants.iter().map(|spec| Ok(spec.id.clone()));
        let present = self.budgets.iter().map(|spec| spec.key.scope.tenant());
        let absent = self.absent_budgets.iter().map(|key| key.scope.tenant());
        named.chain(present).chain(absent).collect()
    }
}

/// One tenant as it stands before a plan.
#[derive(Debug, Clone)]
pub struct Current {
    /// Nothing where it does not exist.
    pub tenant: Option<Tenant>,
    /// Every budget it ever had.
    pub budgets: Vec<Budget>,
}

/// What a plan does to one tenant.
#[derive(Debug, Clone)]
pub struct TenantPlan {
    /// The tenant as it shall be stored; nothing where it does not change.
    pub tenant: Option<Tenant>,
    /// Budgets to be stored.
    pub budgets: Vec<Budget>,
    /// What became of what the document says of this tenant.
    pub changes: Vec<Change>,
}

impl TenantPlan {
    /// Whether anything is to be stored.
    pub fn is_empty(&self) -> bool {
        self.tenant.is_none() && self.budgets.is_empty()
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
            let (tenant, change) = plan_tenant(spec, before, now)?;
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
        match plan.changes.iter().find(|change| change.loosens) {
            Some(change) if !may_loosen => Err(Refusal::LooseningNotPermitted {
                target: change.target.to_string(),
            }),
            _ => Ok(plan),
        }
    }

    fn of(&mut self, tenant: &TenantId) -> &mut TenantPlan {
        self.tenants
            .entry(tenant.clone())
            .or_insert_with(|| TenantPlan {
                tenant: None,
                budgets: Vec::new(),
                changes: Vec::new(),
            })
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
    let unsuspends = old.state == TenantState::Suspended && new.state == TenantState::Active;
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
        unsuspends || laxer,
    );
    Ok((Some(tenant), change))
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
            present: true,
            limit_seq: seq,
            created_at: now,
        };
        let change = change(ChangeKind::Created, target, Vec::new(), false);
        return (Some(budget), change);
    };
    let (old, new) = (&before.terms, &spec.terms);
    if before.present && old == new && before.calendar == spec.calendar {
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
    let relimited = old.limit != new.limit || old.overdraft_limit != new.overdraft_limit;
    let unfreezes = old.state != BudgetState::Active && new.state == BudgetState::Active;
    let budget = Budget {
        calendar: spec.calendar.clone(),
        terms: *new,
        present: true,
        limit_seq: if relimited { seq } else { before.limit_seq },
        ..before.clone()
    };
    let kind = if before.present {
        ChangeKind::Changed
    } else {
        ChangeKind::Created
    };
    (Some(budget), change(kind, target, differences.0, unfreezes))
}

fn plan_absence(key: &BudgetKey, before: Option<&Budget>) -> (Option<Budget>, Change) {
    let target = key.to_string();
    let Some(before) = before.filter(|budget| budget.present) else {
        return (
            None,
            change(ChangeKind::Unchanged, target, Vec::new(), false),
        );
    };
    // Taking a stopped budget away would let through what it stopped.
    let lifts = before.terms.state != BudgetState::Active;
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

//! A tenant's configuration: what operators provisioned, ready to decide upon.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::amount::Unit;
use super::budget::{Budget, named};
use super::id::{BudgetNo, TenantId};
use super::period::Period;
use super::request::OveragePolicy;
use super::scope::{Scope, Shape, Subject};
use super::time::Timestamp;

named! {
    /// Whether a tenant's agents may act.
    TenantState {
        /// Decided by budgets.
        Active = "ACTIVE",
        /// Emergency stop.
        Suspended = "SUSPENDED",
        /// Over for good.
        Closed = "CLOSED",
    }
}

named! {
    /// What an action without a budget of its own gets.
    UnprovisionedRule {
        /// DENY unless a budget applies, and one that names the toolset where
        /// the subject names one.
        RequireToolsetBudget = "REQUIRE_TOOLSET_BUDGET",
        /// DENY only when no budget at all applies.
        RequireAnyBudget = "REQUIRE_ANY_BUDGET",
    }
}

/// What is set for a tenant as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// For people.
    pub display_name: Box<str>,
    /// Whether its agents may act.
    pub state: TenantState,
    /// What an action without a budget of its own gets.
    pub unprovisioned_rule: UnprovisionedRule,
    /// For reservations that name none.
    pub default_overage_policy: OveragePolicy,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            display_name: "".into(),
            state: TenantState::Active,
            unprovisioned_rule: UnprovisionedRule::RequireToolsetBudget,
            default_overage_policy: OveragePolicy::AllowIfAvailable,
        }
    }
}

/// A tenant as it was provisioned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its name.
    pub id: TenantId,
    /// What is set for it.
    pub settings: Settings,
    /// When it was first provisioned.
    pub created_at: Timestamp,
}

/// Budgets by the text of their scope.
type ByScope = HashMap<Arc<str>, Vec<Arc<Budget>>>;

/// A tenant with its budgets, indexed for decisions. Immutable: a change of
/// configuration makes a new one.
#[derive(Debug)]
pub struct TenantConfig {
    /// The tenant.
    pub tenant: Tenant,
    by_no: HashMap<BudgetNo, Arc<Budget>>,
    /// Present budgets by the text of their scope, for each shape of scope: a
    /// subject is matched by writing one text for each shape, however many
    /// budgets there are.
    by_shape: Vec<(Shape, ByScope)>,
}

impl TenantConfig {
    /// Indexes budgets, present and absent ones.
    pub fn new(tenant: Tenant, budgets: impl IntoIterator<Item = Budget>) -> Self {
        let mut config = Self {
            tenant,
            by_no: HashMap::new(),
            by_shape: Vec::new(),
        };
        let mut shapes: HashMap<Shape, usize> = HashMap::new();
        for budget in budgets {
            let budget = Arc::new(budget);
            config.by_no.insert(budget.no, budget.clone());
            if !budget.present {
                continue;
            }
            let shape = budget.scope.shape();
            let at = *shapes.entry(shape.clone()).or_insert_with(|| {
                config.by_shape.push((shape, HashMap::new()));
                config.by_shape.len() - 1
            });
            config.by_shape[at]
                .1
                .entry(budget.scope.text().clone())
                .or_default()
                .push(budget);
        }
        // From the root down: the order in which reasons and balances are told.
        config
            .by_shape
            .sort_by_key(|(_, scopes)| shape_order(scopes));
        for (_, scopes) in &mut config.by_shape {
            for budgets in scopes.values_mut() {
                budgets.sort_by_key(|budget| (budget.unit, budget.calendar.period()));
            }
        }
        config
    }

    /// A budget by its number, present or absent.
    pub fn budget(&self, no: BudgetNo) -> Option<&Arc<Budget>> {
        self.by_no.get(&no)
    }

    /// Every budget, present and absent.
    pub fn budgets(&self) -> impl Iterator<Item = &Arc<Budget>> {
        self.by_no.values()
    }

    /// Present budgets that apply to a subject, from the root down, each with
    /// the scope of the balance that the subject's action falls on.
    pub fn applicable(&self, subject: &Subject) -> Vec<(&Arc<Budget>, Arc<str>)> {
        let mut found = Vec::new();
        let mut text = String::new();
        for (shape, scopes) in &self.by_shape {
            if !shape.scope_for(subject, &mut text) {
                continue;
            }
            let Some(budgets) = scopes.get(text.as_str()) else {
                continue;
            };
            for budget in budgets {
                if let Some(scope) = budget.scope.applied_to(subject) {
                    found.push((budget, scope));
                }
            }
        }
        found
    }

    /// The present budget that a concrete scope names: its own before a
    /// template that covers it.
    pub fn budget_for(&self, scope: &Scope, unit: Unit, period: Period) -> Option<&Arc<Budget>> {
        let fits = |budget: &&Arc<Budget>| {
            budget.present
                && budget.unit == unit
                && budget.calendar.period() == period
                && budget.scope.covers(scope)
        };
        let mut found: Vec<_> = self.by_no.values().filter(fits).collect();
        found.sort_by_key(|budget| (budget.scope.is_template(), budget.no));
        found.first().copied()
    }
}

/// Shapes with fewer coordinates come first; equally deep ones by the text of
/// one of their scopes, for a stable order.
fn shape_order(scopes: &ByScope) -> (usize, Option<Arc<str>>) {
    let depth = scopes
        .values()
        .flatten()
        .map(|budget| budget.scope.depth())
        .next()
        .unwrap_or(0);
    (depth, scopes.keys().min().cloned())
}

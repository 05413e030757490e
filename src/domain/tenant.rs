//! A tenant's configuration: what operators provisioned, ready to decide upon.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::amount::Unit;
use super::budget::{Budget, named};
use super::caps::Caps;
use super::catalogue::{Catalogue, Resolved, Tool, UnknownAction};
use super::id::{BudgetNo, Malformed, TenantId};
use super::ledger::{Binding, KeptArguments, Versioned, Versions};
use super::period::Period;
use super::policy::Policy;
use super::refusal::RuleRef;
use super::request::{Action, Arguments, OveragePolicy, Ttl};
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

/// How long what an agent did counts as of late: 1 min to 24 h, in whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ActivityWindow(u32);

impl ActivityWindow {
    /// Takes 1 min to 24 h.
    pub fn new(duration: Duration) -> Result<Self, Malformed> {
        match u32::try_from(duration.as_secs()) {
            Ok(seconds) if (60..=86_400).contains(&seconds) && duration.subsec_nanos() == 0 => {
                Ok(Self(seconds))
            }
            _ => Err(Malformed::new("60s to 86400s (24 h), in whole seconds")),
        }
    }

    /// As a duration.
    pub fn get(self) -> Duration {
        Duration::from_secs(self.0.into())
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for ActivityWindow {
    /// Ten minutes.
    fn default() -> Self {
        Self(600)
    }
}

/// What the ledger keeps of arguments, beside their hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepArguments {
    /// Fields whose values are left out, at any depth, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hidden_fields: Vec<Box<str>>,
    /// Longer ones are left out as a whole.
    pub max_bytes: u32,
}

/// The longest arguments that can be kept.
pub const KEPT_BYTES_MAX: u32 = 65_536;

impl KeepArguments {
    /// What is kept of some arguments.
    pub fn keep(&self, arguments: &Arguments) -> KeptArguments {
        let mut value = arguments.value.clone();
        let hidden = hide(&mut value, &self.hidden_fields);
        let most = usize::try_from(self.max_bytes).unwrap_or(usize::MAX);
        let too_long = arguments.bytes > most;
        if too_long {
            value = serde_json::Value::Object(serde_json::Map::new());
        }
        KeptArguments {
            value,
            complete: !hidden && !too_long,
        }
    }
}

/// Replaces the values of some fields. Whether there were any.
fn hide(value: &mut serde_json::Value, fields: &[Box<str>]) -> bool {
    let mut hidden = false;
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                if fields.iter().any(|field| field.eq_ignore_ascii_case(key)) {
                    *value = "[hidden]".into();
                    hidden = true;
                } else {
                    hidden |= hide(value, fields);
                }
            }
        }
        serde_json::Value::Array(values) => {
            for value in values {
                hidden |= hide(value, fields);
            }
        }
        _ => {}
    }
    hidden
}

/// How a tenant keeps to the rules of the Cycles protocol, where it does: budgets that are
/// missing are skipped, scopes decide from the root down, the first that fails alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CyclesRules {
    /// For reservations that name no lease: 1 s to 24 h, in milliseconds.
    pub default_ttl_ms: u32,
    /// Longer ones are shortened to it: 1 s to 24 h, in milliseconds.
    pub max_ttl_ms: u32,
    /// How often a lease can be extended.
    pub max_extensions: u32,
}

impl CyclesRules {
    /// The lease that a reservation gets.
    pub fn ttl(&self, asked: Option<Ttl>) -> Duration {
        let default = Duration::from_millis(self.default_ttl_ms.into());
        let most = Duration::from_millis(self.max_ttl_ms.into());
        asked.map_or(default, Ttl::get).min(most)
    }
}

impl Default for CyclesRules {
    /// 60 s, 1 h, 10.
    fn default() -> Self {
        Self {
            default_ttl_ms: 60_000,
            max_ttl_ms: 3_600_000,
            max_extensions: 10,
        }
    }
}

/// A scope whose agents may not act until an operator lifts it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    /// Which: applies like a budget's scope, without wildcards.
    pub scope: Scope,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub reason: Box<str>,
    /// The rule that froze it; nothing for an operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<RuleRef>,
    /// Since when.
    pub since: Timestamp,
}

/// Most tools of one tenant.
pub const TOOLS_MAX: usize = 1_000;

/// Most freezes of one tenant.
pub const FREEZES_MAX: usize = 1_000;

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
    /// What an action is taken for that the catalogue does not list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unknown_action: Option<UnknownAction>,
    /// How long what an agent did counts as of late.
    #[serde(default, skip_serializing_if = "ActivityWindow::is_default")]
    pub activity_window: ActivityWindow,
    /// What the ledger keeps of arguments; nothing for their hash alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_arguments: Option<KeepArguments>,
    /// The rules of the Cycles protocol in place of Remit's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cycles: Option<CyclesRules>,
}

impl Settings {
    /// The lease that a reservation gets.
    pub fn ttl(&self, asked: Option<Ttl>) -> Duration {
        match &self.cycles {
            Some(rules) => rules.ttl(asked),
            None => asked.unwrap_or(Ttl::DEFAULT).get(),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            display_name: "".into(),
            state: TenantState::Active,
            unprovisioned_rule: UnprovisionedRule::RequireToolsetBudget,
            default_overage_policy: OveragePolicy::AllowIfAvailable,
            unknown_action: None,
            activity_window: ActivityWindow::default(),
            keep_arguments: None,
            cycles: None,
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

/// What beside budgets decides on a tenant's actions.
#[derive(Debug, Default)]
pub struct Rules {
    /// The tenant's tools.
    pub tools: Versioned<Vec<Tool>>,
    /// The policy for all tenants and the tenant's own, as far as there are such.
    pub policies: Vec<Arc<Policy>>,
    /// Scopes that are stopped.
    pub freezes: Versioned<Vec<Freeze>>,
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
    /// What beside budgets decides.
    pub rules: Rules,
    /// The tools, indexed.
    pub catalogue: Catalogue,
}

impl TenantConfig {
    /// Indexes budgets, present and absent ones.
    pub fn new(tenant: Tenant, budgets: impl IntoIterator<Item = Budget>) -> Self {
        let mut config = Self {
            tenant,
            by_no: HashMap::new(),
            by_shape: Vec::new(),
            rules: Rules::default(),
            catalogue: Catalogue::default(),
        }
        .with_rules(Rules::default());
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

    /// The same with what beside budgets decides.
    pub fn with_rules(mut self, rules: Rules) -> Self {
        let unknown = self.tenant.settings.unknown_action.clone();
        self.catalogue = Catalogue::new(&rules.tools.document, unknown);
        self.rules = rules;
        self
    }

    /// What an action is; nothing where it is unknown and so denied.
    pub fn resolve(&self, action: &Action) -> Option<Resolved> {
        self.catalogue.resolve(action)
    }

    /// The subject as budgets see it: in the toolset that the catalogue gives the action,
    /// whatever the caller says.
    pub fn placed<'a>(&self, subject: &'a Subject, action: &Action) -> Cow<'a, Subject> {
        let toolset = self
            .catalogue
            .tool(&action.name)
            .and_then(|tool| tool.toolset.as_ref());
        match toolset {
            Some(toolset) if subject.toolset() != Some(toolset.canonical()) => {
                Cow::Owned(subject.in_toolset(toolset))
            }
            _ => Cow::Borrowed(subject),
        }
    }

    /// Adds to caps which tools a threshold leaves, as the catalogue has them.
    pub fn tighten(&self, caps: &mut Caps, binding: &Binding) {
        let Some(highest) = binding.highest.filter(|_| !self.catalogue.is_empty()) else {
            return;
        };
        let lists = self.catalogue.lists(highest.tier());
        caps.tighten(&Caps {
            tool_allowlist: Some(lists.allowed.clone()),
            tool_denylist: lists.denied.clone(),
            ..Caps::default()
        });
    }

    /// Whether some rule reads what agents did of late.
    pub fn reads_activity(&self) -> bool {
        self.rules
            .policies
            .iter()
            .any(|policy| policy.reads_activity)
    }

    /// Whether some rule reads what is left of budgets.
    pub fn reads_budgets(&self) -> bool {
        self.rules
            .policies
            .iter()
            .any(|policy| policy.reads_budgets)
    }

    /// Whether decisions go by more than budgets, and so have something to explain.
    pub fn has_rules(&self) -> bool {
        !self.rules.policies.is_empty()
            || !self.catalogue.is_empty()
            || self.tenant.settings.unknown_action.is_some()
    }

    /// The versions that decisions go by.
    pub fn versions(&self) -> Versions {
        let of = |all_tenants| {
            let mut policies = self.rules.policies.iter();
            policies
                .find(|policy| policy.all_tenants == all_tenants)
                .map_or(0, |policy| policy.version)
        };
        Versions {
            catalogue: self.rules.tools.version,
            policy: of(false),
            all_tenants: of(true),
        }
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

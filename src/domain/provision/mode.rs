//! What a document does where something stands already.

use super::{BudgetSpec, TenantSpec};
use crate::domain::budget::{Budget, named};
use crate::domain::refusal::Refusal;
use crate::domain::tenant::{Settings, Tenant};

/// What a document does where something stands already.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Mode {
    /// Brings it to what the document says.
    #[default]
    Apply,
    /// Refuses.
    CreateOnly,
    /// Changes these fields and leaves the rest; refuses what does not stand.
    Update(Vec<Field>),
}

named! {
    /// A field of tenants or budgets that can be changed alone.
    #[derive(PartialOrd, Ord)]
    Field {
        /// For people.
        DisplayName = "display_name",
        /// Of tenants and of budgets.
        State = "state",
        /// What an action without a budget of its own gets.
        UnprovisionedRule = "unprovisioned_rule",
        /// For reservations that name none.
        DefaultOveragePolicy = "default_overage_policy",
        /// What an action is taken for that the catalogue does not list.
        UnknownAction = "unknown_action",
        /// How long what an agent did counts as of late.
        ActivityWindow = "activity_window",
        /// What the ledger keeps of arguments.
        KeepArguments = "keep_arguments",
        /// The rules of the Cycles protocol.
        CyclesCompatible = "cycles_compatible",
        /// How much, limited or not.
        Allocation = "allocation",
        /// How much debt.
        OverdraftLimit = "overdraft_limit",
        /// What a new period takes over.
        CarryOver = "carry_over",
        /// What it leaves to agents.
        Thresholds = "thresholds",
        /// What happens to an action that it has not enough for.
        OnExceeded = "on_exceeded",
    }
}

impl Mode {
    /// Whether something may be in the document that stands, or does not.
    pub(super) fn admits(
        &self,
        stands: bool,
        missing: impl FnOnce() -> Refusal,
        target: impl FnOnce() -> String,
    ) -> Result<(), Refusal> {
        match (self, stands) {
            (Self::CreateOnly, true) => Err(Refusal::AlreadyProvisioned { target: target() }),
            (Self::Update(_), false) => Err(missing()),
            _ => Ok(()),
        }
    }

    /// A tenant's settings as they shall be.
    pub(super) fn settings(&self, spec: &TenantSpec, before: Option<&Tenant>) -> Settings {
        let (Self::Update(mask), Some(before)) = (self, before) else {
            return spec.settings.clone();
        };
        let (mut made, said) = (before.settings.clone(), spec.settings.clone());
        for field in mask {
            match field {
                Field::DisplayName => made.display_name = said.display_name.clone(),
                Field::State => made.state = said.state,
                Field::UnprovisionedRule => made.unprovisioned_rule = said.unprovisioned_rule,
                Field::DefaultOveragePolicy => {
                    made.default_overage_policy = said.default_overage_policy;
                }
                Field::UnknownAction => made.unknown_action = said.unknown_action.clone(),
                Field::ActivityWindow => made.activity_window = said.activity_window,
                Field::KeepArguments => made.keep_arguments = said.keep_arguments.clone(),
                Field::CyclesCompatible => made.cycles = said.cycles,
                Field::Allocation
                | Field::OverdraftLimit
                | Field::CarryOver
                | Field::Thresholds
                | Field::OnExceeded => {}
            }
        }
        made
    }

    /// A budget as it shall be.
    pub(super) fn budget(&self, spec: &BudgetSpec, before: Option<&Budget>) -> BudgetSpec {
        let (Self::Update(mask), Some(before)) = (self, before) else {
            return spec.clone();
        };
        let mut made = BudgetSpec {
            key: spec.key.clone(),
            calendar: before.calendar.clone(),
            terms: before.terms,
            thresholds: before.thresholds.clone(),
            on_exceeded: before.on_exceeded.clone(),
        };
        for field in mask {
            match field {
                Field::State => made.terms.state = spec.terms.state,
                Field::Allocation => made.terms.limit = spec.terms.limit,
                Field::OverdraftLimit => made.terms.overdraft_limit = spec.terms.overdraft_limit,
                Field::CarryOver => made.terms.carry_over = spec.terms.carry_over,
                Field::Thresholds => made.thresholds = spec.thresholds.clone(),
                Field::OnExceeded => made.on_exceeded = spec.on_exceeded.clone(),
                Field::DisplayName
                | Field::UnprovisionedRule
                | Field::DefaultOveragePolicy
                | Field::UnknownAction
                | Field::ActivityWindow
                | Field::KeepArguments
                | Field::CyclesCompatible => {}
            }
        }
        made
    }
}

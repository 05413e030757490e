//! What a document does where something stands already.

use super::{BudgetSpec, TenantSpec};
use crate::domain::budget::{Budget, BudgetState, named};
use crate::domain::refusal::Refusal;
use crate::domain::tenant::{CyclesRules, Settings, Tenant};

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
        /// One of them: for reservations that name no lease.
        CyclesDefaultTtl = "cycles_compatible.default_ttl",
        /// One of them: the longest lease.
        CyclesMaxTtl = "cycles_compatible.max_ttl",
        /// One of them: how often a lease can be extended.
        CyclesMaxExtensions = "cycles_compatible.max_extensions",
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
        // What is not said is the default, as where the rules are set as a whole.
        let rules = said.cycles.unwrap_or_default();
        // A tenant without these rules gets none by a part of them: it would give up
        // default-deny in passing.
        let part = |made: &mut Settings, set: fn(&mut CyclesRules, CyclesRules)| {
            made.cycles.iter_mut().for_each(|own| set(own, rules));
        };
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
                Field::CyclesDefaultTtl => {
                    part(&mut made, |own, said| {
                        own.default_ttl_ms = said.default_ttl_ms
                    });
                }
                Field::CyclesMaxTtl => {
                    part(&mut made, |own, said| own.max_ttl_ms = said.max_ttl_ms);
                }
                Field::CyclesMaxExtensions => {
                    part(&mut made, |own, said| {
                        own.max_extensions = said.max_extensions
                    });
                }
                Field::Allocation
                | Field::OverdraftLimit
                | Field::CarryOver
                | Field::Thresholds
                | Field::OnExceeded => {}
            }
        }
        made
    }

    /// A budget as it shall be. One that is closed stays as it is, whatever its state was
    /// when the update was thought of; a whole document can open it again.
    pub(super) fn budget(
        &self,
        spec: &BudgetSpec,
        before: Option<&Budget>,
    ) -> Result<BudgetSpec, Refusal> {
        let (Self::Update(mask), Some(before)) = (self, before) else {
            return Ok(spec.clone());
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
                | Field::CyclesCompatible
                | Field::CyclesDefaultTtl
                | Field::CyclesMaxTtl
                | Field::CyclesMaxExtensions => {}
            }
        }
        let changes = made.terms != before.terms
            || made.thresholds != before.thresholds
            || made.on_exceeded != before.on_exceeded;
        match before.terms.state {
            BudgetState::Closed if changes => Err(Refusal::BudgetClosed),
            _ => Ok(made),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::amount::{Amount, Unit};
    use crate::domain::budget::OnExceeded;
    use crate::domain::id::{BudgetNo, Sequence, TenantId};
    use crate::domain::period::{Calendar, Period};
    use crate::domain::provision::{BudgetKey, plain_terms};
    use crate::domain::scope::Scope;
    use crate::domain::time::Timestamp;

    fn update(fields: &[&str]) -> Mode {
        let fields = fields.iter().map(|field| Field::parse(field));
        Mode::Update(fields.collect::<Result<_, _>>().expect("fields"))
    }

    fn tenant(cycles: Option<CyclesRules>) -> Tenant {
        Tenant {
            id: TenantId::parse("acme").expect("a name"),
            settings: Settings {
                cycles,
                ..Settings::default()
            },
            created_at: Timestamp::default(),
        }
    }

    fn rules(default_ttl_ms: u32, max_ttl_ms: u32, max_extensions: u32) -> Option<CyclesRules> {
        Some(CyclesRules {
            default_ttl_ms,
            max_ttl_ms,
            max_extensions,
        })
    }

    #[test]
    fn one_of_the_rules_changes_without_the_others() {
        let asked = |cycles| TenantSpec {
            id: TenantId::parse("acme").expect("a name"),
            settings: tenant(cycles).settings,
        };
        let spec = asked(rules(7, 8, 9));
        for (field, made) in [
            ("cycles_compatible.default_ttl", rules(7, 2, 3)),
            ("cycles_compatible.max_ttl", rules(1, 8, 3)),
            ("cycles_compatible.max_extensions", rules(1, 2, 9)),
            ("cycles_compatible", rules(7, 8, 9)),
            ("state", rules(1, 2, 3)),
        ] {
            let before = tenant(rules(1, 2, 3));
            let settings = update(&[field]).settings(&spec, Some(&before));
            assert_eq!(settings.cycles, made, "{field}");
        }
        let two = update(&[
            "cycles_compatible.max_ttl",
            "cycles_compatible.max_extensions",
        ]);
        let before = tenant(rules(1, 2, 3));
        assert_eq!(two.settings(&spec, Some(&before)).cycles, rules(1, 8, 9));
        // Nothing said is the default.
        let made = two.settings(&asked(None), Some(&before)).cycles;
        assert_eq!(made, rules(1, 3_600_000, 10));
        // A part of the rules makes no tenant keep to them.
        assert_eq!(two.settings(&spec, Some(&tenant(None))).cycles, None);
    }

    #[test]
    fn an_update_opens_no_closed_budget() {
        let scope = Scope::parse("tenant:acme").expect("a scope");
        let calendar = Calendar::new(Period::Total, "").expect("a calendar");
        let of = |state| {
            let mut terms = plain_terms(Amount::ZERO);
            terms.state = state;
            terms
        };
        let spec = |state| BudgetSpec {
            key: BudgetKey {
                scope: scope.clone(),
                unit: Unit::Tokens,
                period: Period::Total,
            },
            calendar: calendar.clone(),
            terms: of(state),
            thresholds: Vec::new().into(),
            on_exceeded: OnExceeded::default(),
        };
        let before = |state| Budget {
            no: BudgetNo(1),
            scope: scope.clone(),
            unit: Unit::Tokens,
            calendar: calendar.clone(),
            terms: of(state),
            thresholds: Vec::new().into(),
            on_exceeded: OnExceeded::default(),
            present: true,
            limit_seq: Sequence(1),
            created_at: Timestamp::default(),
        };
        use BudgetState::{Active, Closed, Frozen};
        let made = |mode: &Mode, from, to| mode.budget(&spec(to), Some(&before(from)));
        let state = update(&["state"]);
        for to in [Active, Frozen] {
            assert_eq!(made(&state, Closed, to), Err(Refusal::BudgetClosed));
        }
        for (from, to) in [(Frozen, Active), (Active, Closed), (Closed, Closed)] {
            assert_eq!(made(&state, from, to), Ok(spec(to)));
        }
        assert_eq!(made(&Mode::Apply, Closed, Active), Ok(spec(Active)));
    }
}

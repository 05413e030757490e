//! The ways in which an answer can be "no".
//!
//! A [`Denial`] is a decision: it is recorded and sent with status OK. A
//! [`Refusal`] means that nothing was decided or changed; `api/status.rs` words
//! it as a gRPC status.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::amount::{Amount, Unit};
use super::budget::named;
use super::catalogue::Tier;
use super::id::{Malformed, ReservationId};
use super::narrowing::{BasisPoints, Highest};
use super::period::Period;
use super::scope::Scope;
use super::time::Timestamp;

named! {
    /// Why an action was denied, strictest first.
    #[derive(PartialOrd, Ord)]
    ReasonCode {
        /// Something else was asked for under the idempotency key of an approval. Only in
        /// the ledger: the caller gets `IDEMPOTENCY_MISMATCH`.
        ApprovalMismatch = "APPROVAL_MISMATCH",
        /// An operator stopped the tenant.
        TenantSuspended = "TENANT_SUSPENDED",
        /// The tenant is over for good.
        TenantClosed = "TENANT_CLOSED",
        /// The agent, or a scope around it, is stopped.
        ScopeFrozen = "SCOPE_FROZEN",
        /// The catalogue does not list the action.
        UnknownAction = "UNKNOWN_ACTION",
        /// Nobody gave this action a budget.
        BudgetNotProvisioned = "BUDGET_NOT_PROVISIONED",
        /// An operator stopped a budget.
        BudgetFrozen = "BUDGET_FROZEN",
        /// A budget was retired.
        BudgetClosed = "BUDGET_CLOSED",
        /// More was used than the budget could bear.
        OverdraftLimitExceeded = "OVERDRAFT_LIMIT_EXCEEDED",
        /// Debt on a budget that allows none.
        DebtOutstanding = "DEBT_OUTSTANDING",
        /// A rule denies it.
        PolicyDenied = "POLICY_DENIED",
        /// A rule that could deny it can't be evaluated.
        PolicyError = "POLICY_ERROR",
        /// So much of a budget is used that it leaves only lower tiers.
        CapabilityNarrowed = "CAPABILITY_NARROWED",
        /// Not enough remains.
        BudgetExceeded = "BUDGET_EXCEEDED",
        /// A rule wants a person to approve it.
        ApprovalRequired = "APPROVAL_REQUIRED",
    }
}

/// What was asked for, and what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortage {
    /// What was asked for.
    pub asked: Amount,
    /// What is left; negative after an allocation was lowered.
    pub remaining: i64,
    /// How much of what is missing is only held by open reservations.
    pub held_by_others: Amount,
}

/// The rule that a reason comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleRef {
    /// Its id.
    pub id: Box<str>,
    /// It is one of those for all tenants.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub all_tenants: bool,
    /// What it tells callers.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub text: Box<str>,
}

/// How far a budget has narrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Narrowed {
    /// How much of it is used.
    pub used: BasisPoints,
    /// The threshold that was reached.
    pub from: BasisPoints,
    /// What it leaves.
    pub highest: Highest,
    /// The action's tier.
    pub tier: Tier,
}

/// One reason for a denial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// What kind.
    pub code: ReasonCode,
    /// The scope that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Arc<str>>,
    /// The unit that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<Unit>,
    /// For `BUDGET_EXCEEDED`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortage: Option<Shortage>,
    /// For `POLICY_DENIED`, `POLICY_ERROR`, `APPROVAL_REQUIRED`, and `SCOPE_FROZEN` where a
    /// rule froze it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<RuleRef>,
    /// For `CAPABILITY_NARROWED`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub narrowed: Option<Narrowed>,
}

impl Reason {
    /// A reason that is about the tenant as a whole.
    pub fn of_tenant(code: ReasonCode) -> Self {
        Self {
            code,
            scope: None,
            unit: None,
            shortage: None,
            rule: None,
            narrowed: None,
        }
    }

    /// A reason that a rule gives.
    pub fn of_rule(code: ReasonCode, rule: RuleRef) -> Self {
        Self {
            rule: Some(rule),
            ..Self::of_tenant(code)
        }
    }

    /// What would have been needed to pass, in one sentence for a person.
    pub fn remedy(&self) -> String {
        let scope = self.scope.as_deref().unwrap_or("the subject");
        let unit = self.unit.map_or("", Unit::as_str);
        let rule = self.rule.as_ref().map_or("", |rule| &*rule.id);
        match self.code {
            ReasonCode::ApprovalMismatch => {
                "an approval of its own, under another idempotency key".into()
            }
            ReasonCode::TenantSuspended => "an operator has to set the tenant ACTIVE".into(),
            ReasonCode::TenantClosed => "nothing: a closed tenant stays closed".into(),
            ReasonCode::ScopeFrozen => format!("an operator has to lift the freeze of {scope}"),
            ReasonCode::UnknownAction => {
                "an operator has to list the action in the catalogue".into()
            }
            ReasonCode::BudgetNotProvisioned => match self.unit {
                Some(unit) => format!(
                    "an operator has to provision a budget in {unit} that applies to {scope}"
                ),
                None => format!("an operator has to provision a budget that applies to {scope}"),
            },
            ReasonCode::BudgetFrozen => {
                format!("an operator has to unfreeze the {unit} budget of {scope}")
            }
            ReasonCode::BudgetClosed => {
                format!("an operator has to reopen the {unit} budget of {scope}")
            }
            ReasonCode::OverdraftLimitExceeded | ReasonCode::DebtOutstanding => {
                format!("an operator has to fund the {unit} budget of {scope}")
            }
            ReasonCode::PolicyDenied => format!("the condition of rule {rule:?} must not hold"),
            ReasonCode::PolicyError => {
                format!("the arguments must be such that rule {rule:?} can be evaluated")
            }
            ReasonCode::ApprovalRequired => "a person has to approve it".into(),
            ReasonCode::CapabilityNarrowed => match self.narrowed {
                Some(narrowed) => format!(
                    "less than {} of the {unit} budget of {scope} may be used, or the action's tier be {}",
                    narrowed.from,
                    narrowed
                        .highest
                        .tier()
                        .map_or("none".into(), |tier| format!("{tier} at the most"))
                ),
                None => format!("more of the {unit} budget of {scope} must be left"),
            },
            ReasonCode::BudgetExceeded => match self.shortage {
                Some(short) => format!(
                    "{} more {unit} in {scope}",
                    i128::from(short.asked.get()) - i128::from(short.remaining)
                ),
                None => format!("more {unit} in {scope}"),
            },
        }
    }
}

impl fmt::Display for Reason {
    /// One sentence for a person.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scope = self.scope.as_deref().unwrap_or("the subject");
        let unit = self.unit.map_or("", Unit::as_str);
        match self.code {
            ReasonCode::ApprovalMismatch => {
                f.write_str("the approval under this idempotency key is of something else")
            }
            ReasonCode::TenantSuspended => f.write_str("the tenant is suspended"),
            ReasonCode::TenantClosed => f.write_str("the tenant is closed"),
            ReasonCode::ScopeFrozen => match &self.rule {
                Some(rule) => write!(f, "{scope} is frozen: {}", rule.text),
                None => write!(f, "{scope} is frozen"),
            },
            ReasonCode::UnknownAction => f.write_str("the catalogue does not list this action"),
            ReasonCode::PolicyDenied | ReasonCode::PolicyError | ReasonCode::ApprovalRequired => {
                let (id, text) = self
                    .rule
                    .as_ref()
                    .map_or(("", ""), |rule| (&rule.id, &rule.text));
                match self.code {
                    ReasonCode::PolicyDenied => write!(f, "rule {id:?} denies it")?,
                    ReasonCode::PolicyError => write!(f, "rule {id:?} can't be evaluated")?,
                    _ => write!(f, "rule {id:?} wants an approval")?,
                }
                if text.is_empty() {
                    return Ok(());
                }
                write!(f, ": {text}")
            }
            ReasonCode::CapabilityNarrowed => match self.narrowed {
                Some(narrowed) => write!(
                    f,
                    "{} of the {unit} budget of {scope} is used: it leaves {}, and the action has tier {}",
                    narrowed.used, narrowed.highest, narrowed.tier
                ),
                None => write!(f, "the {unit} budget of {scope} has narrowed"),
            },
            ReasonCode::BudgetNotProvisioned if self.unit.is_some() => {
                write!(
                    f,
                    "no {unit} budget is provisioned for {scope}, which the action costs"
                )
            }
            ReasonCode::BudgetNotProvisioned => {
                write!(f, "no budget is provisioned for {scope}")
            }
            ReasonCode::BudgetFrozen => write!(f, "the {unit} budget of {scope} is frozen"),
            ReasonCode::BudgetClosed => write!(f, "the {unit} budget of {scope} is closed"),
            ReasonCode::OverdraftLimitExceeded => {
                write!(f, "the {unit} budget of {scope} is over its limit")
            }
            ReasonCode::DebtOutstanding => {
                write!(f, "the {unit} budget of {scope} has debt outstanding")
            }
            ReasonCode::BudgetExceeded => match self.shortage {
                Some(short) => write!(
                    f,
                    "{} {unit} asked of {scope}, {} left",
                    short.asked, short.remaining
                ),
                None => write!(f, "the {unit} budget of {scope} is exceeded"),
            },
        }
    }
}

/// A decision against the action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// Why, strictest first. Never empty.
    pub reasons: Vec<Reason>,
    /// How long to wait, at the least, until it can pass without an operator's
    /// help. Nothing where waiting does not help.
    pub retry_after: Option<Duration>,
}

/// Nothing was decided, and nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such tenant, or none that the caller may see.
    #[error("no such tenant")]
    TenantNotFound,
    /// No such reservation of this tenant, or none that the caller may see.
    #[error("no such reservation: {0}")]
    ReservationNotFound(ReservationId),
    /// No such budget of this tenant.
    #[error("no such budget: {scope} {unit} {period}")]
    BudgetNotFound {
        /// As asked for.
        scope: Scope,
        /// As asked for.
        unit: Unit,
        /// As asked for.
        period: Period,
    },
    /// No such entry in this tenant's chain.
    #[error("no such ledger entry")]
    EntryNotFound,
    /// No such key, or none that the caller may see.
    #[error("no such API key")]
    ApiKeyNotFound,
    /// The idempotency key was used with other content.
    #[error("the idempotency key was used for another request: {field} differs")]
    IdempotencyMismatch {
        /// The first field that differs.
        field: &'static str,
    },
    /// The idempotency key was used so long ago that its answer is in an archive.
    #[error("the idempotency key was used long ago, its answer is archived: use another key")]
    AnswerArchived,
    /// Budgets apply, or the reservation holds, but not in this unit.
    #[error("{unit} is not counted here; counted are: {}", list(.counted))]
    UnitMismatch {
        /// The request's field.
        field: &'static str,
        /// The unit without a budget.
        unit: Unit,
        /// Units that have one.
        counted: Vec<Unit>,
        /// The first scope with a budget, from the root down; nothing of a reservation.
        scope: Option<Arc<str>>,
    },
    /// The reservation's time, with grace, is over.
    #[error("the reservation expired at {at}")]
    ReservationExpired {
        /// When.
        at: Timestamp,
    },
    /// The reservation was settled before.
    #[error("the reservation is {state} already")]
    ReservationFinalized {
        /// COMMITTED or RELEASED.
        state: &'static str,
    },
    /// An operator stopped a budget.
    #[error("the budget of {scope} is frozen")]
    BudgetFrozen {
        /// Whose.
        scope: Arc<str>,
    },
    /// It shall be created and stands already.
    #[error("{target} exists already")]
    AlreadyProvisioned {
        /// What.
        target: String,
    },
    /// The name is taken.
    #[error("there is a subscription of that name already")]
    SubscriptionExists,
    /// 16 of a tenant's.
    #[error("the tenant has as many subscriptions as it can have: 16")]
    TooManySubscriptions,
    /// No such subscription of this tenant.
    #[error("no such subscription")]
    SubscriptionNotFound,
    /// A person has not decided yet.
    #[error("the reservation waits for an approval: nothing can be committed or extended yet")]
    ApprovalPending,
    /// A person decided before.
    #[error("the approval is {state} already, by {by}")]
    ApprovalResolved {
        /// How it ended.
        state: &'static str,
        /// Who was first.
        by: String,
    },
    /// Nobody decided in time.
    #[error("the approval's time was over at {at}: it counts as denied")]
    ApprovalExpired {
        /// When.
        at: Timestamp,
    },
    /// Something was stopped since the approval was asked for.
    #[error("it can't be approved: {reason}")]
    ApprovalStopped {
        /// What.
        reason: Box<Reason>,
    },
    /// The key asked for the approval itself.
    #[error("the API key asked for this approval: another one has to decide")]
    OwnApproval,
    /// The key speaks for none of the groups.
    #[error("the API key must speak for one of: {}", .groups.join(", "))]
    NotAnApprover {
        /// Groups that may decide.
        groups: Vec<Box<str>>,
    },
    /// Record takes only reservations that have expired.
    #[error("the reservation is {state}: only an expired one can be recorded")]
    ReservationNotExpired {
        /// Its state.
        state: &'static str,
    },
    /// More was used than reserved, and the policy is REJECT.
    #[error("{actual} {unit} used and {reserved} reserved: the overage policy is REJECT")]
    OverageRejected {
        /// The unit.
        unit: Unit,
        /// What was used.
        actual: Amount,
        /// What was reserved.
        reserved: Amount,
    },
    /// More was used than the overdraft limit takes.
    #[error("debt of {scope} would be {debt} {unit}, its overdraft limit is {limit}")]
    OverdraftLimitExceeded {
        /// The balance.
        scope: Arc<str>,
        /// The unit.
        unit: Unit,
        /// What the debt would be.
        debt: Amount,
        /// What it may be.
        limit: Amount,
    },
    /// The lease would end too far in the future.
    #[error("the lease would end more than 24 h from now")]
    LeaseTooLong,
    /// Extended as often as Cycles' rules let, or over too many different sets of balances.
    #[error("the reservation was extended too often, or over too many different sets of balances")]
    TooManyExtensions,
    /// An operator stopped the tenant.
    #[error("the tenant is suspended")]
    TenantSuspended,
    /// The tenant is over for good.
    #[error("the tenant is closed")]
    TenantClosed,
    /// Record with amounts, and no budget applies.
    #[error("no budget applies to {scope}")]
    BudgetNotProvisioned {
        /// The subject.
        scope: Arc<str>,
    },
    /// The budget is retired.
    #[error("the budget is closed")]
    BudgetClosed,
    /// There is no allocation that funding could change.
    #[error("the budget is unlimited: there is nothing to fund")]
    BudgetUnlimited,
    /// Too many expiring credits.
    #[error("the balance must have {0}")]
    TooManyCredits(Malformed),
    /// A debit of more than remains.
    #[error("{asked} asked and {remaining} left")]
    InsufficientRemaining {
        /// What was to be taken.
        asked: Amount,
        /// What remains.
        remaining: i64,
    },
    /// More tools than can be kept.
    #[error("a tenant can have at most {} tools", super::tenant::TOOLS_MAX)]
    TooManyTools,
    /// The catalogue puts the action into a toolset that the key may not act in.
    #[error("the API key may not act for {scope}, where the catalogue has this action")]
    ScopeNotPermitted {
        /// The subject, in the catalogue's toolset.
        scope: String,
    },
    /// More scopes than can be kept.
    #[error("a tenant can have at most {} freezes", super::tenant::FREEZES_MAX)]
    TooManyFreezes,
    /// A credit that expires at once.
    #[error("expire_time must be in the future")]
    CreditExpired,
    /// 64 bits can't hold the result.
    #[error("the amounts are too large to be added up")]
    AmountOverflow,
    /// Within the core only: the answer would not be a success, and it is not
    /// known whether the idempotency key has one pinned to it.
    /// [`super::state::Applied::KeyNeeded`] is what becomes of it.
    #[error("it is not known whether the idempotency key was used")]
    KeyUnknown,
    /// A change that lifts a stop, and the caller may not.
    #[error("{target}: this change lifts a stop and needs PERMISSION_LOOSEN")]
    LooseningNotPermitted {
        /// The thing.
        target: String,
    },
}

fn list(units: &[Unit]) -> String {
    if units.is_empty() {
        return "none".to_owned();
    }
    let names: Vec<_> = units.iter().map(|unit| unit.as_str()).collect();
    names.join(", ")
}

impl From<super::budget::Overflow> for Refusal {
    fn from(_: super::budget::Overflow) -> Self {
        Self::AmountOverflow
    }
}

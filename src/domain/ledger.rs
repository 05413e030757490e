//! The ledger: what an entry says, its canonical bytes and the hash chain.
//!
//! `hash = SHA-256(prev_hash ‖ body)`, where `body` is the entry as compact JSON,
//! fields in the order of [`Body`], absent ones left out. The bytes are stored
//! as they were hashed, so that any program can verify an export
//! (`docs/ledger.md`).

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::activity::Counts;
use super::amount::{Amount, Amounts, Unit};
use super::approve::Approval;
use super::budget::{Balance, Budget, Limit, OnExceeded, Terms, named};
use super::caps::Caps;
use super::catalogue::{Resolved, Tool};
use super::id::{BalanceNo, BudgetNo, IdempotencyKey, KeyId, ReservationId, Sequence, TenantId};
use super::narrowing::{BasisPoints, Highest, Threshold};
use super::period::Period;
use super::policy::PolicyDocument;
use super::policy::ruling::Matched;
use super::refusal::{Reason, RuleRef};
use super::request::{Action, Context, Digest, Funding, Metadata, Metrics, Origin, OveragePolicy};
use super::scope::{Scope, Subject};
use super::subscription::SubscriptionRecord;
use super::tenant::{Freeze, Settings};
use super::time::Timestamp;

/// SHA-256 over an entry and all before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChainHash(pub [u8; 32]);

impl ChainHash {
    /// What the first entry of a chain follows.
    pub const GENESIS: Self = Self([0; 32]);

    /// The hash of an entry that follows this one.
    pub fn next(self, body: &str) -> Self {
        Self(
            Sha256::new()
                .chain_update(self.0)
                .chain_update(body)
                .finalize()
                .into(),
        )
    }

    /// Takes back what was stored; nothing where it is no hash.
    pub fn from_stored(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Debug for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

named! {
    /// What an entry records.
    EntryKind {
        /// A recorded Decide.
        Decide = "DECIDE",
        /// A Reserve, allowed or denied.
        Reserve = "RESERVE",
        /// A Commit.
        Commit = "COMMIT",
        /// A Release.
        Release = "RELEASE",
        /// An Extend, allowed or denied.
        Extend = "EXTEND",
        /// A reservation that was not settled in time.
        Expire = "EXPIRE",
        /// A Record.
        Record = "RECORD",
        /// A FundBudget.
        Fund = "FUND",
        /// A balance was opened.
        BalanceOpened = "BALANCE_OPENED",
        /// What was left of a credit lapsed.
        CreditExpired = "CREDIT_EXPIRED",
        /// A Provision.
        Provision = "PROVISION",
        /// A CreateApiKey.
        ApiKeyCreated = "API_KEY_CREATED",
        /// A RevokeApiKey.
        ApiKeyRevoked = "API_KEY_REVOKED",
        /// A rule called for attention over the decision before it.
        Incident = "INCIDENT",
        /// A person decided on what waited for them.
        Resolve = "RESOLVE",
        /// A CreateSubscription or DeleteSubscription.
        Subscription = "SUBSCRIPTION",
    }
}

named! {
    /// What was decided.
    Decision {
        /// The action may happen now.
        Allow = "ALLOW",
        /// The action may happen now within caps.
        AllowWithCaps = "ALLOW_WITH_CAPS",
        /// A person has to approve it.
        RequireApproval = "REQUIRE_APPROVAL",
        /// The action may not happen.
        Deny = "DENY",
    }
}

fn is_zero(value: &i64) -> bool {
    *value == 0
}

/// What a balance was after an entry: allocated (nothing where unlimited),
/// reserved, spent, debt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct After(pub Option<Amount>, pub Amount, pub Amount, pub Amount);

impl After {
    /// What a balance is now, under a limit.
    pub fn of(balance: &Balance, limit: Limit) -> Self {
        Self(
            balance.allocated(limit),
            balance.reserved,
            balance.spent,
            balance.debt,
        )
    }
}

/// What an entry did to one balance. A balance that was only looked at has a
/// movement without changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Movement {
    /// Which.
    pub balance: BalanceNo,
    /// Added to what is granted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub granted: i64,
    /// Added to what is reserved.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reserved: i64,
    /// Added to what is spent.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub spent: i64,
    /// Added to what is owed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub debt: i64,
    /// The mark of a capped use was set or taken away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over_limit: Option<bool>,
    /// What it was then.
    pub after: After,
}

impl Movement {
    /// The difference between a balance before and after an entry.
    pub fn between(before: &Balance, after: &Balance, limit: Limit) -> Self {
        let over = |b: &Balance| b.over_limit.is_some();
        Self {
            balance: after.no,
            granted: after.granted - before.granted,
            reserved: after.reserved.get() - before.reserved.get(),
            spent: after.spent.get() - before.spent.get(),
            debt: after.debt.get() - before.debt.get(),
            over_limit: (over(before) != over(after)).then(|| over(after)),
            after: After::of(after, limit),
        }
    }

    /// What the balance was before.
    pub fn before(&self) -> After {
        let less = |now: Amount, moved: i64| {
            let was = now.get().saturating_sub(moved);
            // A balance is never less than nothing.
            Amount::new(was).unwrap_or(Amount::ZERO)
        };
        let After(allocated, reserved, spent, debt) = self.after;
        After(
            allocated.map(|allocated| less(allocated, self.granted)),
            less(reserved, self.reserved),
            less(spent, self.spent),
            less(debt, self.debt),
        )
    }
}

/// A balance that an entry opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Its number from now on.
    pub balance: BalanceNo,
    /// Whose account.
    pub budget: BudgetNo,
    /// With wildcards filled in.
    pub scope: Arc<str>,
    /// Of every amount on it.
    pub unit: Unit,
    /// Of the budget.
    pub period: Period,
    /// When the period begins; nothing for TOTAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Timestamp>,
    /// When the period ends; nothing for TOTAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<Timestamp>,
}

/// What a caller asked for: all that a retry must repeat, beside subject, action
/// and context.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Estimates, actual use, additional or recorded amounts.
    #[serde(default, skip_serializing_if = "Amounts::is_empty")]
    pub amounts: Amounts,
    /// Reserve: the lease, where it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_us: Option<u64>,
    /// Reserve: the grace, where it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_us: Option<u64>,
    /// Extend: by how much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extend_by_us: Option<u64>,
    /// Reserve, Record: where it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overage_policy: Option<OveragePolicy>,
    /// Resolve: whether it may pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approve: Option<bool>,
    /// Resolve: the person.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub approver: Box<str>,
    /// Release, Resolve: why.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub reason: Box<str>,
    /// Commit, Record: what else was measured.
    #[serde(default, skip_serializing_if = "Metrics::is_empty")]
    pub metrics: Metrics,
    /// Given by the caller.
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    pub metadata: Metadata,
    /// Fund: what was to be changed, and how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub funding: Option<Funding>,
    /// Provision, CreateApiKey: SHA-256 of the document's parts, by field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub document: Vec<(Box<str>, Digest)>,
}

/// A budget as a Provision left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvisionedBudget {
    /// Its number within the tenant.
    pub no: BudgetNo,
    /// What it applies to.
    pub scope: Scope,
    /// What it counts.
    pub unit: Unit,
    /// When it is renewed.
    pub period: Period,
    /// By whose calendar.
    pub time_zone: Box<str>,
    /// What it allows.
    pub terms: Terms,
    /// What it leaves the more of it is used.
    #[serde(default, skip_serializing_if = "<[_]>::is_empty")]
    pub thresholds: Arc<[Threshold]>,
    /// What happens to an action that it has not enough for.
    #[serde(default, skip_serializing_if = "OnExceeded::is_deny")]
    pub on_exceeded: OnExceeded,
    /// False once it was taken away.
    pub present: bool,
}

impl From<&Budget> for ProvisionedBudget {
    fn from(budget: &Budget) -> Self {
        Self {
            no: budget.no,
            scope: budget.scope.clone(),
            unit: budget.unit,
            period: budget.calendar.period(),
            time_zone: budget.calendar.zone_name().into(),
            terms: budget.terms,
            thresholds: budget.thresholds.clone(),
            on_exceeded: budget.on_exceeded.clone(),
            present: budget.present,
        }
    }
}

named! {
    /// What became of one thing in a document.
    ChangeKind {
        /// It did not exist.
        Created = "CREATED",
        /// It existed otherwise.
        Changed = "CHANGED",
        /// It is absent now.
        Removed = "REMOVED",
        /// It was already so.
        Unchanged = "UNCHANGED",
    }
}

/// One line of a Provision's plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What became of it.
    pub kind: ChangeKind,
    /// The thing, for people.
    pub target: Box<str>,
    /// For CHANGED: `field: old -> new`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<Box<str>>,
    /// The change lifts a stop.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub loosens: bool,
}

impl Change {
    /// Whether a tenant or a budget was stopped, or let go again.
    pub fn is_of_state(&self) -> bool {
        self.details
            .iter()
            .any(|detail| detail.starts_with("state: "))
    }
}

/// A key as it was made, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// The public part of the key.
    pub key_id: KeyId,
    /// For people.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub display_name: Box<str>,
    /// What it may do.
    pub permissions: Vec<Box<str>>,
    /// Subjects that it is confined to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject_prefix: Option<Box<str>>,
    /// Groups that it speaks for when it decides on approvals.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approver_groups: Vec<Box<str>>,
    /// When it ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// A document that replaces the one before it as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versioned<T> {
    /// Counts its changes, from 1.
    pub version: i64,
    /// What it says.
    pub document: Arc<T>,
}

impl<T: Default> Default for Versioned<T> {
    /// Nothing was provisioned yet.
    fn default() -> Self {
        Self {
            version: 0,
            document: Arc::default(),
        }
    }
}

/// The versions of what a decision went by; 0 where there was none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The tenant's catalogue.
    pub catalogue: i64,
    /// The tenant's policy.
    pub policy: i64,
    /// The policy for all tenants.
    pub all_tenants: i64,
}

/// A budget's threshold that narrowed what an agent may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The balance's scope.
    pub scope: Arc<str>,
    /// Of the budget.
    pub unit: Unit,
    /// How much of it was used.
    pub used: BasisPoints,
    /// The threshold that was reached.
    pub from: BasisPoints,
    /// What it leaves; nothing where it only sets caps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub highest: Option<Highest>,
}

/// What a decision found out on its way: with the balances that it looked at all that its
/// rules could read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// What it went by.
    pub versions: Versions,
    /// What the catalogue says of the action; nothing where it is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved: Option<Resolved>,
    /// What the agent did with the tool of late, where a rule reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recent: Option<Counts>,
    /// Every rule that matched, enforced or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub matched: Vec<Matched>,
    /// The tightest threshold that was reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binding: Option<Binding>,
}

/// Arguments as the tenant keeps them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptArguments {
    /// What is kept of them.
    pub value: serde_json::Value,
    /// False where something was hidden or cut.
    pub complete: bool,
}

/// What an incident is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incident {
    /// The rule that raised it.
    pub rule: RuleRef,
    /// The entry of the decision.
    pub decision: Sequence,
    /// Who acted.
    pub agent: Box<str>,
    /// What the agent did with the tool of late, with this decision.
    pub recent: Counts,
    /// The agent was frozen.
    pub frozen: bool,
}

/// What an entry says. The order of the fields is the canonical order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Body {
    /// Whose chain.
    pub tenant: TenantId,
    /// From 1, without a gap.
    pub seq: Sequence,
    /// When it was decided.
    pub time: Timestamp,
    /// What it records.
    pub kind: EntryKind,
    /// The caller; nothing for what the server did by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyId>,
    /// Names the request in logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<Arc<str>>,
    /// W3C trace id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<Arc<str>>,
    /// As given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<IdempotencyKey>,
    /// Who acts, and where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Arc<Subject>>,
    /// What it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<Arc<Action>>,
    /// Circumstances.
    #[serde(default, skip_serializing_if = "Context::is_empty")]
    pub context: Context,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<Request>,
    /// What was decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
    /// Why it was denied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<Reason>,
    /// When it can pass at the earliest, if it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_us: Option<u64>,
    /// The reservation that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<ReservationId>,
    /// What the reservation holds after it.
    #[serde(default, skip_serializing_if = "Amounts::is_empty")]
    pub reserved: Amounts,
    /// When the reservation's lease ends after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// What was charged.
    #[serde(default, skip_serializing_if = "Amounts::is_empty")]
    pub charged: Amounts,
    /// What was given back.
    #[serde(default, skip_serializing_if = "Amounts::is_empty")]
    pub released: Amounts,
    /// What was used and not charged.
    #[serde(default, skip_serializing_if = "Amounts::is_empty")]
    pub uncovered: Amounts,
    /// The balance that was opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opened: Option<Opened>,
    /// What it did to which balance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub movements: Vec<Movement>,
    /// Provision: the plan.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
    /// Provision: what is set for the tenant from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
    /// Provision: budgets as they are from now on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<ProvisionedBudget>,
    /// CreateApiKey, RevokeApiKey: the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key: Option<KeyRecord>,
    /// The arguments, as far as the tenant keeps them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments: Option<KeptArguments>,
    /// ALLOW_WITH_CAPS: which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caps: Option<Caps>,
    /// What the decision found out on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Box<Explanation>>,
    /// What the incident is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incident: Option<Incident>,
    /// Provision: the catalogue from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub catalogue: Option<Versioned<Vec<Tool>>>,
    /// Provision: the policy from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Versioned<PolicyDocument>>,
    /// Provision, incident: all freezes from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freezes: Option<Versioned<Vec<Freeze>>>,
    /// REQUIRE_APPROVAL: what is waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Arc<Approval>>,
    /// The subscription, as it is from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subscription: Option<SubscriptionRecord>,
}

impl Body {
    /// An entry that says nothing yet.
    pub fn new(tenant: TenantId, kind: EntryKind) -> Self {
        Self {
            tenant,
            seq: Sequence::default(),
            time: Timestamp::default(),
            kind,
            key: None,
            request_id: None,
            trace_id: None,
            idempotency_key: None,
            subject: None,
            action: None,
            context: Context::default(),
            request: None,
            decision: None,
            reasons: Vec::new(),
            retry_after_us: None,
            reservation: None,
            reserved: Amounts::NONE,
            expires_at: None,
            charged: Amounts::NONE,
            released: Amounts::NONE,
            uncovered: Amounts::NONE,
            opened: None,
            movements: Vec::new(),
            changes: Vec::new(),
            settings: None,
            budgets: Vec::new(),
            api_key: None,
            arguments: None,
            caps: None,
            explanation: None,
            incident: None,
            catalogue: None,
            policy: None,
            freezes: None,
            approval: None,
            subscription: None,
        }
    }

    /// The same, said to come from a caller.
    pub fn from_origin(mut self, origin: &Origin) -> Self {
        self.key = origin.key.clone();
        self.request_id = Some(origin.request_id.clone());
        self.trace_id = Some(origin.trace_id.clone());
        self
    }

    /// Canonical text.
    fn canonical(&self) -> String {
        serde_json::to_string(self)
            .expect("keys are text and values plain types: nothing can fail in memory")
    }

    /// Names the first field in which a request with the same idempotency key
    /// differs from the one that this entry answered.
    pub fn first_difference(&self, other: &Self) -> Option<&'static str> {
        // What is asked of a reservation takes subject and action from it.
        let of_reservation = other.reservation.is_some();
        let fields = [
            (
                self.kind != EntryKind::Reserve && self.reservation != other.reservation,
                "reservation_id",
            ),
            (!of_reservation && self.subject != other.subject, "subject"),
            (!of_reservation && self.action != other.action, "action"),
            (self.context != other.context, "context"),
        ];
        if let Some((_, field)) = fields.into_iter().find(|(differs, _)| *differs) {
            return Some(field);
        }
        let (Some(own), Some(theirs)) = (&self.request, &other.request) else {
            return (self.request != other.request).then_some("request");
        };
        own.first_difference(theirs, self.kind)
    }
}

impl Request {
    fn first_difference(&self, other: &Self, kind: EntryKind) -> Option<&'static str> {
        let amounts = match kind {
            EntryKind::Commit => "actual",
            EntryKind::Extend => "additional",
            EntryKind::Record => "amounts",
            _ => "estimates",
        };
        let fields = [
            (self.amounts != other.amounts, amounts),
            (self.ttl_us != other.ttl_us, "ttl"),
            (self.grace_us != other.grace_us, "grace"),
            (self.extend_by_us != other.extend_by_us, "extend_by"),
            (
                self.overage_policy != other.overage_policy,
                "overage_policy",
            ),
            (self.approve != other.approve, "approve"),
            (self.approver != other.approver, "approver"),
            (
                self.reason != other.reason,
                if kind == EntryKind::Resolve {
                    "note"
                } else {
                    "reason"
                },
            ),
            (self.metrics != other.metrics, "metrics"),
            (self.metadata != other.metadata, "metadata"),
        ];
        if let Some((_, field)) = fields.into_iter().find(|(differs, _)| *differs) {
            return Some(field);
        }
        if let (Some(own), Some(theirs)) = (&self.funding, &other.funding) {
            let fields = [
                (own.scope != theirs.scope, "scope"),
                (own.unit != theirs.unit, "unit"),
                (own.period != theirs.period, "period"),
                (own.operation != theirs.operation, "operation"),
                (own.amount != theirs.amount, "amount"),
                (own.expires_at != theirs.expires_at, "expire_time"),
                (own.allocated != theirs.allocated, "allocated"),
                (
                    own.credit_surplus != theirs.credit_surplus,
                    "credit_surplus",
                ),
                (own.reason != theirs.reason, "reason"),
            ];
            return fields
                .into_iter()
                .find_map(|(differs, field)| differs.then_some(field));
        }
        let differs = |part: &&str| {
            let of = |body: &Self| {
                let mut parts = body.document.iter();
                parts
                    .find(|(name, _)| **name == **part)
                    .map(|found| found.1)
            };
            of(self) != of(other)
        };
        let mut parts = super::provision::PARTS.into_iter();
        parts
            .find(differs)
            .or_else(|| (self.document != other.document).then_some("api_key"))
    }
}

/// An entry in its place in the chain.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What it says.
    pub body: Arc<Body>,
    /// The same as the bytes that are hashed.
    pub text: Arc<str>,
    /// Of the entry before.
    pub prev_hash: ChainHash,
    /// Of this one.
    pub hash: ChainHash,
}

/// The end of a tenant's chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tip {
    /// The last entry's sequence; 0 for an empty chain.
    pub seq: Sequence,
    /// The last entry's hash.
    pub hash: ChainHash,
    /// The last entry's time.
    pub time: Timestamp,
}

impl Tip {
    /// Of an empty chain.
    pub const EMPTY: Self = Self {
        seq: Sequence(0),
        hash: ChainHash::GENESIS,
        time: Timestamp::from_micros(0),
    };

    /// Puts an entry at the end of the chain. Time never runs backwards in a
    /// chain, even where the clocks of two servers differ.
    pub fn append(&mut self, mut body: Body, now: Timestamp) -> Entry {
        body.seq = Sequence(self.seq.0 + 1);
        body.time = now.max(self.time);
        let text: Arc<str> = body.canonical().into();
        let prev_hash = self.hash;
        let hash = prev_hash.next(&text);
        *self = Self {
            seq: body.seq,
            hash,
            time: body.time,
        };
        Entry {
            body: Arc::new(body),
            text,
            prev_hash,
            hash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_hashed_over_the_one_before_and_its_own_text() {
        let tenant = TenantId::parse("acme").expect("a tenant");
        let mut tip = Tip::EMPTY;
        let now = Timestamp::from_micros(1_700_000_000_000_000);
        let first = tip.append(Body::new(tenant.clone(), EntryKind::Decide), now);
        assert_eq!(
            &*first.text,
            r#"{"tenant":"acme","seq":1,"time":"2023-11-14T22:13:20.000000Z","kind":"DECIDE"}"#
        );
        let mut bytes = vec![0; 32];
        bytes.extend_from_slice(first.text.as_bytes());
        assert_eq!(first.hash.0, Digest::of(&bytes).0);

        let earlier = Timestamp::from_micros(0);
        let second = tip.append(Body::new(tenant, EntryKind::Decide), earlier);
        assert_eq!(second.prev_hash, first.hash);
        assert_eq!(second.body.seq, Sequence(2));
        assert_eq!(second.body.time, now, "time does not run backwards");
    }

    #[test]
    fn a_body_survives_its_text() {
        let tenant = TenantId::parse("acme").expect("a tenant");
        let mut body = Body::new(tenant, EntryKind::Reserve);
        body.movements.push(Movement {
            balance: BalanceNo(3),
            granted: 0,
            reserved: 5,
            spent: 0,
            debt: 0,
            over_limit: None,
            after: After(None, Amount::ONE, Amount::ZERO, Amount::ZERO),
        });
        let entry = Tip::EMPTY.clone().append(body, Timestamp::default());
        let back: Body = serde_json::from_str(&entry.text).expect("its own text");
        assert_eq!(back, *entry.body);
        assert_eq!(back.canonical(), *entry.text);
    }
}

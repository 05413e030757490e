//! What callers ask for, in types that can't be malformed. Made by `api` from
//! messages; nothing further in re-checks form.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::amount::{Amount, Amounts, Unit};
use super::budget::named;
use super::id::{IdempotencyKey, KeyHash, KeyId, Malformed, Method, ReservationId, TenantId};
use super::period::Period;
use super::scope::{Scope, ScopeFilter, Subject};
use super::time::Timestamp;

/// Who asks, and what ties the answer to logs and traces.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The API key; nothing for what the server does by itself.
    pub key: Option<KeyId>,
    /// Subjects that the key may act for; nothing for all of its tenant.
    pub confinement: Option<ScopeFilter>,
    /// Names the request in logs.
    pub request_id: Arc<str>,
    /// W3C trace id, 32 hex digits.
    pub trace_id: Arc<str>,
}

/// SHA-256, as 64 hex digits in text.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = [0; 64];
        hex::encode_to_slice(self.0, &mut text).map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(std::str::from_utf8(&text).map_err(serde::ser::Error::custom)?)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(serde::de::Error::custom)?;
        Ok(Self(bytes))
    }
}

/// Parses the name or the kind of an action: 1 to 256 characters, none of them a control
/// character, `*` or `?`, which stand for other characters in globs, and no space at either
/// end.
pub fn action_name(text: &str) -> Result<Box<str>, Malformed> {
    let fits = (1..=256).contains(&text.chars().count())
        && !text.chars().any(|c| c.is_control() || "*?".contains(c))
        && text.trim() == text;
    if !fits {
        return Err(Malformed::new(
            "1 to 256 characters without control characters, '*', '?' and spaces around it",
        ));
    }
    Ok(text.into())
}

/// One thing that an agent is about to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// The tool or operation.
    pub name: Box<str>,
    /// What kind of thing it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Box<str>>,
    /// Of the arguments in canonical form (`docs/ledger.md`); nothing where none
    /// were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments_sha256: Option<Digest>,
}

/// The arguments of an action, for policy to read. They are not recorded unless the
/// tenant keeps them: their hash is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// As they were given; a map.
    pub value: serde_json::Value,
    /// Their length in canonical form.
    pub bytes: usize,
    /// The most elements that one list or map of them has.
    pub widest: usize,
}

impl Arguments {
    /// Takes arguments that were bounded where they came in.
    pub fn of(value: serde_json::Value) -> Self {
        fn widest(value: &serde_json::Value) -> usize {
            match value {
                serde_json::Value::Array(values) => {
                    values.iter().map(widest).fold(values.len(), usize::max)
                }
                serde_json::Value::Object(fields) => {
                    fields.values().map(widest).fold(fields.len(), usize::max)
                }
                _ => 0,
            }
        }
        Self {
            bytes: value.to_string().len(),
            widest: widest(&value),
            value,
        }
    }
}

/// Circumstances that are recorded with a decision.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// Where the action takes effect.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub environment: Box<str>,
    /// On whose behalf.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub actor: Box<str>,
    /// Why.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub reason: Box<str>,
}

impl Context {
    /// Whether nothing was given.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Free text by free keys; bounded at the edge.
pub type Metadata = BTreeMap<Box<str>, Box<str>>;

/// What an action turned out to use, beside amounts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// Tokens that went in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_input: Option<Amount>,
    /// Tokens that came out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_output: Option<Amount>,
    /// How long it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<Amount>,
    /// For example a model's version.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub model_version: Box<str>,
    /// Anything else.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub custom: Metadata,
}

impl Metrics {
    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

named! {
    /// What happens when the actual use is more than was reserved.
    OveragePolicy {
        /// Commit is refused.
        Reject = "REJECT",
        /// What remains is charged, the rest is not.
        AllowIfAvailable = "ALLOW_IF_AVAILABLE",
        /// What does not remain becomes debt.
        AllowWithOverdraft = "ALLOW_WITH_OVERDRAFT",
    }
}

/// Parses a duration between two bounds, in whole microseconds.
fn bounded(
    duration: Duration,
    least: Duration,
    most: Duration,
    wants: &str,
) -> Result<Duration, Malformed> {
    if duration < least || duration > most {
        return Err(Malformed::new(wants));
    }
    Ok(Duration::from_micros(
        u64::try_from(duration.as_micros()).unwrap_or(u64::MAX),
    ))
}

/// How long a hold lasts: 1 s to 24 h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ttl(Duration);

impl Ttl {
    /// Used where the caller names none.
    pub const DEFAULT: Self = Self(Duration::from_secs(60));
    /// The longest, which is also the longest that an extended lease may have
    /// left.
    pub const MAX: Duration = Duration::from_secs(24 * 60 * 60);

    /// Takes 1 s to 24 h.
    pub fn new(duration: Duration) -> Result<Self, Malformed> {
        bounded(
            duration,
            Duration::from_secs(1),
            Self::MAX,
            "1s to 86400s (24 h)",
        )
        .map(Self)
    }

    /// As a duration.
    pub fn get(self) -> Duration {
        self.0
    }
}

/// How long after the lease Commit and Release are still taken: 0 to 60 s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grace(Duration);

impl Grace {
    /// Used where the caller names none.
    pub const DEFAULT: Self = Self(Duration::from_secs(5));

    /// Takes 0 to 60 s.
    pub fn new(duration: Duration) -> Result<Self, Malformed> {
        bounded(
            duration,
            Duration::ZERO,
            Duration::from_secs(60),
            "0s to 60s",
        )
        .map(Self)
    }

    /// As a duration.
    pub fn get(self) -> Duration {
        self.0
    }
}

/// By how much a lease is lengthened: 0 to 24 h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExtendBy(Duration);

impl ExtendBy {
    /// Takes 0 to 24 h.
    pub fn new(duration: Duration) -> Result<Self, Malformed> {
        bounded(duration, Duration::ZERO, Ttl::MAX, "0s to 86400s (24 h)").map(Self)
    }

    /// As a duration.
    pub fn get(self) -> Duration {
        self.0
    }
}

/// What Decide and Reserve decide upon.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Who acts, and where. Shared with the reservation and the entry.
    pub subject: Arc<Subject>,
    /// What it is about to do.
    pub action: Arc<Action>,
    /// What it may use, without CALLS.
    pub estimates: Amounts,
    /// Circumstances.
    pub context: Context,
    /// What it would be called with.
    pub arguments: Option<Arc<Arguments>>,
    /// The caller wants to be told which rules matched.
    pub explain: bool,
}

/// `Authority.Decide`
#[derive(Debug, Clone)]
pub struct Decide {
    /// What is decided upon.
    pub ask: Ask,
    /// Leaves an entry in the ledger, under this key.
    pub record: Option<IdempotencyKey>,
}

/// `Authority.Reserve`
#[derive(Debug, Clone)]
pub struct Reserve {
    /// What is decided upon.
    pub ask: Ask,
    /// Nothing for a dry run.
    pub key: Option<IdempotencyKey>,
    /// Nothing for the default.
    pub ttl: Option<Ttl>,
    /// Nothing for the default.
    pub grace: Option<Grace>,
    /// Nothing for the tenant's default.
    pub overage_policy: Option<OveragePolicy>,
    /// Kept with the reservation.
    pub metadata: Metadata,
}

/// `Authority.Commit`
#[derive(Debug, Clone)]
pub struct Commit {
    /// Makes a retry safe.
    pub key: IdempotencyKey,
    /// What is settled.
    pub reservation: ReservationId,
    /// What was used; a unit that is left out was used as estimated.
    pub actual: Amounts,
    /// What else was measured.
    pub metrics: Metrics,
    /// Kept in the ledger.
    pub metadata: Metadata,
}

/// `Authority.Release`
#[derive(Debug, Clone)]
pub struct Release {
    /// Makes a retry safe.
    pub key: IdempotencyKey,
    /// What is given back.
    pub reservation: ReservationId,
    /// Why.
    pub reason: Box<str>,
}

/// `Authority.Extend`
#[derive(Debug, Clone)]
pub struct Extend {
    /// Makes a retry safe.
    pub key: IdempotencyKey,
    /// What is extended.
    pub reservation: ReservationId,
    /// Added to the end of the lease.
    pub by: ExtendBy,
    /// More to hold, without CALLS.
    pub additional: Amounts,
}

/// What a Record is about.
#[derive(Debug, Clone)]
pub enum RecordOf {
    /// Something that was never reserved.
    Action(Box<(Subject, Action)>),
    /// Something whose reservation expired before its use was known.
    Expired(ReservationId),
}

/// `Authority.Record`
#[derive(Debug, Clone)]
pub struct Record {
    /// Makes a retry safe.
    pub key: IdempotencyKey,
    /// What it is about.
    pub of: RecordOf,
    /// What was used, without CALLS. None at all: only the fact is recorded.
    pub amounts: Amounts,
    /// Nothing for the tenant's default.
    pub overage_policy: Option<OveragePolicy>,
    /// What else was measured.
    pub metrics: Metrics,
    /// Circumstances.
    pub context: Context,
    /// Kept in the ledger.
    pub metadata: Metadata,
}

/// `Approvals.ResolveApproval`
#[derive(Debug, Clone)]
pub struct Resolve {
    /// Makes a retry safe.
    pub key: IdempotencyKey,
    /// What waits.
    pub reservation: ReservationId,
    /// Whether it may pass.
    pub approve: bool,
    /// Groups that the caller's key speaks for.
    pub groups: Vec<Box<str>>,
    /// The person, as the approver's side names them.
    pub approver: Box<str>,
    /// Why.
    pub note: Box<str>,
}

named! {
    /// How FundBudget changes a balance.
    FundOperation {
        /// Adds to what is allocated.
        Credit = "CREDIT",
        /// Takes from what is allocated, at most what remains.
        Debit = "DEBIT",
        /// Makes the amount what is allocated.
        Reset = "RESET",
        /// Makes the amount what is spent.
        ResetSpent = "RESET_SPENT",
        /// Lowers debt.
        RepayDebt = "REPAY_DEBT",
    }
}

/// What a Fund changes, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Funding {
    /// Concrete scope of the balance.
    pub scope: Scope,
    /// Of the budget.
    pub unit: Unit,
    /// Of the budget.
    pub period: Period,
    /// How it is changed.
    pub operation: FundOperation,
    /// By, or to, how much.
    pub amount: Amount,
    /// When what is left of a credit lapses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// Beside what is spent: what is allocated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated: Option<Amount>,
    /// What is repaid beyond the debt is a credit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub credit_surplus: bool,
    /// Why.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub reason: Box<str>,
}

/// `Provisioning.FundBudget`
#[derive(Debug, Clone)]
pub struct Fund {
    /// Makes a retry safe.
    pub key: IdempotencyKey,
    /// What is changed, and how.
    pub funding: Funding,
}

/// Everything that is decided on one tenant's state, in the tenant's order.
#[derive(Debug, Clone)]
pub enum Command {
    /// See [`Decide`].
    Decide(Box<Decide>),
    /// See [`Reserve`].
    Reserve(Box<Reserve>),
    /// See [`Commit`].
    Commit(Box<Commit>),
    /// See [`Release`].
    Release(Box<Release>),
    /// See [`Extend`].
    Extend(Box<Extend>),
    /// See [`Record`].
    Record(Box<Record>),
    /// See [`Resolve`].
    Resolve(Box<Resolve>),
    /// See [`Fund`].
    Fund(Box<Fund>),
    /// Gives back what a reservation holds whose time is over: the sweeper's.
    Expire(ReservationId),
}

impl Command {
    /// Whether it is about an action that has not been let in yet. Everything else
    /// settles one, or has to do with what has happened already.
    pub fn begins_action(&self) -> bool {
        matches!(self, Self::Decide(_) | Self::Reserve(_))
    }

    /// The hash of the idempotency key that a success is pinned to.
    pub fn key_hash(&self, tenant: &TenantId) -> Option<KeyHash> {
        let (method, key) = match self {
            Self::Reserve(request) => (Method::Reserve, request.key.as_ref()?),
            Self::Commit(request) => (Method::Commit, &request.key),
            Self::Release(request) => (Method::Release, &request.key),
            Self::Extend(request) => (Method::Extend, &request.key),
            Self::Record(request) => (Method::Record, &request.key),
            Self::Resolve(request) => (Method::ResolveApproval, &request.key),
            Self::Fund(request) => (Method::FundBudget, &request.key),
            // A recorded Decide is decided anew each time.
            Self::Decide(_) | Self::Expire(_) => return None,
        };
        Some(KeyHash::of(tenant, method, key))
    }

    /// The reservation that must exist for it.
    pub fn reservation(&self) -> Option<ReservationId> {
        match self {
            Self::Commit(request) => Some(request.reservation),
            Self::Release(request) => Some(request.reservation),
            Self::Extend(request) => Some(request.reservation),
            Self::Resolve(request) => Some(request.reservation),
            Self::Expire(id) => Some(*id),
            Self::Record(request) => match request.of {
                RecordOf::Expired(id) => Some(id),
                RecordOf::Action(_) => None,
            },
            Self::Decide(_) | Self::Reserve(_) | Self::Fund(_) => None,
        }
    }
}

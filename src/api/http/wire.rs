//! The bodies of the Cycles protocol, v0.1.25, field by field.
//!
//! Requests refuse unknown fields. Answers carry nothing more than the protocol names, and
//! no null: published clients refuse both.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::strict::{Free, object, object_or_none, texts_or_none, word, word_or_none};

/// Who acts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Subject {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tenant: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) workspace: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) app: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) workflow: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) agent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) toolset: Option<String>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "texts_or_none"
    )]
    pub(super) dimensions: Option<BTreeMap<String, String>>,
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Action {
    pub(super) kind: String,
    pub(super) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tags: Option<Vec<String>>,
    /// Of v0.1.26.
    #[serde(default, skip_serializing, deserialize_with = "object_or_none")]
    pub(super) policy_keys: Option<PolicyKeys>,
}

/// What rules may look at beside the action's name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PolicyKeys {
    #[serde(default)]
    pub(super) host: Option<String>,
    #[serde(default)]
    pub(super) recipient_domain: Option<String>,
    #[serde(default)]
    pub(super) resource_type: Option<String>,
    #[serde(default)]
    pub(super) path_prefix: Option<String>,
    #[serde(default, deserialize_with = "texts_or_none")]
    pub(super) custom: Option<BTreeMap<String, String>>,
}

/// So much of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Amount {
    #[serde(deserialize_with = "word")]
    pub(super) unit: Unit,
    pub(super) amount: i64,
}

/// The protocol's units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Unit {
    UsdMicrocents,
    Tokens,
    Credits,
    RiskPoints,
}

/// What a larger use than reserved does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum OveragePolicy {
    Reject,
    AllowIfAvailable,
    AllowWithOverdraft,
}

/// Whether a reservation is only asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum ObserveMode {
    Disabled,
    Observe,
    Enforce,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Metrics {
    #[serde(default)]
    pub(super) tokens_input: Option<i64>,
    #[serde(default)]
    pub(super) tokens_output: Option<i64>,
    #[serde(default)]
    pub(super) latency_ms: Option<i64>,
    #[serde(default)]
    pub(super) model_version: Option<String>,
    #[serde(default)]
    pub(super) custom: Option<Free>,
}

/// `POST /v1/decide`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Decide {
    pub(super) idempotency_key: String,
    #[serde(deserialize_with = "object")]
    pub(super) subject: Subject,
    #[serde(deserialize_with = "object")]
    pub(super) action: Action,
    #[serde(deserialize_with = "object")]
    pub(super) estimate: Amount,
    #[serde(default)]
    pub(super) metadata: Option<Free>,
}

/// `POST /v1/reservations`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Reserve {
    pub(super) idempotency_key: String,
    #[serde(deserialize_with = "object")]
    pub(super) subject: Subject,
    #[serde(deserialize_with = "object")]
    pub(super) action: Action,
    #[serde(deserialize_with = "object")]
    pub(super) estimate: Amount,
    #[serde(default)]
    pub(super) ttl_ms: Option<u64>,
    #[serde(default)]
    pub(super) grace_period_ms: Option<u64>,
    #[serde(default, deserialize_with = "word_or_none")]
    pub(super) overage_policy: Option<OveragePolicy>,
    #[serde(default)]
    pub(super) dry_run: Option<bool>,
    /// Of v0.1.26.
    #[serde(default, deserialize_with = "word_or_none")]
    pub(super) observe_mode: Option<ObserveMode>,
    #[serde(default)]
    pub(super) metadata: Option<Free>,
}

/// `POST /v1/reservations/{id}/commit`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Commit {
    pub(super) idempotency_key: String,
    #[serde(deserialize_with = "object")]
    pub(super) actual: Amount,
    #[serde(default, deserialize_with = "object_or_none")]
    pub(super) metrics: Option<Metrics>,
    #[serde(default)]
    pub(super) metadata: Option<Free>,
}

/// `POST /v1/reservations/{id}/release`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Release {
    pub(super) idempotency_key: String,
    #[serde(default)]
    pub(super) reason: Option<String>,
}

/// `POST /v1/reservations/{id}/extend`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Extend {
    pub(super) idempotency_key: String,
    pub(super) extend_by_ms: u64,
    #[serde(default)]
    pub(super) metadata: Option<Free>,
}

/// `POST /v1/events`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Event {
    pub(super) idempotency_key: String,
    #[serde(deserialize_with = "object")]
    pub(super) subject: Subject,
    #[serde(deserialize_with = "object")]
    pub(super) action: Action,
    #[serde(deserialize_with = "object")]
    pub(super) actual: Amount,
    #[serde(default, deserialize_with = "word_or_none")]
    pub(super) overage_policy: Option<OveragePolicy>,
    #[serde(default, deserialize_with = "object_or_none")]
    pub(super) metrics: Option<Metrics>,
    #[serde(default)]
    pub(super) client_time_ms: Option<u64>,
    #[serde(default)]
    pub(super) metadata: Option<Free>,
}

/// The protocol's decisions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Decision {
    Allow,
    AllowWithCaps,
    #[default]
    Deny,
}

/// What the agent must keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Caps {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) max_tokens: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) max_steps_remaining: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tool_allowlist: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tool_denylist: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cooldown_ms: Option<i64>,
}

/// One balance. `scope` is its last segment, `scope_path` the whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Balance {
    pub(super) scope: String,
    pub(super) scope_path: String,
    pub(super) remaining: Amount,
    pub(super) reserved: Amount,
    pub(super) spent: Amount,
    pub(super) allocated: Amount,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) debt: Option<Amount>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) overdraft_limit: Option<Amount>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) is_over_limit: Option<bool>,
}

/// The answer to Decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Decided {
    pub(super) decision: Decision,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason_code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) caps: Option<Caps>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) retry_after_ms: Option<u64>,
    pub(super) affected_scopes: Vec<String>,
}

/// The answer to Reserve.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Reserved {
    pub(super) decision: Decision,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reservation_id: Option<String>,
    pub(super) affected_scopes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) expires_at_ms: Option<i64>,
    /// Without it published clients extend at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) remaining_ttl_ms: Option<i64>,
    pub(super) scope_path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reserved: Option<Amount>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) caps: Option<Caps>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason_code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) retry_after_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) balances: Option<Vec<Balance>>,
}

/// The answer to Commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Committed {
    pub(super) status: &'static str,
    pub(super) charged: Amount,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) released: Option<Amount>,
    pub(super) balances: Vec<Balance>,
}

/// The answer to Release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Released {
    pub(super) status: &'static str,
    pub(super) released: Amount,
    pub(super) balances: Vec<Balance>,
}

/// The answer to Extend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Extended {
    pub(super) status: &'static str,
    pub(super) expires_at_ms: i64,
    pub(super) remaining_ttl_ms: i64,
    pub(super) balances: Vec<Balance>,
}

/// The answer to an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Applied {
    pub(super) status: &'static str,
    pub(super) event_id: String,
    /// Only where less than the whole was charged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) charged: Option<Amount>,
    pub(super) balances: Vec<Balance>,
}

/// Where a reservation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum ReservationStatus {
    Active,
    Committed,
    Released,
    Expired,
}

/// One reservation. In lists without what published clients refuse there: `committed`,
/// `finalized_at_ms` and, unless it is asked for, `metadata`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Reservation {
    pub(super) reservation_id: String,
    pub(super) status: ReservationStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) idempotency_key: Option<String>,
    pub(super) subject: Subject,
    pub(super) action: Action,
    pub(super) reserved: Amount,
    pub(super) created_at_ms: i64,
    pub(super) expires_at_ms: i64,
    pub(super) scope_path: String,
    pub(super) affected_scopes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) committed: Option<Amount>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) finalized_at_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) metadata: Option<serde_json::Map<String, serde_json::Value>>,
}

/// Whether a list goes on, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Next {
    has_more: bool,
    /// Null at the end.
    next_cursor: Option<String>,
}

impl From<String> for Next {
    /// Of the services' token, which is empty at the end.
    fn from(token: String) -> Self {
        Self {
            has_more: !token.is_empty(),
            next_cursor: Some(token).filter(|token| !token.is_empty()),
        }
    }
}

/// One page of reservations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Reservations {
    pub(super) reservations: Vec<Reservation>,
    #[serde(flatten)]
    pub(super) next: Next,
}

/// One page of balances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Balances {
    pub(super) balances: Vec<Balance>,
    #[serde(flatten)]
    pub(super) next: Next,
}

/// What `GET /v1/reservations` can be asked. Times are ISO-8601; a blank one counts as
/// absent.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct ReservationFilters {
    pub(super) tenant: Option<String>,
    pub(super) workspace: Option<String>,
    pub(super) app: Option<String>,
    pub(super) workflow: Option<String>,
    pub(super) agent: Option<String>,
    pub(super) toolset: Option<String>,
    pub(super) status: Option<String>,
    pub(super) idempotency_key: Option<String>,
    pub(super) from: Option<String>,
    pub(super) to: Option<String>,
    pub(super) expires_from: Option<String>,
    pub(super) expires_to: Option<String>,
    pub(super) finalized_from: Option<String>,
    pub(super) finalized_to: Option<String>,
    pub(super) limit: Option<String>,
    pub(super) cursor: Option<String>,
    pub(super) include: Option<String>,
    pub(super) sort_by: Option<String>,
    pub(super) sort_dir: Option<String>,
}

/// What `GET /v1/balances` can be asked.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct BalanceFilters {
    pub(super) tenant: Option<String>,
    pub(super) workspace: Option<String>,
    pub(super) app: Option<String>,
    pub(super) workflow: Option<String>,
    pub(super) agent: Option<String>,
    pub(super) toolset: Option<String>,
    pub(super) limit: Option<String>,
    pub(super) cursor: Option<String>,
}

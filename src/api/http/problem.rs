//! Errors in the protocol's words.
//!
//! An error of the services is a gRPC status with one `ErrorInfo`; here its reason becomes
//! the protocol's code. What the protocol has no code for and must stop an agent is
//! `BUDGET_EXCEEDED`, the one that every published client takes for a no; the true reason
//! stands in `details`.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::translate;
use crate::proto;

/// One error, before it is given the request's ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) status: StatusCode,
    pub(super) error: &'static str,
    pub(super) message: String,
    pub(super) details: Map<String, Value>,
    /// When to try again.
    pub(super) retry_after: Option<Duration>,
    /// Of a denial that the ledger has.
    pub(super) decision_id: String,
    pub(super) sequence: i64,
    pub(super) replayed: bool,
}

/// The body of any error.
#[derive(Serialize)]
struct Body<'a> {
    error: &'a str,
    message: &'a str,
    request_id: &'a str,
    trace_id: &'a str,
    #[serde(skip_serializing_if = "Map::is_empty")]
    details: &'a Map<String, Value>,
}

impl Fault {
    pub(super) fn new(status: StatusCode, error: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            error,
            message: message.into(),
            details: Map::new(),
            retry_after: None,
            decision_id: String::new(),
            sequence: 0,
            replayed: false,
        }
    }

    /// A request that can't be taken.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "INVALID_REQUEST", message)
    }

    /// A field that can't be taken; `wants` completes "must be …".
    pub(super) fn field(field: &str, wants: &str) -> Self {
        Self::invalid(format!("Validation failed: {field}: must be {wants}"))
    }

    /// An amount in another unit than its budget's.
    pub(super) fn other_unit(fields: &str) -> Self {
        let message = format!("{fields} must be in the budget's unit");
        Self::new(StatusCode::BAD_REQUEST, "UNIT_MISMATCH", message)
    }

    /// A field that names another tenant than the key's.
    pub(super) fn other_tenant(field: &str) -> Self {
        let message = format!("{field} is not the tenant of the API key");
        Self::new(StatusCode::FORBIDDEN, "FORBIDDEN", message)
    }

    /// Something that does not exist.
    pub(super) fn not_found(what: impl std::fmt::Display) -> Self {
        let message = format!("Resource not found: {what}");
        Self::new(StatusCode::NOT_FOUND, "NOT_FOUND", message)
    }

    /// Something that another service of this kind does and this one does not.
    pub(super) fn not_implemented(what: &str) -> Self {
        Self::new(
            StatusCode::NOT_IMPLEMENTED,
            "NOT_IMPLEMENTED",
            format!(
                "{what} is not a part of this gateway: docs/cycles.md says what to use instead"
            ),
        )
    }

    pub(super) fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "INTERNAL_ERROR",
            "internal error: the log has the cause under this request id",
        )
    }

    /// The deadline passed before there was an answer.
    pub(super) fn overdue(allowed: Duration) -> Self {
        let mut fault = Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "INTERNAL_ERROR",
            "no answer in time: whether the call took effect is unknown, so retry it with the \
             same idempotency key",
        );
        fault.detail("reason", "DEADLINE_EXCEEDED");
        fault.detail(
            "deadline_ms",
            u64::try_from(allowed.as_millis()).unwrap_or(u64::MAX),
        );
        fault
    }

    /// What the admin plane calls it, which has more codes.
    pub(super) fn of_admin(mut self) -> Self {
        let reason = self.details.get("reason").and_then(Value::as_str);
        self.error = match (self.error, reason) {
            ("FORBIDDEN", Some("PERMISSION_MISSING" | "LOOSENING_NOT_PERMITTED")) => {
                "INSUFFICIENT_PERMISSIONS"
            }
            ("NOT_FOUND", Some("TENANT_NOT_FOUND")) => "TENANT_NOT_FOUND",
            (error, _) => error,
        };
        self
    }

    pub(super) fn detail(&mut self, name: &str, value: impl Into<Value>) {
        self.details.insert(name.to_owned(), value.into());
    }

    /// The text of its body.
    pub(super) fn body(&self, request_id: &str, trace_id: &str) -> Vec<u8> {
        let body = Body {
            error: self.error,
            message: &self.message,
            request_id,
            trace_id,
            details: &self.details,
        };
        // Texts and JSON values: writing them does not fail.
        serde_json::to_vec(&body).unwrap_or_default()
    }
}

/// Becomes an answer at the edge, which knows the request's ids.
impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(Box::new(self));
        response
    }
}

/// The protocol's code for a reason of an `ErrorInfo`.
fn code_of(reason: &str, code: Code) -> (StatusCode, &'static str) {
    match reason {
        "API_KEY_MISSING" | "API_KEY_INVALID" => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
        "UNIT_MISMATCH" => (StatusCode::BAD_REQUEST, "UNIT_MISMATCH"),
        "IDEMPOTENCY_MISMATCH" | "ANSWER_ARCHIVED" => {
            (StatusCode::CONFLICT, "IDEMPOTENCY_MISMATCH")
        }
        "RESERVATION_EXPIRED" => (StatusCode::GONE, "RESERVATION_EXPIRED"),
        "RESERVATION_FINALIZED" => (StatusCode::CONFLICT, "RESERVATION_FINALIZED"),
        "OVERAGE_REJECTED" | "APPROVAL_PENDING" | "INSUFFICIENT_REMAINING" => {
            (StatusCode::CONFLICT, "BUDGET_EXCEEDED")
        }
        "OVERDRAFT_LIMIT_EXCEEDED" => (StatusCode::CONFLICT, "OVERDRAFT_LIMIT_EXCEEDED"),
        "TOO_MANY_EXTENSIONS" => (StatusCode::CONFLICT, "MAX_EXTENSIONS_EXCEEDED"),
        "TENANT_SUSPENDED" => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
        "TENANT_CLOSED" => (StatusCode::CONFLICT, "TENANT_CLOSED"),
        "BUDGET_FROZEN" => (StatusCode::CONFLICT, "BUDGET_FROZEN"),
        "BUDGET_CLOSED" => (StatusCode::CONFLICT, "BUDGET_CLOSED"),
        "BUDGET_NOT_PROVISIONED" => (StatusCode::NOT_FOUND, "NOT_FOUND"),
        "BUDGET_NOT_FOUND" => (StatusCode::NOT_FOUND, "BUDGET_NOT_FOUND"),
        "ALREADY_PROVISIONED" => (StatusCode::CONFLICT, "DUPLICATE_RESOURCE"),
        _ => match code {
            Code::InvalidArgument => (StatusCode::BAD_REQUEST, "INVALID_REQUEST"),
            Code::Unauthenticated => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
            Code::PermissionDenied => (StatusCode::FORBIDDEN, "FORBIDDEN"),
            Code::NotFound => (StatusCode::NOT_FOUND, "NOT_FOUND"),
            Code::FailedPrecondition | Code::AlreadyExists => {
                (StatusCode::CONFLICT, "INVALID_REQUEST")
            }
            Code::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, "LIMIT_EXCEEDED"),
            // What can be tried again with the same key: clients take a 5xx for that.
            Code::Unavailable | Code::Aborted => {
                (StatusCode::SERVICE_UNAVAILABLE, "INTERNAL_ERROR")
            }
            Code::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "INTERNAL_ERROR"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL_ERROR"),
        },
    }
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info();
        let reason = info.map_or("", |info| info.reason.as_str());
        let (http, error) = code_of(reason, status.code());
        let mut fault = Self::new(http, error, status.message());
        let told = |key| info.and_then(|info| info.metadata.get(key));
        match (reason, told("field"), told("reservation_id")) {
            ("TENANT_SUSPENDED", ..) => fault.message = reason.to_owned(),
            ("RESERVATION_NOT_FOUND", _, Some(id)) => {
                fault.message = Self::not_found(id).message;
            }
            ("IDEMPOTENCY_MISMATCH", Some(field), _) => {
                let field = translate::field(field);
                fault.message =
                    format!("the idempotency key was used for another request: {field} differs");
            }
            _ => {}
        }
        if !reason.is_empty() && reason != error {
            fault.detail("reason", reason);
        }
        let metadata = info.into_iter().flat_map(|info| &info.metadata);
        for (key, value) in metadata {
            // The protocol's own names, for the one code whose details it fixes.
            match key.as_str() {
                "unit" if error == "UNIT_MISMATCH" => {
                    fault.detail("requested_unit", value.as_str())
                }
                "counted" if error == "UNIT_MISMATCH" => {
                    let units = value.split(',').filter(|unit| translate::is_unit(unit));
                    fault.detail("expected_units", units.collect::<Vec<_>>());
                }
                "field" => fault.detail(key, translate::field(value)),
                "actual"
                | "reserved"
                | "debt"
                | "limit"
                | "asked"
                | "remaining"
                | "violations_not_named" => fault.detail(key, number(value)),
                key => fault.detail(key, value.as_str()),
            }
        }
        let violations = details.bad_request().map(|bad| &bad.field_violations);
        if let ("INVALID_REQUEST", Some(violations)) = (reason, violations) {
            let named: Vec<_> = violations
                .iter()
                .map(|one| {
                    let field = translate::field(&one.field);
                    let bounds = translate::bounds(&field);
                    format!("{field}: {}", bounds.unwrap_or(&one.description))
                })
                .collect();
            let named = named.join("; ").replace("next_page_token", "next_cursor");
            fault.message = format!("Validation failed: {named}");
        }
        fault.retry_after = details.retry_info().and_then(|retry| retry.retry_delay);
        if let Some(retry_after) = fault.retry_after {
            fault.detail("retry_after_ms", millis(retry_after));
        }
        fault
    }
}

/// A number that was told as text.
fn number(text: &str) -> Value {
    let number: Result<i64, _> = text.parse();
    number.map_or_else(|_| text.into(), Value::from)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The protocol's code for a reason of a denial.
fn code_of_denial(reason: &str, no_budget: bool) -> (StatusCode, &'static str) {
    match reason {
        "BUDGET_FROZEN" => (StatusCode::CONFLICT, "BUDGET_FROZEN"),
        "BUDGET_CLOSED" => (StatusCode::CONFLICT, "BUDGET_CLOSED"),
        "OVERDRAFT_LIMIT_EXCEEDED" => (StatusCode::CONFLICT, "OVERDRAFT_LIMIT_EXCEEDED"),
        "DEBT_OUTSTANDING" => (StatusCode::CONFLICT, "DEBT_OUTSTANDING"),
        "TENANT_CLOSED" => (StatusCode::CONFLICT, "TENANT_CLOSED"),
        "TENANT_SUSPENDED" => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
        "BUDGET_NOT_PROVISIONED" if no_budget => (StatusCode::NOT_FOUND, "NOT_FOUND"),
        // Policy, catalogue, default-deny, freezes, narrowing, approvals: a no that every
        // client knows.
        _ => (StatusCode::CONFLICT, "BUDGET_EXCEEDED"),
    }
}

/// A decision that lets nothing happen.
#[derive(Debug, Default)]
pub(super) struct Denial {
    /// Strictest first.
    pub(super) reasons: Vec<proto::Reason>,
    /// What waits for a person, if that is why.
    pub(super) approval: Option<proto::PendingApproval>,
    /// No budget applies at all.
    pub(super) no_budget: bool,
    /// The deepest scope of the subject.
    pub(super) scope_path: String,
    /// It can pass later without an operator's help.
    pub(super) retryable: bool,
    pub(super) retry_after: Option<Duration>,
    pub(super) decision_id: String,
    pub(super) sequence: i64,
    pub(super) replayed: bool,
}

impl Denial {
    fn reason(&self) -> &str {
        self.reasons
            .first()
            .map_or("", |reason| reason.code.as_str())
    }

    /// What the protocol calls the reason.
    pub(super) fn reason_code(&self) -> String {
        match self.reason() {
            "BUDGET_NOT_PROVISIONED" if self.no_budget => "BUDGET_NOT_FOUND".to_owned(),
            reason => reason.to_owned(),
        }
    }

    /// Milliseconds until it may pass.
    pub(super) fn retry_after_ms(&self) -> Option<u64> {
        self.retry_after.map(millis)
    }

    /// A suspended tenant is told so in another way than by a decision.
    pub(super) fn suspended(&self) -> bool {
        self.reason() == "TENANT_SUSPENDED"
    }
}

/// A live call that was not let in.
impl From<Denial> for Fault {
    fn from(denial: Denial) -> Self {
        let reason = denial.reason();
        let (status, error) = code_of_denial(reason, denial.no_budget);
        let first = denial.reasons.first();
        let message = match first {
            _ if denial.suspended() => "TENANT_SUSPENDED".to_owned(),
            Some(_) if error == "NOT_FOUND" => {
                format!("Budget not found for provided scope: {}", denial.scope_path)
            }
            Some(first) => first.message.clone(),
            None => "denied".to_owned(),
        };
        let mut fault = Self::new(status, error, message);
        fault.detail("reason_code", reason);
        fault.detail("retryable", denial.retryable);
        if let Some(after) = denial.retry_after_ms() {
            fault.detail("retry_after_ms", after);
        }
        if let Some(first) = first {
            let mut why = Map::new();
            why.insert("reason_code".into(), reason.into());
            for (name, text) in [
                ("blocked_by_scope", &first.scope),
                ("blocked_by_policy", &first.rule_id),
                ("suggested_fix", &first.remedy),
            ] {
                if !text.is_empty() {
                    why.insert(name.into(), text.as_str().into());
                }
            }
            if reason == "BUDGET_EXCEEDED" {
                why.insert("budget_remaining".into(), first.remaining.into());
            }
            fault.detail("deny_detail", why);
        }
        let short: Vec<_> = denial
            .reasons
            .iter()
            .filter(|reason| reason.code == "BUDGET_EXCEEDED")
            .map(|reason| {
                json!({
                    "scope": reason.scope,
                    "unit": translate::unit_name(reason.unit()),
                    "asked": reason.asked,
                    "remaining": reason.remaining,
                })
            })
            .collect();
        if !short.is_empty() {
            fault.detail("short_scopes", short);
        }
        if let Some(approval) = &denial.approval {
            fault.detail("approval_id", approval.approval_id.as_str());
            let until = approval.expire_time.as_ref().map(translate::millis_of);
            fault.detail("approval_expires_at_ms", until.unwrap_or_default());
        }
        if !denial.decision_id.is_empty() {
            fault.detail("decision_id", denial.decision_id.as_str());
        }
        fault.retry_after = denial.retry_after;
        fault.decision_id = denial.decision_id;
        fault.sequence = denial.sequence;
        fault.replayed = denial.replayed;
        fault
    }
}

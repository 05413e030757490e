//! Errors in the protocol's words.
//!
//! An error of the services is a gRPC status with one `ErrorInfo`; here its reason becomes
//! the protocol's code. What the protocol has no code for and must stop an agent is
//! `BUDGET_EXCEEDED`, the one that every published client takes for a no; the true reason
//! stands in `details`.

use http::StatusCode;
use serde_json::{Map, Value};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::proto;

/// One error, before it is given the request's ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) status: StatusCode,
    pub(super) error: &'static str,
    pub(super) message: String,
    pub(super) details: Map<String, Value>,
    /// When to try again.
    pub(super) retry_after: Option<std::time::Duration>,
}

impl Fault {
    pub(super) fn new(status: StatusCode, error: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            error,
            message: message.into(),
            details: Map::new(),
            retry_after: None,
        }
    }

    /// A request that can't be taken.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "INVALID_REQUEST", message)
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
        "OVERAGE_REJECTED" => (StatusCode::CONFLICT, "BUDGET_EXCEEDED"),
        "OVERDRAFT_LIMIT_EXCEEDED" => (StatusCode::CONFLICT, "OVERDRAFT_LIMIT_EXCEEDED"),
        "TOO_MANY_EXTENSIONS" => (StatusCode::CONFLICT, "MAX_EXTENSIONS_EXCEEDED"),
        "TENANT_CLOSED" => (StatusCode::CONFLICT, "TENANT_CLOSED"),
        "BUDGET_FROZEN" => (StatusCode::CONFLICT, "BUDGET_FROZEN"),
        "BUDGET_CLOSED" => (StatusCode::CONFLICT, "BUDGET_CLOSED"),
        "BUDGET_NOT_PROVISIONED" => (StatusCode::NOT_FOUND, "NOT_FOUND"),
        "APPROVAL_PENDING" => (StatusCode::CONFLICT, "BUDGET_EXCEEDED"),
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
        if !reason.is_empty() && reason != error {
            fault.details.insert("reason".into(), reason.into());
        }
        let metadata = info.into_iter().flat_map(|info| &info.metadata);
        let mut metadata: Vec<_> = metadata.collect();
        metadata.sort();
        for (key, value) in metadata {
            // The protocol's own names, for the one code whose details it fixes.
            let (key, value) = match key.as_str() {
                "unit" if error == "UNIT_MISMATCH" => ("requested_unit", value.as_str().into()),
                "counted" if error == "UNIT_MISMATCH" => {
                    let units = value.split(',').filter(|unit| !unit.is_empty());
                    ("expected_units", units.map(Value::from).collect())
                }
                key => (key, Value::from(value.as_str())),
            };
            fault.details.insert(key.to_owned(), value);
        }
        fault.retry_after = details.retry_info().and_then(|retry| retry.retry_delay);
        fault
    }
}

/// The protocol's code for a reason of a denial.
fn code_of_denial(reason: &str) -> (StatusCode, &'static str) {
    match reason {
        "BUDGET_FROZEN" => (StatusCode::CONFLICT, "BUDGET_FROZEN"),
        "BUDGET_CLOSED" => (StatusCode::CONFLICT, "BUDGET_CLOSED"),
        "OVERDRAFT_LIMIT_EXCEEDED" => (StatusCode::CONFLICT, "OVERDRAFT_LIMIT_EXCEEDED"),
        "DEBT_OUTSTANDING" => (StatusCode::CONFLICT, "DEBT_OUTSTANDING"),
        "TENANT_CLOSED" => (StatusCode::CONFLICT, "TENANT_CLOSED"),
        "TENANT_SUSPENDED" => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
        "BUDGET_NOT_PROVISIONED" => (StatusCode::NOT_FOUND, "NOT_FOUND"),
        // Policy, catalogue, freezes, narrowing, approvals: a no that every client knows.
        _ => (StatusCode::CONFLICT, "BUDGET_EXCEEDED"),
    }
}

/// A live reservation that was not let in. `approval` is what waits for a person, if that
/// is why.
pub(super) fn denied(reasons: &[proto::Reason], approval: Option<&str>) -> Fault {
    let first = reasons.first();
    let reason = first.map_or("", |reason| reason.code.as_str());
    let (status, error) = code_of_denial(reason);
    let message = match (reason, first) {
        ("TENANT_SUSPENDED", _) => "TENANT_SUSPENDED".to_owned(),
        ("BUDGET_NOT_PROVISIONED", Some(first)) => {
            format!("Budget not found for provided scope: {}", first.scope)
        }
        (_, Some(first)) => first.message.clone(),
        (_, None) => "denied".to_owned(),
    };
    let mut fault = Fault::new(status, error, message);
    fault.details.insert("reason_code".into(), reason.into());
    if let Some(first) = first {
        let mut detail = Map::new();
        detail.insert("reason_code".into(), reason.into());
        if !first.scope.is_empty() {
            detail.insert("blocked_by_scope".into(), first.scope.as_str().into());
        }
        if !first.remedy.is_empty() {
            detail.insert("suggested_fix".into(), first.remedy.as_str().into());
        }
        fault.details.insert("deny_detail".into(), detail.into());
    }
    if let Some(id) = approval {
        fault.details.insert("approval_id".into(), id.into());
    }
    fault
}

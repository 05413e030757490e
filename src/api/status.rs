//! The one place where a refusal becomes a gRPC status.
//!
//! Every error carries one `google.rpc.ErrorInfo` (domain `remit`, a stable
//! reason, and whatever varies in the text as metadata), and what else fits:
//! field violations, the failed precondition, when to retry.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, PreconditionViolation, StatusExt as _};

use crate::domain::refusal::Refusal;
use crate::engine::EngineError;

/// The domain of every `ErrorInfo`.
pub const DOMAIN: &str = "remit";

/// An error with its reason, as the other functions here put it together.
fn status(
    code: Code,
    reason: &str,
    message: impl Into<String>,
    metadata: &[(&str, String)],
    with: impl FnOnce(&mut ErrorDetails),
) -> Status {
    let metadata: HashMap<String, String> = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), value.clone()))
        .collect();
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, metadata);
    with(&mut details);
    Status::with_error_details(code, message, details)
}

fn plain(_: &mut ErrorDetails) {}

/// INVALID_ARGUMENT, naming every bad field.
pub fn invalid(violations: &[(String, String)]) -> Status {
    let named: Vec<_> = violations
        .iter()
        .map(|(field, wants)| format!("{field} must be {wants}"))
        .collect();
    let fields: Vec<_> = violations
        .iter()
        .map(|(field, wants)| FieldViolation::new(field, format!("must be {wants}")))
        .collect();
    let metadata = match violations.first() {
        Some((field, _)) => vec![("field", field.clone())],
        None => Vec::new(),
    };
    let message = named.join("; ");
    status(
        Code::InvalidArgument,
        "INVALID_REQUEST",
        message,
        &metadata,
        |details| {
            details.set_bad_request(fields);
        },
    )
}

/// UNAUTHENTICATED. The same for a key that is unknown, wrong, expired or
/// revoked: the answer must not tell which.
pub fn unauthenticated(reason: &str, message: &str) -> Status {
    status(Code::Unauthenticated, reason, message, &[], plain)
}

/// PERMISSION_DENIED.
pub fn denied(reason: &str, message: impl Into<String>, metadata: &[(&str, String)]) -> Status {
    status(Code::PermissionDenied, reason, message, metadata, plain)
}

/// What a wait that is cut by a stop ends with.
pub fn stopping() -> Status {
    unavailable(
        "SERVER_STOPPING",
        "the server is stopping",
        Duration::from_secs(1),
    )
}

fn unavailable(reason: &str, message: &str, retry_after: Duration) -> Status {
    status(Code::Unavailable, reason, message, &[], |details| {
        details.set_retry_info(Some(retry_after));
    })
}

impl From<EngineError> for Status {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Refused(refusal) => of_refusal(&refusal),
            EngineError::QueueFull { retry_after } => status(
                Code::ResourceExhausted,
                "QUEUE_FULL",
                "too many requests are waiting; nothing was decided",
                &[],
                |details| {
                    details.set_retry_info(Some(retry_after));
                },
            ),
            EngineError::DeadlineExceeded => status(
                Code::DeadlineExceeded,
                "DEADLINE_EXCEEDED",
                "the deadline passed before the request was decided",
                &[],
                plain,
            ),
            EngineError::Unavailable { retry_after } => unavailable(
                "DATABASE_UNAVAILABLE",
                "the database can't be reached: retry with the same idempotency key",
                retry_after,
            ),
            EngineError::Aborted => status(
                Code::Aborted,
                "TOO_MANY_WRITERS",
                "other writers were first too often: retry with the same idempotency key",
                &[],
                |details| {
                    details.set_retry_info(Some(Duration::from_millis(100)));
                },
            ),
            EngineError::Internal => {
                status(Code::Internal, "INTERNAL", "internal error", &[], plain)
            }
        }
    }
}

/// A refusal by the core.
pub fn of_refusal(refusal: &Refusal) -> Status {
    let message = refusal.to_string();
    let not_found = |reason| status(Code::NotFound, reason, message.clone(), &[], plain);
    let argument = |reason, field: &str, metadata: &[(&str, String)]| {
        let violation = FieldViolation::new(field, message.clone());
        status(
            Code::InvalidArgument,
            reason,
            message.clone(),
            metadata,
            |details| {
                details.set_bad_request(vec![violation]);
            },
        )
    };
    let precondition = |reason: &str, subject: String, metadata: &[(&str, String)]| {
        let violation = PreconditionViolation::new(reason, subject, message.clone());
        status(
            Code::FailedPrecondition,
            reason,
            message.clone(),
            metadata,
            |details| {
                details.set_precondition_failure(vec![violation]);
            },
        )
    };
    match refusal {
        Refusal::TenantNotFound => not_found("TENANT_NOT_FOUND"),
        Refusal::ReservationNotFound(_) => not_found("RESERVATION_NOT_FOUND"),
        Refusal::BudgetNotFound { .. } => not_found("BUDGET_NOT_FOUND"),
        Refusal::EntryNotFound => not_found("ENTRY_NOT_FOUND"),
        Refusal::ApiKeyNotFound => not_found("API_KEY_NOT_FOUND"),
        Refusal::IdempotencyMismatch { field } => {
            let metadata = [("field", (*field).to_owned())];
            status(
                Code::AlreadyExists,
                "IDEMPOTENCY_MISMATCH",
                message.clone(),
                &metadata,
                plain,
            )
        }
        Refusal::UnitMismatch { field, unit, .. } => {
            argument("UNIT_MISMATCH", field, &[("unit", unit.to_string())])
        }
        Refusal::LeaseTooLong => argument("LEASE_TOO_LONG", "extend_by", &[]),
        Refusal::CreditExpired => argument("INVALID_REQUEST", "expire_time", &[]),
        Refusal::ReservationExpired { at } => precondition(
            "RESERVATION_EXPIRED",
            "reservation".to_owned(),
            &[("expire_time", at.to_string())],
        ),
        Refusal::ReservationFinalized { state } => precondition(
            "RESERVATION_FINALIZED",
            "reservation".to_owned(),
            &[("state", (*state).to_owned())],
        ),
        Refusal::ReservationNotExpired { state } => precondition(
            "RESERVATION_NOT_EXPIRED",
            "reservation".to_owned(),
            &[("state", (*state).to_owned())],
        ),
        Refusal::OverageRejected { unit, .. } => precondition(
            "OVERAGE_REJECTED",
            "reservation".to_owned(),
            &[("unit", unit.to_string())],
        ),
        Refusal::OverdraftLimitExceeded { scope, unit, .. } => precondition(
            "OVERDRAFT_LIMIT_EXCEEDED",
            scope.to_string(),
            &[("scope", scope.to_string()), ("unit", unit.to_string())],
        ),
        Refusal::TooManyExtensions => {
            precondition("TOO_MANY_EXTENSIONS", "reservation".to_owned(), &[])
        }
        Refusal::TenantClosed => precondition("TENANT_CLOSED", "tenant".to_owned(), &[]),
        Refusal::BudgetNotProvisioned { scope } => precondition(
            "BUDGET_NOT_PROVISIONED",
            scope.to_string(),
            &[("scope", scope.to_string())],
        ),
        Refusal::BudgetClosed => precondition("BUDGET_CLOSED", "budget".to_owned(), &[]),
        Refusal::BudgetUnlimited => precondition("BUDGET_UNLIMITED", "budget".to_owned(), &[]),
        Refusal::TooManyCredits(_) => precondition("TOO_MANY_CREDITS", "balance".to_owned(), &[]),
        Refusal::InsufficientRemaining { asked, remaining } => precondition(
            "INSUFFICIENT_REMAINING",
            "balance".to_owned(),
            &[
                ("asked", asked.to_string()),
                ("remaining", remaining.to_string()),
            ],
        ),
        // Never leaves the core; if it did, nothing was decided.
        Refusal::KeyUnknown => EngineError::Internal.into(),
        Refusal::AmountOverflow => precondition("AMOUNT_OVERFLOW", "amounts".to_owned(), &[]),
        Refusal::LooseningNotPermitted { target } => denied(
            "LOOSENING_NOT_PERMITTED",
            message.clone(),
            &[("target", target.clone())],
        ),
    }
}

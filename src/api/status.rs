//! The one place where a refusal becomes a gRPC status.
//!
//! Every error carries one `google.rpc.ErrorInfo` (domain `remit`, a stable
//! reason, and whatever varies in the text as metadata), and what else fits:
//! field violations, the failed precondition, when to retry.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, PreconditionViolation, StatusExt as _};

use crate::domain::permission::Permission;
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

/// The whole text of every INTERNAL, the same as that of the layers.
const INTERNAL_TEXT: &str = "internal error: the log has the cause under this request id";

fn plain(_: &mut ErrorDetails) {}

/// Most bytes of the field violations of one answer. Details travel in a trailer,
/// and clients on grpc-core (Python, C++, Ruby, PHP) take 8 KiB of them, in base64.
const VIOLATIONS_BYTES_MAX: usize = 3_000;
/// Most bytes of one violation's text.
const VIOLATION_BYTES_MAX: usize = 400;
/// Violations that the message repeats: the details name them all.
const VIOLATIONS_IN_MESSAGE: usize = 3;

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(VIOLATION_BYTES_MAX)]
}

/// INVALID_ARGUMENT, naming every bad field; where a trailer can't hold them all,
/// the first ones and how many more there are.
pub fn invalid(violations: &[(String, String)]) -> Status {
    let mut bytes = 0;
    let fitting = violations
        .iter()
        .take_while(|(field, text)| {
            // What protobuf puts around each is less than this.
            bytes += cut(field).len() + cut(text).len() + 12;
            bytes <= VIOLATIONS_BYTES_MAX
        })
        .count();
    let fitting = &violations[..fitting];
    let named: Vec<_> = fitting
        .iter()
        .take(VIOLATIONS_IN_MESSAGE)
        .map(|(field, text)| format!("{} {}", cut(field), cut(text)))
        .collect();
    let fields: Vec<_> = fitting
        .iter()
        .map(|(field, text)| FieldViolation::new(cut(field), cut(text)))
        .collect();
    let mut metadata = Vec::new();
    if let Some((field, _)) = fitting.first() {
        metadata.push(("field", cut(field).to_owned()));
    }
    if fitting.len() < violations.len() {
        let unnamed = violations.len() - fitting.len();
        metadata.push(("violations_not_named", unnamed.to_string()));
    }
    let mut message = named.join("; ");
    if named.len() < violations.len() {
        message.push_str(&format!("; and {} more", violations.len() - named.len()));
    }
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

/// PERMISSION_DENIED / PERMISSION_MISSING, naming what is missing.
pub fn permission_missing(permission: Permission, message: impl Into<String>) -> Status {
    let metadata = [("permission", format!("PERMISSION_{permission}"))];
    denied("PERMISSION_MISSING", message, &metadata)
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
            EngineError::Internal => status(Code::Internal, "INTERNAL", INTERNAL_TEXT, &[], plain),
        }
    }
}

/// A refusal by the core.
pub fn of_refusal(refusal: &Refusal) -> Status {
    let message = refusal.to_string();
    let not_found = |reason, metadata: &[(&str, String)]| {
        status(Code::NotFound, reason, message.clone(), metadata, plain)
    };
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
        Refusal::TenantNotFound => not_found("TENANT_NOT_FOUND", &[]),
        Refusal::ReservationNotFound(id) => not_found(
            "RESERVATION_NOT_FOUND",
            &[("reservation_id", id.to_string())],
        ),
        Refusal::BudgetNotFound {
            scope,
            unit,
            period,
        } => not_found(
            "BUDGET_NOT_FOUND",
            &[
                ("scope", scope.to_string()),
                ("unit", unit.to_string()),
                ("period", period.to_string()),
            ],
        ),
        Refusal::EntryNotFound => not_found("ENTRY_NOT_FOUND", &[]),
        Refusal::ApiKeyNotFound => not_found("API_KEY_NOT_FOUND", &[]),
        Refusal::SubscriptionNotFound => not_found("SUBSCRIPTION_NOT_FOUND", &[]),
        Refusal::AlreadyProvisioned { target } => status(
            Code::AlreadyExists,
            "ALREADY_PROVISIONED",
            message.clone(),
            &[("target", target.clone())],
            plain,
        ),
        Refusal::SubscriptionExists => status(
            Code::AlreadyExists,
            "SUBSCRIPTION_EXISTS",
            message.clone(),
            &[],
            plain,
        ),
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
        Refusal::AnswerArchived => status(
            Code::AlreadyExists,
            "ANSWER_ARCHIVED",
            message.clone(),
            &[],
            plain,
        ),
        Refusal::UnitMismatch {
            field,
            unit,
            counted,
            scope,
        } => {
            let counted: Vec<_> = counted.iter().map(|unit| unit.as_str()).collect();
            let mut metadata = vec![
                ("field", (*field).to_owned()),
                ("unit", unit.to_string()),
                ("counted", counted.join(",")),
            ];
            metadata.extend(scope.as_ref().map(|scope| ("scope", scope.to_string())));
            argument("UNIT_MISMATCH", field, &metadata)
        }
        Refusal::LeaseTooLong => argument(
            "LEASE_TOO_LONG",
            "extend_by",
            &[("field", "extend_by".to_owned())],
        ),
        Refusal::CreditExpired => argument(
            "INVALID_REQUEST",
            "expire_time",
            &[("field", "expire_time".to_owned())],
        ),
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
        Refusal::OverageRejected {
            unit,
            actual,
            reserved,
        } => precondition(
            "OVERAGE_REJECTED",
            "reservation".to_owned(),
            &[
                ("unit", unit.to_string()),
                ("actual", actual.to_string()),
                ("reserved", reserved.to_string()),
            ],
        ),
        Refusal::OverdraftLimitExceeded {
            scope,
            unit,
            debt,
            limit,
        } => precondition(
            "OVERDRAFT_LIMIT_EXCEEDED",
            scope.to_string(),
            &[
                ("scope", scope.to_string()),
                ("unit", unit.to_string()),
                ("debt", debt.to_string()),
                ("limit", limit.to_string()),
            ],
        ),
        Refusal::TooManyExtensions => {
            precondition("TOO_MANY_EXTENSIONS", "reservation".to_owned(), &[])
        }
        Refusal::TenantSuspended => precondition("TENANT_SUSPENDED", "tenant".to_owned(), &[]),
        Refusal::TenantClosed => precondition("TENANT_CLOSED", "tenant".to_owned(), &[]),
        Refusal::BudgetNotProvisioned { scope } => precondition(
            "BUDGET_NOT_PROVISIONED",
            scope.to_string(),
            &[("scope", scope.to_string())],
        ),
        Refusal::BudgetFrozen { scope } => precondition(
            "BUDGET_FROZEN",
            scope.to_string(),
            &[("scope", scope.to_string())],
        ),
        Refusal::BudgetClosed => precondition("BUDGET_CLOSED", "budget".to_owned(), &[]),
        Refusal::BudgetUnlimited => precondition("BUDGET_UNLIMITED", "budget".to_owned(), &[]),
        Refusal::TooManyCredits(_) => precondition("TOO_MANY_CREDITS", "balance".to_owned(), &[]),
        Refusal::ApprovalPending => precondition("APPROVAL_PENDING", "reservation".to_owned(), &[]),
        Refusal::ApprovalResolved { state, by } => precondition(
            "APPROVAL_RESOLVED",
            "approval".to_owned(),
            &[("state", (*state).to_owned()), ("by", by.clone())],
        ),
        Refusal::ApprovalExpired { at } => precondition(
            "APPROVAL_EXPIRED",
            "approval".to_owned(),
            &[("expire_time", at.to_string())],
        ),
        Refusal::ApprovalStopped { reason } => precondition(
            "APPROVAL_STOPPED",
            "approval".to_owned(),
            &[("cause", reason.code.as_str().to_owned())],
        ),
        Refusal::OwnApproval => denied("OWN_APPROVAL", message.clone(), &[]),
        Refusal::NotAnApprover { groups } => denied(
            "NOT_AN_APPROVER",
            message.clone(),
            &[("groups", groups.join(","))],
        ),
        Refusal::ScopeNotPermitted { scope } => denied(
            "SCOPE_NOT_PERMITTED",
            message.clone(),
            &[("scope", scope.clone())],
        ),
        Refusal::TooManyTools => precondition("TOO_MANY_TOOLS", "tenant".to_owned(), &[]),
        Refusal::TooManySubscriptions => {
            precondition("TOO_MANY_SUBSCRIPTIONS", "tenant".to_owned(), &[])
        }
        Refusal::TooManyFreezes => precondition("TOO_MANY_FREEZES", "tenant".to_owned(), &[]),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_mistakes_fit_into_a_trailer() {
        let long = "x".repeat(50_000);
        let violations: Vec<_> = (0..1_000)
            .map(|at| {
                (
                    format!("budgets[{at}].scope"),
                    "a scope that names its tenant".to_owned(),
                )
            })
            .chain([(long.clone(), long)])
            .collect();
        for violations in [&violations[..], &violations[999..]] {
            let status = invalid(violations);
            let sent = status.message().len() + status.details().len() * 4 / 3;
            assert!(sent < 8_000, "{sent} bytes");
            let details = status.get_error_details();
            let named = details
                .bad_request()
                .map_or(0, |bad| bad.field_violations.len());
            assert!(named > 0);
            let info = details.error_info().map(|info| info.metadata.clone());
            let unnamed = info.unwrap_or_default().remove("violations_not_named");
            let unnamed = unnamed.map_or(0, |count| count.parse().unwrap_or(0));
            assert_eq!(named + unnamed, violations.len());
        }
    }
}

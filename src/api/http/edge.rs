//! What stands around every call: its name, its log line, a place, a deadline, and that a
//! panic costs nobody else anything. As for gRPC, in HTTP's words.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use tracing::{Instrument as _, Span};

use super::Gateway;
use super::call::{Told, record_headers};
use super::problem::Fault;
use crate::api::layers::{Deadline, REQUEST_ID_HEADER, RequestIdentity, caught};

const TRACE_ID: HeaderName = HeaderName::from_static("x-cycles-trace-id");
const TENANT: HeaderName = HeaderName::from_static("x-cycles-tenant");
const RATE_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RATE_RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// Logs and counts when it is dropped: when there is an answer, or the client has left.
struct Completion {
    gateway: Gateway,
    span: Span,
    operation: &'static str,
    started: Instant,
    code: &'static str,
}

impl Drop for Completion {
    fn drop(&mut self) {
        let latency = self.started.elapsed();
        let (operation, code) = (self.operation, self.code);
        self.gateway
            .metrics
            .answered_by_gateway(operation, code, latency);
        let latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        macro_rules! line {
            ($level:ident) => {
                tracing::event!(
                    target: "remit::request",
                    parent: &self.span,
                    tracing::Level::$level,
                    code,
                    latency_us,
                    "answered"
                )
            };
        }
        match code {
            "INTERNAL_ERROR" => line!(WARN),
            // What agents ask stands in the ledger.
            _ if operation.starts_with("cycles.v1/") => line!(DEBUG),
            _ => line!(INFO),
        }
    }
}

/// Runs one call.
pub(super) async fn around(
    State(gateway): State<Gateway>,
    mut request: Request,
    next: Next,
) -> Response {
    let identity = RequestIdentity::of_gateway(request.headers());
    let operation = {
        let path = request.extensions().get::<MatchedPath>();
        operation(request.method(), path.map_or("", MatchedPath::as_str))
    };
    let span = tracing::error_span!(
        "cycles",
        method = operation,
        request_id = &*identity.request_id,
        trace_id = &*identity.trace_id,
    );
    let mut completion = Completion {
        gateway: gateway.clone(),
        span: span.clone(),
        operation,
        started: Instant::now(),
        code: "CANCELLED",
    };
    let told = Told::default();
    let deadline = tokio::time::Instant::now() + gateway.deadline;
    let extensions = request.extensions_mut();
    extensions.insert(identity.clone());
    extensions.insert(told.clone());
    extensions.insert(Deadline(deadline));

    let in_time = async {
        // A busy server must not look like a dead one.
        let slot = match operation {
            "cycles.v1/Health" => None,
            operation => Some(gateway.slots.take(operation)?),
        };
        let answer = tokio::time::timeout_at(deadline, next.run(request)).await;
        drop(slot);
        answer.map_err(|_| Fault::overdue(gateway.deadline))
    };
    let answered = caught(in_time).instrument(span).await;
    let mut response = match answered {
        Ok(Ok(response)) => response,
        Ok(Err(fault)) => fault.into_response(),
        Err(panicked) => Fault::from(panicked).into_response(),
    };
    completion.code = "OK";
    if let Some(fault) = response.extensions_mut().remove::<Box<Fault>>() {
        let fault = match gateway.is_admin {
            true => fault.of_admin(),
            false => *fault,
        };
        completion.code = fault.error;
        // What a route is taken with is said of a wrong method.
        let allow = response.headers_mut().remove(header::ALLOW);
        response = worded(&fault, &identity);
        if let Some(allow) = allow {
            response.headers_mut().insert(header::ALLOW, allow);
        }
    }
    let headers = response.headers_mut();
    for (name, value) in [
        (REQUEST_ID_HEADER, &*identity.request_id),
        (TRACE_ID, &*identity.trace_id),
        (TENANT, told.0.get().map_or("", String::as_str)),
    ] {
        if let (false, Ok(value)) = (value.is_empty(), HeaderValue::from_str(value)) {
            headers.insert(name, value);
        }
    }
    // Nothing is limited by rate.
    headers.insert(RATE_REMAINING, HeaderValue::from_static("-1"));
    headers.insert(RATE_RESET, HeaderValue::from_static("0"));
    response
}

/// The answer that says what went wrong.
fn worded(fault: &Fault, identity: &RequestIdentity) -> Response {
    let body = fault.body(&identity.request_id, &identity.trace_id);
    let kind = [(header::CONTENT_TYPE, "application/json")];
    let mut response = (fault.status, kind, body).into_response();
    let headers = response.headers_mut();
    record_headers(headers, &fault.decision_id, fault.sequence, fault.replayed);
    if let Some(retry_after) = fault.retry_after {
        // In whole seconds, and not too early.
        let seconds = retry_after.as_millis().div_ceil(1_000);
        let seconds = u64::try_from(seconds).unwrap_or(u64::MAX);
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// What a route is called in the log and in metrics.
fn operation(method: &Method, path: &str) -> &'static str {
    match (method.as_str(), path) {
        ("POST", "/v1/decide") => "cycles.v1/Decide",
        ("POST", "/v1/reservations") => "cycles.v1/Reserve",
        ("GET", "/v1/reservations") => "cycles.v1/ListReservations",
        ("GET", "/v1/reservations/{id}") => "cycles.v1/GetReservation",
        ("POST", "/v1/reservations/{id}/commit") => "cycles.v1/Commit",
        ("POST", "/v1/reservations/{id}/release") => "cycles.v1/Release",
        ("POST", "/v1/reservations/{id}/extend") => "cycles.v1/Extend",
        ("POST", "/v1/events") => "cycles.v1/CreateEvent",
        ("GET", "/v1/balances") => "cycles.v1/ListBalances",
        ("GET", path) if path.starts_with("/actuator/") => "cycles.v1/Health",
        ("POST", "/v1/admin/tenants") => "cycles.admin.v1/CreateTenant",
        ("GET", "/v1/admin/tenants") => "cycles.admin.v1/ListTenants",
        ("GET", "/v1/admin/tenants/{id}") => "cycles.admin.v1/GetTenant",
        ("PATCH", "/v1/admin/tenants/{id}") => "cycles.admin.v1/UpdateTenant",
        ("POST", "/v1/admin/api-keys") => "cycles.admin.v1/CreateApiKey",
        ("GET", "/v1/admin/api-keys") => "cycles.admin.v1/ListApiKeys",
        ("DELETE", "/v1/admin/api-keys/{id}") => "cycles.admin.v1/RevokeApiKey",
        ("POST", "/v1/admin/budgets") => "cycles.admin.v1/CreateBudget",
        ("GET", "/v1/admin/budgets") => "cycles.admin.v1/ListBudgets",
        ("PATCH", "/v1/admin/budgets") => "cycles.admin.v1/UpdateBudget",
        ("GET", "/v1/admin/budgets/lookup") => "cycles.admin.v1/GetBudget",
        ("POST", "/v1/admin/budgets/fund") => "cycles.admin.v1/FundBudget",
        ("POST", "/v1/admin/budgets/freeze") => "cycles.admin.v1/FreezeBudget",
        ("POST", "/v1/admin/budgets/unfreeze") => "cycles.admin.v1/UnfreezeBudget",
        ("GET", "/v1/auth/introspect") => "cycles.admin.v1/Introspect",
        ("GET", "/v1/admin/audit/logs") => "cycles.admin.v1/ListAuditLogs",
        _ => "other",
    }
}

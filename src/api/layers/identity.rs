//! Names each request, opens its span, and logs the one line that says how it
//! ended.

use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderName, HeaderValue, Request};
use tonic::body::Body;
use tonic::{Code, Status};
use tracing::Span;
use uuid::Uuid;

use super::{AUTHORITY_PREFIX, HEALTH_PREFIX, REFLECTION_PREFIX, code_name};
use crate::metrics::Metrics;

/// Carries the request id, in the request and in its answer.
pub const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

const CYCLES_TRACE_HEADER: HeaderName = HeaderName::from_static("x-cycles-trace-id");

const TRACEPARENT_HEADER: HeaderName = HeaderName::from_static("traceparent");

/// Longest request id that is taken from a client, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Longest method name that is logged, in bytes: a wrong path can have any length.
const LOGGED_METHOD_BYTES_MAX: usize = 256;

/// What a request is called in the log, in the ledger and by its client. Found in
/// the extensions of every request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestIdentity {
    /// The client's `x-request-id` where it matches `^[a-zA-Z0-9_.-]{1,128}$`, else
    /// a UUIDv7.
    pub request_id: Arc<str>,
    /// The W3C trace id of the client's `traceparent`, else a random one: 32
    /// lower-case hexadecimal digits.
    pub trace_id: Arc<str>,
}

impl RequestIdentity {
    /// An identity for work that no client asked for.
    pub fn generate() -> Self {
        Self::from_headers(&HeaderMap::new())
    }

    /// Of a call to the gateway: its request id is always a fresh one, and where there is
    /// no `traceparent` the trace is that of `x-cycles-trace-id`.
    pub(in crate::api) fn of_gateway(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let own = text(TRACEPARENT_HEADER)
            .and_then(trace_id_of)
            .map(str::to_owned);
        let named = text(CYCLES_TRACE_HEADER).map(str::to_ascii_lowercase);
        let named = named.filter(|id| is_id(id, 32));
        let fresh = || Uuid::new_v4().simple().to_string();
        Self {
            request_id: Uuid::new_v4().to_string().into(),
            trace_id: own.or(named).unwrap_or_else(fresh).into(),
        }
    }

    fn from_headers(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let request_id = match text(REQUEST_ID_HEADER).filter(|id| is_request_id(id)) {
            Some(id) => id.into(),
            None => Uuid::now_v7().to_string().into(),
        };
        let trace_id = match text(TRACEPARENT_HEADER).and_then(trace_id_of) {
            Some(id) => id.into(),
            None => Uuid::new_v4().simple().to_string().into(),
        };
        Self {
            request_id,
            trace_id,
        }
    }
}

fn is_request_id(text: &str) -> bool {
    (1..=REQUEST_ID_BYTES_MAX).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

fn is_hex(part: &str, digits: usize) -> bool {
    part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// An id of that many hexadecimal digits that are not all zero.
fn is_id(part: &str, digits: usize) -> bool {
    is_hex(part, digits) && part.bytes().any(|b| b != b'0')
}

/// The trace id of `00-<trace id>-<parent id>-<flags>`, W3C Trace Context 1. An
/// all-zero id is invalid there.
fn trace_id_of(traceparent: &str) -> Option<&str> {
    let mut parts = traceparent.split('-');
    let (version, trace, parent, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let valid = version == "00"
        && is_id(trace, 32)
        && is_id(parent, 16)
        && is_hex(flags, 2)
        && parts.next().is_none();
    valid.then_some(trace)
}

/// Logs when it is dropped, which is when the answer has left, or the client has.
pub(super) struct Completion {
    span: Span,
    request_id: Arc<str>,
    started: Instant,
    /// Probes come every few seconds, and what agents ask stands in the ledger: at
    /// DEBUG unless the server is at fault.
    quiet: bool,
    /// As headers or trailers said it. Absent: the client did not wait for it.
    code: Option<Code>,
    path: Box<str>,
    metrics: Metrics,
}

impl Completion {
    /// Names a request, in its extensions too, and opens its span.
    pub(super) fn open(request: &mut Request<Body>, metrics: Metrics) -> Self {
        let identity = RequestIdentity::from_headers(request.headers());
        let path = request.uri().path();
        let method = path.strip_prefix('/').unwrap_or(path);
        let method = &method[..method.floor_char_boundary(LOGGED_METHOD_BYTES_MAX)];
        // At ERROR so that the span is there for every line that the filter lets
        // through.
        let span = tracing::error_span!(
            "grpc",
            method,
            request_id = &*identity.request_id,
            trace_id = &*identity.trace_id,
        );
        let completion = Self {
            span,
            request_id: identity.request_id.clone(),
            started: Instant::now(),
            quiet: [AUTHORITY_PREFIX, HEALTH_PREFIX, REFLECTION_PREFIX]
                .iter()
                .any(|prefix| path.starts_with(prefix)),
            code: None,
            path: path.into(),
            metrics,
        };
        request.extensions_mut().insert(identity);
        completion
    }

    pub(super) fn span(&self) -> &Span {
        &self.span
    }

    /// Names the request in its answer.
    pub(super) fn sign(&self, headers: &mut HeaderMap) {
        if let Ok(value) = HeaderValue::from_str(&self.request_id) {
            headers.insert(REQUEST_ID_HEADER, value);
        }
    }

    /// Takes the code from headers or trailers.
    pub(super) fn note(&mut self, headers: &HeaderMap) {
        if let Some(code) = headers.get(Status::GRPC_STATUS) {
            self.code = Some(Code::from_bytes(code.as_bytes()));
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let latency = self.started.elapsed();
        self.metrics.answered(&self.path, code_name(code), latency);
        let latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        // `event!` takes its level at compile time.
        macro_rules! line {
            ($level:ident) => {
                tracing::event!(
                    target: "remit::request",
                    parent: &self.span,
                    tracing::Level::$level,
                    code = code_name(code),
                    latency_us,
                    "answered"
                )
            };
        }
        match code {
            Code::Unknown | Code::Internal | Code::DataLoss => line!(ERROR),
            Code::DeadlineExceeded | Code::Unimplemented | Code::Unavailable => line!(WARN),
            _ if self.quiet => line!(DEBUG),
            _ => line!(INFO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn identity(pairs: &[(HeaderName, &str)]) -> RequestIdentity {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(name, value.parse().expect("a header value"));
        }
        RequestIdentity::from_headers(&headers)
    }

    #[test]
    fn a_well_formed_request_id_is_taken_and_any_other_replaced() {
        let longest = "x".repeat(128);
        for good in ["a", "A.b_c-9", longest.as_str()] {
            let taken = identity(&[(REQUEST_ID_HEADER, good)]);
            assert_eq!(&*taken.request_id, good);
        }
        let too_long = "x".repeat(129);
        for bad in ["", "a b", "a/b", "é", too_long.as_str()] {
            let made = identity(&[(REQUEST_ID_HEADER, bad)]).request_id;
            assert_eq!(made.len(), 36, "{bad} was taken as {made}");
        }
    }

    #[test]
    fn a_trace_is_continued_and_a_malformed_one_replaced() {
        let good = format!("00-{TRACE}-00f067aa0ba902b7-01");
        assert_eq!(&*identity(&[(TRACEPARENT_HEADER, &good)]).trace_id, TRACE);
        for bad in [
            String::new(),
            TRACE.to_owned(),
            format!("ff-{TRACE}-00f067aa0ba902b7-01"),
            format!("00-{}-00f067aa0ba902b7-01", TRACE.to_uppercase()),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{TRACE}-00f067aa0ba902b7-1"),
            format!("00-{TRACE}-00f067aa0ba902b7-01-more"),
            format!("00-{}-00f067aa0ba902b7-01", &TRACE[1..]),
        ] {
            let made = identity(&[(TRACEPARENT_HEADER, &bad)]).trace_id;
            assert_ne!(&*made, TRACE, "{bad}");
            assert_eq!(made.len(), 32);
        }
    }

    #[test]
    fn generated_identities_differ() {
        let (a, b) = (RequestIdentity::generate(), RequestIdentity::generate());
        assert_ne!(a.request_id, b.request_id);
        assert_ne!(a.trace_id, b.trace_id);
    }
}

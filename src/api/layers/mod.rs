//! What stands around every RPC, whichever service it goes to. A request passes
//! these steps in this order, its answer in the opposite one:
//!
//! 1. `panic`: outermost, so that a fault of a step costs one request and not
//!    its whole connection. Once more inside `identity`, so that a handler's
//!    panic is answered with a request id and logged like any other failure.
//! 2. `identity`: before anything can refuse, so that refusals are named, counted
//!    and logged too.
//! 3. `concurrency`: before anything is read or waited for, so that a refusal
//!    costs next to nothing.
//! 4. `deadline`: around reading the request as well as working on it, so that
//!    a slow sender can't keep its slot.
//!
//! On its way back an answer becomes a `leaving` body: there `shape` words tonic's own
//! errors like ours, a panic ends a stream in order, and slot and log line wait for the
//! end.
//!
//! An error that leaves here carries exactly one `google.rpc.ErrorInfo`.

mod concurrency;
mod deadline;
mod identity;
mod leaving;
mod panic;
mod shape;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use tower::{Layer, Service};
use tracing::Instrument as _;

use concurrency::Slot;
use deadline::Deadlines;
use identity::Completion;
use leaving::leave;

use crate::metrics::Metrics;

pub use concurrency::Slots;
pub use deadline::Deadline;
pub use identity::{REQUEST_ID_HEADER, RequestIdentity};
pub(in crate::api) use panic::caught;

/// `google.rpc.ErrorInfo.domain` of every error.
const ERROR_DOMAIN: &str = "remit";

/// The whole text of every `INTERNAL`: what happened stands in the log, under the
/// request id.
const INTERNAL_TEXT: &str = "internal error: the log has the cause under this request id";

const AUTHORITY_PREFIX: &str = "/remit.v1.Authority/";
const HEALTH_PREFIX: &str = "/grpc.health.v1.Health/";
const REFLECTION_PREFIX: &str = "/grpc.reflection.";

/// The bounds that the layers keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLimits {
    /// Most requests in work in this process; a stream counts until it ends.
    pub max_concurrent_requests: usize,
    /// How long a request may take whose client names no deadline.
    pub default_deadline: Duration,
    /// The longest that a client's own deadline may be; a longer one is shortened.
    pub max_deadline: Duration,
}

/// Makes the layer for `tonic::transport::Server::layer`. Its clones, and all that
/// they are put around, share one count of requests in work.
pub fn stack(limits: &LayerLimits, metrics: Metrics) -> EdgeLayer {
    EdgeLayer {
        metrics,
        slots: Slots::new(limits.max_concurrent_requests),
        deadlines: Deadlines::new(limits.default_deadline, limits.max_deadline),
    }
}

/// The steps of this module as one [`tower::Layer`]. Made by [`stack`].
#[derive(Debug, Clone)]
pub struct EdgeLayer {
    metrics: Metrics,
    slots: Slots,
    deadlines: Deadlines,
}

impl<S> Layer<S> for EdgeLayer {
    type Service = Edge<S>;

    fn layer(&self, inner: S) -> Edge<S> {
        Edge {
            inner,
            steps: self.clone(),
        }
    }
}

impl EdgeLayer {
    /// The places for requests in work, to be shared with what is not behind this layer.
    pub fn slots(&self) -> Slots {
        self.slots.clone()
    }
}

/// A service behind the steps of this module.
#[derive(Debug, Clone)]
pub struct Edge<S> {
    inner: S,
    steps: EdgeLayer,
}

impl<S> Service<Request<Body>> for Edge<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // Only the instance that was polled ready may be called, so the clone
        // stays behind.
        let fresh = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, fresh);
        let steps = self.steps.clone();
        let answered = async move {
            let completion = Completion::open(&mut request, steps.metrics.clone());
            let span = completion.span().clone();
            let admitted = panic::caught(steps.admit(request, inner)).instrument(span);
            let (answer, slot) = match admitted.await {
                Ok(admitted) => admitted,
                Err(panicked) => (panicked.into_http(), None),
            };
            leave(answer, completion, slot)
        };
        Box::pin(async move {
            let answer = panic::caught(answered).await;
            Ok(answer.unwrap_or_else(Status::into_http))
        })
    }
}

impl EdgeLayer {
    /// The steps that may refuse, and the service. The slot is to be kept until the
    /// answer has left.
    async fn admit<S>(self, request: Request<Body>, mut inner: S) -> (Response<Body>, Option<Slot>)
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    {
        let slot = match self.slots.take(request.uri().path()) {
            Ok(slot) => slot,
            Err(refusal) => return (refusal.into_http(), None),
        };
        let Ok(answer) = self
            .deadlines
            .kept(request, |request| inner.call(request))
            .await;
        (answer, Some(slot))
    }
}

/// An error with one `ErrorInfo` and what else is in `details`.
fn refusal(
    code: Code,
    reason: &str,
    message: &str,
    metadata: HashMap<String, String>,
    mut details: ErrorDetails,
) -> Status {
    details.set_error_info(reason, ERROR_DOMAIN, metadata);
    Status::with_error_details(code, message, details)
}

/// The code as it is written in `google.rpc.Code`.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

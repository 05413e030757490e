//! A panic costs the request that it happened in, nothing else: its client gets
//! `INTERNAL` with a fixed text, the log gets the panic's own.

use std::any::Any;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use http::Response;
use http_body_util::{BodyExt as _, StreamBody};
use tonic::body::Body;
use tonic::codegen::Body as _;
use tonic::{Code, Status};
use tonic_types::ErrorDetails;

use super::{INTERNAL_TEXT, refusal};

/// Awaits `answer`. A panic on the way becomes a trailers-only `INTERNAL`: as HTTP
/// 500, which is the habit elsewhere, it would reach the client as `UNKNOWN`.
///
/// Unwind safety: what the panic may have left half changed is dropped with the
/// request, except for what it shares with others, and they share nothing here but
/// types that are whole after a panic (semaphores, channels, atomics).
pub(super) async fn caught<F>(answer: F) -> Result<Response<Body>, Infallible>
where
    F: Future<Output = Result<Response<Body>, Infallible>>,
{
    let mut answer = pin!(answer);
    std::future::poll_fn(move |cx| {
        match catch_unwind(AssertUnwindSafe(|| answer.as_mut().poll(cx))) {
            Ok(poll) => poll,
            Err(panic) => Poll::Ready(Ok(status_of(&*panic).into_http())),
        }
    })
    .await
}

/// The same for what a stream does after its headers have left: the body ends
/// there, with `INTERNAL` in its trailers.
pub(super) fn caught_in_body(response: Response<Body>) -> Response<Body> {
    response.map(|mut body| {
        // An ended body must stay one, else the headers of a trailers-only answer
        // are sent without the flag that makes them trailers.
        if body.is_end_stream() {
            return body;
        }
        let panicked = Arc::new(AtomicBool::new(false));
        let seen = panicked.clone();
        let frames = futures_util::stream::poll_fn(move |cx| {
            // What has panicked once is not called again.
            if seen.load(Ordering::Relaxed) {
                return Poll::Ready(None);
            }
            match catch_unwind(AssertUnwindSafe(|| Pin::new(&mut body).poll_frame(cx))) {
                Ok(poll) => poll,
                Err(panic) => {
                    log(&*panic);
                    seen.store(true, Ordering::Relaxed);
                    Poll::Ready(None)
                }
            }
        });
        let trailers = async move {
            let mut trailers = http::HeaderMap::new();
            if !panicked.load(Ordering::Relaxed) {
                return None;
            }
            match internal().add_header(&mut trailers) {
                Ok(()) => Some(Ok(trailers)),
                Err(status) => Some(Err(status)),
            }
        };
        Body::new(StreamBody::new(frames).with_trailers(trailers))
    })
}

fn status_of(panic: &(dyn Any + Send)) -> Status {
    log(panic);
    internal()
}

fn internal() -> Status {
    refusal(
        Code::Internal,
        "INTERNAL",
        INTERNAL_TEXT,
        [].into(),
        ErrorDetails::new(),
    )
}

fn log(panic: &(dyn Any + Send)) {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a text");
    tracing::error!(panic = text, "a request panicked");
}

//! A panic costs the request that it happened in, nothing else: its client gets
//! `INTERNAL` with a fixed text, the log gets the panic's own.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

use tonic::{Code, Status};
use tonic_types::ErrorDetails;

use super::{INTERNAL_TEXT, refusal};

/// Awaits `answer`. A panic on the way becomes an `INTERNAL`, to be sent as trailers:
/// as HTTP 500, which is the habit elsewhere, it would reach the client as `UNKNOWN`.
///
/// Unwind safety: what the panic may have left half changed is dropped with the
/// request, except for what it shares with others, and they share nothing here but
/// types that are whole after a panic (semaphores, channels, atomics).
pub(in crate::api) async fn caught<F: Future>(answer: F) -> Result<F::Output, Status> {
    let mut answer = pin!(answer);
    std::future::poll_fn(move |cx| {
        match catch_unwind(AssertUnwindSafe(|| answer.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(status_of(&*panic))),
        }
    })
    .await
}

/// What the client is told of a panic; the log gets the panic's own text.
pub(super) fn status_of(panic: &(dyn Any + Send)) -> Status {
    log(panic);
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

//! A panic costs the request that it happened in, nothing else: its client gets
//! `INTERNAL` with a fixed text, the log gets the panic's own.

use std::any::Any;

use tonic::{Code, Status};
use tonic_types::ErrorDetails;

use super::{INTERNAL_TEXT, refusal};
use crate::panics;

/// Awaits `answer`. A panic on the way becomes an `INTERNAL`, to be sent as trailers:
/// as HTTP 500, which is the habit elsewhere, it would reach the client as `UNKNOWN`.
///
/// Unwind safety: what the panic may have left half changed is dropped with the
/// request, except for what it shares with others, and they share nothing here but
/// types that are whole after a panic (semaphores, channels, atomics).
pub(in crate::api) async fn caught<F: Future>(answer: F) -> Result<F::Output, Status> {
    let answered = panics::caught(answer).await;
    answered.map_err(|panic| status_of_text(&panic))
}

/// What the client is told of a panic; the log gets the panic's own text.
pub(super) fn status_of(panic: &(dyn Any + Send)) -> Status {
    status_of_text(&panics::text(panic))
}

fn status_of_text(panic: &str) -> Status {
    tracing::error!(panic, "a request panicked");
    refusal(
        Code::Internal,
        "INTERNAL",
        INTERNAL_TEXT,
        [].into(),
        ErrorDetails::new(),
    )
}

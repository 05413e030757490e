//! Ends a request at its deadline with an answer that says what that means. tonic
//! has a timer of its own on `grpc-timeout`, outside these layers, which answers
//! `CANCELLED`: this one is a little earlier.

use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use tokio::time::Instant;
use tonic::Code;
use tonic::body::Body;
use tonic_types::ErrorDetails;

use super::{HEALTH_PREFIX, REFLECTION_PREFIX, refusal};

/// Methods of our own that stay open for as long as their client wants: streams, and one
/// that has a bound of its own.
const LONG_METHODS: [&str; 4] = [
    "/remit.v1.Ledger/WatchEntries",
    "/remit.v1.Authority/WaitReservation",
    "/remit.v1.Authority/AwaitReservation",
    "/remit.v1.Approvals/WatchApprovals",
];

const GRPC_TIMEOUT_HEADER: &str = "grpc-timeout";

/// How much before the client's deadline the answer leaves: this, since timers tick
/// in milliseconds and the answer needs some time to travel, ...
const MARGIN: Duration = Duration::from_millis(5);

/// ... and a hundredth of the whole, since grpc-core (Python, C++, Ruby, PHP) rounds
/// what it sends up to three digits and then keeps to the exact time itself, ...
const MARGIN_ROUNDING_DIVISOR: u32 = 100;

/// ... but never more than a tenth.
const MARGIN_MAX_DIVISOR: u32 = 10;

/// When the request's caller is answered at the latest: from then on nobody hears
/// what becomes of it. Found in the extensions of every request that has a
/// deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline(pub Instant);

#[derive(Debug, Clone)]
pub(super) struct Deadlines {
    default: Duration,
    max: Duration,
}

impl Deadlines {
    pub(super) fn new(default: Duration, max: Duration) -> Self {
        Self { default, max }
    }

    /// Runs `next`, with the deadline in the request's extensions, and answers in
    /// its place when the time is over. What `next` was doing is dropped.
    pub(super) async fn kept<F, E>(
        &self,
        mut request: Request<Body>,
        next: impl FnOnce(Request<Body>) -> F,
    ) -> Result<Response<Body>, E>
    where
        F: Future<Output = Result<Response<Body>, E>>,
    {
        let Some(allowed) = self.allowed(request.uri().path(), request.headers()) else {
            return next(request).await;
        };
        // None: so far ahead that the clock can't say it.
        let Some(deadline) = Instant::now().checked_add(allowed) else {
            return next(request).await;
        };
        if allowed.is_zero() {
            return Ok(exceeded(allowed));
        }
        request.extensions_mut().insert(Deadline(deadline));

        let mut answer = pin!(next(request));
        let mut timer = pin!(tokio::time::sleep_until(deadline));
        std::future::poll_fn(move |cx| {
            if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
                return Poll::Ready(answer);
            }
            // The clock counts as well as the timer: the task may be woken by
            // tonic's timer, in the same tick as ours and before it.
            if timer.as_mut().poll(cx).is_ready() || Instant::now() >= deadline {
                return Poll::Ready(Ok(exceeded(allowed)));
            }
            Poll::Pending
        })
        .await
    }

    /// How long the request may take. None: without end.
    fn allowed(&self, path: &str, headers: &HeaderMap) -> Option<Duration> {
        let own = headers
            .get(GRPC_TIMEOUT_HEADER)
            .and_then(|value| value.to_str().ok())
            .and_then(parse_timeout)
            .map(|timeout| timeout - margin(timeout));
        if is_long(path) {
            return own;
        }
        Some(own.unwrap_or(self.default).min(self.max))
    }
}

fn margin(timeout: Duration) -> Duration {
    (MARGIN + timeout / MARGIN_ROUNDING_DIVISOR).min(timeout / MARGIN_MAX_DIVISOR)
}

fn is_long(path: &str) -> bool {
    LONG_METHODS.contains(&path)
        || path.starts_with(REFLECTION_PREFIX)
        || path.strip_prefix(HEALTH_PREFIX) == Some("Watch")
}

/// `grpc-timeout`: one to eight digits and a unit. Anything else counts as absent,
/// as it does for tonic.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (unit_at, unit) = text.char_indices().next_back()?;
    let digits = &text[..unit_at];
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(count * 3_600)),
        'M' => Some(Duration::from_secs(count * 60)),
        'S' => Some(Duration::from_secs(count)),
        'm' => Some(Duration::from_millis(count)),
        'u' => Some(Duration::from_micros(count)),
        'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

fn exceeded(allowed: Duration) -> Response<Body> {
    refusal(
        Code::DeadlineExceeded,
        "DEADLINE_EXCEEDED",
        "the deadline passed before the answer was there: whether a mutating call took effect is \
         unknown, so retry it with the same idempotency key",
        [("deadline_ms".to_owned(), allowed.as_millis().to_string())].into(),
        ErrorDetails::new(),
    )
    .into_http()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNARY: &str = "/remit.v1.Authority/Reserve";

    fn allowed(path: &str, timeout: Option<&str>) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        if let Some(timeout) = timeout {
            headers.insert(GRPC_TIMEOUT_HEADER, timeout.parse().expect("a header"));
        }
        Deadlines::new(Duration::from_secs(10), Duration::from_secs(30)).allowed(path, &headers)
    }

    #[test]
    fn a_clients_deadline_is_capped_and_answered_a_little_early() {
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(allowed(UNARY, None), ms(10_000));
        assert_eq!(allowed(UNARY, Some("2S")), ms(1_975));
        assert_eq!(allowed(UNARY, Some("20m")), ms(18));
        assert_eq!(allowed(UNARY, Some("1H")), ms(30_000));
        assert_eq!(allowed(UNARY, Some("99999999H")), ms(30_000));
        assert_eq!(allowed(UNARY, Some("0n")), ms(0));
    }

    #[test]
    fn a_malformed_deadline_counts_as_none() {
        for bad in [
            "",
            "S",
            "5",
            "5s",
            "-5S",
            "+5S",
            "5.0S",
            "123456789S",
            "5 S",
            "5SS",
        ] {
            assert_eq!(
                allowed(UNARY, Some(bad)),
                Some(Duration::from_secs(10)),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_stream_has_only_its_clients_deadline() {
        for path in [
            "/remit.v1.Ledger/WatchEntries",
            "/grpc.health.v1.Health/Watch",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ] {
            assert_eq!(allowed(path, None), None, "{path}");
            assert_eq!(
                allowed(path, Some("1H")),
                Some(Duration::from_secs(3_600 - 36) - MARGIN),
                "{path}"
            );
        }
        assert!(allowed("/grpc.health.v1.Health/Check", None).is_some());
    }
}

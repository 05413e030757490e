//! The layers as a whole, around made-up services.

mod server;

use std::future::{pending, ready};
use std::io::Write;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use http::{HeaderMap, HeaderValue};
use http_body_util::{BodyExt as _, Full};
use tonic::codegen::{Body as _, Bytes};
use tonic_types::StatusExt as _;
use tower::{ServiceExt as _, service_fn};

use super::*;

const RESERVE: &str = "/remit.v1.Authority/Reserve";
const HEALTH: &str = "/grpc.health.v1.Health/Check";
const PROVISION: &str = "/remit.v1.Provisioning/Provision";

fn limits() -> LayerLimits {
    LayerLimits {
        max_concurrent_requests: 64,
        default_deadline: Duration::from_secs(10),
        max_deadline: Duration::from_secs(30),
    }
}

fn request(path: &str) -> Request<Body> {
    Request::builder()
        .method("POST")
        .uri(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::empty())
        .expect("a request")
}

fn with_header(mut request: Request<Body>, name: &'static str, value: &str) -> Request<Body> {
    let value = HeaderValue::from_str(value).expect("a header value");
    request.headers_mut().insert(name, value);
    request
}

fn ok() -> Response<Body> {
    Status::new(Code::Ok, "").into_http()
}

/// An answer whose trailers come after its headers.
fn with_trailers(status: Status) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    status.add_header(&mut trailers).expect("trailers");
    let body = Full::new(Bytes::from_static(b"data")).with_trailers(ready(Some(Ok(trailers))));
    Response::new(Body::new(body))
}

fn service<F>(
    mut answer: impl FnMut(Request<Body>) -> F + Clone + Send + 'static,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
+ Clone
+ Send
+ 'static
where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    service_fn(move |request| {
        let answer = answer(request);
        async move { Ok(answer.await) }
    })
}

async fn ask<F>(
    request: Request<Body>,
    answer: impl FnMut(Request<Body>) -> F + Clone + Send + 'static,
) -> Response<Body>
where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let edge = stack(&limits(), Metrics::new()).layer(service(answer));
    edge.oneshot(request).await.expect("infallible")
}

/// The status from headers or trailers, with its reason. There must be exactly one
/// `ErrorInfo`, of our domain.
async fn status_of(response: Response<Body>) -> (Status, String) {
    let (parts, body) = response.into_parts();
    let mut headers = parts.headers;
    if !headers.contains_key("grpc-status") {
        let collected = body.collect().await.expect("a whole body");
        headers = collected.trailers().expect("trailers").clone();
    } else {
        assert!(body.is_end_stream(), "an answer in its headers is over");
    }
    let status = Status::from_header_map(&headers).expect("a status");
    let details = status.check_error_details_vec().expect("details");
    let infos: Vec<_> = details
        .into_iter()
        .filter_map(|detail| match detail {
            tonic_types::ErrorDetail::ErrorInfo(info) => Some(info),
            _ => None,
        })
        .collect();
    assert_eq!(infos.len(), 1, "{status:?}");
    assert_eq!(infos[0].domain, "remit");
    let reason = infos[0].reason.clone();
    (status, reason)
}

#[tokio::test]
async fn a_panic_is_answered_with_internal_and_a_request_id() {
    let response = ask(request(RESERVE), |_| async { panic!("secret detail") }).await;
    assert_eq!(response.status(), 200);
    assert!(response.headers().contains_key("x-request-id"));
    let (status, reason) = status_of(response).await;
    assert_eq!(status.code(), Code::Internal);
    assert_eq!(status.message(), INTERNAL_TEXT);
    assert_eq!(reason, "INTERNAL");
}

#[tokio::test]
async fn a_panic_in_a_stream_ends_it_with_internal() {
    let response = ask(request(RESERVE), |_| async {
        let mut polls = 0;
        let body = Full::new(Bytes::from_static(b"data")).map_frame(move |frame| {
            polls += 1;
            assert!(polls > 1, "secret detail");
            frame
        });
        Response::new(Body::new(body))
    })
    .await;
    let (status, reason) = status_of(response).await;
    assert_eq!(status.code(), Code::Internal);
    assert_eq!(status.message(), INTERNAL_TEXT);
    assert_eq!(reason, "INTERNAL");
}

#[tokio::test]
async fn the_service_and_the_client_see_the_same_identity() {
    let asked = with_header(request(RESERVE), "x-request-id", "order-1");
    let response = ask(asked, |request| async move {
        let identity = request.extensions().get::<RequestIdentity>();
        let id = identity.expect("an identity").request_id.to_string();
        assert!(request.extensions().get::<Deadline>().is_some());
        let mut response = ok();
        let id = HeaderValue::from_str(&id).expect("a value");
        response.headers_mut().insert("seen", id);
        response
    })
    .await;
    assert_eq!(response.headers()["seen"], "order-1");
    assert_eq!(response.headers()["x-request-id"], "order-1");
}

#[tokio::test]
async fn one_request_too_many_is_refused_at_once_and_a_health_check_never() {
    let one = LayerLimits {
        max_concurrent_requests: 1,
        ..limits()
    };
    let edge = stack(&one, Metrics::new()).layer(service(|_| ready(with_trailers(Status::ok("")))));
    let open = edge
        .clone()
        .oneshot(request(RESERVE))
        .await
        .expect("infallible");

    let refused = edge
        .clone()
        .oneshot(request(RESERVE))
        .await
        .expect("infallible");
    let (status, reason) = status_of(refused).await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(reason, "TOO_MANY_REQUESTS");
    assert!(status.get_details_retry_info().is_some());

    let health = edge
        .clone()
        .oneshot(request(HEALTH))
        .await
        .expect("infallible");
    assert!(!health.headers().contains_key("grpc-status"));

    drop(open);
    let next = edge
        .clone()
        .oneshot(request(RESERVE))
        .await
        .expect("infallible");
    assert!(!next.headers().contains_key("grpc-status"));
    next.into_body()
        .collect()
        .await
        .expect("the body, whose end frees the slot");
    let last = edge.oneshot(request(RESERVE)).await.expect("infallible");
    assert!(!last.headers().contains_key("grpc-status"));
}

#[tokio::test]
async fn a_request_that_its_client_gives_up_frees_its_slot() {
    let one = LayerLimits {
        max_concurrent_requests: 1,
        ..limits()
    };
    let layer = stack(&one, Metrics::new());
    let stuck = layer.layer(service(|_| pending()));
    let given_up = tokio::time::timeout(Duration::from_millis(10), stuck.oneshot(request(RESERVE)));
    assert!(given_up.await.is_err());

    let edge = layer.layer(service(|_| ready(ok())));
    let next = edge.oneshot(request(RESERVE)).await.expect("infallible");
    assert_eq!(next.headers()["grpc-status"], "0");
}

#[tokio::test]
async fn the_deadline_is_answered_in_time_with_what_it_means() {
    let started = Instant::now();
    let asked = with_header(request(RESERVE), "grpc-timeout", "100m");
    let (status, reason) = status_of(ask(asked, |_| pending()).await).await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_eq!(reason, "DEADLINE_EXCEEDED");
    assert!(status.message().contains("same idempotency key"));
    assert!(started.elapsed() >= Duration::from_millis(90));

    let short = LayerLimits {
        default_deadline: Duration::from_millis(20),
        ..limits()
    };
    let edge = stack(&short, Metrics::new()).layer(service(|_| pending()));
    let by_default = edge.oneshot(request(RESERVE)).await.expect("infallible");
    assert_eq!(by_default.headers()["grpc-status"], "4");
}

#[tokio::test]
async fn a_request_whose_deadline_has_passed_is_not_begun() {
    let asked = with_header(request(RESERVE), "grpc-timeout", "0m");
    let response = ask(asked, |_| async { panic!("begun") }).await;
    assert_eq!(response.headers()["grpc-status"], "4");
}

#[tokio::test]
async fn errors_without_details_get_them_in_headers_and_in_trailers() {
    let table = [
        (
            Status::not_found("no such service"),
            Code::NotFound,
            "NOT_FOUND",
        ),
        (
            Status::unimplemented(""),
            Code::Unimplemented,
            "METHOD_NOT_FOUND",
        ),
        (
            Status::internal("Error encoding: secret"),
            Code::Internal,
            "INTERNAL",
        ),
        (
            Status::out_of_range("ours"),
            Code::OutOfRange,
            "OUT_OF_RANGE",
        ),
        (Status::unknown(""), Code::Unknown, "UNKNOWN"),
        (
            Status::internal("failed to decode Protobuf message: invalid varint"),
            Code::InvalidArgument,
            "MALFORMED_MESSAGE",
        ),
    ];
    for (made, code, reason) in table {
        let in_headers = made.clone();
        let response = ask(request(RESERVE), move |_| {
            ready(in_headers.clone().into_http())
        })
        .await;
        let (status, found) = status_of(response).await;
        assert_eq!((status.code(), found.as_str()), (code, reason));
        assert!(!status.message().contains("secret"));

        let in_trailers = made.clone();
        let response = ask(request(RESERVE), move |_| {
            ready(with_trailers(in_trailers.clone()))
        });
        let (status, found) = status_of(response.await).await;
        assert_eq!((status.code(), found.as_str()), (code, reason));
    }
}

#[tokio::test]
async fn errors_with_details_pass_unchanged() {
    let made = refusal(
        Code::Internal,
        "OURS",
        "failed to decode Protobuf message: not really",
        [("key".to_owned(), "value".to_owned())].into(),
        ErrorDetails::new(),
    );
    let sent = made.clone();
    let response = ask(request(RESERVE), move |_| ready(sent.clone().into_http())).await;
    let (status, _) = status_of(response).await;
    assert_eq!(status.code(), made.code());
    assert_eq!(status.message(), made.message());
    assert_eq!(status.details(), made.details());
}

/// Collects what is logged on this thread.
#[derive(Clone, Default)]
struct Log(std::sync::Arc<Mutex<Vec<u8>>>);

impl Log {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().expect("no panic while it is held")
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.bytes().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn each_request_is_logged_in_one_line_at_the_level_of_its_code() {
    let log = Log::default();
    let lines = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(move || lines.clone())
        .finish();
    // With a single subscriber in the process, tracing would ask the thread that
    // first comes to an event, which is often another test's, and remember its no.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    let _here = tracing::subscriber::set_default(subscriber);

    let table = [
        (RESERVE, Code::Ok, "DEBUG"),
        (PROVISION, Code::Ok, "INFO"),
        (RESERVE, Code::NotFound, "DEBUG"),
        (PROVISION, Code::NotFound, "INFO"),
        (RESERVE, Code::DeadlineExceeded, "WARN"),
        (RESERVE, Code::Unavailable, "WARN"),
        (RESERVE, Code::DataLoss, "ERROR"),
        (HEALTH, Code::Ok, "DEBUG"),
        (HEALTH, Code::Unavailable, "WARN"),
    ];
    for (path, code, level) in table {
        for in_trailers in [false, true] {
            log.bytes().clear();
            let asked = with_header(request(path), "x-request-id", "logged");
            let response = ask(asked, move |_| {
                let status = Status::new(code, "text");
                ready(match in_trailers {
                    true => with_trailers(status),
                    false => status.into_http(),
                })
            })
            .await;
            response.into_body().collect().await.expect("a body");
            let text = String::from_utf8_lossy(&log.bytes()).into_owned();
            assert_eq!(text.lines().count(), 1, "{text}");
            for part in [
                level,
                &format!("code=\"{}\"", code_name(code)),
                "latency_us=",
                "request_id=\"logged\"",
                "trace_id=",
                &format!("method=\"{}\"", &path[1..]),
            ] {
                assert!(text.contains(part), "no {part} in {text}");
            }
        }
    }

    log.bytes().clear();
    let (status, _) = status_of(ask(request(RESERVE), |_| async { panic!("why") }).await).await;
    assert_eq!(status.code(), Code::Internal);
    let text = String::from_utf8_lossy(&log.bytes()).into_owned();
    assert!(
        text.contains("panic=\"why\"") && text.contains("code=\"INTERNAL\""),
        "{text}"
    );

    log.bytes().clear();
    let stuck = stack(&limits(), Metrics::new()).layer(service(|_| pending()));
    let given_up = tokio::time::timeout(Duration::from_millis(5), stuck.oneshot(request(RESERVE)));
    assert!(given_up.await.is_err());
    let text = String::from_utf8_lossy(&log.bytes()).into_owned();
    assert!(
        text.contains("DEBUG") && text.contains("code=\"CANCELLED\""),
        "{text}"
    );
}

//! The layers in a real server, asked by a real client.

use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::server::NamedService;
use tonic::transport::{Channel, Endpoint, Server};

use super::*;

/// Never answers.
#[derive(Clone)]
struct Stuck;

impl NamedService for Stuck {
    const NAME: &'static str = "test.Stuck";
}

impl Service<Request<Body>> for Stuck {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = std::future::Pending<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        pending()
    }
}

/// A server with the health service, which takes messages of up to 64 bytes, and
/// [`Stuck`].
async fn server() -> Channel {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (_, health) = tonic_health::server::health_reporter();
    let health = health
        .max_decoding_message_size(64)
        .accept_compressed(tonic::codec::CompressionEncoding::Gzip);
    let serving = Server::builder()
        .layer(stack(&limits(), Metrics::new()))
        .add_service(health)
        .add_service(Stuck)
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serving);
    Endpoint::from_shared(format!("http://{address}"))
        .expect("an endpoint")
        .connect()
        .await
        .expect("a connection")
}

fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("a short message");
    [&[flag], &length.to_be_bytes()[..], message].concat()
}

#[tokio::test]
async fn what_tonic_refuses_by_itself_reaches_a_client_in_our_form() {
    // 1 KiB of zeros.
    let bomb = hex::decode("1f8b080000000000020363601805a360148c5400002eafb5ef00040000")
        .expect("hexadecimal");
    let table = [
        (
            "/grpc.health.v1.Health/Chek",
            None,
            framed(0, b""),
            Code::Unimplemented,
            "METHOD_NOT_FOUND",
        ),
        (
            "/no.such.Service/Method",
            None,
            framed(0, b""),
            Code::Unimplemented,
            "METHOD_NOT_FOUND",
        ),
        (
            HEALTH,
            None,
            framed(0, b"\xff\xff\xff"),
            Code::InvalidArgument,
            "MALFORMED_MESSAGE",
        ),
        (
            HEALTH,
            None,
            vec![],
            Code::InvalidArgument,
            "MALFORMED_MESSAGE",
        ),
        (
            HEALTH,
            None,
            framed(0, b"abc")[..6].to_vec(),
            Code::InvalidArgument,
            "MALFORMED_MESSAGE",
        ),
        (
            HEALTH,
            None,
            framed(7, b""),
            Code::InvalidArgument,
            "MALFORMED_MESSAGE",
        ),
        (
            HEALTH,
            None,
            framed(0, &[0; 65]),
            Code::ResourceExhausted,
            "MESSAGE_TOO_LARGE",
        ),
        (
            HEALTH,
            Some("gzip"),
            framed(1, &bomb),
            Code::ResourceExhausted,
            "MESSAGE_TOO_LARGE",
        ),
        (
            HEALTH,
            Some("snappy"),
            framed(1, b"abc"),
            Code::Unimplemented,
            "COMPRESSION_NOT_SUPPORTED",
        ),
    ];
    let channel = server().await;
    for (path, encoding, body, code, reason) in table {
        let mut asked = request(path).map(|_| Body::new(Full::new(Bytes::from(body))));
        if let Some(encoding) = encoding {
            asked = with_header(asked, "grpc-encoding", encoding);
        }
        let response = channel.clone().oneshot(asked).await.expect("an answer");
        assert!(response.headers().contains_key("x-request-id"));
        let (status, found) = status_of(response).await;
        assert_eq!(
            (status.code(), found.as_str()),
            (code, reason),
            "{status:?}"
        );
    }

    // The service's own error, and its answer.
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
    let unknown = tonic_health::pb::HealthCheckRequest {
        service: "nobody".to_owned(),
    };
    let status = client.check(unknown).await.expect_err("not registered");
    assert_eq!(status.code(), Code::NotFound);
    let info = status.get_details_error_info().expect("an ErrorInfo");
    assert_eq!(info.reason, "NOT_FOUND");
    let whole = tonic_health::pb::HealthCheckRequest::default();
    client.check(whole).await.expect("serving");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_layers_answer_before_tonics_own_timer() {
    let channel = server().await;
    let mut answered = 0;
    // The client has a timer of its own, which may be first on a busy machine: then
    // there is no answer to look at, and another round is tried.
    for _round in 0..50 {
        let calls = (0..30).map(|i| {
            let timeout = ["3m", "30m", "120m"][i % 3];
            let asked = with_header(request("/test.Stuck/Method"), "grpc-timeout", timeout);
            tokio::spawn(channel.clone().oneshot(asked))
        });
        for call in calls.collect::<Vec<_>>() {
            if let Ok(response) = call.await.expect("no panic") {
                let (status, reason) = status_of(response).await;
                assert_eq!(status.code(), Code::DeadlineExceeded);
                assert_eq!(reason, "DEADLINE_EXCEEDED");
                answered += 1;
            }
        }
        if answered > 0 {
            return;
        }
    }
    panic!("the client's own timer was first in every call");
}

//! The Cycles protocol over HTTP/JSON, for agents that speak it already.
//!
//! A thin translation: each call becomes a request to the gRPC services in this process,
//! and their answer or error becomes the protocol's. It holds no rule of its own; what it
//! refuses by itself is what can't be said to the services.

mod admin;
mod answered;
mod call;
mod edge;
mod kept;
mod problem;
mod reads;
mod runtime;
mod serve;
mod strict;
mod translate;
mod wire;

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::watch;

use crate::api::grpc::Services;
use crate::api::layers::Slots;
use crate::metrics::Metrics;
use problem::Fault;

pub use serve::{Listening, tls};

/// What all calls share.
#[derive(Debug, Clone)]
pub struct Gateway {
    /// What is asked.
    pub services: Services,
    /// What is counted.
    pub metrics: Metrics,
    /// Places for calls in work, the same as those of gRPC calls.
    pub slots: Slots,
    /// How long a call may take.
    pub deadline: Duration,
    /// Largest body.
    pub max_body_bytes: usize,
    /// Whether requests can be decided.
    pub ready: watch::Receiver<bool>,
    /// Which plane it is.
    pub is_admin: bool,
}

impl Gateway {
    /// What agents call.
    pub fn runtime(mut self) -> Router {
        self.is_admin = false;
        self.finish(runtime::routes())
    }

    /// What operators call.
    pub fn admin(mut self) -> Router {
        self.is_admin = true;
        self.finish(admin::routes())
    }

    fn finish(self, routes: Router<Self>) -> Router {
        routes
            .route("/actuator/health", get(readiness))
            .route("/actuator/health/readiness", get(readiness))
            .route("/actuator/health/liveness", get(liveness))
            .fallback(unknown_route)
            .method_not_allowed_fallback(wrong_method)
            .layer(from_fn_with_state(self.clone(), edge::around))
            .with_state(self)
    }
}

async fn liveness() -> Response {
    health(true)
}

async fn readiness(State(gateway): State<Gateway>) -> Response {
    health(*gateway.ready.borrow())
}

fn health(up: bool) -> Response {
    let kind = [(axum::http::header::CONTENT_TYPE, "application/json")];
    match up {
        true => (StatusCode::OK, kind, r#"{"status":"UP"}"#),
        false => (
            StatusCode::SERVICE_UNAVAILABLE,
            kind,
            r#"{"status":"DOWN"}"#,
        ),
    }
    .into_response()
}

async fn unknown_route() -> Fault {
    Fault::new(
        StatusCode::NOT_FOUND,
        "NOT_FOUND",
        "there is no such endpoint",
    )
}

async fn wrong_method() -> Fault {
    Fault::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "INVALID_REQUEST",
        "the endpoint does not take this method",
    )
}

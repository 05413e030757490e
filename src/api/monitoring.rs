//! What machines that watch the process ask it over HTTP: `/metrics` for
//! Prometheus, `/livez` and `/readyz` for probes that don't speak gRPC.

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::sync::watch;

use crate::metrics::Metrics;

/// As the OpenMetrics specification names it.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The routes. `ready` says whether requests can be decided.
pub fn router(metrics: Metrics, ready: watch::Receiver<bool>) -> Router {
    let readiness = move || {
        let ready = *ready.borrow();
        async move {
            if ready {
                (StatusCode::OK, "ready\n")
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
            }
        }
    };
    let text = move || {
        let text = metrics.encode();
        async move { ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response() }
    };
    Router::new()
        .route("/metrics", get(text))
        .route("/livez", get(|| async { "live\n" }))
        .route("/readyz", get(readiness))
}

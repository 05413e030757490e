//! What the process counts about itself, in the OpenMetrics text format.
//!
//! Names follow the Prometheus conventions: seconds, counters that end in `_total`.
//! No label is taken from what a caller writes, so that the number of series is
//! bounded.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// A method and how its call ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    /// `service/Method`, or `unknown`.
    method: &'static str,
    /// As in `google.rpc.Code`.
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfMethod {
    method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Because {
    reason: &'static str,
}

/// Why a batch was decided anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redone {
    /// Another writer was first, or a key turned out to be used.
    Conflict,
    /// The connection was lost.
    Disconnected,
}

/// The counters of one process. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Series>);

#[derive(Debug)]
struct Series {
    registry: Registry,
    requests: Family<Answered, Counter>,
    request_seconds: Family<OfMethod, Histogram, fn() -> Histogram>,
    batches: Counter,
    commands: Counter,
    redone: Family<Because, Counter>,
    refused: Family<Because, Counter>,
    waiting: Gauge,
    batch_seconds: Histogram,
}

impl Metrics {
    /// Everything at zero.
    pub fn new() -> Self {
        let mut series = Series {
            registry: Registry::with_prefix("remit"),
            requests: Family::default(),
            // 0.5 ms to 8 s
            request_seconds: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.000_5, 2.0, 15))
            }),
            batches: Counter::default(),
            commands: Counter::default(),
            redone: Family::default(),
            refused: Family::default(),
            waiting: Gauge::default(),
            batch_seconds: Histogram::new(exponential_buckets(0.000_25, 2.0, 15)),
        };
        let registry = &mut series.registry;
        registry.register(
            "requests",
            "Calls that were answered, by method and code",
            series.requests.clone(),
        );
        registry.register(
            "request_duration_seconds",
            "From the headers of a call to the end of its answer",
            series.request_seconds.clone(),
        );
        registry.register(
            "batches",
            "Batches that were decided and, where they changed something, committed",
            series.batches.clone(),
        );
        registry.register(
            "batch_commands",
            "Commands of those batches",
            series.commands.clone(),
        );
        registry.register(
            "batch_redone",
            "Attempts at a batch that were thrown away",
            series.redone.clone(),
        );
        registry.register(
            "commands_refused",
            "Commands that were refused before they were decided",
            series.refused.clone(),
        );
        registry.register(
            "commands_waiting",
            "Commands that wait for their batch",
            series.waiting.clone(),
        );
        registry.register(
            "batch_duration_seconds",
            "From taking a batch to its commit",
            series.batch_seconds.clone(),
        );
        Self(Arc::new(series))
    }

    /// A call was answered. `method` is `/service/Method` as it came.
    pub fn answered(&self, method: &str, code: &'static str, took: Duration) {
        let method = known(method);
        let of = Answered { method, code };
        self.0.requests.get_or_create(&of).inc();
        let of = OfMethod { method };
        let seconds = self.0.request_seconds.get_or_create(&of);
        seconds.observe(took.as_secs_f64());
    }

    /// A call of the gateway was answered. `code` is the protocol's error, or `OK`.
    pub fn answered_by_gateway(&self, method: &'static str, code: &'static str, took: Duration) {
        let of = Answered { method, code };
        self.0.requests.get_or_create(&of).inc();
        let of = OfMethod { method };
        let seconds = self.0.request_seconds.get_or_create(&of);
        seconds.observe(took.as_secs_f64());
    }

    /// A batch was decided.
    pub fn batch(&self, commands: usize, took: Duration) {
        self.0.batches.inc();
        let commands = u64::try_from(commands).unwrap_or(u64::MAX);
        self.0.commands.inc_by(commands);
        self.0.batch_seconds.observe(took.as_secs_f64());
    }

    /// An attempt at a batch was thrown away.
    pub fn redone(&self, because: Redone) {
        let reason = match because {
            Redone::Conflict => "conflict",
            Redone::Disconnected => "disconnected",
        };
        self.0.redone.get_or_create(&Because { reason }).inc();
    }

    /// A command was refused undecided: no room, or its time was over.
    pub fn refused(&self, reason: &'static str) {
        self.0.refused.get_or_create(&Because { reason }).inc();
    }

    /// Commands came to wait, or stopped waiting.
    pub fn waiting(&self, more: i64) {
        self.0.waiting.inc_by(more);
    }

    /// All of it as text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut text, &self.0.registry);
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// The method's own name for itself, so that a wrong path makes no series.
fn known(path: &str) -> &'static str {
    const METHODS: [&str; 38] = [
        "remit.v1.Authority/Decide",
        "remit.v1.Authority/Reserve",
        "remit.v1.Authority/Commit",
        "remit.v1.Authority/Release",
        "remit.v1.Authority/Extend",
        "remit.v1.Authority/Record",
        "remit.v1.Authority/GetReservation",
        "remit.v1.Authority/ListReservations",
        "remit.v1.Authority/ListBalances",
        "remit.v1.Authority/WaitReservation",
        "remit.v1.Authority/AwaitReservation",
        "remit.v1.Approvals/ListApprovals",
        "remit.v1.Approvals/GetApproval",
        "remit.v1.Approvals/ResolveApproval",
        "remit.v1.Approvals/WatchApprovals",
        "remit.v1.Events/CreateSubscription",
        "remit.v1.Events/ListSubscriptions",
        "remit.v1.Events/DeleteSubscription",
        "remit.v1.Events/RedeliverEvents",
        "remit.v1.Provisioning/Provision",
        "remit.v1.Provisioning/FundBudget",
        "remit.v1.Provisioning/GetBudget",
        "remit.v1.Provisioning/ListBudgets",
        "remit.v1.Provisioning/GetTenant",
        "remit.v1.Provisioning/ListTenants",
        "remit.v1.Provisioning/CreateApiKey",
        "remit.v1.Provisioning/ListApiKeys",
        "remit.v1.Provisioning/RevokeApiKey",
        "remit.v1.Ledger/ListEntries",
        "remit.v1.Ledger/GetEntry",
        "remit.v1.Ledger/WatchEntries",
        "remit.v1.Ledger/VerifyLedger",
        "remit.v1.Ledger/ReplayPolicy",
        "remit.v1.Provisioning/ListTools",
        "remit.v1.Provisioning/GetPolicy",
        "remit.v1.Provisioning/ListFreezes",
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
    ];
    let name = path.strip_prefix('/').unwrap_or(path);
    METHODS
        .into_iter()
        .find(|method| *method == name)
        .unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto;
    use prost::Message as _;

    #[test]
    fn every_method_has_a_series_of_its_own() {
        let described = prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS);
        for file in described.expect("descriptors").file {
            for service in &file.service {
                for method in &service.method {
                    let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                    assert_eq!(known(&format!("/{name}")), name);
                }
            }
        }
        assert_eq!(known("/remit.v1.Authority/Nonsense"), "other");
    }

    #[test]
    fn counters_stand_in_the_text() {
        let metrics = Metrics::new();
        metrics.answered(
            "/remit.v1.Authority/Reserve",
            "OK",
            Duration::from_millis(1),
        );
        metrics.batch(3, Duration::from_millis(1));
        let text = metrics.encode();
        let line = r#"remit_requests_total{method="remit.v1.Authority/Reserve",code="OK"} 1"#;
        assert!(text.contains(line), "{text}");
        assert!(text.contains("remit_batch_commands_total 3"), "{text}");
    }
}

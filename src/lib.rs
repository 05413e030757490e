//! Remit decides, before it happens, whether an agent's action may happen now.
//!
//! The path of a request: [`api`] authenticates it and converts it, once, into
//! types that can't be malformed; [`engine`] queues it in its tenant's lane;
//! [`store`] reads the state that it touches; [`domain`] decides, purely and in
//! order; [`store`] writes the whole batch in one statement; only then the caller
//! gets the answer. `docs/architecture.md` tells it file by file.

pub mod api;
mod approvals;
mod archive;
mod bench;
pub mod cli;
mod client;
pub mod config;
pub mod domain;
pub mod engine;
mod explain;
pub mod metrics;
mod panics;
mod policy;
pub mod server;
pub mod store;
mod subscriptions;
pub mod telemetry;
pub mod webhooks;

/// The generated messages and services of `remit.v1`. Named only in [`api`] and
/// by clients.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::float_arithmetic
)]
pub mod proto {
    tonic::include_proto!("remit.v1");
    include!(concat!(env!("OUT_DIR"), "/remit.v1.serde.rs"));

    /// The descriptors of every message and service, for reflection.
    pub const DESCRIPTORS: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/remit_descriptor.bin"));
}

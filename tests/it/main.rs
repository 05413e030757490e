//! The product from outside: real server processes, a real PostgreSQL, real gRPC
//! clients.

mod after_the_yes;
mod approvals;
mod archive;
mod bad_requests;
mod cases;
mod contention;
mod cycles;
mod gateway;
mod ladder;
mod operators;
mod outages;
mod plans;
mod policy;
mod rust_client;
mod support;
mod tampering;
mod tenancy;
mod webhooks;

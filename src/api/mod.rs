//! The edge: what a message becomes, who may send it, and how an answer is
//! worded. Each RPC authenticates, converts, makes one engine call and converts
//! back; it holds no rule of its own.

pub mod arguments;
pub mod auth;
pub mod convert;
pub mod fields;
pub mod grpc;
pub mod http;
pub mod layers;
pub mod monitoring;
pub mod page;
pub mod status;

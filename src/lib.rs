//! x
#[allow(missing_docs)]
pub mod proto {
    tonic::include_proto!("remit.v1");
    include!(concat!(env!("OUT_DIR"), "/remit.v1.serde.rs"));
}
